"""Fill the blanks of a text with a GLM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from graftkit.data.ragged import Ragged, mask
from graftkit.errors import UserError
from graftkit.tasks.shared.blanks import Marks, marks_of

# a space that a decoder of words puts between two Chinese characters, which no text has there
CHINESE = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef]) +(?=[\u3000-\u9fff\uff00-\uffef])")


@dataclass(frozen=True)
class Filled:
    """A text with its blanks filled in, and the text of each blank."""

    text: str
    blanks: tuple[str, ...]


@dataclass(frozen=True)
class Sampling:
    """How a blank is written: at most `new_tokens`; `temperature` 0 takes the most likely token each time."""

    new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@overload
def fill(model: Any, tokenizer: Any, text: str, **sampling: Any) -> Filled: ...
@overload
def fill(model: Any, tokenizer: Any, text: Sequence[str], **sampling: Any) -> list[Filled]: ...
def fill(model: Any, tokenizer: Any, text: str | Sequence[str], **sampling: Any) -> Filled | list[Filled]:
    """Fill the blanks of a text, or of several, from left to right.

    A blank is written [MASK] for some words, [sMASK] for a sentence and [gMASK] for a longer passage or the rest of a text.
    `sampling`: the fields of `Sampling`. Raises `UserError` for a model that fills no blanks, and for a text without one or
    with more tokens than the model has places.
    """
    texts = [text] if isinstance(text, str) else list(text)
    marks = marks_of(tokenizer, "fill()")
    if not getattr(model, "fills_blanks", False):
        raise UserError(f"fill() needs a GLM, but {type(model).__name__} does not fill blanks.")
    prompts = [prompt_of(one, tokenizer, marks, model, f"text {i}") for i, one in enumerate(texts, start=1)]
    written = write_blanks(model, tokenizer, marks, prompts, Sampling(**sampling))
    found = [filled(one, blanks, tokenizer) for one, blanks in zip(texts, written)]
    return found[0] if isinstance(text, str) else found


def prompt_of(text: str, tokenizer: Any, marks: Marks, model: Any, where: str) -> np.ndarray:
    """Return part A of a text, (tokens,). Raises `UserError`, for `where`, if it has no blank or too many tokens."""
    ids = np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
    if not np.isin(ids, marks.masks).any():
        raise UserError(
            f"{where} has no blank: write {tokenizer.mask_token} where words are missing, [sMASK] for a sentence, or [gMASK] for "
            "a passage."
        )
    limit = model.config.max_position_embeddings
    if len(ids) > limit:
        raise UserError(f"{where} has {len(ids)} tokens, but the model has {limit} places; shorten it.")
    return ids


@dataclass
class Pen:
    """What is written for one row. `places`: of the masks in part A; `token`, `number`: the next input of part B."""

    places: list[int]
    marks: Marks
    most: int
    blanks: list[list[int]] = field(default_factory=list)
    number: int = 1

    def __post_init__(self) -> None:
        self.token = self.marks.start
        self.blanks.append([])

    @property
    def done(self) -> bool:
        return len(self.blanks) > len(self.places)

    @property
    def place(self) -> int:
        return 0 if self.done else self.places[len(self.blanks) - 1]

    def write(self, token: int) -> None:
        if self.done:
            return
        if token != self.marks.end:
            self.blanks[-1].append(token)
        if token == self.marks.end or len(self.blanks[-1]) == self.most:
            self.blanks.append([])
            self.token, self.number = self.marks.start, 1
        else:
            self.token, self.number = token, self.number + 1


@torch.no_grad()
def write_blanks(
    model: Any, tokenizer: Any, marks: Marks, prompts: Sequence[np.ndarray], how: Sampling, half: bool = False
) -> list[list[list[int]]]:
    """Return for each prompt (tokens,) the tokens of its blanks. `half`: autocast to bf16.

    Part A is read once; its keys and values, and those of what is written, are kept. Each blank sees those before it.
    """
    from transformers import DynamicCache

    device, given, cache = model.device, Ragged(prompts), DynamicCache()
    ids = torch.from_numpy(given.padded(np.arange(len(prompts)), tokenizer.pad_token_id or 0)).to(device)
    known = torch.from_numpy(mask(given.lengths)).to(device)
    places = [np.flatnonzero(np.isin(ids, marks.masks)).tolist() for ids in prompts]
    consecutive = not model.config.block_positions
    room = model.config.max_position_embeddings - int(given.lengths.max()) if consecutive else None
    most = min(how.new_tokens, model.config.max_position_embeddings)
    pens = [Pen(row, marks, most) for row in places]
    choose = Choice(tokenizer, marks, how, device)
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        model(
            input_ids=ids, attention_mask=known, block_position_ids=torch.zeros_like(ids),
            past_key_values=cache, logits_to_keep=1,
        )  # fmt: skip
        step = 0
        while not all(pen.done for pen in pens) and (room is None or step < room):
            known = torch.cat([known, known.new_ones(len(pens), 1)], dim=1)
            state = torch.tensor([[pen.token, pen.place, pen.number] for pen in pens], device=device)
            place = (
                state[:, 1:2]
                if not consecutive
                else torch.from_numpy(given.lengths + step)[:, None].to(device)
            )
            logits = model(
                input_ids=state[:, :1], attention_mask=known, position_ids=place,
                block_position_ids=state[:, 2:], past_key_values=cache,
            ).logits  # fmt: skip
            for pen, token in zip(pens, choose(logits[:, -1].float(), state[:, 2] == 1).tolist()):
                pen.write(token)
            step += 1
    return [(pen.blanks + [[] for _ in row])[: len(row)] for pen, row in zip(pens, places)]


class Choice:
    """Choose the next token of each row: never a special one but the end of the blank, and that not at once."""

    def __init__(self, tokenizer: Any, marks: Marks, how: Sampling, device: torch.device) -> None:
        from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

        special = {*tokenizer.all_special_ids, *marks.masks, marks.start, marks.block} - {marks.end}
        self.special = torch.tensor(sorted(special), device=device)
        self.end, self.how = marks.end, how
        self.random = torch.Generator(device).manual_seed(how.seed)
        self.warpers = LogitsProcessorList()
        if how.top_k:
            self.warpers.append(TopKLogitsWarper(how.top_k))
        if how.top_p < 1:
            self.warpers.append(TopPLogitsWarper(how.top_p))

    def __call__(self, logits: Tensor, first: Tensor) -> Tensor:
        """Return the tokens (rows,) for logits (rows, vocabulary); `first` (rows,): which rows begin a blank."""
        logits = logits.index_fill(1, self.special, -torch.inf)
        logits[:, self.end] = logits[:, self.end].masked_fill(first, -torch.inf)
        if not self.how.temperature:
            return logits.argmax(-1)
        logits = self.warpers(None, logits / self.how.temperature)  # type: ignore[arg-type]
        return torch.multinomial(logits.softmax(-1), 1, generator=self.random)[:, 0]


def filled(text: str, blanks: Sequence[Sequence[int]], tokenizer: Any) -> Filled:
    """Return a text with the tokens of its blanks in the place of its masks."""
    masks = [tokenizer.mask_token, "[sMASK]", "[gMASK]"]
    parts = re.split("|".join(map(re.escape, masks)), text)
    words = [CHINESE.sub("", tokenizer.decode(list(ids), skip_special_tokens=True).strip()) for ids in blanks]
    words += [""] * (len(parts) - 1 - len(words))
    pieces = [piece for pair in zip(parts, [*words, ""]) for piece in pair]
    return Filled("".join(pieces), tuple(words[: len(parts) - 1]))
