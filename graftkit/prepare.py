"""From a recipe to everything that a run works with: rows, backbone, graft, plan."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from graftkit.backbone import Backbone
from graftkit.backbone.load import find_source, head_class, load_backbone, pooling_of, positions_of
from graftkit.backbone.prompts import positions_taken
from graftkit.catalogue import build, parse
from graftkit.data.batches import steps_per_epoch
from graftkit.data.columns import find_again, find_columns
from graftkit.data.read import Table, read_table
from graftkit.data.split import hold_out
from graftkit.engine import parallel, precision
from graftkit.engine.frozen import Phase
from graftkit.engine.frozen import phases as find_phases
from graftkit.engine.loop import Settings
from graftkit.errors import UserError
from graftkit.graft import Graft, attach, with_classes
from graftkit.methods.base import Chain
from graftkit.methods.base import read as read_method
from graftkit.methods.head import Head
from graftkit.plan import Plan, make_plan
from graftkit.recipe import Recipe
from graftkit.tasks.base import Examples, Task

MAX_DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Rows:
    """The checked rows of a run, and what was found in them."""

    task: Task
    columns: dict[str, str]
    labels: tuple[str, ...]
    train: Examples
    eval: Examples | None
    test: Examples | None

    @property
    def skipped(self) -> tuple[str, ...]:
        """A message for each bad row that was left out, in all files."""
        parts = [part.skipped for part in (self.train, self.eval, self.test) if part is not None]
        return tuple(dict.fromkeys(message for part in parts for message in part))


@dataclass(frozen=True)
class Prepared:
    """A run that could start: its backbone is grafted, on its device, in its number types."""

    recipe: Recipe
    rows: Rows
    backbone: Backbone
    graft: Graft
    settings: Settings
    plan: Plan
    device: torch.device
    precision: str
    phases: tuple[Phase, ...]
    max_length: int

    @property
    def depth(self) -> int:
        """How many leading blocks are frozen for the whole run."""
        return self.phases[-1].depth


def make_task(expression: str) -> Task:
    return build(parse(expression, "task"), "task")[0]


def prepare_rows(recipe: Recipe, train: Any = None, evaluation: Any = None, test: Any = None) -> Rows:
    """Read and check every row before a model is loaded. `train` ... are tables in memory, from Python."""
    task = make_task(recipe.task)
    data = recipe.data

    def read(source: Any, given: Any, name: str) -> Table:
        return read_table(
            source if given is None else given, encoding=data.encoding, skip_bad=data.skip_bad, name=name
        )

    table = read(data.train, train, "train")
    columns = find_columns(table, task.columns, data.columns)
    labels = task.label_names(table, columns, data.skip_bad)
    examples = task.examples(table, columns, labels, data.skip_bad)
    held: Examples | None = None
    if evaluation is not None or isinstance(data.eval, str):
        held = _examples(task, read(data.eval, evaluation, "eval"), columns, labels, data.skip_bad)
    elif data.eval is not None:
        kept, out = hold_out(_targets(examples), data.eval, recipe.seed)
        held, examples = _take(examples, out), _take(examples, kept)
    tested = None
    if test is not None or data.test is not None:
        tested = _examples(task, read(data.test, test, "test"), columns, labels, data.skip_bad)
    return Rows(task, columns, labels, examples, held, tested)


def _examples(
    task: Task, table: Table, columns: dict[str, str], labels: tuple[str, ...], skip_bad: bool
) -> Examples:
    return task.examples(table, find_again(table, task.columns, columns), labels, skip_bad)


def _targets(examples: Examples) -> list[int]:
    assert examples.targets is not None
    return examples.targets.tolist()


def _take(examples: Examples, rows: list[int]) -> Examples:
    return Examples(
        examples.table.take(rows),
        [examples.texts[i] for i in rows],
        None if examples.pairs is None else [examples.pairs[i] for i in rows],
        None if examples.targets is None else examples.targets[rows],
        examples.skipped,
    )


def prepare_backbone(
    model: str,
    method: Chain,
    labels: tuple[str, ...],
    *,
    weights: str | None = None,
    meta: bool = False,
    seed: int = 0,
) -> tuple[Backbone, Chain]:
    """Load the backbone as the method's head needs it; the method with its classes and pooling filled in."""
    head = next((m for m in method.methods if isinstance(m, Head)), None)
    if head is not None and head.classes not in (None, len(labels)):
        raise UserError(
            f"head(classes={head.classes}) does not fit the {len(labels)} labels of the training rows; "
            "leave classes out, they are counted."
        )
    source = find_source(model, weights)
    method = with_classes(method, len(labels))
    pooling = None
    if head is not None and source.made is None:
        pooling = head.pooling
        has_own = head_class(source) is not None
        if pooling == "auto" and not head.hidden and has_own and pooling_of(source.folder) is None:
            pooling = "own"
        if pooling in ("own", "stacked") and not has_own:
            raise UserError(
                f"transformers has no classification head for {model!r}; use head(pooling='mean'), 'cls' or 'last'."
            )
    backbone = load_backbone(
        source, labels=labels if pooling == "own" else None, stored_head=pooling == "stacked", meta=meta, seed=seed
    )  # fmt: skip
    return backbone, method


def without_classes(method: Chain) -> Chain:
    """The method without the number of classes in its head, which is counted anew in other data."""
    return Chain(
        tuple(dataclasses.replace(m, classes=None) if isinstance(m, Head) else m for m in method.methods)
    )


def attach_new(backbone: Backbone, method: Chain, *, meta: bool) -> Graft:
    """Attach a method to train it. `meta`: shapes only, nothing is allocated. Raises `UserError` for want of memory."""
    try:
        if not meta:
            return attach(backbone, method, keep_base=False)
        backbone.model.to("meta")
        with torch.device("meta"):
            return attach(backbone, method, keep_base=False)
    except (RuntimeError, MemoryError, TypeError) as error:
        told = str(error).lower()
        if isinstance(error, MemoryError) or any(word in told for word in ("alloc", "memory", "overflow")):
            raise UserError(
                f"{method} does not fit into memory; lower its sizes, such as rank, bottleneck, tokens or hidden."
            ) from None
        raise


def prepare(recipe: Recipe, rows: Rows, *, meta: bool = False) -> Prepared:
    """Load, graft, and count. `meta`: shapes only, for the plan."""
    backbone, method = prepare_backbone(
        recipe.model, read_method(recipe.method), rows.labels, weights=recipe.weights, meta=meta, seed=recipe.seed
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        graft = attach_new(backbone, method, meta=meta)
    device = parallel.device()
    kind = precision.choose(recipe.train.precision, device)
    if not meta:
        precision.cast(graft.model, graft.labels, kind)
        graft.model.to(device)
    config: Any = getattr(graft.model, "config", None)
    if config is not None:
        config.use_cache = False
    train = recipe.train
    per_epoch = steps_per_epoch(len(rows.train), train.batch_size, train.accumulate * parallel.processes()[1])
    steps = train.steps or math.ceil(train.epochs * per_epoch)
    graft.method.check_steps(steps)
    phases = find_phases(graft, steps, per_epoch)
    plan = make_plan(
        graft, rows=len(rows.train), batch_size=train.batch_size * train.accumulate, steps_per_epoch=per_epoch,
        steps=steps, precision=kind, frozen_blocks=phases[-1].depth, phases=phases,
    )  # fmt: skip
    settings = Settings(
        steps, train.batch_size, train.accumulate, train.lr, train.weight_decay, train.warmup, train.schedule,
        train.clip, train.label_smoothing, recipe.seed,
    )  # fmt: skip
    return Prepared(
        recipe,
        rows,
        backbone,
        graft,
        settings,
        plan,
        device,
        kind,
        phases,
        max_length(recipe.data.max_length, backbone),
    )


def max_length(wanted: int | None, backbone: Backbone) -> int:
    """Tokens of a row at most. Raises `UserError` where the recipe asks for more than the model takes.

    Virtual tokens that a method puts before the text have a part of the model's positions.
    """
    positions = positions_of(backbone.model)
    limit = backbone.max_length or positions or MAX_DEFAULT_LENGTH
    taken = positions_taken(backbone.model) if positions else 0
    most = max(limit, positions or 0) - taken
    if wanted is None:
        return min(limit, most, MAX_DEFAULT_LENGTH)
    if wanted > most:
        beside = f" beside {taken} virtual ones" if taken else ""
        raise UserError(
            f"data.max_length is {wanted}, but {backbone.source} takes {most} tokens at most{beside}."
        )
    return wanted
