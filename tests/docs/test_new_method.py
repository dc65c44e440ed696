"""docs/new-method.md, followed to the letter: its file in a folder of one's own is a method like any other."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import forked

import graftkit
from graftkit.cli.main import main
from graftkit.errors import UserError

pytestmark = pytest.mark.sampled

IMPORTS = "from graftkit.methods.base import Method\n"
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "new-method.md"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder that holds the page's file and is named by the environment."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None and code[1].count("\n") < 100
    own = tmp_path / "own"
    own.mkdir()
    (own / "scale_shift.py").write_text(code[1], encoding="utf-8")
    monkeypatch.setenv("GRAFTKIT_METHODS", str(own))
    return own


def run(*words: str) -> SimpleNamespace:
    return forked(lambda: main(list(words)))


def test_the_command_line_knows_it(folder):
    assert "scale * y + shift" in run("tune", "--help").out
    shown = run("methods", "scale_shift").out
    assert "Parameters: 2 * out" in shown and "lr = None  learning rate; null means 0.01" in shown


@pytest.mark.slow
def test_plan_and_run(folder, tiny_bert, rows_folder, tmp_path):
    recipe = [f"model={tiny_bert}", "task=classify", f"data.train={rows_folder / 'train.csv'}"]
    recipe += ["method=scale_shift(sites='ffn') + head()", f"out={tmp_path / 'run'}", "train.steps=3"]
    done = run("plan", *recipe, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["groups"]["scale_shift"] > 0
    done = run("tune", *recipe, "--json")
    assert done.status == 0, done.err
    described = json.loads((tmp_path / "run" / "graft" / "graft.json").read_text(encoding="utf-8"))
    assert described["method"].startswith("scale_shift(sites='ffn')")
    assert run("predict", str(tmp_path / "run"), "a text", "--json").status == 0


@pytest.mark.slow
def test_it_passes_the_suite_on_every_kind_of_model(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    # one of each family of test_matrix.py, and those with modules of their own
    names = ("bert", "llama", "vit", "wav2vec2", "convnext", "gpt2", "t5", "mixtral", "transformer")
    chosen = " or ".join(f"scale_shift-{name}]" for name in names)
    words = ["-q", "-p", "no:cacheprovider", "-n", "0", "-k", chosen, "tests/methods/test_matrix.py"]
    monkeypatch.delitem(sys.modules, "test_matrix", raising=False)  # collected before the file was there
    done = forked(lambda: sys.exit(pytest.main([*words, "--rootdir", str(ROOT)])))
    assert done.status == 0, done.out[-3000:]
    assert "." * len(names) in done.out, done.out[-500:]


def test_in_python(folder):
    model = tiny.bare("bert")
    graft = graftkit.attach(model, graftkit.ScaleShift(sites="ffn"))
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    wanted = tiny.outputs(model)
    graft.fold()
    assert tiny.relative(tiny.outputs(model), wanted) < 1e-5


@pytest.mark.parametrize(
    "name,text,told",
    [
        ("lora", f"{IMPORTS}@dataclass\nclass LoRA(Method):\n    pass\n", "a method 'lora' already"),
        ("broken", "class (:\n", "line 1"),
        ("empty_byte", "a = 1\0\n", "null byte"),
        (
            "my-method",
            f"{IMPORTS}@dataclass\nclass M(Method):\n    pass\n",
            "'my-method' is not a valid name",
        ),
        (
            "clever",
            f"{IMPORTS}@dataclass\nclass C(Method):\n    x: int = option(1 + f(), 'h')\n",
            "line 4: '1 + f()' in option(...) is not a plain value",
        ),
        (
            "plain",
            f"{IMPORTS}class P(Method):\n    pass\n",
            "line 2: P is not a method yet; write @dataclass(frozen=True)",
        ),
        (
            "forgotten",
            "@dataclass\nclass F(Method):\n    pass\n",
            "line 2: 'Method' is not defined; import it",
        ),
        (
            "two",
            f"{IMPORTS}@dataclass\nclass A(Method):\n    pass\n@dataclass\nclass B(Method):\n    pass\n",
            "line 6: A and B are two methods; put each in its own file",
        ),
        (
            "half",
            f"{IMPORTS}class A(Method):\n    x: int = option(1, 'h')\n@dataclass\nclass B(A):\n    pass\n",
            "line 2: A declares options but is not a dataclass",
        ),
        (
            "assigned",
            "from graftkit import LoRA\n@dataclass\nclass A(LoRA):\n    rank = 4\n",
            "line 3: A assigns 'rank', an option of a base class; redeclare it as rank: int = option(...)",
        ),
        (
            "twisted",
            f"{IMPORTS}from graftkit import LoRA\n@dataclass\nclass A(Method, LoRA):\n    pass\n",
            "line 4: class A: Cannot create a consistent method resolution order",
        ),
    ],
)
def test_files_that_cannot_be(folder, name, text, told):
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    done = run("methods")
    assert done.status == 1 and told in done.err and f"{name}.py" in done.err
    assert "Traceback" not in done.err


def test_files_that_cannot_be_read(folder):
    (folder / "latin.py").write_bytes("# Größe\n".encode("latin-1"))
    done = run("methods")
    assert done.status == 1 and "latin.py cannot be read as a Python file" in done.err
    (folder / "latin.py").unlink()
    (folder / "folder.py").mkdir()
    done = run("methods")
    assert done.status == 1 and "folder.py cannot be read as a Python file" in done.err


def test_a_file_that_fails_when_it_is_imported(folder):
    text = f"{IMPORTS}import nothing_there\n@dataclass\nclass Failing(Method):\n    pass\n"
    (folder / "failing.py").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"failing.py cannot be imported .*nothing_there"):
        graftkit.attach(tiny.bare("bert"), "failing()")


def test_a_folder_that_is_none(monkeypatch):
    monkeypatch.setenv("GRAFTKIT_METHODS", "/nowhere/at/all")
    done = run("methods")
    assert done.status == 1 and "'/nowhere/at/all', which is not a folder" in done.err
