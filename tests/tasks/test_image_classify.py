"""What image classification makes of files, tables and recipes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
import torch
from image_models import KINDS, ROOT, convnext, dataset_of, fill, picture, spoil, table_rows
from PIL import Image

from graftkit.errors import UserError
from graftkit.runs.prepare import make_task
from graftkit.tasks.image_classify.inputs import Transform
from graftkit.tasks.image_classify.task import ImageClassify


@pytest.fixture(scope="module")
def tiny_convnext(tmp_path_factory) -> Path:
    return convnext(tmp_path_factory.mktemp("models") / "tiny-convnext")


# --- what the model sees


@pytest.mark.parametrize("model", ["tiny_vit", "tiny_convnext"])
def test_inputs_are_those_of_the_model_s_own_processor(model, colours, request):
    from graftkit.libraries import image_processors

    folder = request.getfixturevalue(model)
    dataset, _ = dataset_of(folder, colours / "train")
    made = dataset.batch(np.arange(len(dataset))).inputs
    images = [Image.open(p.name).convert("RGB") for p in dataset.pictures]
    wanted = image_processors().from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
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
    ("mean=[1, 2]", "a list of 3, one for each channel"),
    ("mean=['a', 1, 2]", "a list of 3, one for each channel"),
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
    with pytest.raises(UserError, match=r"different sizes.*tall\.png is 48 x 32"):
        dataset_of("examples.resnet20:resnet20", tmp_path)
    dataset, _ = dataset_of("examples.resnet20:resnet20", tmp_path, "image_classify(resize=32, crop=32)")
    assert dataset.batch(np.arange(7)).inputs["x"].shape == (7, 3, 32, 32)


def test_data_max_length_has_no_sense(tiny_vit, colours):
    with pytest.raises(UserError, match=r"data\.max_length is for texts"):
        dataset_of(tiny_vit, colours / "train", max_length=10)


# --- tables


@pytest.mark.slow
def test_folders_tables_bytes_images_and_arrays_give_the_same(tiny_vit, colours, tmp_path):
    import pyarrow
    import pyarrow.parquet

    root = colours / "train"
    rows = table_rows()
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
        assert torch.equal(
            dataset.batch(every).inputs["pixel_values"], wanted.batch(every).inputs["pixel_values"]
        )
        assert torch.equal(dataset.targets(every), wanted.targets(every))
    assert found[0].digest() == found[1].digest() == wanted.digest()


def test_a_label_that_is_found_by_what_it_is_like(tiny_vit, colours):
    rows = [
        {"image": np.asarray(Image.open(colours / "train" / r["image"])), "shade": r["label"]}
        for r in table_rows()
    ]
    dataset, _ = dataset_of(tiny_vit, rows)
    assert len(dataset) == 24
    with pytest.raises(UserError, match=r"no column of train .* looks like the label"):
        dataset_of(tiny_vit, [{"image": row["image"]} for row in rows])


def test_datasets_with_images(tiny_vit, colours):
    datasets = pytest.importorskip("datasets")
    rows = table_rows()
    table = datasets.Dataset.from_dict({
        "image": [str(colours / "train" / r["image"]) for r in rows], "label": [r["label"] for r in rows],
    }).cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=sorted(KINDS)))  # fmt: skip
    found, _ = dataset_of(tiny_vit, table)
    wanted, _ = dataset_of(tiny_vit, colours / "train")
    assert found.digest() == wanted.digest()


# --- bad images


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
