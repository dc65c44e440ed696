"""GraftKit adapts a pre-trained model to a task.

Everything is imported when it is first used, so that `import graftkit` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_FRONT = {
    "tune": "graftkit.runs.tune",
    "pretrain": "graftkit.runs.pretrain",
    "resume": "graftkit.runs.tune",
    "check": "graftkit.runs.check",
    "label_errors": "graftkit.runs.check",
    "fit": "graftkit.runs.fit",
    "label_next": "graftkit.runs.label",
    "label_suggest": "graftkit.runs.label",
    "explain": "graftkit.runs.explain",
    "compare": "graftkit.studies.compare",
    "curve": "graftkit.studies.curve",
    "train_tokenizer": "graftkit.runs.tokenizer",
    "Run": "graftkit.runs.tune",
    "attach": "graftkit.grafts.attach",
    "detach": "graftkit.grafts.attach",
    "load": "graftkit.grafts.load",
    "using": "graftkit.grafts.mixing",
    "make_report": "graftkit.report.making",
    "merge": "graftkit.grafts.merge",
    "fill": "graftkit.tasks.shared.filling",
    "Graft": "graftkit.grafts.graft",
    "Backbone": "graftkit.backbone",
    "Recipe": "graftkit.recipe.schema",
    "UserError": "graftkit.errors",
    "NotFoldable": "graftkit.errors",
}

if TYPE_CHECKING:
    from graftkit.backbone import Backbone as Backbone
    from graftkit.errors import NotFoldable as NotFoldable
    from graftkit.errors import UserError as UserError
    from graftkit.grafts.attach import attach as attach
    from graftkit.grafts.attach import detach as detach
    from graftkit.grafts.graft import Graft as Graft
    from graftkit.grafts.load import load as load
    from graftkit.grafts.merge import merge as merge
    from graftkit.grafts.mixing import using as using
    from graftkit.recipe.schema import Recipe as Recipe
    from graftkit.report.making import make_report as make_report
    from graftkit.runs.check import check as check
    from graftkit.runs.check import label_errors as label_errors
    from graftkit.runs.explain import explain as explain
    from graftkit.runs.fit import fit as fit
    from graftkit.runs.label import label_next as label_next
    from graftkit.runs.label import label_suggest as label_suggest
    from graftkit.runs.pretrain import pretrain as pretrain
    from graftkit.runs.tokenizer import train_tokenizer as train_tokenizer
    from graftkit.runs.tune import Run as Run
    from graftkit.runs.tune import resume as resume
    from graftkit.runs.tune import tune as tune
    from graftkit.studies.compare import compare as compare
    from graftkit.studies.curve import curve as curve
    from graftkit.tasks.shared.filling import fill as fill


def _named() -> dict[str, Any]:
    """Methods and optimizers by the names of their classes; a user's own class does not hide one of the package."""
    from graftkit.recipe.catalogue import entries

    known = [entry for family in ("method", "optimizer") for entry in entries(family).values()]
    known.sort(key=lambda entry: entry.module.startswith("graftkit."))
    return {entry.class_name: entry for entry in known}


def __getattr__(name: str) -> Any:
    if name in _FRONT:
        return getattr(importlib.import_module(_FRONT[name]), name)
    entry = _named().get(name) if name[:1].isupper() else None  # modules are asked for here too
    if entry is None:
        raise AttributeError(f"module 'graftkit' has no attribute {name!r}")
    return entry.load()


def __dir__() -> list[str]:
    return sorted([*globals(), *_FRONT, *_named()])
