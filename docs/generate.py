"""Write the generated parts of the documentation: `python docs/generate.py`, or `make docs`.

The text between `<!-- NAME -->` and `<!-- /NAME -->` in a page comes from the code: methods, tasks and optimizers from
the catalogue, recipe keys from the schema, commands from the command line. tests/docs/test_docs.py fails if a committed page is out of
date.

The docstring of a method is its entry in docs/methods.md. The first paragraph says what the method does. The rest names
the paper ('Hu et al. 2021, ...') and has two notes, each starting a line with a keyword and running to the next keyword
or the end of the paragraph. Symbols of a formula can be defined between keyword and colon:

    When: what it is good for, compared with the other methods.
    Parameters, L the number of layers: how many it trains, as a formula.

An optimizer has `Memory` instead of `Parameters`: how much it keeps for each trained parameter.

The matrix of methods and models is stored in docs/matrix.json. `python docs/generate.py --matrix` creates it by running
tests/support/contract.py on each pair; with names (`--matrix lora dora`), only on the pairs of these methods.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graftkit.recipe import schema as recipe
from graftkit.recipe.catalogue import Entry, Option, entries

FOLDER = Path(__file__).parent
PAGES = ("methods.md", "reference/recipe.md", "reference/cli.md", "guides/optimizers.md")
MATRIX = FOLDER / "matrix.json"
NOTES = ("When", "Parameters", "Memory")


def overview() -> str:
    """A row for each method."""
    rows = [
        "| method | what it does | when | parameters | default learning rate | paper |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for entry in packaged("method"):
        notes = notes_of(entry)
        name = f"[`{entry.name}`](#{entry.name})"
        cells = (
            entry.summary,
            notes["When"],
            notes["Parameters"],
            learning_rate(entry),
            papers(entry) or "—",
        )
        rows.append(_row(name, *cells))
    return "\n".join(rows)


def learning_rate(entry: Entry) -> str:
    """The default learning rate of a method, which the help of its option `lr` names; a dash if it has none."""
    found = re.search(r"null means ([\d.]+)", entry.options["lr"].help) if "lr" in entry.options else None
    return found[1] if found else "—"


def methods() -> str:
    """A section for each method: its docstring, and its options."""
    return "\n\n".join(_entry(entry, 3) for entry in packaged("method"))


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
    return "\n\n".join(_entry(entry, 3) for entry in packaged("task"))


def optimizers() -> str:
    """The same for each optimizer."""
    return "\n\n".join(_entry(entry, 3) for entry in packaged("optimizer"))


# the optimizers of the table of memory: those of which the plain form is of no use there, as they are written
WRITTEN = {
    "galore": ("galore(rank=1024)", "galore(rank=1024, bits=8)", "galore(rank=1024, bits=8, space_bits=4)"),
    "fira": ("fira(rank=1024)",),
    "apollo": ("apollo(rank=256)", "apollo(mini=True)"),
}


def memory() -> str:
    """Bytes of state for each weight of a matrix of a Llama of 7 billion parameters, in 32 blocks, from `state_bytes`."""
    import torch

    from graftkit.optim.base import as_optimizer

    rows = ["| optimizer | state, fp32 weights | state, bf16 weights |", "| --- | ---: | ---: |"]
    for entry in packaged("optimizer"):
        for text in WRITTEN.get(entry.name, (f"{entry.name}()",)):
            cells = [f"`{text}`"]
            for dtype in (torch.float32, torch.bfloat16):
                matrices = [torch.empty(4096, 11008, device="meta", dtype=dtype) for _ in range(32)]
                group = {"params": matrices, "hidden": True, "blocks": list(range(32))}
                kept = as_optimizer(text).total_bytes([group])
                cells.append(f"{kept / sum(m.numel() for m in matrices):.2f}")
            rows.append(_row(*cells))
    return "\n".join(rows)


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


def commands() -> str:
    """A section for each command: its help, how it is called, its options."""
    from typer.main import get_command

    from graftkit.cli.main import app

    return "\n\n".join(_command(words, command) for words, command in _walk(("graftkit",), get_command(app)))


def _walk(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, found in command.commands.items():
        if hasattr(found, "commands"):
            yield from _walk((*words, name), found)
        else:
            yield (*words, name), found


def _command(words: tuple[str, ...], command: Any) -> str:
    said = inspect.cleandoc(command.help or "").replace("\b\n", "")
    positional = [p for p in command.params if p.param_type_name == "argument"]
    called = " ".join([*words, *(_metavar(p) for p in positional), "[options]"])
    lines = [
        f"## {' '.join(words[1:])}",
        "",
        said,
        "",
        "```",
        called,
        "```",
        "",
        "| | meaning |",
        "| --- | --- |",
    ]
    lines += [_row(f"`{_metavar(p)}`", p.help or "") for p in positional]
    for option in (p for p in command.params if p.param_type_name == "option"):
        flag = "" if option.is_flag else f" {_metavar(option)}"
        names = " / ".join([*option.opts, *option.secondary_opts])
        lines.append(_row(f"`{names}{flag}`", option.help or ""))
    return "\n".join(lines)


def _metavar(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


PARTS: dict[str, Callable[[], str]] = {
    "overview": overview,
    "methods": methods,
    "matrix": matrix,
    "tasks": tasks,
    "optimizers": optimizers,
    "memory": memory,
    "keys": keys,
    "commands": commands,
}


def page(text: str) -> str:
    """Return a page with its generated parts replaced by current ones."""
    for name, part in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, part=part: f"{found[1]}{part()}\n{found[2]}", text)  # type: ignore[misc]
    return text


def read_matrix() -> dict[str, Any]:
    """Read the stored matrix, with methods sorted by name and models in the order of the zoo."""
    stored = json.loads(MATRIX.read_text(encoding="utf-8"))
    return {**stored, "pairs": dict(sorted(stored["pairs"].items()))}


def run_matrix(names: list[str]) -> list[str]:
    """Run the pairs of the given methods, or of all, and store the outcomes. Return the promises that were broken."""
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
    """Return the notes of a method's docstring by keyword; an empty string for a missing one."""
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
    """Return the papers cited in a docstring, as authors and year."""
    name = r"(?:Ben |Van |De )?[A-Z][\w-]+"
    names = rf"(?:{name}, )*{name}(?: et al\.| and {name})? (?:19|20)\d\d"
    text = " ".join(_docstring(entry).split())
    return "; ".join(dict.fromkeys(re.findall(names, text)))


def packaged(family: str) -> list[Entry]:
    """Return the entries that come with graftkit, without those in folders of the user."""
    return [entry for entry in entries(family).values() if entry.module.startswith("graftkit.")]


def _entry(entry: Entry, level: int = 2) -> str:
    text = _NOTE.sub("", _docstring(entry)).rstrip()
    notes = [f"- {word}: {said}" for word, said in notes_of(entry).items() if said]
    lines = [f"{'#' * level} {entry.name}", "", text, *([""] if notes else []), *notes]
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
    parser = argparse.ArgumentParser(description="Write the generated parts of the documentation.")
    parser.add_argument(
        "--matrix", nargs="*", metavar="METHOD", help="run the pairs of these methods, or of all"
    )
    names = parser.parse_args().matrix
    broken = run_matrix(names) if names is not None else []
    if broken:
        sys.exit("\n".join(["broken promises:", *broken]))
    for name in PAGES:
        path = FOLDER / name
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
