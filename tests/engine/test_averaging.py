"""train.ema: the average against its formula, evaluated and saved as the result, and in checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import equal_bits, graft_tensors, tune_words
from killing import stopped_at
from safetensors.torch import load_file
from torch import nn

from graftkit.engine.averaging import Average

pytestmark = pytest.mark.slow

METHOD = "full(lr=0.001) + head(pooling='own')"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_are_those_of_the_formula(dtype):
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, generator=draw).to(dtype))
    average = Average({"weight": weight}, 0.6)
    wanted = weight.detach().double()
    for step in range(1, 9):
        with torch.no_grad():
            weight.copy_(torch.randn(4, 3, generator=draw))
        decay = min(0.6, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * weight.detach().double()
        average.update(step)
    assert average.values["weight"].dtype == torch.float32
    torch.testing.assert_close(average.values["weight"].double(), wanted, rtol=1e-5, atol=1e-6)

    present, shadow = weight.detach().clone(), average.values["weight"].clone()
    with average.applied():
        assert torch.equal(weight, shadow)
    assert torch.equal(weight, present) and weight.dtype == dtype
    assert torch.equal(average.values["weight"], shadow)
    average.keep()
    assert torch.equal(weight, shadow)


def test_training_is_the_same_and_the_plan_counts_it(ready):
    runs = [ready(METHOD, ema=ema, steps=4) for ema in (None, 0.9)]
    assert [s.loss for s in runs[0].loop] == [s.loss for s in runs[1].loop]
    values = [{n: p.detach() for n, p in run.graft.parameters.items()} for run in runs]
    assert equal_bits(*values)
    held = sum(value.numel() * value.element_size() for value in runs[1].loop.average.values.values())
    assert [run.prepared.plan.ema_bytes for run in runs] == [0, held]
    averages = runs[1].loop.average.values
    assert all(not torch.equal(averages[n], p) for n, p in values[1].items() if n.endswith("query.weight"))


def test_averages_of_what_is_freed_later_begin_with_its_values(ready):
    run = ready("gradual_unfreeze(every=2) + head()", ema=0.9, epochs=1.0, steps=None)
    before = {name: p.detach().clone() for name, p in run.graft.parameters.items()}
    list(run.loop)
    waiting = set(before) - set(run.prepared.phases[-1].labels)
    assert waiting and all(torch.equal(run.loop.average.values[name], before[name]) for name in waiting)


@pytest.mark.slow
def test_they_are_evaluated_saved_and_resumed(command, tiny_bert, rows_folder, tmp_path, monkeypatch):
    def words(name: str, *more: str) -> list[str]:
        given = ("train.steps=6", "train.checkpoint_every=1", "train.evaluate_every=3", *more)
        return tune_words(tiny_bert, rows_folder, tmp_path / name, *given, method=METHOD)

    found: dict[str, dict] = {}
    plain_keep = Average.keep

    def keep(self):
        found[str(len(found))] = {name: value.clone() for name, value in self.values.items()}
        plain_keep(self)

    monkeypatch.setattr(Average, "keep", keep)
    assert command(*words("whole", "train.ema=0.8")).status == 0
    assert command(*words("last", "train.ema=0.8", "data.eval=null")).status == 0
    saved = {key.partition(":")[2]: value for key, value in graft_tensors(tmp_path / "last").items()}
    assert equal_bits({name: saved[name] for name in found["1"]}, found["1"]), (
        "without evaluation, the last ones"
    )

    stopped_at(4, words("parts", "train.ema=0.8"), command, monkeypatch)
    newest = load_file(sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))[-1])
    assert {n for n in newest if n.startswith("averages/")} == {f"averages/{name}" for name in found["0"]}
    assert command("tune", "--resume", tmp_path / "parts").status == 0
    assert equal_bits(graft_tensors(tmp_path / "parts"), graft_tensors(tmp_path / "whole"))

    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    again = command("evaluate", tmp_path / "whole", "--data", rows_folder / "eval.csv", "--json")
    assert json.loads(again.out)["metrics"]["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)
