"""Parse, check and write expressions such as `lora(rank=8) + head()`. No torch here."""

from __future__ import annotations

import ast
import dataclasses
import warnings
from typing import Any

from graftkit.errors import UserError, listing, nearest
from graftkit.recipe.catalogue import FAMILIES, Entry, elsewhere, entries, entry_name


@dataclasses.dataclass(frozen=True)
class Call:
    """`lora(rank=8)`, parsed and checked: a name and its keyword arguments."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"


def parse(expression: str, family: str, *, stored: bool = False) -> tuple[Call, ...]:
    """Parse `lora(rank=8) + unfreeze('blocks[-2:]') + head()` into checked calls.

    Raises `UserError` for a syntax error, for an unknown name or option (suggesting the nearest known one) and for a
    value of the wrong type or out of bounds. `stored`: the expression was saved, possibly before an option was renamed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the backslash of a regular expression in a plain string
            tree = ast.parse(expression.strip(), mode="eval").body
        return tuple(_call(node, family, expression, stored) for node in _terms(tree, family, expression))
    except (RecursionError, MemoryError):
        raise UserError(
            f"{family} {expression[:60] + ' ...'!r} cannot be read: it is nested too deeply or has too many parts."
        ) from None
    except (SyntaxError, ValueError) as error:
        if "positional argument follows keyword" in str(error):
            raise UserError(
                f"{family} {expression!r} cannot be read: put a value with a comma in quotes, "
                "for example lora(sites='q,v')."
            ) from None
        example = FAMILIES[family].example
        raise UserError(
            f"{family} {expression!r} cannot be read: {error}. Write it as, for example, {example}"
        ) from None


def _terms(node: ast.expr, family: str, expression: str) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _terms(node.left, family, expression) + _terms(node.right, family, expression)
    if isinstance(node, ast.BinOp):
        raise UserError(f"{family} {expression!r}: parts can only be joined by '+'.")
    return [node]


def _call(node: ast.expr, family: str, expression: str, stored: bool) -> Call:
    name_node = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name_node, ast.Name):
        raise UserError(f"{family} {expression!r}: {ast.unparse(node)!r} is not {FAMILIES[family].a}'s name.")
    name = _known_as(name_node.id, family)
    if name not in entries(family):
        raise UserError(_unknown(name, ast.unparse(node), family))
    entry = entries(family)[name]
    arguments: dict[str, Any] = {}
    if isinstance(node, ast.Call):
        if len(node.args) > len(entry.options):
            raise UserError(f"{name}() takes {len(entry.options)} values, but {len(node.args)} are given.")
        for key, value in zip(entry.options, node.args):
            arguments[key] = _value(value, name)
        for keyword in node.keywords:
            if keyword.arg is None:
                raise UserError(f"{name}(): '**' cannot be used here.")
            key = _option_of(entry, keyword.arg, stored)
            if key in arguments:
                raise UserError(f"{name}(): {key} is given twice.")
            arguments[key] = _value(keyword.value, name)
    for key, value in arguments.items():
        entry.options[key].check(value, f"{name}()")
    return Call(name, arguments)


def _known_as(written: str, family: str) -> str:
    """Return the name of the entry that declares `written` as another name of it, or else `written`."""
    known = entries(family)
    if written in known:  # only the file of that name is read
        return written
    found = (name for name, entry in known.items() if written.lower() in entry.constants.get("aliases", ()))
    return next(found, written)


def _option_of(entry: Entry, written: str, stored: bool) -> str:
    """Return the current name of an option. Raises `UserError` if it does not exist, or has been renamed."""
    if written in entry.options:
        return written
    renamed = next((name for name, option in entry.options.items() if option.formerly == written), None)
    if renamed is None:
        raise UserError(
            f"{entry.name}() has no option {written!r} (options: {listing(entry.options) or 'none'})."
            f"{nearest(written, entry.options)}"
        )
    if not stored:
        raise UserError(f"{entry.name}(): {written} is now called {renamed}.")
    return renamed


def renewed(expression: str, family: str) -> str:
    """Return a saved expression with options under their current names."""
    old = (option.formerly for entry in entries(family).values() for option in entry.options.values())
    if not any(name is not None and f"{name}=" in expression for name in old):
        return expression
    return " + ".join(str(call) for call in parse(expression, family, stored=True))


def _unknown(name: str, written: str, family: str) -> str:
    """Return the error message for a name that a family does not have."""
    other, known = elsewhere(name, family), entries(family)
    if other is not None:
        return (
            f"{name}() is {other.a}, not {FAMILIES[family].a}: write {other.key}={written} instead, beside "
            f"{FAMILIES[family].key}={FAMILIES[family].plain}, for example."
        )
    meant = {
        word: call for entry in known.values() for word, call in entry.constants.get("meant", {}).items()
    }
    hint = f" Write {meant[name]}." if name in meant else nearest(name, known)
    if not hint:
        a = FAMILIES[family].a
        hint = f" To use {a} of your own, set {FAMILIES[family].variable} to its folder."
    return f"there is no {family} {name!r} (known: {listing(known, 30)}).{hint}"


def _value(node: ast.expr, name: str) -> Any:
    if isinstance(node, ast.Name):  # a bare word stands for itself: pooling=mean
        return {"null": None, "true": True, "false": False}.get(node.id, node.id)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise UserError(f"{name}(): {ast.unparse(node)!r} is not a plain value.") from None


def parse_one(expression: str, family: str) -> Call:
    """Parse an expression that must be a single call: a run has one task and one optimizer."""
    calls = parse(expression, family)
    if len(calls) != 1:
        raise UserError(f"{FAMILIES[family].key} {expression!r}: a run has one {family}.")
    return calls[0]


def build(calls: tuple[Call, ...], family: str) -> list[Any]:
    """Construct the values that checked calls describe; this imports their files, and so torch."""
    return [entries(family)[call.name].load()(**call.arguments) for call in calls]


def as_expression(value: Any) -> str:
    """Return the expression that makes `value`, such as `lora(rank=16)`; fields at their defaults are omitted."""
    name = entry_name(type(value).__module__)
    given = {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    }
    return str(Call(name, given))
