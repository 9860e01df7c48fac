"""What a page is made of: sections of blocks. How a block looks is blocks.html's macro of its name.

Texts are plain: whatever is in them, the template escapes it. Only an SVG of ours is Markup.
"""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup


class Number(NamedTuple):
    """A cell of a table that is sorted by a value; None, shown as a dash, comes last."""

    value: float | None
    text: str


def percent(share: float | None, digits: int = 1) -> Number:
    """A share, 0 to 1, as a cell."""
    return Number(share, "–" if share is None else f"{100 * share:.{digits}f} %")


def count(value: float | None) -> Number:
    """A number of things as a cell."""
    return Number(value, "–" if value is None else f"{value:,.0f}")


class Link(NamedTuple):
    """A cell that leads to another page."""

    text: str
    href: str  # relative to this page, quoted


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Note(NamedTuple):
    """A paragraph that stands out: something is missing or should be known."""

    text: str


class Tile(NamedTuple):
    """A number that one looks for first."""

    label: str
    value: str
    note: str = ""


class Tiles(NamedTuple):
    tiles: Sequence[Tile]


class Facts(NamedTuple):
    """Names and what they are."""

    facts: Sequence[tuple[str, str]]


class Table(NamedTuple):
    """A table whose first cell of a row names it.

    Cells are a Number or text, the first one may be a Link; `sortable` tables get buttons from the
    page's script, and are in order without it. A `folded` one is opened by who wants it.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Number | Link | str]]
    sortable: bool = False
    folded: bool = False


class Chart(NamedTuple):
    """A drawing by `svg`, and what its colours mean: (class of the style sheet, label) each."""

    title: str
    drawing: Markup
    legend: Sequence[tuple[str, str]] = ()
    caption: str = ""


class Charts(NamedTuple):
    """Charts side by side where there is room."""

    charts: Sequence[Chart]


class Matrix(NamedTuple):
    """A square table of counts, coloured by their share of the row."""

    caption: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]


class Image(NamedTuple):
    """A picture, as a data URI, whose pixels stay square."""

    uri: str
    alt: str
    caption: str


class Picture(NamedTuple):
    """A picture of a gallery: its lines say what it shows, the title where it is from."""

    uri: str
    alt: str
    lines: Sequence[tuple[str, str]]
    title: str = ""


class Gallery(NamedTuple):
    """Pictures with what they show; `wide` ones have twice the width of the others."""

    pictures: Sequence[Picture]
    wide: bool = False


Block = Text | Note | Tiles | Facts | Table | Charts | Matrix | Image | Gallery


class Section(NamedTuple):
    """A part of the page, with a heading that links to it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")
