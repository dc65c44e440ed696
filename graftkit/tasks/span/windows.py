"""Split questions with long contexts into windows that fit the model, and search these for the best spans."""

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

CHUNK = 256  # questions tokenized at once
LEAST_ROOM = 8  # minimum tokens of context in a window
NAMES = ("input_ids", "token_type_ids", "attention_mask")


@dataclass(frozen=True)
class Window:
    """A question with part of its context.

    `question`: row number of the question. `first`, `last`: positions of the first and last context token. `null`: position
    that stands for no answer. `offsets` (context tokens, 2): start and end of each token in the context, in characters.
    """

    question: int
    first: int
    last: int
    null: int
    offsets: np.ndarray
    features: dict[str, np.ndarray]

    def tokens_of(self, text: str, start: int, whole: tuple[bool, bool]) -> tuple[int, int] | None:
        """Return the positions of the first and last token of an answer; None if part of it is outside the window.

        `start`: where the answer starts in the context, in characters. `whole`: whether the window includes the beginning
        and the end of the context.
        """
        begins, ends = self.offsets.T
        end = start + len(text)
        inside = np.flatnonzero((begins < end) & (ends > start) & (ends > begins))
        if not len(inside) or not (whole[0] or begins[0] <= start) or not (whole[1] or ends[-1] >= end):
            return None
        return self.first + int(inside[0]), self.first + int(inside[-1])


class Windows(TextDataset):
    """A dataset with one row per window.

    `targets` (rows, 5): positions of the first and last token of the answer, of the first and last token of the context, and
    of the null position. The first two are -1 in windows that are excluded from the loss.
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
        """Return the start and end logits of each token, (rows, length, 2)."""
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
    """Return the targets (windows, 5), and the number of questions none of whose answers fits in a window.

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
    """Return all windows of all questions, in order.

    Raises `UserError` for a question that leaves fewer than 8 tokens for the context.
    """
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
                    f"a window of {max_length}; shorten it, or raise data.max_length if the model allows it."
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
    """Return the loss: the mean cross-entropy of the start and end positions, over the context and the null position."""

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
    """The result of one window: its null score, its best spans (score, start, end) in characters, and its loss."""

    null: float
    spans: list[tuple[float, int, int]]
    loss: float = float("nan")


def search(window: Window, scores: np.ndarray, longest: int, count: int) -> Found:
    """Return the `count` best spans of at most `longest` tokens, ranked by start logit + end logit.

    `scores`: start and end logits (length, 2). The search covers every span in the context.
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
    """The result of a question over all its windows: the best span in characters, its score, and probabilities.

    `lead`: null score minus the score of the span. `probability`, `null_probability`: of the span, and of no answer.
    """

    start: int
    end: int
    score: float
    lead: float
    probability: float
    null_probability: float
    loss: float


def gather(outcomes: Sequence[Found], question_of: np.ndarray, contexts: Sequence[str], count: int, null: bool
           ) -> list[Best]:  # fmt: skip
    """Return a `Best` for each question, given the outcomes of its windows.

    A span found in several windows counts once, with its highest score. The null score is the minimum over the windows,
    since every window without the answer should have a high one. Probabilities are a softmax over the `count` best spans,
    plus no answer if `null`, as in BERT's SQuAD code.
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
    """Return the span without surrounding whitespace, which some tokenizers include in a word."""
    while start < end and context[start].isspace():
        start += 1
    while end > start and context[end - 1].isspace():
        end -= 1
    return start, end
