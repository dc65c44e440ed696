"""What a tokenizer or processor gives has to fit the model: one error before training, in every command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import make_rows
from image_models import fill, vit
from transformers import AutoTokenizer

import graftkit
from graftkit.errors import UserError
from graftkit.recipe.schema import make
from graftkit.runs.check import check
from graftkit.runs.prepare import prepare, prepare_rows

QUICK = {"train.steps": 1, "train.precision": "fp32"}


def with_tokens(folder: Path, to: Path, tokens: list[str], special: bool = False) -> Path:
    """A copy of a model whose tokenizer alone has more tokens."""
    shutil.copytree(folder, to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.save_pretrained(to)
    return to


def plan(model: Path, rows, task: str = "classify") -> None:
    recipe = make({"model": str(model), "task": task, "method": "head()", "data": {"train": "x.csv"}})
    prepare(recipe, prepare_rows(recipe, rows), meta=True)


def refused_everywhere(model: Path, rows, *told: str, task: str = "classify", tmp_path: Path) -> None:
    """`plan` and `tune` raise one `UserError` with all of `told`, and `data check` has it among its problems."""
    for work in (
        lambda: plan(model, rows, task),
        lambda: graftkit.tune(
            model=model, task=task, train=rows, method="head()", out=tmp_path / "no", settings=QUICK
        ),
    ):
        with pytest.raises(UserError) as caught:
            work()
        assert all(part in str(caught.value) for part in told), caught.value
    problems = [one.text for one in check(model=str(model), task=task, train=rows).problems]
    assert any(all(part in text for part in told) for text in problems), problems


def test_tokens_without_a_row(tiny_bert, tmp_path):
    model = with_tokens(tiny_bert, tmp_path / "big", ["zebra", "gnu"])
    size = len(AutoTokenizer.from_pretrained(model))
    refused_everywhere(
        model, make_rows(24), f"model '{model}'", f"len(tokenizer) is {size}", f"{size - 2} rows", "'zebra', 'gnu'",
        "model.resize_token_embeddings(len(tokenizer))", tmp_path=tmp_path,
    )  # fmt: skip


def test_a_padding_token_without_a_row(tiny_gpt2, tmp_path):
    model = shutil.copytree(tiny_gpt2, tmp_path / "padded")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(model)
    refused_everywhere(model, make_rows(24), "'<padding>'", tmp_path=tmp_path)


def test_a_special_token_without_a_row_only_matters_where_a_text_holds_it(tiny_bert, tmp_path):
    """As in published folders whose token for images has no row in the model of texts."""
    model = with_tokens(tiny_bert, tmp_path / "image", ["<image>"], special=True)
    rows = make_rows(24)
    run = graftkit.tune(
        model=model, train=rows, eval=rows[:8], method="head()", out=tmp_path / "run", settings=QUICK
    )
    for ask in (
        lambda: run.predict(["the cat", "a <image> here"]),
        lambda: run.evaluate([{"text": "the cat", "label": "fruit"}, {"text": "<image>", "label": "tool"}]),
    ):
        with pytest.raises(UserError, match=r"row 2: model .*len\(tokenizer\) is \d+.*'<image>'"):
            ask()
    refused_everywhere(
        model, [*rows, {"text": "see <image>", "label": "fruit"}], "row 25", "'<image>'", tmp_path=tmp_path
    )


def test_tokens_of_other_tasks(tiny_bert, tmp_path):
    model = with_tokens(tiny_bert, tmp_path / "image", ["<image>"], special=True)
    tagged = [{"tokens": ["the", "<image>" if i == 11 else "cat"], "tags": ["X", "Y"]} for i in range(12)]
    refused_everywhere(model, tagged, "row 12", "'<image>'", task="tag", tmp_path=tmp_path)
    chosen = [
        {"question": "what", "choices": ["cat", "<image>" if i == 11 else "dog"], "label": i % 2} for i in range(12)
    ]  # fmt: skip
    refused_everywhere(model, chosen, "row 12", "'<image>'", task="choice", tmp_path=tmp_path)


def test_token_types_that_the_model_has_not(tiny_bert, tmp_path):
    from transformers import BertConfig, BertModel

    model = shutil.copytree(tiny_bert, tmp_path / "types")
    config = BertConfig.from_pretrained(model)
    config.type_vocab_size = 1
    BertModel(config).save_pretrained(model)
    rows = [{"text1": "the cat", "text2": "a dog", "label": "ab"[i % 2]} for i in range(24)]
    refused_everywhere(
        model,
        rows,
        "token types up to 1",
        "the model has 1 token type",
        "model_input_names",
        tmp_path=tmp_path,
    )


@pytest.mark.parametrize(("size", "channels", "told"), [
    (48, 3, "3 x 48 x 48"), (32, 4, "3 x 32 x 32"),
])  # fmt: skip
def test_images_that_the_model_does_not_take(tmp_path, size, channels, told):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    model = vit(tmp_path / "vit")
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(model)
    config = ViTConfig.from_pretrained(model)
    config.num_channels = channels
    ViTForImageClassification(config).save_pretrained(model)
    images = str(fill(tmp_path / "images", 4))
    for work in (lambda: plan(model, images, "image_classify"),
                 lambda: graftkit.tune(model=model, task="image_classify", train=images, out=tmp_path / "no")):  # fmt: skip
        with pytest.raises(UserError) as caught:
            work()
        assert told in str(caught.value) and str(model) in str(caught.value)


def test_a_processor_of_grey_images(tmp_path):
    from transformers import ViTImageProcessor

    model = vit(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        model
    )
    with pytest.raises(UserError, match="for images with 1 channel"):
        plan(model, str(fill(tmp_path / "images", 4)), "image_classify")


def test_spectrograms_that_the_model_does_not_take_are_known_to_the_plan(tmp_path):
    from audio_models import RATE, ast, write_tones
    from transformers import ASTFeatureExtractor

    model = ast(tmp_path / "ast")
    ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=16, max_length=40).save_pretrained(model)
    with pytest.raises(UserError, match="cannot take input_values of shape 40x16"):
        plan(model, str(write_tones(tmp_path / "sounds", 3, 0)), "audio_classify")
