"""What the documentation says exists: commands, options, keys, files, methods and their learning rates."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

import graftkit
from graftkit.cli import main as cli
from graftkit.recipe import schema as recipe
from graftkit.recipe.catalogue import entries

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def _commands(path: Path) -> list[list[str]]:
    """Words of each `graftkit` command line in a page, in its blocks and in its text."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^graftkit .*$", text, re.MULTILINE)
    lines += [" ".join(line.split()) for line in re.findall(r"`(graftkit [a-z-][^`]*)`", text)]
    return [shlex.split(line, comments=True) for line in lines]


def _generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    generate = _generate()
    for name in generate.PAGES:
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert generate.page(text) == text, f"docs/{name} is old; write it anew with `make docs`"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid_recipes(path: Path) -> None:
    made = recipe.make(recipe.read(path), str(path))
    for data in (made.data.train, made.data.test):
        if data is not None and data.startswith("graftkit/"):  # others are not part of the project
            assert (ROOT / data).is_file()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_yaml_blocks_are_valid_recipes(path: Path) -> None:
    for block in _blocks(path, "yaml"):
        recipe.make(yaml.load(block, recipe._Loader), path.name)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_options_and_settings_exist(path: Path) -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for _, *words in _commands(path):
        if words[0] == "--help":
            continue
        assert words[0] in commands, f"{path.name}: graftkit {words[0]}"
        called = commands[words[0]]
        called = called.commands[words[1]] if hasattr(called, "commands") else called
        options = {name for parameter in called.params for name in parameter.opts} | {"--help"}
        for word in words[1:]:
            if word.startswith("--"):
                assert word in options, f"{path.name}: graftkit {words[0]} {word}"
            elif re.match(r"[a-z_.]+=", word) and words[0] in ("tune", "plan"):
                assert word.partition("=")[0] in set(recipe.keys()), f"{path.name}: {word}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_settings_in_text_are_keys_of_a_recipe(path: Path) -> None:
    named = re.findall(r"`((?:data|train)\.[a-z_]+)[`=:]", path.read_text(encoding="utf-8"))
    assert set(named) <= set(recipe.keys())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_blocks_use_names_that_exist(path: Path) -> None:
    for block in _blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "graftkit":
                assert {name.name for name in node.names} <= set(dir(graftkit))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "graftkit":
                assert node.attr in dir(graftkit)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
    named = re.findall(r"`((?:graftkit|tests|docs|bench|examples)/[\w./-]*)`", text)
    named = [name for name in named if "NAME" not in name]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", entries("method"))
def test_a_method_says_when_it_is_used_and_what_it_costs(name: str) -> None:
    entry = entries("method")[name]
    notes = _generate().notes_of(entry)
    assert notes["When"] and notes["Parameters"], (
        f"{entry.path}: see docs/generate.py for the form of a docstring"
    )
    assert "\n" not in entry.docstring.split("\n\n")[0], "the first paragraph is one line"
    own = {"freeze", "full", "head", "unfreeze"}  # as old as the field
    assert name in own or _generate().papers(entry), "name the paper and its year"


@pytest.mark.parametrize("name", entries("optimizer"))
def test_an_optimizer_says_when_it_is_used_and_what_it_keeps(name: str) -> None:
    entry = entries("optimizer")[name]
    notes = _generate().notes_of(entry)
    assert notes["When"] and notes["Memory"], (
        f"{entry.path}: see docs/generate.py for the form of a docstring"
    )
    assert "\n" not in entry.docstring.split("\n\n")[0], "the first paragraph is one line"
    assert _generate().papers(entry), "name the paper and its year"


def test_make_targets_named_in_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in PAGES:
        assert set(re.findall(r"\bmake (\w+)`", path.read_text(encoding="utf-8"))) <= targets


def test_readme_lists_every_method_with_its_learning_rate() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Methods\n")[2].partition("\n## ")[0]
    rows = {
        cells[1].strip().strip("`"): cells[-2].strip()
        for cells in (line.split("|") for line in table.splitlines() if line.startswith("| `"))
    }
    assert set(rows) == set(entries("method"))
    for name, entry in entries("method").items():
        help = entry.options["lr"].help if "lr" in entry.options else ""
        default = re.search(r"null means ([\d.]+)", help)
        assert rows[name] == (default[1] if default else ""), f"the default learning rate of {name}"
