"""Every tuner of the installed PEFT as a method: the same outputs and gradients as in PEFT's own model, both ways."""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings

import pytest
import tiny
import torch
from conftest import make_rows
from peft_versions import peft_has, skip_without_tuner
from torch import nn

import graftkit
from graftkit import NotFoldable, Peft, UserError, attach, load
from graftkit.grafts.graft import Graft
from graftkit.methods.shared.peft_tuners import REFUSED

peft = pytest.importorskip("peft")
from peft import mapping  # noqa: E402

pytestmark = pytest.mark.sampled

CONFIGS = {kind.value: config for kind, config in mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
# options that fit models of width 16 and make every tensor count
OPTIONS: dict[str, dict] = {
    "ADAMSS": {"num_subspaces": 3},
    "BOFT": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"init_ia3_weights": False},
    "LILY": {"r": 4, "num_B": 2, "stride_A": 2},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 6},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TINYLORA": {"u": 5},
    "TRAINABLE_TOKENS": {"token_indices": [3, 7, 11]},
    "UNILORA": {"r": 3},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "VERA": {"r": 6},
    "WAVEFT": {"n_frequency": 20},
}
NAMES = {
    "bert": ["query", "value", "intermediate.dense"],
    "llama": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
BRIDGED = sorted(set(CONFIGS) - set(REFUSED))
KINDS = ("bert", "llama")


def expression(tuner: str, kind: str) -> str:
    sites = ",".join(NAMES[kind])
    if tuner == "LN_TUNING":
        sites = "norms"
    if tuner == "TRAINABLE_TOKENS":
        sites = {"bert": "word_embeddings", "llama": "embed_tokens", "gpt2": "wte"}[kind]
    return f"peft({tuner.lower()!r}, {OPTIONS.get(tuner, {})!r}, sites={sites!r})"


def ours(tuner: str, kind: str) -> Graft:
    torch.manual_seed(3)
    return attach(tiny.bare(kind), expression(tuner, kind))


def theirs(tuner: str, kind: str, graft: Graft) -> nn.Module:
    """PEFT's own model, made as `graft` was."""
    config = dict(OPTIONS.get(tuner, {}))
    fields = {field.name for field in dataclasses.fields(CONFIGS[tuner])}
    config["target_modules"] = targets = [
        name.partition(".peft_")[0] for name, module in graft.additions() if name.endswith("peft_default")
    ]
    if tuner == "LILY":
        config["target_modules"] = NAMES[kind]
    if "feedforward_modules" in fields:
        config["feedforward_modules"] = [
            site.name for site in graft.backbone.sites if site.name in targets and site.role == "down"
        ]
    if "fan_in_fan_out" in fields:
        config["fan_in_fan_out"] = kind == "gpt2"
    torch.manual_seed(3)
    return peft.get_peft_model(tiny.bare(kind), CONFIGS[tuner](**config)).eval()


def shake(graft: Graft) -> Graft:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return graft


def same_values(wrapped: nn.Module, graft: Graft) -> dict[str, nn.Parameter]:
    """Their trained parameters by our names, given our values."""
    found = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    named = {f"base_model.model.{name.replace('.peft_default.', '.')}": name for name in graft.parameters}
    assert found.keys() == named.keys()
    with torch.no_grad():
        for key, parameter in found.items():
            parameter.copy_(graft.parameters[named[key]])
    return {named[key]: parameter for key, parameter in found.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tuner", BRIDGED)
def test_there_and_back(tuner, kind, tmp_path):
    """PEFT's own model gives the same outputs and gradients, and each reads what the other writes. What does not depend
    on the kind of model (files written again, copies, shapes alone) is tried on one, with each tuner on the other."""
    whole = kind == KINDS[BRIDGED.index(tuner) % len(KINDS)]
    graft = ours(tuner, kind)
    wrapped = theirs(tuner, kind, graft)
    torch.testing.assert_close(tiny.outputs(graft.model), tiny.outputs(wrapped), rtol=1e-5, atol=1e-5)
    shake(graft)
    parameters = same_values(wrapped, graft)
    base = tiny.outputs(tiny.bare(kind))
    wanted = tiny.outputs(graft.model)
    assert tiny.relative(wanted, tiny.outputs(wrapped)) < 1e-5
    assert tiny.relative(base, wanted) > 1e-3
    peft_reads_what_we_write(graft, kind, tmp_path / "ours", wanted)
    we_read_what_peft_writes(wrapped, kind, tmp_path / "theirs", wanted, again=whole)
    has_its_gradients(graft, wrapped, parameters)
    if not whole:
        return
    we_read_what_we_write(kind, tmp_path / "ours", wanted)
    twin = copy.deepcopy(graft)
    assert torch.equal(tiny.outputs(twin.model), wanted)
    graft.disable()
    assert torch.equal(tiny.outputs(graft.model), base)
    attaches_on_meta(graft, tuner, kind)


def peft_reads_what_we_write(graft, kind, folder, wanted):
    graft.save(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
        wrapped = peft.PeftModel.from_pretrained(tiny.bare(kind), str(folder)).eval()
    assert tiny.relative(tiny.outputs(wrapped), wanted) < 1e-5


def we_read_what_we_write(kind, folder, wanted):
    torch.manual_seed(11)
    again = load(tiny.bare(kind), folder, name="other")
    assert torch.equal(tiny.outputs(again.model), wanted)


def we_read_what_peft_writes(wrapped, kind, folder, wanted, again):
    wrapped.save_pretrained(str(folder))
    torch.manual_seed(11)
    ours = load(tiny.bare(kind), folder)
    got = tiny.outputs(ours.model)
    assert tiny.relative(got, wanted) < 1e-5
    if again:
        ours.save(folder / "again")
        assert torch.equal(tiny.outputs(load(tiny.bare(kind), folder / "again").model), got)


def has_its_gradients(graft, wrapped, parameters):
    given = tiny.batch()
    for model in (graft.model.eval(), wrapped.eval()):
        tiny.flat(model(**given), given["attention_mask"]).square().sum().backward()
    for name, parameter in graft.parameters.items():
        assert parameter.grad is not None and parameters[name].grad is not None, name
        assert tiny.relative(parameter.grad, parameters[name].grad) < 1e-4, name
    graft.model.train()
    tiny.flat(graft.model(**given), given["attention_mask"]).sum().backward()


def attaches_on_meta(graft, tuner, kind):
    with torch.device("meta"):
        shapes = tiny.bare(kind)
    if tuner == "ADAMSS":
        with pytest.raises(UserError, match="needs the weights"):
            attach(shapes, expression(tuner, kind), keep_base=False)
        return
    planned = attach(shapes, expression(tuner, kind), keep_base=False)
    assert {n: p.shape for n, p in planned.parameters.items()} == {
        n: p.shape for n, p in graft.parameters.items()
    }
    assert all(p.is_meta for p in planned.parameters.values())


@pytest.mark.parametrize("tuner", BRIDGED)
def test_folds_or_says_why_not(tuner):
    graft = shake(ours(tuner, "bert"))
    wanted = tiny.outputs(graft.model)
    try:
        graft.fold()
    except NotFoldable as error:
        assert f"peft({tuner.lower()!r}) cannot be folded" in str(error) and tuner in ("BONE", "LILY")
        return
    assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5
    graft.unfold()
    assert torch.equal(tiny.outputs(graft.model), wanted)


def test_nearly_all_of_peft_is_a_method():
    """Of the tuners that PEFT itself attaches to linear maps; the others are refused by name, with what to use."""
    prompts = {kind for kind, config in CONFIGS.items() if issubclass(config, peft.PromptLearningConfig)}
    elsewhere = {"ADAPTION_PROMPT", "XLORA"}  # PEFT puts these on attention and on whole models
    attachable = set(CONFIGS) - prompts - elsewhere
    assert len(set(BRIDGED) & attachable) / len(attachable) > 0.9
    for kind in set(CONFIGS) - set(BRIDGED):
        with pytest.raises(UserError, match=rf"peft\('{kind.lower()}'\).* use [a-z]+\(\)\.$"):
            Peft(kind.lower())


@pytest.mark.parametrize("name", ["vb-lora", "VBLORA", "vb_lora", "vblora"])
def test_names_are_read_as_people_write_them(name):
    assert Peft(name).kind == "VBLORA"


@pytest.mark.parametrize(
    "text,said",
    [
        ("peft('hrra')", "no such tuner"),
        ("peft('hrra')", "Did you mean 'hra'?"),
        ("peft('hra', {'rank': 3})", "has no option 'rank' (options: apply_GS, init_weights, r"),
        ("peft('oft', {'oft_blok_size': 4})", "Did you mean 'oft_block_size'?"),
        ("peft('hra', {'bias': 'all'})", "bias='all'; use bitfit()"),
        ("peft('hra', {'modules_to_save': ['x']})", "use head() or unfreeze()"),
        ("peft('hra', {'layers_to_transform': 0})", "sites="),
        ("peft('hra', 8)", "options is 8, but must be "),
        ("peft('hra', {'r': -3})", "`r` should be a positive integer"),
        ("peft('hra', {'r': 'x'})", "does not fit BertModel: '<=' not supported"),
        ("peft('miss', {'r': 64})", "less than or equal to in_features"),
        ("peft('lora', {'init_lora_weights': 'pissa'})", "use pissa()"),
        ("peft('trainable_tokens', sites='word_embeddings')", "trains nothing"),
        ("peft('hra', sites='embeddings.LayerNorm')", "LayerNorm"),
        ("peft('osf', sites='word_embeddings')", "no layer for 'embeddings.word_embeddings' (Embedding)"),
        ("peft('hra') + peft('oft')", "appears twice"),
    ],
)
def test_what_is_refused(text, said):
    if "'miss'" in text and not peft_has("0.21"):
        pytest.skip("before PEFT 0.21, MiSS takes any rank")
    model = tiny.bare("bert")
    before = tiny.snapshot(model)
    with pytest.raises(UserError) as caught:
        attach(model, text)
    assert said in str(caught.value)
    after = tiny.snapshot(model)
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_peft(monkeypatch, tmp_path):
    attach(tiny.bare("bert"), "peft('hra')").save(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install peft"):
        Peft("oft")
    (tmp_path / "graft.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json.*pip install peft"):
        load(tiny.bare("bert"), tmp_path)


def test_a_model_that_is_one_module():
    model = nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"itself a single layer; use lora\(\)"):
        attach(model, "peft('hra', sites='head')")


def test_tensors_that_peft_makes_on_writing(tmp_path):
    """VB-LoRA can be written without the logits that have no part in it."""
    options = OPTIONS["VBLORA"] | {"save_only_topk_weights": True}
    graft = shake(attach(tiny.bare("bert"), f"peft('vblora', {options!r}, sites='q,v')"))
    graft.save(tmp_path)
    wanted = tiny.outputs(graft.model)
    assert torch.equal(tiny.outputs(load(tiny.bare("bert"), tmp_path).model), wanted)
    (tmp_path / "graft.json").unlink()
    (tmp_path / "graft.safetensors").unlink()
    assert tiny.relative(tiny.outputs(load(tiny.bare("bert"), tmp_path).model), wanted) < 1e-5


def test_gradients_stay_projected_after_a_fold():
    """OSF's layers change gradients through hooks on their parameters."""

    def gradients() -> list[torch.Tensor]:
        graft.model.zero_grad()
        tiny.flat(graft.model(**tiny.batch()), tiny.batch()["attention_mask"]).square().sum().backward()
        return [parameter.grad.clone() for parameter in graft.parameters.values()]

    graft = shake(ours("OSF", "bert"))
    before = gradients()
    copy.deepcopy(graft)
    graft.fold()
    graft.unfold()
    assert all(map(torch.equal, gradients(), before))


def test_tokens_of_a_tied_embedding_are_refused():
    text = "peft('trainable_tokens', {'token_indices': [3]}, sites='wte')"
    with pytest.raises(UserError, match=r"'lm_head'.* use unfreeze"):
        attach(tiny.causal("gpt2"), text)
    assert attach(tiny.bare("gpt2"), text).labels


def test_parameters_are_counted_as_the_docstring_says():
    text = "peft(options={'r': 3}, sites='q,up,down')"
    skip_without_tuner(text)
    graft = attach(tiny.bare("bert"), text)
    sizes = 2 * tiny.WIDTH + 2 * (tiny.WIDTH + tiny.INNER)
    assert sum(p.numel() for p in graft.parameters.values()) == tiny.BLOCKS * 3 * sizes


def test_rates():
    assert {g.lr for g in attach(tiny.bare("bert"), "peft('hra')").labels.values()} == {1e-3}
    assert {g.lr for g in attach(tiny.bare("bert"), "peft('vera')").labels.values()} == {1e-2}
    assert {g.lr for g in attach(tiny.bare("bert"), "peft('hra', lr=0.5)").labels.values()} == {0.5}
    skip_without_tuner("peft()")
    assert {g.lr for g in attach(tiny.bare("bert"), "peft()").labels.values()} == {3e-3}


@pytest.mark.parametrize("tuner", ["hra", "ia3", "lora", "oft", "shira"])
def test_what_others_add_at_the_same_site_stays(tuner):
    """A layer that takes the weight itself leaves the output of others alone; one that scales it scales theirs."""
    text = expression(tuner.upper(), "llama")
    both = attach(tiny.bare("llama"), f"lora(rank=2, sites='q,v,up') + {text}")
    shake(both)
    alone = attach(tiny.bare("llama"), text)
    with torch.no_grad():
        for name, parameter in alone.parameters.items():
            parameter.copy_(both.parameters[name])
    site, x = "layers.0.mlp.up_proj", torch.randn(5, tiny.WIDTH)
    low = both.backbone.module(f"{site}.lora_default")
    added = low.scale * x @ low.A.T @ low.B.T
    if tuner == "ia3":
        added = added * both.backbone.module(f"{site}.peft_default").layer.ia3_l["default"].T
    wanted = alone.backbone.module(site)(x) + added
    torch.testing.assert_close(both.backbone.module(site)(x), wanted)


@pytest.mark.slow
def test_a_run(short_bert, tmp_path):
    rows = make_rows(96)
    method = "peft('hra', {'r': 4}) + head()"
    run = graftkit.tune(
        model=short_bert,
        train=rows,
        method=method,
        out=tmp_path / "run",
        settings={
            "train.epochs": 10,
            "train.batch_size": 16,
            "train.lr": 0.03,
            "train.evaluate_every": "end",
        },
    )
    assert run.result["evaluation"]["accuracy"] > 0.9
    assert run.predict(["the old hammer"])[0]["label"] == "tool"
    assert (tmp_path / "run" / "graft" / "adapter_config.json").exists()
