"""The steps of a run's loop, with what makes them fast on this machine, and notes about it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from graftkit.engine.loop import Loop, Step
from graftkit.engine.parallel import processes
from graftkit.engine.precision import with_tf32
from graftkit.engine.recompute import FROM_THE_START
from graftkit.engine.regions import Regions
from graftkit.report.console import Console
from graftkit.runs.prepare import Prepared


class Pace:
    """The steps of a loop; between them, blocks are compiled if that pays (`train.compile`)."""

    def __init__(self, prepared: Prepared, loop: Loop, console: Console) -> None:
        self.loop, self.console = loop, console
        self.batches = prepared.settings.accumulate
        self.regions = regions_of(prepared, console)
        if with_tf32(prepared.device, prepared.precision):
            console.line("note: fp32 products are computed in TF32 on this GPU, with 10 bits of the fraction")

    def steps(self) -> Iterator[Step]:
        """Yield the steps. Time that their consumer takes does not count."""
        begun = time.monotonic()
        scale = self.loop.updates.state
        for step in self.loop:
            left = self.loop.settings.steps - step.number
            self.regions.after_step(time.monotonic() - begun, self.batches, left)
            now = self.loop.updates.state
            times = int(now.get("repeated", 0) - scale.get("repeated", 0))
            if times:
                self.console.line(
                    f"note: the gradients of step {step.number} overflowed in fp16; it was computed again {times} "
                    f"time{'s' * (times > 1)}, at last with a loss scale of {now['scale']:g}"
                )
            scale = now
            yield step
            begun = time.monotonic()


def regions_of(prepared: Prepared, console: Console) -> Regions:
    """Return the blocks that may be compiled: none if a method unfreezes them over time or if they are recomputed, or, with
    `auto`, in several processes, each of which would measure another time."""
    train = prepared.recipe.train
    wanted = train.compile
    phased, recomputed = len(prepared.phases) > 1, train.checkpointing in FROM_THE_START
    if phased or recomputed:
        if wanted == "blocks":
            why = "the method trains others in each phase" if phased else "their activations are recomputed"
            console.line(f"note: the blocks are not compiled, as {why}")
        wanted = "none"
    elif wanted == "auto" and processes()[1] > 1:
        wanted = "none"
    return Regions(prepared.graft, prepared.depth, prepared.device, prepared.precision, wanted, console.line)
