"""gradual_unfreeze: what is trained when, that nothing else moves, and that it resumes to the same bits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import equal_bits, forked, graft_tensors, tune_words
from device import DEVICE
from safetensors.torch import load_file

from graftkit import UserError, attach
from graftkit.engine.cached import PhasedForward
from graftkit.engine.forward import Forward
from graftkit.engine.frozen import phases
from graftkit.engine.loop import Loop
from graftkit.methods.base import read

pytestmark = pytest.mark.sampled

BERT_BLOCKS = 3
EPOCH = 6  # steps of 16 of 96 rows
HEAD = "head(pooling='mean')"


def trained(labels) -> set[int | str]:
    """Which parts of the tiny BERT have labels: numbers of blocks, or the module's first word."""
    parts: set[int | str] = set()
    for name in labels:
        words = name.split(".")
        parts.add(int(words[2]) if words[0] == "encoder" else words[0].removesuffix("_default"))
    return parts


# --- the schedule


@pytest.mark.parametrize(
    ("method", "order"),
    [
        # the head alone, then from the top; the pooler lies above the blocks, but this head passes it by
        (
            f"gradual_unfreeze() + {HEAD}",
            [{"head"}, {"head", 2}, {"head", 1, 2}, {"head", 0, 1, 2}, {"head", 0, 1, 2, "embeddings"}],
        ),
        # nothing else is trained: the last block has the first turn, and the pooler above it
        ("gradual_unfreeze()", [{2, "pooler"}, {1, 2, "pooler"}, {0, 1, 2, "pooler"}, {0, 1, 2, "pooler", "embeddings"}]),
        (
            f"gradual_unfreeze() + freeze('embeddings,blocks[0]') + {HEAD}",
            [{"head"}, {"head", 2}, {"head", 1, 2}, {"head", 1, 2}],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_one_more_block_after_each_turn(method, order, unit):
    method = method.replace("gradual_unfreeze()", f"gradual_unfreeze(every=2, unit={unit!r})")
    graft = attach(tiny.bare("bert"), method.replace("head(", "head(classes=2, "))
    for turn, parts in enumerate(order):
        for now in (2 * turn, 2 * turn + 1.99):
            step, epoch = (int(now), 0.0) if unit == "steps" else (0, now)
            assert trained(graft.labels_at(step, epoch)) == parts
    assert graft.labels_at(2 * len(order), 2.0 * len(order)).keys() == graft.labels.keys()


@pytest.mark.parametrize("every", [0.1, 0.3, 1, 1.5, 3])
@pytest.mark.parametrize("per_epoch", [1, 7, 10])
def test_the_phases_are_those_that_asking_at_each_step_gives(every, per_epoch):
    graft = attach(tiny.bare("bert"), f"gradual_unfreeze(every={every}) + head(classes=2)")
    steps = 6 * per_epoch
    found = phases(graft, steps, per_epoch)
    assert [p.start for p in found[1:]] == [p.end for p in found[:-1]]
    assert found[0].start == 0 and found[-1].end == steps
    for phase in found:
        for step in range(phase.start, phase.end):
            assert graft.labels_at(step, step / per_epoch).keys() == phase.labels.keys()
    depths = [phase.depth for phase in found]
    assert depths == sorted(depths, reverse=True) and depths[0] <= BERT_BLOCKS
    assert all(
        phase.depth == min([i for i in trained(phase.labels) if isinstance(i, int)], default=BERT_BLOCKS)
        or "embeddings" in trained(phase.labels)
        for phase in found
    )


def test_a_turn_that_is_a_part_of_an_epoch_is_counted_without_rounding_errors():
    graft = attach(tiny.bare("bert"), "gradual_unfreeze(every=0.1) + head(classes=2)")
    for turn in range(5):
        assert len(trained(graft.labels_at(0, turn / 10))) == 1 + turn


def test_rates_fall_from_block_to_block():
    graft = attach(tiny.bare("bert"), "gradual_unfreeze(decay=0.5, lr=0.01) + head(classes=2)")
    rates = {p: g["lr"] for g in graft.param_groups() for p in g["params"]}
    for name, parameter in graft.parameters.items():
        if name.startswith("encoder.layer."):
            assert rates[parameter] == pytest.approx(0.01 * 0.5 ** (2 - int(name.split(".")[2])))
        elif name.startswith("embeddings"):
            assert rates[parameter] == pytest.approx(0.01 * 0.5**3)
        else:
            assert rates[parameter] == pytest.approx(0.005)
    assert {group.lr_scale for group in attach(tiny.bare("bert"), "gradual_unfreeze()").labels.values()} == {
        1.0
    }


def test_it_trains_all_of_the_backbone():
    graft = attach(tiny.bare("bert"), "gradual_unfreeze()")
    assert sum(p.numel() for p in graft.parameters.values()) == sum(
        p.numel() for p in tiny.bare("bert").parameters()
    )
    both = attach(
        tiny.bare("bert"), "unfreeze('embeddings') + gradual_unfreeze() + head(classes=2, pooling='mean')"
    )
    assert trained(both.labels_at(0, 0.0)) == {"embeddings", "head"}, (
        "another method's parameters are its own"
    )


# --- the loop


def moved(before: dict, model) -> set[str]:
    return {name for name, tensor in tiny.snapshot(model).items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_gpt2"])
def test_nothing_moves_or_has_state_before_its_turn(ready, request, model):
    run = ready(
        f"gradual_unfreeze(every=3, unit='steps', lr=0.001) + {HEAD}",
        model=request.getfixturevalue(model), steps=17, warmup=0.0, weight_decay=0.5,
    )  # fmt: skip
    model = run.graft.model
    start = tiny.snapshot(model)
    freed: dict[str, int] = {}
    for step in run.loop:
        today = run.graft.labels_at(step.number - 1, 0.0)
        freed |= {name: step.number - 1 for name in today if name not in freed}
        assert moved(start, model) == set(today)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(today)
        assert {n for n, p in run.graft.parameters.items() if p in run.loop.optimizer.state} == set(today)
    assert freed.keys() == run.graft.labels.keys() and set(freed.values()) == {0, 3, 6, 9, 12}
    assert all(p.requires_grad for p in run.graft.parameters.values()), "afterwards as `attach` left it"
    for name, parameter in run.graft.parameters.items():
        assert run.loop.optimizer.state[parameter]["step"] == 17 - freed[name]


@pytest.mark.slow
def test_the_steps_are_those_of_a_plain_loop(ready):
    """Against AdamW with one group for each phase, written out; the cached prefix and the plain one."""
    method = f"gradual_unfreeze(every=4, unit='steps', lr=0.001) + {HEAD.replace(')', ', dropout=0)')}"
    settings = {"steps": 14, "warmup": 0.0, "schedule": "constant", "clip": 0.0, "weight_decay": 0.1}
    run, kept, plain = (ready(method, **settings) for _ in range(3))
    for module in [*run.graft.model.modules(), *kept.graft.model.modules(), *plain.graft.model.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for each in (run, kept, plain):
        each.graft.model.config.attention_probs_dropout_prob = 0.0
    list(run.loop)
    kept.loop.forward = PhasedForward(kept.graft, DEVICE, "fp32", kept.dataset, per_epoch=1)
    list(kept.loop)
    labels = plain.graft.labels
    optimizer = torch.optim.AdamW(plain.graft.param_groups(weight_decay=0.1))
    for step in range(14):
        today = plain.graft.labels_at(step, 0.0)
        for name, parameter in plain.graft.parameters.items():
            parameter.requires_grad_(name in today)
        batch = plain.dataset.batch(np.concatenate(plain.loop.batches(step)), DEVICE)
        torch.nn.functional.cross_entropy(plain.forward(batch), batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert labels.keys() == run.graft.labels.keys()
    for name, parameter in plain.graft.parameters.items():
        if name.endswith("key.bias"):  # its gradient is nothing but rounding, which Adam makes large
            continue
        torch.testing.assert_close(run.graft.parameters[name], parameter, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept.graft.parameters[name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_is_kept_is_the_prefix_of_today(ready, monkeypatch):
    """Head alone: features; then the inputs of the last block, of the one before; nothing when all are trained."""
    from graftkit.engine import cached as forward

    run = ready(f"gradual_unfreeze(every=2) + {HEAD}", steps=EPOCH * 10)
    run.loop.forward = PhasedForward(run.graft, DEVICE, "fp32", run.dataset, EPOCH)
    seen, plain = [], forward.make_forward

    def noted(*given):
        made = plain(*given)
        start = getattr(made, "start", None)
        seen.append((type(start).__name__, getattr(start, "depth", None)))
        return made

    monkeypatch.setattr(forward, "make_forward", noted)
    assert [phase.depth for phase in run.loop.phases] == [3, 2, 1, 0, 0]
    assert len(list(run.loop)) == 60
    nothing = ("NoneType", None)
    assert seen == [("AtHead", None), ("AtBlock", 2), ("AtBlock", 1), nothing, nothing]


@pytest.mark.slow
def test_one_pass_over_the_rows_is_not_kept(ready):
    run = ready(f"gradual_unfreeze() + {HEAD}", steps=EPOCH * 5)
    forward = run.loop.forward = PhasedForward(run.graft, DEVICE, "fp32", run.dataset, EPOCH)
    for _ in run.loop:
        assert type(forward.inner) is Forward


@pytest.mark.parametrize("fault", ["silent", "zero", "early"])
def test_the_audit_looks_at_each_part_when_it_is_freed(ready, fault, monkeypatch):
    run = ready(f"gradual_unfreeze(every=3, unit='steps') + {HEAD}", steps=12, warmup=0.0)
    name = "encoder.layer.1.output.dense.weight"
    parameter = run.graft.model.get_parameter(name)
    seen = []
    if fault == "zero":  # freed in step 7, with a gradient of zeros
        parameter.register_hook(torch.zeros_like)
        assert [step.number for step in run.loop if step.zero == (name,)] == [12]
        return
    if fault == "silent":  # freed in step 7, but it has no gradient
        plain = Loop._gradients

        def lost(self, batches):
            found = plain(self, batches)
            parameter.grad = None
            return found

        monkeypatch.setattr(Loop, "_gradients", lost)
        message = f"parameters got no gradient: {name}"
    else:  # changed while it is frozen

        def leak(*_):
            if len(seen) == 1:
                parameter.data[0] += 1

        run.loop.optimizer.register_step_post_hook(leak)
        message = f"1 frozen tensors changed: {name}"
    with pytest.raises(UserError, match=message):
        for step in run.loop:
            seen.append(step.number)
    assert len(seen) == (7 if fault == "silent" else 1)


def test_what_is_freed_while_an_earlier_part_is_looked_at_is_told_too(ready):
    """One audit sees several parts: the methods of those that come later are known to it."""
    run = ready(f"gradual_unfreeze(every=1, unit='steps') + {HEAD}", steps=12, warmup=0.0)
    name = "encoder.layer.1.output.dense.weight"
    run.graft.model.get_parameter(name).register_hook(torch.zeros_like)
    assert {step.zero for step in run.loop} == {(), (name,)}


def test_a_frozen_norm_keeps_its_statistics_until_its_turn(ready):
    """The engine holds still what only moves later."""
    from graftkit.engine.frozen import frozen_depth, set_training

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = (
                torch.nn.Linear(4, 4),
                torch.nn.BatchNorm1d(4),
                torch.nn.Linear(4, 4),
            )

        def forward(self, x):
            return self.second(self.norm(self.first(x)).relu())

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(), Layer(), Layer()])
            self.output = torch.nn.Linear(4, 2)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.output(x)

    graft = attach(Net(), "gradual_unfreeze(unit='steps') + head(classes=2)")
    for step, moving in enumerate([set(), {2}, {1, 2}, {0, 1, 2}]):
        labels = graft.labels_at(step, 0.0)
        set_training(graft, frozen_depth(graft, labels), labels)
        before = tiny.snapshot(graft.model)
        graft.model(torch.randn(8, 4))
        assert {int(name.split(".")[1]) for name in moved(before, graft.model)} == moving


# --- runs


def tune(folder: Path, model: Path, rows: Path, *settings: str, method: str) -> list[str]:
    return tune_words(model, rows, folder, *settings, method=method)


def run_command(words: list[str]) -> None:
    from graftkit.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings", "steps"),
    [
        # killed at the first step of a phase, at its second, and between two kept prefixes; phases of epochs
        (f"gradual_unfreeze(every=3, unit='steps', lr=0.001, decay=0.7) + {HEAD}", ["train.steps=14"], [3, 4, 12]),
        (f"gradual_unfreeze(every=2, lr=0.001) + {HEAD}", ["train.steps=16", "train.evaluate_every=end", "train.batch_size=32"], [6, 14]),
        ("gradual_unfreeze(every=0.5, lr=0.001) + head()", ["train.steps=10", "train.accumulate=2"], [7]),
    ],
)  # fmt: skip
def test_killed_and_resumed_it_ends_with_the_same_bits(
    tiny_bert, rows_folder, tmp_path, method, settings, steps
):
    from graftkit.report.console import Console
    from graftkit.runs.tune import resume_run

    whole = tmp_path / "whole"
    settings = ["train.checkpoint_every=1", *settings]
    run_command(tune(whole, tiny_bert, rows_folder, *settings, method=method))
    for number in steps:
        folder = tmp_path / f"killed-{number}"

        def work(folder=folder, number=number):
            from graftkit.cli.main import main
            from graftkit.runs import monitor as watch

            plain = watch.Watch.maybe_checkpoint

            def maybe_checkpoint(self, every, force):
                plain(self, every, force)
                if self.loop.step == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            watch.Watch.maybe_checkpoint = maybe_checkpoint
            main(tune(folder, tiny_bert, rows_folder, *settings, method=method))

        assert forked(work).status == -signal.SIGKILL
        path = max((folder / "checkpoints").glob("step-*"))
        assert path.name == f"step-{number:08d}.safetensors"
        resume_run(folder, Console(quiet=True))
        assert equal_bits(graft_tensors(folder), graft_tensors(whole)), number
        logs = [
            [{**json.loads(line), "seconds": 0} for line in (f / "metrics.jsonl").read_text().splitlines()]
            for f in (folder, whole)
        ]
        assert logs[0] == logs[1]


def test_a_checkpoint_holds_no_state_of_what_is_not_yet_trained(tiny_bert, rows_folder, tmp_path):
    folder = tmp_path / "run"

    def work():
        from graftkit.cli.main import main
        from graftkit.runs import monitor as watch

        watch.Watch.evaluate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        words = tune(
            folder, tiny_bert, rows_folder, "train.steps=9", "train.checkpoint_every=1", "train.evaluate_every=6",
            method=f"gradual_unfreeze(every=3, unit='steps') + {HEAD}",
        )  # fmt: skip
        main(words)

    assert forked(work).status == -signal.SIGKILL
    tensors = load_file(max((folder / "checkpoints").glob("step-*")))
    with_state = {name.split("/")[2] for name in tensors if name.startswith("optimizer/")}
    assert trained(with_state) == {"head", 2}
    parameters = {name.split("/")[1] for name in tensors if name.startswith("parameters/")}
    assert trained(parameters) == {"head", 0, 1, 2, "embeddings"}


def test_the_plan_says_what_is_trained_when_and_what_never_is(tiny_bert, rows_folder, tmp_path, command):
    method = f"gradual_unfreeze(every=2) + {HEAD}"
    words = tune(tmp_path / "run", tiny_bert, rows_folder, "train.epochs=5", method=method)
    found = json.loads(command("plan", *words[1:], "--json").out)
    whole = attach(tiny_model(tiny_bert), f"full() + {HEAD.replace('(', '(classes=2, ')}").parameters
    counts = {name: p.numel() for name, p in whole.items()}
    head = sum(n for name, n in counts.items() if name.startswith("head"))
    block = sum(n for name, n in counts.items() if name.startswith("encoder.layer.0."))
    assert found["trained_parameters"] == sum(counts.values())
    assert found["schedule"] == [
        {"step": 1 + 12 * i, "trained_parameters": head + i * block, "frozen_blocks": 3 - i} for i in range(3)
    ]
    assert found["frozen_blocks"] == 1
    assert found["never_trained_parameters"] == sum(counts.values()) - head - 2 * block
    trained = [name for name in counts if name.startswith(("head", "encoder.layer.1.", "encoder.layer.2."))]
    assert found["optimizer_bytes"] == 8 * (head + 2 * block) + 4 * len(trained)
    said = command("plan", *words[1:]).out
    assert "from step 1," in said and "from step 25" in said
    assert "warning: the run ends before" in said and "train.epochs" in said
    longer = json.loads(command("plan", *words[1:], "train.epochs=9", "--json").out)
    assert longer["never_trained_parameters"] == 0 and len(longer["schedule"]) == 5
    plain = json.loads(
        command("plan", *tune(tmp_path / "x", tiny_bert, rows_folder, method=HEAD)[1:], "--json").out
    )
    assert plain["schedule"] == [] and plain["never_trained_parameters"] == 0


def tiny_model(folder: Path):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)


def test_a_run_that_ends_early_leaves_the_rest_as_it_was(tiny_bert, rows_folder, tmp_path):
    settings = ["train.epochs=2", "data.eval=null"]  # so that the last weights are kept
    run_command(
        tune(tmp_path / "run", tiny_bert, rows_folder, *settings, method=f"gradual_unfreeze() + {HEAD}")
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["never_trained_parameters"] > 0
    base = dict(tiny_model(tiny_bert).named_parameters())
    stored = {name.partition(":")[2]: tensor for name, tensor in graft_tensors(tmp_path / "run").items()}
    for name, tensor in stored.items():
        if name in base and "layer.2" not in name:
            assert torch.equal(tensor, base[name]), name
    assert any(not torch.equal(stored[n], base[n]) for n in base if "layer.2" in n and n in stored)


# --- bad input


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gradual_unfreeze(every=0)", "every is 0, but must be above 0"),
        ("gradual_unfreeze(every=-1.0)", "must be above 0"),
        ("gradual_unfreeze(every=inf)", "every"),
        ("gradual_unfreeze(every=0.5, unit='steps')", "steps are whole"),
        ("gradual_unfreeze(unit='days')", "must be one of epochs, steps"),
        ("gradual_unfreeze(decay=0)", "must be at least 0.01"),
        ("gradual_unfreeze(decay=1.1)", "must be at most 1"),
        ("gradual_unfreeze(lr=0)", "must be above 0"),
    ],
)
def test_values_out_of_bounds(text, told):
    with pytest.raises(UserError, match=told):
        read(text)


def test_a_model_without_blocks_is_refused_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    with pytest.raises(UserError, match=r"gradual_unfreeze\(\).*Sequential has no blocks; use full\(\)"):
        attach(model, "gradual_unfreeze()")


def test_beside_full_it_is_refused(command, tiny_bert, rows_folder, tmp_path):
    words = tune(tmp_path / "run", tiny_bert, rows_folder, method="full() + gradual_unfreeze()")
    done = command(*words)
    assert done.status == 1 and "full() already trains what gradual_unfreeze() would" in done.err
