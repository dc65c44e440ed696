"""A run whose backbone is no longer where it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import tune_words


@pytest.fixture(scope="module")
def moved(tiny_bert, rows_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A run, and the place to which its backbone has moved."""
    from graftkit.cli.main import main

    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(tiny_bert, folder / "model")
    with pytest.raises(SystemExit) as stop:
        main(tune_words(folder / "model", rows_folder, folder / "run", "train.steps=2"))
    assert stop.value.code == 0
    return folder / "run", (folder / "model").rename(folder / "elsewhere")


@pytest.mark.slow
def test_every_command_takes_the_new_place(command, moved, rows_folder, tmp_path):
    run, model = moved
    for words in (
        ["predict", run, "a plum"],
        ["predict", run, "--data", rows_folder / "eval.csv", "--out", tmp_path / "out.csv"],
        ["evaluate", run, "--data", rows_folder / "eval.csv"],
        ["export", run, "--to", tmp_path / "plain"],
    ):
        done = command(*words)
        assert done.status == 1 and "does not exist" in done.err and "--model FOLDER" in done.err
        assert command(*words, "--model", model).status == 0


def test_another_model_in_that_place_is_refused(command, moved, tiny_gpt2, tmp_path):
    done = command("predict", moved[0], "a plum", "--model", tiny_gpt2)
    assert done.status == 1 and "another backbone" in done.err
    done = command("predict", moved[0], "a plum", "--model", tmp_path / "none")
    assert done.status == 1 and "does not exist" in done.err and "has moved" not in done.err
