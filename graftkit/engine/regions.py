"""Compile the repeated blocks of a model with torch.compile where that pays.

A block is compiled by itself ('regional compilation'), so that one graph serves all blocks that are alike and the time to
compile does not grow with the model; lengths and numbers of rows are symbolic, so that new ones compile nothing. Additions
are traced with the block, as their hooks are called inside it. Evaluation stays eager.

Whether it pays is measured on the inputs that the blocks had in a real step: the forward and backward pass of a block,
eager and compiled, and the time to compile. The result is remembered in the cache folder for this machine, model, method
and versions, so that the next run decides at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone.anatomy import has_statistics
from graftkit.backbone.memory import is_out_of_memory
from graftkit.backbone.packed import current
from graftkit.engine.dropout import fast_dropout
from graftkit.engine.fused_blocks import FusedBlock
from graftkit.engine.machine import cpu_name, synchronize
from graftkit.engine.precision import autocast
from graftkit.errors import first_line
from graftkit.files import special, write_json
from graftkit.grafts.graft import Graft
from graftkit.recipe.environment import cache_folder

LEAST_LEFT = 300.0  # estimated seconds of a run below which nothing is tried
FIRST_STEPS = 6  # that are timed before; the very first ones are slower
TRIALS = 5
SLOW, SLOW_STEPS = (
    3.0,
    8,
)  # after so many steps in a row that take so many times as long, blocks are eager again
WORTHWHILE = 1.05
TOLERANCE = {
    "fp32": 1e-3,
    "bf16": 5e-2,
    "fp16": 2e-2,
}  # relative differences of outputs and gradients, which are rounding
CACHE = "compile.json"
BACKEND = "inductor"  # of torch.compile
RECOMPILATIONS = 64
ALIKE = (0, 1)  # blocks whose graphs differ


@dataclass(frozen=True)
class Measured:
    """One block: seconds of a forward and backward pass, eager and compiled, and to compile.

    `first`: of the first two blocks, since the first one's input may need no gradient and so has a graph of its own; `next`:
    of each block after them.
    """

    eager: float
    compiled: float
    first: float
    next: float

    def saved(self, blocks: int, passes: float) -> float:
        """Return the seconds that compiling `blocks` blocks saves over `passes` batches, after its own cost."""
        return (
            (self.eager - self.compiled) * blocks * passes
            - self.first
            - self.next * max(0, blocks - len(ALIKE))
        )


class Region:
    """The forward of one block: compiled while it is on and gradients are computed, else the block's own."""

    def __init__(
        self, block: nn.Module, compile: Callable[[Any], Any], failed: Callable[[Exception], None]
    ) -> None:
        self.block, self.plain = block, block.forward
        functools.update_wrapper(self, block.forward, updated=())
        self.modules = self.plain.plain if isinstance(self.plain, FusedBlock) else self.plain
        self.compiled, self.failed = compile(self.modules), failed
        self.on = False
        self.seen: tuple[tuple, dict[str, Any]] | None = None
        self.watches = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or current() is not None:  # each packed batch would be compiled anew
            return self.plain(*args, **kwargs)
        if self.watches:
            self.seen, self.watches = (detached(args), detached(kwargs)), False
        if self.on:
            try:
                return self.compiled(*args, **kwargs)
            except Exception as error:  # a new kind of input that cannot be compiled
                if is_out_of_memory(error):
                    raise
                self.failed(error)
        return self.plain(*args, **kwargs)


class Regions:
    """The blocks of a run that may be compiled, and the decision."""

    def __init__(
        self, graft: Graft, depth: int, device: torch.device, precision: str, wanted: str, tell: Callable[[str], None],
        backend: str | None = None,
    ) -> None:  # fmt: skip
        """`depth`: the number of leading frozen blocks, which are not compiled; blocks with running statistics are not
        either. `wanted`: train.compile. `tell`: print a line."""
        self.graft, self.device, self.precision, self.tell = graft, device, precision, tell
        self.wanted, self.backend = wanted, backend or BACKEND
        self.on = self.decided = False
        self.compiled = False  # whether they ever were
        self.times: list[float] = []  # of steps before the decision
        self.slow = 0  # steps in a row
        blocks = [graft.backbone.module(name) for name in graft.backbone.blocks[depth:]]
        usable = not any(any(map(has_statistics, block.modules())) for block in blocks)
        self.blocks = blocks if wanted != "none" and usable else []
        self.regions: list[Region] = []
        self.decided = not self.blocks

    @property
    def state(self) -> dict[str, bool]:
        """What a checkpoint keeps, so that a resumed run computes as the one before."""
        return {"decided": self.decided, "on": self.on, "compiled": self.compiled}

    def restore(self, state: Mapping[str, bool] | None) -> None:
        """Go on as the run did when a checkpoint was written."""
        if state and self.blocks:
            self.decided, self.compiled = bool(state["decided"]), bool(state["compiled"])
            if state["on"]:
                self._place()
                self._turn_on()

    def after_step(self, seconds: float, batches: int, left: int) -> None:
        """Decide, if it is time to, after a step of `seconds` with `batches` forward passes, and `left` steps to go."""
        if self.decided:
            self._watch(seconds)
            return
        self.times.append(seconds)
        if self.regions:
            if any(region.seen for region in self.regions):
                self._decide(batches, left)
            else:
                self.decided = True
                self.leave()
                self.tell(
                    "note: the blocks are not compiled, as the parts of packed rows differ in each batch"
                )
            return
        if self.wanted == "auto" and not self._may_pay(batches, left):
            return
        if any(not isinstance(vars(block).get("forward"), (FusedBlock, NoneType)) for block in self.blocks):
            self.decided = True
            self.tell("note: the blocks are not compiled, as their activations are recomputed")
            return
        self._place()
        for region in self.regions[: len(ALIKE) + 1]:
            region.watches = True

    def _watch(self, seconds: float) -> None:
        """Stop compiling if one step after the other takes much longer than before: each compiles something new."""
        if not self.on or len(self.times) < FIRST_STEPS:
            return
        self.slow = self.slow + 1 if seconds > SLOW * median(self.times[2:]) else 0
        if self.slow >= SLOW_STEPS:
            self.on = False
            for region in self.regions:
                region.on = False
            self.tell(
                f"note: the blocks are not compiled any more: the last {SLOW_STEPS} steps took over {SLOW:g} times as long as those "
                "before"
            )

    def leave(self) -> None:
        """Give the blocks their own forward back."""
        for region in self.regions:
            if vars(region.block).get("forward") is region:
                del region.block.forward
                if isinstance(region.plain, FusedBlock):
                    region.block.forward = region.plain  # type: ignore[assignment]
        self.regions, self.on = [], False

    def _may_pay(self, batches: int, left: int) -> bool:
        """Return whether to try; once enough steps are timed, also settle that it cannot pay."""
        if len(self.times) < FIRST_STEPS:
            return False
        known = self._remembered()
        estimated = median(self.times[2:]) * left
        enough = known.saved(len(self.blocks), batches * left) > 0 if known else estimated > LEAST_LEFT
        self.decided = not enough
        return enough

    def _place(self) -> None:
        for block in self.blocks:
            region = Region(block, self._compile, self._give_up)
            block.forward = region  # type: ignore[assignment]
            self.regions.append(region)

    def _compile(self, function: Any) -> Any:
        options: Any = {"fallback_random": True} if self.backend == "inductor" else None
        compiled = torch.compile(
            function, backend=self.backend, dynamic=True, fullgraph=True, options=options
        )

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with compiling():
                return compiled(*args, **kwargs)

        return call

    def _turn_on(self) -> None:
        self.on = self.decided = self.compiled = True
        for region in self.regions:
            region.on = True

    def _decide(self, batches: int, left: int) -> None:
        """Measure, and compile all blocks or none."""
        known = self._remembered() if self.wanted == "auto" else None
        try:
            found = self._measure()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._give_up(error)
            self.leave()
            return
        self._remember(found)
        told = f"{1000 * found.eager:.3g} ms a block eager, {1000 * found.compiled:.3g} ms compiled"
        rest = found.next * (len(self.blocks) - len(ALIKE) - 1)
        gain = (found.eager - found.compiled) * len(self.blocks) * batches * left - rest
        if self.wanted == "blocks" or (gain > 0 and found.eager > WORTHWHILE * found.compiled):
            self._turn_on()
            self.tell(
                f"note: {len(self.blocks)} blocks are compiled ({told}{'' if known is None else ', as before'})"
            )
        else:
            self.decided = True
            self.leave()
            self.tell(f"note: compiling the blocks does not pay here ({told})")

    def _give_up(self, error: Exception) -> None:
        """Go on with eager blocks, and say why."""
        self.decided, self.on = True, False
        for region in self.regions:
            region.on = False
        reason = getattr(error, "inner_exception", error)  # of torch._dynamo's: what the compiler raised
        self.tell(f"note: the blocks are not compiled ({type(reason).__name__}: {first_line(reason)[:200]})")

    def _measure(self) -> Measured:
        """Time the blocks on the inputs of a step. Raises whatever the compiler raises, and `RuntimeError` for other results."""
        first, *others = [region for region in self.regions if region.seen is not None]
        wanted, _ = self._timed(first, first.modules)  # a fused block leaves out tokens that nothing reads
        costs = []
        for region in (first, *others):
            got, cost = self._timed(region, region.compiled)
            costs.append(cost)
            for one, other in zip(got, wanted if region is first else ()):
                differ = float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-20))
                if not differ <= TOLERANCE[self.precision]:
                    raise RuntimeError(f"compiled results differ by {differ:.1%}")
        pairs = [
            (self._timed(first, first.plain)[1], self._timed(first, first.compiled)[1]) for _ in range(TRIALS)
        ]
        eager, compiled = map(min, zip(*pairs))
        for region in self.regions:
            region.seen = None
        return Measured(eager, compiled, sum(costs[: len(ALIKE)]), costs[-1] if others else 0.0)

    def _timed(self, region: Region, function: Any) -> tuple[list[Tensor], float]:
        """Return the output and gradients of a block on the inputs that it had, and the time of the pass."""
        assert region.seen is not None
        args, kwargs = detached(region.seen[0]), detached(region.seen[1])
        wanted = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
        wanted += [p for p in region.block.parameters() if p.requires_grad]
        synchronize(self.device)
        start = time.perf_counter()
        with self._as_in_a_step():
            with autocast(self.device, self.precision):
                output = first_tensor(function(*args, **kwargs))
            gradients = torch.autograd.grad(output, wanted, pull(output), allow_unused=True)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        return [output.detach(), *(g for g in gradients if g is not None)], seconds

    @contextmanager
    def _as_in_a_step(self) -> Iterator[None]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), fast_dropout(self.device, 0):
            torch.manual_seed(0)
            yield

    @functools.cached_property
    def key(self) -> str:
        """What a measurement holds for."""
        graft = self.graft
        machine = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        about = (
            machine, torch.get_num_threads(), torch.__version__, graft.backbone.fingerprint,
            len(self.blocks), str(graft.method), self.precision, self.backend,
        )  # fmt: skip
        return hashlib.sha256(repr(about).encode()).hexdigest()[:16]

    def _remembered(self) -> Measured | None:
        try:
            return Measured(**{name: float(value) for name, value in _known()[self.key].items()})
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def _remember(self, found: Measured) -> None:
        try:
            write_json(cache_folder() / CACHE, {**_known(), self.key: asdict(found)})
        except Exception:
            pass  # without the cache, the next run measures again


def _known() -> dict[str, Any]:
    path = cache_folder() / CACHE
    try:
        known = {} if special(path) else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


@contextmanager
def compiling() -> Iterator[None]:
    """Set what compiled blocks need: no common subexpressions, as two dropout masks of one input are two; enough room for
    the graphs of all blocks; and no lines of the compiler's on the terminal."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    with functorch.patch(cse=False), dynamo.patch(recompile_limit=RECOMPILATIONS):
        yield


def detached(values: Any) -> Any:
    """Return nested values with tensors that share memory and no graph; `requires_grad` stays."""
    return _mapped(lambda t: t.detach().requires_grad_(t.requires_grad), values)


def _mapped(change: Callable[[Tensor], Tensor], values: Any) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if type(values) in (list, tuple):
        return type(values)(_mapped(change, value) for value in values)
    if type(values) is dict:
        return {key: _mapped(change, value) for key, value in values.items()}
    return values


def pull(output: Tensor) -> Tensor:
    """Return a random gradient of an output, always the same. That of a sum would vanish in a norm."""
    generator = torch.Generator(output.device).manual_seed(0)
    return torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)


def first_tensor(output: Any) -> Tensor:
    """Return the states that a block returns, alone or first among others."""
    return (
        output if isinstance(output, Tensor) else next(value for value in output if isinstance(value, Tensor))
    )
