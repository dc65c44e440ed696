"""Base parameters that several grafts train, for a batch whose rows use different grafts.

The base keeps its values. Hooks that run before all others add the effect of a graft's values at a layer, and give norms
the gains and biases of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import is_norm
from graftkit.backbone.weights import Weight, input_of, weights_at
from graftkit.errors import UserError, listing
from graftkit.grafts.graft import Graft, PutAway
from graftkit.methods.shared.mixtures import MatrixMixture, Mixture

Values = Mapping[
    str, Mapping[int, Tensor]
]  # the parameters of one module: name -> column of the graft -> value


@dataclass(frozen=True)
class _Own:
    """The values that one graft has in place of the base's, and the column of its weights."""

    column: int
    graft: Graft
    held: PutAway


def takes_all_rows(name: str) -> bool:
    """Return whether, by its name, a module's input has no rows: tokens of any row, or distances between positions."""
    return any(word in name.lower() for word in ("expert", "relative"))


def mix_rows(model: nn.Module, grafts: list[Graft], weights: Tensor, undo: ExitStack) -> dict[str, _Rows]:
    """Give each row of a batch the base parameters of its graft. weights (rows, grafts); the grafts are disabled.

    Returns the mixtures that compute these modules, by module name.
    Raises `UserError`, naming graft and parameter, if a module cannot have different values for different rows.
    """
    owned = [_Own(column, graft, graft.put_away) for column, graft in enumerate(grafts)]
    owned = [own for own in owned if own.held.tensors or own.held.modules]
    computed: dict[str, _Rows] = {}
    if not owned:
        return computed
    values: dict[str, dict[int, Tensor]] = {}
    for name in dict.fromkeys(name for own in owned for name in own.held.modules):
        values |= _replace(model, name, owned, weights, undo)
    for own in owned:
        for name, tensor in own.held.tensors.items():
            if tensor.dtype.is_floating_point:  # BatchNorm counts its batches
                values.setdefault(name, {})[own.column] = tensor
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    tied = {name: other for other in names.values() if len(other) > 1 for name in other}
    modules: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, columns in values.items():
        owner, _, parameter = name.rpartition(".")
        modules.setdefault(owner, {})[parameter] = columns
        if name in tied:
            raise _refusal(name, columns, grafts, f"{listing(tied[name])} are one tied weight")
    backbone = Backbone(model)
    sites = {site.name: site for site in backbone.sites}
    for name, own_values in modules.items():
        module = model.get_submodule(name)
        site = sites.get(name)
        found = weights_at(backbone, site) if site is not None and not takes_all_rows(name) else []
        mixture = _mixture(module, found[0] if len(found) == 1 else None, own_values, weights)
        if mixture is None:
            parameter, columns = next(iter(own_values.items()))
            raise _refusal(
                f"{name}.{parameter}".lstrip("."),
                columns,
                grafts,
                f"{type(module).__name__} uses it for all rows",
            )
        mixture.where = name or type(model).__name__
        before = module.register_forward_pre_hook(mixture.before, with_kwargs=True, prepend=True)
        after = module.register_forward_hook(mixture.after, with_kwargs=True, prepend=True, always_call=True)
        undo.callback(before.remove)
        undo.callback(after.remove)
        computed[name] = mixture
    return computed


def _refusal(name: str, columns: Mapping[int, Tensor], grafts: list[Graft], reason: str) -> UserError:
    graft = grafts[next(iter(columns))]
    return UserError(
        f"the graft {graft.name!r} ({graft.method}) trains {name!r} of the base, which cannot differ between the rows "
        f"of a batch: {reason}. Instead, run its rows separately, with using(model, {graft.name!r})."
    )


def _replace(
    model: nn.Module, name: str, owned: list[_Own], weights: Tensor, undo: ExitStack
) -> dict[str, dict[int, Tensor]]:
    """Replace a module of the base by that of one graft; return the parameters of all grafts' modules by name."""
    have = {own.column: own.held.modules[name] for own in owned if name in own.held.modules}
    shapes = {tuple((key, p.shape) for key, p in module.named_parameters()) for module in have.values()}
    lacking = (weights[:, list(have)].sum(dim=1) == 0).nonzero().flatten().tolist()
    if len(shapes) > 1 or lacking:
        why = f"of row {listing(map(str, lacking))}" if lacking else "of all of them"
        raise UserError(
            f"{name!r} has another number of outputs in the graft {owned[0].graft.name!r} than in that {why}, so they cannot "
            "be rows of one batch. Run the rows of each graft separately."
        )
    undo.callback(model.set_submodule, name, model.get_submodule(name))
    model.set_submodule(name, next(iter(have.values())))
    keys = [key for key, _ in next(iter(have.values())).named_parameters()]
    return {f"{name}.{key}": {c: module.get_parameter(key) for c, module in have.items()} for key in keys}


def _mixture(module: nn.Module, weight: Weight | None, values: Values, weights: Tensor) -> _Rows | None:
    """Return the mixture that computes a module with the parameters of each row; None if there is none."""
    if weight is not None and not weight.replaced and set(values) <= {"weight", "bias"}:
        return MapRows(module, weight, values, weights)
    if is_norm(module):
        plain = set(values) <= {"weight", "bias"}
        if (plain and type(module) in NORMALISED) or isinstance(module, BATCH_NORMS):
            return NormRows(module, values, weights)
        if plain and [p.dim() for p in module.parameters(recurse=False)] == [1]:
            return GainRows(module, values, weights)
    return None


def _changes(module: Any, name: str, values: Values, weights: Tensor) -> list[Tensor]:
    """Return each graft's value of a parameter minus the module's; zeros for a graft that does not train it."""
    standing = getattr(module, name).detach().float()
    own = values[name]
    return [
        own[c].to(standing.device).float() - standing if c in own else torch.zeros_like(standing)
        for c in range(weights.shape[1])
    ]


class _Rows(Mixture):
    """Vectors of each row, (rows, width), that a graft trains: biases, gains, statistics."""

    called = False  # stays False if a parent reads the parameters without calling the module

    def __init__(self, module: Any, values: Values, weights: Tensor) -> None:
        weights = weights.to(next(module.parameters()).device)
        super().__init__(weights)
        self.rows = {
            name: getattr(module, name).detach().float()
            + weights @ torch.stack(_changes(module, name, values, weights))
            for name in values
            if getattr(module, name).dim() == 1
        }

    def spread_of(self, module: Any, name: str, x: Tensor, dim: int = -1) -> Tensor:
        """Return a parameter, of each row or of the module, in a shape that broadcasts to x."""
        if name in self.rows:
            return self.spread(self.rows[name], x, dim)
        shape = [1] * x.dim()
        shape[dim] = -1
        return getattr(module, name).to(x.dtype).view(shape)


class MapRows(_Rows):
    """Weight and bias of each row at a linear layer, a convolution or an embedding."""

    def __init__(self, module: Any, weight: Weight, values: Values, weights: Tensor) -> None:
        super().__init__(module, values, weights)
        self.channels = -1 if weight.kind != "conv" else 1 - module.weight.dim()
        self.matrices: MatrixMixture | None = None
        if "weight" in values:
            changes = [weight.stored(change) for change in _changes(module, "weight", values, weights)]
            self.matrices = MatrixMixture(weight, changes, self.weights)

    def after(self, site: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        self.called = True
        if self.matrices is not None:
            self.matrices.where = self.where
            output = self.matrices.after(site, args, kwargs, output)
        if "bias" in self.rows:
            plain = output - site.bias.to(output.dtype).view(-1, *[1] * (-1 - self.channels))
            output = plain + self.spread(self.rows["bias"], output, self.channels)
        return output


def _layer_norm(norm: Any, x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, norm.normalized_shape, None, None, norm.eps)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, norm.normalized_shape, None, norm.eps)


def _group_norm(norm: Any, x: Tensor) -> Tensor:
    return nn.functional.group_norm(x, norm.num_groups, None, None, norm.eps)


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMALISED: dict[type, Any] = {nn.LayerNorm: _layer_norm, nn.RMSNorm: _rms_norm, nn.GroupNorm: _group_norm}


class NormRows(_Rows):
    """Gain and bias of each row at one of torch's norms: normalise without them, then apply those of the row."""

    def after(self, site: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        self.called = True
        x = input_of(args, kwargs)
        dim = -1 if isinstance(site, nn.LayerNorm | nn.RMSNorm) else 1 - x.dim()
        if isinstance(site, BATCH_NORMS):
            variance = self.spread_of(site, "running_var", x, dim)
            y = (x - self.spread_of(site, "running_mean", x, dim)) * (variance + site.eps).rsqrt()
        else:
            y = NORMALISED[type(site)](site, x)
        y = y * self.spread_of(site, "weight", y, dim)
        if getattr(site, "bias", None) is not None:
            y = y + self.spread_of(site, "bias", y, dim)
        return y.to(output.dtype)


class GainRows(_Rows):
    """The gain of each row at a model's own norm, which multiplies by it: it replaces the parameter during the call."""

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs)
        for name, rows in self.rows.items():
            vars(site)[name] = self.spread(rows, x).to(site._parameters[name].dtype)  # type: ignore[union-attr]

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        self.called = True
        for name in self.rows:
            vars(site).pop(name, None)
        return output
