"""Steps on fake tensors against real ones: bytes that autograd saves, FLOPs, and formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from graftkit.engine.frozen import set_training
from graftkit.engine.joining import Joining, join
from graftkit.plan.counting import Counting
from graftkit.plan.pretended import Pretended
from graftkit.recipe import schema as recipes
from graftkit.runs.prepare import Prepared, prepare, prepare_rows


def ready(model: str, method: str, *, meta: bool = False, **train: object) -> Prepared:
    settings = {
        f"train.{name}": value for name, value in {"batch_size": 8, "precision": "fp32", **train}.items()
    }
    given, named = {"train": make_rows(8), "eval": None, "test": None}, {"model": model, "method": method}
    values, tables = recipes.gather(None, given, named, settings)
    recipe = recipes.make(values)
    return prepare(recipe, prepare_rows(recipe, tables["train"]), meta=meta)


def pretended(
    model: str, method: str, *, cached: bool = False, **train: object
) -> tuple[Pretended, Prepared]:
    run = ready(model, method, meta=True, **train)
    checkpointing = run.settings.checkpointing
    return (
        Pretended(run.graft, run.device, run.precision, run.phases[-1], run.learn, checkpointing=checkpointing, cached=cached),
        run,
    )  # fmt: skip


def saved_bytes(run: Prepared) -> int:
    """What autograd saves in a real step, weights apart: an outside count, by its own hooks."""
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {
        p.untyped_storage()._cdata for p in (*run.graft.model.parameters(), *run.graft.model.buffers())
    }

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    rows = np.arange(8)
    joining = Joining(run.graft.model)
    for name, parameter in run.graft.model.named_parameters():
        parameter.requires_grad_(name in run.graft.labels)
    set_training(run.graft, run.depth)
    from graftkit.engine.dropout import fast_dropout
    from graftkit.engine.forward import Forward

    forward = Forward(run.graft, run.device, run.precision)
    join(joining, run.train, forward)
    with fast_dropout(run.device, 0), saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = run.learn(forward, run.train.batch(rows, run.device))
        (terms["loss"].losses.sum() / 8).backward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("method", ["lora(rank=4) + head()", "full() + head()"])
def test_activations_are_those_that_autograd_saves(tiny_bert, method):
    """Beside them, the outputs that the loss still holds: some hundred bytes for eight rows."""
    one, run = pretended(str(tiny_bert), method)
    counted = one.step(run.train, np.arange(8)).saved
    wanted = saved_bytes(ready(str(tiny_bert), method))
    assert wanted > 50_000
    assert counted == pytest.approx(wanted, rel=0.03)


def test_checkpointing_saves_less_and_computes_more(tiny_bert):
    plain, run = pretended(str(tiny_bert), "full() + head()")
    again, _ = pretended(str(tiny_bert), "full() + head()", checkpointing="blocks")
    rows = np.arange(8)
    usual, less = plain.step(run.train, rows), again.step(run.train, rows)
    assert less.saved < 0.5 * usual.saved
    assert less.flops > 1.2 * usual.flops


def test_cached_steps_start_behind_the_frozen_blocks(tiny_bert):
    head, run = pretended(str(tiny_bert), "head()", cached=True)
    upper, _ = pretended(str(tiny_bert), "unfreeze('blocks[1:]') + head()", cached=True)
    whole, _ = pretended(str(tiny_bert), "unfreeze('blocks[1:]') + head()")
    rows = np.arange(8)
    assert head.step(run.train, rows).flops < 0.02 * upper.step(run.train, rows).flops
    assert upper.step(run.train, rows).flops < whole.step(run.train, rows).flops
    width = run.graft.model.config.hidden_size
    assert head.cached_bytes(run.train, rows) == 8 * width * 4
    assert upper.cached_bytes(run.train, rows) == int(run.train.lengths.sum()) * width * 4


def test_no_weight_is_allocated_and_gradients_are_gone(tiny_bert):
    one, run = pretended(str(tiny_bert), "full() + head()")
    one.step(run.train, np.arange(8))
    assert all(type(p.data).__name__ == "FakeTensor" for p in run.graft.model.parameters())
    assert all(p.grad is None for p in run.graft.model.parameters())


def test_products_are_counted_as_torch_counts_them():
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 8))
    x = torch.randn(5, 7, 24, requires_grad=True)
    with FlopCounterMode(display=False) as theirs:
        model(x).sum().backward()
    with Counting() as ours:
        model(x).sum().backward()
    counted = sum(operation.flops * times for operation, times in ours.operations.items())
    assert counted == theirs.get_total_flops() == 6 * 35 * (24 * 40 + 40 * 8)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_a_cpu_counts(causal):
    """4 L^2 d a head forward and 10 L^2 d backward, where torch's own counter says 0; half of it under the diagonal."""
    query, key, value = (torch.randn(2, 3, 10, 16, requires_grad=True) for _ in range(3))
    with Counting() as ours:
        F.scaled_dot_product_attention(query, key, value, is_causal=causal).sum().backward()
    counted = sum(operation.flops * times for operation, times in ours.operations.items())
    assert counted == 14 * 2 * 3 * 100 * 16 * (0.5 if causal else 1.0)


def test_convolutions():
    layer = torch.nn.Conv2d(6, 8, 3, padding=1, groups=2)
    x = torch.randn(2, 6, 5, 5)
    with Counting() as ours:
        layer(x).sum().backward()
    one = 2 * (2 * 8 * 25) * (3 * 9)
    assert (
        sum(operation.flops * times for operation, times in ours.operations.items()) == 2 * one
    )  # none for x


def test_live_bytes_follow_storages():
    with FakeTensorMode(), Counting() as counting:
        a = torch.empty(1000)
        b = a.view(10, 100)
        assert counting.now == 4000
        c = b + 1
        del a, b
        assert (counting.now, counting.peak) == (4000, 8000)
        del c
        assert (counting.now, counting.peak) == (0, 8000)
