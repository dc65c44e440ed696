"""The inputs that a run started from, so that it is not resumed with others unnoticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftkit.backbone import values
from graftkit.engine.parallel import processes
from graftkit.engine.tracking import flat
from graftkit.errors import UserError, listing
from graftkit.files import checksum
from graftkit.recipe import schema as recipes
from graftkit.recipe.expressions import parse
from graftkit.recipe.schema import Recipe
from graftkit.runs.folder import PLAN, RECIPE
from graftkit.runs.prepare import Prepared
from graftkit.runs.saved import FORCED, ROWS, read_plan
from graftkit.tasks.base import Dataset

# in the plan: the recipe's values, and a digest of each entry of the model's configuration
VALUES, CONFIG = "recipe", "config_sha256"
BEGAN = "checksum_of_train_from"  # of the values that train.from gave the graft
PROCESSES = "processes"
# where things are, which may change; rows and weights are compared by what they hold
PLACES = {"model", "weights", "out", "data.train", "data.eval", "data.test", "data.probe", "train.from"}
LOGGING = {"train.trackers", "train.checkpoint_every"}  # no effect on the result
VOLATILE = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "architectures"}


def inputs(prepared: Prepared, datasets: Mapping[str, Dataset]) -> dict[str, Any]:
    """Return the entries of plan.json that tell a resumed run whether its inputs have changed."""
    return {
        **_began(prepared),
        values.KEY: values.sampled(prepared.backbone, prepared.graft.labels),
        ROWS: digests(datasets, prepared.rows.labels),
        VALUES: _values(prepared.recipe),
        CONFIG: _config(prepared.backbone.model),
        PROCESSES: processes()[1],
    }


def check_inputs(
    folder: Path, prepared: Prepared, planned: dict[str, Any], force: bool
) -> tuple[dict[str, Any], list[str]]:
    """Compare the inputs of a resumed run with those that it started from.

    Return the plan to write, with the changes that were accepted, and notes to print. Raises `UserError` for changed
    inputs unless `force`.
    """
    before = read_plan(folder / PLAN)
    if not before:  # killed before its first step
        return planned, []
    changes = _changes(folder, prepared, before, planned)
    if changes and not force:
        raise UserError(
            f"the run in {folder} cannot be resumed as it began: {'; '.join(changes)}. Restore what it began with, start a "
            "new run, or accept the changes with --force (in Python: force=True)."
        )
    notes = [f"warning: resumed with other inputs: {change}" for change in changes]
    if VALUES not in before:
        notes.append(
            f"note: the run was started by an older version, which did not store its recipe and model configuration in {PLAN}; "
            "changes in them cannot be noticed."
        )
    forced = [
        *before.get(FORCED, []),
        *(change for change in changes if change not in before.get(FORCED, [])),
    ]
    return (planned | {FORCED: forced} if forced else planned), notes


def forced(folder: Path) -> list[str]:
    """Return the changes of its inputs that a run was resumed with."""
    return list(read_plan(folder / PLAN).get(FORCED, []))


def _changes(
    folder: Path, prepared: Prepared, before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
    """Return a message for each input that is not the one that the run started from."""
    found = []
    for name, digest in _entries(before, ROWS).items():
        if now[ROWS].get(name) != digest:
            source = getattr(prepared.recipe.data, name)
            source = source if isinstance(source, str) else prepared.recipe.data.train  # a held-out share
            found.append(
                f"{source}: the {name} rows are not those that it started with (their texts, labels, order or tokens differ)"
            )
    stored = _entries(before, VALUES)
    if stored:  # a key that came since has its default
        default = _values(recipes.make({"model": "", "data": {"train": ""}}))
        known = now[VALUES].keys() - PLACES  # a recipe leaves out what another key replaces
        stored = {name: value for name, value in default.items() if name in known} | stored
    for name in sorted({*stored, *now[VALUES]} if stored else ()):
        if stored.get(name) != now[VALUES].get(name):
            found.append(f"{folder / RECIPE}: {name} was {stored.get(name)} and is {now[VALUES].get(name)}")
    source, config = prepared.backbone.source, _entries(before, CONFIG)
    other = sorted(name for name in config.keys() & now[CONFIG].keys() if config[name] != now[CONFIG][name])
    if other:
        found.append(f"{source}: the model's configuration has changed ({listing(other, 5)})")
    weights = values.changed(prepared.backbone, before.get(values.KEY), prepared.graft.labels)
    if weights:
        found.append(f"{source}: the model has other weights (in {listing(weights, 3)})")
    if before.get(BEGAN, now.get(BEGAN)) != now.get(BEGAN):
        found.append(f"{prepared.recipe.train.start}: the graft of train.from has other values")
    if before.get(PROCESSES, now[PROCESSES]) != now[PROCESSES]:
        found.append(f"it trained in {before[PROCESSES]} processes together, and now in {now[PROCESSES]}")
    return found


def _entries(plan: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = plan.get(key)
    return value if isinstance(value, dict) else {}


def _began(prepared: Prepared) -> dict[str, str]:
    """Return a checksum of the values that the graft begins with, if train.from names them."""
    if prepared.recipe.train.start is None:
        return {}
    tensors = prepared.graft.tensors.items()
    return {BEGAN: checksum({name: tensor.detach().cpu().contiguous() for name, tensor in tensors}, {})}


def _values(recipe: Recipe) -> dict[str, Any]:
    """Return the values of a recipe that decide what is trained. Expressions are compared however they are spaced."""
    found = flat(recipe.model_dump())
    for family, name in (("method", "method"), ("task", "task"), ("optimizer", "train.optimizer")):
        if found[name] != "None":
            found[name] = " + ".join(map(str, parse(found[name], family)))
    return {
        name: value for name, value in found.items()
        if name not in LOGGING and not (name in PLACES and isinstance(value, str))
    }  # fmt: skip


def _config(model: Any) -> dict[str, str]:
    """Return a digest of each entry of a model's configuration; empty for modules that have none."""
    config: Any = getattr(model, "config", None)
    entries = config.to_dict() if hasattr(config, "to_dict") else {}
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
        for name, value in sorted(entries.items()) if name not in VOLATILE
    }  # fmt: skip


def digests(datasets: Mapping[str, Dataset], labels: tuple[str, ...]) -> dict[str, str]:
    """Return a digest of labels and rows for each data split."""
    names = "\0".join(labels)
    return {
        name: hashlib.sha256(f"{names}\n{dataset.digest()}".encode()).hexdigest()
        for name, dataset in datasets.items()
    }
