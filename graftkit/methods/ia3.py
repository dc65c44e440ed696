"""(IA)^3: learned vectors that rescale inner activations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone, Site, select
from graftkit.backbone.anatomy import features, is_conv, is_linear, is_transposed
from graftkit.backbone.weights import scale_columns
from graftkit.errors import NotFoldable, UserError
from graftkit.methods.base import Addition, Method, PeftForm, exactly, labels_of, place
from graftkit.methods.shared.advice import general
from graftkit.methods.shared.mixtures import Mixture
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option
from graftkit.recipe.patterns import Pattern

PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention


@dataclass(frozen=True)
class IA3(Method):
    """Rescale keys, values and the inner activations of feed-forward layers by learned vectors.

    Liu et al. 2022, 'Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning',
    section 3.3: softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V), and W2 (l_ff * f(W1 x)). Layers in `sites`
    are scaled at their output, bias included, those in `feedforward` at their input; a joint projection of queries,
    keys and values is scaled as a whole. All vectors are ones at first, so training starts exactly at the base model.
    When: there are few rows, or the graft must not exceed a few vectors per block.
    Parameters: out for each layer in `sites`, in for each layer in `feedforward`.
    """

    peft_types = ("IA3",)
    stage: ClassVar[int] = 2

    sites: str | None = option(
        None,
        "layers scaled at their output, or 'none'; null means k,v, or the convolutions if there is no attention",
    )
    feedforward: str | None = option(
        None, "layers scaled at their input, or 'none'; null means down, if there is one"
    )
    lr: float | None = option(None, "learning rate; null means 0.01", above=0)

    def targets(self, backbone: Backbone) -> list[tuple[Site, bool]]:
        """Return the scaled layers in model order, each with whether it is scaled at its input."""
        roles = {site.role for site in backbone.sites}
        sites, feedforward = self.sites, self.feedforward
        if sites is None and roles & {"qkv", "k"}:
            sites = "k,v"
        elif sites is None and any(s.role == "conv" and s.block is not None for s in backbone.sites):
            sites = "blocks.convs"
        if feedforward is None and "down" in roles:
            feedforward = "down"
        inner = _chosen(backbone, feedforward, _has_input, "layers with one input")
        outer = _chosen(
            backbone,
            sites,
            _has_output,
            f"linear layers or convolutions that are called; use {general()} there",
        )
        if not inner and not outer:
            raise UserError(
                f"ia3() found no keys, values, feed-forward layers or convolutions in the blocks of {backbone.source}; "
                f"name the layers to scale with sites=..., for example ia3(sites='all-linear'), or use {general()}."
            )
        at_input = {site.name for site in inner}
        chosen = at_input | {site.name for site in outer}
        return [(site, site.name in at_input) for site in backbone.sites if site.name in chosen]

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        labels: Labels = {}
        # weight decay would pull the vectors, and so the model, to zero
        group = Group("added", self.lr or 1e-2, self.name, self.lr is not None, weight_decay=0.0)
        for site, at_input in self.targets(backbone):
            name = f"ia3_{graft}"
            place(site.module, name, _scaling(site.module, at_input))
            labels |= labels_of(backbone, f"{site.name}.{name}", group)
        return labels

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        values = {}
        for site, _ in self.targets(backbone):
            added: Scaling = getattr(site.module, f"ia3_{graft}")
            with torch.no_grad():
                for name, value in added.folded(site.module).items():
                    values[f"{site.name}.{name}"] = value.to(_plain(site, name).dtype)
        return values

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        targets = self.targets(backbone)
        if any(isinstance(site.module, nn.Conv1d | nn.MultiheadAttention) for site, _ in targets):
            return None
        inner = [re.escape(site.name) for site, at_input in targets if at_input]
        config = {
            "peft_type": "IA3",
            "target_modules": [site.name for site, _ in targets],
            # the names in a list match the ends of module names: '1.down' would also match '11.down'
            "feedforward_modules": "|".join(inner) if inner else [],
            "fan_in_fan_out": any(is_transposed(site.module) for site, _ in targets),
        }
        tensors = {
            f"base_model.model.{site.name}.ia3_l": getattr(site.module, f"ia3_{graft}").scale
            for site, _ in targets
        }
        return PeftForm(config, tensors)

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        reading.ignore("fan_in_fan_out", "init_ia3_weights")
        ends = reading.field("feedforward_modules", [], (str, list))
        pattern = Pattern(ends, reading.where("feedforward_modules")) if isinstance(ends, str) else None
        found = {key[1]: tensor for key, tensor in reading.take(r"(.+)\.ia3_l").items()}
        if pattern is not None:
            inner = {name for name in found if pattern.fullmatch(name)}
        else:
            inner = {name for name in found if name.endswith(tuple(reading.names("feedforward_modules")))}
        options = {
            "sites": exactly(name for name in found if name not in inner) if set(found) - inner else "none",
            "feedforward": exactly(name for name in found if name in inner) if inner else "none",
        }
        return options, {f"{name}.ia3_default.scale": tensor for name, tensor in found.items()}


class Scaling(Addition):
    """A vector, ones at first, in PEFT's shape: (out, 1) or (1, in) at a linear layer, (1, channels, 1, 1) at a conv."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def scaled(self, x: Tensor, module: nn.Module) -> Tensor:
        """Scale x (..., width), or (rows, channels, ...) at a convolution."""
        if not is_conv(module):
            return scale_columns(x, self.scale.flatten())
        # a convolution also takes a single unbatched example, (channels, ...)
        return (x * (self.scale if x.dim() == self.scale.dim() else self.scale[0])).to(x.dtype)

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        changes = torch.stack([member.scale.flatten() - 1 for member in members])
        return ScalingMixture(1 + weights @ changes, 1 - members[0].scale.dim(), weights)

    def folded(self, module: nn.Module) -> dict[str, Tensor]:
        """Return new values of the module's own parameters, in fp32."""
        raise NotImplementedError


class OutputScaling(Scaling):
    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return self.scaled(output, site)

    def folded(self, module: Any) -> dict[str, Tensor]:
        scale = self.scale.float().flatten()
        rows = scale if is_transposed(module) else scale.reshape(-1, *[1] * (module.weight.dim() - 1))
        values = {"weight": module.weight.float() * rows}
        if module.bias is not None:
            values["bias"] = module.bias.float() * scale
        return values


class InputScaling(Scaling):
    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if args:
            return (self.scaled(args[0], site), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, kwargs | {name: self.scaled(kwargs[name], site)}

    def folded(self, module: Any) -> dict[str, Tensor]:
        scale = self.scale.float().flatten()
        if is_transposed(module):
            scale = scale[:, None]
        elif is_conv(module):  # each group of outputs sees its own group of inputs
            groups = scale.reshape(module.groups, -1).repeat_interleave(
                module.out_channels // module.groups, 0
            )
            scale = groups.reshape(*groups.shape, *[1] * (module.weight.dim() - 2))
        return {"weight": module.weight.float() * scale}


class ScalingMixture(Mixture):
    """Scale by 1 + sum of w (l - 1) over the vectors l of several grafts, (rows or 1, width), in dimension `channels`."""

    def __init__(self, scales: Tensor, channels: int, weights: Tensor) -> None:
        super().__init__(weights)
        self.scales = scales
        self.channels = channels

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return (args[0] * self.spread(self.scales, args[0], self.channels), *args[1:]), kwargs

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return output * self.spread(self.scales, output, self.channels)


class PackedScaling(Scaling):
    """Scale `nn.MultiheadAttention`, which projects without calling a module: scaled weights replace its own in a call."""

    replaces = True

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        if len(weights) > 1:
            raise NotImplementedError(f"{type(site).__name__} multiplies all rows by one weight")
        together = PackedScaling(*members[0].scale.shape)
        changes = torch.stack([member.scale - 1 for member in members])
        together.scale = nn.Parameter(1 + torch.tensordot(weights[0], changes, dims=1), requires_grad=False)
        return together

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for name, value in self.folded(site).items():
            vars(site)[name] = value.to(getattr(site, name).dtype)

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        for name in (*PACKED, "in_proj_bias"):
            vars(site).pop(name, None)
        return output

    def folded(self, module: Any) -> dict[str, Tensor]:
        weights = {name: getattr(module, name) for name in PACKED if getattr(module, name) is not None}
        parts = self.scale.float().chunk(len(weights))
        values = {
            name: weight.float() * part for (name, weight), part in zip(weights.items(), parts, strict=True)
        }
        if module.in_proj_bias is not None:
            values["in_proj_bias"] = module.in_proj_bias.float() * self.scale.float().flatten()
        return values


def _plain(site: Site, name: str) -> Tensor:
    """Return a parameter that can be overwritten. Raises `NotFoldable` if it is quantized or computed from others."""
    parameter = site.module._parameters.get(name)
    if parameter is None or not parameter.dtype.is_floating_point:
        kept = "computed from other parameters" if parameter is None else f"stored as {parameter.dtype}"
        raise NotFoldable(
            f"ia3() cannot be folded into {site.name!r}, whose {name} is {kept}. Keep the graft folder and load it "
            "with graftkit.load."
        )
    return parameter


def _chosen(
    backbone: Backbone, selection: str | None, accepts: Callable[[Site], bool], wanted: str
) -> list[Site]:
    return [] if selection in (None, "none") else select(backbone, str(selection), accepts, wanted)


def _has_input(site: Site) -> bool:
    return site.called and (is_linear(site.module) or is_conv(site.module))


def _has_output(site: Site) -> bool:
    return _has_input(site) or isinstance(site.module, nn.MultiheadAttention)


def _scaling(module: Any, at_input: bool) -> Scaling:
    if isinstance(module, nn.MultiheadAttention):
        return PackedScaling(3 * module.embed_dim, 1)
    kind = InputScaling if at_input else OutputScaling
    if is_conv(module):
        channels = module.in_channels if at_input else module.out_channels
        return kind(1, channels, *[1] * (module.weight.dim() - 2))
    inputs, outputs = features(module)
    return kind(1, inputs) if at_input else kind(outputs, 1)
