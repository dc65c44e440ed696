"""Split English and Chinese texts into sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator

CLOSING = "\"'”’»)\\]}」』）】》〉"
OPENING = "\"'“‘«(\\[{「『（【《〈"
CHINESE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# where a sentence may end; which of these do is decided one by one
# (possessive, and only from the beginning of a run on: the time is linear in the length of the text)
ENDS = re.compile(
    rf"(?P<wide>(?<![。！？!?])(?=[!?]{{0,8}}[。！？])[。！？!?…]++"
    rf"|(?<=[{CHINESE}])[!?]++(?=[{CHINESE}{CLOSING}{OPENING}]))[{CLOSING}]*+"
    rf"|(?P<mark>(?<![.!?…])[.!?…]++)[{CLOSING}]*+(?=\s)"
    r"|(?P<line>(?<!\s)[^\S\n]*+\n\s*+)"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# never the last word of a sentence, as a name or number follows
TITLES = _words(
    "mr mrs ms mx dr prof rev fr hon pres gov sen rep gen col maj capt cpt lt cmdr sgt adm st mt messrs mmes mme mlle "
    "no nos vol vols fig figs eq eqs sec ch pp p cf vs viz ca approx e.g i.e eg ie al art op ed eds nr"
)
# may be the last word: it is, if the next word is one with which sentences begin
OTHERS = _words(
    "etc inc ltd co corp bros jr sr esq ph.d phd m.d b.a m.a b.sc m.sc u.s u.k u.n e.u u.s.a d.c a.m p.m a.d b.c dept est "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun ave blvd rd hwy"
)
STARTERS = _words(
    "the a an this that these those it its he she they we you i his her their our my there here in on at by for from with "
    "to of and but or so if when while after before as since although however then thus what who why how where no not one "
    "some many most all both each"
)
WORD = re.compile(r"[^\s\"'“‘(\[{]*$")
NEXT = re.compile(rf"\s*[{OPENING}\-–—]*\s*(?P<first>\S)(?P<rest>[\w']*)")
GOES_ON = tuple(",;:，、；：-–—(（")


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, each stripped; joined, they have all its characters but white space.

    English: a full stop, question or exclamation mark ends a sentence if white space and anything but a small letter
    follow, unless it belongs to an abbreviation, an initial or a list of these. Closing quotes and brackets belong to the
    sentence before them. Chinese: 。！？ and the quotes that close after them end a sentence wherever they stand, unless a
    comma follows. A line break ends a sentence if the line ends one, or if the next line does not go on with a small
    letter or after a comma.
    """
    found, start = [], 0
    for end in _ends(text):
        if sentence := text[start:end].strip():
            found.append(sentence)
        start = end
    if sentence := text[start:].strip():
        found.append(sentence)
    return found


def _ends(text: str) -> Iterator[int]:
    for mark in ENDS.finditer(text):
        if mark["wide"] is not None:
            if text[mark.end() : mark.end() + 1] not in tuple("，、；：,;:"):
                yield mark.end()
        elif mark["line"] is not None:
            if _ends_at_line(text, mark):
                yield mark.end()
        elif _ends_at(text, mark):
            yield mark.end()


def _ends_at_line(text: str, mark: re.Match[str]) -> bool:
    """Return whether the line break `mark` ends a sentence: not one at which a long sentence was only wrapped."""
    if mark[0].count("\n") > 1:
        return True
    before, after = text[max(0, mark.start() - 1) : mark.start()], text[mark.end() : mark.end() + 1]
    return not (before in GOES_ON or after.islower())


def _ends_at(text: str, mark: re.Match[str]) -> bool:
    """Return whether a full stop, question or exclamation mark that is followed by white space ends a sentence."""
    follows = NEXT.match(text, mark.end())
    if follows is None:
        return True
    first, next_word = follows["first"], (follows["first"] + follows["rest"]).lower()
    if first.islower() or first in ",;:":
        return False
    if mark["mark"] != ".":
        return True
    word = WORD.search(text, max(0, mark.start() - 40), mark.start())
    last = word[0] if word else ""
    if len(last) == 1 and last.isupper() and last != "I" and not last > "\u2e80":  # an initial
        return next_word in STARTERS and not text[mark.end() :].startswith("\n")
    if last.lower() in TITLES:
        return not (first.isupper() or first.isdigit())
    if last.lower() in OTHERS or re.fullmatch(r"(?:[A-Za-z]\.)+[A-Za-z]", last):
        return next_word in STARTERS
    return True
