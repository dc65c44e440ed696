"""AdapterFusion: several trained adapters, composed by attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.walk import modules_of
from graftkit.errors import UserError, listing
from graftkit.files import read_json, read_tensors
from graftkit.methods.base import Method, multiply, new_parameter
from graftkit.methods.shared.advice import general, recommended
from graftkit.methods.shared.bottlenecks import Bottleneck, Insertion, Place, bottleneck_at, find_places
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option
from graftkit.recipe.expressions import build, parse

DESCRIPTION, TENSORS = "graft.json", "graft.safetensors"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class AdapterFusion(Method):
    """Attend over several trained adapters at each of their places: h + sum_n s_n V z_n, s = softmax((Q x) . (K z_n)).

    Pfeiffer et al. 2021, 'AdapterFusion: Non-Destructive Task Composition for Transfer Learning', section 3.2: z_n is
    the output of adapter n for their common input x. The adapters are frozen and saved in the graft, so the folders
    they came from are not needed again. Q and K (width, width) are initialised with standard deviation 0.02, V with the
    identity; the loss keeps it close to that with + regularization * ||V - 1||^2. The graft starts as the mean of the
    adapters. They must have the same places, and must have been trained without norms or methods other than a head.
    When: trained adapters of several other tasks are available, and a task with few rows may benefit from all of them.
    Parameters: 3 * width^2 for each place.
    """

    stage: ClassVar[int] = 3

    grafts: tuple | None = option(None, "folders of the adapters' grafts or runs, at least two")
    adapters: tuple | None = option(
        None, "the adapters' expressions, filled in by a saved graft; without grafts their values are random"
    )
    regularization: float = option(0.01, "weight of ||V - 1||^2 in the loss", at_least=0)
    lr: float | None = option(None, "learning rate; null means 0.0001", above=0)

    def resolve(self, backbone: Backbone) -> AdapterFusion:
        """Replace the adapters' folders by their expressions; their values are carried along to `attach`."""
        if self.grafts is None:
            return self
        members = [_read(Path(str(folder)), backbone) for folder in self.grafts]
        forms = tuple(str(form) for form, _ in members)
        resolved = dataclasses.replace(self, grafts=None, adapters=forms)
        vars(resolved)["values"] = [tensors for _, tensors in members]
        return resolved

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        forms = [_form(text) for text in self.adapters or ()]
        if len(forms) < 2:
            raise UserError(
                f"adapter_fusion() needs at least two adapters, but got {len(forms)}; name the folders of their grafts, "
                "grafts=['runs/a/graft', 'runs/b/graft'], or use adapter() for a single one."
            )
        everywhere = [find_places(backbone, form.placement, form.sites, self.name) for form in forms]
        for text, form, there in zip(self.adapters or (), forms, everywhere):
            if there != everywhere[0] or form.placement != forms[0].placement:
                raise UserError(
                    f"adapter_fusion(): {(self.adapters or ())[0]} and {text} are at different places of "
                    f"{backbone.source}; train adapters for it with the same placement and sites."
                )
        group = Group("added", self.lr or 1e-4, self.name, self.lr is not None)
        values: list[Tensors] = vars(self).get("values", [])
        labels: Labels = {}
        for place in everywhere[0]:
            members = [_member(form, place) for form in forms]
            for form, member, tensors in zip(forms, members, values):
                _fill(member, form, place, tensors)
            Fusion(place, members).insert(place, f"{self.name}_{graft}")
            name = f"{place.name}.{self.name}_{graft}"
            labels |= {f"{name}.{leaf}": group for leaf in ("query", "key", "value")}
        return labels

    def extra_loss(self, backbone: Backbone, graft: str) -> Tensor | None:
        if not self.regularization:
            return None
        fusions = [
            m for m in modules_of(backbone.model).values() if isinstance(m, Fusion) and m.graft == graft
        ]
        distances = [
            (f.value - torch.eye(len(f.value), device=f.value.device)).square().sum() for f in fusions
        ]
        return self.regularization * torch.stack(distances).sum()

    def never_folds(self) -> str:
        return (
            "adapter_fusion() cannot be folded: bottlenecks with a nonlinearity have no equivalent in the plain "
            f"architecture. Keep the graft folder and load it with graftkit.load, or use {general()} if folding matters."
        )


class Fusion(Insertion):
    """sum_n s_n V z_n for x (..., width), z_n from frozen members; query, key and value (width, width) are trained."""

    def __init__(self, place: Place, members: list[Bottleneck]) -> None:
        super().__init__(place.spatial)
        self.query = new_parameter(place.width, place.width, std=0.02)
        self.key = new_parameter(place.width, place.width, std=0.02)
        self.value = nn.Parameter(torch.eye(place.width))
        self.members = nn.ModuleList(members)

    def change(self, x: Tensor) -> Tensor:
        members: Any = self.members
        added = torch.stack([member.change(x) for member in members], dim=-2)  # (..., n, width)
        # (Q x) . (K z) = (K' Q x) . z, and V is linear: each matrix is applied once for any number of members
        asked = multiply(multiply(x, self.query), self.key.T)
        share = (added * asked.unsqueeze(-2)).sum(-1, keepdim=True).float().softmax(-2)
        return multiply((added * share).sum(-2), self.value)


def _form(text: Any) -> Any:
    """Return the adapter method that an expression such as `adapter(...)` describes."""
    methods = build(parse(str(text), "method"), "method")
    if len(methods) != 1 or not methods[0].composes:
        raise UserError(
            f"adapter_fusion() composes adapters, but {text!r} is not {recommended('composes')} alone."
        )
    return methods[0]


def _member(form: Any, place: Place) -> Bottleneck:
    made = bottleneck_at(place, form.placement, form.bottleneck, form.nonlinearity, form.scale)
    nn.init.normal_(made.up, std=0.02)
    return made


def _fill(member: Bottleneck, form: Any, place: Place, tensors: Tensors) -> None:
    """Copy the trained values into a member."""
    with torch.no_grad():
        for leaf, parameter in member.named_parameters():
            name = f"{place.name}.{form.name}_default.{leaf}"
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise UserError(
                    f"adapter_fusion(): the graft of {form} has no {name!r} of shape {tuple(parameter.shape)}; restore it "
                    "from a backup."
                )
            parameter.copy_(tensors[name])


def _read(folder: Path, backbone: Backbone) -> tuple[Any, Tensors]:
    """Return the adapter in a graft or run folder, and its tensors. Raises `UserError` for other methods."""
    if not (folder / DESCRIPTION).is_file() and (folder / "graft" / DESCRIPTION).is_file():
        folder = folder / "graft"
    if not (folder / DESCRIPTION).is_file():
        raise UserError(
            f"adapter_fusion(): {str(folder)!r} is not a graft folder (it has no {DESCRIPTION}); name the folder of a "
            "run that was trained with adapter(), or its subfolder `graft`."
        )
    try:
        description = read_json(folder / DESCRIPTION)
    except UserError as error:
        raise UserError(f"adapter_fusion(): {error}") from None
    try:
        methods = build(parse(description["method"], "method"), "method")
        fingerprint, where = str(description["fingerprint"]), dict(description["tensors"])
        keys = {name: str(entry["key"]) for name, entry in where.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"adapter_fusion(): {folder / DESCRIPTION} is not the description of a graft; restore it from a backup."
        ) from None
    methods = [method for method in methods if not method.gives_outputs]
    if len(methods) != 1 or not methods[0].composes or methods[0].trains_norms:
        trained = [method.name for method in sorted(methods, key=lambda method: not method.composes)]
        trained += ["norms" for method in methods if method.composes and method.trains_norms]
        alone = recommended("composes").replace("()", "(norms=False)")
        raise UserError(
            f"adapter_fusion(): the graft in {folder} trained {listing(trained) or 'a head'}. Only adapters that were "
            f"trained alone or with a head, for example by {alone}, can be composed."
        )
    if fingerprint != backbone.fingerprint:
        raise UserError(
            f"adapter_fusion(): the graft in {folder} was trained on another backbone ({description.get('backbone')}, "
            f"fingerprint {fingerprint}); {backbone.source} has {backbone.fingerprint}. Use grafts of the same backbone."
        )
    contents, _ = read_tensors(folder / TENSORS)
    added = f".{methods[0].name}_default."
    return methods[0], {n: contents[key] for n, key in keys.items() if added in n and key in contents}
