"""Which grafts are on a model, which of them are folded into it, and whether they are mixed at the moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from graftkit.grafts.graft import Graft

REGISTER, FOLDED, MIXED = "graftkit_grafts", "graftkit_folded", "graftkit_mixed"


def grafts_of(model: nn.Module) -> dict[str, Graft]:
    """The grafts that are attached to a model, by name, in the order of their attachment."""
    return vars(model).setdefault(REGISTER, {})


def folded_on(model: nn.Module) -> list[Graft]:
    """The grafts that are folded into a model, in the order in which that was done."""
    return vars(model).setdefault(FOLDED, [])
