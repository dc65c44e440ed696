"""A block of BERT's kind as one autograd function, in a training step on a CPU.

Self-attention and a feed-forward network with exact GELU, each followed by dropout, the sum with its input and LayerNorm
(Vaswani et al. 2017, figure 1; Devlin et al. 2018):

    a = LayerNorm(x + dropout(W_o attention(x))),    y = LayerNorm(a + dropout(W_down gelu(W_up a)))

with frozen weights, and low-rank updates beside any of the linear layers. The gradient is written out: only what it reads
stays in memory, sums are taken in place, and no module, hook or view is called in between. Dropout masks are those of the
modules; results differ by the rounding of sums alone, as a product with a mask and the sum after it round once.

Where the rest of the model reads nothing of the last block but its first token, as BERT's pooler does, the block computes
keys and values of all tokens, and everything else for the first one. Its other outputs are zeros.

Blocks are found by their modules, and the output and gradients are compared with those of the modules before any is used.
Where one does not fit, or a call gives more than states and a mask, the modules compute as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from transformers.activations import GELUActivation

from graftkit.backbone import packed
from graftkit.engine.attention import SHORT, weighted, weighted_gradients
from graftkit.engine.dropout import Source, current, drawing_from
from graftkit.methods.shared.joined import Call, Group, Member

LINEAR = ("attention.self.query", "attention.self.key", "attention.self.value",
          "attention.output.dense", "intermediate.dense", "output.dense")  # fmt: skip
NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
DROPOUT = ("attention.self.dropout", "attention.output.dropout", "output.dropout")
ACTIVATION = "intermediate.intermediate_act_fn"
INSIDE = ("attention", "attention.self", "attention.output", "intermediate", "output")
UNREAD = {"position_ids"}  # arguments that such a block is given and does not read
TOLERANCE = 0.15  # relative difference from the modules: rounding in bf16 of single rows; another block differs by about 1
SEED = 0  # of the masks with which both are compared


class FusedBlock:
    """The forward of one block: `Fused` in a training step, else the block's own."""

    def __init__(self, block: nn.Module, members: Sequence[Member], first: bool) -> None:
        """`members`: the linear layers in the order of `LINEAR`; `first`: only the first token of its output is read."""
        self.block, self.plain, self.first = block, block.forward, first
        functools.update_wrapper(self, block.forward, updated=())
        inputs = [members[:1], members[1:3]] if first else [members[:3]]
        self.groups = [Group(group) for group in (*inputs, *([member] for member in members[3:]))]
        self.factors = [factor for group in self.groups for factor in group.factors]
        self.norms: list[Any] = [block.get_submodule(name) for name in NORMS]
        self.dropout: list[Any] = [block.get_submodule(name) for name in DROPOUT]
        self.heads: int = block.get_submodule("attention.self").num_attention_heads  # type: ignore[assignment]

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        more = [*args, *(value for name, value in kwargs.items() if name not in UNREAD)]
        if not self._fits(hidden_states, attention_mask, more):
            return self.plain(hidden_states, attention_mask, *args, **kwargs)
        for group in self.groups:
            group.refresh(hidden_states.dtype)
        return Fused.apply(hidden_states, attention_mask, self, current(), *self.factors)  # type: ignore[no-untyped-call]

    def _fits(self, x: Tensor, mask: Tensor | None, more: Iterable[Any]) -> bool:
        if torch.compiler.is_compiling() or current() is None or packed.current() is not None:
            return False
        if not torch.is_grad_enabled() or not (x.requires_grad or any(f.requires_grad for f in self.factors)):
            return False
        if x.dim() != 3 or not x.is_cpu or any(value is not None and value is not False for value in more):
            return False
        if mask is not None and (mask.dim() != 4 or mask.requires_grad):
            return False
        if x.shape[1] > SHORT and not self.chance(
            0
        ):  # torch's fused attention is as fast there, and keeps no weights
            return False
        types = {group.computes_in(x) for group in self.groups} | {norm.weight.dtype for norm in self.norms}
        return types == {x.dtype}

    def chance(self, number: int) -> float:
        """Return the probability of dropout: of attention weights, after attention, and at the end."""
        dropout = self.dropout[number]
        return dropout.p if dropout.training else 0.0

    def factors_of(
        self, source: Source, number: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor | None:
        """Return factors of dropout; of the second dimension from behind, only the first place if no other is read."""
        p = self.chance(number)
        if not p:
            return None
        kept = source.factors(torch.Size(shape), p, dtype)
        return kept[..., :1, :].contiguous() if self.first else kept


class Fused(torch.autograd.Function):
    """`FusedBlock` for x (batch, length, width) and a mask of scores (batch, 1, length or 1, length)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, fused: FusedBlock, source: Source, *factors: Tensor
    ) -> Tensor:
        batch, length, width = x.shape
        first, heads = fused.first, fused.heads
        calls = [Call(group) for group in fused.groups]
        *inputs, o, up, down = calls
        rows = x.reshape(-1, width)
        base = x[:, 0].contiguous() if first else rows  # the tokens that have an output
        found = [*inputs[0].outputs(base), *(output for call in inputs[1:] for output in call.outputs(rows))]
        query, key, value = (
            t.view(batch, -1, heads, t.shape[-1] // heads).transpose(1, 2).contiguous() for t in found
        )
        scale = query.shape[-1] ** -0.5
        added = source.masks(mask, False, query, key)
        if first and added is not None:
            added = added[..., :1, :]
        kept = fused.factors_of(source, 0, (batch, heads, length, length), x.dtype)
        output, weights, dropped = weighted(query, key, value, added, kept, scale)
        output = o.outputs(output.transpose(1, 2).reshape(len(base), -1))[0]
        states, *inside = _normed(fused, source, 0, base, output, x.shape)
        wide = up.outputs(states)[0]
        output = down.outputs(F.gelu(wide))[0]
        states, *last = _normed(fused, source, 1, states, output, x.shape)
        ctx.sizes = [len(call.saved) for call in calls]
        held = [tensor for call in calls for tensor in call.saved]
        ctx.save_for_backward(query, key, value, weights, kept, dropped, wide, *inside, *last, *held)
        for call in calls:
            call.saved = ()
        ctx.calls, ctx.fused, ctx.shape, ctx.scale = calls, fused, x.shape, scale
        if not first:
            return states.view(x.shape)
        whole = x.new_zeros(x.shape)
        whole[:, 0] = states
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        saved = ctx.saved_tensors  # read once: a checkpoint recomputes them each time
        query, key, value, weights, kept, dropped, wide = saved[:7]
        inside, last = saved[7:11], saved[11:15]
        needs_x, _, _, _, *needs = ctx.needs_input_grad
        *inputs, o, up, down = _passes(ctx.calls, ctx.sizes, saved[15:], needs)
        one, two = ctx.fused.norms
        batch, _, width = ctx.shape
        g = gradient[:, 0].contiguous() if ctx.fused.first else gradient.reshape(-1, width)
        onto, g = _before_norm(two, g, *last)
        g = torch.ops.aten.gelu_backward(down([g], True), wide)
        onto, g = _before_norm(one, up([g], True, onto), *inside)
        g = o([g], True).view(batch, -1, query.shape[1], value.shape[3]).transpose(1, 2).contiguous()
        three = weighted_gradients(g, ctx.scale, query, key, value, weights, kept, dropped)
        of_query, of_key, of_value = (t.transpose(1, 2).reshape(-1, t.shape[1] * t.shape[3]) for t in three)
        if ctx.fused.first:
            onto = inputs[0]([of_query], needs_x, onto)
            of_x = inputs[1]([of_key, of_value], needs_x)
            if of_x is not None:
                of_x = of_x.view(ctx.shape)
                of_x[:, 0] += onto
        else:
            of_x = inputs[0]([of_query, of_key, of_value], needs_x, onto)
        of_x = of_x.view(ctx.shape) if needs_x and of_x is not None else None
        return of_x, None, None, None, *(g for one in (*inputs, o, up, down) for g in one.of_factors)


class _Back:
    """The way back through the layers of a call."""

    def __init__(self, call: Call, saved: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.call, self.saved, self.needs = call, saved, needs
        self.of_factors: Sequence[Tensor | None] = ()

    def __call__(self, gradients: Sequence[Tensor], needs_x: bool, onto: Tensor | None = None) -> Any:
        of_x, self.of_factors = self.call.gradients(gradients, self.saved, self.needs, needs_x, onto)
        return of_x


def _passes(
    calls: Sequence[Call], sizes: Sequence[int], saved: Sequence[Tensor], needs: Sequence[bool]
) -> list[_Back]:
    found = []
    for call, size in zip(calls, sizes):
        count = len(call.types)
        found.append(_Back(call, saved[:size], needs[:count]))
        saved, needs = saved[size:], needs[count:]
    return found


def _normed(
    fused: FusedBlock, source: Source, number: int, base: Tensor, output: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Return LayerNorm(base + dropout(output)), and what its gradient reads."""
    kept = fused.factors_of(source, 1 + number, tuple(shape), output.dtype)
    whole = base + output if kept is None else torch.addcmul(base, output, kept.view(output.shape))
    norm = fused.norms[number]
    normed, mean, rstd = torch.native_layer_norm(
        whole, norm.normalized_shape, norm.weight, norm.bias, norm.eps
    )
    return normed, kept, whole, mean, rstd


def _before_norm(
    norm: Any, gradient: Tensor, kept: Tensor | None, whole: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of base and output, from that of `_normed`."""
    of_base, _, _ = torch.ops.aten.native_layer_norm_backward(
        gradient, whole, norm.normalized_shape, mean, rstd, norm.weight, norm.bias, [True, False, False]
    )
    return of_base, of_base if kept is None else of_base * kept.view(of_base.shape)


def fuse(
    blocks: Sequence[nn.Module], members: Mapping[nn.Module, Member], call: Callable[[], Any],
    computing: Callable[[], Any],
) -> list[FusedBlock]:  # fmt: skip
    """Give each block that can be one operation a `FusedBlock` as its forward, and return these.

    `call` runs the model on a row, with gradients, and returns its outputs, or None if it cannot; `computing`: autocast of
    the run.
    """
    found = {block: layers for block in blocks if (layers := _layers(block, members)) is not None}
    if not found:
        return []
    with ExitStack() as stack:
        seen = {block: stack.enter_context(Seen(block)) for block in found}
        outputs = call()
    made = []
    for block, layers in found.items():
        one = seen[block]
        if not isinstance(outputs, Tensor) or one.count != 1 or not isinstance(one.output, Tensor):
            continue
        first = block is blocks[-1] and reads_first(outputs, one.output)
        fused = FusedBlock(block, layers, first)
        if isinstance(one.output, FakeTensor) or _agrees(fused, one, computing):
            made.append(fused)
    for fused in made:
        fused.block.forward = fused  # type: ignore[assignment]
    return made


def _layers(block: nn.Module, members: Mapping[nn.Module, Member]) -> list[Member] | None:
    """Return the linear layers of a block of this kind, with nothing that acts between them; else None."""
    try:
        linear, norms, dropout, inside = (
            [block.get_submodule(name) for name in names] for names in (LINEAR, NORMS, DROPOUT, INSIDE)
        )
        act: Any = block.get_submodule(ACTIVATION)
    except AttributeError:
        return None
    gelu = isinstance(act, GELUActivation) and act.act is F.gelu
    alike = all(type(norm) is nn.LayerNorm for norm in norms) and all(type(d) is nn.Dropout for d in dropout)
    own = [*norms, *dropout, *inside, act]
    if (
        not (gelu and alike)
        or "forward" in vars(block)
        or any(m._forward_hooks or m._forward_pre_hooks for m in own)
    ):
        return None
    if any(p.requires_grad for norm in norms for p in norm.parameters()) or _added(block):
        return None
    if any(layer not in members for layer in linear) or not hasattr(inside[1], "num_attention_heads"):
        return None
    return [members[layer] for layer in linear]


def _added(block: nn.Module) -> bool:
    """Return whether a block has modules or parameters beside those that `Fused` reads, as keys and values of a prefix."""
    known = {"", *LINEAR, *NORMS, *DROPOUT, *INSIDE, ACTIVATION}
    names = [name for name, _ in block.named_modules()]
    outside = [
        name for name in names if name not in known and not name.startswith(tuple(f"{of}." for of in LINEAR))
    ]
    return bool(outside) or any(
        list(block.get_submodule(name).parameters(recurse=False)) for name in ("", *INSIDE)
    )


class Seen:
    """What a block is called with in a `with` block, and its output."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.count = block, 0
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}
        self.output: Any = None

    def __enter__(self) -> Seen:
        plain = self.block.forward

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.args, self.kwargs, self.output = args, kwargs, plain(*args, **kwargs)
            return self.output

        self.block.forward = forward  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        del self.block.forward


def reads_first(outputs: Tensor, states: Tensor) -> bool:
    """Return whether `outputs` are computed from the first token of `states` (batch, length, width) alone."""
    given, readers, waiting, known = states.grad_fn, [], [outputs.grad_fn], set()
    if given is None or outputs.grad_fn is given:
        return False
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        after = [following for following, _ in node.next_functions]
        if given in after:
            readers.append(
                (node.name(), getattr(node, "_saved_dim", None), getattr(node, "_saved_index", None))
            )
        waiting += [following for following in after if following is not given]
    return set(readers) == {("SelectBackward0", 1, 0)}


def _agrees(fused: FusedBlock, seen: Seen, computing: Callable[[], Any]) -> bool:
    """Compare a fused block with the modules of its block, on what these were called with, in outputs and gradients."""
    results = []
    for function in (fused.plain, fused):
        states = seen.args[0].detach().requires_grad_()
        factors = [factor for factor in fused.factors if factor.requires_grad]
        with drawing_from(Source(SEED)):
            with computing():
                output = function(states, *seen.args[1:], **seen.kwargs)
            if fused.first:
                output = output[:, :1]
            generator = torch.Generator().manual_seed(SEED)
            pull = torch.randn(output.shape, generator=generator).to(output.dtype)
            results.append([output.detach(), *torch.autograd.grad(output, [states, *factors], pull)])
    for wanted, got in zip(*results):
        if not (wanted.float() - got.float()).norm() <= TOLERANCE * wanted.float().norm():
            return False
    return True
