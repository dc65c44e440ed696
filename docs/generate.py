"""Writes the generated parts of the documentation: `python docs/generate.py`, or `make docs`.

What stands between `<!-- NAME -->` and `<!-- /NAME -->` in a page comes from the code: methods, tasks and optimizers from the
catalogue, the keys of a recipe from its schema. tests/docs/test_docs.py fails where a committed page is not up to date.

The docstring of a method is its entry in docs/methods.md. Its first paragraph says what the method does. Behind it stand
the paper ('Hu et al. 2021, ...') and two sentences that begin a line with a word of their own and go on to the next
such word, or to the end of the paragraph; what a formula needs to be said beforehand can stand between word and colon:

    When: what it is good for, beside the other methods.
    Parameters, L the number of layers: how many it trains, as a formula.

An optimizer has `Memory` in the place of `Parameters`: how much it keeps for what is trained.

The matrix of methods and models is in docs/matrix.json. `python docs/generate.py --matrix` makes it by running
tests/support/contract.py on each pair; with names behind it (`--matrix lora dora`), on the pairs of these methods alone.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftkit.recipe import schema as recipe
from graftkit.recipe.catalogue import Entry, Option, entries

FOLDER = Path(__file__).parent
PAGES = ("methods.md", "recipe.md")
MATRIX = FOLDER / "matrix.json"
NOTES = ("When", "Parameters", "Memory")


def overview() -> str:
    """A row for each method."""
    rows = ["| method | what it does | when | parameters | paper |", "| --- | --- | --- | --- | --- |"]
    for entry in packaged("method"):
        notes = notes_of(entry)
        name = f"[`{entry.name}`](#{entry.name})"
        rows.append(_row(name, entry.summary, notes["When"], notes["Parameters"], papers(entry) or "—"))
    return "\n".join(rows)


def methods() -> str:
    """A section for each method: its docstring, and its options."""
    return "\n\n".join(_entry(entry) for entry in packaged("method"))


def matrix() -> str:
    """A row for each method, a column for each model, and the reasons of what is refused."""
    stored = read_matrix()
    models, pairs = stored["models"], stored["pairs"]
    reasons: list[str] = []
    rows = [
        _row("", *(model["title"] for model in models.values())),
        _row("---", *(":-:" for _ in models)),
    ]
    for method, outcomes in pairs.items():
        cells = [f"`{method}`"]
        for name, model in models.items():
            outcome = outcomes.get(name, "?")
            if outcome not in ("passes", "?"):
                reason = outcome.replace(model["class"], "the model").replace("\n", " ")
                reasons += [] if reason in reasons else [reason]
                outcome = str(reasons.index(reason) + 1)
            cells.append("✓" if outcome == "passes" else outcome)
        rows.append(_row(*cells))
    passed = sum(list(outcomes.values()).count("passes") for outcomes in pairs.values())
    count = len(pairs) * len(models)
    share = f"{passed} of {count} pairs pass ({100 * passed / count:.0f}%)."
    listed = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([share, "", *rows, "", *listed])


def tasks() -> str:
    """The same for each task."""
    return "\n\n".join(_entry(entry) for entry in packaged("task"))


def optimizers() -> str:
    """The same for each optimizer."""
    return "\n\n".join(_entry(entry) for entry in packaged("optimizer"))


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


PARTS: dict[str, Callable[[], str]] = {
    "overview": overview,
    "methods": methods,
    "matrix": matrix,
    "tasks": tasks,
    "optimizers": optimizers,
    "keys": keys,
}


def page(text: str) -> str:
    """A page with its generated parts written anew."""
    for name, part in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, part=part: f"{found[1]}{part()}\n{found[2]}", text)  # type: ignore[misc]
    return text


def read_matrix() -> dict[str, Any]:
    """The stored matrix; its methods in order of their names, its models in that of the zoo."""
    stored = json.loads(MATRIX.read_text(encoding="utf-8"))
    return {**stored, "pairs": dict(sorted(stored["pairs"].items()))}


def run_matrix(names: list[str]) -> list[str]:
    """Run the pairs of the methods named, of all where none is, and store the outcomes; returns what broke."""
    tests = FOLDER.parent / "tests"
    sys.path[:0] = [str(tests / "methods"), str(tests / "support"), str(tests)]
    from test_matrix import contract, expression, outcome, zoo

    stored = read_matrix() if names else {"pairs": {}}
    broken = []
    known = [entry.name for entry in packaged("method")]
    for name in names or known:
        outcomes = stored["pairs"][name] = {}
        for model in zoo.MODELS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    outcomes[model.name] = outcome(name, model, Path(folder))
                except contract.Broke as error:
                    broken.append(str(error))
    stored["models"] = {
        model.name: {"title": model.title, "class": type(model.shapes()).__name__} for model in zoo.MODELS
    }
    pairs = {name: pairs for name, pairs in sorted(stored["pairs"].items()) if name in known}
    expressions = {name: expression(name) for name in pairs}
    content = {"models": stored["models"], "expressions": expressions, "pairs": pairs}
    MATRIX.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return broken


def notes_of(entry: Entry) -> dict[str, str]:
    """What the docstring says behind each of the words of `NOTES`; empty where it says nothing."""
    found = {
        note[1]: " ".join(f"{note[2] + ': ' if note[2] else ''}{note[3]}".split())
        for note in _NOTE.finditer(_docstring(entry))
    }
    return dict.fromkeys(NOTES, "") | found


_NOTE = re.compile(
    rf"^({'|'.join(NOTES)})(?:, ([^:\n]+))?: (.+?)(?=^(?:{'|'.join(NOTES)})[:,] |\n\n|\Z)",
    re.DOTALL | re.MULTILINE,
)


def papers(entry: Entry) -> str:
    """The papers that a docstring names, as authors and year."""
    name = r"(?:Ben |Van |De )?[A-Z][\w-]+"
    names = rf"(?:{name}, )*{name}(?: et al\.| and {name})? (?:19|20)\d\d"
    text = " ".join(_docstring(entry).split())
    return "; ".join(dict.fromkeys(re.findall(names, text)))


def packaged(family: str) -> list[Entry]:
    """The entries that come with graftkit, without those of the user's own folders."""
    return [entry for entry in entries(family).values() if entry.module.startswith("graftkit.")]


def _entry(entry: Entry) -> str:
    text = _NOTE.sub("", _docstring(entry)).rstrip()
    notes = [f"- {word}: {said}" for word, said in notes_of(entry).items() if said]
    lines = [f"## {entry.name}", "", text, *([""] if notes else []), *notes]
    if entry.options:
        lines += ["", "| option | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(f"`{o.name}`", _bounds(o), f"`{o.default!r}`", o.help) for o in entry.options.values()]
    return "\n".join(lines)


def _docstring(entry: Entry) -> str:
    return inspect.cleandoc(entry.docstring)


def _bounds(option: Option) -> str:
    words = {"at_least": "at least", "at_most": "at most", "above": "above", "below": "below"}
    limits = [f"{words[key]} {option.bounds[key]}" for key in words if option.bounds[key] is not None]
    kind = option.type.replace("None", "null").replace(" | ", " or ")
    if option.bounds["choices"]:
        kind = "one of " + ", ".join(f"`{choice}`" for choice in option.bounds["choices"])
        kind += ", or dict" * ("dict" in option.type)
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the generated parts of the documentation.")
    parser.add_argument(
        "--matrix", nargs="*", metavar="METHOD", help="run the pairs of these methods, or of all"
    )
    names = parser.parse_args().matrix
    broken = run_matrix(names) if names is not None else []
    if broken:
        sys.exit("\n".join(["promises that are broken:", *broken]))
    for name in PAGES:
        path = FOLDER / name
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
