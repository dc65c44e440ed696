"""The gradient audit: every labelled parameter trains, and nothing else does.

Training that silently changes nothing, or changes what should be frozen, is the worst bug of this field. In
the first two steps of a run each labelled parameter must get a gradient and move, and no other parameter and
no buffer may. Two cases are reported as notes, not errors. One is a part outside the blocks that the output does not
need, if its method also trains in the blocks: the pooler of an image encoder whose head reads the patches. The other
is a parameter whose gradient was zero throughout the first epoch while others of its method have one: the last
block's local attention in a Longformer whose head reads only the first token.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Container

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone.walk import buffers_of, modules_of, parameters_of
from graftkit.errors import UserError, listing

STEPS = 2  # the first factor of a low-rank pair has no gradient while the second is zero


class Audit:
    """Watch the first two steps of a run, and longer only while a parameter is undecided.

    `trained`: the labels or names of the trained parameters. `state`: other tensors that may move, such as running
    statistics. `settled`: parameters trained and audited in an earlier phase. `spare`: parameters that may have no
    gradient; `unused` are those that have none, `zero` those whose gradient was zero for a whole epoch. `moves_all`: the
    optimizer moves every parameter that has a gradient, in each step.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Container[str],
        state: Collection[str] = (),
        settled: Container[str] = (),
        spare: Collection[str] = (),
        moves_all: bool = True,
    ) -> None:
        self.model = model
        self.moves_all = moves_all
        self.state, self.spare = set(state), set(spare)
        self.unused: tuple[str, ...] = ()
        self.zero: tuple[str, ...] = ()
        self.methods = _methods(trained)
        self.labelled = {name for name, p in parameters_of(model).items() if name in trained and p.numel()}
        self.age = {
            name: 0 for name in self.labelled if name not in settled
        }  # number of steps it was trained for
        self.steps = 0
        self.reached: set[str] = set()  # had a gradient, possibly zero
        self.with_gradient: set[str] = set()
        self.moved: set[str] = set()
        self.before = {name: digest(tensor) for name, tensor in self._tensors()}
        self._gradients: dict[str, Tensor] = {}  # of the current step: whether any element is nonzero

    def free(self, trained: Container[str], state: Collection[str], spare: Collection[str] = ()) -> None:
        """Start training further parameters, and audit them in their own first steps."""
        self.state, self.spare = set(state), set(spare)
        self.methods |= _methods(trained)
        new = {name for name in parameters_of(self.model) if name in trained} - self.labelled
        self.labelled |= new
        self.age |= dict.fromkeys(new, 0)

    @property
    def done(self) -> bool:
        young = min(self.age.values(), default=STEPS) < STEPS
        told = self.idle | set(self.unused) | set(self.zero)
        decided = self.with_gradient & self.moved if self.moves_all else self.with_gradient
        return not young and set(self.age) <= decided | told

    @property
    def idle(self) -> set[str]:
        """Biases whose gradient is exactly zero while that of their weight is not.

        If only differences of outputs count, as between the choices of a row, a bias does not affect the loss.
        """
        biases = (name for name in self.reached - self.with_gradient if name.endswith("bias"))
        return {name for name in biases if f"{name.removesuffix('bias')}weight" in self.with_gradient}

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """Parameters and the buffers that are saved with the model. The others are caches, which a model may rewrite, as
        rotary embeddings do when texts grow longer."""
        caches = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in modules_of(self.model).items()
            for name in module._non_persistent_buffers_set
        }
        buffers = [(name, buffer) for name, buffer in buffers_of(self.model).items() if name not in caches]
        return [*parameters_of(self.model).items(), *buffers]

    def _changed(self, names: set[str] | None) -> set[str]:
        """Return the names, among these or all, of the tensors that have changed, read back in one transfer."""
        return _true({
            name: digest(tensor) != self.before[name]
            for name, tensor in self._tensors()
            if name not in self.moved and (names is None or name in names)
        })  # fmt: skip

    def after_backward(self) -> None:
        """Record which parameters have a gradient, and check those with only zeros so far. Nothing is read back."""
        for name, parameter in parameters_of(self.model).items():
            if parameter.grad is not None:
                self.saw(name, parameter.grad)

    def saw(self, name: str, gradient: Tensor) -> None:
        """Record one gradient of this step, which may be freed before the end of the backward pass."""
        if gradient.numel() and name not in self.with_gradient:
            self.reached.add(name)
            before = self._gradients.get(name)  # of another batch of the step
            self._gradients[name] = gradient.any() if before is None else before | gradient.any()

    def after_step(self, rising: bool = False, last: bool = True) -> None:
        """From a parameter's second step on, raise `UserError` with the names of all that break the rule.

        `rising`: the learning rate has not reached its peak. The first steps of a long warm-up can be too small to
        change a number near 1, so unmoved parameters are checked again until the peak.
        `last`: the first epoch with these parameters ends here. Until then a gradient of exact zeros may be due to the
        rows: with a single token, attention has nothing for queries and keys to choose.
        """
        self.steps += 1
        self.with_gradient |= _true(self._gradients)
        self._gradients = {}
        self.age = {name: age + 1 for name, age in self.age.items()}
        due = {name for name, age in self.age.items() if age >= STEPS}
        if not due:
            return
        first_look = STEPS in self.age.values()
        changed = self._changed(None if first_look else due - self.moved)
        self.moved |= changed
        self.unused = tuple(sorted((due - self.reached) & self.spare))
        silent = due - (self.with_gradient | self.idle if last else self.reached) - set(self.unused)
        trains = {self.methods.get(name) for name in self.with_gradient} - {None}
        self.zero = tuple(sorted(n for n in silent & self.reached if self.methods.get(n) in trains))
        silent -= set(self.zero)
        still = set() if rising or not self.moves_all else (due & self.with_gradient) - self.moved
        leaked = changed - self.labelled - self.state if first_look else set()
        stray = self.reached - self.labelled - self.moved if first_look else set()
        problems = [
            f"{len(names)} {what}: {listing(sorted(names), 6)}"
            for names, what in (
                (silent, "parameters got no gradient"),
                (still, "parameters got a gradient but did not move"),
                (leaked, "frozen tensors changed"),
                (stray, "frozen parameters got a gradient"),
            )
            if names
        ]
        if problems:
            raise UserError(
                f"the gradient audit failed after {self.steps} steps: {'; '.join(problems)}. Exclude parameters that do not "
                "affect the output from training (with a narrower selection of sites), and check that learning "
                "rates are not too small."
            )


def _true(flags: dict[str, Tensor]) -> set[str]:
    """Return the names whose flag is set, with one transfer per device."""
    found: set[str] = set()
    for device in {flag.device for flag in flags.values()}:
        here = {name: flag for name, flag in flags.items() if flag.device == device}
        found.update(name for name, is_set in zip(here, torch.stack(list(here.values())).tolist()) if is_set)
    return found


def _methods(trained: Container[str]) -> dict[str, str]:
    """Return the method of each parameter, if `trained` holds labels."""
    return {name: group.method for name, group in trained.items()} if isinstance(trained, dict) else {}


def digest(tensor: Tensor) -> Tensor:
    """Hash a tensor's bits into a scalar on the tensor's device, in integers modulo 2**64, without reading it back.

    Each element is multiplied by an odd weight that depends on its position, so one changed element always changes the
    hash, and several cancel out with a probability of about 2**-32. (In a plain sum, -1 and +1 would cancel.)
    """
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.dtype != torch.bool:
        # 8 bytes as twice 4: an odd weight preserves the top bit of 64, so two top bits would cancel
        flat = flat.view({1: torch.int8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    size = PIECE if flat.device.type == "cpu" else 64 * PIECE
    for piece in flat.split(size) if flat.numel() else ():
        weights = _weights(size, flat.device)[: len(piece)]
        total = (total + (piece.to(torch.int64) * weights).sum()) * ODD
    return total


PIECE = 1 << 16  # elements hashed at a time: fits into a CPU cache
ODD = 0x1E3779B97F4A7C15  # between pieces, so that their order counts


@functools.lru_cache(maxsize=2)
def _weights(count: int, device: torch.device) -> Tensor:
    """Return (count,) odd pseudo-random integers of 64 bits."""
    draw = np.random.default_rng(0x9E3779B9)
    return torch.from_numpy(draw.integers(-(2**62), 2**62, count) * 2 + 1).to(device)
