"""Any number of labels for each text: multi-label classification."""

from __future__ import annotations

import ast
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graftkit.data.read import Table
from graftkit.data.source import Batch
from graftkit.data.split import hold_out
from graftkit.errors import UserError, listing, nearest
from graftkit.tasks.base import Dataset, Examples, Learn, Term, one_term
from graftkit.tasks.classify.form import Form
from graftkit.tasks.shared.by_row import means, ratio
from graftkit.tasks.shared.labels import (
    LABEL,
    UNKNOWN,
    LabelIndex,
    is_missing,
    label_problem,
    label_text,
    natural,
)
from graftkit.tasks.shared.metrics import calibration, interval, resamples
from graftkit.tasks.shared.weights import positive_weights

SETS = ("labels", "tags", "categories", "classes", "topics", "genres", "emotions", "intents")
SEPARATORS = r"[;|,]"
YES, NO = ("1", "true", "yes"), ("0", "false", "no")


class ManyLabels(Form):
    """A set of labels, possibly empty, read from a list, from a text with separated labels, from several columns of 0 and
    1, or from one column of such vectors. The loss of a row is the mean of the labels' binary cross-entropies."""

    calibrates: ClassVar[str | None] = "labels"
    headline: ClassVar[tuple[str, ...]] = ("f1", "macro_f1", "accuracy")
    directions: ClassVar[Mapping[str, str | None]] = {
        "exact_match": "max",
        "label_accuracy": "max",
        "loss": "min",
    }
    aliases: ClassVar[tuple[str, ...]] = (*SETS, *(name for name in LABEL if name not in SETS))

    def __init__(
        self, threshold: float, separator: str | None, indicators: Sequence[str] | None,
        class_weights: str | dict | None = None,
    ) -> None:  # fmt: skip
        self.threshold = threshold
        self.class_weights = class_weights
        self.separator = SEPARATORS if separator is None else re.escape(separator)
        self.indicators = None if indicators is None else tuple(indicators)

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        if self.indicators is not None:
            self._refuse_absent(table, columns)
            return self.indicators
        column = columns["label"]
        sets = [self._parts(value) or [] for value in table.columns[column]]
        _refuse_vectors(table, column, sets)
        names = sorted({name for row in sets for name in row}, key=natural)
        if not names:
            raise UserError(f"column {column!r} of {table.source} has no labels.")
        if all(len(set(row)) == len(names) for row in sets):
            raise UserError(
                f"all rows of {table.source} have the same labels in column {column!r} ({listing(names, 4)}), so there "
                "is nothing to learn. Name another column with data.columns={label: ...}, or add rows with other labels."
            )
        if len(names) > max(20, len(sets) // 2):
            raise UserError(
                f"column {column!r} of {table.source} has {len(names)} different labels in {len(sets)} rows, so it does "
                "not look like sets of labels. Name the column with data.columns={label: ...}, and the separator of "
                "labels with classify(kind='multi', separator='...')."
            )
        return tuple(names)

    def wrong(
        self, table: Table, columns: dict[str, str], labels: Sequence[str]
    ) -> Callable[[int], str | None]:
        index = LabelIndex(labels)

        def problem(row: int) -> str | None:
            if self.indicators is not None and self._are_vectors(table, columns):
                return self._vector_problem(table, columns["label"], row)
            if self.indicators is not None:
                cells = ((name, table.columns[name][row]) for name in self.indicators)
                bad = next((cell for cell in cells if _flag(cell[1]) is None), None)
                return (
                    bad and f"{table.where(row)}: column {bad[0]!r} is {bad[1]!r}, which is neither 0 nor 1."
                )
            column = columns["label"]
            value = table.columns[column][row]
            parts = self._parts(value)
            if parts is None:
                what = f"is a {type(value).__name__}" if isinstance(value, dict) else "is missing"
                return (
                    f"{table.where(row)}: column {column!r} {what}; for no labels write [] or an empty text."
                )
            twice = next((part for part in parts if parts.count(part) > 1), None)
            if twice is not None:
                return f"{table.where(row)}: column {column!r} has {twice!r} more than once; list each label once."
            found = (label_problem(part, index) for part in parts)
            first = next((text for text in found if text is not None), None)
            return None if first is None else f"{table.where(row)}: {first}"

        if self.indicators is not None:
            self._refuse_absent(table, columns)
        return problem

    def numbers(self, table: Table, columns: dict[str, str], labels: Sequence[str]) -> np.ndarray:
        """Return multi-hot targets (rows, labels), float32."""
        if self.indicators is not None and self._are_vectors(table, columns):
            return np.array(
                [
                    [_flag(part) for part in self._parts(value) or ()]
                    for value in table.columns[columns["label"]]
                ],
                np.float32,
            )
        if self.indicators is not None:
            return np.array(
                [[_flag(v) for v in table.columns[name]] for name in self.indicators], np.float32
            ).T.copy()
        index, values = LabelIndex(labels), table.columns[columns["label"]]
        targets = np.zeros((len(values), len(labels)), np.float32)
        for row, value in enumerate(values):
            for part in self._parts(value) or ():
                targets[row, index.find(part)] = 1
        return targets

    def _parts(self, value: Any) -> list[str] | None:
        """Return the labels in a cell; None if it is missing or not a set."""
        if isinstance(value, str):
            text = value.strip()
            value = _literal(text) if text.startswith("[") and text.endswith("]") else None
            if value is None:
                value = re.split(self.separator, text)
        elif isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value)):
            value = [value]
        if not isinstance(value, list | tuple | set | np.ndarray):
            return None
        return [label_text(part) for part in value if not is_missing(part)]

    def _are_vectors(self, table: Table, columns: dict[str, str]) -> bool:
        """Return whether the indicators name positions of vectors in one column: no column has such a name."""
        return "label" in columns and not set(self.indicators or ()) & set(table.columns)

    def _vector_problem(self, table: Table, column: str, row: int) -> str | None:
        parts = self._parts(table.columns[column][row]) or []
        if len(parts) == len(self.indicators or ()) and None not in map(_flag, parts):
            return None
        return (
            f"{table.where(row)}: column {column!r} is {table.columns[column][row]!r}, but must be a list of "
            f"{len(self.indicators or ())} values of 0 and 1, one for each of the indicators."
        )

    def _refuse_absent(self, table: Table, columns: dict[str, str]) -> None:
        if self._are_vectors(table, columns):
            return
        for name in self.indicators or ():
            if name not in table.columns:
                raise UserError(
                    f"column {name!r}, one of the indicators, is not in {table.source} (columns: "
                    f"{listing(table.columns)}).{nearest(name, table.columns)}"
                )

    def hold_out(self, examples: Examples, share: float, seed: int) -> tuple[list[int], list[int]]:
        """Hold out about `share` of the rows of each label, rarest label first (Sechidis et al. 2011)."""
        targets = np.asarray(examples.targets) > 0
        total = len(hold_out([0] * len(targets), share, seed)[1])
        free = random.Random(seed).sample(range(len(targets)), len(targets))
        held: list[int] = []
        counts = targets.sum(axis=0)
        for label in np.argsort(counts, kind="stable"):
            mine = [row for row in free if targets[row, label]]
            already = int(targets[held, label].sum())
            wanted = min(round(counts[label] * share), int(counts[label]) - 1) - already
            held += mine[: max(0, min(wanted, total - len(held)))]
            free = [row for row in free if not targets[row, label]]
        held += free[: total - len(held)]
        if not held:
            held = hold_out([0] * len(targets), share, seed)[1]
        kept = set(range(len(targets))) - set(held)
        return sorted(kept), sorted(held)

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        """Return the mean over labels of the binary cross-entropy of logits (rows, labels). Label smoothing pulls targets
        towards 1/2; class weights multiply the loss of positive targets."""
        given = np.asarray(dataset.examples.targets)
        weights = positive_weights(self.class_weights, given.sum(axis=0), len(given), labels)

        def scores(logits: Tensor, batch: Batch) -> Term:
            assert batch.targets is not None
            wanted = batch.targets * (1 - label_smoothing) + label_smoothing / 2
            losses = torch.nn.functional.binary_cross_entropy_with_logits(
                logits.float(), wanted, reduction="none",
                pos_weight=None if weights is None else weights.to(logits.device, non_blocking=True),
            ).mean(dim=1)  # fmt: skip
            right = (logits.detach().float().sigmoid() > self.threshold) == (batch.targets > 0)
            return Term(losses, right.all(dim=1))

        return one_term(scores)

    def graded(self, outputs: Tensor) -> Tensor:
        return outputs

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        targets = np.asarray(dataset.examples.targets) > 0
        return of_sets(np.stack(outcomes), targets, labels, self.threshold, intervals)

    def by_row(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> dict[str, np.ndarray]:
        logits, targets = np.stack(outcomes), np.asarray(dataset.examples.targets) > 0
        chosen = probabilities_of(logits) > self.threshold
        exact, losses = (chosen == targets).all(axis=1), losses_of(logits, targets)
        both, some = (chosen & targets).sum(axis=1), chosen.sum(axis=1) + targets.sum(axis=1)
        return means(accuracy=exact, exact_match=exact, loss=losses) | {"f1": ratio(2 * both, some)}

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the labels with a probability above the threshold, and the probabilities of all labels."""
        found = []
        for row in probabilities_of(np.stack(outcomes)):
            chosen = [label for label, p in zip(labels, row) if p > self.threshold]
            found.append({
                "labels": chosen, "probabilities": {label: round(float(p), 4) for label, p in zip(labels, row)},
            })  # fmt: skip
        return found

    def line(self, answer: dict[str, Any]) -> str:
        asked = [str(v) for k, v in answer.items() if k not in ("row", "labels", "probabilities", "known")]
        probabilities = "; ".join(f"{answer['probabilities'][label]:.3f}" for label in answer["labels"])
        labels = _joined(answer["labels"])
        return "\t".join(
            [labels if answer.get("known", True) else f"{UNKNOWN} ({labels})", probabilities, *asked]
        )

    def worst(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        """Return the rows with a wrong set of labels, largest loss first."""
        examples, logits = dataset.examples, np.stack(outcomes)
        targets, losses = np.asarray(examples.targets) > 0, losses_of(logits, np.asarray(examples.targets))
        chosen = probabilities_of(logits) > self.threshold
        wrong = [i for i in np.argsort(-losses, kind="stable").tolist() if (chosen[i] != targets[i]).any()]
        return [
            {
                "where": examples.where(i),
                **self.asked(examples, i),
                "expected": _joined([label for label, holds in zip(labels, targets[i]) if holds]),
                "answer": _joined([label for label, holds in zip(labels, chosen[i]) if holds]),
                "loss": round(float(losses[i]), 4),
            }
            for i in wrong[:count]
        ]

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        found, targets = super().statistics(dataset, labels), dataset.examples.targets
        if targets is not None:
            counts = np.asarray(targets).sum(axis=0)
            found["labels"] = {label: int(count) for label, count in zip(labels, counts)}
            found["labels_per_row"] = float(counts.sum() / len(dataset.examples))
        return found

    def plain(self, labels: Sequence[str]) -> dict[str, Any]:
        return {
            "kind": "multi", "problem_type": "multi_label_classification", "threshold": self.threshold,
            "how": f"the labels whose sigmoid is above {self.threshold}",
        }  # fmt: skip


def _refuse_vectors(table: Table, column: str, sets: Sequence[Sequence[str]]) -> None:
    """Raise `UserError` for a column of 0/1 vectors, which would be read as sets of the labels '0' and '1'."""
    filled = [row for row in sets if row]
    places = {len(row) for row in filled}
    repeated = next((i for i, row in enumerate(sets) if len(set(row)) < len(row)), None)
    if repeated is None or len(places) != 1 or any(_flag(label) is None for row in filled for label in row):
        return
    count = places.pop()
    twice = next(label for label in sets[repeated] if sets[repeated].count(label) > 1)
    raise UserError(
        f"{table.where(repeated)}: column {column!r} holds the value {twice} more than once, so it is not a set of labels. "
        f"All lists have {count} values of 0 and 1, so they look like vectors: name the labels of their positions, "
        f"classify(kind='multi', indicators=[{', '.join([repr('...')] * min(count, 3))}{', ...' * (count > 3)}])."
    )


def of_sets(
    logits: np.ndarray, targets: np.ndarray, labels: Sequence[str], threshold: float, intervals: bool = True
) -> dict[str, Any]:
    """Compute multi-label metrics of logits and targets (rows, labels), as scikit-learn does.

    `accuracy`, also `exact_match`: share of rows whose whole set is correct; `label_accuracy`: share of correct single
    decisions; `f1` over all decisions (micro); `macro_f1`: mean over labels that occur in targets or predictions, 1 if
    there are none. 95% bootstrap intervals over the rows.
    """
    probabilities = probabilities_of(logits)
    chosen = probabilities > threshold
    both, some = (chosen & targets).astype(float), chosen.astype(float) + targets
    exact = (chosen == targets).all(axis=1)
    accuracies: list[np.ndarray] = []
    micro: list[np.ndarray] = []
    macro: list[np.ndarray] = []
    for drawn in resamples(len(targets)) if intervals else ():
        correct, total = drawn @ both, drawn @ some
        accuracies.append(drawn @ exact / len(targets))
        micro.append(_ratio(2 * correct.sum(axis=1), total.sum(axis=1)))
        macro.append(_mean_of_present(_ratio(2 * correct, total), total))
    correct, total = both.sum(axis=0), some.sum(axis=0)
    found, given = targets.sum(axis=0), chosen.sum(axis=0)
    f1 = _ratio(2 * correct, total)
    return {
        "f1": float(_ratio(2 * correct.sum(), total.sum())),
        **interval("f1", micro),
        "macro_f1": float(_mean_of_present(f1, total)),
        **interval("macro_f1", macro),
        "accuracy": float(exact.mean()),
        **interval("accuracy", accuracies),
        "exact_match": float(exact.mean()),
        "label_accuracy": float((chosen == targets).mean()),
        "loss": float(losses_of(logits, targets).mean()),
        "rows": len(targets),
        "per_class": {
            label: {
                "precision": float(correct[i] / given[i]) if given[i] else 0.0,
                "recall": float(correct[i] / found[i]) if found[i] else 0.0,
                "f1": float(f1[i]) if total[i] else 0.0,
                "rows": int(found[i]),
            }
            for i, label in enumerate(labels)
        },
        **({"calibration": calibration(probabilities.ravel(), targets.ravel())} if intervals else {}),
    }


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).sigmoid().numpy()


def losses_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the binary cross-entropy of each row, (rows,), averaged over labels."""
    wanted = torch.from_numpy(np.asarray(targets, np.float32))
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits).float(), wanted, reduction="none"
    )
    return losses.mean(dim=1).numpy()


def _ratio(part: Any, whole: Any) -> Any:
    """Divide elementwise; 1 where the denominator is 0, because nothing was to be found and nothing was."""
    return np.where(np.asarray(whole) > 0, part / np.maximum(whole, 1e-12), 1.0)


def _mean_of_present(figures: np.ndarray, total: np.ndarray) -> Any:
    """Average over labels that occur, along the last dimension; 1 if none does."""
    occurs = total > 0
    return _ratio((figures * occurs).sum(axis=-1), occurs.sum(axis=-1))


def _literal(text: str) -> list[Any] | None:
    """Parse a JSON or Python list in a text cell; None if it is not one."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _flag(value: Any) -> int | None:
    """Parse a cell of an indicator: 0, 1, or None if it is neither."""
    text = label_text(value).casefold()
    text = text.partition(".")[0] if re.fullmatch(r"[01]\.0+", text) else text
    return 1 if text in YES else 0 if text in NO else None


def _joined(labels: Sequence[str]) -> str:
    return "; ".join(labels) or "(none)"
