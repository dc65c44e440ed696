"""Which grafts are attached to a model, which are folded into it, and whether they are currently mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from graftkit.grafts.graft import Graft

REGISTER, FOLDED, MIXED = "graftkit_grafts", "graftkit_folded", "graftkit_mixed"


def grafts_of(model: nn.Module) -> dict[str, Graft]:
    """Return the grafts attached to a model, by name, in the order in which they were attached."""
    return vars(model).setdefault(REGISTER, {})


def folded_on(model: nn.Module) -> list[Graft]:
    """Return the grafts folded into a model, in the order in which they were folded."""
    return vars(model).setdefault(FOLDED, [])
