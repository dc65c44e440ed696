"""From gradients to new values of the parameters: after the backward pass, or parameter by parameter within it.

A step within the backward pass (Lv et al. 2023, 'Full Parameter Fine-tuning for Large Language Models with Limited
Resources', section 3.1, 'fused update') is taken as soon as a parameter's gradient is complete, and the gradient is freed
before the next one is computed. So the gradients of two layers never exist together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftkit.engine.rounding import Rounding

EPS = 1e-6  # added to a norm before it divides, as in torch's clip_grad_norm_


class Updates(Protocol):
    """How a step is taken.

    `whole`: a gradient may be gone after the last backward pass of its step, so no pass can be repeated or follow.
    `previous`: the norm of the step before, kept in checkpoints as `state` is.
    """

    whole: bool
    previous: float

    def enter(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Train these parameters from now on."""

    def leave(self) -> None:
        """Stop training."""

    def begin(self, step: int, seen: Callable[[str, Tensor], None] | None) -> None:
        """Begin a step, counted from 0. `seen` is called with the name and gradient of a parameter before it is freed."""

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Compute the gradients of a part of the loss of the step. `last`: it is the last one."""

    def fits(self) -> bool:
        """Return whether the gradients of the step are in range; otherwise it is computed again. Undo their scale."""

    @property
    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of the scale of the loss; empty without one."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the scale of a checkpoint."""

    def norm(self) -> Tensor:
        """Return the norm of all gradients of the step, before clipping, on their device; clip what is not yet applied."""

    def step(self, norm: float) -> None:
        """Complete the step, whose norm turned out to be finite."""


class Unscaled:
    """The part of `Updates` about a scaled loss, for those that do not scale it."""

    def fits(self) -> bool:
        return True

    @property
    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


class AfterBackward(Unscaled):
    """One step of all parameters after the backward passes of a step, clipped by the norm of all gradients."""

    whole = False

    def __init__(
        self, optimizer: torch.optim.Optimizer, clip: float, rounding: Rounding | None = None
    ) -> None:
        self.optimizer, self.clip = optimizer, clip
        self.alone = None if rounding is None else Alone(optimizer, rounding)
        self.previous = 0.0
        self.parameters: Mapping[str, nn.Parameter] = {}

    def enter(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters

    def leave(self) -> None:
        self.parameters = {}

    def begin(self, step: int, seen: Callable[[str, Tensor], None] | None) -> None:
        if self.alone is not None:
            self.alone.begin(step)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        loss.backward()

    def norm(self) -> Tensor:
        if self.alone is None:
            return torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip or math.inf)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = total_norm([norm_of(gradient) for gradient in gradients])
        for gradient in gradients if self.clip else ():
            gradient.mul_((self.clip / (norm + EPS)).clamp(max=1.0))
        return norm

    def step(self, norm: float) -> None:
        if self.alone is None:
            self.optimizer.step()
        else:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    self.alone.step(parameter)
            self.alone.finish()
        self.previous = norm


class WithinBackward(Unscaled):
    """The step of each parameter as soon as its gradient is complete, which is then freed.

    The norm of all gradients is known only when they are gone. A gradient g is therefore clipped by the larger of the
    norm of all gradients in the step before and its own: g min(1, clip / max(norm before, |g|)). The first step has its
    own alone. So no gradient of a parameter is ever longer than `clip`, and a norm that stays the same is clipped as after
    the backward pass.

    A step of several backward passes keeps the sum of the projected gradients of each parameter, if the optimizer projects
    that (`project`), and the sum of the gradients of the others; the step is taken in the last pass. The norm of a projected
    parameter is then that of the projection, as that of the sum of its gradients is not known.

    A loss that is not finite is not propagated, and neither are those after it in the step, so no weight changes. A gradient
    that is not finite counts as zero, so that no weight or state becomes NaN, and `norm` is not finite: by then the layers
    above have taken the step.
    """

    whole = True

    def __init__(
        self, optimizer: torch.optim.Optimizer, clip: float, rounding: Rounding | None = None
    ) -> None:
        self.alone, self.clip = Alone(optimizer, rounding), clip
        self.previous = 0.0
        self.names: tuple[str, ...] = ()
        self.norms: dict[str, Tensor] = {}
        self.parameters: Mapping[str, nn.Parameter] = {}
        self.sums: dict[str, Tensor] = {}  # of projected gradients
        self.finite = self.last = True  # all losses of the step so far; this backward pass
        self.seen: Callable[[str, Tensor], None] | None = None
        self.handles: list[Any] = []

    def enter(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.leave()
        self.parameters, self.names = parameters, tuple(parameters)
        self.handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in parameters.items()
        ]

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def begin(self, step: int, seen: Callable[[str, Tensor], None] | None) -> None:
        self.norms, self.sums, self.seen, self.finite = {}, {}, seen, True
        self.alone.begin(step)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        # waits for the forward pass, as steps cannot be taken back
        self.finite = self.finite and bool(loss.isfinite())
        if not self.finite:
            return
        self.last = last
        loss.backward()
        if last:  # parameters that only earlier passes reached
            for name, parameter in self.parameters.items():
                if parameter.grad is not None or name in self.sums:
                    self._take(name, parameter)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def reached(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if self.seen is not None:
                self.seen(name, parameter.grad)
            if not self.last or name in self.sums:
                self._keep(name, parameter)
            if self.last:
                self._take(name, parameter)

        return reached

    def _keep(self, name: str, parameter: Tensor) -> None:
        """Add a gradient to the sum of its projections, and free it; unless it is not projected."""
        projected = self.alone.project(parameter)
        if projected is None:
            return
        if name in self.sums:
            self.sums[name].add_(projected)
        else:
            self.sums[name] = projected
        parameter.grad = None

    def _take(self, name: str, parameter: Tensor) -> None:
        """Take the step of a parameter and free its gradient."""
        projected = self.sums.pop(name, None)
        gradient = parameter.grad if projected is None else projected
        assert gradient is not None
        norm = self.norms[name] = norm_of(gradient)
        if self.clip:
            gradient.mul_((self.clip / (norm.clamp(min=self.previous) + EPS)).clamp(max=1.0))
        gradient.masked_fill_(~norm.isfinite(), 0.0)
        self.alone.step(parameter, projected)
        parameter.grad = None

    def norm(self) -> Tensor:
        return total_norm([self.norms[name] for name in self.names if name in self.norms])

    def step(self, norm: float) -> None:
        self.alone.finish()
        self.previous = norm


def norm_of(gradient: Tensor) -> Tensor:
    """Return the norm of a gradient of any type, in fp32 and on its device."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def total_norm(norms: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together from that of each."""
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


class Alone:
    """Steps of single parameters with the one optimizer of all, whose state keeps its form.

    Numbers that an optimizer keeps in its groups are the same for all parameters of a step, and change when it is finished.
    With `rounding`, a parameter in bf16 takes its step as a copy in fp32, as its state is, and is rounded from that.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rounding: Rounding | None = None) -> None:
        self.optimizer, self.rounding = optimizer, rounding
        self.number = 0  # of the step
        members = (p for group in optimizer.param_groups for p in group["params"])
        self.index_of = {id(p): index for index, p in enumerate(members)}
        self.group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.stepped: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    def begin(self, step: int) -> None:
        """Begin a step, counted from 0."""
        self.number = step

    def project(self, parameter: Tensor) -> Tensor | None:
        """Return the projection of the gradient of a parameter, or None if it is not projected."""
        if parameter.grad is None or not hasattr(self.optimizer, "project"):
            return None
        rounded = self.rounding is not None and parameter.dtype == torch.bfloat16
        gradient = parameter.grad.float() if rounded else parameter.grad
        found: Tensor | None = self.optimizer.project(parameter, gradient)
        return found

    def step(self, parameter: Tensor, projected: Tensor | None = None) -> None:
        """Take the step of a parameter with its gradient, or with the sum of what `project` returned."""
        if self.rounding is None or parameter.dtype != torch.bfloat16:
            self._step(parameter, projected)
            return
        stored, gradient = parameter.data, parameter.grad
        parameter.grad = None
        parameter.data = stored.float()
        parameter.grad = None if gradient is None else gradient.float()
        try:
            self._step(parameter, projected)
        finally:
            values = parameter.data
            parameter.grad, parameter.data = None, stored
        with torch.no_grad():
            parameter.copy_(self.rounding(values, self.number, self.index_of[id(parameter)]))

    def _step(self, parameter: Tensor, projected: Tensor | None) -> None:
        group = self.group_of[id(parameter)]
        if projected is not None:
            self.optimizer.update(parameter, projected, self.optimizer.state[parameter], group)  # type: ignore[attr-defined]
            return
        single = {**group, "params": [parameter]}
        every = self.optimizer.param_groups
        self.optimizer.param_groups = [single]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = every
        self.stepped[id(group)] = group, single

    def finish(self) -> None:
        """Keep the numbers that the optimizer changed in its groups."""
        for group, single in self.stepped.values():
            group |= {key: value for key, value in single.items() if key != "params"}
        self.stepped = {}
