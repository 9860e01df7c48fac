"""benchmarks/tables.py fills the tables of docs/benchmarks.md that need no peer."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = """# Page

<!-- table steps -->
old
<!-- end of table -->

<!-- table plans -->
<!-- end of table -->
"""
RECIPE = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 8
    config.data.name = "fake"
    config.data.image_shape = (4, 4, 1)
    config.data.num_examples = 32
    config.model.name = "dense"
    config.model.widths = (2,)
    return config
"""


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    yield tables
    sys.modules.pop("tables")


@pytest.mark.slow
def test_table_is_filled_by_its_commands(tables, tmp_path, monkeypatch, capfd):
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "page.md").write_text(PAGE)
    table = tables.TABLES["steps"]
    rows = {"`tiny`": (f"--config={tmp_path}/recipe.py", "--steps=2", "--rounds=2")}
    monkeypatch.setitem(tables.TABLES, "steps", table._replace(rows=rows))
    monkeypatch.setattr(sys, "argv", ["tables.py", "steps", f"--page={tmp_path}/page.md"])
    assert tables.main() == 0
    before, text, after = re.fullmatch(
        r"(.*<!-- table steps -->\n)\n(.*?)\n(<!-- end of table -->.*)",
        (tmp_path / "page.md").read_text(),
        re.DOTALL,
    ).groups()
    assert before + "old\n" + after == PAGE
    machine, _, command, _, heading, line, row, _ = text.split("\n")
    assert re.search(r"^\d+ x .*; python 3.*, jax .*; commit \w+; \d{4}-\d\d-\d\d\. Load", machine)
    assert command == f"    python -m flaxcls.bench step --fake {' '.join(rows['`tiny`'])}"
    assert len({len(each.split(" | ")) for each in (heading, line, row)}) == 1
    rates = re.search(r"^\| `tiny` \| ([\d,]+) \(([\d,]+) to ([\d,]+)\) \|", row).groups()
    assert sorted(rates, key=lambda rate: int(rate.replace(",", "")))[1] == rates[0]
    assert f"median {rates[0]} images/s" in capfd.readouterr().out


def test_every_table_has_its_place_on_the_page(tables):
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in tables.TABLES:
        assert "\nfilled in\n" in tables.replaced(page, name, "filled in")
    with pytest.raises(ValueError, match="the page has no <!-- table none -->"):
        tables.replaced(page, "none", "")


def test_unknown_table_is_an_error(tables, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", "step"])
    with pytest.raises(SystemExit) as stop:
        tables.main()
    assert stop.value.code == 2
    assert "there is no table step, but startup, steps, plans" in capsys.readouterr().err


def test_rows_hold_what_the_commands_have_measured(tables):
    stages = {f"{stage}_{kind}": {"value": number} for number, stage in enumerate(tables.STAGES)
              for kind in ("cold", "warm")}  # fmt: skip
    cells = tables.startup_cells({"figures": stages})
    assert cells[0] == "0.00 / 0.00" and cells[-1] == "5.00 / 5.00"
    assert len(cells) == len(tables.TABLES["startup"].columns)
    step = {
        "batch_size": 256, "chips": 4, "memory: peak": 2**31, "flops": 24e9,
        "memory traffic": 226e6, "bytes_accessed": 392e6,
        "all-reduce: count": 3, "all-reduce: bytes": 1e8,
        "roofline_rate_per_chip": 1234.5, "compilation": 60.2,
    }  # fmt: skip
    steps = [{name: {"value": value} for name, value in step.items()}]
    cells = tables.plan_cells({"plans": [{"variants": [{"fits": True, "steps": steps}]}]})
    assert cells == ["64", "2.00", "24", "226", "392", "3 all-reduce", "1,234", "60"]
    assert len(cells) == len(tables.TABLES["plans"].columns)
    cells = tables.plan_cells({"plans": [{"variants": [{"fits": False}]}]})
    assert cells[0] == "does not fit" and len(cells) == len(tables.TABLES["plans"].columns)
