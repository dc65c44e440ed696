"""HTML and SVG that are escaped by construction: a text becomes markup through `element` alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from graftkit.report.style import STYLE

VOID = ("img", "meta", "br")
# what cannot be seen, or changes how other text is read: control characters, directions, halves of pairs
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
# a second lock besides the escaping: no scripts, and nothing from elsewhere
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
MADE_BY = "GraftKit report"  # the generator of a page, by which an older one is recognized


@dataclass(frozen=True)
class Markup:
    """A piece of HTML."""

    text: str


Child = Markup | str | int | float | None | Iterable["Child"]


def element(kind: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """Return an element. Children that are not markup are escaped; None is left out.

    Attributes are written with `_` for `-`, and `class_` for `class`; one that is None or False is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}' + ("" if value is True else f'="{escape(seen(str(value)))}"')
        for key, value in attributes.items() if value is not None and value is not False
    )  # fmt: skip
    if kind in VOID:
        return Markup(f"<{kind}{given}>")
    return Markup(f"<{kind}{given}>{''.join(_parts(children))}</{kind}>")


def _parts(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
            yield child.text
        elif isinstance(child, str | int | float):
            yield escape(seen(str(child)))
        elif child is not None:
            yield from _parts(child)


def seen(text: str) -> str:
    """Return a text with its invisible control characters written out, as in \\u202e."""
    return HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


def short(value: object, most: int = 80) -> str:
    """Return a value as one line of at most `most` characters."""
    text = " ".join(str(value)[: 20 * most].split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def breakable(text: str) -> Markup:
    """Return a name that may be broken over two lines after an underscore, as labels often have them."""
    return Markup("_<wbr>".join(escape(seen(part)) for part in text.split("_")))


def figure_text(value: object, digits: int = 4) -> str:
    """Format a metric: four decimals, fewer for large numbers; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else short(value, 20)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value:+}".replace("+inf", "∞").replace("-inf", "−∞")
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.5g}"


def table(
    caption: str, heads: list[str], rows: list[list[Child]], words: int = 1, **attributes: str
) -> Markup:
    """Return a table that scrolls within its own box. The first cell of a row is its header; the first `words` columns are
    texts, and the others numbers, which are aligned to the right."""
    kinds = ["" if i < words else "n" for i in range(len(heads))]
    head = [element("th", name, scope="col", class_=kind or None) for name, kind in zip(heads, kinds)]
    body = [
        element("tr", [
            element("td" if i else "th", cell, class_=kind or None, scope=None if i else "row", dir=None if kind else "auto")
            for i, (cell, kind) in enumerate(zip(row, kinds))
        ])
        for row in rows
    ]  # fmt: skip
    made = element("table", element("caption", element("span", caption)), element("thead", element("tr", head)),
                   element("tbody", body), **attributes)  # fmt: skip
    return scrolling(caption, made)


def scrolling(what: str, *children: Child) -> Markup:
    """Return a box that scrolls sideways, also with the keyboard."""
    return element("div", *children, class_="scroll", role="region", aria_label=what, tabindex=0)


def details(summary: str, *children: Child) -> Markup:
    return element("details", element("summary", summary), *children)


@dataclass(frozen=True)
class Section:
    """A part of a page: its heading, its id, which the list of contents links to, and its content."""

    title: str
    name: str
    content: Child

    def made(self) -> Markup:
        heading = element("h2", self.title, id=f"{self.name}-title")
        return element("section", heading, self.content, id=self.name, aria_labelledby=f"{self.name}-title")


def page(title: str, lead: Child, sections: list[Section], foot: Child) -> str:
    """Return a whole page."""
    links = [element("li", element("a", part.title, href=f"#{part.name}")) for part in sections]
    head = element(
        "head", element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=MADE_BY),
        element("title", title), element("style", Markup(STYLE)),
    )  # fmt: skip
    body = element(
        "body", element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", lead), element("nav", element("ul", links), aria_label="Contents"),
        element("main", [part.made() for part in sections], id="content"), element("footer", foot),
    )  # fmt: skip
    return f"<!doctype html>\n{element('html', head, body, lang='en').text}\n"
