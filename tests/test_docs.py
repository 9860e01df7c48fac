"""What the documents name is there: pages and their headings, commands, flags, recipes, fields."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from flaxcls import cli
from flaxcls.build import accepted
from flaxcls.config import default
from flaxcls.config.fields import fields
from flaxcls.config.recipes import known_recipes, load_recipe

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in (ROOT, ROOT / "docs", ROOT / "launch")
    for path in sorted(folder.glob("*.md"))
}
# Linked already; each goes from here when it is written.
every_page = pytest.mark.parametrize("page", PAGES)
every_page_without_mistakes = pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page != "docs/mistakes.md"],  # which names what is not there
)


def anchors(text):
    """Those that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {
        slug + f"-{slugs[:place].count(slug)}" * (slug in slugs[:place])
        for place, slug in enumerate(slugs)
    }


def options_in(path):
    """All options that the things which a section of the config names take."""
    names = accepted.SECTIONS[path].names
    options = {option for name in names for option in accepted.SECTIONS[path].options(name)}
    return {f"{path}.{option}" for option in options | accepted.SECTIONS[path].own}


@every_page
def test_links_lead_to_pages_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_is_linked_from_the_readme():
    links = re.findall(r"\]\(([^)#\s]+)\)", PAGES["README.md"])
    assert {page for page in PAGES if page.startswith("docs/")} <= {*links}


def test_readme_is_read_in_five_minutes():
    assert len(PAGES["README.md"].splitlines()) <= 130


def commands(text):
    """Modules after `python -m`, and `flaxcls` itself, each with what is on the line behind it."""
    text = re.sub(r"python -m\s+", "python -m ", text.replace("\\\n", " "))
    start = r"(?:python3? -m |`(?=flaxcls ))"
    return re.findall(start + r"((?:flaxcls|launch)[\w.]*)((?:(?! -- )[^`#\n])*)", text)


@every_page_without_mistakes
def test_commands_and_their_flags_exist(page):
    for name, arguments in commands(PAGES[page]):
        word = next(iter(re.findall(r"^ ([a-z]+)\b", arguments)), "")
        if name == "flaxcls" and word:
            assert word in cli.COMMANDS
            name = cli.COMMANDS[word]
        elif name == "flaxcls.data" and word:
            name = cli.COMMANDS[f"data {word}"]
        elif name == "flaxcls.report":  # a package
            name = cli.COMMANDS["report"]
        assert importlib.util.find_spec(name), name
        if name.startswith("flaxcls."):
            flags = getattr(importlib.import_module(name), "FLAGS", ())
            for flag in re.findall(r"--(\w+)(?!\w*\.)", arguments):
                assert flag in flags or flag == "help", (name, flag)


@every_page
def test_scripts_that_are_run_and_tests_that_are_named_exist(page):
    for script in re.findall(r"python3? ([\w/]+\.py)", PAGES[page]):
        assert (ROOT / script).is_file(), script
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert {*re.findall(r"`(test_\w+)`", PAGES[page])} <= files


@every_page_without_mistakes
def test_recipes_exist(page):
    text = PAGES[page]
    named = re.findall(r"configs/(?!NAME\b)(\w+)\.py", text)
    named += re.findall(r"--config=(?!FILE\b|NAME\b|configs/)([a-z]\w*)", text)
    assert {*named} <= known_recipes().keys()


@every_page_without_mistakes
def test_overrides_exist(page):
    known = {path for path, _ in fields(default())}
    known = known.union(
        *map(options_in, accepted.SECTIONS), (f"{path}.name" for path in accepted.SECTIONS)
    )
    assert {*re.findall(r"--config\.([a-z]\w*(?:\.\w+)*)", PAGES[page])} <= known


@every_page_without_mistakes
def test_recipes_take_the_overrides_that_go_with_them(page):
    for _, arguments in commands(PAGES[page]):
        recipe = re.search(r"--config=(?:configs/)?([a-z]\w*)(?!\w*/)", arguments)
        if recipe:
            overrides, _ = cli.split_overrides(shlex.split(arguments))
            accepted.check(load_recipe(recipe[1], overrides).config)


def test_recipes_and_results_has_every_recipe_once():
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["docs/recipes.md"], re.M)
    assert sorted([*rows, "cifar10_mlp", "folder"]) == sorted(
        path.stem for path in (ROOT / "configs").glob("*.py")
    )
