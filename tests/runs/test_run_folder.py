"""Run folders: which are replaced, which are refused, and what is said of one that is broken or unfinished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import equal_bits, forked, graft_tensors, make_rows, tune_words, write_csv


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_run_folder_that_exists(command, tiny_bert, rows_folder, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = content(folder)
    words = tune_words(tiny_bert, rows_folder, folder, "train.steps=2")
    done = command(*words)
    assert done.status == 1 and "--overwrite" in done.err and "--resume" in done.err
    assert content(folder) == before
    bad = command(*words, "--overwrite", "--method", "lora(sites='quary')")
    assert bad.status == 1 and content(folder) == before, "a mistake must not cost the old run"
    assert command(*words, "--overwrite").status == 0
    assert json.loads((folder / "result.json").read_text())["steps"] == 2


def test_a_folder_with_other_files_is_never_replaced(command, tiny_bert, rows_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    written(tmp_path / "mine" / "thesis.txt", "years of work")
    for more in ([], ["--overwrite"]):
        done = command(*tune_words(tiny_bert, rows_folder, tmp_path / "mine", *more))
        assert done.status == 1 and "not a run's" in done.err
    assert content(tmp_path / "mine") == {str(tmp_path / "mine" / "thesis.txt"): b"years of work"}


def test_only_what_a_run_wrote_is_replaced(command, tiny_bert, rows_folder, finished, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    written(project / "recipe.yaml", "model: m")
    words = tune_words(tiny_bert, rows_folder, project, "train.steps=2")
    for more in (
        [],
        ["--overwrite"],
    ):  # a recipe that a person wrote is no run, nor is a run with a thesis in it
        done = command(*words, *more)
        assert done.status == 1 and "not a run's (recipe.yaml)" in done.err and "--overwrite" not in done.err
    shutil.copytree(finished, project, dirs_exist_ok=True)
    written(project / "thesis.txt", "years of work")
    before = content(project)
    done = command(*words, "--overwrite")
    assert done.status == 1 and "thesis.txt" in done.err and content(project) == before


@pytest.mark.slow
def test_a_run_folder_that_is_a_link(command, tiny_bert, rows_folder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    words = tune_words(tiny_bert, rows_folder, tmp_path / "link", "train.steps=2")
    assert command(*words).status == 0
    assert command(*words, "--overwrite").status == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "result.json").is_file()


@pytest.mark.slow
def test_a_run_that_was_killed_at_once_is_replaced(command, tiny_bert, rows_folder, tmp_path):
    words = tune_words(tiny_bert, rows_folder, tmp_path / "run", "train.steps=2")
    assert command(*words).status == 0
    for path in (tmp_path / "run").iterdir():
        if path.name != "recipe.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    written(tmp_path / "run" / "plan.json.123.part", "{")
    assert "--overwrite" in command(*words).err
    assert command(*words, "--overwrite").status == 0


def test_run_folder_that_cannot_be_made(command, tiny_bert, rows_folder, tmp_path):
    written(tmp_path / "file", "x")
    done = command(*tune_words(tiny_bert, rows_folder, tmp_path / "file"))
    assert done.status == 1 and "is a file" in done.err
    done = command(*tune_words(tiny_bert, rows_folder, tmp_path / "file" / "run"))
    assert done.status == 1 and "cannot be written" in done.err
    assert (tmp_path / "file").read_text() == "x"


def test_resume_of_what_is_no_run(command, tmp_path):
    done = command("tune", "--resume", tmp_path / "none")
    assert done.status == 1 and "does not exist" in done.err
    done = command("tune", "--resume", tmp_path)
    assert done.status == 1 and "not a run folder" in done.err


def test_resume_of_a_finished_run_gives_its_result(command, finished):
    before = content(finished)
    done = command("tune", "--resume", finished, "--json")
    assert done.status == 0 and "already finished" in done.err
    assert json.loads(done.out) == json.loads((finished / "result.json").read_text())
    assert content(finished) == before


@pytest.mark.parametrize("more", [["train.epochs=9"], ["--method", "head()"], ["--overwrite"], ["r.yaml"]])
def test_resume_takes_no_other_options(command, finished, more):
    done = command("tune", "--resume", finished, *more)
    assert done.status == 1 and "no other options" in done.err


def test_a_run_that_is_not_finished_cannot_answer(command, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "result.json").unlink()
    for words in (
        ["predict", folder, "a plum"],
        ["evaluate", folder, "--data", "x.csv"],
        ["export", folder, "--to", "m"],
    ):
        done = command(*words)
        assert done.status == 1 and "not finished" in done.err and "--resume" in done.err
    for words in (["predict", tmp_path / "none", "a plum"], ["predict", tmp_path, "a plum"]):
        assert command(*words).status == 1


def test_a_graft_that_is_broken(command, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    tensors = next((folder / "graft").glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-7])
    done = command("predict", folder, "a plum")
    assert done.status == 1 and tensors.name in done.err and "broken or cut short" in done.err


def test_evaluate_and_predict_on_bad_rows(command, finished, tmp_path):
    path = write_csv(tmp_path / "t.csv", [*make_rows(3), {"text": "", "label": "tool"}])
    for name in ("evaluate", "predict"):
        done = command(name, finished, "--data", path)
        assert done.status == 1 and "line 5" in done.err and "'text' is empty" in done.err
    assert command("predict", finished, "").status == 1
    assert command("evaluate", finished, "--data", tmp_path / "none.csv").status == 1


@pytest.mark.slow
def test_disk_full_while_writing_a_checkpoint(command, tiny_bert, rows_folder, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    more = ("train.checkpoint_every=2", "train.steps=8", "train.evaluate_every=end")

    def work():
        import resource

        from graftkit.cli.main import main
        from graftkit.runs import monitor as watch

        plain = watch.Watch.checkpoint

        def checkpoint(self):
            if self.loop.step >= 4:  # from here on no file may grow beyond 4 kB, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            plain(self)

        watch.Watch.checkpoint = checkpoint
        main(tune_words(tiny_bert, rows_folder, run, *more))

    full = forked(work)
    assert full.status == 1 and "Traceback" not in full.err
    assert "cannot be written" in full.err and f"--resume {run}" in full.err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002.safetensors"]
    resumed = command("tune", "--resume", run)
    assert resumed.status == 0 and "resumed at step 2 of 8" in resumed.out
    assert command(*tune_words(tiny_bert, rows_folder, whole, *more)).status == 0
    assert equal_bits(graft_tensors(run), graft_tensors(whole))
