"""Activation checkpointing changes what is kept, and no number."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from graftkit.errors import UserError

pytestmark = pytest.mark.slow

METHODS = ("lora(rank=2, dropout=0.3) + head()", "unfreeze('blocks[-1:]') + head()")


def trained(run) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(7)
    losses = [step.loss for step in run.loop]
    return losses, {name: p.detach().clone() for name, p in run.graft.parameters.items()}


def kept_in_a_step(run) -> int:
    """Values that the graph of a forward pass holds beside the parameters, each tensor once."""
    sizes: dict[int, int] = {}
    weights = {p.data_ptr() for p in run.graft.model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run.loop._enter(run.loop.phases[0], None)
        batch = run.loop.work(0).own[0]
        held = run.loop.learn(run.forward, batch)
    assert held["loss"].losses.requires_grad
    run.loop.recompute.leave()
    return sum(sizes.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["blocks", "selective"])
def test_losses_and_weights_are_the_same_with_dropout_of_the_model_and_of_the_method(ready, method, how):
    losses, weights = trained(ready(method, checkpointing="none", steps=4))
    again = ready(method, checkpointing=how, steps=4)
    found, other = trained(again)
    assert found == losses
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert not any("forward" in vars(m) for m in again.graft.model.modules()), "the model is as it was"


def test_less_is_kept_and_frozen_blocks_are_not_computed_again(ready):
    sizes = {how: kept_in_a_step(ready(METHODS[0], checkpointing=how)) for how in ("none", "blocks")}
    assert sizes["blocks"] < 0.4 * sizes["none"]
    run = ready("unfreeze('blocks[-1:]') + head()", checkpointing="blocks", steps=1)
    calls = []
    for number, name in enumerate(run.graft.backbone.blocks):
        part = next(run.graft.backbone.module(name).children())
        part.register_forward_hook(lambda *given, number=number: calls.append(number))
    list(run.loop)
    assert calls == [0, 1, 2, 2]


def test_it_begins_when_memory_runs_out_before_the_batch_is_halved(ready, monkeypatch):
    run = ready(METHODS[0], checkpointing="auto", steps=2)
    plain = type(run.dataset).call
    failures = []

    def call(self, model, batch):
        if not run.loop.recompute.on:
            failures.append(len(batch.rows))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, model, batch)

    monkeypatch.setattr(type(run.dataset), "call", call)
    assert [step.rows for step in run.loop] == [16, 16]
    assert run.loop.split == 1 and failures == [16]
    assert [len(list(run.loop.recompute.notes())) for _ in range(2)] == [1, 0]


def test_inputs_of_blocks_are_kept_on_the_host(ready, monkeypatch):
    """A CPU has no other memory, so that the copies are made there: as many as there are blocks, and no number changes."""
    from graftkit.engine import recompute
    from graftkit.runs import prepare

    losses, weights = trained(ready(METHODS[0], checkpointing="none", steps=3))
    monkeypatch.setattr(prepare, "check_offload", lambda *given: None)
    kept = []

    class Counting(recompute.OnHost):
        def __init__(self, states):
            super().__init__(states)
            pack = self.pack_hook

            def counted(tensor):
                kept.append(pack(tensor))
                return kept[-1]

            self.pack_hook = counted

    monkeypatch.setattr(recompute, "OnHost", Counting)
    run = ready(METHODS[0], checkpointing="offload", steps=3)
    found, other = trained(run)
    assert found == losses and all(torch.equal(weights[name], other[name]) for name in weights)
    copies = [value[1] for value in kept if isinstance(value, tuple)]
    assert [copy.shape[-1] for copy in copies] == [32] * len(run.graft.backbone.blocks) * 3


def test_offloading_is_refused_on_a_cpu(ready):
    with pytest.raises(UserError, match="this run computes on the CPU; use"):
        ready(METHODS[0], checkpointing="offload")
