"""LoRA as one operation: linear layers that read one input, with their low-rank updates, in one autograd function.

For the layers i of one input x, such as q, k and v, or gate and up,

    y_i = W_i x + b_i + s_i B_i (A_i x)

with all A_i side by side: one cast of x, one product for all A_i x, and x saved once for the backward pass. There,

    dx = sum_i dy_i W_i + [s_i dy_i B_i]_i A,    dA = [s_i dy_i B_i]_i^T x,    dB_i = s_i dy_i^T (A_i x)

are summed in place. A and B are cast to the type of the computation once per optimizer step, not in each call. The results
are those of the hooks to rounding: products of bf16 numbers are summed in another order.

Layers are joined for the time of a run, by a `forward` of their own (`joined`). Where that cannot hold (inactive or mixed
grafts, other types, tracing by a compiler, which joins for itself) a layer is called as it is, and the hooks add as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from graftkit.backbone.anatomy import base_modules
from graftkit.backbone.weights import narrow_product
from graftkit.methods.shared.updates import Update


class Member:
    """A frozen linear layer of a group and the updates beside it."""

    def __init__(self, site: nn.Linear, updates: Sequence[Any]) -> None:
        self.site, self.updates = site, list(updates)
        self.included = False  # whether the last output of the site had the updates in it


class Group:
    """Linear layers that read the same input. The first that is called with it computes the outputs of all.

    The others take theirs when they are called with the very same tensor, and compute alone with any other.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.factors = [p for member in members for update in member.updates for p in (update.A, update.B)]
        self.scales = [[update.scale for update in member.updates] for member in members]
        self.ranks = [[len(update.A) for update in member.updates] for member in members]
        self.key: Any = None
        self.A: Tensor | None = None  # (sum of ranks, in), in the type of the computation
        self.B: list[Tensor] = []  # (out, rank) of each update
        self.held: tuple[Tensor, int, bool, dict[Member, Tensor]] | None = None

    def __call__(self, member: Member, x: Tensor) -> Tensor:
        """Return the output of a member for x (..., in)."""
        if torch.compiler.is_compiling():
            return nn.functional.linear(x, member.site.weight, member.site.bias)
        dtype = self.computes_in(x)
        member.included = dtype is not None
        if dtype is None:
            return nn.functional.linear(x, member.site.weight, member.site.bias)
        grad = torch.is_grad_enabled()
        held = self.held
        if held is not None and held[0] is x and held[1] == x._version and held[2] == grad:
            output = held[3].pop(member, None)
            if not held[3]:
                self.held = None
            if output is not None:
                return output
        self.refresh(dtype)
        outputs = dict(zip(self.members, Joined.apply(x, self, dtype, *self.factors)))  # type: ignore[no-untyped-call]
        output = outputs.pop(member)
        self.held = (x, x._version, grad, outputs) if outputs else None
        return output

    def computes_in(self, x: Tensor) -> torch.dtype | None:
        """Return the type of the computation; None if the hooks have to do it."""
        if type(x) not in (Tensor, FakeTensor) or x.is_nested or x.is_inference():
            return None
        kind = x.device.type
        first = self.members[0].site.weight.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        for member in self.members:
            if member.site.weight.dtype != first:
                return None
            for update in member.updates:
                if not update.active or update.mixture is not None:
                    return None
        return dtype if dtype == first else None

    def refresh(self, dtype: torch.dtype) -> None:
        """Cast the factors, unless nothing has changed them since the last call."""
        key = (
            dtype,
            *[(p._version, 0 if type(p.data) is FakeTensor else p.data_ptr()) for p in self.factors],
        )
        if key == self.key or not self.factors:
            return
        with torch.no_grad():
            first = self.factors[0]
            sizes = [rank for ranks in self.ranks for rank in ranks]
            self.A = torch.empty(sum(sizes), first.shape[1], dtype=dtype, device=first.device)
            self.B = [torch.empty_like(B, dtype=dtype) for B in self.factors[1::2]]
            torch._foreach_copy_([*self.A.split(sizes), *self.B], [*self.factors[::2], *self.factors[1::2]])
        self.key = key


class Joined(torch.autograd.Function):
    """The outputs of a group for x (..., in): a tuple of (..., out). The form without `setup_context`, for which torch
    would inspect the signature in every call."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        call = Call(group)
        outputs = call.outputs(rows)
        ctx.save_for_backward(*call.saved)
        ctx.shape, ctx.dtype, ctx.call = x.shape, x.dtype, call
        call.saved = ()
        ctx.set_materialize_grads(False)
        # not views for autograd, so that a model may change them in place, as wav2vec 2.0 does
        return tuple(
            torch.ops.aten._unsafe_view(output, (*x.shape[:-1], output.shape[-1])) for output in outputs
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:  # type: ignore[override]
        needs_x, _, _, *needs = ctx.needs_input_grad
        flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in gradients]
        # saved tensors are read once: a checkpoint recomputes them each time
        of_x, of_factors = ctx.call.gradients(flat, ctx.saved_tensors, needs, needs_x)
        if of_x is not None:
            of_x = of_x.view(ctx.shape).to(ctx.dtype)
        return of_x, None, None, *of_factors


class Call:
    """One pass through the layers of a group, for rows (n, in) in the type of the computation.

    `saved`: the tensors that the backward pass reads, for `save_for_backward`.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.ranks, self.scales = group, group.ranks, group.scales
        self.types = [factor.dtype for factor in group.factors]
        self.saved: tuple[Tensor, ...] = ()

    def outputs(self, rows: Tensor) -> list[Tensor]:
        """Return the output (n, out) of each layer."""
        group = self.group
        low = None if group.A is None else rows @ group.A.T
        outputs, Bs, start = [], iter(group.B), 0
        for member, ranks, scales in zip(group.members, self.ranks, self.scales):
            output = product(rows, member.site.weight, member.site.bias)
            for rank, scale in zip(ranks, scales):
                assert low is not None
                output.addmm_(low[:, start : start + rank], next(Bs).T, alpha=scale)
                start += rank
            outputs.append(output)
        self.saved = tuple(member.site.weight for member in group.members)
        if low is not None and group.A is not None:
            self.saved += (rows, low, group.A, *group.B)
        return outputs

    def gradients(
        self, gradients: Sequence[Tensor | None], saved: Sequence[Tensor], needs: Sequence[bool], needs_x: bool,
        onto: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
        """Return the gradients of the rows and of the factors, from those of the outputs (n, out).

        `needs`: which factors need one; `onto`: a gradient of the rows that this one is added to, in place.
        """
        count = len(gradients)
        weights, (rows, low, A, *Bs) = saved[:count], saved[count:] or (None,) * 3
        of_x = onto if needs_x else None
        of_low = None if low is None else torch.zeros_like(low)
        of_B: list[Tensor | None] = [None] * len(Bs)
        start = index = 0
        for g, weight, ranks, scales in zip(gradients, weights, self.ranks, self.scales):
            if g is None:
                start, index = start + sum(ranks), index + len(ranks)
                continue
            if needs_x:
                of_x = g @ weight if of_x is None else of_x.addmm_(g, weight)
            for rank, scale in zip(ranks, scales):
                part = slice(start, start + rank)
                assert low is not None and of_low is not None
                of_low[:, part] = narrow_product(g, Bs[index] * scale)
                if needs[2 * index + 1]:
                    of_B[index] = ((low[:, part].T @ g).T * scale).to(self.types[2 * index + 1])
                start, index = start + rank, index + 1
        of_A: Sequence[Tensor | None] = [None] * len(Bs)
        if any(needs[::2]):
            assert of_low is not None and rows is not None
            sizes = [rank for ranks in self.ranks for rank in ranks]
            of_A = [g.to(t) for g, t in zip((of_low.T @ rows).split(sizes), self.types[::2])]
        if of_x is not None and of_low is not None:
            assert A is not None
            of_x = of_x.addmm_(of_low, A)
        return of_x, [g for pair in zip(of_A, of_B) for g in pair]


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows W^T + b. On a CPU, torch writes the bias into the result first and adds the product to it, which takes
    up to half as long again in bf16; oneDNN adds it on the way."""
    if bias is not None and adds_bias_on_the_way(weight):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return nn.functional.linear(rows, weight, bias)


def adds_bias_on_the_way(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by a weight (out, in): on a CPU, in bf16, if torch was built with it."""
    return weight.is_cpu and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()


class Joining:
    """Join the layers of a model for the time between `enter` and `leave`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: dict[nn.Module, Member] = {}  # all that could be joined
        self.members: list[Member] = []
        self.groups: list[Group] = []

    def enter(self, call: Callable[[], object]) -> None:
        """Join what can be joined now. `call` runs the model once, to see which layers read the same input; it is only
        called if some of them might, and the same data must be given to it at every start of a run."""
        self.leave()
        self.sites = {site: member for site, member in _members(self.model)}
        self.groups = _of_one_input(self.sites, call)
        for group in self.groups:
            for member in group.members:
                member.site.forward = functools.partial(group, member)  # type: ignore[method-assign]
                for update in member.updates:
                    update.member = member
                self.members.append(member)

    def changed(self) -> None:
        """Cast the factors anew in the next call: call it after each step, as fused optimizers change values without
        counting a version."""
        for group in self.groups:
            group.key = None

    def leave(self) -> None:
        for member in self.members:
            del member.site.forward
            for update in member.updates:
                del update.member
        self.sites, self.members, self.groups = {}, [], []


def _members(model: nn.Module) -> Iterable[tuple[nn.Module, Member]]:
    """Yield each frozen linear layer that does nothing but multiply, and add joinable updates."""
    for _, site in base_modules(model):
        if type(site) is not nn.Linear or "forward" in vars(site):
            continue
        if any(parameter.requires_grad or parameter.is_meta for parameter in site.parameters(recurse=False)):
            continue
        children = list(site.children())
        updates = [child for child in children if isinstance(child, Update) and child.joinable]
        hooks = {len(site._forward_hooks), len(site._forward_pre_hooks), len(children)}
        if hooks == {len(updates)}:  # nothing else acts on its input or output
            yield site, Member(site, [update for update in updates if update.active])


def _of_one_input(members: dict[nn.Module, Member], call: Callable[[], object]) -> list[Group]:
    """Return the groups, in which each member has a place: of those that a call of the model gives the same tensor, and
    of single layers that gain from it."""
    siblings: dict[tuple, list[Member]] = {}
    for site, member in members.items():
        siblings.setdefault((site.weight.dtype, site.in_features), []).append(member)
    asked = [
        m for group in siblings.values() if any(m.updates for m in group) and len(group) > 1 for m in group
    ]
    inputs: dict[Member, Tensor | None] = {}

    def see(member: Member) -> Callable[..., None]:
        def hook(site: nn.Module, args: tuple) -> None:
            inputs[member] = None if member in inputs or not args else args[0]

        return hook

    handles = [member.site.register_forward_pre_hook(see(member)) for member in asked]
    try:
        if asked:
            call()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[int, list[Member]] = {}
    for member, x in inputs.items():
        if x is not None:
            found.setdefault(id(x), []).append(member)
    groups = [Group(group) for group in found.values() if len(group) > 1 and any(m.updates for m in group)]
    inside = {member for group in groups for member in group.members}
    alone = [m for m in members.values() if m not in inside]
    gains = [
        m for m in alone if m.updates or (m.site.bias is not None and adds_bias_on_the_way(m.site.weight))
    ]
    return [*groups, *[Group([member]) for member in gains]]
