"""Which part may import which, read from the source files."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import graftkit
from graftkit.catalogue import entries

ROOT = Path(graftkit.__file__).parent
METHODS = set(entries("method"))
SHARED = (
    {path.stem for path in (ROOT / "methods").glob("*.py")} - METHODS - {"__init__"}
)  # what methods share


@dataclass(frozen=True)
class Import:
    file: str  # 'methods/lora.py'
    target: str  # 'graftkit.backbone.anatomy.features'
    lazy: bool  # inside a function

    def of(self, *modules: str) -> bool:
        return any(self.target == module or self.target.startswith(f"{module}.") for module in modules)


def walk(node: ast.AST, lazy: bool = False):
    """Import statements with whether they stand in a function; blocks for type checkers are passed by."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from walk(ast.Module([other], []), lazy)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        else:
            yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.Lambda))


def imports() -> list[Import]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for node, lazy in walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [Import(file, alias.name, lazy) for alias in node.names]
            else:
                assert node.level == 0, f"{file}: imports are absolute"
                found += [Import(file, f"{node.module}.{alias.name}", lazy) for alias in node.names]
    return found


IMPORTS = imports()


def none(offending: list[Import]) -> None:
    assert not offending, "\n".join(f"{i.file} imports {i.target}" for i in offending)


def own(file_start: str) -> list[Import]:
    found = [i for i in IMPORTS if i.file.startswith(file_start)]
    assert found, file_start
    return found


def test_the_command_line_imports_what_is_light():
    light = ("catalogue", "errors", "recipe", "selection", "cli_options", "cli_runs", "cli_data")
    allowed = tuple(f"graftkit.{name}" for name in light)
    none([i for i in own("cli") if i.of("graftkit") and not i.lazy and not i.of(*allowed)])
    none([i for i in own("cli") if i.of("torch", "transformers", "datasets")])


def test_only_the_front_imports_run():
    front = {"cli.py", "__init__.py", "demo/__init__.py"}  # the demo is a command: it starts a run
    none([i for i in IMPORTS if i.of("graftkit.run") and i.file not in front])


def test_a_method_imports_base_backbone_and_torch():
    allowed = (
        *(f"graftkit.methods.{name}" for name in SHARED),
        "graftkit.backbone",
        "graftkit.catalogue",
        "graftkit.errors",
        "graftkit.files",
        "graftkit.libraries",
    )
    for name in METHODS:
        none([i for i in own(f"methods/{name}.py") if i.of("graftkit") and not i.of(*allowed)])


def test_head_is_the_only_method_that_is_known_elsewhere():
    methods = tuple(f"graftkit.methods.{name}" for name in METHODS - {"head"})
    none([i for i in IMPORTS if i.of(*methods)])
    knowing = {"graft.py", "prepare.py", "export.py"}
    none([i for i in IMPORTS if i.of("graftkit.methods.head") and i.file not in knowing
          and not i.file.startswith("engine/")])  # fmt: skip


def test_lower_parts_know_nothing_of_higher_ones():
    above = tuple(
        f"graftkit.{name}" for name in ("engine", "tasks", "graft", "prepare", "plan", "report", "use")
    )
    none([i for i in own("methods/") + own("backbone/") + own("optim/") if i.of(*above)])
    none([i for i in own("backbone/") if i.of("graftkit.methods")])
    none([i for i in own("tasks/") if i.of("graftkit.methods", "graftkit.engine", "graftkit.graft")])


def test_recipe_and_report_import_no_torch():
    files = own("recipe.py") + own("report/") + own("catalogue.py") + own("selection.py") + own("errors.py")
    none([i for i in files if i.of("torch", "transformers", "accelerate", "datasets")])
    heavy = {i.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for i in IMPORTS
             if i.of("torch") and not i.lazy}  # fmt: skip
    none([i for i in files if not i.lazy and any(i.of(f"graftkit.{module}") for module in heavy)])


def test_accelerate_is_imported_in_one_file():
    none([i for i in IMPORTS if i.of("accelerate") and i.file != "engine/parallel.py"])


def test_files_are_short():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.rglob("*.py")}
    assert not [f"{path}: {count} lines" for path, count in lines.items() if count > 400]
