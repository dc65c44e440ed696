"""The catalogue of methods, tasks and optimizers, read from their source files without importing torch.

Each is one file whose name is its registration: `methods/lora.py` holds the frozen dataclass that a recipe writes as
`lora(rank=8)`. Its fields are declared with `option`, there or in a base class, so that names, types, bounds and help
can be read here from the syntax tree: recipes are checked and `--help` is printed before anything heavy is loaded.

A class is an entry if it derives from the base class of its family: `Method`, `Task` or `Optimizer`. Your own files are
read in the same way, from the folders in GRAFTKIT_METHODS, GRAFTKIT_TASKS and GRAFTKIT_OPTIMIZERS, separated as in PATH. See docs/new-method.md, docs/new-task.md and docs/new-optimizer.md.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graftkit.errors import UserError
from graftkit.files import special
from graftkit.recipe import declared
from graftkit.recipe.options import Option, check_fields, option  # noqa: F401  (entries take `option` from here)


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of entry in the catalogue.

    `folder`: its folder in this package. `key`: its recipe key. `example`: an expression with an option; `plain`: one
    without. `collection`: a folder below with more entries, one file each, whose base class stands in its own `base.py`.
    """

    name: str
    folder: str
    key: str
    example: str
    plain: str
    collection: str | None = None

    @property
    def plural(self) -> str:
        return f"{self.name}s"

    @property
    def a(self) -> str:
        """The name with its article."""
        return f"an {self.name}" if self.name[0] in "aeiou" else f"a {self.name}"

    @property
    def variable(self) -> str:
        """The environment variable that names the user's own folders."""
        return f"GRAFTKIT_{self.plural.upper()}"

    @property
    def base(self) -> tuple[Path, str]:
        """File and name of the class that all entries derive from."""
        return declared.PACKAGE / self.folder / "base.py", self.name.capitalize()


FAMILIES = {
    family.name: family
    for family in (
        Family("method", "methods", "method", "lora(rank=8) + head()", "full()"),
        Family("task", "tasks", "task", "classify(class_weights='balanced')", "classify()", "objectives"),
        Family("optimizer", "optim", "train.optimizer", "galore(rank=128)", "adamw()"),
    )
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method, task or optimizer as declared in its file. `constants`: the literal values that the class assigns."""

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
        """Import and return the class; this is where torch is imported."""
        if self.module not in sys.modules and not self.module.startswith("graftkit."):
            self._load_own()
        return getattr(importlib.import_module(self.module), self.class_name)

    def _load_own(self) -> None:
        spec = importlib.util.spec_from_file_location(self.module, self.path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[self.module] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the user's file may raise anything
            del sys.modules[self.module]
            raise UserError(f"{self.path} cannot be imported ({type(error).__name__}: {error}).") from error


def entry_name(module: str) -> str:
    """Return the recipe name of a module's entry: its file's name, or its folder's if the file is `task.py`."""
    *_, folder, file = ["", *module.split(".")]
    return folder if file in FAMILIES else file


def check_values(value: Any) -> None:
    """Check the options of an entry constructed in Python, from its `__post_init__`."""
    check_fields(value, f"{entry_name(type(value).__module__)}()")


def entries(family: str) -> Mapping[str, Entry]:
    """Return all entries of a family ('method', 'task' or 'optimizer') by name; the user's own come last.

    Without the user's own, asking for a name reads the file of that name alone.
    """
    return _entries(family, os.environ.get(FAMILIES[family].variable, ""))


def elsewhere(name: str, family: str) -> Family | None:
    """Return another family that has an entry of this name, or None."""
    others = (other for other in FAMILIES.values() if other.name != family)
    return next((other for other in others if name in entries(other.name)), None)


@functools.cache
def _entries(family: str, own: str) -> Mapping[str, Entry]:
    if not own:
        return _packaged(family)
    found = dict(_packaged(family))
    about = FAMILIES[family]
    for folder in filter(None, own.split(os.pathsep)):
        if not Path(folder).is_dir():
            raise UserError(f"{about.variable} names {folder!r}, which is not a folder.")
        for path in sorted(Path(folder).glob("*.py")):
            entry = _read_own(path, about)
            if entry is not None and entry.name in found:
                raise UserError(
                    f"{path}: {about.a} {entry.name!r} already exists ({found[entry.name].path}); rename the file."
                )
            if entry is not None:
                found[entry.name] = entry
    return found


@functools.cache
def _packaged(family: str) -> Packaged:
    return Packaged(FAMILIES[family])


class Packaged(Mapping[str, Entry]):
    """The built-in entries: the files of the family's folder, NAME/task.py below it, and those of its collection.

    A file is read when its name is asked for, all of them when the names are: only then is it known which have an entry.
    """

    def __init__(self, family: Family) -> None:
        folder = declared.PACKAGE / family.folder
        paths = {*folder.glob("*.py"), *folder.glob(f"*/{family.name}.py")} - {family.base[0]}
        if family.collection is not None:
            paths |= set((folder / family.collection).glob("*.py")) - {folder / family.collection / "base.py"}
        modules = {
            path: ".".join(("graftkit", *path.relative_to(declared.PACKAGE).with_suffix("").parts))
            for path in sorted(paths)
        }
        self._family = family
        self._files = {entry_name(module): (path, module) for path, module in modules.items()}
        self._read: dict[str, Entry | None] = {}

    def __getitem__(self, name: str) -> Entry:
        if name not in self._read:
            path, module = self._files[name]
            self._read[name] = _read(path, module, self._family)
        entry = self._read[name]
        if entry is None:
            raise KeyError(name)
        return entry

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._files if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _public(name: str) -> tuple[Path, str] | None:
    """Return the file and class that `graftkit.NAME` refers to."""
    known = (entry for family in FAMILIES for entry in _packaged(family).values())
    return next(((entry.path, name) for entry in known if entry.class_name == name), None)


def _read_own(path: Path, family: Family) -> Entry | None:
    if (kind := special(path)) is not None:
        raise UserError(f"{path} is {kind}, not a Python file; remove it from the folder.")
    try:
        entry = _read(path, f"graftkit_own_{family.plural}.{path.stem}", family, _public)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a Python file ({error}).") from None
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"{path}{line}: {error.msg}.") from None
    except ValueError as error:
        raise UserError(f"{path}, {error}.") from None
    except (RecursionError, MemoryError):
        raise UserError(f"{path} cannot be read as a Python file: it is nested too deeply.") from None
    if entry is not None and not entry.name.isidentifier():
        raise UserError(
            f"{path}: the file names the {family.name}, and {entry.name!r} is not a valid name; use letters, digits and '_'."
        )
    return entry


def _read(path: Path, module: str, family: Family, public: declared.Public | None = None) -> Entry | None:
    """Return the entry that a file declares: the class of the family that no other class in the file derives from."""
    kin = [one for one in declared.read(path, public) if one.derives_from(*family.base)]
    last = [one for one in kin if not any(other.derives_from(path, one.own.name) for other in kin)]
    if not last:
        return None
    if len(last) > 1:
        names = " and ".join(one.own.name for one in last)
        raise ValueError(
            f"line {last[1].own.line}: {names} are two {family.plural}; put each in its own file"
        )
    found, own = last[0], last[0].own
    if not own.is_dataclass:
        raise ValueError(
            f"line {own.line}: {own.name} is not {family.a} yet; write @dataclass(frozen=True) above it, or move the "
            "file elsewhere"
        )
    return Entry(entry_name(module), own.name, module, path, own.docstring, found.options, found.constants)
