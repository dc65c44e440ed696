"""Features of rows: what the head reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graftkit.engine.forward import Forward
from graftkit.errors import UserError
from graftkit.insight.features import features_of
from graftkit.recipe import schema as recipes
from graftkit.runs.features import frozen_backbone
from graftkit.runs.predict import load_run, open_run
from graftkit.runs.prepare import prepare_rows


def recipe_of(model, rows_folder, method: str = "lora() + head()"):
    return recipes.make(
        {
            "model": str(model), "task": "classify", "method": method, "train": {"precision": "fp32"},
            "data": {"train": str(rows_folder / "train.csv"), "eval": None},
        }
    )  # fmt: skip


def test_they_are_the_mean_of_the_last_states(tiny_bert, rows_folder):
    recipe = recipe_of(tiny_bert, rows_folder, "lora() + head(pooling='mean')")
    rows = prepare_rows(recipe)
    reading = frozen_backbone(recipe, rows)
    got = reading.features(rows.train)
    again = reading.features(rows.train)
    assert got.values.shape == (96, 32) and np.array_equal(got.values, again.values)
    graft = reading.forward.graft
    dataset = reading.dataset(rows.train)
    for row in (0, 5, 95):
        inputs = dataset.batch(np.array([row]), reading.forward.device).inputs
        with torch.no_grad(), graft.disabled():
            states = graft.model.eval().base_model(**inputs)[0].mean(1)[0]
        assert np.allclose(got.values[row], states.cpu().numpy(), atol=1e-4)


def test_a_finished_run_gives_features_of_its_own(tiny_bert, rows_folder, tmp_path, command):
    from conftest import tune_words

    assert command(*tune_words(tiny_bert, rows_folder, tmp_path / "run")).status == 0
    loaded = load_run(open_run(tmp_path / "run"))
    rows = prepare_rows(recipe_of(tiny_bert, rows_folder))
    dataset = loaded.task.dataset(rows.train, loaded.backbone, loaded.max_length)
    own = features_of(loaded.forward, dataset).values
    bare = frozen_backbone(recipe_of(tiny_bert, rows_folder), rows).features(rows.train).values
    assert own.shape == bare.shape and not np.allclose(own, bare, atol=1e-3)


def test_values_that_are_not_finite_name_the_row(tiny_bert, rows_folder):
    recipe = recipe_of(tiny_bert, rows_folder)
    rows = prepare_rows(recipe)
    reading = frozen_backbone(recipe, rows)
    with torch.no_grad():
        reading.forward.graft.model.get_input_embeddings().weight[5:] = float("nan")
    with pytest.raises(UserError, match=r"line 2: .*not finite for this row and 95 more"):
        features_of(
            Forward(reading.forward.graft, reading.forward.device, "fp32"), reading.dataset(rows.train)
        )
