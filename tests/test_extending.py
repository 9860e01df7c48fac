"""The blocks of docs/extending.md are a module and the lines of a recipe, which train."""

import json
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.mark.slow
def test_blocks_of_the_page_train_together(tmp_path, run_main):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    lines = [block for block in blocks if block.startswith("config.")]
    assert len(lines) == 7  # a kind each
    code = [block for block in blocks if block not in lines]
    (tmp_path / "mine.py").write_text("\n\n".join(code))
    body = "".join(f"    {line}\n" for block in lines for line in block.splitlines())
    (tmp_path / "recipe.py").write_text(
        "from flaxcls.config import default\n\n\ndef get_config():\n    config = default()\n"
        f"{body}    config.batch_size = 64\n    config.duration = '8 epochs'\n    return config\n"
    )
    run = tmp_path / "run"
    pickled = ("--config.input.mode=stream", "--config.input.processes=1")
    result = run_main(f"--config={tmp_path / 'recipe.py'}", f"--workdir={run}", *pickled)
    assert result.returncode == 0, result.stderr
    content = json.loads((run / "config.json").read_text())
    assert list(content["code"]["files"]) == ["mine.py"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval"]["accuracy"] > 0.9  # rows and columns are easily told apart


def test_every_name_that_the_page_has_of_flaxcls_is_there():
    text = PAGE.read_text()
    for name in re.findall(r"`(configs/[\w/]+\.py|flaxcls/\w+)`", text):
        assert (PAGE.parents[1] / name).exists(), name
    options = re.search(r"annotations of `flaxcls.config.options` \((.*?), \.\.\.\)", text)[1]
    from flaxcls.config import options as module

    assert all(hasattr(module, name) for name in re.findall(r"`(\w+)`", options))
