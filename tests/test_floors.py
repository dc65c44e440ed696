"""Who may import whom: the floors of docs/architecture.md, read from the source files.

A folder imports from its own and from lower floors. Imports inside functions count as much as those at the top of a
file; those for type checkers count for the floors, and not for circles.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import graftkit
from graftkit.recipe.catalogue import FAMILIES, entries

ROOT = Path(graftkit.__file__).parent
# from the lowest floor to the highest; what shares a floor does not know of each other
FLOORS = (
    ("errors",),
    ("claims", "libraries"),
    ("files",),
    ("recipe",),
    ("backbone",),
    ("data",),
    ("optim",),
    ("methods",),
    ("grafts", "tasks"),
    ("engine",),
    ("plan", "export", "report", "insight"),
    ("runs",),
    ("studies",),
    ("demo",),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
LIGHT = (
    "errors",
    "claims",
    "files",
    "libraries",
    "recipe",
    "report",
    "cli",
)  # import no torch at the top of a file
HEAVY = ("torch", "transformers", "accelerate", "datasets", "peft")


@dataclass(frozen=True)
class Import:
    file: str  # 'methods/lora.py'
    module: str  # 'backbone.anatomy', or a package outside
    inside: bool  # of graftkit
    lazy: bool  # in a function
    typing: bool  # for type checkers alone

    @property
    def folder(self) -> str:
        return top(self.file)

    def __str__(self) -> str:
        return f"{self.file} imports {self.module}"


def top(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements(
    node: ast.AST, lazy: bool = False, typing: bool = False
) -> Iterator[tuple[ast.AST, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from statements(ast.Module(child.body, []), lazy, True)
            yield from statements(ast.Module(child.orelse, []), lazy, typing)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy, typing
        else:
            inside = lazy or isinstance(child, ast.FunctionDef | ast.Lambda)
            yield from statements(child, inside, typing)


@functools.cache
def imports() -> tuple[Import, ...]:
    return tuple(_read())


def _read() -> Iterator[Import]:
    modules = {module_of(path) for path in ROOT.rglob("*.py")}
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for node, lazy, typing in statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                assert isinstance(node, ast.ImportFrom)
                assert node.level == 0, f"{file}: imports are absolute"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                head, _, rest = name.partition(".")
                if head == "graftkit":
                    while rest and rest not in modules:
                        rest = rest.rpartition(".")[0]
                    yield Import(file, rest or "__init__", True, lazy, typing)
                else:
                    yield Import(file, head, False, lazy, typing)


def none(offending: list[Import]) -> None:
    assert not offending, "\n".join(sorted({str(i) for i in offending}))


def test_every_folder_has_its_floor() -> None:
    present = {top(path.relative_to(ROOT).as_posix()) for path in ROOT.rglob("*.py")}
    assert present == set(FLOOR), "give a new folder its floor, here and in docs/architecture.md"


def test_nothing_imports_upwards() -> None:
    def goes_up(i: Import) -> bool:
        there = i.module.split(".")[0]
        return there != i.folder and FLOOR[there] >= FLOOR[i.folder]

    version = {i for i in imports() if i.module == "__init__" and i.folder == "cli"}  # of the package
    none([i for i in imports() if i.inside and i not in version and goes_up(i)])


def test_there_are_no_circles() -> None:
    """Files that import one another, be it by way of others, in whatever folder."""
    edges: dict[str, set[str]] = {module_of(path) or "__init__": set() for path in ROOT.rglob("*.py")}
    for i in imports():
        if i.inside and not i.typing and i.folder != "__init__":
            edges[module_of(ROOT / i.file) or "__init__"].add(i.module)
    remaining = dict(edges)
    while True:
        leaves = {name for name, targets in remaining.items() if not targets & set(remaining) - {name}}
        if not leaves:
            break
        remaining = {name: targets for name, targets in remaining.items() if name not in leaves}
    tangled = {name: sorted(targets & set(remaining)) for name, targets in remaining.items()}
    assert not tangled, "\n".join(
        f"{name} -> {', '.join(targets)}" for name, targets in sorted(tangled.items())
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_entry_imports_another(family: str) -> None:
    """A method knows no other method, a task no other task; what they share is below them."""
    own = {entry.module.removeprefix("graftkit."): entry.name for entry in entries(family).values()}
    folder = FAMILIES[family].folder
    none([i for i in imports() if i.module in own and i.folder == folder
          and not i.file.startswith(f"{folder}/{own[i.module]}")])  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_entries_are_loaded_by_the_catalogue_alone(family: str) -> None:
    own = {entry.module.removeprefix("graftkit.") for entry in entries(family).values()}
    none([i for i in imports() if i.module in own and i.folder != FAMILIES[family].folder])


def test_what_is_light_imports_no_torch() -> None:
    heavy = {module_of(ROOT / i.file) for i in imports() if i.module in HEAVY and not i.lazy and not i.typing}
    light = [i for i in imports() if i.folder in LIGHT and not i.lazy and not i.typing]
    none([i for i in light if i.module in HEAVY and i.file != "files.py"])
    none([i for i in light if i.inside and i.module in heavy])


def test_accelerate_is_imported_for_processes_and_trackers_alone() -> None:
    assert {i.file for i in imports() if i.module == "accelerate"} == {
        "engine/parallel.py",
        "engine/tracking.py",
    }


def test_files_and_functions_are_short() -> None:
    long = []
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 400:
            long.append(f"{path}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:  # type: ignore[operator]
                long.append(f"{path}: {node.name} has {node.end_lineno - node.lineno + 1} lines")  # type: ignore[operator]
    assert not long, "\n".join(long)


# Words that are names of entries too, and mean something else where they stand: (file or folder, word), and why.
OTHER_MEANINGS = {
    ("", "head"): "a role of sites and of labels, and a word of selections",
    ("", "norms"): "a word of selections",
    ("data", "tag"): "a column of a table",
    ("optim", "full"): "an exact singular value decomposition",
    ("tasks/objectives", "span"): "what is masked",
    ("tasks", "prompt"): "a column of a table",
    ("libraries.py", "peft"): "the name of a package",
    ("backbone/geometries.py", "glm"): "a family of models",
    ("data/vocabularies.py", "glm"): "the special tokens of such a model",
    ("methods/shared/peft_lora.py", "pissa"): "a value of PEFT's init_lora_weights",
}  # fmt: skip
FAMILY_FOLDERS = {"method": "methods", "task": "tasks", "optimizer": "optim"}


def named_entries(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of each string that is compared with something, or is a member or key of a collection."""
    for node in ast.walk(tree):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            found = [node.left, *node.comparators]
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            found = [*node.elts]
        elif isinstance(node, ast.Dict):
            found = [*node.keys]
        elif isinstance(node, ast.MatchValue):
            found = [node.value]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "startswith"
        ):
            found = [*node.args]
        for part in found:
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.lineno, part.value


def test_no_entry_is_known_by_its_name() -> None:
    """What somebody must know of a method, task or optimizer, it says itself; its name stands in its own file alone."""
    own = {
        entry.name: entry.module.removeprefix("graftkit.").replace(".", "/")
        for family in FAMILY_FOLDERS
        for entry in entries(family).values()
    }
    used, wrong = set(), []
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for line, text in named_entries(ast.parse(path.read_text(encoding="utf-8"))):
            if text not in own or file.startswith(own[text].removesuffix("/task")):
                continue
            excuse = next((key for key in OTHER_MEANINGS if key[1] == text and file.startswith(key[0])), None)
            used.add(excuse)
            if excuse is None:
                wrong.append(f"{file}, line {line}: {text!r}")
    assert not wrong, "\n".join(wrong)
    assert used - {None} == set(OTHER_MEANINGS), "an excuse that nothing needs"
