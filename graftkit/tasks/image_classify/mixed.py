"""Batches of images that are mixed in pairs (mixup, CutMix)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from graftkit.data.source import Batch


class MixedBatch(Batch):
    """A batch whose images are mixed in pairs. `targets` are those of its own rows; `share`: how much of each image is
    its own; `others`: the targets of the images that the rest is of."""

    source: Any  # with `augmentation` and `argument`

    @cached_property
    def mixed(self) -> tuple[Tensor, np.ndarray, float]:
        images = self.source.inputs(self.rows, self.at)[self.source.argument]
        return self.source.augmentation.mix(images, self.at.generator(self.rows[0], 1))

    @cached_property
    def host_inputs(self) -> dict[str, Tensor]:  # type: ignore[override]
        return {self.source.argument: self.mixed[0]}

    @cached_property
    def others(self) -> Tensor:
        return self.move(self.source.targets(self.rows[self.mixed[1]]))

    @property
    def share(self) -> float:
        return self.mixed[2]
