"""Options: the hyperparameters of methods, tasks and optimizers, declared once as dataclass fields. No torch here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from graftkit.errors import UserError, listing, nearest, shown

BOUNDS = ("at_least", "at_most", "above", "below", "choices")
LARGEST = 3.4e38  # of numbers in fp32
LARGEST_INTEGER = 2**63  # as in torch


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    formerly: str | None = None,
) -> Any:
    """Declare a dataclass field with what the command line, the recipe and the documentation need to know about it.

    `formerly`: its previous name. Writing that raises an error with the new name; saved runs that use it still load.
    """
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, "formerly": formerly, **bounds})


@dataclasses.dataclass(frozen=True)
class Option:
    """One hyperparameter: its type as written, default, help and bounds, and its previous name."""

    name: str
    type: str
    default: Any
    help: str
    bounds: dict[str, Any]
    formerly: str | None = None

    def check(self, value: Any, owner: str) -> None:
        """Raise `UserError` unless `value` has the right type and lies within the bounds."""
        types = [part.strip() for part in self.type.split("|")]
        accepted = {
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, int | float) and not isinstance(value, bool),
            "bool": isinstance(value, bool),
            "str": isinstance(value, str),
            "None": value is None,
            "tuple": isinstance(value, tuple | list),
            "dict": isinstance(value, dict),
        }
        if not any(accepted.get(part, True) for part in types):
            words = {"None": "null", "tuple": "list ['...', '...']", "dict": "mapping {'...': ...}"}
            wanted = " or ".join(words.get(part, part) for part in types)
            raise UserError(f"{owner}: {self.name} is {shown(value)}, but must be {wanted}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{owner}: {self.name} is {value}, but must be a finite number.")
        if isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
            raise UserError(f"{owner}: {self.name} is {shown(value)}, which is too large.")
        if isinstance(value, float) and abs(value) > LARGEST:
            raise UserError(
                f"{owner}: {self.name} is larger than any number of the type float32 ({LARGEST})."
            )
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check_bounds(value, owner)
        if self.bounds["choices"] and isinstance(value, str) and value not in self.bounds["choices"]:
            raise UserError(
                f"{owner}: {self.name} is {shown(value)}, but must be one of "
                f"{listing(self.bounds['choices'])}.{nearest(value, self.bounds['choices'])}"
            )

    def _check_bounds(self, value: float, owner: str) -> None:
        tests = {
            "at_least": ("at least", lambda bound: value >= bound),
            "at_most": ("at most", lambda bound: value <= bound),
            "above": ("above", lambda bound: value > bound),
            "below": ("below", lambda bound: value < bound),
        }
        for key, (words, holds) in tests.items():
            bound = self.bounds[key]
            if bound is not None and not holds(bound):
                raise UserError(f"{owner}: {self.name} is {shown(value)}, but must be {words} {bound}.")


def check_fields(value: Any, owner: str) -> None:
    """Check the fields of a dataclass constructed in Python."""
    for field in dataclasses.fields(value):
        bounds = {key: field.metadata.get(key) for key in BOUNDS}
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "object")
        Option(field.name, kind, None, "", bounds).check(getattr(value, field.name), owner)
