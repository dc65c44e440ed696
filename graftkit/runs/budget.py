"""From a time to the size, batch and steps of a pre-training run, by the measured throughput of this machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftkit.backbone.geometries import GEOMETRIES, Geometry, geometry_of, shaped
from graftkit.backbone.source import class_of
from graftkit.engine import parallel, precision
from graftkit.engine.machine import synchronize
from graftkit.errors import UserError
from graftkit.recipe.schema import NEW, Recipe
from graftkit.recipe.values import seconds
from graftkit.report.console import Console, count, duration
from graftkit.runs.prepare import Rows
from graftkit.tasks.objectives.base import Objective
from graftkit.tasks.objectives.documents import Documents
from graftkit.tasks.shared.scores import token_scores

STEPPING = 0.8  # of the time, which goes into steps; the rest is for evaluations, tokenizing and saving
WANTED = 20.0  # tokens per parameter that a size should see ("Training Compute-Optimal Large Language Models", Hoffmann 2022)
ROWS = 8  # of the batch that is measured
REPEATS = 2
FEWEST_STEPS = 1000  # that the batch size leaves room for, if it can
BATCHES = (8, 16, 32, 64)
LENGTH = 128  # tokens of a row unless data.max_length says otherwise
EVALUATIONS = 5
BYTES_PER_TOKEN = 4.0  # about, of a text whose tokenizer is not there yet


@dataclass(frozen=True)
class Measured:
    """A size on this machine: `row_seconds` of one row, forward and backward."""

    size: str
    parameters: int
    length: int
    row_seconds: float

    def tokens(self, budget: float) -> float:
        """Return the tokens that fit into a budget in seconds."""
        return STEPPING * budget / self.row_seconds * self.length

    def per_parameter(self, budget: float) -> float:
        return self.tokens(budget) / self.parameters


def budgeted(recipe: Recipe, rows: Rows, console: Console) -> Recipe:
    """Return the recipe with size, batch size, steps and evaluations that its budget allows, and print them with reasons.

    Raises `UserError` if not even one step fits, or if the recipe names the steps too.
    """
    if recipe.budget is None:
        return recipe
    _refuse(recipe)
    budget, task = seconds(recipe.budget), rows.task
    assert isinstance(task, Objective)  # the recipe was checked
    found = _measured(recipe, task, budget)
    chosen = found[-1]
    batch = (
        recipe.train.batch_size if "batch_size" in recipe.train.model_fields_set else _batch(chosen, budget)
    )
    steps = int(STEPPING * budget / (chosen.row_seconds * batch * recipe.train.accumulate))
    if steps < 1:
        raise UserError(
            f"a budget of {recipe.budget} is too small for one step: {batch * recipe.train.accumulate} rows of {chosen.size} "
            f"take {duration(chosen.row_seconds * batch * recipe.train.accumulate / STEPPING)} on this machine. Raise the "
            "budget, or choose a smaller size or batch."
        )
    train = recipe.train.model_copy(update={"steps": steps, "batch_size": batch} | (
        {} if "evaluate_every" in recipe.train.model_fields_set else {"evaluate_every": max(1, steps // EVALUATIONS)}
    ))  # fmt: skip
    data = recipe.data.model_copy(update={"max_length": chosen.length})
    _show(console, recipe, rows, found, budget, batch, steps)
    size = chosen.size if recipe.model == NEW else None
    return recipe.model_copy(update={"budget": None, "size": size, "train": train, "data": data})


def _refuse(recipe: Recipe) -> None:
    if parallel.processes()[1] > 1:
        raise UserError(
            "budget is for one process, as each would measure another speed; set train.steps instead."
        )
    for key in ("steps", "epochs"):
        if getattr(recipe.train, key) != type(recipe.train).model_fields[key].default:
            raise UserError(
                f"budget decides the number of steps, but train.{key} is set too; leave out one of the two."
            )


def _measured(recipe: Recipe, task: Objective, budget: float) -> list[Measured]:
    """Measure the size that the recipe names; without one, sizes from small to large as long as they see enough tokens.
    The last of them is chosen."""
    if recipe.model != NEW:
        return [_of_folder(recipe, task)]
    if recipe.size is not None:
        return [_of_geometry(geometry_of(recipe.size, task.geometry), recipe, task)]
    found: list[Measured] = []
    for geometry in (g for g in GEOMETRIES.values() if g.family == task.geometry):
        one = _of_geometry(geometry, recipe, task)
        if found and one.per_parameter(budget) < WANTED:
            break
        found.append(one)
    return found


def _of_geometry(geometry: Geometry, recipe: Recipe, task: Objective) -> Measured:
    config = shaped(geometry, recipe.vocabulary or geometry.vocabulary)
    return _timed(
        geometry.name, config, min(recipe.data.max_length or LENGTH, geometry.positions), recipe, task
    )


def _of_folder(recipe: Recipe, task: Objective) -> Measured:
    import transformers

    folder = Path(recipe.model).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(
            f"budget: {recipe.model!r} is no model folder here, so its speed cannot be measured; set train.steps."
        )
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    positions = getattr(config, "max_position_embeddings", None) or LENGTH
    return _timed(recipe.model, config, min(recipe.data.max_length or LENGTH, positions), recipe, task)


def _timed(name: str, config: Any, length: int, recipe: Recipe, task: Objective) -> Measured:
    """Time forward and backward passes of a random model."""
    import transformers

    device = parallel.device()
    kind = precision.choose(recipe.train.precision, device)
    families = [family for family in task.families if family != "PRETRAINING"] or ["MASKED_LM"]
    auto = class_of(config.model_type, families)
    if auto is None:
        raise UserError(f"a model of size {name!r} has no head for {task.name}(); choose another family.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(config).to(device)
        ids = torch.randint(0, config.vocab_size, (ROWS, length), device=device)
    scored = max(1, round(task.scored * length))
    inputs = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :scored]
    rows = torch.arange(ROWS, device=device).repeat_interleave(scored)
    places = torch.arange(scored, device=device).repeat(ROWS)
    times = []
    for _ in range(1 + REPEATS):
        begun = time.perf_counter()
        with precision.autocast(device, kind):
            scores = token_scores(model, inputs, rows, places, ids[rows, places])
        (-scores[:, 0].mean()).backward()
        model.zero_grad()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return Measured(name, _size(model), length, min(times[1:]) / ROWS)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _batch(chosen: Measured, budget: float) -> int:
    """Return the largest batch size that leaves room for 1,000 steps, from 8 to 64."""
    rows = STEPPING * budget / chosen.row_seconds
    return max([size for size in BATCHES if rows / size >= FEWEST_STEPS], default=BATCHES[0])


def _corpus_tokens(rows: Rows) -> float:
    return rows.train.corpus.size / BYTES_PER_TOKEN if isinstance(rows.train, Documents) else math.nan


def _show(
    console: Console, recipe: Recipe, rows: Rows, found: list[Measured], budget: float, batch: int, steps: int
) -> None:  # fmt: skip
    chosen = found[-1]
    tokens = steps * batch * recipe.train.accumulate * chosen.length
    named = recipe.size is not None or recipe.model != NEW
    why = (
        "named"
        if named
        else f"the largest that sees {WANTED:.0f} tokens per parameter, or the smallest there is"
    )
    console.heading(f"Budget: {recipe.budget}")
    console.pairs([
        ("speed", f"{count(chosen.length / chosen.row_seconds)} tokens per second, measured"),
        ("size", f"{chosen.size}, {count(chosen.parameters)} parameters: {why}"),
        ("steps", f"{count(steps)} of {batch} rows of {chosen.length} tokens: {STEPPING:.0%} of the time; the rest is for "
                  "evaluations and saving"),
        ("tokens", f"{count(tokens)}, {tokens / chosen.parameters:.3g} per parameter, about "
                   f"{tokens / max(1.0, _corpus_tokens(rows)):.2g} passes over the texts"),
        ("schedule", f"{recipe.train.schedule}, to its end within the budget"),
    ])  # fmt: skip
