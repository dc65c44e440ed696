"""One folder has one writer: runs, resumed runs, exports and merges that come at the same time."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import forked, make_rows, tune_words, write_csv

import graftkit
from graftkit.claims import LOCK, UNSUPPORTED, claimed, holder
from graftkit.errors import Note, UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_compared")]

HOLD = "import sys, time; from pathlib import Path; from graftkit.claims import claimed\n"
HOLD += "with claimed(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holding():
    """`holding(folder)`: another process that holds a folder until it is killed."""
    started = []

    def hold(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_has_one_holder(tmp_path):
    folder = tmp_path / "a" / "b"
    with claimed(folder):
        assert str(os.getpid()) in str(holder(folder))
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on "), claimed(folder):
            pass
        assert holder(folder) is not None, "who is refused must not free it"
    assert not (tmp_path / "a").exists(), "nothing was written, so nothing is left"
    with claimed(folder):
        (folder / "x").write_text("")
    assert [path.name for path in folder.iterdir()] == ["x"] and holder(folder) is None


def test_a_lock_dies_with_its_process(tmp_path, holding):
    process = holding(tmp_path / "run")
    with pytest.raises(UserError, match=f"process {process.pid} on "), claimed(tmp_path / "run"):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with claimed(tmp_path / "run"):
        pass


@pytest.mark.parametrize("code", UNSUPPORTED)
def test_a_file_system_without_locks(tmp_path, holding, monkeypatch, code):
    """The name in the lock decides."""

    def flock(*given):
        raise OSError(code, os.strerror(code))

    process = holding(tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=f"process {process.pid} on "), claimed(tmp_path / "run"):
        pass
    process.kill()
    process.wait()
    with claimed(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / LOCK).read_text()
    (tmp_path / "run" / LOCK).write_text("process 1 on another-machine")
    with pytest.raises(UserError, match=r"another-machine.*remove .*\.lock"), claimed(tmp_path / "run"):
        pass
    (tmp_path / "run" / LOCK).write_text("")  # of a process that was killed before it wrote its name
    with claimed(tmp_path / "run"):
        pass


def test_what_a_killed_process_built_beside_a_folder_is_removed(tmp_path):
    for name in ("out.123.part", "out.x.part", "other.123.part", "out.123.part.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    with (
        pytest.warns(Note, match=r"removed what a killed process had left: .*out\.123\.part\.$"),
        claimed(tmp_path / "out"),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other.123.part",
        "out.123.part.txt",
        "out.x.part",
    ]


def test_a_command_says_what_it_removed(command, finished, tmp_path):
    (tmp_path / "merged.77.part").mkdir()
    done = command("merge", finished, finished, "--out", tmp_path / "merged")
    assert done.status == 0 and re.search(
        "^note: removed what a killed process had left: .*merged.77.part.$", done.err, re.M
    )
    assert not (tmp_path / "merged.77.part").exists()


@pytest.mark.slow
def test_a_run_folder_that_another_process_has_claimed(command, tiny_bert, rows_folder, tmp_path, holding):
    process = holding(tmp_path / "run")
    words = tune_words(tiny_bert, rows_folder, tmp_path / "run", "train.steps=2")
    for more in ([], ["--overwrite"]):
        done = command(*words, *more)
        assert done.status == 1 and f"in use by process {process.pid}" in done.err
    process.kill()
    process.wait()
    assert command(*words).status == 0, "what a killed process leaves is no run"
    process = holding(tmp_path / "run")
    done = command(*words)
    assert done.status == 1 and "exists" in done.err and f"process {process.pid}" in done.err
    assert command("tune", "--resume", tmp_path / "run").status == 0  # finished: nothing is written
    (tmp_path / "run" / "result.json").unlink()
    done = command("tune", "--resume", tmp_path / "run")
    assert done.status == 1 and f"in use by process {process.pid}" in done.err


def test_the_folder_is_claimed_before_rows_and_model_are_loaded(
    tiny_bert, rows_folder, tmp_path, monkeypatch
):
    import graftkit.runs.tune as module

    seen = []
    plain = module.prepare_rows

    def prepare_rows(*given):
        seen.append(holder(tmp_path / "run"))
        return plain(*given)

    monkeypatch.setattr(module, "prepare_rows", prepare_rows)
    graftkit.tune(
        model=tiny_bert, train=rows_folder / "train.csv", eval=None, method="head()", out=tmp_path / "run",
        settings={"train.steps": 1, "train.precision": "fp32"},
    )  # fmt: skip
    assert seen[0] is not None and str(os.getpid()) in seen[0]


@pytest.mark.parametrize("out", ["run", None, "deep/er/run"])
def test_a_start_that_fails_leaves_no_folder(command, tiny_bert, tmp_path, out):
    path = write_csv(tmp_path / "t.csv", [*make_rows(3), {"text": "", "label": "tool"}])
    named = [] if out is None else ["--out", out]
    assert command("tune", "--model", tiny_bert, "--train", path, *named).status == 1
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_runs_of_one_second_have_folders_of_their_own(tiny_bert, rows_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    with claimed(
        tmp_path / "runs" / "classify-20260101-000000"
    ):  # by a run that has not written anything yet
        run = graftkit.tune(
            model=tiny_bert, train=rows_folder / "train.csv", eval=None, method="head()",
            settings={"train.steps": 1, "train.precision": "fp32"},
        )  # fmt: skip
    assert run.path.name == "classify-20260101-000000-2"


@pytest.mark.slow
def test_an_export_and_a_merge_hold_their_folder(command, finished, tmp_path, holding):
    process = holding(tmp_path / "out")
    commands = (["export", finished, "--to"], ["merge", finished, finished, "--out"])
    for words in commands:
        done = command(*words, tmp_path / "out")
        assert done.status == 1 and f"in use by process {process.pid}" in done.err
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]
    answers = holding(tmp_path / "a.jsonl.part")
    done = command("predict", finished, "a plum", "--out", "a.jsonl")
    assert done.status == 1 and f"in use by process {answers.pid}" in done.err
    answers.kill()
    answers.wait()
    assert command("predict", finished, "a plum", "--out", "a.jsonl").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
    process.kill()
    process.wait()
    for words in commands:
        assert command(*words, tmp_path / "out").status == (0 if words[0] == "export" else 1)
        assert not (tmp_path / "out" / LOCK).exists()
        assert (tmp_path / "out" / "config.json").exists()


def test_a_killed_start_can_be_started_again(tiny_bert, rows_folder, tmp_path):
    from graftkit.cli.main import main

    words = tune_words(tiny_bert, rows_folder, tmp_path / "run", "train.steps=1")

    def dies():
        import graftkit.runs.tune as module

        module.prepare_rows = lambda *given: os.kill(os.getpid(), 9)
        main(words)

    assert forked(dies).status == -9 and (tmp_path / "run" / LOCK).exists()
    assert forked(lambda: main(words)).status == 0
    assert not (tmp_path / "run" / LOCK).exists()
