"""Writes the generated parts of the documentation: `python docs/generate.py`, or `make docs`.

What stands between `<!-- NAME -->` and `<!-- /NAME -->` in a page comes from the code: the methods and tasks from the
catalogue, the keys of a recipe from its schema. tests/test_docs.py fails where a committed page is not up to date.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftkit import recipe
from graftkit.catalogue import Entry, Option, entries

FOLDER = Path(__file__).parent
PAGES = ("methods.md", "recipe.md")


def methods() -> str:
    """A section for each method: its docstring, and its options."""
    return "\n\n".join(_entry(entry) for entry in entries("method").values())


def tasks() -> str:
    """The same for each task."""
    return "\n\n".join(_entry(entry) for entry in entries("task").values())


def keys() -> str:
    """One row for each key of a recipe."""
    schema = recipe.Recipe.model_json_schema()
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, description in recipe.keys().items():
        section, _, name = key.rpartition(".")
        node = schema
        if section:
            node = schema["$defs"][{"data": "DataRecipe", "train": "TrainRecipe"}[section]]
        field = node["properties"][name]
        empty = {} if field.get("type") == "object" else None
        default = f"`{_yaml(field.get('default', empty))}`"
        default = "required" if name in node.get("required", ()) else default
        rows.append(_row(f"`{key}`", _type(field), default, description))
    return "\n".join(rows)


PARTS: dict[str, Callable[[], str]] = {"methods": methods, "tasks": tasks, "keys": keys}


def page(text: str) -> str:
    """A page with its generated parts written anew."""
    for name, part in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, part=part: f"{found[1]}{part()}\n{found[2]}", text)  # type: ignore[misc]
    return text


def _entry(entry: Entry) -> str:
    lines = [f"## {entry.name}", "", _docstring(entry)]
    if entry.options:
        lines += ["", "| option | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(f"`{o.name}`", _bounds(o), f"`{o.default!r}`", o.help) for o in entry.options.values()]
    return "\n".join(lines)


def _docstring(entry: Entry) -> str:
    """The whole docstring of an entry's class, from its source: no torch is imported."""
    spec = importlib.util.find_spec(entry.module)
    assert spec is not None and spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    found = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == entry.class_name)
    return inspect.cleandoc(ast.get_docstring(found) or "")


def _bounds(option: Option) -> str:
    words = {"at_least": "at least", "at_most": "at most", "above": "above", "below": "below"}
    limits = [f"{words[key]} {option.bounds[key]}" for key in words if option.bounds[key] is not None]
    kind = option.type.replace("None", "null").replace(" | ", " or ")
    if option.bounds["choices"]:
        kind = "one of " + ", ".join(f"`{choice}`" for choice in option.bounds["choices"])
    return ", ".join([kind, *limits])


def _type(field: dict[str, Any]) -> str:
    options = field.get("anyOf", [field])
    names = {"string": "text", "integer": "int", "number": "float", "boolean": "bool", "object": "mapping"}
    words = []
    for option in options:
        if "enum" in option or "const" in option:
            words += [f"`{value}`" for value in option.get("enum", [option.get("const")])]
        else:
            words.append(names.get(option["type"], option["type"]))
    return " or ".join(words)


def _yaml(value: Any) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    for name in PAGES:
        path = FOLDER / name
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path)
