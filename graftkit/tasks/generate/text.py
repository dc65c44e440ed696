"""Text generation with a language model and the cache of `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftkit.backbone.load import positions_of
from graftkit.backbone.prompts import positions_taken
from graftkit.data.ragged import Ragged, mask


@dataclass(frozen=True)
class Writing:
    """Generation settings. `ends`: tokens that end a text; `stop`: texts that end it and are removed from it."""

    new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    ends: tuple[int, ...]
    stop: tuple[str, ...]


def room_for(model: Any, wanted: int) -> tuple[int | None, int]:
    """Return the maximum number of tokens of a prompt (None: no limit), and of new tokens after the longest prompt.

    In a decoder both share the positions; an encoder and a decoder have separate ones.
    """
    limit = positions_of(model)
    if limit is None:
        return None, wanted
    if model.config.is_encoder_decoder:
        return limit - positions_taken(model), min(wanted, limit - 1)
    limit -= positions_taken(model)
    new = max(1, min(wanted, limit // 2))
    return limit - new, new


@torch.no_grad()
def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    how: Writing,
    device: torch.device,
    half: bool,
    show: Callable[[str], None] | None = None,
) -> list[str]:
    """Generate the text that follows each prompt. Prompts are padded on the left, so that all continue at the same place.

    `half`: autocast to bf16; `show`: called with pieces of the text while it is generated, for a single prompt.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    both = bool(model.config.is_encoder_decoder)
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    given = Ragged(prompts)
    ids = torch.from_numpy(given.padded(np.arange(len(prompts)), padding, left=not both))
    known = torch.from_numpy(mask(given.lengths, left=not both))
    width = ids.shape[1]
    sampled = how.temperature > 0
    more = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k} if sampled else {}
    settings = GenerationConfig(
        max_new_tokens=how.new_tokens, do_sample=sampled, use_cache=True, pad_token_id=padding,
        eos_token_id=list(how.ends) or None, bos_token_id=getattr(model.config, "bos_token_id", None),
        decoder_start_token_id=decoder_start(model) if both else None, **more,
    )  # fmt: skip
    skip = 1 if both else width
    stops = StoppingCriteriaList([_Stops(tokenizer, how.stop, skip)] if how.stop else [])
    streamer = None if show is None else _Streamer(tokenizer, skip, how.stop, show)
    model.eval()
    devices = [device] if device.type == "cuda" else []
    kept, model.generation_config = (
        model.generation_config,
        settings,
    )  # beams and penalties of the model's own config must not mix with these settings
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(device.type, torch.bfloat16, enabled=half),
        ):
            torch.manual_seed(how.seed)
            written = model.generate(
                ids.to(device), attention_mask=known.to(device), stopping_criteria=stops, streamer=streamer
            )
    finally:
        model.generation_config = kept
    return [
        _cut(tokenizer.decode(row, skip_special_tokens=True), how.stop)[0] for row in written[:, skip:].cpu()
    ]


def decoder_start(model: Any) -> int | None:
    """Return the token that a decoder begins with, if the model's config has one."""
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        found = getattr(model.config, name, None)
        if isinstance(found, int):
            return found
    return None


def ends_of(model: Any, tokenizer: Any, end: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the tokens and the texts that end an answer: the end tokens of tokenizer and model, and what the template
    writes after an answer (`end`), as a token if it is a single one, else as a text.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    stop: tuple[str, ...] = ()
    if end:
        pieces = tokenizer(end, add_special_tokens=False)["input_ids"]
        if pieces and (len(pieces) == 1 or pieces[0] in tokenizer.all_special_ids):
            ends.append(pieces[0])
        else:
            stop = (end,)
    return tuple(dict.fromkeys(token for token in ends if token is not None)), stop


def _cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first stop text, and whether there is one."""
    places = [place for place in (text.find(end) for end in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


class _Window:
    """The end of a text that is generated token by token, decoded from the last tokens alone.

    It is long enough to contain any stop text at its end: a token that is not special has at least one byte. The first
    tokens of a window may decode wrongly, for example if they start within a character, so there are some to spare.
    """

    SPARE = 8

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)
        self.size = max((len(text.encode()) for text in stop), default=0) + self.SPARE
        self.tokens: list[int] = []
        self.text = ""
        self.before = 0  # characters of the whole text in front of `text`

    def add(self, tokens: Sequence[int]) -> str:
        """Append the next tokens and return the end of the text."""
        self.tokens += [token for token in tokens if token not in self.special]
        self.text = self._decoded()
        text = self.text
        if len(self.tokens) > 2 * self.size:
            del self.tokens[: -self.size]
            self.text = self._decoded()
            self.before += len(text) - len(self.text)
        return self.text

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)


class _Stops:
    """Stop the rows in which one of the stop texts was generated."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], skip: int) -> None:
        self.tokenizer, self.stop, self.read = tokenizer, stop, skip
        self.windows: list[_Window] = []

    def __call__(self, ids: Tensor, scores: Any, **more: Any) -> Tensor:
        self.windows = self.windows or [_Window(self.tokenizer, self.stop) for _ in ids]
        new = ids[:, self.read :].tolist()
        self.read = ids.shape[1]
        ended = [_cut(window.add(tokens), self.stop)[1] for window, tokens in zip(self.windows, new)]
        return torch.tensor(ended, device=ids.device)


class _Streamer:
    """Show a text while it is generated, holding back what may still change or may be the start of a stop text."""

    def __init__(self, tokenizer: Any, skip: int, stop: Sequence[str], show: Callable[[str], None]) -> None:
        self.tokenizer, self.skip, self.stop, self.show = tokenizer, skip, stop, show
        self.tokens: list[int] = []
        self.window = _Window(tokenizer, stop)
        self.shown = 0
        self.hold = max(map(len, stop), default=1) - 1

    def put(self, value: Tensor) -> None:
        tokens = value.flatten().tolist()
        if self.skip:  # the prompt comes first
            tokens, self.skip = tokens[self.skip :], max(0, self.skip - len(tokens))
        self.tokens += tokens
        text, ended = _cut(self.window.add(tokens), self.stop)
        until = len(text) if ended else len(text) - self.hold - text.endswith("\ufffd")
        self._show(text, self.window.before, until)

    def end(self) -> None:
        text = _cut(self.tokenizer.decode(self.tokens, skip_special_tokens=True), self.stop)[0]
        self._show(text, 0, len(text))

    def _show(self, text: str, before: int, until: int) -> None:
        """Show what is new in `text`, which starts at character `before` of the whole text, up to `until`."""
        if before + until > self.shown:
            self.show(text[self.shown - before : until])
            self.shown = before + until
