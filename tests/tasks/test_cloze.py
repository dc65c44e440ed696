"""Cloze: words scored in a GLM's blank against a loop, the loss over labels, and runs on a GLM, a BERT and with a head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import make_rows, write_csv
from test_glm_objective import glm, tokenizer_with_marks
from test_prompting import folder_of

import graftkit
from graftkit.backbone import Backbone
from graftkit.data.read import read_table
from graftkit.engine.forward import Forward
from graftkit.grafts.attach import attach
from graftkit.tasks.cloze import Cloze
from graftkit.tasks.shared.blanks import marks_of

pytestmark = pytest.mark.slow

TEMPLATE = "my {text} is a {label} very"
WORDS_OF = {"fruit": "plum", "tool": "very old saw", "animal": "very new"}
COLUMNS = {"text": "text", "label": "label"}


@pytest.fixture(scope="module", params=[True, False], ids=["two positions", "one position"])
def backbone(request, tmp_path_factory) -> Backbone:
    tokenizer = tokenizer_with_marks(tmp_path_factory.mktemp("glm"))
    model = glm(tokenizer, block_positions=request.param)
    zoo.randomize(model, 2)
    return Backbone(model, tokenizer, "tiny-glm", max_length=64)


def encoded(backbone: Backbone, rows: list[dict], **options):
    task, labels = Cloze(**options), tuple(sorted(WORDS_OF))
    examples = task.examples(read_table(rows), COLUMNS, labels, False)
    task = task.resolve(examples, labels, 0)
    return task, task.dataset(examples, backbone, 64)


@torch.no_grad()
def plain(backbone: Backbone, text: str, word: str) -> float:
    """log p of a word's tokens in the blank, one after the other."""
    model, tokenizer = backbone.model, backbone.processor
    marks = marks_of(tokenizer, "test")
    part_a = tokenizer(TEMPLATE.format(text=text, label="[MASK]"))["input_ids"]
    place, total, written = part_a.index(marks.token), 0.0, [marks.start]
    for token in tokenizer(word, add_special_tokens=False)["input_ids"]:
        count, both = len(written), len(part_a) + len(written)
        behind = [place] * count if model.config.block_positions else list(range(len(part_a), both))
        logits = model(
            input_ids=torch.tensor([part_a + written]),
            position_ids=torch.tensor([[*range(len(part_a)), *behind]]),
            block_position_ids=torch.tensor([[0] * len(part_a) + list(range(1, count + 1))]),
        ).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        written.append(token)
    return total


@pytest.mark.parametrize("score", ["sum", "mean"])
def test_scores_in_a_blank_are_those_of_a_plain_loop(backbone: Backbone, score: str) -> None:
    rows = make_rows(7, 3, tuple(WORDS_OF))
    _, dataset = encoded(backbone, rows, template=TEMPLATE, words=WORDS_OF, score=score)
    with torch.no_grad():
        got = dataset.call(backbone.model, dataset.batch(np.arange(len(rows))))
    for row, found in zip(rows, got.tolist()):
        for label, value in zip(sorted(WORDS_OF), found):
            wanted = plain(backbone, row["text"], WORDS_OF[label])
            wanted /= len(WORDS_OF[label].split()) if score == "mean" else 1
            assert value == pytest.approx(wanted, abs=1e-4)


def test_a_row_that_is_too_long_is_cut_to_the_length(backbone: Backbone) -> None:
    rows = [{"text": "my " * 100, "label": label} for label in WORDS_OF]
    task, labels = Cloze(template=TEMPLATE, words=WORDS_OF), tuple(sorted(WORDS_OF))
    examples = task.examples(read_table(rows), COLUMNS, labels, False)
    dataset = task.resolve(examples, labels, 0).dataset(examples, backbone, 32)
    assert dataset.truncated == len(rows) and max(prompt.length for prompt in dataset.prompts) <= 32


def test_the_loss_is_cross_entropy_over_the_labels(backbone: Backbone) -> None:
    rows = make_rows(6, 3, tuple(WORDS_OF))
    task, dataset = encoded(backbone, rows, template=TEMPLATE, words=WORDS_OF)
    graft = attach(Backbone(backbone.model, backbone.processor), "bitfit()")
    forward = Forward(graft, torch.device("cpu"), "fp32")
    forward.graft.model.eval()
    labels = sorted(WORDS_OF)
    (term,) = task.learner(dataset, labels, 0.0)(forward, dataset.batch(np.arange(6))).values()
    scores = [[plain(backbone, row["text"], WORDS_OF[label]) for label in labels] for row in rows]
    wanted = -torch.tensor(scores).log_softmax(-1)[range(6), [labels.index(row["label"]) for row in rows]]
    torch.testing.assert_close(term.losses.detach(), wanted, atol=1e-4, rtol=1e-4)
    term.losses.sum().backward()
    assert all(
        parameter.grad.abs().sum() > 0
        for parameter in graft.parameters.values()
        if parameter.grad is not None
    )
    graftkit.detach(graft)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[dict[str, Path], Path]:
    place = tmp_path_factory.mktemp("cloze")
    tokenizer = tokenizer_with_marks(place)
    model = glm(tokenizer, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.save_pretrained(place / "glm")
    tokenizer.save_pretrained(place / "glm")
    folder_of("masked", place / "masked")
    return {kind: place / kind for kind in ("glm", "masked")}, write_csv(place / "rows.csv", make_rows(64, 2))


CLOZE = "cloze(template='my {text} is a {label}', words={'fruit': 'plum', 'tool': 'saw'})"
RUNS = [(kind, CLOZE, "full()") for kind in ("glm", "masked")]
RUNS += [("glm", "classify()", f"full() + head(pooling='{pooling}')") for pooling in ("mean", "last")]


@pytest.mark.slow
@pytest.mark.parametrize("kind,task,method", RUNS)
def test_runs_learn_and_predict(trained, tmp_path: Path, kind: str, task: str, method: str) -> None:
    folders, rows = trained
    run = graftkit.tune(
        model=str(folders[kind]), task=task, method=method, train=str(rows), eval=str(rows), out=tmp_path / "run",
        settings={
            "train.steps": 40, "train.batch_size": 16, "train.lr": 0.01, "train.precision": "fp32",
            "train.evaluate_every": "end",
        },
    )  # fmt: skip
    assert run.result["metrics"]["accuracy"] > 0.8
    answers = run.predict([row["text"] for row in make_rows(8, 2)])
    right = [answer["label"] == row["label"] for answer, row in zip(answers, make_rows(8, 2))]
    assert sum(right) >= 6


def test_prompting_asks_a_glm_as_it_was_trained(trained, tmp_path: Path) -> None:
    folders, rows = trained
    run = graftkit.tune(
        model=str(folders["glm"]), task=CLOZE.replace("cloze(", "prompting("), train=str(rows), eval=None,
        out=tmp_path / "run", settings={"train.precision": "fp32"},
    )  # fmt: skip
    (answer,) = run.predict(["my old plum"])
    assert answer["label"] in ("fruit", "tool") and 0 <= answer["probability"] <= 1
