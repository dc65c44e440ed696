"""The settings of the loop."""

from __future__ import annotations

from dataclasses import dataclass

from graftkit.optim.base import Optimizer


@dataclass(frozen=True)
class Settings:
    """The part of a recipe that the loop needs. `steps` is the total number of optimizer steps."""

    steps: int
    batch_size: int
    accumulate: int
    optimizer: Optimizer
    lr: float | None
    weight_decay: float
    warmup: float
    schedule: str
    clip: float
    seed: int
    step_in_backward: bool = False
    decay: float = 0.2
    ema: float | None = None
    weight_type: str = "fp32"
    checkpointing: str = "none"
    batch_tokens: int | None = None  # instead of batch_size rows
