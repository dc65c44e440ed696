"""Pre-training in Python: the recipe of an objective, run as any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftkit.recipe import schema as recipes
from graftkit.recipe.schema import Recipe
from graftkit.report.console import Console
from graftkit.runs.tune import Run, run_recipe


def pretrain(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    objective: str | None = None,
    train: Any = None,
    eval: Any = ...,
    test: Any = None,
    size: str | None = None,
    model: str | None = None,
    tokenizer: str | Path | None = None,
    vocabulary: int | None = None,
    budget: str | None = None,
    probe: str | Path | None = None,
    method: Any = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> Run:
    """Pre-train a model on texts without labels and return the run: `graftkit pretrain` in Python.

    `recipe` is a recipe, nested values or a YAML file; the other arguments override it. `train`: a file or folder of texts,
    or a list of these. `size`: a new model of this size; or `model`: an existing one to go on with. `tokenizer`: the folder
    of a new model's tokenizer; by default one of `vocabulary` tokens is trained on the texts. `budget`: a time such as
    '20 min', which decides size, batch and steps. `probe`: a file of labelled rows. The plain model is in `RUN/model`.
    Raises `UserError` for a mistake in any of them.
    """
    given = {"train": train, "eval": eval, "test": test}
    named = {
        "task": objective, "size": size, "model": model, "tokenizer": tokenizer, "budget": budget, "data.probe": probe,
        "method": method, "out": out,
    }  # fmt: skip
    values, tables = recipes.gather(recipe, given, named, settings)
    if vocabulary is not None:
        values["vocabulary"] = vocabulary
    return run_recipe(
        recipes.for_pretraining(values), Console(quiet=quiet), tables=tables, overwrite=overwrite
    )
