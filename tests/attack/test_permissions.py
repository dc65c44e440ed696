"""Files and folders that the user may not read or write: one line each, whatever file it is."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import forked, make_rows, write_csv

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_compared")]

RUN = ["--task", "classify", "--method", "head()", "--out", "out", "train.epochs=1", "train.precision=fp32"]
# what is forbidden, the command, and what its error says; the first file is the model's
READ = [
    ("bert/model.safetensors", "tune", "bert/model.safetensors may not be read by this user: change its permissions"),
    ("bert/config.json", "tune", "bert/config.json may not be read by this user: change"),
    ("bert/tokenizer.json", "tune", "bert/tokenizer.json may not be read by this user: change"),
    ("bert/tokenizer_config.json", "tune", "bert/tokenizer_config.json may not be read by this user: change"),
    ("bert", "tune", "bert/config.json may not be read by this user"),
    ("train.csv", "tune", "train.csv may not be read by this user"),
    ("r.yaml", "recipe", "r.yaml' cannot be read: Permission denied"),
    ("run/recipe.yaml", "predict", "recipe.yaml' cannot be read: Permission denied"),
    ("run/graft/graft.json", "predict", "graft.json may not be read by this user: change"),
    ("run/graft/adapter_model.safetensors", "predict", "adapter_model.safetensors may not be read by this user: change"),
    ("run/graft", "predict", "graft.* may not be read"),
    ("run/result.json", "resume", "result.json may not be read by this user: change"),
    ("run/plan.json", "resume-unfinished", "plan.json may not be read by this user: change"),
    ("run/metrics.jsonl", "resume-unfinished", "metrics.jsonl cannot be read"),
    ("rows.csv", "predict-file", "rows.csv may not be read by this user"),
]  # fmt: skip
WRITE = [
    ("parent", "tune-into", "run folder '.*parent/out' cannot be written to: Permission denied"),
    (
        "parent",
        "predict-into",
        "answers.csv cannot be written: .* is not a folder that this user may write to",
    ),
    ("parent", "export-into", "parent/out' cannot be written to: Permission denied"),
    ("run", "overwrite", "run' cannot be written to: Permission denied"),
]
COMMANDS = {
    "tune": ["tune", "--model", "bert", "--train", "train.csv", *RUN],
    "recipe": ["tune", "r.yaml"],
    "predict": ["predict", "run", "the cat"],
    "predict-file": ["predict", "run", "--data", "rows.csv"],
    "resume": ["tune", "--resume", "run"],
    "resume-unfinished": ["tune", "--resume", "run"],
    "tune-into": ["tune", "--model", "bert", "--train", "train.csv", *RUN, "out=parent/out"],
    "predict-into": ["predict", "run", "--data", "train.csv", "--out", "parent/answers.csv"],
    "export-into": ["export", "run", "--to", "parent/out"],
    "overwrite": ["tune", "--model", "bert", "--train", "train.csv", *RUN, "out=run", "--overwrite"],
}


def as_ordinary_user() -> None:
    """Give up, in this process, what lets root read and write everything."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_bert) -> Path:
    from graftkit import tune

    root = tmp_path_factory.mktemp("permissions")
    shutil.copytree(tiny_bert, root / "bert")
    for name in ("train.csv", "rows.csv"):
        write_csv(root / name, make_rows(12, 1))
    (root / "r.yaml").write_text("model: bert\ndata: {train: train.csv}\n")
    (root / "parent").mkdir()
    tune(model=str(root / "bert"), task="classify", train=root / "train.csv", out=root / "run",
         method="lora(rank=2) + head()", settings={"train.epochs": 1, "train.precision": "fp32"})  # fmt: skip
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize(("name", "command", "says"), [*READ, *WRITE], ids=lambda value: str(value)[:40])
def test_one_line(name: str, command: str, says: str, place, tmp_path, monkeypatch) -> None:
    root = shutil.copytree(place, tmp_path / "copy")
    if command == "resume-unfinished":
        (root / "run" / "result.json").unlink()
    monkeypatch.chdir(root)
    forbidden, mode = root / name, 0o500 if (name, command, says) in WRITE else 0o000
    before = forbidden.stat().st_mode

    def work() -> None:
        from graftkit.cli.main import main

        as_ordinary_user()
        main(COMMANDS[command])

    forbidden.chmod(mode)
    try:
        done = forked(work)
    finally:
        forbidden.chmod(before)
    assert done.status == 1, done.out + done.err
    assert "Traceback" not in done.err
    assert re.search(f"^error: .*{says}", done.err, re.M), done.err
