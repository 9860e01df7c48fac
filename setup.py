"""What pyproject.toml can't say: the recipes of configs/ are installed as flaxcls/configs/."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["flaxcls", "flaxcls.*"]), "flaxcls.configs"],
    package_dir={"flaxcls.configs": "configs"},
)
