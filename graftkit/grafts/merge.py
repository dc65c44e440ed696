"""Merge several LoRA folders, ours or PEFT's, into one graft without loading their backbone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftkit.claims import LOCK, claimed, is_leftover, remove_leftovers
from graftkit.errors import UserError, listing
from graftkit.files import read_json
from graftkit.grafts import folder as graft_files
from graftkit.grafts.merge_rules import Combination, Factors
from graftkit.grafts.peft_folder import read_peft
from graftkit.grafts.stored import (
    CONFIDENCE,
    DESCRIPTION,
    OWN_TENSORS,
    PEFT_CONFIG,
    PEFT_TENSORS,
    STORED_NAME,
    Contents,
)
from graftkit.methods.base import Method, PeftForm, exactly
from graftkit.methods.base import read as read_method
from graftkit.methods.shared.advice import recommended
from graftkit.recipe.expressions import Call
from graftkit.recipe.patterns import Pattern

HEADS = ("mean", "first", "none")
OF_A_GRAFT = {DESCRIPTION, OWN_TENSORS, PEFT_CONFIG, PEFT_TENSORS, CONFIDENCE, "README.md"}
OUT_PROJ = "out_proj_"


@dataclass(frozen=True)
class Member:
    """One of the grafts to merge.

    `factors`: the update of each weight, by the name of its addition. `keys`: PEFT's key of each tensor, by our name;
    empty if PEFT cannot express the graft. `method`: the method of the updates. `head`: the parameters of its head,
    `form`: the method of the head.
    """

    folder: Path
    factors: dict[str, Factors]
    keys: dict[str, str]
    config: dict[str, Any]
    method: Any
    head: dict[str, Tensor]
    form: Method | None
    about: dict[str, Any]


def merge(
    grafts: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    how: str = "cat",
    density: float | None = None,
    rank: int | None = None,
    heads: str = "mean",
    sign: str = "total",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Merge several LoRA grafts into one and return its folder. No backbone is loaded.

    `grafts`: folders written by `Graft.save`, of runs, or by PEFT, all LoRA. `weights`: one for each, of any sign; by
    default 1 / number. `how`: 'cat' (the weighted sum itself; ranks add up), 'svd' (its best approximation of rank
    `rank`, by default the largest rank), 'linear', 'ties', 'dare-linear', 'dare-ties', 'magnitude' on the factors, or
    with '-svd' on their products; see `graftkit.grafts.merge_rules`. `density`: share of entries that ties, dare and
    magnitude keep. `seed`: of dare. `heads`: 'mean', weighted, for heads with the same classes; 'first', that of the
    first graft with one; or 'none'. Raises `UserError` if the grafts do not fit together, and then writes nothing.
    """
    combination = Combination(how, density, rank, sign, seed)
    if heads not in HEADS:
        raise UserError(f"heads is {heads!r}; choose one of {listing(HEADS)}.")
    folders = [_folder(Path(graft)) for graft in grafts]
    factors = _weights(folders, weights)
    target = Path(out)
    _check_target(target, folders, overwrite)
    try:
        with claimed(target):
            _check_target(target, folders, overwrite)  # another merge may have written there in between
            remove_leftovers(target)
            return _merge(folders, factors, target, combination, heads)
    except OSError as error:
        raise UserError(f"{target} cannot be written to: {error.strerror or error}.") from None


def _merge(
    folders: list[Path], factors: list[float], target: Path, combination: Combination, heads: str
) -> Path:
    members = [_read(folder) for folder in folders]
    _refuse_strangers(members)
    updates = _merged(members, factors, combination)
    head, form, about = _head(members, factors, heads)
    given = {"grafts": [str(folder) for folder in folders], "weights": factors, "how": combination.how}
    seed = combination.seed if "dare" in combination.how else None
    more = {"density": combination.density, "rank": combination.rank, "seed": seed}
    about["merged"] = given | {key: value for key, value in more.items() if value is not None}
    return _write(target, members, updates, head, form, about)


def _folder(path: Path) -> Path:
    """Return the graft's folder; `path` may be that of its run."""
    names = (DESCRIPTION, PEFT_CONFIG)
    if not any((path / name).is_file() for name in names) and (path / "graft" / DESCRIPTION).is_file():
        return path / "graft"
    return path


def _weights(folders: list[Path], weights: Sequence[float] | None) -> list[float]:
    if len(folders) < 2:
        raise UserError(f"merging needs at least two grafts, but got {len(folders)}; name another folder.")
    if weights is None:
        return [1 / len(folders)] * len(folders)
    if len(weights) != len(folders):
        raise UserError(f"there are {len(weights)} weights for {len(folders)} grafts; give one for each.")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"a weight is {weight!r}, but must be a finite number.")
    return [float(weight) for weight in weights]


def _check_target(target: Path, folders: list[Path], overwrite: bool) -> None:
    if target.is_file():
        raise UserError(f"{target} is a file; name a folder for the merged graft.")
    if any(target.resolve() == folder.resolve() for folder in folders):
        raise UserError(f"{target} is one of the grafts to be merged; name another folder.")
    if not target.is_dir():
        return
    names = {path.name for path in target.iterdir() if not is_leftover(path)} - {LOCK}
    others = names - OF_A_GRAFT
    if others:
        raise UserError(
            f"{target} contains files that do not belong to a graft ({listing(sorted(others))}); name another folder."
        )
    if names and not overwrite:
        raise UserError(f"{target} already exists; name another folder, or replace it with --overwrite.")


def _read(folder: Path) -> Member:
    """Read a graft. Raises `UserError` for one that is not a LoRA, with or without a head.

    Its PEFT form decides: that of another method may be a LoRA.
    """
    stored = graft_files.read(folder)
    chain = read_method(stored.method).methods
    own = [method for method in chain if not method.gives_outputs]
    config, peft = {}, stored
    if len(own) == 1 and (folder / PEFT_CONFIG).exists():
        config, peft = read_json(folder / PEFT_CONFIG), read_peft(folder)
    found = [method for method in read_method(peft.method).methods if not method.gives_outputs]
    if len(own) != 1 or not found[0].is_product:
        mergeable = recommended("is_product")
        raise UserError(
            f"{folder} is a graft of {' + '.join(f'{m.name}()' for m in chain)}; only grafts of {mergeable}, or of methods "
            "that PEFT stores as one, can be merged, with or without a head. To use it together with others, load them "
            "all and see graftkit.using."
        )
    method: Any = found[0]
    if method.bias != "none":
        raise UserError(
            f"{folder} also trains biases of the backbone ({method}), which cannot be merged without loading it; merge "
            "grafts that were trained with bias='none'."
        )
    factors = {}
    for name in peft.tensors:
        if name.endswith("_default.A"):
            addition = name.removesuffix(".A")
            factors[addition] = _factors(folder, method, addition, peft.tensors)
    tensors = stored.tensors.items()
    if stored.fingerprint is None:
        head = {name: tensor for name, tensor in tensors if name in stored.saved}
    else:
        added = re.compile(rf"(^|\.){own[0].name}_(.+_)?{STORED_NAME}\.")
        head = {name: tensor for name, tensor in tensors if not added.search(name)}
    form = next((m for m in chain if m.gives_outputs), None)
    return Member(folder, factors, peft.keys, config, method, head, form, stored.about)


def _factors(folder: Path, method: Any, addition: str, tensors: dict[str, Tensor]) -> Factors:
    A, B, b = (tensors.get(f"{addition}.{name}") for name in ("A", "B", "b"))
    site = _site(addition)
    rank = int(_at(folder, method.rank_pattern, site, method.rank))
    alpha = _at(folder, method.alpha_pattern, site, method.alpha_at(rank))
    if A is None or B is None or len(A) % rank:
        raise UserError(
            f"{folder}: the update of {site!r} does not have the rank {rank} given in its description."
        )
    scale = alpha / math.sqrt(rank) if method.use_rslora else alpha / rank
    return Factors(A, B, scale, rank, b)


def _at(folder: Path, values: dict[str, float] | None, site: str, default: float) -> float:
    """Return the value of rank_pattern or alpha_pattern for a site; without a model, only names can be matched."""
    found = default
    for selection, value in (values or {}).items():
        if not selection.startswith("re:"):
            raise UserError(
                f"{folder} has rank_pattern or alpha_pattern for {selection!r}, which cannot be resolved without its "
                "backbone, and PEFT cannot express it; it cannot be merged."
            )
        if Pattern(selection[3:], f"{folder}: {selection!r}").fullmatch(site):
            found = value
    return found


def _site(addition: str) -> str:
    """Return the site of an addition: the module it is below, or the output projection of an attention."""
    module, _, child = addition.rpartition(".")
    return f"{module}.out_proj" if f"_{OUT_PROJ}" in child else module


def _refuse_strangers(members: list[Member]) -> None:
    """Raise `UserError` for grafts of different backbones."""
    prints = {m.about["fingerprint"]: m for m in members if m.about}
    if len(prints) > 1:
        first, second, *_ = prints.values()
        raise UserError(
            f"{first.folder} was trained on another backbone ({first.about['backbone']}, fingerprint "
            f"{first.about['fingerprint']}) than {second.folder} ({second.about['backbone']}, "
            f"{second.about['fingerprint']}); only grafts of one backbone can be merged."
        )
    shapes: dict[str, tuple[Member, tuple]] = {}
    for member in members:
        for name, update in member.factors.items():
            shape = (update.A.shape[1:], update.B.shape[:1], update.count, update.is_grouped)
            other, known = shapes.setdefault(name, (member, shape))
            if known != shape:
                raise UserError(
                    f"the updates of {_site(name)!r} in {other.folder} and {member.folder} are for weights of different "
                    "shapes; only grafts of one backbone can be merged."
                )
    convolutions = [m for m in members if any(u.A.dim() > 2 for u in m.factors.values())]
    if len({member.method.peft_conv for member in convolutions}) > 1:
        raise UserError(
            "some of the grafts pad convolutions with zeros (peft_conv) and some do not; merge them separately."
        )


def _merged(members: list[Member], weights: list[float], combination: Combination) -> dict[str, Factors]:
    """Return the merged update of each weight, over the grafts that update it."""
    rank = combination.rank or max(u.rank for member in members for u in member.factors.values())
    merged = {}
    for name in dict.fromkeys(name for member in members for name in member.factors):
        having = [(m.factors[name], w) for m, w in zip(members, weights) if name in m.factors]
        update = combination.of(_site(name), [u for u, _ in having], [w for _, w in having], rank)
        if not all(torch.isfinite(tensor).all() for tensor in (update.A, update.B)):
            raise UserError(f"merging gives non-finite values for {_site(name)!r}; nothing was written.")
        merged[name] = update
    return merged


def _head(
    members: list[Member], weights: list[float], heads: str
) -> tuple[dict[str, Tensor], Method | None, dict[str, Any]]:
    """Return the merged head, its method, and the entries of the description about its classes."""
    having = [(member, weight) for member, weight in zip(members, weights) if member.head]
    if heads == "none" or not having:
        return {}, None, {}
    first = having[0][0]
    described = {
        "format",
        "method",
        "backbone",
        "fingerprint",
        "missing",
        "trained_parameters",
        "tensors",
        "merged",
    }
    about = {key: value for key, value in first.about.items() if key not in described}
    form = next((member.form for member, _ in having if member.form is not None), None)
    if heads == "first":
        return first.head, first.form, about
    for member, _ in having[1:]:
        shapes = [{name: tensor.shape for name, tensor in m.head.items()} for m in (first, member)]
        labels = [m.about.get("labels") for m in (first, member)]
        same_form = first.form is None or member.form is None or first.form.gives_the_same(member.form)
        if shapes[0] != shapes[1] or not same_form or (all(labels) and labels[0] != labels[1]):
            raise UserError(
                f"the heads in {first.folder} and {member.folder} are for different classes or of different forms, so they "
                "cannot be averaged; keep one with --heads first, or leave them out with --heads none."
            )
    total = sum(weight for _, weight in having)
    if total == 0:
        raise UserError(
            "the weights of the grafts with a head add up to 0, so heads cannot be averaged; use --heads first or none."
        )
    mean = {name: sum(w / total * m.head[name].float() for m, w in having) for name in first.head}
    return mean, form, about  # type: ignore[return-value]


def _write(
    target: Path, members: list[Member], updates: dict[str, Factors], head: dict[str, Tensor], form: Method | None,
    about: dict[str, Any],
) -> Path:  # fmt: skip
    rank = max(update.rank for update in updates.values())
    ranks = {name: update.rank for name, update in updates.items() if update.rank != rank}
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        parts = {"A": update.A, "B": update.B, "b": update.b}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    # an alpha equal to the rank is a scale of 1
    arguments: dict[str, Any] = {"rank": rank, "alpha": float(rank), "sites": exactly(map(_site, updates))}
    if ranks:
        by_rank = {r: exactly(_site(name) for name in ranks if ranks[name] == r) for r in set(ranks.values())}
        arguments["rank_pattern"] = {selection: r for r, selection in by_rank.items()}
        arguments["alpha_pattern"] = {selection: float(r) for r, selection in by_rank.items()}
    arguments |= {"lora_bias": True} if any(update.b is not None for update in updates.values()) else {}
    arguments |= {"peft_conv": True} if any(member.method.peft_conv for member in members) else {}
    if len({update.b is None for update in updates.values()}) > 1:
        for name, update in updates.items():
            tensors.setdefault(f"{name}.b", torch.zeros(len(update.B)))
    method = str(Call(members[0].method.name, arguments)) + (f" + {form}" if form is not None else "")
    peft = _peft_form(members, arguments, ranks, tensors, head)
    ours = next((member.about for member in members if member.about), None)
    description = None
    if ours is not None and (form is not None or not head):
        count = sum(tensor.numel() for tensor in (*tensors.values(), *head.values()))
        description = {
            "method": method,
            "backbone": ours["backbone"],
            "fingerprint": ours["fingerprint"],
            "missing": sorted({name for member in members for name in member.about.get("missing", ())}),
            "trained_parameters": count,
            **about,
        }
    if description is None and peft is None:
        raise UserError(
            "the merged graft can be written neither in PEFT's format nor in graftkit's; save the grafts with graftkit."
        )
    return graft_files.write(target, Contents(tensors | head, peft, description))


def _peft_form(
    members: list[Member], arguments: dict[str, Any], ranks: dict[str, int], tensors: dict[str, Tensor],
    head: dict[str, Tensor],
) -> PeftForm | None:  # fmt: skip
    """Return the merged graft in PEFT's form; None if PEFT cannot express one of them, or it updates experts."""
    keys = {name: key for member in members for name, key in member.keys.items()}
    if not all(member.keys for member in members) or any(m.config.get("target_parameters") for m in members):
        return None
    for name in tensors:
        if name.endswith(".b"):
            keys[name] = keys[f"{name[:-1]}B"].removesuffix("weight") + "bias"
    paths = {
        name: re.split(r"\.lora_(?:A|embedding_A)", keys[f"{name}.A"])[0] for name in _additions(tensors)
    }
    modules = {
        name: path.partition("base_model.model.")[2].partition(".base_layer")[0]
        for name, path in paths.items()
    }
    pattern = {f"^{re.escape(modules[name])}": rank for name, rank in ranks.items()}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": arguments["rank"],
        "lora_alpha": arguments["rank"],
        "lora_dropout": 0.0,
        # a regular expression: names in a list would also match modules whose names end with them
        "target_modules": "|".join(re.escape(module) for module in dict.fromkeys(modules.values())),
        "fan_in_fan_out": any(member.config.get("fan_in_fan_out") for member in members),
        "bias": "none",
        "base_model_name_or_path": members[0].config.get("base_model_name_or_path"),
        "task_type": members[0].config.get("task_type"),
        "inference_mode": True,
    }
    config |= {"rank_pattern": pattern, "alpha_pattern": pattern} if pattern else {}
    config |= {"lora_bias": True} if arguments.get("lora_bias") else {}
    kept = {keys[name]: tensor for name, tensor in tensors.items()}
    added = [f"{member.form.name}_{STORED_NAME}." for member in members if member.form is not None]
    inside = {
        f"base_model.model.{name}": tensor
        for name, tensor in head.items()
        if not any(part in name for part in added)
    }
    if inside:
        having = next(member for member in members if member.head)
        config |= {key: having.config.get(key) for key in ("modules_to_save", "task_type")}
    return PeftForm(config, kept | inside)


def _additions(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
