"""Trains image classifiers with JAX and Flax.

`python -m flaxcls.main --help` is the way in from a shell; from Python, and in notebooks:

    import flaxcls

    summary = flaxcls.train("digits_cnn", "runs/digits", overrides={"duration": "5 epochs"})
    classifier = flaxcls.load("runs/digits")

Importing flaxcls takes no time and changes nothing: what follows is loaded when it is used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaxcls.api.inference import average as average
    from flaxcls.api.inference import evaluate as evaluate
    from flaxcls.api.inference import export as export
    from flaxcls.api.inference import load as load
    from flaxcls.api.insight import attack as attack
    from flaxcls.api.insight import audit as audit
    from flaxcls.api.insight import calibrate as calibrate
    from flaxcls.api.insight import corrupt as corrupt
    from flaxcls.api.insight import explain as explain
    from flaxcls.api.insight import search as search
    from flaxcls.api.insight import write_report as write_report
    from flaxcls.api.training import cross_validate as cross_validate
    from flaxcls.api.training import default_config as default_config
    from flaxcls.api.training import load_config as load_config
    from flaxcls.api.training import sweep_recipe as sweep_recipe
    from flaxcls.api.training import train as train
    from flaxcls.errors import FlaxclsError as FlaxclsError
    from flaxcls.errors import Interrupted as Interrupted
    from flaxcls.errors import ParityError as ParityError
    from flaxcls.inference.classifier import Prediction as Prediction
    from flaxcls.inference.ensemble import Ensemble as Ensemble
    from flaxcls.inference.predictor import Predictor as Predictor
    from flaxcls.insight.explainer import Explanation as Explanation
    from flaxcls.insight.search import Neighbor as Neighbor
    from flaxcls.training.hooks import StopTraining as StopTraining

# What there is, by the module that it is loaded from.
_NAMES = {
    "api.inference": ("average", "evaluate", "export", "load"),
    "api.insight": ("attack", "audit", "calibrate", "corrupt", "explain", "search", "write_report"),
    "api.training": ("cross_validate", "default_config", "load_config", "sweep_recipe", "train"),
    "errors": ("FlaxclsError", "Interrupted", "ParityError"),
    "inference.classifier": ("Prediction",),
    "inference.ensemble": ("Ensemble",),
    "inference.predictor": ("Predictor",),
    "insight.explainer": ("Explanation",),
    "insight.search": ("Neighbor",),
    "training.hooks": ("StopTraining",),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
__all__ = (*sorted(_MODULES),)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'flaxcls' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """A package in which `flaxcls.attack` is the function, also after the command is imported.

    Python sets a module as an attribute of its package; flaxcls/attack.py, which is there for
    `python -m flaxcls.attack`, stays in sys.modules alone, as do its like.
    """

    def __reduce__(self) -> tuple[Any, ...]:  # pickled by its name, as every other module is
        return importlib.import_module, (self.__name__,)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
