"""The documentation names things that exist: commands, options, keys, files, names in Python."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import typer

import graftkit
from graftkit.cli import main as cli
from graftkit.recipe import schema as recipe
from graftkit.recipe import values
from graftkit.recipe.catalogue import entries

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


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


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _generate() -> ModuleType:
    return _script("generate")


def test_generated_pages_are_up_to_date() -> None:
    locked = re.search(r"^typer==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    if locked is None or version("typer") != locked[1]:
        pytest.skip("the pages show the help of the typer in constraints.txt; others word it differently")
    generate = _generate()
    for name in generate.PAGES:
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert generate.page(text) == text, f"docs/{name} is out of date; regenerate it with `make docs`"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid_recipes(path: Path) -> None:
    made = recipe.make(recipe.read(path), str(path))
    for data in (made.data.train, made.data.test):
        if data is not None and data.startswith("graftkit/"):  # others are not part of the project
            assert (ROOT / data).is_file()


@pytest.mark.parametrize("path", PAGES, ids=_id)
def test_yaml_blocks_are_valid_recipes(path: Path) -> None:
    for block in _blocks(path, "yaml"):
        recipe.make(values.parse(block), path.name)


@pytest.mark.parametrize("path", PAGES, ids=_id)
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


@pytest.mark.parametrize("path", PAGES, ids=_id)
def test_settings_in_text_are_keys_of_a_recipe(path: Path) -> None:
    named = re.findall(
        r"`((?:data|train)\.(?!csv|jsonl?\b|parquet)[a-z_]+)[`=:]", path.read_text(encoding="utf-8")
    )
    assert set(named) <= set(recipe.keys())


@pytest.mark.parametrize("path", PAGES, ids=_id)
def test_python_blocks_use_names_that_exist(path: Path) -> None:
    for block in _blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "graftkit":
                assert {name.name for name in node.names} <= set(dir(graftkit))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "graftkit":
                assert node.attr in dir(graftkit)


@pytest.mark.parametrize("path", PAGES, ids=_id)
def test_files_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose) if "://" not in link]
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


def test_the_overview_has_the_default_learning_rates() -> None:
    generate = _generate()
    rates = {name: generate.learning_rate(entry) for name, entry in entries("method").items()}
    assert rates["head"] == "0.005" and rates["freeze"] == "—"
    for name, entry in entries("method").items():
        assert (rates[name] != "—") == ("lr" in entry.options), (
            f"{name}: name the default in the help of `lr`"
        )


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_readme_links_each_figure_to_its_page() -> None:
    """Accuracies in the README are rows of docs/results.md; the speed-ups stand in docs/performance.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `.+` \| ([\d.]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    assert len(rows) > 3
    for accuracy, parameters in rows:
        assert re.search(rf"\| {accuracy} \|.*\| {parameters} \|", results), (accuracy, parameters)
    speed = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    named = re.findall(r"(\d\.\d+) times", text)
    assert named and all(re.search(rf"\| {re.escape(number)}\d* x \|", speed) for number in named)
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert re.search(r"\[(\d+ of \d+ pairs)\]", text)[1] in methods  # type: ignore[index]


@pytest.mark.slow
def test_the_site_builds() -> None:
    """Strictly: no page is left out of the navigation, and no link leads nowhere."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        built = Path(folder, "reference", "python.html").read_text(encoding="utf-8")
        assert "Fine-tune" in built  # from a docstring
        home = Path(folder, "index.html").read_text(encoding="utf-8")
        assert "fonts.googleapis" not in home and "cdn" not in home  # readable offline


def test_the_picture_shows_the_last_state_of_a_line_that_is_redrawn() -> None:
    printed = "Training\r\n\x1b[?25lstep 1\r\x1b[2Kstep 2\r\x1b[2Kdone\r\n\x1b[?25h\r\nResult\r\n"
    assert _script("picture").drawn(printed) == "Training\ndone\n\nResult"
    svg = (ROOT / "docs" / "images" / "run.svg").read_text(encoding="utf-8")
    assert svg.count("rows/s") == 1 and "https://cdnjs" not in svg
    assert all(word in svg for word in ("Found", "Plan", "Result"))
