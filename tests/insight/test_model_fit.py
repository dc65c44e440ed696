"""`graftkit fit`: which backbone suits the rows, and what speaks against it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import make_rows, write_csv

import graftkit
from graftkit.errors import UserError


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """The tiny BERT's architecture with a tokenizer that knows no word of the rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "blind"
    tokens = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "is")
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64).save_pretrained(folder)
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_it_ranks_models_and_warns_of_one_that_cannot_read(tiny_bert, blind, rows_folder, command):
    words = ("fit", blind, tiny_bert, "--train", rows_folder / "train.csv", "train.precision=fp32")
    done = command(*words, "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    good, bad = found["models"]
    assert (good["model"], bad["model"]) == (str(tiny_bert), str(blind))
    assert good["probe"]["metric"] == "accuracy" and good["probe"]["value"] > 0.75 > bad["probe"]["value"]
    low, high = good["probe"]["interval"]
    assert low <= good["probe"]["value"] <= high
    assert good["logme"] > bad["logme"] and good["knn"]["value"] > bad["knn"]["value"]
    assert good["behind"] is None and bad["behind"][1] < 0
    told = " ".join(bad["warnings"])
    assert "does not know" in told and "unknown token" in told and "most frequent answer" in told
    assert not any("does not know" in warning for warning in good["warnings"])
    assert found["baselines"]["most_frequent"]["value"] == 0.5 and found["rows"] == 96
    assert "linear probe" in done.err and "warning: " in done.err


def test_a_run_starts_with_the_share_of_unknown_words(blind, rows_folder, command):
    done = command("plan", "--model", blind, "--train", rows_folder / "train.csv")
    assert done.status == 0 and "does not know" in done.out


def test_sets_and_numbers(tiny_bert):
    rows = make_rows(80, 3, ("fruit", "tool", "animal"))
    for row in rows:
        row["labels"] = [row["label"]] + (["new"] if "new" in row["text"] else [])
        row["number"] = {"fruit": -1.0, "tool": 0.5, "animal": 3.0}[row["label"]]
    sets = [{"text": row["text"], "labels": row["labels"]} for row in rows]
    found = graftkit.fit(tiny_bert, train=sets, task="classify(kind='multi')").models[0]
    assert found.probe.metric == "f1" and found.probe.value > 0.5
    numbers = [{"text": row["text"], "label": row["number"]} for row in rows]
    fitted = graftkit.fit(tiny_bert, train=numbers, task="classify(kind='regression')")
    assert fitted.models[0].probe.metric == "r2" and fitted.models[0].probe.value > 0.2
    assert abs(fitted.baselines["most_frequent"].value) < 1e-6


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("generate", "has no head that reads features"),
        ("tag", "has answers within its rows"),
        ("choice", "has answers within"),
    ],
)
def test_other_tasks_are_refused_by_name(task, why, tiny_bert, rows_folder):
    with pytest.raises(UserError, match=rf"image_classify, audio_classify\); {task}\(\) {why}"):
        graftkit.fit(tiny_bert, train=rows_folder / "train.csv", task=task)


def test_models_of_different_modality(tiny_bert, tiny_vit, rows_folder):
    with pytest.raises(UserError, match=r"reads texts and .* reads images, so they cannot be compared"):
        graftkit.fit([tiny_bert, tiny_vit], train=rows_folder / "train.csv")
    with pytest.raises(UserError, match=r"reads images, but classify\(\) is for texts"):
        graftkit.fit(tiny_vit, train=rows_folder / "train.csv")


def test_features_that_are_not_finite(tiny_bert, rows_folder, tmp_path, command):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_bert, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name][5:] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    done = command("fit", broken, "--train", rows_folder / "train.csv")
    assert done.status == 1 and "computes features that are not finite" in done.err


def test_a_class_of_one_row_each(tiny_bert, tmp_path):
    rows = [{"text": f"the {word}", "label": str(i // 19)} for i, word in enumerate("abcdefghijklmnopqrst")]
    with pytest.raises(UserError, match="fewer than two of the 2 classes have two rows"):
        graftkit.fit(tiny_bert, train=write_csv(tmp_path / "rows.csv", rows))


def test_images_that_are_small_and_grey(tiny_vit, tmp_path):
    from PIL import Image

    draw = np.random.default_rng(0)
    for label, low in (("dark", 0), ("light", 128)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(6):
            grey = draw.integers(low, low + 127, (8, 8), dtype=np.uint8)
            Image.fromarray(grey).convert("RGB").save(tmp_path / "images" / label / f"{number}.png")
    found = graftkit.fit(tiny_vit, train=tmp_path / "images", task="image_classify").models[0]
    told = " ".join(found.warnings)
    assert "enlarged" in told and "grey" in told
