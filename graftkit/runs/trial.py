"""A trial before a run: a few of its batches, forward and backward, from which its forecast is made.

It makes the heaviest batch, for memory, and one of mean size, for its kinds of work and what its new shape costs. Then, as often
as 3% of the run allow, another one of about that size whose shape is new, for the seconds of new kernels, and these two in turn, for
seconds, now that their kernels and memory are there.
Results are kept in the cache folder, so that the same run does not make them again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from graftkit.data.by_tokens import longest_of, order_of, prediction_batches, prediction_sizes
from graftkit.data.order import ordered_batches
from graftkit.data.source import Source
from graftkit.engine.cached import Cacheable, Caching, cacheable
from graftkit.engine.filling import FILL_BATCH
from graftkit.engine.forward import Forward
from graftkit.engine.machine import cpu_name, hardware
from graftkit.engine.memory import held, release
from graftkit.engine.starts import kept_bytes
from graftkit.engine.trial import Taken, Trial, undisturbed
from graftkit.files import special, write_json, write_tensors
from graftkit.plan.counting import Counting, Timing
from graftkit.plan.forecast import HOST
from graftkit.plan.measured import Batches, Kind, Measured, batch_sizes, shape_of
from graftkit.plan.operations import ELEMENTWISE, KINDS
from graftkit.plan.work import flops_of
from graftkit.recipe.environment import cache_folder
from graftkit.runs.prepare import Prepared
from graftkit.tasks.base import Dataset

FILE = "trials.json"
MOST = 200  # trials that are kept
SAMPLE = 4000  # batches of a run whose sizes are looked at
SHARE = 0.03  # of the run's seconds, that passes beyond the first two may take, and their least and most
LEAST_SECONDS, MOST_SECONDS = 0.7, 5.0
LITTLE = 0.05  # of a run, that evaluations may take without a pass of their own
TOO_LONG = 20.0  # seconds of a batch, above which there is no trial
REPEATS = 4
MANY = 30  # batches that fill a cache, from which more than two of them are made
WRITTEN = 16 << 20  # bytes of a file that is written to see how long that takes


class Sizes:
    """Sizes and shapes of the batches of a run."""

    def __init__(self, prepared: Prepared) -> None:
        def flops(length: int) -> float:
            return flops_of(prepared.graft, 0, np.array([length]), 0.0)

        one, two = flops(1), flops(2)
        tokens = prepared.train.unit == "tokens"
        self.quadratic = max(0.0, (two - 2 * one) / 2) if tokens else 0.0
        self.linear = one - self.quadratic

    def of(self, source: Source, batches: list[np.ndarray], times: float = 1.0) -> Batches:
        """Return those of batches of row numbers."""
        rows = np.array([len(batch) for batch in batches], np.int64)
        lengths = np.array([source.padded_length(batch) for batch in batches], np.int64)
        return Batches(
            batch_sizes(self.linear, self.quadratic, rows, lengths), shape_of(rows, lengths), times  # type: ignore[arg-type]
        )  # fmt: skip


def step_batches(prepared: Prepared) -> tuple[list[np.ndarray], float]:
    """Return the batches of the steps of a run in order, or its first 4,000, and how many times as many there are."""
    settings = prepared.settings
    whole = settings.steps * settings.accumulate
    found: list[np.ndarray] = []
    epoch = 0
    while len(found) < min(whole, SAMPLE):
        some = order_of(prepared.train, settings, epoch).batches(0, min(whole, SAMPLE) - len(found))
        if not some:
            break
        found, epoch = found + some, epoch + 1
    return found, whole / max(1, len(found))


class Tried:
    """The batches of a run, and a trial of some of them."""

    def __init__(self, prepared: Prepared, datasets: Mapping[str, Dataset]) -> None:
        release(prepared.device)
        self.before = held(prepared.device)  # bytes, of which libraries and kernels will be taken
        self.prepared, self.sizes = prepared, Sizes(prepared)
        self.source, self.held = prepared.train, datasets.get("eval")
        self.batches, times = step_batches(prepared)
        self.steps = self.sizes.of(self.source, self.batches, times)
        self.evaluated = [] if self.held is None else _predicted(self.held, prepared)
        self.evaluations = (
            Batches(np.zeros(0), np.zeros(0, np.int64))
            if self.held is None
            else self.sizes.of(self.held, self.evaluated)
        )

    @property
    def key(self) -> str:
        """A digest of all that the figures depend on."""
        prepared, settings = self.prepared, self.prepared.settings
        graft, train = prepared.graft, prepared.recipe.train
        machine = hardware(prepared.device) if prepared.device.type == "cuda" else cpu_name()
        shapes = [(name, tuple(p.shape)) for name, p in graft.model.named_parameters()]
        parts = (
            machine, torch.get_num_threads(), torch.__version__, type(graft.model).__name__, str(graft.method), prepared.rows.task.name,
            prepared.precision, prepared.depth, shapes, settings.optimizer, settings.accumulate, settings.step_in_backward,
            settings.checkpointing, settings.weight_type, train.cache, settings.steps > prepared.plan.steps_per_epoch,
            len(self.source), settings.batch_size, settings.batch_tokens, self._lengths,
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @property
    def _lengths(self) -> str:
        source = self.source
        if source.uniform or isinstance(source.lengths, int):
            return str(longest_of(source))
        return hashlib.sha256(np.sort(source.lengths).tobytes()).hexdigest()

    def measured(self) -> Measured:
        """Make the trial."""
        prepared, settings = self.prepared, self.prepared.settings
        start = None if self.cached is None else self.cached.start
        parts = prepared.graft, self.source, self.plain, prepared.phases[-1], prepared.learn, settings
        trial = Trial(*parts, start)
        with trial.entered():
            return _Passes(self, trial, self.cached).measured()

    @cached_property
    def plain(self) -> Forward:
        return Forward(self.prepared.graft, self.prepared.device, self.prepared.precision)

    @cached_property
    def cached(self) -> Cacheable | None:
        """Where the passes of the run start, if they start from cached values."""
        prepared, settings, per_epoch = (
            self.prepared,
            self.prepared.settings,
            self.prepared.plan.steps_per_epoch,
        )
        if len(prepared.phases) > 1 or not settings.steps:
            return None
        caching = Caching(prepared.recipe.train.cache, settings.seed)
        passes = math.ceil(settings.steps / per_epoch)
        with undisturbed(prepared.graft.model, prepared.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself warns
            labels = prepared.phases[0].labels
            return cacheable(self.plain, prepared.depth, self.source, passes, labels, caching)

    @property
    def missing(self) -> float:
        """The share of the cached values that no file holds yet."""
        whole = len(self.source) * self.source.views
        return 1.0 if self.cached is None else self.cached.missing(self.source) / max(1, whole)

    @property
    def evaluates_much(self) -> bool:
        """Whether evaluations take more than a few percent of the run, at a third of a step for as many rows."""
        much = self.evaluations.sizes.sum() * evaluations_of(self.prepared) / 3
        return bool(much > LITTLE * self.steps.sizes.sum() * self.steps.times)

    @property
    def filled(self) -> list[np.ndarray]:
        """The batches in which the cache is filled."""
        return ordered_batches(_lengths(self.source), FILL_BATCH)

    def fillings(self, cached: bool, missing: float = 1.0) -> Batches:
        """Return the batches that fill the caches of training and evaluation rows, of which a share is `missing`."""
        if not cached:
            return Batches(np.zeros(0), np.zeros(0, np.int64))
        one = self.sizes.of(self.source, self.filled, missing * self.source.views)
        if self.held is not None:
            more = self.sizes.of(self.held, ordered_batches(_lengths(self.held), FILL_BATCH))
            return Batches(
                np.concatenate([one.sizes, more.sizes / one.times]),
                np.concatenate([one.shapes, more.shapes]),
                one.times,
            )
        return one


def evaluations_of(prepared: Prepared) -> int:
    """Return how often the evaluation rows of a run are evaluated."""
    every, steps = prepared.recipe.train.evaluate_every, prepared.settings.steps
    if every == "end":
        return 1
    if isinstance(every, str):
        every = max(1, prepared.plan.steps_per_epoch * int("".join(filter(str.isdigit, every)) or 1))
    return math.ceil(steps / every)


def _predicted(source: Source, prepared: Prepared) -> list[np.ndarray]:
    return prediction_batches(_lengths(source), *prediction_sizes(prepared.recipe.train))


def _lengths(source: Source) -> np.ndarray:
    """Return the length of each row."""
    return np.full(len(source), source.lengths) if isinstance(source.lengths, int) else source.lengths


class _Passes:
    """The passes of one trial, in their order."""

    def __init__(self, tried: Tried, trial: Trial, cached: Cacheable | None) -> None:
        self.tried, self.trial, self.cached = tried, trial, cached
        self.device = trial.forward.device
        self.spent = 0.0
        self.filled, self.stepped = 0, 0  # shapes of passes that were made
        self.first: Taken | None = None  # of all; it loads libraries

    def measured(self) -> Measured:
        filling, cached_bytes = None, 0
        if self.cached is not None:
            filling = self._fill()
            cached_bytes = self._bytes() if self.cached.in_memory else 0
        step, figures = self._steps()
        evaluation = self._evaluate() if self.cached is None and self.tried.evaluates_much else None
        first, other, update = self.first, filling or step, self.trial.update()
        assert first is not None
        release(self.device)
        kernels = sum(
            kind.kept * shapes
            for kind, shapes in ((filling, self.filled), (step, self.stepped))
            if kind is not None
        )
        loaded = max(
            0,
            held(self.device) - self.tried.before - kernels - (0 if evaluation is None else evaluation.kept),
        )
        usual = (
            other.cold[-1][1] / other.cold[-1][0] if other.cold else other.warm[0][1] / other.warm[0][0]
        ) * first.size
        return Measured(
            step, evaluation, filling, loading=max(0.0, first.seconds - usual), loaded=loaded, update=update,
            writing=self._writing(), cached_bytes=cached_bytes, **figures,
        )  # fmt: skip

    def _count(self, taken: Taken) -> Taken:
        self.first = self.first or taken
        self.spent += taken.seconds
        if taken.seconds > TOO_LONG:
            raise TimeoutError(f"a batch takes {taken.seconds:.0f} s")
        return taken

    def _chosen(self, batches: list[np.ndarray], sizes: Batches) -> tuple[int, int, int]:
        """Return the places of the heaviest batch, of one of mean size, and of the nearest to that with another shape."""
        order = np.argsort(np.abs(sizes.sizes - sizes.sizes.mean()), kind="stable")
        usual = int(order[0])
        others = order[sizes.shapes[order] != sizes.shapes[usual]]
        return int(sizes.sizes.argmax()), usual, int(others[0]) if len(others) else usual

    def _fill(self) -> Kind:
        source, batches = self.tried.source, self.tried.filled
        sizes = self.tried.sizes.of(source, batches)
        heavy, usual, other = self._chosen(batches, sizes)

        def fill(place: int, alone: bool = True) -> Taken:
            size = float(sizes.sizes[place])
            return self._count(self.trial.filling(source, batches[place], size, alone))

        largest, timed = fill(heavy), fill(usual)  # the first one loads libraries
        warm, cold, places = [], [timed], [heavy, usual]
        if len(batches) >= MANY:
            warm = [fill(usual, alone=False)]
            if other != heavy:
                cold, places = [fill(other, alone=False)], [*places, other]
        self.filled = len(set(sizes.shapes[places].tolist()))
        peak = max(one.peak - one.kept for one in (largest, timed))
        return Kind(_points(warm), _points(cold), peak, timed.kept)

    def _steps(self) -> tuple[Kind, dict[str, Any]]:
        tried, trial, sizes = self.tried, self.trial, self.tried.steps
        heavy, usual, other = self._chosen(tried.batches, sizes)

        def step(place: int, around: Any = None, alone: bool = True) -> Taken:
            return self._count(trial.batch(tried.batches[place], float(sizes.sizes[place]), around, alone))

        saved, counting = [0], Counting()
        for tensor in (*trial.graft.model.parameters(), *trial.graft.model.buffers()):
            counting.ignore(tensor)
        trial.middle = lambda: saved.__setitem__(0, counting.now)
        largest = step(heavy, counting)
        trial.middle = lambda: None
        timing = Timing(self.device)
        timed = step(usual, timing)
        seconds = max(1e-9, timed.seconds - timing.own)
        room = SHARE * seconds * len(sizes.sizes) * sizes.times
        room = min(MOST_SECONDS, max(LEAST_SECONDS, room))
        fresh = sizes.shapes[other] not in sizes.shapes[[heavy, usual]]
        cold = [step(other, alone=False)] if fresh and room >= 2 * seconds else []
        room -= sum(one.seconds for one in cold)
        again: list[Taken] = []
        while (
            len(again) < REPEATS and room >= seconds
        ):  # in turn: a batch finds the memory of another one, as in a run
            again.append(step((usual, other)[len(again) % (1 + len(cold))], alone=False))
            room -= again[-1].seconds
        self.stepped = len(set(sizes.shapes[[heavy, usual, other][: 2 + len(cold)]].tolist()))
        warm = again if cold else again[1:] or again  # the first one gets its memory from the system
        warm = warm or [replace(timed, seconds=seconds)]
        kept = timed.kept if sizes.shapes[usual] != sizes.shapes[heavy] else 0
        peak = max(one.peak - one.kept for one in (largest, timed))
        return Kind(_points(warm), _points(cold), peak, kept), {
            "prepare": 0.0 if self.cached is not None else timed.prepare, "saved": saved[0], "typical": timed.size,
            "forward": float(np.mean([one.forward / max(1e-9, one.seconds) for one in again or [timed]])),
            **_figures(timing, seconds),
        }  # fmt: skip

    def _evaluate(self) -> Kind:
        source, batches, sizes = self.tried.held, self.tried.evaluated, self.tried.evaluations
        assert source is not None
        _, usual, _ = self._chosen(batches, sizes)
        taken = self._count(self.trial.evaluation(source, batches[usual], float(sizes.sizes[usual])))
        return Kind([], [(taken.size, taken.seconds)], taken.peak - taken.kept, taken.kept)

    def _bytes(self) -> int:
        """Return the bytes of the cached values of the rows."""
        assert self.cached is not None
        source, start = self.tried.source, self.cached.start
        batch = source.batch(np.arange(min(2, len(source))), self.device)
        with torch.no_grad():
            states = start.capture(self.trial.plain, batch)
        return kept_bytes(start, source, states)

    def _writing(self) -> float:
        """Return the seconds of a byte in the run's folder; 0 where little is written."""
        plan, place = self.tried.prepared.plan, self.tried.prepared.recipe.out
        if 4 * plan.trained_parameters < WRITTEN or place is None or not Path(place).is_dir():
            return 0.0
        with TemporaryDirectory(dir=place, prefix=".trial-") as folder:
            begun = time.perf_counter()
            write_tensors(Path(folder) / "trial.safetensors", {"values": torch.zeros(WRITTEN // 4)})
            return (time.perf_counter() - begun) / WRITTEN


def _points(passes: list[Taken]) -> list[tuple[float, float]]:
    return [(one.size, one.seconds) for one in passes]


def _figures(timing: Timing, seconds: float) -> dict[str, Any]:
    """Return where the seconds of a timed batch went, and its FLOPs and bytes."""
    spent: dict[str, float] = {kind: timing.seconds[kind] for kind in KINDS}
    spent[HOST] = max(0.0, seconds - sum(spent.values()))
    flops: dict[str, float] = {kind: 0.0 for kind in KINDS if kind != ELEMENTWISE}
    moved = 0.0
    for operation, times in timing.operations.items():
        if operation.kind == ELEMENTWISE:
            moved += operation.bytes * times
        elif operation.kind in flops:
            flops[operation.kind] += operation.flops * times
    return {"time": spent, "flops": flops, "moved": moved}


def heaviest_of(prepared: Prepared) -> np.ndarray:
    """Return the rows of the heaviest batch that there can be."""
    source, settings = prepared.train, prepared.settings
    lengths, most, tokens = source.lengths, settings.batch_size, settings.batch_tokens
    if source.uniform or isinstance(lengths, int):
        return np.arange(min(len(source), most if tokens is None else tokens // longest_of(source)))
    return max(
        prediction_batches(lengths, most, tokens), key=lambda rows: len(rows) * int(lengths[rows].max())
    )


def read(key: str) -> Measured | None:
    """Return the trial of a key, if it was made before."""
    with suppress(Exception):
        return Measured.of(_all()[key])
    return None


def keep(key: str, trial: Measured) -> None:
    """Keep a trial; without a cache folder, the next run makes it again."""
    with suppress(Exception):
        known = {k: v for k, v in _all().items() if k != key} | {key: trial.as_dict()}
        write_json(cache_folder() / FILE, dict(list(known.items())[-MOST:]))


def _all() -> dict[str, Any]:
    path = cache_folder() / FILE
    with suppress(OSError, ValueError, RecursionError):
        known = {} if special(path) else json.loads(path.read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    return {}
