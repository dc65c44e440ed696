"""Every tuner of the installed PEFT as a method. graftkit/methods/shared/peft_bridge.py runs its layers beside modules."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone, Site, select
from graftkit.backbone.anatomy import is_conv, is_linear, is_norm, is_transposed
from graftkit.backbone.memory import is_out_of_memory
from graftkit.backbone.walk import modules_of, parameters_of
from graftkit.errors import NotFoldable, UserError, first_line, listing, nearest
from graftkit.libraries import cast_adapter, peft_part
from graftkit.methods.base import Method, PeftForm, exactly, place
from graftkit.methods.shared.advice import general, recommended, selecting
from graftkit.methods.shared.peft_bridge import INSIDE, Bridge, Shared, Whole, hang, stand_in, written
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.methods.shared.peft_tuners import (
    GROUPED,
    IDLE,
    OURS,
    RATE,
    RATES,
    defaults_of,
    instead_of,
    kind_of,
    mappings,
)
from graftkit.methods.shared.updates import peft_targets
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Peft(Method):
    """Use any tuner of the installed PEFT: L(x) at each chosen module, where L is PEFT's layer around the module.

    PEFT's documentation of the tuner says what L computes. For 'hira', which fits most modules and starts at the base
    model, it is (W + W * (B A)) x with the elementwise product * (Huang et al. 2025, 'HiRA: Parameter-Efficient
    Hadamard High-Rank Adaptation for Large Language Models', section 3). Other tuners are 'oft', 'boft', 'hra',
    'fourierft', 'vblora', 'miss', 'randlora', 'c3a', 'shira', 'road' and 'waveft'; tuners that do not wrap modules, such
    as prompts, are refused. `options` are the fields of the tuner's PEFT configuration, for example
    `peft('oft', {'oft_block_size': 32}, sites='q,v')`. Tuners that start from the base's values ('adamss', 'frod',
    'osf') need the base to be loaded first.
    When: you need a tuner that has no method here; tuners that have one run faster and on more kinds of modules.
    Parameters: those that PEFT's layers train; for 'hira', r * (in + out) for each weight, with r = 32 by default.
    """

    peft_types = ("*",)  # all types that no other method reads

    tuner: str = option("hira", "PEFT's name for the tuner, such as 'oft', 'hra', 'fourierft' or 'vblora'")
    options: dict | None = option(
        None, "fields of the tuner's configuration in PEFT, such as {'r': 8}; null means PEFT's defaults"
    )
    sites: str | None = option(
        None,
        "modules to adapt, as a selection; null means all-linear, for 'ln_tuning' the norms and for "
        "'trainable_tokens' the embeddings of the vocabulary",
    )
    lr: float | None = option(
        None,
        "learning rate; null means 0.003 for 'hira', 0.01 for tuners that train coefficients, such as 'fourierft', else 0.001",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = defaults_of(self.kind)
        fields = set(defaults) - IDLE
        for name, value in (self.options or {}).items():
            if name not in fields:
                raise UserError(
                    f"peft({self.tuner!r}) has no option {name!r} (options: {listing(sorted(fields - set(OURS)), 40)})."
                    f"{nearest(str(name), fields)}"
                )
            if name in OURS and value != defaults[name]:
                raise UserError(f"peft({self.tuner!r}) does not accept {name}={value!r}; {instead_of(name)}.")

    @property
    def kind(self) -> str:
        """PEFT's type of adapter, such as 'VBLORA' for 'vb-lora'."""
        return kind_of(self.tuner)

    def targets(self, backbone: Backbone) -> list[Site]:
        """Return the modules that PEFT adapts."""

        def usable(site: Site) -> bool:
            module = site.module
            if not site.called:
                return False
            if is_conv(module):  # PEFT's OFT sums overlapping patches there, which is not a rotation
                return self.kind != "OFT"
            return is_linear(module) or is_norm(module) or isinstance(module, nn.Embedding)

        def wanted() -> str:
            return f"modules that PEFT has layers of {self.tuner!r} for; use {general()} there"

        sites = select(backbone, self._selection(backbone), usable, wanted)
        for site in sites:
            for parameter in site.module.parameters(recurse=False):
                if not parameter.dtype.is_floating_point:
                    raise UserError(
                        f"peft({self.tuner!r}) cannot adapt {site.name!r} ({type(site.module).__name__}), which is "
                        f"stored as {parameter.dtype}; use {general()} there."
                    )
        return sites

    def _selection(self, backbone: Backbone) -> str:
        if self.sites is not None:
            return self.sites
        if self.kind == "TRAINABLE_TOKENS":
            find = getattr(backbone.model, "get_input_embeddings", None)
            table = find() if find is not None else None
            names = [site.name for site in backbone.sites if site.module is table]
            return exactly(names) if names else "embeddings"
        return "norms" if self.kind == "LN_TUNING" else "all-linear"

    def bridges(self, backbone: Backbone, graft: str) -> list[tuple[Site, Bridge]]:
        """Return the layers that `attach` placed, each with its site."""
        return [(site, getattr(site.module, f"{self.name}_{graft}")) for site in self.targets(backbone)]

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        sites = self.targets(backbone)
        self._refuse_misfits(backbone, sites)
        tuner = self._build(backbone, sites)
        layers = [self._layer(tuner, site) for site in sites]
        held: set[int] = set()
        for site, layer in zip(sites, layers):
            place(site.module, f"{self.name}_{graft}", Bridge(layer, tuner, held))
        shared = Shared(tuner, held)
        if list(shared.children()):
            place(backbone.model, f"{self.name}_{graft}", shared)
        rate = self.lr or RATES.get(self.kind, RATE)
        group = Group("added", rate, self.name, self.lr is not None)
        trained = {id(p) for layer in layers for p in layer.parameters() if p.requires_grad}
        labels = {name: group for name, p in parameters_of(backbone.model).items() if id(p) in trained}
        parameters = [backbone.model.get_parameter(name) for name in labels]
        if not any(parameter.numel() for parameter in parameters):
            instead = f"use {general()}"
            if self.kind == "TRAINABLE_TOKENS":
                instead = "name tokens by their ids, {'token_indices': [7, 11]}, or use " + selecting(
                    "embeddings"
                )
            raise UserError(
                f"peft({self.tuner!r}) with these options trains nothing in {sites[0].name!r}; {instead}."
            )
        for parameter in parameters:
            parameter.data = parameter.data.float()
        return labels

    def _refuse_misfits(self, backbone: Backbone, sites: list[Site]) -> None:
        if any(not site.name for site in sites):
            raise UserError(
                f"peft({self.tuner!r}) cannot adapt {backbone.source}, which is itself a single layer; use {general()}."
            )
        if self.kind == "ADAMSS" and any(p.is_meta for site in sites for p in site.module.parameters()):
            raise UserError(
                f"peft({self.tuner!r}) creates parameters whose shapes depend on the values in {sites[0].name!r}, so the "
                f"plan already needs the weights of {backbone.source}; use {general()} to plan without them."
            )
        owners = [
            (id(p), n.rpartition(".")[0]) for n, p in backbone.model.named_parameters(remove_duplicate=False)
        ]
        for site in sites if self.kind == "TRAINABLE_TOKENS" else ():
            weight = id(site.module.weight)
            tied = [owner for key, owner in owners if key == weight and owner != site.name]
            if tied:
                raise UserError(
                    f"peft({self.tuner!r}) would also change {tied[0]!r} in PEFT, because it shares its weight with "
                    f"{site.name!r}; use {selecting('embeddings')}."
                )

    def _build(self, backbone: Backbone, sites: list[Site]) -> Any:
        """Return PEFT's model: its layers for the sites, around stand-ins for the modules there."""
        names = [site.name for site in sites]
        fields = defaults_of(self.kind)
        mine: dict[str, Any] = {
            "target_modules": sorted({name.rpartition(".")[2] for name in names})
            if self.kind in GROUPED
            else names,
            "feedforward_modules": [site.name for site in sites if site.role == "down"],
            "fan_in_fan_out": any(is_transposed(site.module) for site in sites),
            "progressbar": False,
        }
        given = copy.deepcopy(self.options or {})
        options = {name: value for name, value in mine.items() if name in fields} | given
        holder = nn.Module()
        for site in sites:
            hang(holder, site.name, stand_in(site.module, own=True))
        configs, tuners = mappings()
        try:
            with warnings.catch_warnings():  # about a missing CUDA extension, which PEFT does not need
                warnings.filterwarnings("ignore", module=r"peft\.tuners\.boft")
                tuner = tuners[self.kind](holder, {INSIDE: configs[self.kind](**options)}, INSIDE)
        except UserError as error:
            raise UserError(f"peft({self.tuner!r}): {error}") from None
        except Exception as error:  # PEFT checks little: what wrong options run into can be anything
            if is_out_of_memory(error):
                raise
            what = first_line(error).rstrip(".!")
            if not isinstance(error, ValueError | TypeError | NotImplementedError):
                what = f"{type(error).__name__} {what}"
            raise UserError(
                f"peft({self.tuner!r}) does not fit {backbone.source}: {what}. Change its options or sites, or use "
                f"{general()}."
            ) from None
        cast_adapter(tuner, INSIDE)
        return tuner

    def _layer(self, tuner: Any, site: Site) -> Any:
        """PEFT's layer of one site, without its `base_layer`."""
        made = tuner.model.get_submodule(site.name)
        if not isinstance(made, peft_part("layer")):
            raise UserError(
                f"peft({self.tuner!r}) has no layer for {site.name!r} ({type(site.module).__name__}); use {general()} there."
            )
        layer: Any = made
        base: Any = layer._modules.pop("base_layer")
        for name, parameter in site.module.named_parameters(recurse=False):
            if not parameter.is_meta and base._parameters[name].data_ptr() != parameter.data_ptr():
                raise UserError(
                    f"peft({self.tuner!r}) with these options writes another {name} into {site.name!r} "
                    f"({type(site.module).__name__}) before training; leave out the option that says so, or "
                    f"use {recommended('starts_from_values')}."
                )
        if "shira_indices" in vars(layer):  # drawn at random and not a buffer, so nothing would keep them
            layer.shira_indices = peft_part("buffers")(vars(layer).pop("shira_indices"), persistent=True)
        return layer

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        copies: dict[int, Any] = {}  # deepcopy's memo, so that layers go on sharing tensors
        for site, bridge in self.bridges(backbone, graft):
            layer = copy.deepcopy(bridge.layer, copies).eval()
            layer.base_layer = stand_in(site.module, own=True, clone=True)
            try:
                with torch.no_grad():
                    layer.merge(safe_merge=True)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise NotFoldable(
                    f"peft({self.tuner!r}) cannot be folded into {site.name!r}: PEFT says {first_line(error)!r}"
                ) from None
            base = layer.base_layer  # merging may replace it
            for name, parameter in base.named_parameters(recurse=False):
                present = site.module._parameters.get(name)
                if present is None:
                    raise NotFoldable(
                        f"peft({self.tuner!r}) cannot be folded: {site.name!r} would need a {name}."
                    )
                if not torch.equal(present, parameter):
                    values[f"{site.name}.{name}"] = parameter.data
        return values

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm:
        bridges = self.bridges(backbone, graft)
        tuner = bridges[0][1].tuner
        config = {
            name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
            for name, value in tuner.peft_config[INSIDE].to_dict().items()
        }
        config["target_modules"] = peft_targets(backbone, [site.name for site, _ in bridges])
        return PeftForm(config, written(tuner))

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read any PEFT adapter. Tensors keep PEFT's keys: only its layers know which parameters they are (`unpack`)."""
        try:
            kind = kind_of(reading.kind)
        except UserError as error:
            raise reading.error(f"peft_type is {reading.kind!r}: {error}") from None
        defaults = defaults_of(kind)
        targets = reading.field("target_modules")
        options = {n: v for n, v in reading.rest().items() if n not in defaults or v != defaults[n]}
        options = {n: v for n, v in options.items() if n not in IDLE}
        types = {key.value: prefix for key, prefix in peft_part("prefixes of keys").items()}
        start = re.escape(types[kind].removesuffix("lambda_"))
        taken = reading.take(rf"(?:(.+?)\.)?_?{start}.*")
        modules = list(dict.fromkeys(match[1] for match in taken if match[1]))
        if kind in GROUPED and targets != sorted({name.rpartition(".")[2] for name in modules}):
            options["target_modules"] = targets
        sites = exactly(modules) if modules else _named_by(reading, targets)
        arguments: dict[str, Any] = {"tuner": kind.lower(), "options": options or None, "sites": sites}
        try:
            cls(**arguments)
        except UserError as error:
            raise reading.error(str(error)) from None
        tensors = {
            f"base_model.{'model.' if match[1] else ''}{match[0]}": tensor for match, tensor in taken.items()
        }
        return arguments, tensors

    def unpack(self, backbone: Backbone, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from peft import set_peft_model_state_dict

        given = {key: tensor for key, tensor in tensors.items() if key.startswith("base_model.")}
        if not given:
            return tensors
        first = self.targets(backbone)[0].module
        name, newest = [item for item in first.named_children() if isinstance(item[1], Bridge)][-1]
        tuner = newest.tuner
        wanted = written(tuner)
        missing, unexpected = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
        if missing or unexpected:
            raise UserError(
                f"the adapter does not fit {backbone.source} as peft({self.tuner!r}): missing "
                f"{listing(missing, 5) or 'nothing'}; unexpected {listing(unexpected, 5) or 'nothing'}."
            )
        for key, tensor in given.items():
            if (
                tensor.shape != wanted[key].shape
                or tensor.is_floating_point() != wanted[key].is_floating_point()
            ):
                raise UserError(
                    f"the adapter does not fit {backbone.source} as peft({self.tuner!r}): {key!r} has shape "
                    f"{tuple(tensor.shape)} and is stored as {tensor.dtype}, but should have "
                    f"{tuple(wanted[key].shape)} and {wanted[key].dtype}."
                )
        set_peft_model_state_dict(Whole(tuner), dict(given), INSIDE)
        for key, tensor in written(tuner).items():
            if not torch.allclose(tensor.float(), given[key].float(), rtol=1e-4, atol=1e-6, equal_nan=True):
                raise UserError(
                    f"PEFT's layers on {backbone.source} cannot hold the adapter's values of {key!r}."
                )
        unpacked = {key: tensor for key, tensor in tensors.items() if key not in given}
        for path, module in modules_of(backbone.model).items():
            if isinstance(module, Bridge | Shared) and path.rpartition(".")[2] == name:
                unpacked |= {key: t.clone() for key, t in module.state_dict(prefix=f"{path}.").items()}
        return unpacked


def _named_by(reading: PeftReading, targets: Any) -> str:
    """Return the modules that a configuration names, for adapters whose tensor keys name none."""
    for name in ("exclude_modules", "layers_to_transform"):
        if reading.field(name):
            raise reading.error(f"uses {name}, which graftkit does not read for {reading.kind}.")
    if isinstance(targets, str):
        return f"re:{targets}"
    if not isinstance(targets, list) or not targets:
        raise reading.error(f"target_modules is {targets!r}; it must name modules.")
    return rf"re:(.*\.)?({'|'.join(re.escape(str(name)) for name in targets)})"
