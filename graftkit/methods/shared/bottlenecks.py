"""Parts of adapters: their places in a block, and the bottleneck itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone, Site, select
from graftkit.backbone.anatomy import features, is_conv, is_linear, is_map
from graftkit.backbone.walk import modules_of
from graftkit.backbone.weights import add_product, input_of
from graftkit.errors import UserError
from graftkit.methods.base import Addition, multiply, new_parameter, place
from graftkit.methods.shared.advice import general
from graftkit.methods.shared.mixtures import Mixture

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": nn.functional.tanh,
}
SHORTCUTS = ("shortcut", "downsample", "skip", "identity")
# torch's own blocks call the dropout after each part, but not always the linear layer before it
TORCH_BLOCKS: dict[type[nn.Module], dict[str, str]] = {
    nn.TransformerEncoderLayer: {"self_attn": "dropout1", "linear2": "dropout2"},
    nn.TransformerDecoderLayer: {
        "self_attn": "dropout1", "multihead_attn": "dropout2", "linear2": "dropout3",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The place of one adapter: the output of `module`, whose name is `name`.

    `width`: channels of that output, in its last dimension, or in the second of four dimensions if `spatial`.
    `block`: index of its block. `inputs`: the module whose input the adapter reads; None for the output itself.
    `norms`: norms of the block, one of which may compute the block's output.
    """

    name: str
    module: nn.Module
    width: int
    block: int
    device: torch.device
    spatial: bool = False
    inputs: nn.Module | None = None
    norms: tuple[nn.Module, ...] = ()


class Part(NamedTuple):
    """The output of one part of a block: `map` is its last linear layer, `module` the module called last."""

    kind: str  # attention, ffn or other
    map: Site
    name: str
    module: nn.Module
    width: int


def find_places(backbone: Backbone, placement: str, sites: str, method: str) -> list[Place]:
    """Return the places of the adapters of a placement in the selected blocks and parts.

    Raises `UserError` if there are none, or if a block lacks what the placement needs.
    """
    parts = {index: list(_parts(backbone, index)) for index in range(len(backbone.blocks))}
    if not any(parts.values()):
        raise UserError(
            f"{method}() is placed after the attention and the feed-forward part of each block, but {backbone.source} "
            f"has no such blocks. Use {general()} instead."
        )
    maps = {part.map.name for inside in parts.values() for part in inside}
    chosen = {
        site.name
        for site in select(backbone, sites, lambda s: s.name in maps, "outputs of attention or feed-forward")
    }
    found = [
        place
        for index, inside in parts.items()
        for part in inside
        if part.map.name in chosen and (placement == "houlsby" or part.kind != "attention")
        for place in [_place(backbone, placement, index, part, method)]
    ]
    if not found:
        raise UserError(
            f"{method}(placement={placement!r}) needs a feed-forward part, but {sites!r} contains none in "
            f"{backbone.source}. Widen the selection, or use placement='houlsby' or {general()}."
        )
    return found


def _parts(backbone: Backbone, index: int) -> Iterator[Part]:
    """Yield the outputs of attention and feed-forward of a block; if it has neither, that of its last layer."""
    block = backbone.blocks[index]
    inside = [site for site in backbone.sites if site.block == index]
    mixtures = set()
    width = next((_width(site) for site in inside if site.role == "o"), None)
    empty = True
    for site in inside:
        if site.role == "o":
            yield Part("attention", site, *_called_last(backbone, block, site), _width(site))
        elif site.role in ("down", "experts"):
            mixture = _mixture(backbone, block, site)
            if mixture is None:
                yield Part("ffn", site, *_called_last(backbone, block, site), _width(site))
            elif mixture not in mixtures:
                mixtures.add(mixture)
                yield Part("ffn", site, mixture, backbone.module(mixture), width or backbone.hidden_size)
        else:
            continue
        empty = False
    maps = [site for site in inside if is_linear(site.module) or is_conv(site.module)]
    main = [site for site in maps if not any(word in site.name.lower() for word in SHORTCUTS)]
    if empty and main:
        yield Part("other", main[-1], main[-1].name, main[-1].module, _width(main[-1]))


def _width(site: Site) -> int:
    return site.module.out_channels if is_conv(site.module) else features(site.module)[1]  # type: ignore[return-value]


def _mixture(backbone: Backbone, block: str, site: Site) -> str | None:
    """Return the name of the mixture of experts that a layer belongs to, which gives the feed-forward part's output."""
    if site.role == "experts":
        outer = site.name.rpartition(".")[0]
        return outer if len(outer) > len(block) else site.name
    outer = site.name
    while len(outer := outer.rpartition(".")[0]) > len(block):
        members = [other for other in backbone.sites if other.name.startswith(f"{outer}.")]
        experts = [other for other in members if other.role == "experts"]
        several = [other for other in members if other.role == "down"]
        if experts or (isinstance(backbone.module(outer), nn.ModuleList) and len(several) > 1):
            return outer if experts else outer.rpartition(".")[0]
    return None


def _called_last(backbone: Backbone, block: str, site: Site) -> tuple[str, nn.Module]:
    """Return (name, module) of the module that computes the output of a part: its last layer, or the dropout after it."""
    parent_name, _, leaf = site.name.rpartition(".")
    if not site.called:
        parent_name, _, leaf = parent_name.rpartition(".")
    parent = backbone.module(parent_name)
    for kind, dropouts in TORCH_BLOCKS.items():
        if isinstance(parent, kind) and leaf in dropouts:
            return f"{parent_name}.{dropouts[leaf]}", parent.get_submodule(dropouts[leaf])
    name = f"{parent_name}.{leaf}"
    children = list(parent.named_children())
    later = children[[child_name for child_name, _ in children].index(leaf) + 1 :]
    alone = sum(is_map(module) for module in modules_of(parent).values()) == 1
    if parent_name == block:
        return name, backbone.module(name)
    for child_name, child in later if alone else children:
        # beside other layers, its name must show that a dropout is not for attention weights or inner activations
        if isinstance(child, nn.Dropout) and (alone or "resid" in child_name or "output" in child_name):
            return f"{parent_name}.{child_name}", child
    return name, backbone.module(name)


def _place(backbone: Backbone, placement: str, index: int, part: Part, method: str) -> Place:
    block_name = backbone.blocks[index]
    block = backbone.module(block_name)
    device = next(block.parameters()).device
    if placement == "houlsby" or (placement == "pfeiffer" and part.kind == "other"):
        spatial = isinstance(part.module, nn.Conv2d)
        return Place(part.name, part.module, part.width, index, device, spatial)
    inside = [site for site in backbone.sites if site.block == index]
    if placement == "pfeiffer":
        chunks = getattr(getattr(backbone.model, "config", None), "chunk_size_feed_forward", 0)
        if chunks:  # the concatenated chunks are not the norm's output itself
            raise UserError(
                f"{method}(placement='pfeiffer') needs the output of the norm that ends a block, but {backbone.source} "
                f"computes its feed-forward part in chunks (chunk_size_feed_forward={chunks}). Set that to 0, or use "
                "placement='houlsby'."
            )
        norms = tuple(site.module for site in inside if site.role == "norm")
        spatial = any(isinstance(site.module, nn.Conv2d) for site in inside)
        return Place(block_name, block, part.width, index, device, spatial, norms=norms)
    if part.kind == "ffn" and part.map.name != part.name and part.map.name.startswith(f"{part.name}."):
        return Place(
            part.name, part.module, part.width, index, device, inputs=part.module
        )  # a mixture of experts
    before = inside[: inside.index(part.map)]
    first = [site for site in before if site.role in ("up", "gate")]
    if part.kind != "ffn" or not first:
        raise UserError(
            f"{method}(placement='parallel') runs parallel to a feed-forward part, which {block_name!r} "
            f"({type(block).__name__}) of {backbone.source} lacks. Use placement='houlsby', or {general()}."
        )
    return Place(part.name, part.module, part.width, index, device, inputs=first[-1].module)


class Insertion(Addition):
    """Adds `change(x)` to the output h of its site, where x is h or the input of another module.

    If the site is a block that ends with a norm, h = LN(s), the output becomes LN(s + change(h)) (see `Adapter`).
    """

    def __init__(self, spatial: bool) -> None:
        super().__init__()
        self.spatial = spatial
        self.form: tuple[bool, bool] = (False, False)  # with inputs, with norms
        self.seen: Tensor | None = None
        self.normed: tuple[Any, Tensor, Tensor] | None = None  # norm, its input, its output

    @property
    def alike(self) -> Any:
        return self.form, self.spatial

    def change(self, x: Tensor) -> Tensor:
        """Return the change to add for x (..., width)."""
        raise NotImplementedError

    def changed(self, x: Tensor) -> Tensor:
        """Apply `change` over the channels of x."""
        change = self.acting.change
        if self.spatial and x.dim() == 4:
            return change(x.movedim(-3, -1)).movedim(-1, -3).to(x.dtype)
        return change(x).to(x.dtype)

    def plus(self, h: Tensor, x: Tensor) -> Tensor:
        """Return h plus the change for x."""
        return h + self.changed(x)

    def _after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return self.after(site, args, kwargs, output) if self.active else output

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        (seen, self.seen), (normed, self.normed) = (self.seen, None), (self.normed, None)
        if normed is not None and normed[2] is h:
            norm, summed, _ = normed
            summed = self.plus(summed, h)
            h = norm.forward(summed)
            for other in site.children():  # insertions of other grafts continue from here
                if isinstance(other, Insertion) and other.normed is not None:
                    other.normed = (norm, summed, h)
        else:
            h = self.plus(h, h if seen is None else seen)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def insert(self, where: Place, name: str) -> None:
        """Become a child of the module at a place, and register hooks on the other modules of the place."""
        self.to(where.device)  # the module may be a dropout, which has no device
        place(where.module, name, self)
        self.form = (where.inputs is not None, bool(where.norms))
        handles = vars(self)["handles"]
        if where.inputs is not None:
            handles.append(where.inputs.register_forward_pre_hook(self._see, with_kwargs=True))
        for norm in where.norms:
            handles.append(norm.register_forward_hook(self._see_norm))

    def _see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.active:
            self.seen = input_of(args, kwargs)

    def _see_norm(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.active:
            self.normed = (module, args[0], output)


class Bottleneck(Insertion):
    """s (W2 f(W1 x + b1) + b2): down (bottleneck, width); up (width, bottleneck), initialised with zeros."""

    def __init__(
        self, width: int, bottleneck: int, nonlinearity: str, scale: float, dropout: float, spatial: bool
    ) -> None:
        super().__init__(spatial)
        self.down = new_parameter(bottleneck, width, std=0.02)
        self.down_bias = new_parameter(bottleneck)
        self.up = new_parameter(width, bottleneck)
        self.up_bias = new_parameter(width)
        self.nonlinearity = nonlinearity
        self.scale = scale
        self.dropout = dropout

    @property
    def alike(self) -> Any:
        return super().alike, self.nonlinearity

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        return BottleneckMixture(members, weights)

    def plus(self, h: Tensor, x: Tensor) -> Tensor:
        if self.mixture is not None or self.spatial or (self.dropout and self.training):
            return super().plus(h, x)
        bias = self.up_bias if self.scale == 1 else self.up_bias * self.scale
        return add_product(h, self.low(x), self.up, self.scale, bias)

    def low(self, x: Tensor) -> Tensor:
        """Return f(W1 x + b1)."""
        return FUNCTIONS[self.nonlinearity](multiply(x, self.down, self.down_bias))

    def change(self, x: Tensor) -> Tensor:
        added = multiply(self.low(x), self.up, self.up_bias)
        if self.dropout and self.training:
            added = nn.functional.dropout(added, self.dropout)
        return added if self.scale == 1 else added * self.scale


def bottleneck_at(
    place: Place,
    placement: str,
    bottleneck: int,
    nonlinearity: str | None,
    scale: float | None,
    dropout: float = 0.0,
) -> Bottleneck:
    """Return a bottleneck for a place; f and s default to those of the placement's paper."""
    function = nonlinearity or ("gelu" if placement == "houlsby" else "relu")
    factor = scale or (4.0 if placement == "parallel" else 1.0)
    return Bottleneck(place.width, bottleneck, function, factor, dropout, place.spatial)


class BottleneckMixture(Mixture):
    """The bottlenecks of several grafts, concatenated into one."""

    def __init__(self, members: Sequence[Bottleneck], weights: Tensor) -> None:
        super().__init__(weights)
        self.function = FUNCTIONS[members[0].nonlinearity]
        self.down = torch.cat([member.down for member in members])
        self.down_bias = torch.cat([member.down_bias for member in members])
        self.up = torch.cat([member.scale * member.up for member in members], dim=1)
        widths = torch.tensor([len(member.down) for member in members], device=weights.device)
        self.gates = weights.repeat_interleave(widths, dim=1)
        self.up_bias = weights @ torch.stack([member.scale * member.up_bias for member in members])

    def change(self, x: Tensor) -> Tensor:
        low = self.function(multiply(x, self.down, self.down_bias))
        added = multiply(low * self.spread(self.gates, low), self.up)
        return added + self.spread(self.up_bias, added)
