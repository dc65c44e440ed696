"""Sums of methods that mean nothing, refused before a model is loaded. No torch here.

What is known of a method are the constants of its class: see `Method` in graftkit/methods/base.py. Only what holds for
every model is refused here; attaching looks at the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftkit.errors import UserError, listing
from graftkit.recipe.catalogue import Entry, entries
from graftkit.recipe.expressions import Call


def check(calls: Sequence[Call]) -> None:
    """Raise `UserError` for a sum of methods that cannot be meant."""
    methods = [(call, entries("method")[call.name]) for call in calls]
    heads = [f"{entry.name}()" for _, entry in methods if entry.constants.get("gives_outputs")]
    if len(heads) > 1:
        raise UserError(f"{' and '.join(heads)} both compute the outputs of the task; leave one of them out.")
    for _, whole in methods:
        if whole.constants.get("covers"):
            for call, part in methods:
                if part is not whole:
                    _refuse_beside(whole, call, part, any(e.constants.get("takes_out") for _, e in methods))
    for call, entry in methods:
        if entry.constants.get("needs_base") and not any(_frees(*other) for other in methods):
            raise UserError(_idle(call, entry))


def _refuse_beside(whole: Entry, call: Call, part: Entry, is_partly_frozen: bool) -> None:
    """What another method already trains from the first step: parts of the backbone, or weights with an update."""
    if part.constants.get("frees_base") is True:
        has_use = part.constants.get("yields", 0) < whole.constants.get("yields", 0)
        if not has_use or call.arguments.get("lr") is None:
            rate = (
                f", or give {part.name}() its own learning rate, lr=..., for what it selects"
                if has_use
                else ""
            )
            raise UserError(
                f"{whole.name}() already trains what {part.name}() would; leave one of them out{rate}."
            )
    if part.constants.get("updates_weights") and not is_partly_frozen:
        raise UserError(
            f"{part.name}() adds an update to weights that {whole.name}() already trains, which gains nothing; "
            "leave one of them out."
        )


def _frees(call: Call, entry: Entry) -> bool:
    """Whether a call may train parameters of the backbone itself."""
    frees: Any = entry.constants.get("frees_base", False)
    if not isinstance(frees, dict):
        return bool(frees)
    given = {name: option.default for name, option in entry.options.items()} | call.arguments
    return any(given.get(name) in values for name, values in frees.items())


def _idle(call: Call, entry: Entry) -> str:
    freeing = [e.name for e in entries("method").values() if e.constants.get("frees_base") is True]
    names = listing((f"{name}()" for name in freeing), 8)
    if entry.constants.get("takes_out"):
        return f"{call.name}() takes out of training what another method frees ({names}); beside none of them everything is frozen anyway."
    return f"{call.name}() needs a method beside it that trains the backbone itself ({names}); nothing here does."
