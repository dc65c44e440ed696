"""Whatever shapes, paths and options can tell is said before weights are read, which may take minutes."""

from __future__ import annotations

import shutil

import pytest

from graftkit.backbone.load import _read_model as READ

pytestmark = pytest.mark.slow

TUNE = "tune --model MODEL --task classify --train train.csv --eval eval.csv --out out"


@pytest.fixture
def ask(command, tmp_path, tiny_bert, rows_folder, finished, monkeypatch):
    """Runs a command in a folder with rows and runs, where reading weights fails."""

    def read(*given, **more):
        raise AssertionError("weights were read")

    for name in ("train.csv", "eval.csv"):
        shutil.copy(rows_folder / name, tmp_path / name)
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr("graftkit.backbone.load._read_model", read)
    return lambda words: command(*words.replace("MODEL", str(tiny_bert)).split(" "))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (f"{TUNE} --method lora(sites='q_proj')", "'q_proj' matches nothing in"),
        (f"{TUNE} --method unfreeze('blocks[7]')", "'blocks[7]' matches nothing in"),
        (f"{TUNE} --method freeze('blocks[9]')+full()", "'blocks[9]' matches nothing in"),
        (f"{TUNE} data.max_length=1000", "takes at most 64 tokens"),
        (f"{TUNE} data.max_length=2", "there is no room for a text: it may have 2 tokens"),
        (f"{TUNE} --method prompt(tokens=63)", "there is no room for a text: it may have 1 token,"),
        (f"{TUNE} --method prompt(tokens=62)", "there is no room for a text: it may have 2 tokens"),
        (f"{TUNE} --method ptuning(tokens=64)", "leaves no room for a text"),
        (f"{TUNE} --method full() train.optimizer=galore(rank=10000)", "nothing would be projected"),
        (f"{TUNE} train.from=run --method lora(rank=8)", "train.from: the graft in"),
        ("tune --model MODEL --task generate --train t.jsonl --out out", "contain no trained head"),
        ("predict run --data nope.csv", "nope.csv does not exist"),
        ("predict run --data train.csv --option nope=1", "no option 'nope'"),
        ("predict run --data t.jsonl", "the text of t.jsonl could be"),
        ("predict run --data train.csv --out /proc/x.jsonl", "/proc/x.jsonl cannot be written"),
        ("predict run --data train.csv --out train.csv/x.jsonl", "train.csv/x.jsonl cannot be written"),
        ("evaluate run --data nope.csv", "nope.csv does not exist"),
        ("evaluate run --data t.jsonl", "label 'b' is not among"),
        (f"{TUNE[:-3]}/proc/x", "run folder '/proc/x' cannot be written to"),
        ("export run --to /proc/x", "'/proc/x' cannot be written to"),
        ("export run --to train.csv", "train.csv' is a file"),
    ],
)  # fmt: skip
def test_it_is_said_before_weights_are_read(ask, tmp_path, words, says):
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    done = ask(words)
    assert done.status == 1
    assert says in done.err and done.err.count("error: ") == 1, done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method", ["adapter()", "prompt(tokens=4)", "ptuning(tokens=4)", "prefix(tokens=4)", "new_tokens(['x1'])"]
)
@pytest.mark.sampled(2)
def test_what_never_folds_is_refused_by_its_method(command, ask, tmp_path, tiny_bert, monkeypatch, method):
    with monkeypatch.context() as real:
        real.setattr("graftkit.backbone.load._read_model", READ)
        words = (
            "--model",
            tiny_bert,
            "--train",
            "train.csv",
            "--method",
            method,
            "train.steps=1",
            "data.eval=0.1",
        )
        done = command("tune", *words, "--out", "own", "train.precision=fp32")
    assert done.status == 0, done.err
    assert "cannot be exported as a plain model: " in done.out
    done = ask("export own --to plain")
    assert done.status == 1 and "cannot be folded" in done.err
    assert not (tmp_path / "plain").exists()
