"""Classes as declared in their source files, with everything they inherit. Nothing is imported.

A base class is found by following the import statement of its name, as long as that leads to a file of this package.
Classes of other packages end the chain.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftkit.recipe.options import BOUNDS, Option

PACKAGE = Path(__file__).parents[1]
Public = Callable[[str], tuple[Path, str] | None]


@dataclass(frozen=True)
class OwnPart:
    """The contents of one class body, without its bases. `constants`: the literal values that it assigns."""

    path: Path
    name: str
    line: int
    docstring: str
    is_dataclass: bool
    options: dict[str, Option]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Declared:
    """A class and its bases in method resolution order, the class itself first."""

    parts: tuple[OwnPart, ...]

    @property
    def own(self) -> OwnPart:
        return self.parts[0]

    def derives_from(self, path: Path, name: str) -> bool:
        return any((part.path, part.name) == (path, name) for part in self.parts[1:])

    @property
    def options(self) -> dict[str, Option]:
        """The fields in the order of the dataclass's signature.

        A class that redeclares an inherited option changes it in place. Raises `ValueError` if a class body declares
        options that Python would not turn into fields.
        """
        found: dict[str, Option] = {}
        for part in reversed(self.parts):
            if part.options and not part.is_dataclass:
                raise ValueError(
                    f"line {part.line}: {part.name} declares options but is not a dataclass; write "
                    "@dataclass(frozen=True) above it"
                )
            hidden = next((name for name in part.constants if name in found), None)
            if hidden is not None:
                raise ValueError(
                    f"line {part.line}: {part.name} assigns {hidden!r}, an option of a base class; redeclare it as "
                    f"{hidden}: {found[hidden].type} = option(...)"
                )
            found |= part.options
        return found

    @property
    def constants(self) -> dict[str, Any]:
        """The literal values that the class or a base assigns."""
        found: dict[str, Any] = {}
        for part in reversed(self.parts):
            found |= part.constants
        return found


def read(path: Path, public: Public | None = None) -> list[Declared]:
    """Return the classes at the top level of a file, in order.

    `public` resolves the names that the package exports, as in `from graftkit import LoRA`. Raises `ValueError` for a
    class that cannot be read, and whatever opening and parsing the file raises.
    """
    source = _open(path)
    return [_declared(source, node, public) for node in source.classes.values()]


@dataclass
class _Source:
    """A Python file: the classes at its top level, and the origin of its imported names, as dotted names.

    `starred`: modules imported with `*`. `bound`: every name that the file assigns.
    """

    path: Path
    classes: dict[str, ast.ClassDef]
    imported: dict[str, str] = field(default_factory=dict)
    starred: list[str] = field(default_factory=list)
    bound: set[str] = field(default_factory=set)
    shadows: dict[str, type] = field(default_factory=dict)


def _open(path: Path) -> _Source:
    return _open_once(path) if path.is_relative_to(PACKAGE) else _parse(path)


def _parse(path: Path) -> _Source:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    source = _Source(path, {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)})
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
            source.starred.extend([module] if names.pop("*", None) else [])
            source.imported |= names
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                source.imported[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            source.bound.add(node.id)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef) and node not in source.classes.values():
            source.bound.add(node.name)
    return source


_open_once = functools.cache(_parse)


def _find(
    source: _Source, dotted: str, public: Public | None, before: int | None = None
) -> tuple[_Source, ast.ClassDef] | None:
    """Return the class that a name refers to at a line of a file; None for another package's, or an expression.

    Raises `ValueError` for a name that the file does not define.
    """
    head, _, rest = dotted.partition(".")
    node = source.classes.get(head)
    if node is not None and not rest and (before is None or node.lineno < before):
        return source, node
    if head in source.imported:
        return _locate(f"{source.imported[head]}.{rest}".rstrip("."), public)
    found = (_locate(f"{module}.{dotted}", public) for module in source.starred)
    star = next((each for each in found if each is not None), None)
    known = star or source.starred or head in source.bound or hasattr(builtins, head)
    if before is not None and not known and head.isidentifier():
        raise ValueError(f"line {before}: {head!r} is not defined; import it in this file")
    return star


def _locate(dotted: str, public: Public | None) -> tuple[_Source, ast.ClassDef] | None:
    """Return the class with a full dotted name, such as graftkit.methods.base.Method."""
    first, *parts = dotted.split(".")
    if first != PACKAGE.name:
        return None
    for cut in range(len(parts) - 1, -1, -1):
        base = PACKAGE.joinpath(*parts[:cut])
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if not file.is_file():
            continue
        found = _find(_open(file), ".".join(parts[cut:]), public)
        if found is None and cut == 0 and len(parts) == 1 and public is not None:
            named = public(parts[0])
            found = _find(_open(named[0]), named[1], public) if named is not None else None
        return found
    return None


def _declared(source: _Source, node: ast.ClassDef, public: Public | None) -> Declared:
    mro = _shadow(source, node, public).__mro__
    return Declared(tuple(vars(c)["part"] for c in mro if "part" in vars(c)))


def _shadow(source: _Source, node: ast.ClassDef, public: Public | None) -> type:
    """Return an empty class with the same bases, so that Python itself works out their order."""
    if node.name not in source.shadows:
        found = [_find(source, ast.unparse(base), public, before=node.lineno) for base in node.bases]
        bases = tuple(_shadow(*each, public) for each in found if each is not None)
        try:
            shadow = type(node.name, bases, {"part": _part(source.path, node)})
        except TypeError as error:
            raise ValueError(
                f"line {node.lineno}: class {node.name}: {' '.join(str(error).split())}"
            ) from None
        source.shadows[node.name] = shadow
    return source.shadows[node.name]


def _part(path: Path, node: ast.ClassDef) -> OwnPart:
    options = [
        _option(item)
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.value, ast.Call)
        and _called(item.value) == "option"
    ]
    return OwnPart(
        path, node.name, node.lineno, ast.get_docstring(node) or "",
        any(_called(decorator) == "dataclass" for decorator in node.decorator_list),
        {o.name: o for o in options}, dict(_constants(node)),
    )  # fmt: skip


def _constants(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            target: ast.expr = item.target
        elif isinstance(item, ast.Assign) and len(item.targets) == 1:
            target = item.targets[0]
        else:
            continue
        if isinstance(target, ast.Name) and item.value is not None:
            with contextlib.suppress(ValueError, TypeError):
                yield target.id, ast.literal_eval(item.value)


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
                f"line {value.lineno}: {ast.unparse(value)!r} in option(...) is not a plain value, such as 8, 0.1 or 'q,v'"
            ) from None
    bounds = {key: values.get(key) for key in BOUNDS}
    return Option(
        item.target.id,
        ast.unparse(item.annotation),
        values.get("default"),
        values.get("help", ""),
        bounds,
        values.get("formerly"),
    )
