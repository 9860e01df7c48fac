"""The page of an audit: one file with its pictures in it, no scripts, nothing from elsewhere."""

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from flaxcls.runtime.output import printable


class Card(NamedTuple):
    """One or two pictures (PNG), what is said of them, and where they are."""

    pictures: Sequence[bytes]
    text: str
    where: str


class Section(NamedTuple):
    """Pictures of a kind, the first of `count`; `caption` explains what is said of each."""

    title: str
    count: int
    caption: str
    cards: Sequence[Card]


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
ul { display: flex; flex-wrap: wrap; gap: .75rem; list-style: none; padding: 0; }
li { width: 7.5rem; overflow-wrap: anywhere; font-size: .85rem; }
li.pair { width: 13rem; }
img { width: 6rem; height: 6rem; object-fit: contain; image-rendering: pixelated; }
table { border-collapse: collapse; } th, td { padding: .15rem 1rem .15rem 0; text-align: left; }
td:last-child, th:last-child { text-align: right; }
"""


def render(
    title: str, sections: Sequence[Section], confused: Sequence[tuple[str, str, int]]
) -> str:
    """The page; `confused` has label, probable class and number of examples."""
    parts = [_section(section) for section in sections]
    rows = "".join(
        f"<tr><td>{_text(label)}</td><td>{_text(true)}</td><td>{count:,}</td></tr>\n"
        for label, true, count in confused
    )
    parts.append(
        "<h2>Classes that are confused</h2>\n<table><thead><tr><th>label</th><th>probably</th>"
        f"<th>examples</th></tr></thead>\n<tbody>{rows}</tbody></table>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Audit of {_text(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><main><h1>Audit of {_text(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _section(section: Section) -> str:
    shown = f", the first {len(section.cards):,} of {section.count:,}"
    count = shown if len(section.cards) < section.count else f": {section.count:,}"
    cards = "\n".join(map(_card, section.cards))
    head = f"<h2>{_text(section.title)}{count}</h2>"
    return f"{head}\n<p>{_text(section.caption)}</p>\n<ul>\n{cards}\n</ul>" if cards else head


def _card(card: Card) -> str:
    kind = ' class="pair"' if len(card.pictures) > 1 else ""
    where, images = _text(card.where), ""
    for picture in card.pictures:
        data = base64.b64encode(picture).decode()
        images += f'<img src="data:image/png;base64,{data}" alt="{where}">'
    return f'<li{kind} title="{where}">{images}<br>{_text(card.text)}</li>'


def _text(text: str) -> str:
    return escape(printable(text))
