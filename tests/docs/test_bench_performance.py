"""The scripts behind docs/performance.md: what they count, and when a row passes."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import forked

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.syspath_prepend(str(ROOT))  # bench/gpu_lora.py puts it there too
    return importlib.import_module


def test_operations_of_lora_are_those_of_nemo(script):
    """NeMo AutoModel's performance summary: Llama 3.1 8B, LoRA of rank 16, 12,473 tokens/s/GPU are 402 TFLOP/s/GPU."""
    gpu = script("gpu_lora")
    geometry = gpu.GEOMETRIES["8b"]
    trained, frozen = gpu.lora_parameters(geometry)
    assert trained == 41_943_040  # what PEFT prints for it
    rate = 12_473 * gpu.operations_per_token(geometry, 4096, trained, frozen) / 1e12
    assert round(rate) == 402


def test_parameters_are_counted_as_the_model_has_them(script):
    from transformers import LlamaConfig, LlamaForCausalLM

    gpu = script("gpu_lora")
    geometry = gpu.GEOMETRIES["tiny"]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**geometry))
    trained, frozen = gpu.lora_parameters(geometry)
    assert frozen == sum(p.numel() for p in model.parameters())
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert trained == sum(gpu.RANK * (m.in_features + m.out_features) for m in layers)


def test_operations_of_a_step_are_those_that_torch_counts(script):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertConfig, BertModel

    from graftkit import attach

    products = script("compared.products")
    batch, length, hidden, inner, blocks, rank = 2, 16, 32, 64, 2, 4
    config = BertConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=2, vocab_size=50,
        attn_implementation="eager",
    )  # fmt: skip
    graft = attach(BertModel(config, add_pooling_layer=False), f"lora(rank={rank}, sites='q,v')")
    with FlopCounterMode(display=False) as counter:
        graft.model(torch.randint(0, 50, (batch, length))).last_hidden_state.sum().backward()
    assert counter.get_total_flops() == products.operations(hidden, inner, blocks, batch, length, rank)
    of_one = products.operations(hidden, inner, blocks, batch, 1, rank)  # where every token is the first
    assert products.operations(hidden, inner, blocks, batch, 1, rank, first=True) == of_one
    less = (
        2 * 2 * batch * (length - 1) * (2 * hidden * hidden + 2 * hidden * inner)
    )  # q, o, up and down, there and back
    less += 12 * batch * (length - 1) * length * hidden + 2 * 6 * batch * (length - 1) * hidden * rank
    assert (
        products.operations(hidden, inner, blocks, batch, length, rank, first=True)
        == counter.get_total_flops() - less
    )


def test_a_row_passes_with_its_ratio_its_accuracy_and_its_memory(script):
    compare = script("compare_hf")
    row = compare.Row("", "", 2.0, compare.Side("", ""), (compare.Side("", ""),), memory_bar=0.5)

    def passes(seconds: float, accuracy: float, memory: int) -> bool:
        theirs = [{"seconds": s, "accuracy": 0.9, "memory": 1000} for s in (9.0, 10.0, 30.0)]
        found = compare.compared(row, [{"seconds": seconds, "accuracy": accuracy, "memory": memory}], theirs)
        assert found["peer_seconds"] == 10.0 and found["ratio"] == 10.0 / seconds
        return found["passed"]

    assert passes(5.0, 0.891, 500)
    assert not passes(5.1, 0.9, 500)
    assert not passes(5.0, 0.889, 500)
    assert not passes(5.0, 0.9, 501)


def test_an_interrupted_measurement_goes_on_and_compiled_peers_run_when_asked(script, monkeypatch, tmp_path):
    compare = script("compare_hf")
    asked, path = [], tmp_path / "runs.json"

    def child(_, given):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((given["function"], given["seed"]))
        return {"seconds": 10.0 if given["function"] == "trainer_side" else 2.0}

    monkeypatch.setattr(compare, "child", child)
    row = compare.ROWS["lora-bf16"]
    with pytest.raises(KeyboardInterrupt):
        compare.run_row(row, 2, True, compare.Done(path, "this code"))
    first = [("graftkit_side", 0), ("trainer_side", 0), ("graftkit_side", 1)]
    assert asked == first
    asked.clear()
    found = compare.run_row(row, 2, True, compare.Done(path, "this code"))
    assert asked == [("trainer_side", 1)] and found["ratio"] == 5.0 and len(found["peer_settings"]) == 1
    asked.clear()
    compare.run_row(row, 1, True, compare.Done(path, "other code"), compiled=True)
    assert asked == [first[0], ("trainer_side", 0), ("trainer_side", 0)]
    done = compare.Done(path, "other code")
    assert len(done.runs) == 3
    done.end()
    assert not path.exists()


def test_a_lower_loss_passes_and_a_limit_stands_for_a_peer(script):
    compare = script("compare_hf")
    row = compare.ROWS["llama"]
    ours = [{"seconds": 1.0, "loss": 2.0, "memory": 1}]
    for loss, passed in ((1.99, True), (1.97, False), (3.0, True)):
        assert compare.compared(row, ours, [{"seconds": 3.0, "loss": loss, "memory": 2}])["passed"] is passed
    start = compare.ROWS["start"]
    assert compare.compared(start, [{"seconds": 4.9}], [{"seconds": start.limit}])["passed"]
    assert not compare.compared(start, [{"seconds": 5.1}], [{"seconds": start.limit}])["passed"]


def forked_script(command: list[str], **_) -> SimpleNamespace:
    """What `subprocess.run` gives for a Python script, and for those that it starts, without the time of imports."""

    def work() -> None:
        sys.argv, subprocess.run = command[1:], forked_script
        runpy.run_path(command[1], run_name="__main__")

    done = forked(work)
    return SimpleNamespace(returncode=done.status, stdout=done.out, stderr=done.err)


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu():
    command = [sys.executable, str(ROOT / "bench" / "gpu_lora.py"), "--json", "--tiny", "--rows", "8b"]
    done = forked_script(command)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["graftkit"]["tokens_per_second"] > 0 and row["graftkit"]["tflops"] > 0
