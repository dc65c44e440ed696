"""`graftkit bench`: what the training step of a method gets out of this machine, and where its time goes."""

from __future__ import annotations

import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F

from graftkit.backbone.source import find_source
from graftkit.data.order import epoch_batches, padding_share
from graftkit.engine.forward import Forward
from graftkit.engine.loop import Loop, Step
from graftkit.engine.machine import hardware, synchronize
from graftkit.engine.precision import HALF
from graftkit.errors import UserError
from graftkit.plan.work import FORMULA, flops_of, products
from graftkit.recipe import schema as recipes
from graftkit.recipe.schema import IN_MEMORY, Recipe
from graftkit.runs.prepare import Prepared, make_task, prepare, prepare_rows
from graftkit.tasks.base import Task

WARM_UP, STEPS, PROFILED = 4, 12, 3
SECONDS = 60.0  # after which no further step is timed
SPARE = 1.5  # made texts are longer than a row, which is cut to its number of tokens
SQUARE = {"cpu": 2048}  # of the product that shows the peak; on other devices:
LARGE = 8192
REPEATS = 5
PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "conv",
    "gemm",
    "cutlass",
    "cublas",
    "nvjet",
    "xmma",
    "s16816",
    "matmul",
)
ATTENTION = ("attention", "softmax", "flash", "fmha", "sdpa")
COPIES = (
    "copy",
    "memcpy",
    "memset",
    "_to_copy",
    "clone",
    "cat",
    "index_select",
    "gather",
    "scatter",
    "embedding",
    "zero_",
    "fill_",
)
KINDS = ("products", "attention", "copies", "elementwise", "host")


def bench(
    model: str, method: str | None = None, task: str | None = None, *, train: Any = None, tokens: int = 128,
    batch_size: int = 8, precision: str = "auto", settings: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the training step of a method on this machine.

    Rows are random texts of `tokens` tokens, or those of the file `train`. The model is used as it is, nothing is written,
    and activations of frozen blocks are computed in each step. Return rates in tokens and FLOPs per second, shares, and
    the share of the time by kind of operation. Raises `UserError` if a task needs rows of its own.
    """
    recipe, rows = _recipe(model, method, task, train, tokens, batch_size, precision, settings or {})
    prepared = prepare(recipe, prepare_rows(recipe, rows))
    loop = _loop(prepared)
    with closing(iter(loop)) as steps:
        for _ in range(WARM_UP):
            next(steps)
        timed, lengths = _timed(loop, steps, prepared)
        spent = _profiled(steps, prepared.device)
    seconds = median(s for s, _ in timed)
    speed = median(step.tokens / s for s, step in timed)
    work, tokens = _work(prepared, loop, lengths), sum(step.tokens for _, step in timed)
    achieved = None if work is None else work / tokens * speed
    rates = _products(prepared, batch_size)
    peak = rates["peak_flops_per_second"]
    return {
        "model": model, "class": type(prepared.backbone.model).__name__, "method": str(prepared.graft.method),
        "task": str(prepared.rows.task), "precision": prepared.precision, **_machine(prepared.device),
        "rows": "made" if rows is not None else str(train), "batch_size": batch_size,
        "trained_parameters": prepared.plan.trained_parameters, "total_parameters": prepared.plan.total_parameters,
        "seconds_per_step": round(seconds, 6),
        "tokens_per_second": round(speed, 1),
        "padding": _padding(prepared), "model_flops_per_second": achieved,
        **rates, "share_of_peak": None if achieved is None else achieved / (peak or math.inf),
        "formula": FORMULA, "time": spent, "steps": len(timed),
    }  # fmt: skip


def _recipe(model: str, method: str | None, task: str | None, train: Any, tokens: int, batch_size: int, precision: str,
            settings: dict[str, Any]) -> tuple[Recipe, list[dict[str, str]] | None]:  # fmt: skip
    values: dict[str, Any] = {
        "model": model, "task": task or "classify", "data": {"train": IN_MEMORY if train is None else str(train), "eval": None},
        "train": {"batch_size": batch_size, "steps": 10**6, "precision": precision, "schedule": "constant", "warmup": 0.0},
    }  # fmt: skip
    if method is not None:
        values["method"] = method
    if train is None:
        values["data"]["max_length"] = tokens
    for key, value in settings.items():
        recipes.place(values, key, value)
    recipe = recipes.make(values)
    if train is not None:
        return recipe, None
    return recipe, _made(make_task(recipe.task), recipe, tokens, batch_size)


def _made(task: Task, recipe: Recipe, tokens: int, batch_size: int) -> list[dict[str, str]]:
    """Return rows of random tokens for a task that reads texts, long enough to be cut to `tokens`."""
    wanted = [c for c in task.columns if c.required] or [c for c in task.columns if c.name == "text"]
    kinds = {column.kind for column in wanted}
    if (
        task.makes_model
        or not wanted
        or task.per_token
        or not kinds <= {"text", "label"}
        or "text" not in kinds
    ):
        raise UserError(f"random rows for {task.name}() cannot be made; name rows with --train.")
    source = find_source(recipe.model, recipe.weights)
    if source.folder is None:
        raise UserError(f"{recipe.model!r} has no tokenizer of its own; name rows with --train.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    random = np.random.default_rng(0)
    special = set(tokenizer.all_special_ids)
    usual = np.array([i for i in range(len(tokenizer)) if i not in special])
    return [
        {
            column.name: str(row % 2) if column.kind == "label"
            else str(tokenizer.decode(random.choice(usual, round(SPARE * tokens) + 8).tolist()))
            for column in wanted
        }
        for row in range(max(4, batch_size) * 2)
    ]  # fmt: skip


def _loop(prepared: Prepared) -> Loop:
    forward = Forward(prepared.graft, prepared.device, prepared.precision)
    last = replace(prepared.phases[-1], start=0)  # all that a method frees over time
    return Loop(prepared.graft, prepared.train, forward, [last], prepared.learn, prepared.settings)


def _timed(
    loop: Loop, steps: Iterator[Step], prepared: Prepared
) -> tuple[list[tuple[float, Step]], list[np.ndarray]]:
    """Return the seconds of each step with the step, and the lengths of its rows."""
    found: list[tuple[float, Step]] = []
    lengths, begun = [], time.perf_counter()
    while len(found) < STEPS and (not found or time.perf_counter() - begun < SECONDS):
        rows = np.concatenate(loop.batches(loop.step))
        start = time.perf_counter()
        step = next(steps)
        synchronize(prepared.device)
        found.append((time.perf_counter() - start, step))
        all_lengths = prepared.train.lengths
        lengths.append(np.full(len(rows), all_lengths) if isinstance(all_lengths, int) else all_lengths[rows])
    return found, lengths


def _work(prepared: Prepared, loop: Loop, lengths: list[np.ndarray]) -> float | None:
    """Return the model FLOPs of all timed steps; None if rows are not counted in tokens."""
    if prepared.train.unit != "tokens":
        return None
    graft, depth = prepared.graft, prepared.depth
    scored = 0.0
    if not prepared.rows.task.head:
        first = loop.step - PROFILED - len(lengths)
        for step in range(first, first + len(lengths)):
            scored += sum(loop.work(step).units.values())
    one = np.concatenate(lengths)
    return flops_of(graft, depth, one, scored)


def _padding(prepared: Prepared) -> float:
    lengths = prepared.train.lengths
    if prepared.train.uniform or isinstance(lengths, int):
        return 0.0
    return round(
        padding_share(
            lengths, epoch_batches(lengths, prepared.settings.batch_size, prepared.settings.seed, 0)
        ),
        4,
    )


def _products(prepared: Prepared, batch_size: int) -> dict[str, float | None]:
    """Measure the products of the step's shapes, and a large square one, in the precision of the run."""
    device, kind = prepared.device, HALF.get(prepared.precision, torch.float32)
    lengths = prepared.train.lengths
    tokens = int(batch_size * (lengths if isinstance(lengths, int) else np.mean(lengths)))
    size = SQUARE.get(device.type, LARGE)
    peak, done, spent = _rate(size, size, size, device, kind), 0.0, 0.0
    shapes: dict[tuple[int, int], int] = {}
    for one in products(prepared.graft):
        shapes[one.out, one.inside] = shapes.get((one.out, one.inside), 0) + 1
    for (out, inside), times in shapes.items():
        flops = 2.0 * times * tokens * out * inside
        rate = _rate(tokens, out, inside, device, kind)
        done, spent, peak = done + flops, spent + flops / rate, max(peak, rate)
    return {"peak_flops_per_second": peak, "step_products_flops_per_second": done / spent if spent else None}


def _rate(rows: int, out: int, inside: int, device: torch.device, kind: torch.dtype) -> float:
    """Return the FLOPs per second of x (rows, inside) times W^T, W (out, inside), the best of a few times."""
    x = torch.randn(rows, inside, device=device).to(kind)
    weight = torch.randn(out, inside, device=device).to(kind)
    repeats = 1 if device.type == "cpu" else 20
    best = min(_seconds(lambda: F.linear(x, weight), repeats, device) for _ in range(REPEATS))
    return 2.0 * rows * out * inside / best


@torch.no_grad()
def _seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def _profiled(steps: Iterator[Step], device: torch.device) -> dict[str, float]:
    """Return the share of the time of a step by kind of operation, from torch's profiler.

    On a CPU by the names of operations and their own time, on a GPU by the names of kernels; `host` is the rest, in which
    no operation runs there.
    """
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        for _ in itertools.islice(steps, PROFILED):
            pass
        synchronize(device)
        whole = time.perf_counter() - start
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profile.key_averages():
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            spent[kind_of(event.key)] += event.self_device_time_total / 1e6
        elif not on_gpu and event.key.startswith(("aten::", "mkldnn::", "mkl::")):
            spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    spent["host"] = max(0.0, whole - sum(spent.values()))
    total = sum(spent.values())
    return {kind: round(value / total, 4) for kind, value in spent.items()}


def kind_of(name: str) -> str:
    """Return the kind of an operation of torch (aten::addmm) or of a kernel of a GPU by its name."""
    name = name.removeprefix("aten::").lower()
    for kind, words in (("attention", ATTENTION), ("products", PRODUCTS), ("copies", COPIES)):
        if any(word in name for word in words):
            return kind
    return "elementwise"


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": str(device), "hardware": hardware(device), "threads": torch.get_num_threads(), "system": platform.platform(terse=True),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
