"""Image classification from folders and tables to answers, with models of transformers and modules of one's own."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
import torch
from conftest import equal_bits, forked, graft_tensors
from PIL import Image

import graftkit
from graftkit.errors import UserError
from graftkit.prepare import make_task, prepare, prepare_rows
from graftkit.recipe import make
from graftkit.tasks.image_classify import ImageClassify
from graftkit.tasks.image_inputs import Transform
from graftkit.use import predict

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}
QUICK = {"train.precision": "fp32", "train.batch_size": 8, "train.lr": 0.02, "train.epochs": 4.0}


def picture(kind: str, seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    draw = np.random.default_rng([seed, *KINDS[kind]])
    values = draw.normal(KINDS[kind], 40, (size[1], size[0], 3)).clip(0, 255)
    return Image.fromarray(values.astype(np.uint8))


def fill(folder: Path, count: int, seed: int = 0, kinds=tuple(KINDS), size=(40, 36)) -> Path:
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(kind, seed + i, size).save(folder / kind / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    fill(folder / "train", 8)
    fill(folder / "eval", 4, seed=100)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_convnext(tmp_path_factory) -> Path:
    from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor

    folder = tmp_path_factory.mktemp("models") / "tiny-convnext"
    torch.manual_seed(0)
    config = ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32, layer_scale_init_value=0.1
    )
    ConvNextForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


def tune(model, colours: Path, out: Path, task: str = "image_classify", method: str = "head()", **settings):
    return graftkit.tune(
        model=str(model), task=task, train=colours / "train", eval=colours / "eval", method=method, out=out,
        settings={**QUICK, **settings},
    )  # fmt: skip


def dataset_of(model, train, task: str = "image_classify", training: bool = True, **data):
    values = {"model": str(model), "task": task, "method": "head()", "data": {"eval": None, **data}}
    in_memory = not isinstance(train, (str, Path))
    values["data"]["train"] = "(in memory)" if in_memory else str(train)
    recipe = make(values)
    rows = prepare_rows(recipe, train if in_memory else None)
    prepared = prepare(recipe, rows)
    dataset = rows.task.dataset(rows.train, prepared.backbone, prepared.max_length, training=training)
    return dataset, prepared


# --- what the model sees


@pytest.mark.parametrize("model", ["tiny_vit", "tiny_convnext"])
def test_inputs_are_those_of_the_model_s_own_processor(model, colours, request):
    from transformers import AutoImageProcessor

    folder = request.getfixturevalue(model)
    dataset, _ = dataset_of(folder, colours / "train")
    made = dataset.inputs(np.arange(len(dataset)))
    images = [Image.open(p.name).convert("RGB") for p in dataset.pictures]
    wanted = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    assert list(made) == ["pixel_values"] and torch.equal(made["pixel_values"], wanted)


def test_the_transform_of_a_recipe_by_its_formula(monkeypatch):
    """Resize(shorter side), CenterCrop, channels and numbers as torchvision's transforms define them."""
    task = make_task(
        "image_classify(resize=24, crop=[16, 20], channels='BGR', scale=2, mean=[1, 2, 3], deviation=[4, 5, 6])"
    )
    image = picture("red", 0, (50, 40))
    made = task.transform()(image)
    small = np.asarray(image.resize((30, 24), resample=Image.Resampling.BILINEAR), dtype=np.float64)
    middle = small[4:20, 5:25][..., ::-1] * 2
    wanted = (middle - [1, 2, 3]) / [4, 5, 6]
    assert made.shape == (3, 16, 20)
    assert np.allclose(made.permute(1, 2, 0).numpy(), wanted, atol=1e-3)


def test_the_default_transform_is_imagenet_s_in_any_order_and_scale():
    image = picture("green", 1)
    plain = ImageClassify().transform()(image).permute(1, 2, 0).numpy()
    values = np.asarray(image) / 255
    assert np.allclose(plain, (values - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], atol=1e-5)
    other = ImageClassify(channels="BGR", scale=1.0).transform()(image).permute(1, 2, 0).numpy()
    assert np.allclose(other[..., ::-1], plain, atol=1e-4)
    assert ImageClassify(mean=100).transform().deviation == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("size", "wanted"), [((50, 40), (24, 30)), ((40, 50), (30, 24)), ((41, 41), (24, 24)),
                                              ((375, 500), (32, 24))])  # fmt: skip
def test_the_shorter_side(size, wanted):
    assert Transform(24, None, "RGB", 1.0, (0.0,) * 3, (1.0,) * 3, 2).resized(*size) == wanted


@pytest.mark.parametrize(("options", "told"), [
    ("resize=20, crop=24", "more than resize=20 leaves"),
    ("mean=[1, 2]", "one for each of 3 channels"),
    ("mean=['a', 1, 2]", "one for each of 3 channels"),
    ("deviation=[1, 0, 1]", "must be above 0"),
    ("resize=[1, 2, 3]", "or [height, width]"),
    ("resize=0", "at least 1"),
    ("channels='GBR'", "must be one of"),
    ("flip=1.5", "at most 1"),
    ("random_crop='center'", "must be one of"),
])  # fmt: skip
def test_options_that_make_no_sense(options, told):
    with pytest.raises(UserError) as error:
        make_task(f"image_classify({options})")
    assert told in str(error.value)


def test_a_transform_beside_a_processor_is_refused(tiny_vit, colours):
    with pytest.raises(UserError, match=r"comes with its own image processor.*leave crop, channels out"):
        dataset_of(tiny_vit, colours / "train", "image_classify(crop=32, channels='BGR')")


def test_a_model_of_texts_takes_no_images(tiny_bert, colours):
    with pytest.raises(UserError, match="no image processor"):
        dataset_of(tiny_bert, colours / "train")


def test_images_of_several_sizes_need_a_size(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    fill(tmp_path, 2, size=(32, 32))
    picture("red", 9, (32, 48)).save(tmp_path / "red" / "tall.png")
    with pytest.raises(UserError, match=r"several sizes.*tall\.png as 48 x 32"):
        dataset_of("examples.resnet20:resnet20", tmp_path)
    dataset, _ = dataset_of("examples.resnet20:resnet20", tmp_path, "image_classify(resize=32, crop=32)")
    assert dataset.inputs(np.arange(7))["x"].shape == (7, 3, 32, 32)


def test_data_max_length_has_no_sense(tiny_vit, colours):
    with pytest.raises(UserError, match=r"data\.max_length is of texts"):
        dataset_of(tiny_vit, colours / "train", max_length=10)


# --- tables


def table_rows(folder: Path) -> list[dict]:
    return [
        {"image": f"{kind}/{i}.png", "label": kind} for kind in KINDS for i in range(8)
    ]  # relative to the table


def test_folders_tables_bytes_images_and_arrays_give_the_same(tiny_vit, colours, tmp_path):
    import pyarrow
    import pyarrow.parquet

    root = colours / "train"
    rows = table_rows(root)
    (root / "table.csv").write_text(
        "file_name,label\n" + "".join(f"{r['image']},{r['label']}\n" for r in rows)
    )
    raw = [{**r, "image": (root / r["image"]).read_bytes()} for r in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(raw), tmp_path / "bytes.parquet")
    nested = [{**r, "image": {"bytes": r["image"], "path": None}} for r in raw]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), tmp_path / "nested.parquet")
    try:
        sources = [
            root / "table.csv", tmp_path / "bytes.parquet", tmp_path / "nested.parquet",
            [{**r, "image": str(root / r["image"])} for r in rows],
            [{**r, "image": Image.open(root / r["image"])} for r in rows],
            [{**r, "image": np.asarray(Image.open(root / r["image"]))} for r in rows],
        ]  # fmt: skip
        found = [dataset_of(tiny_vit, source)[0] for source in sources]
    finally:
        (root / "table.csv").unlink()
    wanted, _ = dataset_of(tiny_vit, root)
    every = np.arange(len(wanted))
    for dataset in found:
        assert torch.equal(dataset.inputs(every)["pixel_values"], wanted.inputs(every)["pixel_values"])
        assert torch.equal(dataset.targets(every), wanted.targets(every))
    assert found[0].digest() == found[1].digest() == wanted.digest()


def test_a_label_that_is_found_by_what_it_is_like(tiny_vit, colours):
    rows = [
        {"image": np.asarray(Image.open(colours / "train" / r["image"])), "shade": r["label"]}
        for r in table_rows(colours)
    ]
    dataset, _ = dataset_of(tiny_vit, rows)
    assert len(dataset) == 24
    with pytest.raises(UserError, match=r"no column of train .* looks like the label"):
        dataset_of(tiny_vit, [{"image": row["image"]} for row in rows])


def test_datasets_with_images(tiny_vit, colours):
    datasets = pytest.importorskip("datasets")
    rows = table_rows(colours)
    table = datasets.Dataset.from_dict({
        "image": [str(colours / "train" / r["image"]) for r in rows], "label": [r["label"] for r in rows],
    }).cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=sorted(KINDS)))  # fmt: skip
    found, _ = dataset_of(tiny_vit, table)
    wanted, _ = dataset_of(tiny_vit, colours / "train")
    assert found.digest() == wanted.digest()


# --- bad images


def spoil(folder: Path) -> list[str]:
    """Every kind of bad image; their names."""
    good = (folder / "red" / "0.png").read_bytes()
    buffer = io.BytesIO()
    picture("red", 3, (64, 64)).save(buffer, "JPEG")
    bad = {
        "cut.png": good[: len(good) // 2], "cut.jpg": buffer.getvalue()[:600], "empty.png": b"",
        "page.jpg": b"<html>not found</html>",
    }  # fmt: skip
    for name, raw in bad.items():
        (folder / "red" / name).write_bytes(raw)
    return list(bad)


def test_bad_images_are_found_before_training(tiny_vit, tmp_path, command):
    fill(tmp_path / "d", 3)
    names = spoil(tmp_path / "d")
    words = [
        "tune",
        "--model",
        tiny_vit,
        "--task",
        "image_classify",
        "--train",
        tmp_path / "d",
        "--out",
        "run",
    ]
    done = command(*words)
    assert done.status == 1 and "cut.jpg is cut short" in done.err and not Path("run").exists()
    done = command(*words, "data.skip_bad=true", "data.eval=null", "train.epochs=1", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["rows_skipped"] == len(names)


def test_a_table_with_bad_rows_names_line_and_file(tiny_vit, tmp_path):
    fill(tmp_path, 3)
    spoil(tmp_path)
    rows = ["image,label", *(f"{kind}/{i}.png,{kind}" for kind in KINDS for i in range(3)), "red/cut.png,red"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"t\.csv, line 11: red/cut\.png is cut short"):
        dataset_of(tiny_vit, tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("\n".join([*rows[:-1], "red/gone.png,red", "red/0.png,"]))
    with pytest.raises(UserError, match=r"line 11: red/gone\.png does not exist"):
        dataset_of(tiny_vit, tmp_path / "t.csv")
    dataset, _ = dataset_of(tiny_vit, tmp_path / "t.csv", skip_bad=True)
    assert len(dataset) == 9 and len(dataset.examples.skipped) == 2


def test_one_class_is_refused(tiny_vit, tmp_path):
    fill(tmp_path, 3, kinds=("red",))
    with pytest.raises(UserError, match="one class only"):
        dataset_of(tiny_vit, tmp_path)


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
    with pytest.raises(UserError, match="row 1: image 1 is no image"):
        predict(finished, [b"abc"])
    with pytest.raises(UserError, match="no image to answer"):
        predict(finished, [])


def test_evaluate_and_the_most_wrong(finished, colours, tmp_path, command):
    done = command("evaluate", finished, "--data", colours / "eval", "--json")
    assert json.loads(done.out)["metrics"]["accuracy"] > 0.9
    mixed = fill(tmp_path / "mixed", 2)
    shutil.copy(mixed / "red" / "0.png", mixed / "blue" / "wrong.png")
    found = json.loads(command("evaluate", finished, "--data", mixed, "--json").out)
    assert found["worst"][0]["where"].endswith("blue/wrong.png")
    assert found["worst"][0]["expected"] == "blue" and found["worst"][0]["answer"] == "red"
    (mixed / "yellow").mkdir()
    shutil.copy(mixed / "red" / "0.png", mixed / "yellow" / "0.png")
    done = command("evaluate", finished, "--data", mixed)
    assert done.status == 1 and "yellow/0.png: label 'yellow' is not among the 3 labels" in done.err


def test_export_is_a_plain_model(finished, colours, tmp_path, command):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    done = command("export", finished, "--to", tmp_path / "plain", "--json")
    assert done.status == 0, done.err
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "plain")
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
    assert done.status == 1 and "is a module of your own" in done.err


def test_plan_trains_nothing(tiny_vit, colours, command):
    done = command(
        "plan", "--model", tiny_vit, "--task", "image-classify", "--train", colours / "train", "--json"
    )
    assert done.status == 0 and json.loads(done.out)["trained_parameters"] == 16 * 3 + 3


# --- what is frozen is computed once


@pytest.mark.parametrize("method", ["head(pooling='mean', dropout=0)", "head(pooling='own')"])
def test_frozen_features_are_kept_and_equal_those_computed_anew(colours, tmp_path, monkeypatch, method):
    """A network with BatchNorm: its statistics neither move nor are those of the batch."""
    from graftkit.engine import frozen

    monkeypatch.chdir(ROOT)
    task, made = "image_classify(resize=32, crop=32)", []
    plain = frozen.make_forward
    cached = lambda *given, **more: made.append(plain(*given, **more)) or made[-1]  # noqa: E731
    for module in ("graftkit.run", "graftkit.watch"):
        monkeypatch.setattr(f"{module}.make_forward", cached)
    tune("examples.resnet20:resnet20", colours, tmp_path / "kept", task, method)
    assert [type(one).__name__ for one in made] == ["CachedForward", "CachedForward"]
    features = made[0].kept.values
    assert features.shape == ((24, 64) if "mean" in method else (24, 64, 8, 8))

    def never(graft, device, precision, depth, dataset, passes, labels=None):
        return plain(graft, device, precision, depth, dataset, 1, labels)

    for module in ("graftkit.run", "graftkit.watch"):
        monkeypatch.setattr(f"{module}.make_forward", never)
    tune("examples.resnet20:resnet20", colours, tmp_path / "anew", task, method)
    kept, anew = (graft_tensors(tmp_path / name) for name in ("kept", "anew"))
    for name, tensor in kept.items():
        assert torch.allclose(tensor, anew[name], atol=1e-4), name


def test_augmentation_keeps_nothing_and_says_so(tiny_vit, colours):
    from graftkit.engine.frozen import CachedForward, make_forward

    dataset, prepared = dataset_of(tiny_vit, colours / "train", "image_classify(flip=0.5)")
    forward = make_forward(prepared.graft, torch.device("cpu"), "fp32", prepared.depth, dataset, 5)
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
    torch.manual_seed(5)
    batch = dataset.batch(rows)
    other = batch.partners.rows
    x = plain.inputs(rows)["pixel_values"]
    y = plain.inputs(other)["pixel_values"]
    assert torch.allclose(batch.inputs["pixel_values"], batch.share * x + (1 - batch.share) * y, atol=1e-5)
    assert sorted(other) == sorted(rows)
    # the loss is that of the soft target
    criterion = prepared.rows.task.criterion(dataset, prepared.rows.labels, 0.1)
    logits = torch.randn(8, 3)
    soft = (
        batch.share * torch.eye(3)[plain.targets(rows)]
        + (1 - batch.share) * torch.eye(3)[plain.targets(other)]
    )
    wanted = torch.nn.functional.cross_entropy(logits, soft, reduction="none", label_smoothing=0.1)
    assert torch.allclose(criterion(logits, batch).losses, wanted, atol=1e-6)


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
    from graftkit.cli import main

    def words(out: Path) -> list[str]:
        return [
            "tune", "--model", str(tiny_vit), "--task", EVERYTHING, "--train", str(colours / "train"), "--eval",
            str(colours / "eval"), "--method", "lora(rank=2, dropout=0.1) + head()", "--out", str(out),
            "train.precision=fp32", "train.batch_size=8", "train.steps=8", "train.evaluate_every=2",
        ]  # fmt: skip

    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def dies() -> None:
        from graftkit import watch

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
    losses = task.criterion(dataset, labels, 0.0)(torch.zeros(10, 3), dataset.batch(np.arange(10))).losses
    targets = dataset.targets(np.arange(10)).numpy()
    sums = [float(losses[torch.from_numpy(targets == i)].sum()) for i in range(3)]
    assert np.allclose(sums, sums[0])


def test_timm_s_models_through_their_wrapper(colours, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip(
        "torchvision", reason="timm's transforms are those of torchvision, which is not installed"
    )
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    folder = tmp_path / "timm"
    config = TimmWrapperConfig.from_dict({"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {
        "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0,
    }})  # fmt: skip
    TimmWrapperForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "TimmWrapperImageProcessor"}')
    assert tune(folder, colours, tmp_path / "run", **{"train.epochs": 1.0}).metrics["rows"] == 12
