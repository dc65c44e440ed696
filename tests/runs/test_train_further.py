"""`train.from`: a new run whose graft begins with the values of another."""

from __future__ import annotations

import json

import pytest
from conftest import equal_bits, graft_tensors, make_rows, tune_words, write_csv

pytestmark = pytest.mark.slow

METHOD = "lora(rank=4) + head()"


@pytest.mark.parametrize("place", [".", "graft"])
def test_it_begins_where_the_other_ended(command, finished, tiny_bert, rows_folder, tmp_path, place):
    out = tmp_path / "run"
    more = [f"train.from={finished / place}", "train.steps=1", "train.lr=1e-30", "train.weight_decay=0"]
    done = command(
        *tune_words(tiny_bert, rows_folder, out, *more, method="lora(rank=4, dropout=0.1) + head()")
    )
    # a rate as small moves nothing, which the audit of a run of one step does not mind
    assert done.status == 0, done.err
    assert equal_bits(graft_tensors(out), graft_tensors(finished))
    first, second = (json.loads((run / "result.json").read_text())["metrics"] for run in (finished, out))
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)


def test_a_finished_run_says_how_it_is_trained_further(command, finished, tmp_path):
    for more in ([], ["train.epochs=3"]):
        done = command("tune", "--resume", finished, *more)
        assert "train.from=" in done.out + done.err
    saved = finished / "recipe.yaml"
    done = command("tune", saved, f"train.from={finished}", "train.steps=3", "--out", tmp_path / "on")
    assert done.status == 0
    assert not equal_bits(graft_tensors(tmp_path / "on"), graft_tensors(finished))
    assert f"from: {finished}" in (tmp_path / "on" / "recipe.yaml").read_text()


def test_what_it_cannot_begin_with(command, finished, tiny_bert, tiny_gpt2, rows_folder, tmp_path):
    def refused(*told, model=tiny_bert, method=METHOD, start=finished, more=()):
        for name in ("plan", "tune"):
            words = [
                name,
                *tune_words(
                    model, rows_folder, tmp_path / "run", f"train.from={start}", *more, method=method
                )[1:],
            ]
            done = command(*words)
            assert done.status == 1 and all(text in done.err for text in told), done.err
        assert not (tmp_path / "run").exists()

    refused(
        "is lora(rank=4)", "is lora() + head", "Write the method of the graft", method="lora(rank=8) + head()"
    )
    refused("another backbone", model=tiny_gpt2, method="lora(rank=4) + head(pooling='last')")
    refused("does not exist", start=tmp_path / "none")
    path = write_csv(tmp_path / "t.csv", make_rows(48, kinds=("fruit", "tool", "animal")))
    refused("has the labels 'fruit', 'tool'", "'animal'", more=[f"data.train={path}", "data.eval=0.2"])
