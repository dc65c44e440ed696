"""What every method promises on every model: one function for each promise, and `check`, which runs them on a pair.
`DETAILS` are promises that depend on the method and on the kinds of the model's modules, not on how they are put together;
so do the last parts of two others, which ask `Pair.details`.

A pair of method and model either keeps all promises or is refused by `attach` with a message that names the method,
what it does not fit, and what to use instead.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import zoo
from device import DEVICE
from torch import Tensor, nn

from graftkit import AdamW, NotFoldable, UserError, attach, detach, load
from graftkit.backbone.anatomy import Added
from graftkit.grafts.graft import Graft
from graftkit.methods.base import Method, read
from graftkit.plan.parameters import make_plan
from graftkit.recipe.catalogue import entries

PASSES = "passes"
NUMBERS = {
    "rows": 8, "batch_size": 4, "steps_per_epoch": 2, "steps": 4, "precision": "fp32", "frozen_blocks": 0,
}  # fmt: skip

torch.set_num_threads(1)


@dataclasses.dataclass
class Pair:
    """A method's expression on a model of the zoo. `identity`: the method says that it starts as the base. `details`: the
    promises of `DETAILS` are tried too."""

    model: zoo.Model
    expression: str
    identity: bool
    folder: Path
    details: bool = True

    def attached(self, seed: int = 0) -> Graft:
        """A new graft on a new copy of the model; `seed` is that of the base's values."""
        torch.manual_seed(0)
        return attach(self.model.fresh(seed), self.expression)

    def shaken(self) -> Graft:
        """The same with all that it trains changed at random."""
        return shake(self.attached())

    def outputs(self, model: nn.Module) -> Tensor:
        return zoo.outputs(model, self.batch)

    def results(self, model: nn.Module, seed: int = 1) -> Tensor:
        """The same with gradients, in the mode that the model is in."""
        batch = self.model.batch(seed)
        return zoo.flat(model(**batch), batch)

    @functools.cached_property
    def batch(self) -> zoo.Batch:
        return self.model.batch()

    @property
    def base(self) -> Tensor:
        """What the model gives before anything is attached."""
        return _base(self.model)

    @functools.cached_property
    def as_attached(self) -> Graft:
        """What `attached` gives, once for all promises that only look at it; `refused_well` sets it."""
        return self.attached()

    @functools.cached_property
    def as_shaken(self) -> Graft:
        """What `shaken` gives, once for all promises that leave it as it was; `labelled_trains...` sets it to its own
        graft, with the values from before the steps."""
        return self.shaken()

    @functools.cached_property
    def wanted(self) -> Tensor:
        """What every copy of `shaken` gives."""
        return self.outputs(self.as_shaken.model)


@functools.cache
def _base(model: zoo.Model) -> Tensor:
    return zoo.outputs(model.fresh(), model.batch())


def shake(graft: Graft, seed: int = 5) -> Graft:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in trained(graft).items():
            change = (torch.randn(tensor.shape, generator=generator) * 0.05).to(tensor.device)
            tensor.add_(change.abs() if name.endswith("running_var") else change)
    return graft


def trained(graft: Graft) -> dict[str, Tensor]:
    """The parameters that move in training, and the running statistics that are no counts."""
    return {
        name: tensor
        for name, tensor in graft.tensors.items()
        if name in graft.labels or (name in graft.statistics and tensor.is_floating_point())
    }


def equal(got: Tensor, wanted: Tensor, what: str = "outputs") -> None:
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} instead of {tuple(wanted.shape)} values"
    assert torch.equal(got, wanted), f"{what} differ by {tiny.relative(got, wanted):.1e} of the largest value"


def close(got: Tensor, wanted: Tensor, what: str) -> None:
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} instead of {tuple(wanted.shape)} values"
    assert tiny.relative(got, wanted) < 1e-5, (
        f"{what} differ by {tiny.relative(got, wanted):.1e} of the largest"
    )


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted), set(got) ^ set(wanted)
    changed = [name for name, value in wanted.items() if not torch.equal(got[name], value)]
    assert not changed, f"changed: {changed}"


def described(model: nn.Module) -> tuple:
    """What a model is made of, to see that nothing was left behind."""
    modules = {name: id(module) for name, module in model.named_modules()}
    hooks = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules() if name
    }
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    config = getattr(model, "config", None)
    names = ("num_labels", "id2label", "_attn_implementation")
    return modules, hooks, required, [getattr(config, name, None) for name in names]


# the promises


def labelled_is_what_requires_a_gradient(pair: Pair) -> None:
    graft = pair.as_attached
    required = {n for n, p in graft.model.named_parameters() if p.requires_grad}
    assert required == set(graft.labels), required ^ set(graft.labels)
    members = [id(p) for group in graft.param_groups() for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in graft.parameters.values()), "param_groups"


def labelled_trains_and_nothing_else_moves(pair: Pair) -> None:
    """Two real optimizer steps, dropout on: every labelled parameter has a gradient and moves, no other, no buffer."""
    graft = pair.attached() if pair.details else pair.as_attached  # details go on looking at that one
    graft.model.train()
    before = tiny.snapshot(graft.model)
    optimizer = torch.optim.AdamW(graft.param_groups(lr=1e-2))
    with_gradient: set[str] = set()
    for step in range(2):
        torch.manual_seed(step)
        np.random.seed(step)
        pair.results(graft.model, seed=step).square().mean().backward()
        with_gradient |= {
            n for n, p in graft.model.named_parameters() if p.grad is not None and bool(p.grad.any())
        }
        optimizer.step()
        optimizer.zero_grad()
    after = tiny.snapshot(graft.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    labelled, moving = set(graft.labels), set(graft.labels) | set(graft.statistics)
    assert with_gradient >= labelled, f"no gradient: {sorted(labelled - with_gradient)}"
    assert with_gradient <= labelled, f"a gradient without a label: {sorted(with_gradient - labelled)}"
    assert moved <= moving, f"moved without a label: {sorted(moved - moving)}"
    assert moved >= moving, f"did not move: {sorted(moving - moved)}"
    held = dict([*graft.model.named_parameters(), *graft.model.named_buffers()])
    with torch.no_grad():
        for name in moved:
            held[name].copy_(before[name])
    pair.as_shaken = shake(graft)


def base_is_untouched(pair: Pair) -> None:
    """Names and values are as before."""
    wanted, state = base_of(pair.as_attached, pair), pair.as_attached.model.state_dict()
    assert state.keys() >= wanted.keys(), wanted.keys() - state.keys()
    same({name: state[name] for name in wanted}, wanted)


def base_of(graft: Graft, pair: Pair, seed: int = 0) -> dict[str, Tensor]:
    """The state of the model before anything is attached, without modules that the graft replaced."""
    replaced = tuple(f"{name}." for name in graft.replaced)
    return {n: v for n, v in pair.model.state(seed).items() if not n.startswith(replaced or "\0")}


def base_checkpoint_loads(pair: Pair) -> None:
    """Before or after grafting. The last promise that looks at `as_attached`, whose base it changes."""
    graft = pair.as_attached
    checkpoint = base_of(graft, pair, seed=9)
    result = graft.model.load_state_dict(checkpoint, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    before = pair.attached(seed=9)
    tensors = graft.tensors
    with torch.no_grad():
        for name, tensor in before.tensors.items():
            if name not in checkpoint:
                tensor.copy_(tensors[name])
    equal(pair.outputs(graft.model), pair.outputs(before.model))


def starts_as_the_identity(pair: Pair) -> None:
    if pair.identity:
        equal(pair.outputs(pair.as_attached.model), pair.base)


def save_and_load_give_the_same(pair: Pair) -> None:
    pair.as_shaken.save(pair.folder / "graft")
    again = load(pair.model.fresh(), pair.folder / "graft", name="other")
    equal(pair.outputs(again.model), pair.wanted, "outputs of the graft loaded under another name")
    if not pair.details:
        return
    again.disable()
    again.save(pair.folder / "again")
    first, second = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (pair.folder / "graft", pair.folder / "again")
    )
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    changed = [name for name in first if first[name] != second[name]]
    assert not changed, f"other files of the graft saved again while disabled: {changed}"


def disable_gives_the_base(pair: Pair) -> None:
    graft = pair.as_shaken
    wanted = pair.wanted
    graft.disable()
    graft.enable()
    equal(pair.outputs(graft.model), wanted, "enabled outputs")
    graft.disable()
    equal(pair.outputs(graft.model), pair.base, "disabled outputs")
    graft.enable()
    assert pair.wanted.shape != pair.base.shape or not torch.equal(pair.wanted, pair.base), "changes nothing"


def folds_or_says_why_not(pair: Pair) -> None:
    graft = pair.as_shaken
    before = tiny.snapshot(graft.model)
    try:
        graft.fold()
    except NotFoldable as error:
        assert any(method.name in str(error) for method in graft.method.methods), str(error)
        same(tiny.snapshot(graft.model), before)
        equal(pair.outputs(graft.model), pair.wanted)
        return
    close(pair.outputs(graft.model), pair.wanted, "folded outputs")
    graft.unfold()
    same(tiny.snapshot(graft.model), before)
    if not pair.details:
        return
    graft.fold()
    graft.disable()
    equal(pair.outputs(graft.model), pair.base, "outputs of the folded graft, disabled")
    graft.enable()
    graft.unfold()
    equal(pair.outputs(graft.model), pair.wanted, "unfolded outputs, enabled again")


def attaches_on_meta(pair: Pair) -> None:
    """Without weights the plan counts the same."""
    planned = attach(pair.model.shapes(), pair.expression, keep_base=False)
    real = pair.as_attached
    shapes = {n: p.shape for n, p in real.parameters.items()}
    assert {n: p.shape for n, p in planned.parameters.items()} == shapes
    assert all(p.is_meta for p in planned.parameters.values())
    count = sum(p.numel() for p in real.parameters.values())
    for graft in (planned, real):
        plan = make_plan(graft, AdamW(), **NUMBERS)
        assert plan.trained_parameters == count == sum(plan.groups.values())


def deepcopy_is_independent(pair: Pair) -> None:
    """The last promise that looks at the shaken graft, which it changes."""
    graft = pair.as_shaken
    pair.results(graft.model.train())  # nothing of a pass may stand in the way of a copy
    wanted = pair.outputs(graft.model)
    twin = copy.deepcopy(graft)
    shake(twin)
    equal(pair.outputs(graft.model), wanted, "outputs of the original")
    changed = pair.outputs(twin.model)
    assert not torch.equal(changed, wanted), "the copy did not change"
    shake(graft, seed=7)
    equal(pair.outputs(twin.model), changed, "outputs of the copy")
    twin.disable()
    equal(pair.outputs(twin.model), pair.base, "outputs of the copy, disabled")


def expression_round_trips(pair: Pair) -> None:
    method = read(pair.expression)
    assert read(str(method)) == method, str(method)
    resolved = pair.as_attached.method
    assert read(str(resolved)) == resolved, str(resolved)


def failed_attach_and_detach_leave_the_model_as_it_was(pair: Pair) -> None:
    """After an `attach` that failed, the method can be attached, and detaching gives the plain model back."""
    model = pair.model.fresh()
    state, before = tiny.snapshot(model), described(model)
    with pytest.raises(UserError, match="on purpose"):
        attach(model, read(pair.expression) + Broken())
    assert described(model) == before
    same(tiny.snapshot(model), state)
    equal(pair.outputs(model), pair.base)
    before = described(model)  # in its first pass, transformers registers hooks of its own
    graft = shake(attach(model, pair.expression))
    assert graft.labels
    assert detach(graft) is model
    assert described(model) == before
    assert not any(isinstance(module, Added) for module in model.modules())
    same(tiny.snapshot(model), state)
    equal(pair.outputs(model), pair.base, "detached outputs")


class Broken(Method):
    """Comes last, and fails."""

    def attach(self, backbone, graft):
        raise UserError("broken on purpose")


def gradients_accumulate(pair: Pair) -> None:
    graft = pair.as_shaken
    graft.model.eval()

    def gradients(seed: int, more: bool = False) -> dict[str, Tensor]:
        if not more:
            graft.model.zero_grad()
        pair.results(graft.model, seed).square().sum().backward()
        return {name: p.grad.clone() for name, p in graft.parameters.items() if p.grad is not None}

    second, first, both = gradients(2), gradients(1), gradients(2, more=True)
    assert both.keys() == first.keys()
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, first[name] + second[name], msg=name)


def shortcuts_give_the_same(pair: Pair) -> None:
    """Torch's own encoder takes another way where no gradient is wanted, past what was added."""
    if any(isinstance(module, nn.MultiheadAttention) for module in pair.as_shaken.model.modules()):
        got = zoo.outputs(pair.as_shaken.model, pair.batch, shortcuts=True)
        close(got, pair.wanted, "outputs of the fused encoder")


def trains_on_a_half_precision_base(pair: Pair) -> None:
    torch.manual_seed(0)
    graft = attach(pair.model.fresh().bfloat16(), pair.expression)
    wrong = [
        n for n, p in graft.parameters.items() if graft.labels[n].role == "added" and p.dtype != torch.float32
    ]
    assert not wrong, f"not in fp32: {wrong}"
    with torch.autocast(DEVICE.type, torch.bfloat16):
        pair.results(graft.model).float().square().mean().backward()
    for name, parameter in graft.parameters.items():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    assert any(parameter.grad is not None for parameter in graft.parameters.values())


PROMISES: tuple[Callable[[Pair], None], ...] = (
    labelled_is_what_requires_a_gradient,
    base_is_untouched,
    starts_as_the_identity,
    expression_round_trips,
    labelled_trains_and_nothing_else_moves,
    save_and_load_give_the_same,
    disable_gives_the_base,
    folds_or_says_why_not,
    attaches_on_meta,
    base_checkpoint_loads,
    failed_attach_and_detach_leave_the_model_as_it_was,
    gradients_accumulate,
    shortcuts_give_the_same,
    deepcopy_is_independent,
    trains_on_a_half_precision_base,
)
DETAILS = {
    attaches_on_meta,
    base_checkpoint_loads,
    failed_attach_and_detach_leave_the_model_as_it_was,
    gradients_accumulate,
    deepcopy_is_independent,
    trains_on_a_half_precision_base,
}


class Broke(AssertionError):
    """A promise was not kept; says which, by what pair, and how."""


def check(
    model: zoo.Model, expression: str, folder: Path, identity: bool = False, details: bool = True
) -> str:
    """`PASSES`, or the message with which the pair is refused. Raises `Broke` for the first promise that is broken.
    Without `details`, the promises of `DETAILS` are left out."""
    pair = Pair(model, expression, identity, folder, details)
    for promise in (refused_well, *PROMISES):
        if promise in DETAILS and not details:
            continue
        try:
            message = promise(pair)
        except Exception as error:
            what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise Broke(f"{promise.__name__}: {expression} on {model.name}: {what}") from error
        if message:
            return message
    return PASSES


def refused_well(pair: Pair) -> str | None:
    """The message of a refusal, which names a method of the expression, the module or model, and another method."""
    model = pair.model.fresh()
    before = described(model)
    torch.manual_seed(0)
    try:
        pair.as_attached = attach(model, pair.expression)
    except UserError as error:
        message = str(error)
    else:
        return None
    assert described(model) == before, "a refusal left something behind"
    known, own = set(entries("method")), {method.name for method in read(pair.expression).methods}
    assert any(re.search(rf"\b{name}\b", message) for name in own), f"names no method: {message}"
    kinds = {type(module).__name__ for module in model.modules()} | set(dict(model.named_modules())) - {""}
    assert any(kind in message for kind in kinds), f"names neither model nor module: {message}"
    advice = set(re.findall(r"[a-z_0-9]+", message.lower().partition("use ")[2]))
    assert advice & (known - own), f"names no other method to use: {message}"
    return message
