"""`graftkit explain`: what it says of finished runs, the files it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import KINDS, make_rows, write_csv

import graftkit
from graftkit.errors import UserError
from graftkit.runs.explain import _refuse
from graftkit.runs.predict import Opened
from graftkit.runs.prepare import make_task

TEXT = "my new hammer was here"


def copy_of(run: Path, out: Path, **changes: str) -> Path:
    """A copy of a run whose recipe has other texts."""
    shutil.copytree(run, out)
    recipe = (out / "recipe.yaml").read_text()
    for old, new in changes.values():
        assert old in recipe
        recipe = recipe.replace(old, new)
    (out / "recipe.yaml").write_text(recipe)
    return out


def test_the_word_that_decides_comes_first(finished, command, rows_folder):
    done = command("explain", finished, TEXT, "--json", "--html", "why.html")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert (
        found["label"] == "tool" and found["probability"] > 0.9 and found["method"] == "integrated_gradients"
    )
    parts = found["parts"]
    assert [part["text"] for part in parts] == TEXT.split()
    assert all(TEXT[part["start"] : part["end"]] == part["text"] for part in parts)
    assert max(parts, key=lambda part: part["score"])["text"] == "hammer"
    assert sum(abs(part["score"]) for part in parts) == pytest.approx(1, abs=1e-4)
    assert found["completeness"]["error"] < 0.01
    deletion = found["deletion"]
    assert deletion["holds"] and deletion["without_top"] < 0.5 < deletion["without_random"]
    assert deletion["label_without_top"] == "fruit"
    lines = (rows_folder / "train.csv").read_text().splitlines()
    assert len(found["nearest"]) == 3
    for row in found["nearest"]:
        assert lines[row["line"] - 1] == f"{row['text']},{row['label']}" and row["label"] == "tool"
        assert row["file"] == str(rows_folder / "train.csv") and 0.5 < row["similarity"] <= 1
    assert found["notes"] == [] and found["explanations"][0]["parts"] == parts
    page = Path("why.html").read_text()
    assert "<script" not in page and '<mark class="c1" style="--v:1.00"' in page and ">hammer</mark>" in page
    again = graftkit.explain(finished, [TEXT])
    assert again == found["explanations"]


def test_in_the_terminal_and_for_rows_of_a_file(finished, command, rows_folder):
    done = command("explain", finished, "--data", rows_folder / "eval.csv", "--rows", "3,5", "--nearest", 0,
                   "--label", "fruit", "--method", "gradient-x-input")  # fmt: skip
    assert done.status == 0, done.err
    lines = (rows_folder / "eval.csv").read_text().splitlines()
    assert all(lines[number - 1].rpartition(",")[0] in done.out for number in (3, 5))
    assert done.out.count("(gradient x input)") == 2 and done.out.count("check") == 2
    assert done.out.count("fruit 0.") == 2 and "\x1b" not in done.out


def test_training_rows_that_are_gone_or_changed_are_told(finished, rows_folder, tmp_path):
    train = str(rows_folder / "train.csv")
    gone = copy_of(finished, tmp_path / "gone", train=(train, str(tmp_path / "none.csv")))
    found = graftkit.explain(gone, [TEXT])[0]
    assert found["nearest"] == [] and "no training rows are shown: " in found["notes"][0]
    write_csv(tmp_path / "other.csv", make_rows(20, 9))
    changed = copy_of(finished, tmp_path / "changed", train=(train, str(tmp_path / "other.csv")))
    found = graftkit.explain(changed, [TEXT])[0]
    assert (
        len(found["nearest"]) == 3 and "other.csv has changed since the run was trained" in found["notes"][0]
    )


REFUSED = {
    "an empty text": (("--nearest", "0", " "), "text 1 of 1 is empty"),
    "an unknown label": ((TEXT, "--label", "tols"), "label 'tols' is not among the 2 labels .* Did you mean 'tool'"),
    "a method for images": ((TEXT, "--method", "grad_cam"), "grad_cam explains images by feature maps, but .* reads tokens"),
    "an unknown method": ((TEXT, "--method", "lime"), "method 'lime' is unknown"),
    "a word": ((TEXT, "--word", "my"), "classify.. has one answer for a whole row"),
    "too many rows": (("--data", "many.csv"), "60 rows are too many to explain at once; choose at most 50"),
    "no row": (("--data", "many.csv", "--rows", "2,99"), "line 99 of .*many.csv is no row of it; .* lines 2 to 61"),
    "rows that are no numbers": (("--data", "many.csv", "--rows", "2-4"), "--rows is '2-4'; write row numbers"),
    "rows of texts": ((TEXT, "--rows", "2"), "rows are chosen from a file, but texts are given"),
    "texts and a file": ((TEXT, "--data", "many.csv"), "either texts or --data FILE"),
    "an overlay of a text": ((TEXT, "--overlay", "a.png"), "an overlay shows one image or sound"),
    "a text that is no Unicode": (("my \udcff card",), "item 1 of 1 is not valid Unicode"),
    "an overlay of another kind": ((TEXT, "--overlay", "a.jpg"), "is a PNG file"),
}  # fmt: skip


def test_what_is_refused(finished, command, tmp_path):
    import re

    write_csv(tmp_path / "many.csv", make_rows(60))
    for what, (words, says) in REFUSED.items():
        done = command("explain", finished, *words)
        assert done.status == 1 and re.search(says, done.err), f"{what}: {done.err}"
        assert done.err.count("error: ") == 1
    unfinished = copy_of(finished, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    assert "is not finished" in command("explain", unfinished, TEXT).err
    for name in ("choice", "generate"):
        run = Opened(tmp_path, None, make_task(f"{name}()"), {"labels": []}, False)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"answers of {name}\(\) cannot be explained"):
            _refuse(run, None, None)


def test_pairs_several_labels_and_numbers(tiny_bert, rows_folder, tmp_path):
    """Kinds of answers whose log-odds are computed otherwise, barely trained."""
    quick = {"train.precision": "fp32", "train.steps": 2, "train.batch_size": 8}
    rows = [
        {**row, "label": ["old", row["label"]] if i % 3 else ["old"]} for i, row in enumerate(make_rows(24))
    ]
    run = graftkit.tune(model=str(tiny_bert), task="classify(kind='multi')", train=rows, eval=None, method="head()",
                        out=tmp_path / "multi", settings=quick)  # fmt: skip
    found = run.explain([TEXT], label="tool", method="gradient_x_input")[0]
    assert found["probability"] == run.predict([TEXT])[0]["probabilities"]["tool"]
    assert found["notes"] == ["no training rows are shown: they were in memory when the run was trained"]
    numbers = [
        {"text": row["text"], "text_pair": "a new saw", "label": 10.0 + i % 5}
        for i, row in enumerate(make_rows(24))
    ]
    run = graftkit.tune(model=str(tiny_bert), task="classify(kind='regression')", train=numbers, eval=None,
                        method="head()", out=tmp_path / "number", settings=quick)  # fmt: skip
    found = run.explain([(TEXT, "very old")], nearest=0)[0]
    assert found["value"] == pytest.approx(run.predict([(TEXT, "very old")])[0]["value"], abs=1e-3)
    assert [part["column"] for part in found["parts"]] == ["text"] * 5 + ["text_pair"] * 2
    assert found["parts"][5] == {**found["parts"][5], "text": "very", "start": 0, "end": 4}
    with pytest.raises(UserError, match="the answers of this run are numbers"):
        run.explain([(TEXT, "very old")], label="10")


def test_images_by_attention_and_feature_maps(tmp_path):
    images = pytest.importorskip("image_models")
    for part, count in (("train", 8), ("eval", 2)):
        images.fill(tmp_path / part, count, seed=0 if part == "train" else 100)
    picture = tmp_path / "eval" / "red" / "0.png"
    settings = {"train.epochs": 1.0}
    for make, method in ((images.vit, "attention"), (images.convnext, "grad_cam")):
        run = images.tune(make(tmp_path / method), tmp_path, tmp_path / f"run-{method}", **settings)
        page, marked = tmp_path / f"{method}.html", tmp_path / f"{method}.png"
        found = run.explain([str(picture)], html=page, overlay=marked)[0]
        assert found["method"] == method and len(found["parts"]) in (16, 64)
        assert (
            found["parts"][-1]["box"][2:] == [32, 32] and min(part["score"] for part in found["parts"]) >= 0
        )
        assert found["nearest"][0]["file"].endswith(".png") and found["nearest"][0]["label"] in images.KINDS
        assert marked.read_bytes()[:4] == b"\x89PNG" and 'src="data:image/png;base64,' in page.read_text()
    from PIL import Image

    assert Image.open(marked).size == (320, 320)
    with pytest.raises(UserError, match="exists; name another file"):
        run.explain([str(picture)], overlay=marked)


@pytest.mark.slow
def test_sounds_tags_and_spans(tiny_bert, tmp_path):
    sounds = pytest.importorskip("audio_models")
    pytest.importorskip("soundfile")
    quick = {"train.precision": "fp32", "train.epochs": 2.0, "train.batch_size": 8}
    sounds.write_tones(tmp_path / "tones", 6, 0)
    run = graftkit.tune(model=str(sounds.wav2vec2(tmp_path / "w2v")), task="audio_classify", train=tmp_path / "tones",
                        eval=None, method="head()", out=tmp_path / "sound", settings=quick)  # fmt: skip
    found = run.explain(
        [str(tmp_path / "tones/high/00.wav")], html=tmp_path / "s.html", overlay=tmp_path / "s.png"
    )[0]
    assert len(found["parts"]) == 20 and found["parts"][0]["start"] == 0 and found["parts"][-1]["end"] < 0.6
    rows = [{"tokens": row["text"].split(), "tags": ["B-" + row["label"] if w in sum(KINDS.values(), ()) else "O"
             for w in row["text"].split()]} for row in make_rows(48)]  # fmt: skip
    run = graftkit.tune(model=str(tiny_bert), task="tag", train=rows, eval=None, method="lora() + head()",
                        out=tmp_path / "tags", settings={**quick, "train.epochs": 10.0, "train.lr": 0.01})  # fmt: skip
    found = run.explain([TEXT], nearest=0)[0]
    assert (found["label"], found["word"], found["start"]) == ("B-tool", "hammer", 7)
    assert max(found["parts"], key=lambda part: part["score"])["text"] == "hammer"
    assert run.explain([TEXT], word="new", nearest=0)[0]["label"] == "O"
    with pytest.raises(UserError, match=r"word 'hamer' is not in this text\. Did you mean 'hammer'"):
        run.explain([TEXT], word="hamer")
    asked = [{"question": "the tool", "context": row["text"], "answers": {
        "text": [w for w in row["text"].split() if w in KINDS["tool"]],
        "answer_start": [row["text"].index(w) for w in row["text"].split() if w in KINDS["tool"]]}}
        for row in make_rows(96, 3) if row["label"] == "tool"]  # fmt: skip
    run = graftkit.tune(model=str(tiny_bert), task="span", train=asked, eval=None, method="lora() + head()",
                        out=tmp_path / "spans", settings={**quick, "train.epochs": 10.0, "train.lr": 0.01})  # fmt: skip
    found = run.explain([{"question": "the tool", "context": TEXT}], nearest=0)[0]
    assert found["answer"] == "hammer" and found["parts"][0]["column"] == "question"
    assert max(found["parts"], key=lambda part: part["score"])["text"] == "hammer"
