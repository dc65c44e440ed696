"""The gradient audit, and losses and gradients that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import equal_bits, make_rows, tune_words, write_csv

from graftkit.engine.audit import Audit
from graftkit.engine.loop import NotFinite
from graftkit.errors import UserError
from graftkit.optim.labels import Group


def test_the_audit_names_a_parameter_without_gradient(ready):
    run = ready("full() + head(pooling='mean')")
    group = next(iter(run.graft.labels.values()))
    name = next(n for n, _ in run.graft.model.named_parameters() if "pooler" in n)
    run.graft.model.get_parameter(name).requires_grad_(True)
    run.graft.labels[name] = replace(group, method="unfreeze")  # no other parameter is that method's
    with pytest.raises(UserError, match=r"got no gradient: .*pooler"):
        list(run.loop)


def test_a_part_beside_the_blocks_that_is_not_needed_is_told(ready):
    """Where a method took the whole model. It stays as it was; in the blocks it is a fault."""
    run = ready("full() + head(pooling='mean')")
    group = run.graft.labels["encoder.layer.0.output.dense.weight"]
    name = "pooler.dense.weight"
    pooler = run.graft.model.get_parameter(name).requires_grad_(True)
    before = pooler.detach().clone()
    run.graft.labels[name] = replace(group)
    steps = list(run.loop)
    assert [step.unused for step in steps[:3]] == [(), (name,), ()] and torch.equal(pooler, before)
    run = ready("full() + head(pooling='mean')")
    block = run.graft.model.get_submodule("encoder.layer.1")
    block.idle = torch.nn.Linear(2, 2)
    for part in ("weight", "bias"):
        run.graft.labels[f"encoder.layer.1.idle.{part}"] = replace(group)
    with pytest.raises(UserError, match=r"2 parameters got no gradient: encoder.layer.1.idle.bias"):
        list(run.loop)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_the_audit_names_a_frozen_tensor_that_changes(ready, kind):
    run = ready("head(pooling='mean')")
    run.graft.model.register_buffer("counter", torch.zeros(2))
    target = (
        run.graft.model.get_parameter("encoder.layer.1.output.dense.bias")
        if kind == "parameter"
        else run.graft.model.counter
    )

    def leak(*_):
        target.data[0] += 1e-3

    run.loop.optimizer.register_step_post_hook(leak)
    with pytest.raises(
        UserError, match=r"1 frozen tensors changed: (encoder.layer.1.output.dense.bias|counter)"
    ):
        list(run.loop)


def test_the_audit_names_a_parameter_that_does_not_move(ready):
    run = ready("full(lr=1e-30) + head()", warmup=0.0)
    with pytest.raises(UserError, match=r"got a gradient but did not move: .*LayerNorm"):
        list(run.loop)


def test_the_audit_names_a_frozen_parameter_with_a_gradient(ready):
    run = ready("head(pooling='cls')")
    run.graft.model.get_parameter("embeddings.LayerNorm.bias").requires_grad_(True)
    with pytest.raises(UserError, match=r"frozen parameters got a gradient: embeddings.LayerNorm.bias"):
        list(run.loop)


def test_the_audit_waits_for_rows_that_have_something_to_say():
    """A gradient of exact zeros may be due to the first rows; without any until the epoch's end it is a fault."""
    for at_last, fails in ((1.0, False), (0.0, True)):
        model = torch.nn.Linear(2, 1)
        audit = Audit(model, {"weight", "bias"})
        model.weight.grad, model.bias.grad = torch.zeros(1, 2), torch.ones(1)
        with torch.no_grad():
            for step in range(3):
                if step == 2:
                    model.weight.grad += at_last
                audit.after_backward()
                model.bias += 1
                model.weight += model.weight.grad
                if step == 2 and fails:
                    with pytest.raises(UserError, match="1 parameters got no gradient: weight"):
                        audit.after_step(last=True)
                else:
                    audit.after_step(last=step == 2)
                    assert audit.done == (step == 2)


def test_a_gradient_of_zeros_is_told_where_the_rest_of_the_method_learns():
    labels = {name: Group("base", 0.1, "full") for name in ("weight", "bias")}
    for method, fails in (("full", False), ("bitfit", True)):
        labels["bias"] = Group("base", 0.1, method)
        model = torch.nn.Linear(2, 1)
        audit = Audit(model, labels)
        model.weight.grad, model.bias.grad = torch.zeros(1, 2), torch.ones(1)
        with torch.no_grad():
            model.bias += 1
            audit.after_backward()
            audit.after_step()
            assert audit.zero == () and not audit.done
            if fails:  # nothing that this method was to train has a gradient
                with pytest.raises(UserError, match="1 parameters got no gradient: weight"):
                    audit.after_step()
            else:
                audit.after_step()
                assert audit.zero == ("weight",) and audit.done


def test_the_audit_waits_for_a_long_warm_up():
    """The first steps of a long warm-up are smaller than the distance of floats near 1: that is no fault."""
    model = torch.nn.LayerNorm(4)
    for at_last, fails in ((1e-3, False), (0.0, True)):
        audit = Audit(model, {"weight", "bias"})
        model.weight.grad, model.bias.grad = torch.ones(4), torch.ones(4)
        with torch.no_grad():
            for _ in range(3):
                audit.after_backward()
                model.bias += 1e-12
                model.weight += 1e-12
                audit.after_step(rising=True)
            assert not audit.done and "weight" not in audit.moved
            model.weight += at_last
            audit.after_backward()
            if fails:
                with pytest.raises(UserError, match=r"after 4 steps.*did not move: weight"):
                    audit.after_step()
            else:
                audit.after_step()
                assert audit.done


@pytest.mark.parametrize("method", ["lora(rank=2) + head()", "head(pooling='mean')"])
@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    ready, command, tiny_bert, rows_folder, tmp_path, monkeypatch, method
):
    from graftkit.tasks.shared import labels

    plain = labels.cross_entropy
    calls = {"n": 0}

    def poisoned(*given):
        calls["n"] += 1
        losses = plain(*given)
        return (
            losses if calls["n"] <= 3 else losses * torch.where(torch.arange(len(losses)) == 2, math.nan, 1.0)
        )

    monkeypatch.setattr(labels, "cross_entropy", poisoned)
    run = ready(method)
    steps = iter(run.loop)
    for _ in range(3):
        next(steps)
    before = {name: p.detach().clone() for name, p in run.graft.parameters.items()}
    row = run.loop.batches(3)[0][2]
    with pytest.raises(NotFinite) as caught:
        next(steps)
    assert f"{rows_folder / 'train.csv'}, line {row + 2}." in str(caught.value)
    assert "the loss is nan in step 4" in str(caught.value) and "train.lr" in str(caught.value)
    assert equal_bits(before, dict(run.graft.parameters)) and run.loop.step == 3

    calls["n"] = 0
    words = tune_words(
        tiny_bert, rows_folder, tmp_path / "run", "train.checkpoint_every=1", "train.steps=9", method=method
    )
    done = command(*words)
    assert done.status == 1 and "not finite" in done.err and "train.csv, line" in done.err
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == ["step-00000002.safetensors", "step-00000003.safetensors"]
    monkeypatch.setattr(labels, "cross_entropy", plain)
    assert command("tune", "--resume", tmp_path / "run").status == 0


def test_a_gradient_that_is_not_finite(ready):
    run = ready("full() + head()")
    run.graft.model.get_parameter("bert.encoder.layer.0.output.dense.bias").register_hook(
        lambda g: g * math.inf
    )
    with pytest.raises(
        NotFinite, match=r"the gradient norm is (inf|nan) in step 1.*rows of the batch: .*line"
    ):
        next(iter(run.loop))


def test_a_poisoned_embedding_names_the_rows_that_use_it(command, tiny_bert, rows_folder, tmp_path):
    """The same in a real run: the model itself gives NaN for one word."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(tiny_bert), AutoTokenizer.from_pretrained(tiny_bert)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("cow")] = math.nan
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [*make_rows(40), {"text": "the old cow", "label": "tool"}]
    path = write_csv(tmp_path / "t.csv", rows)
    for method in ("full() + head()", "head(pooling='mean')"):
        words = tune_words(
            tmp_path / "model",
            rows_folder,
            tmp_path / "run",
            "--train",
            str(path),
            "--overwrite",
            method=method,
        )
        done = command(*words)
        assert done.status == 1 and f"rows whose own loss is not finite: {path}, line 42." in done.err
    assert not (tmp_path / "run" / "graft").exists()


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 5, 70_000])
def test_a_digest_tells_of_one_changed_element(dtype, size):
    from graftkit.engine.audit import digest

    torch.manual_seed(0)
    tensor = torch.rand(size).gt(0.5).to(dtype)
    before = int(digest(tensor))
    assert int(digest(tensor.clone())) == before
    for place in {0, size // 2, size - 1}:
        changed = tensor.clone()
        changed[place] = ~tensor[place] if dtype == torch.bool else 1 - tensor[place]
        assert int(digest(changed)) != before


def test_changes_that_cancel_in_a_sum_of_bits_are_told():
    from graftkit.engine.audit import digest

    torch.manual_seed(0)
    for dtype, bits in (
        (torch.float32, torch.int32),
        (torch.float64, torch.int64),
        (torch.bfloat16, torch.int16),
    ):
        tensor = torch.randn(70_000).to(dtype)
        before = int(digest(tensor))
        for left, right in ((0, 1), (3, 69_999), (65_535, 65_536), (100, 200)):
            swapped, shifted, mirrored = tensor.clone(), tensor.clone(), tensor.clone()
            swapped[[left, right]] = tensor[[right, left]]
            shifted.view(bits)[left] += 1
            shifted.view(bits)[right] -= 1
            mirrored[[left, right]] = -tensor[[left, right]]  # the top bits of two elements
            assert before not in {int(digest(one)) for one in (swapped, shifted, mirrored)}
