"""train.compile: blocks trace with their additions, and compute what eager blocks do, dropout masks included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import equal_bits, graft_tensors, make_bert, tune_words
from tiny import bare, batch, causal, relative

import graftkit.engine.regions
from graftkit.backbone import Backbone
from graftkit.engine.dropout import fast_dropout
from graftkit.engine.recompute import Recompute
from graftkit.engine.regions import Measured, Regions
from graftkit.grafts.attach import attach
from graftkit.runs.monitor import Watch

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# a compiler takes seconds for each graph of a block, and the more for each addition in it
FEW = "lora(rank=4, sites='q,v') + head()"


@pytest.fixture(scope="module")
def one_block(tmp_path_factory) -> Path:
    """The tiny BERT with one block: each block has graphs of its own."""
    return make_bert(tmp_path_factory.mktemp("models") / "one-block", blocks=1)


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch._dynamo.reset()


def grafted(kind: str, method: str):
    torch.manual_seed(0)
    if kind == "bert":
        model = bare(kind)
    else:
        model = causal(kind)
        del model.model.layers[1:]  # each graph takes seconds
        model.config.num_hidden_layers = 1
    model.config.use_cache = False
    graft = attach(Backbone(model), method).requires_grad_()
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.train()
    return graft


def stepped(graft, seed: int, length: int) -> torch.Tensor:
    """Outputs and gradients of a batch in training, dropout masks by the seed."""
    with fast_dropout(CPU, seed):
        out = graft.model(**batch(length=length))
        out = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
        out.square().sum().backward()
    gradients = [p.grad.flatten() for p in graft.parameters.values() if p.grad is not None]
    for parameter in graft.parameters.values():
        parameter.grad = None
    return torch.cat([out.detach().flatten(), *gradients])


def measured(regions: Regions, graft) -> None:
    regions.after_step(1.0, 1, 100)
    stepped(graft, 5, 7)
    regions.after_step(1.0, 1, 100)


@pytest.mark.parametrize(
    "kind, method, backend",
    [
        ("bert", "lora(rank=2, sites='q,v', dropout=0.2)", "eager"),
        pytest.param(
            "llama",
            "lora(rank=2, sites='q,v', dropout=0.2) + adapter()",
            "aot_eager",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_whole_blocks_trace_and_draw_the_same_masks(kind, method, backend, monkeypatch):
    """These backends round as eager code does. New lengths compile nothing."""
    monkeypatch.setattr(Regions, "_remember", lambda *_: None)
    graft = grafted(kind, method)
    wanted = [stepped(graft, seed, length) for seed, length in ((1, 7), (2, 9))]
    told: list[str] = []
    regions = Regions(graft, 0, CPU, "fp32", "blocks", told.append, backend=backend)
    measured(regions, graft)
    if (
        "adapter" in method and torch.__version__ < "2.13"
    ):  # Dynamo loses the gradients there, and is found out
        assert not regions.on and "compiled results differ" in told[0]
        return
    assert regions.on and f"{len(regions.blocks)} blocks are compiled" in told[0], told
    got = [stepped(graft, seed, length) for seed, length in ((1, 7), (2, 9))]
    assert [relative(*pair) for pair in zip(got, wanted)] == pytest.approx([0, 0], abs=1e-6)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    stepped(graft, 3, 11)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0
    regions.leave()
    assert all("forward" not in block.__dict__ for block in regions.blocks)
    assert torch.equal(stepped(graft, 1, 7), wanted[0])


def test_a_failing_compiler_leaves_the_blocks_eager(monkeypatch):
    graft = grafted("bert", "lora(rank=2)")
    wanted, told = stepped(graft, 1, 7), []

    def failing(*_):
        raise RuntimeError("no C++ compiler\nat all")

    regions = Regions(graft, 0, CPU, "fp32", "blocks", told.append, backend=failing)
    measured(regions, graft)
    assert not regions.on and regions.decided and len(told) == 1 and "no C++ compiler" in told[0]
    assert torch.equal(stepped(graft, 1, 7), wanted)


def test_a_block_that_stops_compiling_goes_on_eager():
    graft = grafted("bert", "lora(rank=2)")
    wanted, told = stepped(graft, 1, 7), []
    regions = Regions(graft, 0, CPU, "fp32", "blocks", told.append, backend="eager")
    regions.restore({"decided": True, "on": True, "compiled": True})

    def failing(*args, **kwargs):
        raise ValueError("a shape of its own")

    assert regions.on
    for region in regions.regions:
        region.compiled = failing
    assert torch.equal(stepped(graft, 1, 7), wanted)
    assert not regions.on and told == ["note: the blocks are not compiled (ValueError: a shape of its own)"]
    assert torch.equal(stepped(graft, 1, 7), wanted)


def test_blocks_are_compiled_or_recomputed_but_not_both(command, tiny_bert, rows_folder, tmp_path):
    done = command(*tune_words(tiny_bert, rows_folder, tmp_path / "run", "train.steps=4", "train.compile=blocks",
                               "train.checkpointing=blocks"))  # fmt: skip
    assert done.status == 0 and "not compiled, as their activations are recomputed" in done.out, done.err
    graft, told = grafted("bert", "lora(rank=2)"), []
    blocks = [graft.backbone.module(name) for name in graft.backbone.blocks]
    recompute = Recompute(blocks, "auto")
    recompute.enter(0)
    assert recompute.turn_on()
    regions = Regions(graft, 0, CPU, "fp32", "blocks", told.append, backend="eager")
    regions.after_step(1.0, 1, 100)
    assert regions.decided and not regions.regions and len(told) == 1
    recompute.leave()
    regions = Regions(graft, 0, CPU, "fp32", "blocks", told.append, backend="eager")
    regions.after_step(1.0, 1, 100)
    recompute = Recompute(blocks, "auto")
    recompute.enter(0)
    assert regions.regions and not recompute.turn_on() and not list(recompute.notes())
    recompute.leave()
    regions.leave()
    assert not any("forward" in vars(block) for block in blocks)


def test_a_short_run_tries_nothing_and_what_is_remembered_decides(monkeypatch):
    graft = grafted("bert", "lora(rank=2)")
    regions = Regions(graft, 0, CPU, "fp32", "auto", print, backend="aot_eager")
    for _ in range(10):
        regions.after_step(1.0, 1, 100)  # 100 s left
    assert regions.decided and not regions.regions
    for known, tries in ((Measured(0.2, 0.1, 5.0, 1.0), True), (Measured(0.1, 0.2, 5.0, 1.0), False)):
        monkeypatch.setattr(Regions, "_remembered", lambda _, known=known: known)
        regions = Regions(graft, 0, CPU, "fp32", "auto", print, backend="aot_eager")
        for _ in range(6):
            regions.after_step(1.0, 1, 100)
        assert bool(regions.regions) is tries
        regions.leave()
    assert Measured(0.2, 0.1, 5.0, 1.0).saved(4, 100) == pytest.approx(0.1 * 400 - 7)


def test_a_measurement_is_kept_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path))
    regions = Regions(grafted("bert", "lora(rank=2)"), 0, CPU, "fp32", "auto", print)
    assert regions._remembered() is None
    found = Measured(0.25, 0.125, 3.0, 1.0)
    regions._remember(found)
    other = Regions(grafted("bert", "lora(rank=3)"), 0, CPU, "fp32", "auto", print)
    assert regions._remembered() == found and other._remembered() is None
    (tmp_path / "compile.json").write_text(json.dumps({regions.key: [1]}))
    assert regions._remembered() is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_run_with_inductor_is_the_eager_one_to_rounding(command, one_block, rows_folder, tmp_path):
    for name, kind in (("eager", "none"), ("compiled", "blocks")):
        done = command(
            *tune_words(
                one_block, rows_folder, tmp_path / name, "train.steps=5", f"train.compile={kind}", method=FEW
            )
        )
        assert done.status == 0, done.err
    assert "blocks are compiled" in done.out
    eager, compiled = (graft_tensors(tmp_path / name) for name in ("eager", "compiled"))
    assert all(torch.allclose(eager[name], compiled[name], rtol=1e-2, atol=1e-3) for name in eager)
    assert not equal_bits(eager, compiled)


@pytest.mark.slow
def test_a_resumed_run_is_compiled_from_its_first_step(
    command, one_block, rows_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(graftkit.engine.regions, "BACKEND", "eager")
    run = tmp_path / "run"
    tell, ons = Watch.tell, []

    def stop(watch, step, console):
        tell(watch, step, console)
        ons.append((step.number, watch.regions.on))
        if len(ons) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "tell", stop)
    words = tune_words(one_block, rows_folder, run, "train.steps=5", "train.compile=blocks", "train.checkpoint_every=3",
                       method=FEW)  # fmt: skip
    assert command(*words).status == 130
    assert ons[0] == (1, False) and ons[3] == (4, True)
    done = command("tune", "--resume", run)
    assert done.status == 0 and "resumed at step 3" in done.out, done.err
    assert ons[4] == (4, True)
    assert json.loads((run / "result.json").read_text())["compiled"] is True
