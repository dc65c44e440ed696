"""Exported models load without graftkit and give the run's answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import tune_words, without_graftkit

import graftkit

pytestmark = pytest.mark.slow

TEXTS = ["the old hammer", "a very new plum", "my cherry is here", "of the drill"]
PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    rows = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].max(0) for text in sys.argv[2:]]
print(json.dumps([[model.config.id2label[int(best)], float(p)] for p, best in rows]))
assert not sys.modules["graftkit"] and "peft" not in sys.modules
"""


@pytest.mark.slow
def test_own_head_loads_with_plain_transformers(command, finished, tmp_path):
    done = command("export", finished, "--to", tmp_path / "model", "--json")
    assert done.status == 0
    found = json.loads(done.out)
    assert found["native"] and found["same_answers"] and found["rows_compared"] == 64
    assert found["largest_difference"] < 1e-4 and "text-classification" in found["load_with"]
    answers = json.loads(without_graftkit(PLAIN, tmp_path / "model", *TEXTS))
    for (label, probability), ours in zip(answers, graftkit.Run(finished, {}).predict(TEXTS)):
        assert label == ours["label"] and probability == pytest.approx(ours["probability"], abs=1e-3)
    assert not list(tmp_path.glob("*.part"))
    assert (tmp_path / "model" / "model.safetensors").is_file()
    card, own = ((folder / "README.md").read_text() for folder in (tmp_path / "model", finished))
    assert card.partition("## Use")[0] == own.partition("## Use")[0] and found["load_with"] in card
    assert "Figures" in card and "graftkit predict" not in card


@pytest.mark.usefixtures("few_compared")
@pytest.mark.slow
@pytest.mark.parametrize("head", ["pooling='mean'", "pooling='attention'", "pooling='last', hidden=8"])
def test_pooled_head_comes_with_a_script(command, short_bert, rows_folder, tmp_path, head):
    method = f"lora(rank=2) + head({head})"
    run = tmp_path / "run"
    assert command(*tune_words(short_bert, rows_folder, run, "train.steps=4", method=method)).status == 0
    done = command("export", run, "--to", tmp_path / "model")
    assert done.status == 0 and "classifier.py" in done.out and "largest difference" in done.out
    out = without_graftkit(tmp_path / "model" / "classifier.py", *TEXTS)
    assert out.splitlines() == [f"{a['label']}\t{a['text']}" for a in graftkit.Run(run, {}).predict(TEXTS)]


@pytest.mark.usefixtures("few_compared")
@pytest.mark.slow
def test_the_script_reads_pairs_where_the_run_did(command, short_bert, rows_folder, tmp_path):
    run = tmp_path / "run"
    words = [
        "--train",
        rows_folder / "pairs.csv",
        "--method",
        "head(pooling='mean')",
        "--out",
        run,
        "train.steps=1",
    ]
    assert command("tune", "--model", short_bert, "data.eval=null", *words).status == 0
    assert command("export", run, "--to", tmp_path / "model").status == 0
    out = without_graftkit(tmp_path / "model" / "classifier.py", "the plum", "my saw")
    (answer,) = graftkit.Run(run, {}).predict([("the plum", "my saw")])
    assert out == f"{answer['label']}\tthe plum\tmy saw\n"


@pytest.mark.usefixtures("few_compared")
@pytest.mark.parametrize("method", ["adapter()", "prefix(tokens=2)"])
def test_what_cannot_be_folded_is_not_written(command, short_bert, rows_folder, tmp_path, method):
    run = tmp_path / "run"
    assert (
        command(
            *tune_words(short_bert, rows_folder, run, "train.steps=2", method=f"{method} + head()")
        ).status
        == 0
    )
    done = command("export", run, "--to", tmp_path / "model")
    assert done.status == 1 and "cannot be folded" in done.err and done.out == ""
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("*.part"))


@pytest.mark.usefixtures("few_compared")
@pytest.mark.parametrize(
    "method", ["full() + head()", "bitfit() + head()", "unfreeze('blocks[-1:]') + head()"]
)
def test_trained_base_weights_are_exported(command, short_bert, rows_folder, tmp_path, method):
    run = tmp_path / "run"
    assert command(*tune_words(short_bert, rows_folder, run, "train.steps=4", method=method)).status == 0
    found = json.loads(command("export", run, "--to", tmp_path / "model", "--json").out)
    assert found["same_answers"] and found["largest_difference"] < 1e-4


def test_pairs_and_rows_that_have_gone(command, short_bert, rows_folder, tmp_path):
    rows = Path(shutil.copy(rows_folder / "pairs.csv", tmp_path / "p.csv"))
    words = tune_words(
        short_bert, rows_folder, tmp_path / "run", "train.steps=2", "--train", str(rows), "--eval", "0.2"
    )
    assert command(*words).status == 0
    assert json.loads(command("export", tmp_path / "run", "--to", "a", "--json").out)["rows_compared"] == 64
    rows.unlink()
    found = json.loads(command("export", tmp_path / "run", "--to", "b", "--json").out)
    assert found["rows_compared"] == 2 and found["rows_real"] is False
    assert "made-up rows" in command("export", tmp_path / "run", "--to", "c").out


def test_evaluation_rows_where_the_training_rows_have_gone(command, short_bert, rows_folder, tmp_path):
    rows = Path(shutil.copy(rows_folder / "train.csv", tmp_path / "t.csv"))
    words = tune_words(short_bert, rows_folder, tmp_path / "run", "train.steps=2", "--train", str(rows))
    assert command(*words).status == 0
    rows.unlink()
    found = json.loads(command("export", tmp_path / "run", "--to", "m", "--json").out)
    assert found["rows_compared"] == 40 and found["rows_real"] is True


@pytest.mark.usefixtures("few_compared")
def test_a_folder_that_exists(command, finished, tiny_bert, tmp_path):
    (tmp_path / "mine").mkdir()
    shutil.copy(tiny_bert / "config.json", tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("x")
    for more in ([], ["--overwrite"]):
        done = command("export", finished, "--to", "mine", *more)
        assert done.status == 1 and "not part of an exported model (config.json, notes.txt)" in done.err
    assert command("export", finished, "--to", "m").status == 0
    assert "--overwrite" in command("export", finished, "--to", "m").err
    assert command("export", finished, "--to", "m", "--overwrite").status == 0
    (tmp_path / "m" / "deeper").mkdir()
    (tmp_path / "m" / "deeper" / "notes.txt").write_text("x")
    done = command("export", finished, "--to", "m", "--overwrite")
    assert done.status == 1 and "deeper" in done.err and (tmp_path / "m" / "deeper" / "notes.txt").exists()
    before = (tiny_bert / "model.safetensors").read_bytes()
    done = command("export", finished, "--to", tiny_bert, "--overwrite")
    assert done.status == 1 and "not part of an exported model" in done.err
    assert (tiny_bert / "model.safetensors").read_bytes() == before
    for to in (finished, finished.parent):
        done = command("export", finished, "--to", to, "--overwrite")
        assert done.status == 1 and "the run itself" in done.err


@pytest.mark.usefixtures("few_compared")
def test_an_export_is_not_written_over_the_model_it_came_from(command, finished, rows_folder, tmp_path):
    assert command("export", finished, "--to", "m").status == 0
    words = tune_words(tmp_path / "m", rows_folder, tmp_path / "run", "train.steps=2", method="head()")
    assert command(*words).status == 0
    done = command("export", tmp_path / "run", "--to", "m", "--overwrite")
    assert done.status == 1 and "started from" in done.err


@pytest.mark.usefixtures("few_compared")
@pytest.mark.slow
def test_the_present_folder_a_link_and_a_file(command, finished, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for to in ("file", "file/sub"):
        done = command("export", finished, "--to", to)
        assert done.status == 1 and "is a file" in done.err
    (tmp_path / "loop").symlink_to("loop")
    assert command("export", finished, "--to", "loop").status == 1
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert command("export", finished, "--to", "link").status == 0
    assert command("export", finished, "--to", "link", "--overwrite").status == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert command("export", finished, "--to", ".").status == 0
    assert command("export", finished, "--to", ".", "--overwrite").status == 0
    assert Path("config.json").is_file() and not list(tmp_path.rglob("*.part"))
