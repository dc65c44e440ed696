"""Explain the tag of one word."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from graftkit.errors import UserError, nearest
from graftkit.tasks.base import Dataset
from graftkit.tasks.explained import Aim, Cut, index_of
from graftkit.tasks.tag.parts import TagDataset

OUTSIDE = "O"  # the tag of words that are in no entity


def aim_at_word(
    dataset: Dataset, grades: Callable[[int], Tensor], labels: Sequence[str], label: str | None, word: str | None
) -> Aim:  # fmt: skip
    """Aim at the tag of a word of the one text of a dataset: the first word that is written like `word`. Without one it is
    the word whose tag is surest among those that are in an entity or, where tags are no entities, have not the text's most
    frequent tag.

    `grades`: returns the log-odds (length, labels) of a row.
    """
    assert isinstance(dataset, TagDataset)
    text, spans = dataset.texts[0], dataset.spans[0]
    found = []  # (word, row, place, log-odds of each label)
    for row, part in enumerate(dataset.parts):
        given = grades(row)
        found += [(int(w), row, int(place), given[place]) for w, place in zip(part.words, part.places)]
    if not found:
        raise UserError(f"{dataset.examples.where(0)}: no word of this text is a token of the model.")
    written = [text[slice(*spans[w])] for w, *_ in found]
    if word is None:
        tags = [int(given.argmax()) for *_, given in found]
        usual = labels.index(OUTSIDE) if OUTSIDE in labels else max(tags, key=tags.count)
        at = max(range(len(found)), key=lambda i: (tags[i] != usual, float(found[i][3].max()), -i))
    elif word in written:
        at = written.index(word)
    else:
        raise UserError(f"word {word!r} is not in this text.{nearest(word, dict.fromkeys(written))}")
    index, row, place, given = found[at]
    chosen = int(given.argmax()) if label is None else index_of(label, labels)
    start, end = spans[index]
    said = {"label": labels[chosen], "word": written[at], "start": int(start), "end": int(end)}
    return Aim(row, (place, chosen), said)


def cut_part(dataset: Dataset, row: int, behind: int) -> Cut:
    """Divide a part of a text into its words. A token belongs to the last word that begins at it or before; the last
    `behind` tokens are special ones."""
    assert isinstance(dataset, TagDataset)
    part = dataset.parts[row]
    text, spans = dataset.texts[part.example], dataset.spans[part.example]
    places, first = np.unique(part.places, return_index=True)  # words may share a token
    owners = np.searchsorted(places, np.arange(len(part.ids)), side="right") - 1
    owners[len(owners) - behind :] = -1
    last = [*(first[1:] - 1), len(part.words) - 1]
    ends = [(spans[part.words[a]][0], spans[part.words[b]][1]) for a, b in zip(first, last)]
    return Cut([{"text": text[a:b], "start": int(a), "end": int(b)} for a, b in ends], owners)
