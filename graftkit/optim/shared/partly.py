"""AdamW for some parameters, and an update of one's own for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graftkit.optim.base import ParamGroup, can_be_fused


class PartlyAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, except for groups marked `own`: `update` takes the steps of their parameters, one by one.

    `split` marks groups. Subclasses define `update`. It changes the parameter and its state in place, and must not wait for
    the device. Numbers in the state are Python numbers, for the same reason.
    """

    def __init__(
        self, groups: list[ParamGroup], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(groups or [{"params": []}], betas=betas, eps=eps, fused=can_be_fused(groups))
        self._step_supports_amp_scaling = False  # gradients are to be unscaled before `update` sees them

    def update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        raise NotImplementedError

    def project(self, parameter: Tensor, gradient: Tensor) -> Tensor | None:
        """Return the part of a gradient that the step of its parameter needs, or None if that is all of it.

        For a loop that steps within the backward pass and accumulates gradients: the sum of what is returned for each
        batch can be given to `update` instead of a gradient.
        """
        return None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = self.param_groups
        self.take(
            [
                (parameter, group)
                for group in every
                if group.get("own")
                for parameter in group["params"]
                if parameter.grad is not None
            ]
        )
        self.param_groups = [group for group in every if not group.get("own")]
        try:
            super().step()
        finally:
            self.param_groups = every
        return loss

    def take(self, members: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
        """Take the steps of pairs of a parameter with a gradient, and its group."""
        for parameter, group in members:
            assert parameter.grad is not None
            self.update(parameter, parameter.grad, self.state[parameter], group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that the state of `own` parameters is neither cast to their dtype nor completed."""
        own = {
            number for group in state_dict["param_groups"] if group.get("own") for number in group["params"]
        }
        states = state_dict["state"]
        plain = {number: state for number, state in states.items() if number not in own}
        super().load_state_dict({**state_dict, "state": plain})
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, parameters):
            if number in own and number in states:
                self.state[parameter] = {
                    key: value.detach().to(parameter.device, copy=True)
                    if isinstance(value, Tensor)
                    else value
                    for key, value in states[number].items()
                }


def split(groups: list[ParamGroup], own: Callable[[ParamGroup, Tensor], bool]) -> list[ParamGroup]:
    """Return the groups, divided into parameters for which `own` holds, in groups marked `own`, and the others."""
    found = []
    for group in groups:
        marked = [own(group, parameter) for parameter in group["params"]]
        for mark in (True, False):
            members = [p for p, is_own in zip(group["params"], marked) if is_own is mark]
            if members:
                found.append(group | {"params": members, "own": mark})
    return found


def whole_bytes(count: int, dtype: torch.dtype) -> int:
    """Return the bytes that `torch.optim.AdamW` keeps: two moments in the parameter's dtype, the step count in fp32."""
    return 2 * count * dtype.itemsize + torch.float32.itemsize


def decay(parameter: Tensor, group: dict[str, Any]) -> None:
    """Decay the parameter, as in AdamW."""
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
