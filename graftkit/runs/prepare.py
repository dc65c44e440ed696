"""Turn a recipe into everything that a run needs: rows, backbone, graft, plan."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from graftkit.backbone import Backbone
from graftkit.backbone.load import load_backbone
from graftkit.backbone.memory import is_out_of_memory
from graftkit.backbone.quantized import move
from graftkit.backbone.source import Source, auto_class, find_source, has_two_towers, pooling_of
from graftkit.data.by_tokens import check_tokens, steps_of
from graftkit.data.columns import find_again, find_columns
from graftkit.data.read import Table
from graftkit.engine import parallel, precision
from graftkit.engine.fp8 import quantize_frozen
from graftkit.engine.frozen import Phase
from graftkit.engine.frozen import phases as find_phases
from graftkit.engine.range_test import check_searchable
from graftkit.engine.recompute import check_offload
from graftkit.engine.settings import Settings
from graftkit.errors import NoGoodRows, UserError, listing
from graftkit.grafts.attach import attach
from graftkit.grafts.graft import Graft
from graftkit.grafts.load import begin_with
from graftkit.insight.gap import signs_of
from graftkit.insight.repeated import Pair, leak_warnings, repeated, two_answers
from graftkit.methods.base import Chain, Outputs
from graftkit.methods.base import read as read_method
from graftkit.optim.base import as_optimizer
from graftkit.optim.labels import scaled
from graftkit.plan.parameters import Plan, make_plan
from graftkit.recipe.expressions import build, parse
from graftkit.recipe.schema import Recipe
from graftkit.recipe.sections import number_of
from graftkit.runs.best import best_of
from graftkit.runs.drawing import drawn
from graftkit.runs.further import check_further
from graftkit.runs.garbage import uncollected
from graftkit.runs.probe import Probe, read_probe
from graftkit.tasks.base import Dataset, Examples, Learn, Reading, Task
from graftkit.tasks.shared.alike import alike

LOOKED_AT = 32  # rows, for signs that the model does not fit them
# torch's messages for shapes too large for any memory
TOO_LARGE = re.compile(r"size calculation overflowed|Overflow when unpacking|without overflow")


@dataclass(frozen=True)
class Rows:
    """The checked rows of a run, with their columns and labels."""

    task: Task
    columns: dict[str, str]
    labels: tuple[str, ...]
    train: Examples
    eval: Examples | None
    test: Examples | None
    probe: Probe | None = None

    @property
    def skipped(self) -> tuple[str, ...]:
        """A message for each bad row that was skipped, in all files."""
        parts = [part.skipped for part in (self.train, self.eval, self.test) if part is not None]
        return tuple(dict.fromkeys(message for part in parts for message in part))

    @cached_property
    def warnings(self) -> list[str]:
        """Warnings that do not stop a run: rows that leak into evaluation or test rows, and labels that look alike."""
        pairs = self.repeated
        return [
            *leak_warnings(self.parts, pairs),
            *(two_answers(self.parts, pairs) if self.labels else ()),
            *alike(self.labels),
        ]

    @property
    def parts(self) -> dict[str, Examples]:
        """The parts that there are, by name."""
        parts = {"train": self.train, "eval": self.eval, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    @cached_property
    def repeated(self) -> list[Pair]:
        """Rows that occur twice. Only digests are compared. None for a corpus, whose repetitions are counted in tokenizing."""
        return [] if self.task.makes_model else repeated(self.task, self.parts, self.labels)


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: its grafted backbone is on its device, in its number types."""

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
    train: Dataset
    learn: Learn
    further: Path | None  # the state before its decay of the run that this one goes on from
    gap: tuple[str, ...] = ()  # signs that the model was pre-trained on something else

    @property
    def warnings(self) -> list[str]:
        """Warnings about the rows, and about how the model reads them, that do not stop a run."""
        return [*self.rows.warnings, *self.train.warnings(), *self.gap]

    @property
    def depth(self) -> int:
        """The number of leading blocks that stay frozen for the whole run."""
        return self.phases[-1].depth


def make_task(expression: str) -> Task:
    return build(parse(expression, "task"), "task")[0]


def method_of(recipe: Recipe) -> Chain:
    """Return the method of a recipe; an empty one if the task trains nothing."""
    return read_method(recipe.method) if recipe.method else Chain()


def refuse_step_in_backward(recipe: Recipe) -> None:
    """Raise `UserError` if train.step_in_backward is asked of a method or several processes that need the gradients later.

    The recipe has refused the optimizers that do already.
    """
    if not recipe.train.step_in_backward:
        return
    world = parallel.processes()[1]
    if world > 1:
        raise UserError(
            f"train.step_in_backward takes steps in one process, but there are {world}: their gradients are summed after the "
            "backward pass. Start one process, or leave train.step_in_backward out."
        )
    for method in method_of(recipe).methods:
        if method.reads_gradients:
            raise UserError(
                f"train.step_in_backward: {method.name}() reads the gradients of a step after it, when they are freed; leave "
                "train.step_in_backward out, or use another method."
            )


def prepare_rows(recipe: Recipe, train: Any = None, evaluation: Any = None, test: Any = None) -> Rows:
    """Read and check every row before a model is loaded, and draw those to train on. `train` etc. are tables in memory, from
    Python."""
    return drawn_from(recipe, read_rows(recipe, train, evaluation, test))


def read_rows(recipe: Recipe, train: Any = None, evaluation: Any = None, test: Any = None) -> Rows:
    """Read and check every row; all that are not held out are left to train on."""
    refuse_step_in_backward(recipe)
    task = make_task(recipe.task)
    data = recipe.data
    reading = reading_of(recipe)

    def read(source: Any, given: Any, name: str) -> Table:
        return task.read(source if given is None else given, reading, name)

    table = read(data.train, train, "train")
    columns = task.used(find_columns(table, task.columns, data.columns), data.columns, table)
    labels = task.label_names(table, columns, data.skip_bad)
    examples = task.examples(table, columns, labels, data.skip_bad)
    held: Examples | None = None
    if evaluation is not None or isinstance(data.eval, str):
        held = _examples(task, read(data.eval, evaluation, "eval"), columns, labels, data.skip_bad)
    elif data.eval is not None:
        examples, held = task.split(examples, data.eval, recipe.seed if data.seed is None else data.seed)
    drawn(recipe, task, examples, labels)  # raises for too few before more is read
    best_of(task, labels, recipe.train.best)  # raises for an unknown one before a model is loaded
    tested = None
    if test is not None or data.test is not None:
        tested = _examples(task, read(data.test, test, "test"), columns, labels, data.skip_bad)
    return Rows(task, columns, labels, examples, held, tested, read_probe(recipe))


def drawn_from(recipe: Recipe, rows: Rows) -> Rows:
    """Return the rows of a run from those that were read: the drawn ones, and the task with what follows from them."""
    examples = drawn(recipe, rows.task, rows.train, rows.labels)
    return dataclasses.replace(
        rows, task=rows.task.resolve(examples, rows.labels, recipe.seed), train=examples
    )


def _examples(
    task: Task, table: Table, columns: dict[str, str], labels: tuple[str, ...], skip_bad: bool
) -> Examples:
    return task.examples(table, find_again(table, task.columns, columns), labels, skip_bad)


def reading_of(recipe: Recipe) -> Reading:
    """Return how to read the files of a run."""
    return Reading(recipe.data.encoding, recipe.data.skip_bad, recipe.data.columns)


def prepare_backbone(
    source: Source, method: Chain, task: Task, labels: tuple[str, ...], *, meta: bool = False, seed: int = 0
) -> tuple[Backbone, Chain]:
    """Load the backbone that the task and the method's head need; fill in the method's classes and pooling."""
    native = auto_class(source, task.families)
    if not task.head:
        if native is None and source.made is None and task.families:
            raise UserError(f"model {source.name!r} is not a language model that {task.name}() can use.")
        backbone = load_backbone(
            source, native, complete=native is not None and not task.new_head, meta=meta, seed=seed
        )
        task.settle(backbone)
        return backbone, method
    outputs = outputs_of(source, task, labels)
    method = method.for_outputs(outputs)
    own = method.own_head(outputs)
    backbone = load_backbone(
        source, native if own or has_two_towers(source) else None,
        labels=task.output_names(labels) if own == "replaced" else None, complete=own == "complete", meta=meta,
        seed=seed,
    )  # fmt: skip
    task.settle(backbone)
    return backbone, method


def outputs_of(source: Source, task: Task, labels: tuple[str, ...]) -> Outputs:
    """Return what a head has to know of the task and the model."""
    return Outputs(
        task.name, source.name, task.outputs(labels), task.outputs(labels) == len(labels), task.per_token,
        auto_class(source, task.families) is not None, source.made is not None,
        not task.per_token and source.made is None and pooling_of(source.folder) is not None,
    )  # fmt: skip


def attach_new(backbone: Backbone, method: Chain, *, meta: bool, keep_base: bool = False) -> Graft:
    """Attach a method for training. `meta`: shapes only, nothing is allocated. Raises `UserError` if out of memory."""
    try:
        if not meta:
            return attach(backbone, method, keep_base=keep_base)
        backbone.model.to("meta")
        with torch.device("meta"):
            return attach(backbone, method, keep_base=keep_base)
    except (RuntimeError, MemoryError, TypeError) as error:
        if is_out_of_memory(error) or TOO_LARGE.search(str(error)):
            raise UserError(
                f"{method} does not fit into memory; reduce its size, for example rank, bottleneck, tokens or hidden."
            ) from None
        raise


def rehearse(recipe: Recipe, rows: Rows, source: Source) -> None:
    """Raise `UserError` for what shapes alone can tell, before weights are read, which may take minutes.

    A few rows are encoded too. A module that a user's function made is there already, so nothing is rehearsed with it.
    """
    if source.made is not None:
        return
    with by_shapes():
        backbone, graft, max_length = _grafted(recipe, rows, source, meta=True)
        if recipe.train.steps is not None and rows.task.trains:
            graft.method.check_steps(recipe.train.steps)
        rows.task.rehearse(rows.train, backbone, max_length)


@contextmanager
def by_shapes() -> Iterator[None]:
    """Do something on the meta device ahead of the real weights; only a `UserError` gets out."""
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except NoGoodRows:  # of a few: others may be good
        return
    except UserError:
        raise
    except Exception:  # code of the user's that needs values; the weights will show what is wrong
        return


def source_of(recipe: Recipe) -> Source:
    """Find the model of a recipe. Raises `UserError` if it is not there or its folder is not complete."""
    return find_source(recipe.model, recipe.weights, recipe.quantize)


def refuse_untrained(graft: Graft, task: Task) -> None:
    """Raise `UserError` if the model's head is new and the method leaves it frozen."""
    named = dict(graft.model.named_parameters(remove_duplicate=False))  # a bias may have two names
    trained = {id(named[name]) for name in graft.labels if name in named}
    lacking = [name for name in graft.backbone.missing if name in named and id(named[name]) not in trained]
    if lacking:
        raise UserError(
            f"the weights of {graft.backbone.source!r} lack the head for {task.name} ({listing(lacking, 3)}), so it is new, but "
            f"{graft.method} does not train it. Add unfreeze('head') to the method, or use full()."
        )


def _grafted(recipe: Recipe, rows: Rows, source: Source, *, meta: bool) -> tuple[Backbone, Graft, int]:
    """Load the backbone and attach the graft. Return both with the maximum number of tokens of a row."""
    backbone, method = prepare_backbone(
        source, method_of(recipe), rows.task, rows.labels, meta=meta, seed=recipe.seed
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        graft = attach_new(backbone, method, meta=meta, keep_base=rows.task.needs_base)
    graft.labels = scaled(graft.labels, recipe.train.lr_scale)
    if recipe.train.start is not None:
        begin_with(graft, Path(recipe.train.start).expanduser(), rows.labels)
    if rows.task.new_head:
        refuse_untrained(graft, rows.task)
    if rows.task.trains:
        as_optimizer(recipe.train.optimizer).check(graft.param_groups())
    return backbone, graft, rows.task.max_length(recipe.data.max_length, backbone)


def graft_of(recipe: Recipe, rows: Rows, source: Source) -> Graft:
    """Return the graft of a recipe on the meta device: shapes only."""
    return _grafted(recipe, rows, source, meta=True)[1]


def prepare(recipe: Recipe, rows: Rows, source: Source | None = None, *, meta: bool = False) -> Prepared:
    """Load the backbone, attach the graft and make the plan. `source`: the recipe's model, if it has been found already;
    `meta`: shapes only.
    """
    backbone, graft, max_length = _grafted(recipe, rows, source or source_of(recipe), meta=meta)
    device = parallel.device()
    check_offload(recipe.train.checkpointing, device)
    bf16 = recipe.train.weight_type == "bf16"
    kind = precision.choose("bf16" if bf16 else recipe.train.precision, device)
    named, kind = kind, "bf16" if kind == "fp8" else kind  # of everything but the products of frozen weights
    rounded = precision.rounded_names(graft.model, graft.labels, recipe.train.weight_type)
    if not meta:
        precision.cast(graft.model, graft.labels, kind, rounded)
        move(graft.model, device)
        if named == "fp8":
            quantize_frozen(graft.backbone, graft.labels)
    config: Any = getattr(graft.model, "config", None)
    if config is not None:
        config.use_cache = False
    train = recipe.train
    with uncollected():
        dataset = rows.task.dataset(rows.train, backbone, max_length, training=True)
    check_tokens(dataset, train.batch_tokens)
    per_epoch = steps_of(dataset, train, train.accumulate * parallel.processes()[1])
    steps = (train.steps or math.ceil(train.epochs * per_epoch)) if rows.task.trains else 0
    graft.method.check_steps(steps)
    further = check_further(recipe, steps)
    optimizer = as_optimizer(train.optimizer)
    phases = find_phases(graft, steps, per_epoch)
    if isinstance(train.lr, str):
        check_searchable(graft, phases, steps, further)
    plan = make_plan(
        graft, optimizer, rows=len(dataset), batch_size=train.batch_size * train.accumulate, steps_per_epoch=per_epoch,
        steps=steps, precision=named, frozen_blocks=phases[-1].depth, phases=phases, step_in_backward=train.step_in_backward,
        ema=train.ema is not None, rounded=rounded, accumulate=train.accumulate, lr=train.lr,
        batch_tokens=train.batch_tokens,
    )  # fmt: skip
    settings = Settings(
        steps, train.batch_size, train.accumulate, optimizer, number_of(train.lr), train.weight_decay,
        0.0 if further else train.warmup, train.schedule, train.clip, recipe.seed, train.step_in_backward, train.decay,
        train.ema, train.weight_type, train.checkpointing, train.batch_tokens,
    )  # fmt: skip
    return Prepared(
        recipe,
        dataclasses.replace(rows, train=dataset.examples),
        backbone,
        graft,
        settings,
        plan,
        device,
        kind,
        phases,
        max_length,
        dataset,
        rows.task.learner(dataset, rows.labels, train.label_smoothing),
        further,
        tuple(_gap(rows, dataset)),
    )


def _gap(rows: Rows, dataset: Dataset) -> list[str]:
    """Return signs, of some rows, that the model was made for others. A task with a template has texts of its own too."""
    if not rows.task.one_answer:
        return []
    texts = [
        dataset.examples.values[name] for name in ("text", "text_pair") if name in dataset.examples.values
    ]
    return signs_of(dataset, texts, LOOKED_AT)
