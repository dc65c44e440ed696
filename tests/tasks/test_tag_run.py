"""Runs that tag: from files to predictions, resumed after a kill, exported for plain transformers."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
from conftest import ANIMAL, FILLER, FRUIT, TOOL, equal_bits, forked, graft_tensors, without_graftkit
from conlleval import conlleval

import graftkit
from graftkit.data.conll import read_conll
from graftkit.errors import UserError
from graftkit.runs.export import export
from graftkit.runs.predict import evaluate, predict

pytestmark = pytest.mark.slow

FAST = {"train.precision": "fp32", "train.batch_size": 16, "train.lr": 0.01}


def sentences(count: int, seed: int) -> list[list[tuple[str, str]]]:
    """One or two entities in each: an animal, or a fruit with a tool behind it; some words are plural."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        row = [(word, "O") for word in draw.choices(FILLER, k=draw.randint(2, 8))]
        kinds = draw.sample([("fruit", FRUIT), ("animal", ANIMAL)], draw.randint(1, 2))
        places = sorted((draw.randrange(len(row) + 1) for _ in kinds), reverse=True)
        for at, (kind, names) in zip(places, kinds):
            words = [draw.choice(names) + draw.choice(["", "s"])]
            words += [draw.choice(TOOL)] if kind == "fruit" else []
            row[at:at] = [(word, ("I-" if i else "B-") + kind) for i, word in enumerate(words)]
        rows.append(row)
    return rows


def write(path: Path, rows: list[list[tuple[str, str]]]) -> Path:
    path.write_text(
        "\n".join("".join(f"{word}\t{tag}\n" for word, tag in row) for row in rows), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tagged")
    write(folder / "train.conll", sentences(96, 0))
    write(folder / "dev.conll", sentences(30, 1))
    return folder


def words_of(model: Path, files: Path, out: Path, method: str, *more: str) -> list[str]:
    settings = [f"{key}={value}" for key, value in FAST.items()]
    return [
        "tune", "--model", str(model), "--task", "tag", "--train", str(files / "train.conll"), "--eval",
        str(files / "dev.conll"), "--method", method, "--out", str(out), *settings, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tagged(tmp_path_factory, short_bert, files) -> Path:
    """A finished run that has learned the words."""
    out = tmp_path_factory.mktemp("runs") / "tagged"
    graftkit.tune(
        model=str(short_bert), task="tag", train=files / "train.conll", eval=files / "dev.conll",
        method="lora(rank=8) + head(lr=0.02)", out=out, settings={**FAST, "train.epochs": 8.0},
    )  # fmt: skip
    return out


def test_a_run_learns_names_and_says_so(tagged, files):
    result = json.loads((tagged / "result.json").read_text())
    metrics = result["metrics"]
    assert metrics["f1"] > 0.9 and set(metrics["per_class"]) == {"animal", "fruit"}
    low, high = metrics["f1_interval"]
    assert low <= metrics["f1"] <= high and metrics["rows"] == 30
    assert metrics["entities"] == sum(row["rows"] for row in metrics["per_class"].values())
    answers = predict(tagged, files / "dev.conll")
    table = read_conll(str(files / "dev.conll"))
    expected = conlleval(table.columns["tags"], [row["tags"] for row in answers])
    again = evaluate(tagged, files / "dev.conll")["metrics"]
    for name in ("f1", "precision", "recall", "accuracy"):
        assert again[name] == pytest.approx(expected[name]) == pytest.approx(metrics[name])
    assert [row["tokens"] for row in answers] == table.columns["tokens"]
    assert [row["row"] for row in answers] == table.numbers


def test_predict_marks_raw_text(tagged, command):
    text = "my  apple saw is the\tdogs"
    found = predict(tagged, [text])[0]
    assert found["text"] == text
    assert [(e["label"], e["text"]) for e in found["entities"]] == [
        ("fruit", "apple saw"),
        ("animal", "dogs"),
    ]
    assert all(
        text[e["start"] : e["end"]] == e["text"] and 0 < e["probability"] <= 1 for e in found["entities"]
    )
    done = command("predict", tagged, text)
    assert done.status == 0 and "my  [apple saw](fruit) is the" in done.out
    tokens = predict(tagged, [["my", "apple", "dog"]])[0]
    assert tokens["tags"] == ["O", "B-fruit", "B-animal"] and len(tokens["probabilities"]) == 3


def test_files_of_every_form_are_evaluated(tagged, files, tmp_path):
    """A run of CoNLL files reads texts with places of characters; the figures are the same."""
    rows = []
    for row in sentences(30, 1):
        text, entities = "", []
        for word, tag in row:
            start = len(text)
            text += word + " "
            if tag.startswith("B-"):
                entities.append({"start": start, "end": start + len(word), "label": tag[2:]})
            elif tag != "O":
                entities[-1]["end"] = start + len(word)
        rows.append({"text": text.strip(), "entities": entities})
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = evaluate(tagged, path)["metrics"]
    assert metrics == evaluate(tagged, files / "dev.conll")["metrics"]


def test_answers_go_to_files(tagged, files, tmp_path, command):
    out = tmp_path / "answers.jsonl"
    assert command("predict", tagged, "--data", files / "dev.conll", "--out", out).status == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 30 and all(len(row["tags"]) == len(row["tokens"]) for row in rows)
    assert (
        command("predict", tagged, "--data", files / "dev.conll", "--out", tmp_path / "answers.csv").status
        == 0
    )


def test_long_sentences_are_tagged_as_a_whole(tagged):
    """More words than the model has positions: each has its tag."""
    row = [pair for row in sentences(40, 3) for pair in row]
    found = predict(tagged, [[word for word, _ in row]])[0]
    assert len(found["tags"]) == len(row) > 200
    assert sum(a == b for a, (_, b) in zip(found["tags"], row)) / len(row) > 0.9


def test_the_terminal_tells_what_was_read(command, short_bert, files, tmp_path):
    rows = [[(word, tag.replace("B-", "I-")) for word, tag in row] for row in sentences(20, 4)]
    path = write(tmp_path / "iob.conll", rows)
    done = command("tune", "--model", short_bert, "--task", "tag", "--train", path, "--method", "head()", "--out",
                   tmp_path / "run", "train.steps=2", "data.max_length=8", "train.precision=fp32")  # fmt: skip
    assert done.status == 0, done.err
    assert "tags are IOB1 and are read as BIO" in done.out and "further parts of sentences" in done.out
    assert "entities each" in done.out and "F1" in done.out
    assert "Worst examples" in done.out


def test_plan(command, short_bert, files, tmp_path):
    words = words_of(short_bert, files, tmp_path / "run", "lora(rank=2) + head()")
    done = command("plan", *words[1:], "--json")
    assert done.status == 0, done.err
    plan = json.loads(done.out)
    plan = plan.get("plan", plan)
    assert plan["groups"]["head"] == 5 * 33  # O, and B and I of two types


@pytest.mark.parametrize(
    "method", ["head()", "head(pooling='tokens', hidden=8)", "unfreeze('blocks[-1:]') + head()"]
)
def test_what_is_frozen_is_kept(method, short_bert, files, tmp_path):
    """The cache of frozen outputs holds a state for each token, and trains as without it."""
    results = []
    for passes, epochs in (("kept", 3.0), ("anew", 1.0)):
        run = graftkit.tune(
            model=str(short_bert), task="tag", train=files / "train.conll", eval=None, method=method,
            out=tmp_path / passes, settings={**FAST, "train.epochs": epochs, "train.steps": 3 if passes else 0},
        )  # fmt: skip
        results.append(graft_tensors(run.path))
    for name, tensor in results[0].items():
        assert tensor.allclose(results[1][name], atol=1e-4), name


@pytest.mark.parametrize("method", ["lora(rank=2, dropout=0.1) + head()", "head(pooling='tokens')"])
def test_a_killed_run_goes_on_bit_for_bit(method, short_bert, files, tmp_path):
    from graftkit.cli.main import main
    from graftkit.report.console import Console
    from graftkit.runs.tune import resume_run

    more = ("train.steps=6", "train.checkpoint_every=1", "data.max_length=9")
    with pytest.raises(SystemExit) as stop:
        main(words_of(short_bert, files, tmp_path / "whole", method, *more))
    assert stop.value.code == 0

    def killed():
        import safetensors.torch

        save, written = safetensors.torch.save_file, []

        def save_file(tensors, path, metadata=None):
            save(tensors, path, metadata=metadata)
            written.append(path)
            if len(written) == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        safetensors.torch.save_file = save_file
        main(words_of(short_bert, files, tmp_path / "cut", method, *more))

    assert forked(killed).status == -signal.SIGKILL
    result = resume_run(tmp_path / "cut", Console(quiet=True)).result
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert equal_bits(graft_tensors(tmp_path / "whole"), graft_tensors(tmp_path / "cut"))
    assert result["metrics"] == whole["metrics"]


PIPELINE = """
import json, sys
from transformers import pipeline
tagger = pipeline("token-classification", sys.argv[1], aggregation_strategy="first")
print(json.dumps([[{k: e[k] if k != "score" else float(e[k]) for k in ("start", "end", "entity_group", "score")}
                   for e in tagger(text)] for text in sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("few_compared")
def test_the_exported_model_works_in_a_pipeline(tagged, tmp_path):
    told = export(tagged, tmp_path / "plain")
    assert told["native"] and told["rows_real"] and "token-classification" in told["load_with"]
    texts = [" ".join(word for word, _ in row) for row in sentences(12, 5)]
    printed = without_graftkit(PIPELINE, tmp_path / "plain", *texts)
    for theirs, ours in zip(json.loads(printed), predict(tagged, texts)):
        assert [(e["start"], e["end"], e["entity_group"]) for e in theirs] == [
            (e["start"], e["end"], e["label"]) for e in ours["entities"]
        ]
        assert [e["score"] for e in theirs] == pytest.approx(
            [e["probability"] for e in ours["entities"]], abs=1e-3
        )


def test_parts_of_speech(tiny_gpt2, tmp_path):
    """Tags of no entities: accuracy comes first; a causal model reads them too."""
    kinds = {**dict.fromkeys(FRUIT + ANIMAL + TOOL, "NOUN"), **dict.fromkeys(FILLER, "OTHER")}
    rows = [[(word, kinds[word]) for word, _ in row if word in kinds] for row in sentences(60, 6)]
    path = write(tmp_path / "pos.conll", [row for row in rows if row])
    run = graftkit.tune(
        model=str(tiny_gpt2), task="tag", train=path, method="lora(rank=4) + head()", out=tmp_path / "run",
        settings={**FAST, "train.epochs": 8.0},
    )  # fmt: skip
    assert run.metrics["accuracy"] > 0.9 and "f1" not in run.metrics
    assert set(run.metrics["per_class"]) == {"NOUN", "OTHER"}
    found = run.predict(["my apple"])[0]
    assert [(word["text"], word["label"]) for word in found["tags"]] == [("my", "OTHER"), ("apple", "NOUN")]
    assert "accuracy" in (run.path / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "message"),
    [("head(pooling='mean')", "an output for each token"), ("head(classes=3)", "does not fit the 5 labels")],
)
def test_a_head_that_does_not_fit(method, message, short_bert, files, tmp_path):
    with pytest.raises(UserError, match=message):
        graftkit.tune(
            model=str(short_bert), task="tag", train=files / "train.conll", method=method, out=tmp_path / "x"
        )


def test_types_that_were_not_trained_stop_a_run(command, tagged, short_bert, files, tmp_path):
    bad = tmp_path / "bad.conll"
    bad.write_text("my\tO\n\nold\tO\nhammer\tB-tool\n")
    done = command("evaluate", tagged, "--data", bad)
    assert done.status == 1
    assert (
        "bad.conll, line 3: 'B-tool' is of none of the 2 types of the training data (animal, fruit)"
        in done.err
    )
    words = words_of(short_bert, files, tmp_path / "run", "head()")
    words[words.index("--eval") + 1] = str(bad)
    assert command(*words).status == 1 and not (tmp_path / "run").exists()
