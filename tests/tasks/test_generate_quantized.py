"""LoRA on maps that are stored in four or eight bits."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from conftest import graft_tensors
from language_models import folder, rows

import graftkit
from graftkit.backbone.load import load_backbone
from graftkit.backbone.source import auto_class, find_source
from graftkit.errors import UserError
from graftkit.grafts.attach import attach

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_compared")]

HERE = importlib.util.find_spec("bitsandbytes") is not None
needed = pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed")
FAST = {"train.precision": "fp32", "train.batch_size": 8, "train.lr": 0.01, "train.steps": 6}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    size = {"hidden_size": 64, "intermediate_size": 128}
    return folder(tmp_path_factory.mktemp("models") / "llama", "llama", **size)


def load(path, quantize):
    source = find_source(str(path), None, quantize)
    return load_backbone(source, auto_class(source, ("CAUSAL_LM",)), complete=True)


@needed
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_lora_adds_to_what_a_quantized_map_gives(llama, quantize):
    base = load(llama, quantize)
    assert base.fingerprint == load(llama, None).fingerprint
    site = base.module("model.layers.0.self_attn.q_proj")
    before, x = site.weight.detach().clone(), torch.randn(2, 5, 64)
    expected = site(x)
    graft = attach(base, "lora(rank=4, sites='q')")
    added = site.lora_default
    with torch.no_grad():
        added.A.normal_(), added.B.normal_()
        found = site(x)
        assert torch.allclose(found - expected, added.scale * x @ added.A.T @ added.B.T, atol=1e-3)
    site(x).sum().backward()
    assert site.weight.grad is None and added.A.grad is not None
    assert (site.weight == before).all() and site.weight.dtype in (torch.uint8, torch.int8)
    with pytest.raises(graftkit.errors.NotFoldable, match="stored as torch"):
        graft.fold()


@needed
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_gradients_are_the_same_after_an_evaluation(llama, quantize):
    base = load(llama, quantize)
    graft = attach(base, "lora(rank=4)")
    ids = torch.randint(6, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(2):
        base.model.train()
        base.model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad.clone() for name, p in graft.parameters.items()})
        base.model.zero_grad()
        base.model.eval()
        with torch.no_grad():
            base.model(input_ids=ids)
    assert any(gradient.abs().sum() > 0 for name, gradient in found[0].items() if ".0." in name)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@needed
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_runs(llama, tmp_path, quantize, command):
    run = graftkit.tune(model=str(llama), task="generate()", train=rows(24), eval=0.2, out=tmp_path / "run",
                        settings=FAST | {"quantize": quantize})  # fmt: skip
    again = run.evaluate(rows(5))
    assert again["rows"] == 5 and isinstance(run.predict(["snow?"])[0]["completion"], str)
    plain = graftkit.load(load(llama, None), run.path / "graft")  # the graft fits the model as it was
    assert set(plain.labels) and graft_tensors(run.path)
    with pytest.raises(UserError, match=f"quantized as {quantize}, and nothing can be folded into them"):
        run.export(tmp_path / "plain")
    plan = json.loads((run.path / "plan.json").read_text())
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(24)))
    words = ["--model", llama, "--task", "generate", "--train", tmp_path / "t.jsonl", f"quantize={quantize}"]
    planned = json.loads(command("plan", *words, "train.precision=fp32", "--json").out)
    assert planned["total_parameters"] == plan["total_parameters"]
    assert planned["weight_bytes"] == plan["weight_bytes"]


@pytest.fixture
def norms_in_fp32(monkeypatch):
    """LayerNorm gives fp32 within autocast, as on CUDA: what follows reads another type than its bias is held in."""
    plain = torch.nn.LayerNorm.forward
    monkeypatch.setattr(
        torch.nn.LayerNorm, "forward", lambda norm, x: plain(norm, x.to(norm.weight.dtype)).float()
    )


@needed
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["lora() + head()", "bitfit() + head()"])
def test_biases_of_quantized_layers_train_or_stay(
    tiny_sentence_bert, rows_folder, tmp_path, command, norms_in_fp32, quantize, method
):
    """BERT's linear layers have biases, which bitsandbytes would cast in place: the audit would stop the run."""
    done = command(
        "tune", "--model", tiny_sentence_bert, "--task", "classify", "--train", rows_folder / "train.csv", "--method", method,
        "--out", tmp_path / "run", f"quantize={quantize}", "train.precision=bf16", "train.steps=3",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert command("predict", tmp_path / "run", "the old plum").status == 0


@needed
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_no_forward_pass_changes_a_tensor(tiny_bert, norms_in_fp32, quantize, held):
    source = find_source(str(tiny_bert), None, quantize)
    base = load_backbone(source, None)
    for name, parameter in base.model.named_parameters():
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(held)
            if name.endswith("bias"):  # values that a rounding would change
                parameter.data = parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    site = base.module("encoder.layer.0.attention.self.query")

    def call(half: bool) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            base.model(input_ids=torch.arange(6, 12)[None])
            return site(torch.ones(1, 3, 32, dtype=torch.bfloat16 if half else torch.float32))

    before = {name: tensor.clone() for name, tensor in base.model.named_parameters()}
    first = call(False)
    for half in (True, False):
        call(half)
    assert torch.equal(call(False), first)  # whatever types came before
    for name, tensor in base.model.named_parameters():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


@needed
@pytest.mark.parametrize("method", ["dora()", "pissa()", "full()"])
def test_methods_that_need_the_weight_are_refused_by_name(llama, method):
    with pytest.raises(UserError, match=method[:-2]):
        attach(load(llama, "nf4"), method)


def test_what_cannot_be_quantized(llama, monkeypatch, tmp_path):
    monkeypatch.setattr("graftkit.backbone.quantized.LIBRARY", "a_library_that_is_not_there")
    with pytest.raises(UserError, match=r"quantize='nf4' needs the library .*: pip install"):
        load(llama, "nf4")
    with pytest.raises(UserError, match=r"quantize is 'fp4', but must be 'nf4' or 'int8'"):
        graftkit.tune(
            model=str(llama),
            task="generate()",
            train=rows(4),
            out=tmp_path / "x",
            settings={"quantize": "fp4"},
        )


@needed
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_new_head_is_not_quantized(llama, tiny_bert, rows_folder, tmp_path, command, quantize):
    for name, model, task in (("own", tiny_bert, "classify"), ("score", llama, "classify")):
        out = tmp_path / name
        words = [
            "--model",
            model,
            "--task",
            task,
            "--train",
            rows_folder / "train.csv",
            f"quantize={quantize}",
        ]
        words += ["--method", "lora() + head(pooling='own')", "--out", out, "train.steps=2"]
        done = command("tune", *words)
        assert done.status == 0, done.err
        assert command("predict", out, "the old plum").status == 0
        planned = json.loads(command("plan", *words, "--json").out)
        assert planned["weight_bytes"] == json.loads((out / "plan.json").read_text())["weight_bytes"]
