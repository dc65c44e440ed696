"""Foresee what a prepared run will take: a twin of its graft on fake tensors, and the rates of this machine."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from graftkit.data.by_tokens import order_of, prediction_batches, prediction_sizes
from graftkit.data.source import Source
from graftkit.engine.cached import MEMORY_SHARE
from graftkit.engine.filling import FILL_BATCH
from graftkit.engine.machine import same_random_states
from graftkit.engine.memory import Peak, host_memory, release, resident
from graftkit.engine.parallel import processes
from graftkit.engine.precision import rounded_names
from graftkit.errors import Note, first_line
from graftkit.grafts.graft import Graft
from graftkit.plan import history
from graftkit.plan.elsewhere import Machine, fitted, shared
from graftkit.plan.estimate import estimated
from graftkit.plan.forecast import HOST, Forecast, Load, Passes, forecast
from graftkit.plan.measured import measured_forecast
from graftkit.plan.pretended import Counted, Pretended
from graftkit.plan.rates import Rates, machine_of
from graftkit.recipe.environment import forecasts
from graftkit.report.console import Console, size
from graftkit.report.forecast import show_forecast
from graftkit.runs import trial as trials
from graftkit.runs.prepare import Prepared, graft_of, source_of
from graftkit.runs.trial import evaluations_of, heaviest_of
from graftkit.tasks.base import Dataset

FEW = 10  # steps, below which those of the run count less than what was foreseen
SAMPLE = 200  # batches of the first epoch whose lengths are looked at


def foresee(prepared: Prepared, datasets: Mapping[str, Dataset]) -> Forecast | None:
    """Return what a run will take, from a trial of its batches or, if there is none, from counting; None if runs are not
    foreseen, or if that failed."""
    if not forecasts():
        return None
    note = None
    if processes()[1] == 1 and prepared.settings.steps:
        try:
            return foresee_by_trial(prepared, datasets)
        except Exception as error:  # no forecast is worth a run
            note = f"the trial of its batches failed ({type(error).__name__}: {first_line(error)[:160]})"
            del error
            release(prepared.device)
    try:
        found = foresee_always(prepared, datasets)
        return found if note is None else replace(found, note=" ".join(filter(None, (note, found.note))))
    except Exception as error:
        warnings.warn(Note(f"no forecast ({type(error).__name__}: {first_line(error)})."), stacklevel=2)
        return None


def foresee_by_trial(prepared: Prepared, datasets: Mapping[str, Dataset], *, make: bool = True) -> Forecast:
    """Return what a run will take, by a trial that was kept, or else by one that is made now. `make`: otherwise `LookupError`."""
    tried = trials.Tried(prepared, datasets)
    key = tried.key
    found = trials.read(key)
    fresh = found is None
    if found is None:
        if not make:
            raise LookupError("no such run has been tried yet")
        found = tried.measured()
        trials.keep(key, found)
    fillings = tried.fillings(found.filling is not None, tried.missing if make and found.filling else 1.0)
    passes = passes_of(prepared, datasets)
    known = history.read(machine_of(prepared.device), history.TRIAL)
    cast = measured_forecast(
        prepared.plan, found, passes, tried.steps, tried.evaluations, fillings, known, fresh=fresh,
        waits=prepared.device.type == "cpu",
        metrics=passes.evaluations > 0 and prepared.rows.task.head and "sklearn.metrics" not in sys.modules,
    )  # fmt: skip
    return replace(cast, advice=advice(cast, prepared.device))


def foresee_without_weights(
    prepared: Prepared, datasets: Mapping[str, Dataset], machine: Machine | None = None
) -> Forecast:
    """Return what a run will take, from a trial that an earlier run kept, or from counting its operations. `machine`: another
    one than this."""
    if machine is None:
        with suppress(Exception):
            return foresee_by_trial(prepared, datasets, make=False)
    return foresee_always(prepared, datasets, twin=prepared.graft, machine=machine)


def foresee_always(
    prepared: Prepared, datasets: Mapping[str, Dataset], *, twin: Graft | None = None, machine: Machine | None = None
) -> Forecast:  # fmt: skip
    """Return what a run will take, from its operations on fake tensors. `twin`: its graft on the meta device, if there is one already: it is used up. `machine`:
    another one than this."""
    rates = Rates(prepared.device) if machine is None else None
    known = history.read("" if rates is None else rates.machine, history.COUNT)
    cpu = machine is None and prepared.device.type == "cpu"
    with same_random_states(prepared.device):  # rates are measured on random numbers
        load = load_of(prepared, datasets, twin, as_on_gpu=machine is not None)
        passes = passes_of(prepared, datasets, load.filling is not None)
        if machine is not None:
            passes = shared(passes, machine, fixed=prepared.recipe.train.steps is not None)
        found = forecast(prepared.plan, load, passes, machine or rates, known, cpu=cpu)  # type: ignore[arg-type]
    if rates is not None:
        rates.save()
    return (
        replace(found, advice=advice(found, prepared.device)) if machine is None else fitted(found, machine)
    )


def advice(found: Forecast, device: torch.device) -> list[str]:
    """Return what would make a run fit, or faster."""
    room = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else host_memory() - resident()
    most, said = found.memory["interval"][1], []
    if most > room:
        said.append(
            f"may not fit: up to {size(most)} of {size(room)}; give --memory {size(room).replace(' ', '')}, or lower train.batch_size "
            "with train.accumulate, or use train.checkpointing=blocks"
        )
    elif found.time.get(HOST, 0.0) > 0.5:
        said.append(
            "more than half of a step is Python, not arithmetic; a larger train.batch_size takes less time for a row"
        )
    return said


def load_of(
    prepared: Prepared, datasets: Mapping[str, Dataset], twin: Graft | None = None, as_on_gpu: bool = False
) -> Load:  # fmt: skip
    """Count the passes of a run on fake tensors; where that fails, estimate them by a formula."""
    heavy, usual = batches_of(prepared)
    try:
        return _counted(prepared, datasets, twin or _twin(prepared), heavy, usual, as_on_gpu)
    except Exception as error:
        return estimated(
            prepared.graft,
            prepared.depth,
            prepared.precision,
            _shapes(prepared.train, [heavy, *usual]),
            error,
        )


def _twin(prepared: Prepared) -> Graft:
    """Return the graft of a run once more, on the meta device."""
    recipe = prepared.recipe
    source = source_of(recipe)
    if source.made is not None:  # whose weights would be lost on the meta device if they are those of the run
        own = {id(tensor) for tensor in (*prepared.graft.model.parameters(), *prepared.graft.model.buffers())}
        if any(
            id(tensor) in own for tensor in (*source.made.model.parameters(), *source.made.model.buffers())
        ):
            raise ValueError("the function that makes the model returns the same tensors each time")
    return graft_of(recipe, prepared.rows, source)


def batches_of(prepared: Prepared) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the rows of the heaviest batch that there can be, and batches with the least, a usual and the largest size."""
    source, settings, heavy = prepared.train, prepared.settings, heaviest_of(prepared)
    lengths = source.lengths
    if isinstance(lengths, int):
        return heavy, [heavy]
    found = order_of(source, settings, 0).batches(0, SAMPLE)
    found.sort(key=lambda rows: len(rows) * int(lengths[rows].max()))
    return heavy, found


def _counted(
    prepared: Prepared, datasets: Mapping[str, Dataset], twin: Graft, heavy: np.ndarray, batches: list[np.ndarray],
    as_on_gpu: bool,
) -> Load:  # fmt: skip
    source, settings, recipe = prepared.train, prepared.settings, prepared.recipe
    phase = replace(
        prepared.phases[-1], labels={n: g for n, g in twin.labels.items() if n in prepared.phases[-1].labels}
    )
    views = math.ceil(settings.steps / prepared.plan.steps_per_epoch) if prepared.plan.steps_per_epoch else 0
    cached = source.keeps and recipe.train.cache != "none" and views > source.views
    pretended = Pretended(
        twin, prepared.device, prepared.precision, phase, prepared.learn, checkpointing=settings.checkpointing, cached=cached,
        rounded=rounded_names(twin.model, twin.labels, settings.weight_type), held=settings.accumulate > 1,
        freed=settings.step_in_backward, as_on_gpu=as_on_gpu,
    )  # fmt: skip
    pretended.check_start(source, heavy[:2])
    begun = time.perf_counter()
    batch = source.batch(batches[len(batches) // 2], prepared.device)
    batch.host_inputs  # noqa: B018
    prepare = time.perf_counter() - begun
    step = pretended.step(source, heavy) if settings.steps else pretended.evaluation(source, heavy)
    usual = _usual(pretended, source, batches, heavy, step) if settings.steps else [(1.0, step)]
    kept = pretended.cached_bytes(source, heavy[:2]) if cached else 0
    filling = pretended.filling(source, _longest(source, FILL_BATCH)) if kept else None
    held = datasets.get("eval")
    evaluation = None
    if held is not None and len(held):
        evaluation = pretended.evaluation(held, _longest(held, *prediction_sizes(recipe.train)))
    in_memory = recipe.train.cache != "disk" and 2 * kept < MEMORY_SHARE * host_memory()
    return Load(step, usual, evaluation, filling, prepare, kept if in_memory else 0)


def _usual(
    pretended: Pretended, source: Source, batches: list[np.ndarray], heavy: np.ndarray, step: Counted
) -> list[tuple[float, Counted]]:  # fmt: skip
    """Return two counted batches with shares whose mean has the size of the mean of all batches."""
    if len(batches) == 1 and len(batches[0]) == len(heavy):
        return [(1.0, step)]
    sizes = [_padded(source, rows) for rows in batches]
    mean, most = float(np.mean(sizes)), _padded(source, heavy)
    near = int(np.argmin(np.abs(np.array(sizes) - mean)))
    if not isinstance(source.lengths, int) and sizes[near] == most:
        return [(1.0, step)]
    one = pretended.step(source, batches[near])
    return [(mean / sizes[near], one)]


def _padded(source: Source, rows: np.ndarray) -> int:
    return len(rows) * source.padded_length(rows)


def _longest(source: Source, size: int, tokens: int | None = None) -> np.ndarray:
    lengths = source.lengths
    if isinstance(lengths, int):
        return np.arange(min(size, len(source)))
    return prediction_batches(lengths, size, tokens)[0]


def _shapes(source: Source, batches: list[np.ndarray]) -> list[tuple[int, int]]:
    """Return rows and padded length of batches."""
    return [(len(rows), source.padded_length(rows)) for rows in batches]


def passes_of(prepared: Prepared, datasets: Mapping[str, Dataset], filled: bool = False) -> Passes:
    """Return how often each pass is made. `filled`: there is a cache of frozen layers to fill."""
    settings, per_epoch = prepared.settings, prepared.plan.steps_per_epoch
    held, world = datasets.get("eval"), processes()[1]
    fills = 0.0
    if filled:
        fills = sum(_batches(one, FILL_BATCH) * one.views for name, one in datasets.items() if name != "test")
    return Passes(
        settings.steps, per_epoch, settings.accumulate, 0 if held is None else evaluations_of(prepared),
        0.0 if held is None else _batches(held, *prediction_sizes(prepared.recipe.train)) / world, fills / world,
    )  # fmt: skip


def _batches(source: Source, size: int, tokens: int | None = None) -> float:
    """Return how many batches of its longest rows a source has as many tokens as; rows of like length share a batch."""
    if isinstance(source.lengths, int) or not len(source):
        return len(source) / size
    if tokens is not None:
        return float(source.lengths.sum()) / tokens
    return float(source.lengths.sum()) / (size * int(source.lengths.max())) * (size / min(size, len(source)))


def encoded(prepared: Prepared) -> tuple[Prepared, dict[str, Dataset]]:
    """Encode the rows for the model, and drop those that turn out to be bad."""
    rows = prepared.rows
    others = {"eval": rows.eval, "test": rows.test}
    found = {
        name: rows.task.dataset(examples, prepared.backbone, prepared.max_length)
        for name, examples in others.items()
        if examples is not None
    }
    kept = {name: dataset.examples for name, dataset in found.items()}
    rows = replace(rows, eval=kept.get("eval"), test=kept.get("test"))
    return replace(prepared, rows=rows), {"train": prepared.train, **found}


def told(found: Forecast, console: Console) -> dict[str, Any]:
    """Print a forecast, and return it as plain values."""
    values = found.as_dict()
    show_forecast(console, values)
    return values


class Reality:
    """What a run takes, beside what is foreseen. Made before the first step, when the model is in memory.

    Its memory counts over what was held then, before a trial loads libraries too.
    """

    def __init__(self, prepared: Prepared, datasets: Mapping[str, Dataset], console: Console) -> None:
        """Foresee the run and print that."""
        self.device, self.steps = prepared.device, prepared.settings.steps
        if forecasts():
            make_resident(prepared.graft.model)
        self.peak = Peak(prepared.device)
        self.foreseen = foresee(prepared, datasets)
        if self.foreseen is not None:
            told(self.foreseen, console)
        self.peak.restart()
        self.over: int | None = None

    def left(self, step: int, stepping: float) -> float | None:
        """Return the seconds that are left after `step` steps, which took `stepping` seconds without evaluations: those foreseen,
        times how much longer steps take than foreseen, of which the first ones say little. None if nothing is foreseen."""
        if self.foreseen is None or not step:
            return None
        seconds, steps = self.foreseen.seconds, self.steps
        each = seconds["step"] or stepping / step
        around = max(0.0, seconds["total"] - seconds["filling"] - steps * each)  # evaluations
        slower = (stepping + FEW * each) / ((step + FEW) * each)
        return slower * ((steps - step) * each + around * (1 - step / steps))

    def compared(self, seconds: float, partly: bool) -> dict[str, Any]:
        """Return the entries of result.json. `partly`: the run was resumed or stopped early, and is not comparable."""
        found: dict[str, Any] = {"peak_memory_bytes": self.peak.whole()}
        if self.foreseen is None:
            return found
        predicted = self.foreseen.predicted
        measured = {"peak_memory_bytes": self.over, "seconds": round(seconds, 3)}
        if not partly and processes()[0] == 0:
            history.add(machine_of(self.device), self.foreseen.by, predicted, measured)
        return {**found, "predicted": predicted, "measured": measured}

    def end_of_steps(self) -> None:
        """Read the peak; what is done after the last step does not count."""
        if self.over is None:
            self.over = self.peak.over()


def make_resident(model: torch.nn.Module) -> None:
    """Read a number of each page of the weights. Those that were mapped from a file come into memory now, not in the first
    step, whose memory they would seem to be."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() > 4096:
            tensor.detach().view(-1).view(torch.uint8)[::4096].sum()
