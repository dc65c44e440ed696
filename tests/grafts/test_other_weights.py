"""A backbone with the names and shapes of the right one and other weights is told of, and is no error."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import tune_words
from transformers import AutoModel, AutoModelForSequenceClassification

import graftkit
from graftkit.backbone import Backbone, values
from graftkit.backbone.values import OtherWeights


@pytest.fixture(scope="module")
def other(tiny_bert, tmp_path_factory) -> Path:
    """The tiny BERT whose weights were trained on a little: each is moved by a hundredth of its size or so."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path_factory.mktemp("models") / "other"))
    model = AutoModel.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.03 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def base(folder) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


@pytest.mark.slow
def test_loading_warns_of_other_weights(finished, tiny_bert, other):
    with pytest.warns(OtherWeights, match="other weights"):
        graftkit.load(base(other), finished / "graft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graftkit.load(base(tiny_bert), finished / "graft")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_of_the_same_weights_are_no_change(finished, tiny_bert, other, dtype):
    stored = json.loads((finished / "graft" / "graft.json").read_text())[values.KEY]
    assert 0 < sum(map(len, stored.values())) <= 128
    assert values.changed(Backbone(base(tiny_bert).to(dtype)), stored) == []
    assert values.changed(Backbone(base(other).to(dtype)), stored) != []
    cast = values.sampled(Backbone(base(tiny_bert).to(dtype)), ())
    assert values.changed(Backbone(base(tiny_bert)), cast) == []


def test_what_is_quantized_or_trained_is_passed_over(finished, other):
    stored = json.loads((finished / "graft" / "graft.json").read_text())[values.KEY]
    model = base(other)
    for name, parameter in model.named_parameters():
        if name in stored:
            parent, _, last = name.rpartition(".")
            whole = torch.nn.Parameter(parameter.detach().to(torch.int8), requires_grad=False)
            setattr(model.get_submodule(parent), last, whole)
    assert values.changed(Backbone(model), stored) == []
    assert values.changed(Backbone(base(other)), stored, trained=list(stored)) == []
    trained = values.sampled(Backbone(base(other)), trained=[n for n in stored])
    assert not set(trained) & set(stored)
    with torch.device("meta"):
        meta = AutoModelForSequenceClassification.from_config(model.config)
    assert values.sampled(Backbone(meta), ()) == {}


def test_grafts_without_the_values_load_as_before(finished, other, tmp_path):
    folder = Path(shutil.copytree(finished / "graft", tmp_path / "graft"))
    about = json.loads((folder / "graft.json").read_text())
    del about[values.KEY]
    (folder / "graft.json").write_text(json.dumps(about))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graftkit.load(base(other), folder)


@pytest.mark.slow
def test_predict_and_resume_tell_of_them(command, finished, tiny_bert, other, rows_folder, tmp_path):
    with pytest.warns(OtherWeights, match="was trained on"):
        assert command("predict", finished, "a plum", "--model", other).status == 0
    model = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    run = tmp_path / "run"
    assert command(*tune_words(model, rows_folder, run, "train.steps=2")).status == 0
    (run / "result.json").unlink()
    shutil.copytree(other, model, dirs_exist_ok=True)
    done = command("tune", "--resume", run)
    assert done.status == 1 and "other weights" in done.err and "--force" in done.err
    done = command("tune", "--resume", run, "--force")
    assert done.status == 0 and "warning: " in done.out and "other weights" in done.out
