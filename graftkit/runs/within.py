"""From limits of memory and time to a recipe that keeps them: `--memory 8GB --time 30min` of `graftkit plan` and `tune`.

What a recipe names is kept. Of what it leaves open, this gives up as little as it can, in this order: the rows of a batch,
with more batches a step so that the step stays the same; activations, which are computed again; four-bit weights of what is
frozen; and at last the method, for one that trains less.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graftkit.backbone.quantized import LIBRARY
from graftkit.engine.memory import resident
from graftkit.errors import UserError
from graftkit.recipe import schema as recipes
from graftkit.recipe.catalogue import entries
from graftkit.recipe.schema import Recipe
from graftkit.recipe.values import memory, seconds
from graftkit.report.console import Console, size
from graftkit.report.forecast import span
from graftkit.runs.foresight import encoded, foresee_always
from graftkit.runs.prepare import Rows, prepare, prepare_rows

GPU_PROCESS = 500e6  # bytes that the driver takes for a process


@dataclass(frozen=True)
class Limits:
    """Bytes of the whole process, or of a GPU, and seconds of the whole run; None: any."""

    memory: float | None = None
    time: float | None = None

    @staticmethod
    def of(memory_text: str | None, time_text: str | None) -> Limits:
        """Read both. Raises `UserError` for words."""
        found: dict[str, float | None] = {}
        for name, text, read in (("memory", memory_text, memory), ("time", time_text, seconds)):
            try:
                found[name] = None if text is None else read(text)
            except ValueError as error:
                raise UserError(f"--{name} {text!r} {error}.") from None
        return Limits(**found)

    def __bool__(self) -> bool:
        return self.memory is not None or self.time is not None


@dataclass(frozen=True)
class Choice:
    """A recipe with what was given up for it, and what it takes."""

    recipe: Recipe
    gave_up: tuple[str, ...]
    memory: float
    seconds: float

    def fits(self, limits: Limits) -> bool:
        return self.in_memory(limits) and (limits.time is None or self.seconds <= limits.time)

    def in_memory(self, limits: Limits) -> bool:
        return limits.memory is None or self.memory <= limits.memory


def within(values: Mapping[str, Any], limits: Limits, console: Console) -> tuple[Recipe, list[str]]:
    """Return the recipe of these values, with what they leave open chosen so that it keeps the limits, and what that gave up.

    Raises `UserError` if nothing does, with the least that there is.
    """
    recipe = recipes.make(values)
    if recipe.budget is not None:
        raise UserError(
            "--memory and --time are for a recipe without a budget, which chooses by time already; leave out one of the two."
        )
    rows = prepare_rows(recipe)
    tried: list[Choice] = []
    for candidate in _methods(values, recipe):
        for one in _of_method(candidate, values, rows, limits):
            tried.append(one)
            if one.fits(limits):
                _show(console, one)
                return one.recipe, list(one.gave_up)
    raise UserError(_least(tried, limits))


def _methods(values: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[Recipe, tuple[str, ...]]]:
    """Yield the recipe, and if it leaves the method open, those with methods that train less."""
    yield recipe, ()
    if values.get("method") is not None:
        return
    for word in ("is_product", "gives_outputs"):
        name = next(
            (entry.name for entry in entries("method").values() if entry.constants.get(word) is True), None
        )
        if name is None or recipe.method is None or recipe.method.startswith(f"{name}("):
            continue
        try:
            yield (
                recipes.make({**values, "method": f"{name}()"}),
                (f"the method {recipe.method}, for {name}(), which trains less",),
            )
        except UserError:
            continue  # a task without a head of its own


def _of_method(
    candidate: tuple[Recipe, tuple[str, ...]], values: Mapping[str, Any], rows: Rows, limits: Limits
) -> Iterator[Choice]:  # fmt: skip
    """Yield choices with one method, each taking less memory than the one before."""
    recipe, gave_up = candidate
    one = _judged(recipe, rows, gave_up)
    yield one
    stated = values.get("train") if isinstance(values.get("train"), dict) else {}
    assert isinstance(stated, dict)
    batch = recipe.train.batch_size
    while (
        not one.in_memory(limits) and "batch_size" not in stated and "accumulate" not in stated and batch > 1
    ):
        batch = max(1, batch // _times(one, limits, batch))
        more = -(-recipe.train.batch_size // batch)
        smaller = _with(recipe, batch_size=batch, accumulate=more)
        one = _judged(
            smaller,
            rows,
            (*gave_up, f"batches of {recipe.train.batch_size} rows, for {more} of {batch} a step"),
        )
        yield one
    if not one.in_memory(limits) and "checkpointing" not in stated:
        again = _with(one.recipe, checkpointing="blocks")
        one = _judged(
            again, rows, (*one.gave_up, "activations, which are computed again (train.checkpointing=blocks)")
        )
        yield one
    if not one.in_memory(limits) and "quantize" not in values and _can_quantize():
        four = one.recipe.model_copy(update={"quantize": "nf4"})
        try:
            yield _judged(
                four, rows, (*one.gave_up, "exact weights of frozen layers, for four bits (quantize=nf4)")
            )
        except UserError:
            return  # a method that trains the weights themselves


def _times(one: Choice, limits: Limits, batch: int) -> int:
    """Return by how much to divide a batch next: at least 2, and more where memory is far too large."""
    assert limits.memory is not None
    return max(2, min(batch, int(one.memory / limits.memory / 2)))


def _with(recipe: Recipe, **train: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def _can_quantize() -> bool:
    return importlib.util.find_spec(LIBRARY) is not None


def _judged(recipe: Recipe, rows: Rows, gave_up: tuple[str, ...]) -> Choice:
    prepared = prepare(recipe, rows, meta=True)
    prepared, datasets = encoded(prepared)
    found = foresee_always(prepared, datasets, twin=prepared.graft)
    return Choice(recipe, gave_up, _process(prepared.device) + found.memory["peak"], found.seconds["total"])


def _process(device: torch.device) -> float:
    """Return the bytes that the process takes beside the run: libraries and rows."""
    return GPU_PROCESS if device.type == "cuda" else float(resident())


def _show(console: Console, one: Choice) -> None:
    console.heading("Within the limits")
    console.pairs([
        ("takes", f"about {size(one.memory)} in the whole process, and {span(one.seconds)}"),
        *[("gave up", text) for text in one.gave_up or ("nothing",)],
    ])  # fmt: skip


def _least(tried: list[Choice], limits: Limits) -> str:
    small, quick = min(tried, key=lambda one: one.memory), min(tried, key=lambda one: one.seconds)
    parts = []
    if limits.memory is not None:
        parts.append(f"the least memory is {size(small.memory)}, with {_named(small)}")
    if limits.time is not None:
        parts.append(f"the least time is {span(quick.seconds)}, with {_named(quick)}")
    asked = " and ".join(
        text
        for text in (
            limits.memory and f"--memory {size(limits.memory)}",
            limits.time and f"--time {span(limits.time)}",
        )
        if text
    )
    return f"nothing that this recipe leaves open keeps {asked}: {'; '.join(parts)}. Raise the limit, shorten the run, or name less in the recipe."


def _named(one: Choice) -> str:
    train = one.recipe.train
    return (
        f"{one.recipe.method or 'the model unchanged'} in {train.accumulate} x {train.batch_size} rows a step"
    )
