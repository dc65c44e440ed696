"""Hard prompts: a template with placeholders for a row's texts and for the answer, and in-context examples."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.errors import UserError, listing, nearest
from graftkit.tasks.base import Examples
from graftkit.tasks.shared.labels import LabelIndex, is_missing, label_text

PLACES = ("text", "text_pair", "label")
MASK = "[MASK]"  # in a template the same as {label}
SINGLE = "Text: {text}\nLabel: {label}"
PAIRS = "Text 1: {text}\nText 2: {text_pair}\nLabel: {label}"


@dataclass(frozen=True)
class Template:
    """The parts `before` and `after` the answer: literal texts and placeholders, as (literal, name or None)."""

    before: tuple[tuple[str, str | None], ...]
    after: tuple[tuple[str, str | None], ...]

    def fill(self, values: Mapping[str, str], answer: str) -> str:
        return _fill(self.before, values) + answer + _fill(self.after, values)

    def start(self, values: Mapping[str, str]) -> str:
        """Return the prompt up to the answer."""
        return _fill(self.before, values)

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(name for _, name in (*self.before, *self.after) if name is not None)

    @property
    def lead(self) -> str:
        """The literal text immediately before the answer."""
        literal, name = self.before[-1] if self.before else ("", None)
        return literal if name is None else ""


def _fill(parts: tuple[tuple[str, str | None], ...], values: Mapping[str, str]) -> str:
    return "".join(literal + ("" if name is None else values[name]) for literal, name in parts)


def read_template(text: str) -> Template:
    """Parse a template. Raises `UserError` if it cannot be filled in."""
    try:
        parts = list(string.Formatter().parse(text.replace(MASK, "{label}")))
    except ValueError as error:
        raise UserError(f"template {text!r}: {error}; a brace that is meant is written twice.") from None
    for _, name, form, conversion in parts:
        if name is not None and (name not in PLACES or form or conversion):
            raise UserError(
                f"template {text!r}: there is no place {{{name}{':' * bool(form)}{form}}} (places: "
                f"{listing(f'{{{place}}}' for place in PLACES)}; {MASK} is {{label}}).{nearest(name, PLACES)}"
            )
    names = [name for _, name, _, _ in parts if name is not None]
    if "text" not in names:
        raise UserError(f"template {text!r} has no {{text}}, so all rows would be asked the same.")
    if names.count("label") != 1:
        how = "no place" if "label" not in names else f"{names.count('label')} places"
        raise UserError(f"template {text!r} has {how} for the answer; write {{label}} (or {MASK}) once.")
    at = next(i for i, (_, name, _, _) in enumerate(parts) if name == "label")
    before = [(literal, name) for literal, name, _, _ in parts[:at]]
    if parts[at][0]:
        before.append((parts[at][0], None))
    return Template(tuple(before), tuple((literal, name) for literal, name, _, _ in parts[at + 1 :]))


def template_for(text: str | None, columns: Sequence[str]) -> str:
    """Return the template of a recipe, or the default. Raises `UserError` if it does not fit the rows' text columns."""
    if text is None:
        return PAIRS if "text_pair" in columns else SINGLE
    asks = "text_pair" in read_template(text).places
    if asks and "text_pair" not in columns:
        raise UserError(
            f"template {text!r} has {{text_pair}}, but the rows have one text each; leave it out, or name the column "
            "with data.columns={text: ..., text_pair: ..., label: ...}."
        )
    if not asks and "text_pair" in columns:
        raise UserError(
            f"the rows are pairs of texts, but template {text!r} has no {{text_pair}}; put it in, or read one text only "
            "with data.columns={text: ..., label: ...}."
        )
    return text


def words_for(words: Mapping[Any, Any] | None, labels: Sequence[str]) -> dict[str, str]:
    """Return the word of each label, in the order of the labels; the labels themselves if the recipe sets no words."""
    if words is None:
        return {label: label for label in labels}
    index, found = LabelIndex(labels), {}
    for key, word in words.items():
        place = index.find(label_text(key))
        if place is None:
            raise UserError(
                f"words names the label {label_text(key)!r}, which the training rows do not have (labels: "
                f"{listing(labels, 8)}).{nearest(label_text(key), labels)}"
            )
        if not isinstance(word, str) or not word.strip():
            hint = "; in YAML, yes, no, on and off are words only in quotes" if isinstance(word, bool) else ""
            raise UserError(f"words: that of label {labels[place]!r} is {word!r}, but must be a text{hint}.")
        found[labels[place]] = word.strip()
    lacking = [label for label in labels if label not in found]
    if lacking:
        raise UserError(
            f"words lacks a word for {len(lacking)} of the {len(labels)} labels ({listing(map(repr, lacking), 8)}); "
            "write one for each, words={label: word}."
        )
    for label in labels:
        same = [other for other in labels if found[other] == found[label]]
        if len(same) > 1:
            raise UserError(
                f"words: {listing(map(repr, same))} have one word, {found[label]!r}; nothing tells them apart."
            )
    return {label: found[label] for label in labels}


def draw_shots(
    examples: Examples, labels: Sequence[str], count: int, seed: int
) -> tuple[tuple[str, ...], ...]:
    """Draw `count` training rows, as (text, label) or (text, text_pair, label): labels in turn, rows at random."""
    targets = np.asarray(examples.targets)
    if count > len(targets):
        raise UserError(f"shots is {count}, but there are {len(targets)} training rows; ask for fewer.")
    random_ = random.Random(seed)
    groups = [np.flatnonzero(targets == number).tolist() for number in range(len(labels))]
    for group in groups:
        random_.shuffle(group)
    random_.shuffle(groups)
    turns = [group[turn] for turn in range(count) for group in groups if turn < len(group)]
    return tuple(
        (*(values[row] for values in examples.values.values()), labels[targets[row]]) for row in turns[:count]
    )


def check_shots(
    shots: Sequence[Any], columns: Sequence[str], labels: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Validate in-context examples of a recipe. Raises `UserError` for one that does not have the form of the rows."""
    index, found = LabelIndex(labels), []
    form = ", ".join((*columns, "label"))
    for number, shot in enumerate(shots, start=1):
        good = isinstance(shot, list | tuple) and len(shot) == len(columns) + 1
        if not good or any(is_missing(value) for value in shot):
            raise UserError(f"shots: example {number} is {shot!r}, but must be [{form}].")
        place = index.find(label_text(shot[-1]))
        if place is None:
            raise UserError(
                f"shots: the label of example {number} is {shot[-1]!r}, which the training rows do not have (labels: "
                f"{listing(labels, 8)}).{nearest(label_text(shot[-1]), labels)}"
            )
        found.append((*(str(value) for value in shot[:-1]), labels[place]))
    return tuple(found)
