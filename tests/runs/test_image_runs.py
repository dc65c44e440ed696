"""Runs of image classification: answers, exports, kept features, random changes, resuming."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
import torch
from conftest import equal_bits, forked, graft_tensors
from device import DEVICE
from image_models import ROOT, convnext, dataset_of, fill, picture, tune
from PIL import Image

from graftkit.data.source import Pass
from graftkit.errors import UserError
from graftkit.runs.predict import predict

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_compared")]


@pytest.fixture(scope="module")
def tiny_convnext(tmp_path_factory) -> Path:
    return convnext(tmp_path_factory.mktemp("models") / "tiny-convnext")


# --- whole runs


@pytest.fixture(scope="module")
def finished(tiny_vit, colours, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "vit"
    tune(tiny_vit, colours, out, method="lora(rank=4) + head()")
    return out


def test_a_run_learns_and_tells(finished, colours):
    result = json.loads((finished / "result.json").read_text())
    assert result["metrics"]["accuracy"] > 0.9 and "macro_f1" in result["metrics"]
    plan = json.loads((finished / "plan.json").read_text())["statistics"]["train"]
    assert plan["labels"] == {"blue": 8, "green": 8, "red": 8}
    assert plan["sizes"]["width"] == {"least": 40, "median": 40, "most": 40}
    assert "32 x 32 by ViTImageProcessor" in plan["notes"][0]


def test_predict_names_files(finished, colours, command):
    files = [colours / "eval" / "red" / "0.png", colours / "eval" / "blue" / "1.png"]
    done = command("predict", finished, *files)
    assert [line.split("\t")[::2] for line in done.out.splitlines()] == [
        [kind, str(file)] for kind, file in zip(("red", "blue"), files)
    ]
    done = command("predict", finished, *files, "--json")
    first = json.loads(done.out)["predictions"][0]
    assert set(first) == {"image", "label", "probability"} and first["image"] == str(files[0])
    done = command("predict", finished, files[0], "gone.png")
    assert done.status == 1 and "gone.png does not exist" in done.err
    done = command("predict", finished, colours)
    assert done.status == 1 and "is a folder where one image should be" in done.err
    done = command("predict", finished, "--data", colours / "eval", "--json")
    rows = json.loads(done.out)["predictions"]
    assert len(rows) == 12 and rows[0]["row"] == 1
    done = command("predict", finished, "--data", colours / "eval" / "red", "--json")
    assert len(json.loads(done.out)["predictions"]) == 4
    done = command("predict", finished, "--data", files[0], "--out", "answers.csv")
    assert done.status == 0 and "red" in Path("answers.csv").read_text()


def test_predict_in_python(finished, colours):
    path = colours / "eval" / "red" / "0.png"
    image = Image.open(path)
    given = [path, image, np.asarray(image), path.read_bytes()]
    answers = predict(finished, given)
    assert len({row["probability"] for row in answers}) == 1
    assert [row["image"] for row in answers] == [str(path), "image 2", "image 3", "image 4"]
    with pytest.raises(UserError, match="row 1: image 1 is not an image"):
        predict(finished, [b"abc"])
    with pytest.raises(UserError, match="no image to answer"):
        predict(finished, [])


def test_evaluate_and_the_most_wrong(finished, colours, tmp_path, command):
    done = command("evaluate", finished, "--data", colours / "eval", "--json")
    assert json.loads(done.out)["metrics"]["accuracy"] > 0.9
    mixed = fill(tmp_path / "mixed", 2)
    shutil.copy(mixed / "red" / "0.png", mixed / "blue" / "wrong.png")
    page = tmp_path / "page.html"
    found = json.loads(command("evaluate", finished, "--data", mixed, "--report", page, "--json").out)
    assert found["report"] == str(page)
    assert page.read_text().count('<img src="data:image/jpeg;base64,') == len(found["worst"]) == 1
    assert f"Accuracy on {found['metrics']['rows']} evaluation rows" in page.read_text()
    done = command("evaluate", finished, "--data", mixed, "--report", tmp_path)
    assert done.status == 1 and "use a name that ends in .html" in done.err
    assert found["worst"][0]["where"].endswith("blue/wrong.png")
    assert found["worst"][0]["expected"] == "blue" and found["worst"][0]["answer"] == "red"
    (mixed / "yellow").mkdir()
    shutil.copy(mixed / "red" / "0.png", mixed / "yellow" / "0.png")
    done = command("evaluate", finished, "--data", mixed)
    assert done.status == 1 and "yellow/0.png: label 'yellow' is not among the 3 labels" in done.err
    done = command("evaluate", finished, "--data", colours / "eval" / "red")
    assert done.status == 1 and "images but no sub-folders, so they have no labels" in done.err


def test_export_is_a_plain_model(finished, colours, tmp_path, command):
    from transformers import AutoModelForImageClassification

    from graftkit.libraries import image_processors

    done = command("export", finished, "--to", tmp_path / "plain", "--json")
    assert done.status == 0, done.err
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").eval()
    processor = image_processors().from_pretrained(tmp_path / "plain")
    path = colours / "eval" / "green" / "2.png"
    with torch.no_grad():
        chances = model(**processor(Image.open(path), return_tensors="pt")).logits.softmax(-1)[0]
    (answer,) = predict(finished, [path])
    assert model.config.id2label[int(chances.argmax())] == answer["label"] == "green"
    assert float(chances.max()) == pytest.approx(answer["probability"], abs=1e-3)


def test_a_module_of_one_s_own_is_not_exported(colours, tmp_path, command, monkeypatch):
    out = tmp_path / "own"
    monkeypatch.chdir(ROOT)
    tune(
        "examples.resnet20:resnet20",
        colours,
        out,
        "image_classify(resize=32, crop=32)",
        **{"train.epochs": 1.0},
    )
    done = command("export", out, "--to", tmp_path / "plain")
    assert done.status == 1 and "is your own module" in done.err


def test_plan_trains_nothing(tiny_vit, colours, command):
    done = command(
        "plan", "--model", tiny_vit, "--task", "image-classify", "--train", colours / "train", "--json"
    )
    assert done.status == 0 and json.loads(done.out)["trained_parameters"] == 16 * 3 + 3


# --- what is frozen is computed once


@pytest.mark.parametrize("method", ["head(pooling='mean', dropout=0)", "head(pooling='own')"])
def test_frozen_features_are_kept_and_equal_those_computed_anew(colours, tmp_path, monkeypatch, method):
    """A network with BatchNorm: its statistics neither move nor are those of the batch."""
    from graftkit.engine import cached as forward

    monkeypatch.chdir(ROOT)
    task, made = "image_classify(resize=32, crop=32)", []
    plain = forward.make_forward
    cached = lambda *given, **more: made.append(plain(*given, **more)) or made[-1]  # noqa: E731
    monkeypatch.setattr("graftkit.runs.forwards.make_forward", cached)
    tune("examples.resnet20:resnet20", colours, tmp_path / "kept", task, method)
    assert [type(one).__name__ for one in made] == ["CachedForward", "CachedForward"]
    features = made[0].kept.values
    assert features.shape == (24, 64)

    def never(graft, device, precision, depth, dataset, passes, labels=None, caching=None):
        return plain(graft, device, precision, depth, dataset, 1, labels)

    monkeypatch.setattr("graftkit.runs.forwards.make_forward", never)
    tune("examples.resnet20:resnet20", colours, tmp_path / "anew", task, method)
    kept, anew = (graft_tensors(tmp_path / name) for name in ("kept", "anew"))
    for name, tensor in kept.items():
        assert torch.allclose(tensor, anew[name], atol=1e-4), name


def test_augmentation_keeps_nothing_and_says_so(tiny_vit, colours):
    from graftkit.engine.cached import CachedForward, make_forward

    dataset, prepared = dataset_of(tiny_vit, colours / "train", "image_classify(flip=0.5)")
    forward = make_forward(prepared.graft, DEVICE, "fp32", prepared.depth, dataset, 5)
    assert not isinstance(forward, CachedForward) and not dataset.keeps
    notes = dataset_notes = prepared.rows.task.statistics(dataset, prepared.rows.labels)["notes"]
    assert "no output is kept" in notes[-1], dataset_notes
    evaluated, _ = dataset_of(tiny_vit, colours / "train", "image_classify(flip=0.5)", training=False)
    assert evaluated.keeps


# --- augmentation in training


def test_a_batch_draws_images_and_partners_once(tiny_vit, colours):
    dataset, prepared = dataset_of(tiny_vit, colours / "train", "image_classify(mixup=1.0)")
    plain, _ = dataset_of(tiny_vit, colours / "train", training=False)
    rows = np.arange(0, 24, 3)
    batch = dataset.batch(rows, at=Pass(5))
    other = rows[batch.mixed[1]]
    x = plain.inputs(rows, Pass())["pixel_values"]
    y = plain.inputs(other, Pass())["pixel_values"]
    assert torch.allclose(batch.inputs["pixel_values"], batch.share * x + (1 - batch.share) * y, atol=1e-5)
    assert sorted(other) == sorted(rows)
    # the loss is that of the soft target
    learn = prepared.rows.task.learner(dataset, prepared.rows.labels, 0.1)
    logits = torch.randn(8, 3)
    soft = (
        batch.share * torch.eye(3)[plain.targets(rows)]
        + (1 - batch.share) * torch.eye(3)[plain.targets(other)]
    )
    wanted = torch.nn.functional.cross_entropy(logits, soft, reduction="none", label_smoothing=0.1)
    assert torch.allclose(learn(lambda _: logits, batch)["loss"].losses, wanted, atol=1e-6)


EVERYTHING = (
    "image_classify(random_crop='resized', smallest_crop=0.5, flip=0.5, randaugment=1, magnitude=4, mixup=0.2, "
    "cutmix=0.5)"
)


def test_every_augmentation_trains(tiny_convnext, colours, tmp_path):
    run = tune(
        tiny_convnext,
        colours,
        tmp_path / "run",
        EVERYTHING,
        "full(lr=0.002) + head()",
        **{"train.epochs": 6.0},
    )
    assert run.metrics["accuracy"] > 0.6


def test_a_killed_run_with_augmentation_ends_with_the_same_bits(tiny_vit, colours, tmp_path):
    from graftkit.cli.main import main

    def words(out: Path) -> list[str]:
        return [
            "tune", "--model", str(tiny_vit), "--task", EVERYTHING, "--train", str(colours / "train"), "--eval",
            str(colours / "eval"), "--method", "lora(rank=2, dropout=0.1) + head()", "--out", str(out),
            "train.precision=fp32", "train.batch_size=8", "train.steps=8", "train.evaluate_every=2",
        ]  # fmt: skip

    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def dies() -> None:
        from graftkit.runs import monitor as watch

        plain = watch.Watch.evaluate

        def evaluate(self, *given):
            plain(self, *given)
            if self.loop.step == 4:
                os.kill(os.getpid(), 9)

        watch.Watch.evaluate = evaluate
        main(words(broken))

    assert forked(lambda: main(words(whole))).status == 0
    assert forked(dies).status == -9 and not (broken / "result.json").exists()
    resumed = forked(lambda: main(["tune", "--resume", str(broken)]))
    assert resumed.status == 0, resumed.err
    assert equal_bits(graft_tensors(whole), graft_tensors(broken))
    first, second = (json.loads((run / "result.json").read_text())["metrics"] for run in (whole, broken))
    assert first == second


def test_other_images_are_known(tiny_vit, colours, tmp_path):
    shutil.copytree(colours / "train", tmp_path / "train")
    first, _ = dataset_of(tiny_vit, tmp_path / "train")
    assert first.digest() == dataset_of(tiny_vit, colours / "train")[0].digest()  # wherever they lie
    picture("red", 999).save(tmp_path / "train" / "red" / "0.png")
    assert first.digest() != dataset_of(tiny_vit, tmp_path / "train")[0].digest()


def test_balanced_weights(tiny_vit, tmp_path):
    fill(tmp_path, 2)
    fill(tmp_path, 6, kinds=("red",))
    dataset, prepared = dataset_of(tiny_vit, tmp_path, "image_classify(class_weights='balanced')")
    task, labels = prepared.rows.task, prepared.rows.labels
    losses = task.learner(dataset, labels, 0.0)(lambda _: torch.zeros(10, 3), dataset.batch(np.arange(10)))[
        "loss"
    ].losses
    targets = dataset.targets(np.arange(10)).numpy()
    sums = [float(losses[torch.from_numpy(targets == i)].sum()) for i in range(3)]
    assert np.allclose(sums, sums[0])
