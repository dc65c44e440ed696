"""Join the layers of a model that read one input, for the time of a run."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch

from graftkit.data.source import Pass, Source
from graftkit.engine.forward import Forward, evaluating
from graftkit.methods.shared.joined import Joining


def join(joining: Joining, source: Source, forward: Forward) -> None:
    """Join what can be joined now. Which layers read the same input is seen on the first row, in eval mode and without
    gradients, so that a resumed run joins the same. A model that cannot take a single row leaves the rest apart."""

    @torch.no_grad()
    def call() -> None:
        device = forward.device
        cuda = [device] if device.type == "cuda" else []
        with suppress(Exception), torch.random.fork_rng(devices=cuda), evaluating(forward.graft.model):
            batch = source.batch(np.zeros(1, dtype=np.int64), device, Pass())
            forward.prepare(batch)
            forward(batch)

    joining.enter(call)
