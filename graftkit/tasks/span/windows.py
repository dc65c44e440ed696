"""Questions with long contexts as windows that a model takes, and the search for the best spans in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.data.encode import Encoded
from graftkit.data.ragged import Ragged
from graftkit.data.source import Batch
from graftkit.errors import UserError
from graftkit.tasks.base import Examples, Term
from graftkit.tasks.shared.masked import masked_cross_entropy
from graftkit.tasks.shared.texts import TextDataset

CHUNK = 256  # questions that are tokenized together
LEAST_ROOM = 8  # tokens of context in a window
NAMES = ("input_ids", "token_type_ids", "attention_mask")


@dataclass(frozen=True)
class Window:
    """A question with a part of its context. `first` to `last`: positions of the context's tokens; `null`: the
    position that stands for no answer; `offsets` (tokens, 2): from and to which character of the context each goes.
    """

    question: int
    first: int
    last: int
    null: int
    offsets: np.ndarray
    features: dict[str, np.ndarray]

    def tokens_of(self, text: str, start: int, whole: tuple[bool, bool]) -> tuple[int, int] | None:
        """Positions of the first and last token of an answer; None where the window does not hold all of it.

        `whole`: whether the window has the beginning, and the end, of the context.
        """
        begins, ends = self.offsets.T
        end = start + len(text)
        inside = np.flatnonzero((begins < end) & (ends > start) & (ends > begins))
        if not len(inside) or not (whole[0] or begins[0] <= start) or not (whole[1] or ends[-1] >= end):
            return None
        return self.first + int(inside[0]), self.first + int(inside[-1])


class Windows(TextDataset):
    """Windows as rows. `targets` of each: positions of the answer's first and last token, of the first and last of
    the context, and the one for no answer; the first two are -1 where there is nothing to learn from.
    """

    def __init__(self, examples: Examples, windows: list[Window], padding: int) -> None:
        self.windows = windows
        self.question_of = np.array([window.question for window in windows])
        golds = examples.targets
        numbers = units = None
        cut = 0
        if golds is not None:
            numbers, cut = _targets(windows, list(golds), self.question_of)
            units = (numbers[:, 0] >= 0).astype(float)
        features = {
            name: Ragged([window.features[name] for window in windows]) for name in windows[0].features
        }
        lengths = features["input_ids"].lengths
        super().__init__(examples, Encoded(features, lengths, cut, {"input_ids": padding}), numbers, units)

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, length, 2): scores of each token as the first and as the last of the answer."""
        output = model(**batch.inputs)
        if getattr(output, "start_logits", None) is not None:
            return torch.stack([output.start_logits, output.end_logits], dim=-1)
        return output.logits

    def where(self, row: int) -> str:
        return self.examples.where(int(self.question_of[row]))

    def digested(self) -> Sequence[bytes | np.ndarray]:
        golds = [gold.answers for gold in self.examples.targets or ()]
        return [*super().digested(), self.question_of, repr(golds).encode("utf-8", "surrogatepass")]


def _targets(windows: list[Window], golds: Sequence[Any], question_of: np.ndarray) -> tuple[np.ndarray, int]:
    """Targets of each window, and how many questions have no answer that is whole in any of their windows.

    `golds`: a `Gold` for each question.
    """
    edges = np.concatenate([[True], question_of[1:] != question_of[:-1], [True]])
    rows, found = [], np.zeros(len(golds), dtype=bool)
    for i, window in enumerate(windows):
        places = (
            window.tokens_of(text, start, (bool(edges[i]), bool(edges[i + 1])))
            for text, start in golds[window.question].answers
        )
        place = next(filter(None, places), None)
        found[window.question] |= place is not None
        rows.append([*(place or (window.null, window.null)), window.first, window.last, window.null])
    numbers = np.array(rows, dtype=np.int64)
    lost = np.array([bool(gold.answers) for gold in golds]) & ~found
    numbers[lost[question_of], :2] = -1
    return numbers, int(lost.sum())


def cut_windows(
    tokenizer: Any, examples: Examples, max_length: int, doc_stride: int, question_first: bool
) -> list[Window]:
    """All windows of all questions, in their order. Raises `UserError` where a question leaves no room."""
    found: list[Window] = []
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for begin in range(0, len(examples), CHUNK):
        rows = range(begin, min(begin + CHUNK, len(examples)))
        questions = [examples.values["question"][i] for i in rows]
        contexts = [examples.values["context"][i] for i in rows]
        sizes = map(len, tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"])
        strides: dict[int, list[int]] = {}
        for i, size in enumerate(sizes):
            room = max_length - special - size
            if room < LEAST_ROOM:
                raise UserError(
                    f"{examples.where(rows[i])}: the question has {size} tokens, which leaves {max(room, 0)} for the context in "
                    f"a window of {max_length}; shorten it, or raise data.max_length if the model takes more."
                )
            strides.setdefault(min(doc_stride, room // 2), []).append(i)
        chunk: list[Window] = []
        for stride, chosen in strides.items():
            texts = [questions[i] for i in chosen], [contexts[i] for i in chosen]
            encoding = tokenizer(
                *(texts if question_first else texts[::-1]), max_length=max_length, stride=stride, verbose=False,
                truncation="only_second" if question_first else "only_first", return_overflowing_tokens=True,
                return_offsets_mapping=True, return_attention_mask=True,
            )  # fmt: skip
            samples = [begin + chosen[i] for i in encoding["overflow_to_sample_mapping"]]
            chunk += [
                _window(encoding, i, sample, tokenizer.cls_token_id, int(question_first))
                for i, sample in enumerate(samples)
            ]
        found += sorted(chunk, key=lambda window: window.question)  # stable: windows stay in order
    return found


def _window(encoding: Any, i: int, question: int, cls: int | None, context: int) -> Window:
    ids, parts = encoding["input_ids"][i], encoding.sequence_ids(i)
    positions = [place for place, part in enumerate(parts) if part == context]
    others = [place for place, part in enumerate(parts) if part is None]
    null = ids.index(cls) if cls in ids else others[-1] if others else 0
    first, last = positions[0], positions[-1]
    offsets = np.array(encoding["offset_mapping"][i][first : last + 1], dtype=np.int32)
    features = {name: np.asarray(encoding[name][i], dtype=np.int32) for name in NAMES if name in encoding}
    return Window(question, first, last, null, offsets, features)


def span_loss(label_smoothing: float) -> Callable[[Tensor, Batch], Term]:
    """Mean of the cross-entropies of the answer's first and last token, over context and no-answer position."""

    def scores(logits: Tensor, batch: Batch) -> Term:
        targets = batch.targets
        assert targets is not None
        places, first, last, null = targets[:, :2], targets[:, 2:3], targets[:, 3:4], targets[:, 4:5]
        positions = torch.arange(logits.shape[1], device=logits.device)
        allowed = ((positions >= first) & (positions <= last)) | (positions == null)
        known = places[:, 0] >= 0
        losses = masked_cross_entropy(
            logits.float().transpose(1, 2), places.clamp(min=0), allowed.unsqueeze(1), label_smoothing
        )
        best = logits.detach().float().masked_fill(~allowed.unsqueeze(-1), -torch.inf).argmax(dim=1)
        return Term(losses.mean(dim=1) * known, (best == places).all(dim=1))

    return scores


@dataclass(frozen=True)
class Found:
    """What a window gives: the score for no answer, the best spans (score, from and to which character), its loss."""

    null: float
    spans: list[tuple[float, int, int]]
    loss: float = float("nan")


def search(window: Window, scores: np.ndarray, longest: int, count: int) -> Found:
    """The `count` best spans of at most `longest` tokens, by the sum of their two scores; `scores` (length, 2).

    All spans are looked at. None lies in the question, and none ends before it begins.
    """
    first, last = window.first, window.last + 1
    text = window.offsets[:, 1] > window.offsets[:, 0]
    starts = np.where(text, scores[first:last, 0], -np.inf)
    ends = np.where(text, scores[first:last, 1], -np.inf)
    size, longest = len(starts), min(longest, last - first)
    padded = np.concatenate([ends, np.full(longest - 1, -np.inf)])
    sums = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)[:size]
    flat = sums.ravel()
    chosen = np.argpartition(-flat, count - 1)[:count] if count < flat.size else np.arange(flat.size)
    chosen = chosen[np.lexsort((chosen, -flat[chosen]))]
    spans = [
        (float(flat[at]), int(window.offsets[at // longest, 0]), int(window.offsets[at // longest + at % longest, 1]))
        for at in chosen if np.isfinite(flat[at])
    ]  # fmt: skip
    return Found(float(scores[window.null].sum()), spans)


@dataclass(frozen=True)
class Best:
    """What all windows of a question give together: the best span, how likely it is among the best ones (and no
    answer, where that may be), its score, and the lead of the score for no answer over it."""

    start: int
    end: int
    score: float
    lead: float
    probability: float
    null_probability: float
    loss: float


def gather(outcomes: Sequence[Found], question_of: np.ndarray, contexts: Sequence[str], count: int, null: bool
           ) -> list[Best]:  # fmt: skip
    """One `Best` for each question, from the outcomes of its windows.

    A span that several windows see counts once, with its best score; the score for no answer is the lowest of all
    windows, for each of them but those with the answer should give it. Probabilities are the softmax over the
    `count` best spans, and no answer where `null`, as in the code of BERT for SQuAD.
    """
    found = []
    bounds = np.searchsorted(question_of, np.arange(len(contexts) + 1))
    for context, begin, end in zip(contexts, bounds, bounds[1:]):
        spans: dict[tuple[int, int], float] = {}
        for outcome in outcomes[begin:end]:
            for score, a, b in outcome.spans:
                place = _trimmed(context, a, b)
                spans[place] = max(score, spans.get(place, -np.inf))
        spans = {place: score for place, score in spans.items() if place[0] < place[1]} or {(0, 0): 0.0}
        best = sorted(spans.items(), key=lambda item: (-item[1], item[0]))[:count]
        empty = min(outcome.null for outcome in outcomes[begin:end])
        scores = np.array([score for _, score in best] + [empty if null else -np.inf])
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        losses = [outcome.loss for outcome in outcomes[begin:end]]
        loss = float("nan") if np.isnan(losses).all() else float(np.nanmean(losses))
        (start, stop), score = best[0]
        found.append(
            Best(start, stop, score, empty - score, float(probabilities[0]), float(probabilities[-1]), loss)
        )
    return found


def _trimmed(context: str, start: int, end: int) -> tuple[int, int]:
    """Without the blanks around it, which some tokenizers count to a word."""
    while start < end and context[start].isspace():
        start += 1
    while end > start and context[end - 1].isspace():
        end -= 1
    return start, end
