"""A disk that is full, wherever it is noticed, is one error, and leaves everything as it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import forked, tune_words
from killing import at_operation, contents

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_compared")]

UMASK = 0o027


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory) -> Path:
    import graftkit

    out = tmp_path_factory.mktemp("exported") / "model"
    graftkit.Run(finished, {}).export(out)
    return out


def main(words: list[object]) -> None:
    from graftkit.cli.main import main

    main([str(word) for word in words])


def limited(words: list[object], most: int):
    """Run a command in a process whose files may not grow beyond `most` bytes, as on a full disk."""

    def work():
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        main(words)

    return forked(work)


def commands(finished: Path, rows: Path, place: Path) -> dict[str, list[object]]:
    return {
        "export": ["export", finished, "--to", place / "model", "--overwrite"],
        "merge": ["merge", finished, finished, "--out", place / "merged", "--overwrite"],
        "predict": [
            "predict",
            finished,
            "--data",
            rows / "train.csv",
            "--out",
            place / "a.jsonl",
            "--overwrite",
        ],
        "parquet": [
            "predict",
            finished,
            "--data",
            rows / "train.csv",
            "--out",
            place / "a.parquet",
            "--overwrite",
        ],
    }


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("export", 2_000),
        ("export", 60_000),
        ("merge", 2_000),
        ("merge", 9_000),
        ("predict", 2_000),
        ("parquet", 1_500),
    ],
)
def test_a_full_disk(finished, exported, rows_folder, tmp_path, name, most, exists):
    if exists:
        shutil.copytree(exported, tmp_path / "model")
        shutil.copytree(finished / "graft", tmp_path / "merged")
        for answers in ("a.jsonl", "a.parquet"):
            (tmp_path / answers).write_text("earlier answers")
    before = contents(tmp_path)
    full = limited(commands(finished, rows_folder, tmp_path)[name], most)
    assert full.status == 1 and "Traceback" not in full.err, full.err
    assert full.err.count("error: ") == 1 and "cannot be written" in full.err, full.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("most", [1_000, 4_000])
def test_a_full_disk_when_a_run_begins_or_ends(short_bert, rows_folder, tmp_path, command, most):
    words = tune_words(short_bert, rows_folder, tmp_path / "run", "train.steps=2", method="head()")
    full = limited(words, most)
    assert full.status == 1 and "Traceback" not in full.err and full.err.count("error: ") == 1, full.err
    assert not list(tmp_path.rglob("*.part"))
    again = ["tune", "--resume", tmp_path / "run"] if (tmp_path / "run" / "recipe.yaml").exists() else words
    assert command(*again).status == 0


@pytest.mark.parametrize("number", range(0, 30, 8))
def test_an_operation_that_is_refused(finished, exported, tmp_path, number):
    """Any operation on files of an export may fail; whatever fails, the next export is complete."""
    shutil.copytree(exported, tmp_path / "model")

    def refuse():
        raise OSError(28, "No space left on device")

    def work():
        at_operation(number + 3, tmp_path, refuse)
        main(["export", finished, "--to", tmp_path / "model", "--overwrite"])

    full = forked(work)
    assert "Traceback" not in full.err, full.err
    assert full.status == 0 or full.err.count("error: ") == 1, full.err
    if full.status:
        done = forked(lambda: main(["export", finished, "--to", tmp_path / "model", "--overwrite"]))
        assert done.status == 0, done.err
    left, right = ({**contents(path), "README.md": None} for path in (tmp_path / "model", exported))
    assert left == right


def test_files_have_the_rights_of_new_files(short_bert, rows_folder, tmp_path):
    """Whichever library writes them."""
    run = tmp_path / "run"

    def work():
        import signal

        from graftkit.engine import checkpoint

        os.umask(UMASK)
        plain = checkpoint.save
        checkpoint.save = lambda *given: (plain(*given), os.kill(os.getpid(), signal.SIGTERM))[0]
        words = tune_words(short_bert, rows_folder, run, "train.steps=2", "train.checkpoint_every=1")
        for command in (
            words,
            ["tune", "--resume", run],
            ["export", run, "--to", tmp_path / "model"],
            ["merge", run, run, "--out", tmp_path / "merged"],
            ["predict", run, "--data", rows_folder / "eval.csv", "--out", tmp_path / "a.parquet"],
        ):
            try:
                main(command)
            except SystemExit as stop:
                assert stop.code == (130 if command is words else 0)
            rights(tmp_path)
            checkpoint.save = plain

    done = forked(work)
    assert done.status == 0, done.err
    assert len(rights(tmp_path)) > 15


def rights(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~UMASK)}, files
    return files
