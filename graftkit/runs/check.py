"""Report every problem with the data of a recipe in one pass; nothing is trained."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.data.columns import find_again, find_columns
from graftkit.data.read import Table
from graftkit.errors import NoGoodRows, UserError, listing
from graftkit.insight.repeated import PARTS, Pair, are_labels, repeated
from graftkit.recipe import schema as recipes
from graftkit.recipe.schema import Recipe
from graftkit.report.making import check_path
from graftkit.report.values import Check, Finding
from graftkit.runs.checked_page import write_check_page
from graftkit.runs.labels import Suspicions, pairs_as_values, refuse_without_classes, suspicions
from graftkit.runs.prepare import Rows, make_task, prepare, reading_of
from graftkit.tasks.base import Examples
from graftkit.tasks.shared.alike import alike

ORDER = ("train", "eval", "test", "recipe")
NO_MODEL = "none"  # placeholder in a recipe that names no model
DOUBTED = 1 / 3  # of the rows: the model is to be doubted, and not the labels
RARE, COMMON = 20, 0.9  # warn of a class 20 times as frequent as another, or with 90% of the rows


def check(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    model: str | None = None,
    task: str | None = None,
    train: Any = None,
    eval: Any = ...,
    test: Any = None,
    settings: Mapping[str, Any] | None = None,
    html: str | Path | None = None,
) -> Check:
    """Report every problem in the data of a recipe: `graftkit data check` in Python.

    The arguments are those of `tune`; `model` is optional. `html`: write a page to this file. Raises `UserError` if the
    recipe itself is wrong.
    """
    given = {"train": train, "eval": eval, "test": test}
    values, tables = recipes.gather(recipe, given, {"model": model, "task": task}, settings)
    return check_values(values, tables, html=html)


def label_errors(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    model: str | None = None,
    task: str | None = None,
    train: Any = None,
    eval: Any = ...,
    test: Any = None,
    settings: Mapping[str, Any] | None = None,
    html: str | Path | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return rows whose label is likely wrong: `graftkit data check --labels` in Python.

    The arguments are those of `tune`. The result has `suspects`, `duplicates`, `leaks` and `outliers`, plain values as in
    the JSON of the command, worst first. Bad rows are left out; `check` lists them. `html`: write a page to this file.
    Raises `UserError` for a mistake in the arguments, a task without classes, or rows that cannot be read at all.
    """
    given = {"train": train, "eval": eval, "test": test}
    values, tables = recipes.gather(recipe, given, {"model": model, "task": task}, settings)
    found = check_values(values, tables, judged=True, html=html)
    if found.suspects is None:
        raise UserError(found.problems[0].text)
    assert found.outliers is not None
    return {
        "suspects": found.suspects, "duplicates": found.duplicates, "leaks": found.leaks, "outliers": found.outliers,
    }  # fmt: skip


def check_values(
    values: Mapping[str, Any], tables: Mapping[str, Any], judged: bool = False, html: str | Path | None = None
) -> Check:
    """Check nested recipe values, with tables in memory by name. `judged`: the labels too, by the features of the model;
    `html`: a page to write."""
    page = None if html is None else Path(html).expanduser()
    if page is not None:
        check_path(page)
    recipe = recipes.make({"model": NO_MODEL, **values})
    if judged and "model" not in values:
        raise UserError(
            "labels are checked by the features of a model: name one with --model (in Python: model=...)."
        )
    checker = _Checker(recipe, tables, "model" in values, judged)
    found = checker.check()
    if page is not None:
        write_check_page(page, found, checker.task, values.get("model"), checker.examples)
    return found


class _Checker:
    def __init__(self, recipe: Recipe, tables: Mapping[str, Any], with_model: bool, judged: bool) -> None:
        self.recipe, self.tables, self.with_model, self.judged = recipe, tables, with_model, judged
        self.task = make_task(recipe.task)
        if self.task.makes_model:
            raise UserError(
                f"`data check` is for rows with labels, and {self.task.name}() reads a corpus, whose text is cleaned and counted "
                "when it is tokenized. `graftkit plan` does that and trains nothing."
            )
        if judged:
            refuse_without_classes(self.task)
        self.reading = replace(reading_of(recipe), skip_bad=True)
        self.problems: list[Finding] = []
        self.warnings: list[Finding] = []
        self.labels: tuple[str, ...] = ()
        self.statistics: dict[str, Any] = {}
        self.files = {name: self._file(name) for name in ("train", "eval", "test") if self._is_given(name)}
        self.columns: dict[str, str] | None = None
        self.known = False  # whether the labels are known
        self.examples: dict[str, Examples] = {}
        self.seen: set[Finding] = set()
        self.bad: dict[str, set[str]] = {name: set() for name in self.files}  # messages of bad rows

    def _is_given(self, name: str) -> bool:
        source = getattr(self.recipe.data, name)
        return name in self.tables or (isinstance(source, str) and source != recipes.IN_MEMORY)

    def _file(self, name: str) -> str:
        return f"{name} (in memory)" if name in self.tables else str(getattr(self.recipe.data, name))

    def check(self) -> Check:
        tables = {name: self._try(name, lambda name=name: self._read(name)) for name in self.files}  # type: ignore[misc]
        self._columns(tables.get("train"))
        for name, table in tables.items():
            if table is not None:
                self._rows(name, table)
        share = self._share() if "train" in self.examples else None
        pairs = repeated(self.task, self.examples, self.labels) if "train" in self.examples else []
        for pair in pairs:
            self._warn(pair.data, self._told(pair))
        if self.with_model and "train" in self.examples and self.columns is not None:
            self._try("recipe", lambda: self._measure(share))
        self._classes()
        found = self._suspicions()
        pairs += found.near if found else []
        rows = {}
        for name, file in self.files.items():
            good = len(self.examples[name]) if name in self.examples else 0
            rows[name] = {"file": file, "good": good, "bad": len(self.bad[name])}
        problems, warnings = (sorted(some, key=_in_order) for some in (self.problems, self.warnings))
        duplicates, leaks = (
            pairs_as_values(
                self.task, [pair for pair in pairs if (pair.data == pair.other) == within], self.examples
            )
            for within in (True, False)
        )
        suspects, outliers = (found.suspects, found.outliers) if found else (None, None)
        return Check(
            problems, warnings, rows, self.labels, self.statistics, duplicates, leaks, suspects, outliers,
            self.columns or {},
        )  # fmt: skip

    def _suspicions(self) -> Suspicions | None:
        """Judge the labels, if that is asked for and there are rows."""
        if not self.judged or "train" not in self.examples or self.columns is None or not self.known:
            return None
        found = suspicions(self.recipe, self.task, self.columns, self.labels, self.examples)
        doubted = len({(one["data"], one["row"]) for one in found.suspects})
        rows = sum(map(len, self.examples.values()))
        if doubted > DOUBTED * rows and not self.task.per_token:
            self._warn(
                "recipe",
                f"the model finds another label for {doubted:,} of {rows:,} rows, so its features hardly tell these labels apart, "
                "and the list of suspects says little; `graftkit fit` compares models.",
            )
        return found

    def _read(self, name: str) -> Table:
        source = self.tables.get(name)
        return self.task.read(
            getattr(self.recipe.data, name) if source is None else source, self.reading, name
        )

    def _columns(self, table: Table | None) -> None:
        """Find columns and labels in the training rows; all other rows are checked against them."""
        if table is None:
            return
        named, task = self.recipe.data.columns, self.task
        self.columns = self._try(
            "train", lambda: task.used(find_columns(table, task.columns, named), named, table)
        )
        if self.columns is not None:
            labels = self._try("train", lambda: task.label_names(table, self.columns or {}, True))
            self.known = labels is not None
            self.labels = labels or ()

    def _rows(self, name: str, table: Table) -> None:
        task = self.task
        self._add_rows(name, table.skipped)
        columns = self.columns
        if name != "train":
            if columns is None:
                return
            columns = self._try(name, lambda: find_again(table, task.columns, self.columns or {}))
        if columns is None:
            return
        examples = self._try(
            name, lambda: task.examples(table, columns, self.labels, True, targets=self.known)
        )
        if examples is not None:
            self.examples[name] = examples
            self._add_rows(name, examples.skipped)

    def _share(self) -> tuple[Examples, Examples | None] | None:
        """Split the training rows into rows to train on and held-out rows; return None if that is impossible."""
        examples, share = self.examples["train"], self.recipe.data.eval
        if not self.known:
            return None
        if "eval" in self.files or share is None:
            return examples, self.examples.get("eval")
        parts = self._try("train", lambda: self.task.hold_out(examples, float(share), self.recipe.seed))
        return None if parts is None else (examples.take(parts[0]), examples.take(parts[1]))

    def _measure(self, share: tuple[Examples, Examples | None] | None) -> None:
        """Collect statistics of the encoded rows: load the model's tokenizer or processor, but not its weights."""
        if share is None:
            return
        train, held = share
        task = self.task.resolve(train, self.labels, self.recipe.seed)
        rows = Rows(task, self.columns or {}, self.labels, train, held, self.examples.get("test"))
        prepared = prepare(self.recipe, rows, meta=True)
        for text in (*prepared.train.warnings(), *prepared.gap):
            self._warn("recipe", text)
        for name, examples in (("train", train), ("eval", held), ("test", rows.test)):
            if examples is None:
                continue
            dataset = (
                prepared.train
                if name == "train"
                else self._try(name, lambda examples=examples: task.dataset(examples, prepared.backbone, prepared.max_length))  # type: ignore[misc]
            )  # fmt: skip
            if dataset is None:
                continue
            self._add_rows(name if name in self.files else "train", dataset.examples.skipped)
            self.statistics[name] = task.statistics(dataset, rows.labels)
            if dataset.truncated:
                limit = f"{prepared.max_length:,} {dataset.unit}"
                self._warn(
                    name, f"{dataset.truncated:,} of {len(examples):,} rows are longer than {limit} and would be truncated."
                )  # fmt: skip

    # warnings

    def _told(self, pair: Pair) -> str:
        """Say which earlier row a row repeats."""
        examples, others = self.examples[pair.data], self.examples[pair.other]
        where, there = examples.where(pair.row), others.where(pair.other_row)
        answers = self._answer(pair.data, pair.row), self._answer(pair.other, pair.other_row)
        differ = ""
        if pair.same is False:
            differ = ", but with a different answer"
            if None not in answers:
                differ = f", but here the label is {answers[0]!r}, and there {answers[1]!r}"
        if pair.data == pair.other:
            return f"{where}: the same as {_place(others, pair.other_row)}{differ}."
        return f"{where}: also in the {PARTS[pair.other]} rows ({there}){differ}."

    def _answer(self, name: str, row: int) -> str | None:
        targets = self.examples[name].targets
        return self.labels[int(targets[row])] if are_labels(targets) and self.labels else None  # type: ignore[index]

    def _classes(self) -> None:
        examples, labels = self.examples.get("train"), self.labels
        for warning in alike(labels):
            self._warn("train", warning)
        if examples is None or not labels or not are_labels(examples.targets):
            return
        counts = Counter({label: 0 for label in labels})
        counts.update(labels[target] for target in np.asarray(examples.targets))
        single = [label for label, count in counts.items() if count == 1]
        if single:
            have = f"label{'s' * (len(single) > 1)} with one row only"
            self._warn("train", f"{len(single)} of {len(labels)} {have}: {listing(single, 8)}.")
        (common, most), (rare, fewest) = counts.most_common()[0], counts.most_common()[-1]
        if most > COMMON * len(examples):
            self._warn(
                "train",
                f"{common!r} has {most:,} of {len(examples):,} rows: always answering it is right in "
                f"{most / len(examples):.1%}, so look at macro F1.",
            )
        elif most >= RARE * max(fewest, 1):
            self._warn(
                "train", f"{common!r} has {most:,} rows and {rare!r} has {fewest:,}; look at macro F1 too."
            )

    # collecting the findings

    def _try(self, name: str, work: Callable[[], Any]) -> Any:
        """Return the result of `work`; if it raises a `UserError`, report that as a problem and return None."""
        try:
            return work()
        except NoGoodRows as error:
            self._add_rows(name, error.skipped)
        except UserError as error:
            self._add(name, str(error))
        return None

    def _add_rows(self, name: str, messages: Sequence[str]) -> None:
        for message in messages:
            self._add(name, message)
            self.bad.setdefault(name, set()).add(message)

    def _add(self, name: str, message: str) -> None:
        finding = self._finding(name, message)
        if finding not in self.seen:
            self.seen.add(finding)
            self.problems.append(finding)

    def _warn(self, name: str, message: str) -> None:
        self.warnings.append(self._finding(name, message))

    def _finding(self, name: str, message: str) -> Finding:
        file = self.files.get(name, "")
        start = re.match(rf"{re.escape(file)}, (\w+ \d+): ", message) if file else None
        return Finding(name, file, start[1] if start else "", message[start.end() :] if start else message)


def _in_order(finding: Finding) -> tuple[int, int]:
    """Sort by file, then by row; findings without a row come last."""
    number = finding.place.rpartition(" ")[2]
    return ORDER.index(finding.data), int(number) if number.isdecimal() else sys.maxsize


def _place(examples: Examples, row: int) -> str:
    """'line 17', where the file is known already."""
    return examples.where(row).removeprefix(f"{examples.table.source}, ")
