"""The engine against plain references: batches, steps, audit, frozen prefix, number types."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from device import DEVICE

from graftkit.data.order import epoch_batches, ordered_batches, padding_share, steps_per_epoch
from graftkit.data.source import Pass
from graftkit.engine import precision
from graftkit.engine.cached import CachedForward, make_forward
from graftkit.engine.frozen import set_training
from graftkit.engine.predict import predict
from graftkit.errors import UserError
from graftkit.optim.schedule import factor

pytestmark = pytest.mark.sampled

CPU = torch.device("cpu")


def gradients(run: SimpleNamespace) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in run.graft.parameters.items() if p.grad is not None}


# --- batches


def test_batches_hold_each_row_once_are_the_same_each_time_and_like_in_length():
    lengths = np.random.default_rng(0).integers(3, 60, 2003)
    batches = epoch_batches(lengths, 32, 7, 2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(2003))
    assert len(batches) == steps_per_epoch(2003, 32, 1) == math.ceil(2003 / 32)
    assert max(map(len, batches)) == 32
    again = epoch_batches(lengths, 32, 7, 2)
    assert all((a == b).all() for a, b in zip(batches, again))
    for other in (epoch_batches(lengths, 32, 7, 3), epoch_batches(lengths, 32, 8, 2)):
        assert [b.tolist() for b in other] != [b.tolist() for b in batches]
    shuffled = np.array_split(np.random.default_rng(1).permutation(2003), len(batches))
    assert padding_share(lengths, batches) < 0.05 < 0.3 < padding_share(lengths, shuffled)
    means = [lengths[batch].mean() for batch in batches]
    assert means != sorted(means), "short rows must not come first in every epoch"
    ordered = ordered_batches(lengths, 64)
    assert (
        sorted(np.concatenate(ordered).tolist()) == list(range(2003))
        and lengths[ordered[0][0]] == lengths.max()
    )


def test_steps_of_an_epoch_with_accumulation(ready):
    run = ready("head(pooling='mean')", accumulate=4, epochs=2.0, steps=None)
    assert run.loop.per_epoch == 2 and run.prepared.settings.steps == 4
    seen = [row for step in range(2) for batch in run.loop.batches(step) for row in batch]
    assert sorted(seen) == list(range(96))


# --- schedule, clipping, accumulation, rates


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedule(schedule):
    values = [factor(step, 100, 0.1, schedule) for step in range(100)]
    assert all(0 < value <= 1 for value in values) and values[10] == 1
    assert values[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    for step in range(10, 100):
        done = (step - 10) / 90
        expected = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1}[schedule]
        assert values[step] == pytest.approx(expected)
    assert factor(0, 10, 0.0, schedule) == 1 and factor(0, 1, 0.5, schedule) > 0


def test_clipping(ready):
    norms, moved = [], []
    for clip in (0.0, 0.01):
        run = ready("full(lr=0.001) + head()", clip=clip, steps=1)
        seen = []
        run.loop.optimizer.register_step_pre_hook(
            lambda optimizer, args, kwargs, run=run, seen=seen: seen.append(
                torch.stack([g.norm() for g in gradients(run).values()]).norm().item()
            )
        )
        norms.append(next(iter(run.loop)).gradient_norm)
        moved.append(seen[0])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5), "what is told is the norm before clipping"
    assert moved == [pytest.approx(norms[0], rel=1e-4), pytest.approx(0.01, rel=1e-3)]


def test_accumulation_equals_one_big_batch(ready):
    found = []
    for size, accumulate in ((32, 1), (8, 4)):
        run = ready("full() + head(dropout=0)", batch_size=size, accumulate=accumulate)
        run.graft.model.eval()
        rows = np.arange(32)
        loss, tokens = step_of(run.loop, np.array_split(rows, accumulate))
        found.append((loss, tokens, gradients(run)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6) and found[0][1] == found[1][1]
    for name, gradient in found[0][2].items():
        assert torch.allclose(gradient, found[1][2][name], atol=1e-6), name


def test_the_gradient_is_that_of_the_mean_loss(ready):
    run = ready("full() + head(dropout=0)", label_smoothing=0.1)
    run.graft.model.eval()
    batch = run.dataset.batch(np.arange(16), DEVICE)
    loss, _ = step_of(run.loop, [np.arange(16)])
    ours = gradients(run)
    run.graft.model.zero_grad()
    plain = torch.nn.functional.cross_entropy(run.forward(batch), batch.targets, label_smoothing=0.1)
    plain.backward()
    assert loss == pytest.approx(plain.item(), rel=1e-6)
    for name, gradient in gradients(run).items():
        assert torch.allclose(gradient, ours[name], atol=1e-6), name


def test_memory_that_runs_out_halves_the_parts_and_changes_nothing_else(ready):
    whole, small = (ready("full() + head(dropout=0)") for _ in range(2))
    for run in (whole, small):
        run.graft.model.eval()
    plain = small.loop.forward

    def forward(batch):
        if len(batch.rows) > 5:
            raise torch.OutOfMemoryError("no room")
        return plain(batch)

    forward.device, forward.prepare = DEVICE, lambda batch: batch.prepare()
    small.loop.forward = forward
    losses = [step_of(run.loop, [np.arange(16)])[0] for run in (whole, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and small.loop.split == 4
    for name, gradient in gradients(whole).items():
        assert torch.allclose(gradient, gradients(small)[name], atol=1e-6)
    never = type(
        "Never",
        (),
        {
            "device": DEVICE,
            "prepare": lambda self, batch: batch.prepare(),
            "__call__": lambda self, batch: forward(SimpleNamespace(rows=range(9))),
        },
    )
    small.loop.forward = never()
    with pytest.raises(UserError, match="a single row does not fit"):
        step_of(small.loop, [np.arange(16)])


def step_of(loop, batches):
    """The loss of one step on these batches, whose gradients are then there, and its tokens."""
    work = loop.made(batches, Pass())
    sums = loop._gradients(work)
    return float(sums.losses["loss"]) / work.units["loss"], work.tokens


# --- the frozen prefix


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_gpt2"])
@pytest.mark.parametrize(
    ("method", "depth"),
    [
        ("unfreeze('blocks[-1:]') + head(pooling='mean', dropout=0)", 2),
        ("unfreeze('blocks[-2:]') + head(pooling='cls', dropout=0)", 1),
        ("lora(rank=2, sites='blocks[2].attention') + head(pooling='own')", 2),
        ("head(pooling='mean', dropout=0)", 3),
        ("head(pooling='last', hidden=8, dropout=0)", 3),
        ("head(pooling='attention', dropout=0)", 3),
        ("head(pooling='own')", 3),
        ("full() + head()", 0),
    ],
)
def test_kept_outputs_give_the_same_logits_and_gradients(ready, request, model, method, depth):
    run = ready(method, model=request.getfixturevalue(model))
    assert run.prepared.depth == depth
    kept = make_forward(run.graft, DEVICE, "fp32", depth, run.dataset, passes=5)
    assert isinstance(kept, CachedForward) == (depth > 0)
    set_training(run.graft, depth)
    for module in run.graft.model.modules():  # compare without randomness, in the modes of training
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_probs_dropout_prob", "attn_pdrop"):
        setattr(run.graft.model.config, name, 0.0)
    for module in run.graft.model.modules():
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
    for rows in epoch_batches(run.dataset.encoded.lengths, 16, 0, 0)[:3]:
        batch = run.dataset.batch(rows, DEVICE)
        found = []
        for forward in (run.forward, kept):
            run.graft.model.zero_grad()
            logits = forward(batch)
            torch.nn.functional.cross_entropy(logits, batch.targets).backward()
            found.append((logits.detach(), gradients(run)))
        assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
        assert found[0][1].keys() == found[1][1].keys() == run.graft.parameters.keys()
        for name, gradient in found[0][1].items():
            assert torch.allclose(gradient, found[1][1][name], atol=1e-5), name


def test_a_norm_behind_the_blocks_is_trained_although_all_blocks_are_frozen(ready, tiny_gpt2):
    run = ready("unfreeze('re:ln_f', lr=0.01) + head(pooling='mean')", model=tiny_gpt2)
    assert run.prepared.depth == 3
    run.loop.forward = make_forward(run.graft, DEVICE, "fp32", 3, run.dataset, passes=3)
    assert isinstance(run.loop.forward, CachedForward)
    assert len(list(run.loop)) == 6  # the audit is content


def test_no_randomness_and_no_statistics_in_what_is_frozen(ready):
    run = ready("unfreeze('blocks[-1:]') + head(pooling='mean')")
    set_training(run.graft, run.prepared.depth)
    modules = dict(run.graft.model.named_modules())
    assert (
        not modules["embeddings.dropout"].training and not modules["encoder.layer.1.output.dropout"].training
    )
    assert modules["encoder.layer.2.output.dropout"].training


@pytest.mark.slow
def test_prediction_keeps_the_order_and_does_not_depend_on_the_batch(ready):
    run = ready("lora() + head()")
    whole = np.stack(predict(run.dataset, run.forward, run.prepared.rows.task, 96))
    one = np.stack(predict(run.dataset, run.forward, run.prepared.rows.task, 1))
    assert np.allclose(whole, one, atol=1e-5)


# --- number types


def test_the_measured_choice_is_kept_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(
        precision, "_measure", lambda dtype: calls.append(dtype) or (2.0 if dtype == torch.float32 else 1.0)
    )
    assert precision.choose("auto", CPU) == "bf16" and len(calls) == 2
    assert precision.choose("auto", CPU) == "bf16" and len(calls) == 2
    kept = json.loads((tmp_path / "machine.json").read_text())
    assert list(kept.values()) == [2.0]
    (tmp_path / "machine.json").write_text(json.dumps({key: 1.0 for key in kept}))
    assert precision.choose("auto", CPU) == "fp32" and len(calls) == 2
    for broken in ("[", "[1]", json.dumps({key: "x" for key in kept})):
        (tmp_path / "machine.json").write_text(broken)
        assert precision.choose("auto", CPU) == "bf16"
    assert precision.choose("fp32", CPU) == "fp32"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "file" / "folder"))
    assert precision.choose("auto", CPU) in ("fp32", "bf16")


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "method", ["lora() + head()", "bitfit() + head(pooling='mean')", "unfreeze('blocks[-1:]')", "full()"]
)
@pytest.mark.slow
def test_what_is_trained_is_fp32_and_the_plan_counts_the_bytes_that_are_held(ready, method, kind):
    run = ready(method, precision=kind)
    for name, parameter in run.graft.model.named_parameters():
        if name in run.graft.labels:
            assert parameter.dtype == torch.float32, name
        elif "LayerNorm" not in name:
            assert parameter.dtype == (torch.float32 if kind == "fp32" else torch.bfloat16), name
    held = [*run.graft.model.parameters(), *run.graft.model.buffers()]
    plan = run.prepared.plan
    assert plan.weight_bytes == sum(t.numel() * t.element_size() for t in held)
    steps = list(run.loop)
    assert len(steps) == 6 and all(math.isfinite(step.loss) for step in steps)
    kept = [t for state in run.loop.optimizer.state.values() for t in state.values()]
    assert plan.optimizer_bytes == sum(t.numel() * t.element_size() for t in kept)
    assert plan.gradient_bytes == 4 * sum(p.numel() for p in run.graft.parameters.values())


@pytest.mark.parametrize("trained", [set(), {"0.weight"}, {"1.weight", "1.bias"}])
def test_a_frozen_batchnorm_computes_in_bf16(trained):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    given = torch.randn(2, 3, 5, 5)
    wanted = model(given).detach()
    precision.cast(model, trained, "bf16")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    with precision.autocast(CPU, "bf16"):
        got = model(given)
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)
    if trained:
        got.float().sum().backward()
