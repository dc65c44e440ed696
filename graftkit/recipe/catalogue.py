"""What methods and tasks there are, read from their source files without importing torch.

A method or a task is one file whose name is its registration: `methods/lora.py` holds the frozen
dataclass that a recipe writes as `lora(rank=8)`. Its fields are declared with `option`, so that names,
types, bounds and help can be read here from the syntax tree: a recipe is checked, and `--help` answers,
before anything heavy is loaded.

Methods and tasks of one's own are such files too: the environment variables GRAFTKIT_METHODS and GRAFTKIT_TASKS name
their folders, separated as in PATH. See docs/new-method.md and docs/new-task.md.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftkit.errors import UserError, listing, nearest

FAMILIES = {"method": "methods", "task": "tasks"}
OWN_FOLDERS = {"method": "GRAFTKIT_METHODS", "task": "GRAFTKIT_TASKS"}
NOT_ENTRIES = {"__init__", "base"}


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with what the command line, the recipe and the documentation need to know of it."""
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


BASES = (
    "Method",
    "UpdateMethod",
    "SizedMethod",
    "LowRankMethod",
    "Task",
    "TextTask",
    "LabelTask",
)  # a class is an entry if it derives from one of these


@dataclasses.dataclass(frozen=True)
class Option:
    """One hyperparameter: its type as written, default, help and bounds."""

    name: str
    type: str
    default: Any
    help: str
    bounds: dict[str, Any]

    def check(self, value: Any, owner: str) -> None:
        """Raise `UserError` unless `value` has the type and lies within the bounds."""
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
            raise UserError(f"{owner}: {self.name} is {value!r}, but must be {wanted}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{owner}: {self.name} is {value}, but must be a finite number.")
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check_bounds(value, owner)
        if self.bounds["choices"] and isinstance(value, str) and value not in self.bounds["choices"]:
            raise UserError(
                f"{owner}: {self.name} is {value!r}, but must be one of "
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
                raise UserError(f"{owner}: {self.name} is {value}, but must be {words} {bound}.")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method or task as its file declares it. `constants`: plain values that the class body assigns."""

    name: str
    class_name: str
    module: str
    path: Path
    docstring: str
    options: dict[str, Option]
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring, on one line."""
        return self.docstring.split("\n\n")[0].replace("\n", " ")

    def load(self) -> type:
        """The class itself; this is where torch is imported."""
        if self.module not in sys.modules and not self.module.startswith("graftkit."):
            self._load_own()
        return getattr(importlib.import_module(self.module), self.class_name)

    def _load_own(self) -> None:
        spec = importlib.util.spec_from_file_location(self.module, self.path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[self.module] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the user's file runs into
            del sys.modules[self.module]
            raise UserError(f"{self.path} cannot be imported ({type(error).__name__}: {error}).") from error


@dataclasses.dataclass(frozen=True)
class Call:
    """`lora(rank=8)`, parsed and checked: a name and its keyword arguments."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"


def entry_name(module: str) -> str:
    """The name in recipes of what a module declares: that of its file, or of its folder where the file is `task.py`."""
    *_, folder, file = ["", *module.split(".")]
    return folder if file in FAMILIES else file


def entries(family: str) -> dict[str, Entry]:
    """All entries of a family ('method' or 'task') by name; those in the user's own folders come last."""
    return _entries(family, os.environ.get(OWN_FOLDERS.get(family, ""), ""))


@functools.cache
def _entries(family: str, own: str) -> dict[str, Entry]:
    found = {}
    package = Path(__file__).parents[1] / FAMILIES[family]
    for path in sorted([*package.glob("*.py"), *package.glob(f"*/{family}.py")]):
        if path.stem not in NOT_ENTRIES:
            module = ".".join(("graftkit", *path.relative_to(package.parent).with_suffix("").parts))
            entry = _read(path, module)
            if entry is not None:
                found[entry.name] = entry
    for folder in filter(None, own.split(os.pathsep)):
        if not Path(folder).is_dir():
            raise UserError(f"{OWN_FOLDERS[family]} names {folder!r}, which is no folder.")
        for path in sorted(Path(folder).glob("*.py")):
            entry = _read_own(path, family)
            if entry is not None and entry.name in found:
                raise UserError(
                    f"{path}: there is a {family} {entry.name!r} already ({found[entry.name].path}); rename the file."
                )
            if entry is not None:
                found[entry.name] = entry
    return found


def _read_own(path: Path, family: str) -> Entry | None:
    try:
        entry = _read(path, f"graftkit_own_{FAMILIES[family]}.{path.stem}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no Python file that can be read ({error}).") from None
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"{path}{line}: {error.msg}.") from None
    except ValueError as error:
        raise UserError(f"{path}, {error}.") from None
    if entry is None:
        _refuse_plain_class(path, family)
    if entry is not None and not entry.name.isidentifier():
        raise UserError(
            f"{path}: the file's name is the {family}'s, and {entry.name!r} is no name; use letters, digits and '_'."
        )
    return entry


def _refuse_plain_class(path: Path, family: str) -> None:
    """Raise `UserError` for a file whose class was meant to be an entry, but is no dataclass."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            base = next((b for b in map(ast.unparse, node.bases) if b.split(".")[-1] in BASES), None)
            if base is not None and not any(_called(d) == "dataclass" for d in node.decorator_list):
                raise UserError(
                    f"{path}, line {node.lineno}: {node.name}({base}) is no {family} yet; write @dataclass(frozen=True) "
                    "above it, or move the file elsewhere."
                )


def _read(path: Path, module: str) -> Entry | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and any(_called(d) == "dataclass" for d in node.decorator_list):
            if not any(ast.unparse(base).split(".")[-1] in BASES for base in node.bases):
                continue
            options = [
                _option(item)
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.value, ast.Call)
                and _called(item.value) == "option"
            ]
            return Entry(
                entry_name(module),
                node.name,
                module,
                path,
                ast.get_docstring(node) or "",
                {o.name: o for o in options},
                dict(_constants(node)),
            )
    return None


def _constants(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            with contextlib.suppress(ValueError):
                yield item.target.id, ast.literal_eval(item.value)


def _called(node: ast.expr) -> str:
    function = node.func if isinstance(node, ast.Call) else node
    return ast.unparse(function).split(".")[-1]


def _option(item: ast.AnnAssign) -> Option:
    assert isinstance(item.value, ast.Call) and isinstance(item.target, ast.Name)
    given = dict(zip(("default", "help"), item.value.args)) | {
        k.arg: k.value for k in item.value.keywords if k.arg
    }
    values = {}
    for key, value in given.items():
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, TypeError):
            raise ValueError(
                f"line {value.lineno}: {ast.unparse(value)!r} in option(...) is no plain value, such as 8, 0.1 or 'q,v'"
            ) from None
    bounds = {key: values.get(key) for key in ("at_least", "at_most", "above", "below", "choices")}
    return Option(
        item.target.id, ast.unparse(item.annotation), values.get("default"), values.get("help", ""), bounds
    )


def parse(expression: str, family: str) -> tuple[Call, ...]:
    """Read `lora(rank=8) + unfreeze('blocks[-2:]') + head()` into checked calls.

    Raises `UserError` for a syntax error, an unknown name or option (the nearest known one is named) and
    for a value of the wrong type or out of bounds.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the backslash of a regular expression in a plain string
            tree = ast.parse(expression.strip(), mode="eval").body
        return tuple(_call(node, family, expression) for node in _terms(tree, family, expression))
    except (RecursionError, MemoryError):
        raise UserError(
            f"{family} {expression[:60] + ' ...'!r} cannot be read: it is nested too deeply or has too many parts."
        ) from None
    except (SyntaxError, ValueError) as error:
        if "positional argument follows keyword" in str(error):
            raise UserError(
                f"{family} {expression!r} cannot be read: a value with a comma stands in quotes, "
                "for example lora(sites='q,v')."
            ) from None
        example = "lora(rank=8) + head()" if family == "method" else "classify(class_weights='balanced')"
        raise UserError(
            f"{family} {expression!r} cannot be read: {error}. Write it as, for example, {example}"
        ) from None


def _terms(node: ast.expr, family: str, expression: str) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _terms(node.left, family, expression) + _terms(node.right, family, expression)
    if isinstance(node, ast.BinOp):
        raise UserError(f"{family} {expression!r}: parts are joined by '+' only.")
    return [node]


def _call(node: ast.expr, family: str, expression: str) -> Call:
    name_node = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name_node, ast.Name):
        raise UserError(f"{family} {expression!r}: {ast.unparse(node)!r} is not a {family}'s name.")
    known = entries(family)
    name = name_node.id
    if name not in known:
        hint = nearest(name, known)
        if not hint:
            hint = f" A {family} of your own is found where {OWN_FOLDERS[family]} names its folder."
        raise UserError(f"there is no {family} {name!r} (known: {listing(known, 30)}).{hint}")
    entry = known[name]
    arguments: dict[str, Any] = {}
    if isinstance(node, ast.Call):
        if len(node.args) > len(entry.options):
            raise UserError(f"{name}() takes {len(entry.options)} values, but {len(node.args)} are given.")
        for key, value in zip(entry.options, node.args):
            arguments[key] = _value(value, name)
        for keyword in node.keywords:
            if keyword.arg is None:
                raise UserError(f"{name}(): '**' cannot be used here.")
            if keyword.arg not in entry.options:
                raise UserError(
                    f"{name}() has no option {keyword.arg!r} (options: {listing(entry.options) or 'none'})."
                    f"{nearest(keyword.arg, entry.options)}"
                )
            if keyword.arg in arguments:
                raise UserError(f"{name}(): {keyword.arg} is given twice.")
            arguments[keyword.arg] = _value(keyword.value, name)
    for key, value in arguments.items():
        entry.options[key].check(value, f"{name}()")
    return Call(name, arguments)


def _value(node: ast.expr, name: str) -> Any:
    if isinstance(node, ast.Name):  # a bare word stands for itself: pooling=mean
        return {"null": None, "true": True, "false": False}.get(node.id, node.id)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise UserError(f"{name}(): {ast.unparse(node)!r} is not a plain value.") from None


def build(calls: tuple[Call, ...], family: str) -> list[Any]:
    """The values that checked calls describe; imports the files that define them, and so torch."""
    return [entries(family)[call.name].load()(**call.arguments) for call in calls]


def check_values(value: Any, family: str) -> None:
    """The same checks for a value made in Python, from its `__post_init__`."""
    name = entry_name(type(value).__module__)
    for field in dataclasses.fields(value):
        bounds = {
            key: field.metadata.get(key) for key in ("at_least", "at_most", "above", "below", "choices")
        }
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "object")
        Option(field.name, kind, None, "", bounds).check(getattr(value, field.name), f"{name}()")


def as_expression(value: Any) -> str:
    """`lora(rank=16)`: the expression that makes `value`; fields at their defaults are left out."""
    name = entry_name(type(value).__module__)
    given = {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    }
    return str(Call(name, given))
