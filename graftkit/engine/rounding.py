"""Stochastic rounding of new values to bf16."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 24  # elements that are rounded at a time, which bounds the random numbers in memory
LOW = 1 << 16  # values of the bits of an fp32 number that bf16 does not have


class Rounding:
    """Round weights to bf16 up or down at random, so that the mean is the fp32 value.

    Nearest rounding loses each update below 1/256 of a weight, however many there are. With stochastic rounding
    (Gupta et al. 2015, 'Deep Learning with Limited Numerical Precision'; for bf16 weights, Zamirai et al. 2020, 'Revisiting
    BFloat16 Training') they add up in the mean. The random numbers are a function of (seed, step, parameter), so a resumed
    run rounds the same.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, values: Tensor, step: int, index: int) -> Tensor:
        """Return fp32 values of any shape in bf16, for a step and the number of a parameter."""
        device = values.device
        if device not in self.generators:
            self.generators[device] = torch.Generator(device)
        generator = self.generators[device]
        generator.manual_seed(((self.seed * 1_000_003 + step) * 65_537 + index) % 2**63)
        rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=device)
        for into, piece in zip(rounded.view(-1).split(PIECE), values.reshape(-1).split(PIECE)):
            into.copy_(_rounded(piece, generator))
        return rounded


def _rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return fp32 values (n,) that bf16 has. A number's bits count its magnitude, so random low bits carry with the
    probability of the share that is lost, and the rest is cut off."""
    noise = torch.randint(0, LOW, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = noise.add_(values.view(torch.int32)).bitwise_and_(-LOW)
    return torch.where(values.isfinite(), bits.view(torch.float32), values)
