"""Every command that writes may be killed before each of its operations on files; the next command goes on from there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import equal_bits, forked, graft_tensors, tune_words
from killing import assert_same, at_operation, contents, die, killed, moments, put_back, resume

from graftkit.recipe import schema as recipes
from graftkit.runs import folder as run_folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_compared")]

SHORT = ("train.steps=2", "train.checkpoint_every=1")


def ran(words: list[str]) -> None:
    from graftkit.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture
def empty(root) -> Path:
    """An empty folder that has the same path in all tests, as run folders know their path."""
    shutil.rmtree(root)
    root.mkdir()
    return root


@pytest.fixture(scope="module")
def words(short_bert, rows_folder, root) -> list[str]:
    return tune_words(short_bert, rows_folder, root / "run", *SHORT, method="head()")


@pytest.fixture(scope="module")
def whole(words, root, tmp_path_factory) -> Path:
    """The run that nothing stops."""
    ran(words)
    return Path(shutil.copytree(root / "run", tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def older(short_bert, rows_folder, root, tmp_path_factory) -> Path:
    """A finished run of another method that has been in the same folder."""
    ran([*tune_words(short_bert, rows_folder, root / "run", "train.steps=1"), "--overwrite"])
    return Path(shutil.copytree(root / "run", tmp_path_factory.mktemp("older") / "run"))


def overwritable(folder: Path) -> None:
    with run_folder.claimed(recipes.make({"model": "m", "data": {"train": "t"}, "out": str(folder)}), True):
        run_folder.clear(folder)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("power", [False, True])
def test_a_run(whole, words, empty, tmp_path, power):
    copies = moments(empty, words, tmp_path / "copies", power=power)
    assert len(copies) > 30
    for number, copy in enumerate(copies):
        put_back(copy, empty)
        run = empty / "run"
        if (run / "result.json").exists():
            assert contents(run / "graft") == contents(whole / "graft")
        if number % (8 if power else 4) and number < len(copies) - 3:
            overwritable(run)
        elif (run / "recipe.yaml").exists():
            resume(run)
            assert_same(run, whole)
            assert not list((run / "checkpoints").glob("step-*"))
        else:
            ran(words)


def test_a_run_that_replaces_another(whole, older, words, empty, tmp_path):
    shutil.copytree(older, empty / "run")
    copies = moments(empty, [*words, "--overwrite"], tmp_path / "copies")
    old = contents(older)
    begun = 0
    for number, copy in enumerate(copies):
        put_back(copy, empty)
        run = empty / "run"
        now = {name: content for name, content in contents(run).items() if name != ".lock"}
        if (run / "result.json").exists():
            assert now == old or contents(run / "graft") == contents(whole / "graft")
        if (run / "plan.json").exists() and not (run / "result.json").exists():
            begun += 1
            if begun % 10 == 1:  # of the old run or of the new one
                resume(run)
                left = older if "lora" in (run / "recipe.yaml").read_text() else whole
                assert equal_bits(graft_tensors(run), graft_tensors(left))
                continue
        if number % 10:
            overwritable(run)
        else:
            ran([*words, "--overwrite"])
            assert_same(run, whole)
    assert begun > 20


def test_a_resumed_run(whole, words, empty, tmp_path):
    killed("after-rename", 1, words)
    copies = moments(empty, ["tune", "--resume", str(empty / "run")], tmp_path / "copies")
    for copy in copies[::8]:
        put_back(copy, empty)
        resume(empty / "run")
        assert_same(empty / "run", whole)


@pytest.mark.parametrize("exists", [False, True])
def test_a_merge(finished, empty, tmp_path, exists):
    out = empty / "merged"
    words = ["merge", str(finished), str(finished), "--out", str(out)]
    ran(words)
    right = contents(out)
    shutil.rmtree(out)
    if exists:
        ran([*words, "--weights", "0.9,0.4"])
        words.append("--overwrite")
    before = contents(out) if exists else {}
    copies = moments(empty, words, tmp_path / "copies")
    assert len(copies) > 10
    for copy in copies:
        put_back(copy, empty)
        now = {
            name: content
            for name, content in (contents(out) if out.exists() else {}).items()
            if name != ".lock"
        }
        for opener in {"graft.json", "adapter_config.json"} & set(
            now
        ):  # both name what is in the tensor file
            both = (opener, "adapter_model.safetensors")
            assert [now[name] for name in both] in [
                [of[name] for name in both] for of in (before, right) if of
            ]
        ran([*words, *([] if exists else ["--overwrite"])])
        assert contents(out) == right and [path.name for path in empty.iterdir()] == ["merged"]


@pytest.mark.parametrize("exists", [False, True])
def test_an_export(finished, empty, tmp_path, exists):
    out = empty / "model"
    words = ["export", str(finished), "--to", str(out)]
    ran(words)
    right = contents(out)
    if exists:
        other = tmp_path / "other"
        shutil.copytree(finished, other)
        weights = next((other / "graft").glob("adapter_model.safetensors"))
        from graftkit.files import read_tensors, write_tensors

        tensors, _ = read_tensors(weights)
        (other / "graft" / "graft.json").write_text(
            json.dumps(json.loads((other / "graft" / "graft.json").read_text()) | {"checksums": {}})
        )
        write_tensors(weights, {name: tensor * 1.1 for name, tensor in tensors.items()})
        (other / "graft" / "confidence.safetensors").unlink()  # which was fitted for the weights before
        ran(["export", other, "--to", out, "--overwrite"])
        words.append("--overwrite")
    else:
        shutil.rmtree(out)
    before = contents(out) if exists else {}
    copies = moments(empty, words, tmp_path / "copies")
    for number, copy in enumerate(copies):
        put_back(copy, empty)
        now = contents(out) if out.exists() else {}
        if "config.json" in now:
            models = [found.get("model.safetensors") for found in (before, right)]
            assert now["model.safetensors"] in models
            assert exists or now["model.safetensors"] == right["model.safetensors"]
            assert now["config.json"] == right["config.json"]
        if number % 9 == 0 or number > len(copies) - 3:
            ran([*words, *([] if exists else ["--overwrite"])])
            assert contents(out) == right and [path.name for path in empty.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.parquet"])
def test_answers(finished, rows_folder, empty, tmp_path, name):
    out = empty / name
    words = ["predict", str(finished), "--data", str(rows_folder / "eval.csv"), "--out", str(out)]
    ran(words)
    right = out.read_bytes()
    out.write_text("earlier answers")
    words.append("--overwrite")
    for copy in moments(empty, words, tmp_path / "copies"):
        put_back(copy, empty)
        assert out.read_bytes() in (b"earlier answers", right)
        ran(words)
        assert out.read_bytes() == right and [path.name for path in empty.iterdir()] == [name]


def test_what_only_reads_writes_nothing(finished, short_bert, rows_folder, empty, tmp_path):
    shutil.copytree(finished, empty / "run")
    data = str(rows_folder / "eval.csv")
    for number, words in enumerate(
        (
            ["predict", str(empty / "run"), "a plum"],
            ["evaluate", str(empty / "run"), "--data", data],
            ["inspect", str(short_bert)],
            ["data", "check", "--train", data, "--model", str(short_bert), "--task", "classify"],
            ["tune", "--resume", str(empty / "run")],
        )
    ):
        copies = moments(empty, words, tmp_path / f"copies-{number}")
        assert all(set(contents(copy)) - {"run/.lock"} == set(contents(copies[0])) for copy in copies)


def test_it_is_a_kill(whole, words, empty, tmp_path):
    """What `moments` copies is what a process leaves that is killed there."""
    copies = moments(empty, words, tmp_path / "copies")
    shutil.rmtree(empty)
    empty.mkdir()

    def work():
        from graftkit.cli.main import main

        at_operation(20, empty, die)
        main(words)

    assert forked(work).status == -9
    left = set(contents(empty))
    assert any(left == set(contents(copy)) for copy in copies)
