"""LoRA and its kin beside PEFT's: adapters written there and read here, the other way round, and gradients."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from custom_models import close, shake
from torch import Tensor, nn

from graftkit import Backbone, UserError, attach, load

peft = pytest.importorskip("peft")
from peft_lora import ALL_KINDS, shaken, with_peft, write_with_peft  # noqa: E402

pytestmark = pytest.mark.sampled

# ---- models of transformers


@ALL_KINDS
@pytest.mark.parametrize(
    "text",
    [
        "lora(rank=3)",
        "lora(rank=4, alpha=3, sites='q,v', dropout=0.1)",
        "lora(rank=2, sites='blocks[1].ffn')",
    ],
)
@pytest.mark.parametrize("headed", [False, True])
def test_peft_reads_our_lora(kind, text, headed, tmp_path):
    make = tiny.with_head if headed else tiny.bare
    graft = shaken(make(kind), text + (" + head(classes=3)" if headed else ""))
    graft.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == ("SEQ_CLS" if headed else "FEATURE_EXTRACTION")
    wrapped = with_peft(make(kind), tmp_path)
    wanted = tiny.outputs(graft.model)
    assert tiny.relative(tiny.outputs(wrapped), wanted) < 1e-5
    assert tiny.relative(tiny.outputs(make(kind)), wanted) > 1e-2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_peft_reads_our_lora_on_a_language_model(kind, tmp_path):
    graft = shaken(tiny.causal(kind), "lora(rank=3)")
    graft.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    wrapped = with_peft(tiny.causal(kind), tmp_path)
    assert tiny.relative(tiny.outputs(wrapped), tiny.outputs(graft.model)) < 1e-5


def test_peft_reads_a_pooler_trained_with_the_head(tmp_path):
    missing = ("bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight")
    backbone = Backbone(tiny.with_head("bert"), missing=missing)
    graft = attach(backbone, "lora(rank=2) + head(classes=3)")
    shake(graft.model)
    graft.save(tmp_path)
    wrapped = with_peft(tiny.with_head("bert"), tmp_path)
    assert tiny.relative(tiny.outputs(wrapped), tiny.outputs(graft.model)) < 1e-5


TARGETS = {
    "bert": ["query", "value", "output.dense"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
}
REGEX = {"bert": r".*layer\.[12]\..*dense", "gpt2": r".*h\.\d\.mlp\.c_.*", "llama": r".*(gate|up)_proj"}
SAVED = {"bert": ["classifier", "pooler"], "gpt2": ["score", "ln_f"], "llama": ["score", "embed_tokens"]}


@ALL_KINDS
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"regex": True, "lora_alpha": 7, "r": 3},
        {"use_rslora": True, "r": 5, "lora_alpha": 3},
        {"lora_dropout": 0.3, "init_lora_weights": "gaussian", "layers_to_transform": [0, 2]},
    ],
)
@pytest.mark.parametrize("headed", ["bare", "head", "head and more"])
def test_we_read_what_peft_writes(kind, changes, headed, tmp_path):
    make = tiny.bare if headed == "bare" else tiny.with_head
    settings = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"} | changes
    if settings.pop("regex", False):
        settings["target_modules"] = REGEX[kind]
    if headed == "bare" and kind != "bert":  # PEFT finds no layer number in a name that starts with its list
        settings.pop("layers_to_transform", None)
    if headed != "bare":
        settings |= {"task_type": "SEQ_CLS", "modules_to_save": SAVED[kind][: 1 if headed == "head" else 2]}
    wrapped = write_with_peft(make(kind), tmp_path, **settings)
    graft = load(make(kind), tmp_path)
    wanted = tiny.outputs(wrapped)
    assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5
    assert tiny.relative(tiny.outputs(make(kind)), wanted) > 1e-2
    graft.save(tmp_path / "again")
    assert torch.equal(tiny.outputs(load(make(kind), tmp_path / "again").model), tiny.outputs(graft.model))


def test_a_head_of_another_size(tmp_path):
    wrapped = write_with_peft(
        tiny.with_head("bert", num_labels=5), tmp_path, task_type="SEQ_CLS", target_modules=["query"]
    )
    graft = load(tiny.with_head("bert"), tmp_path)
    assert tiny.relative(tiny.outputs(graft.model), tiny.outputs(wrapped)) < 1e-5


def test_gradients_are_those_of_peft():
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        tiny.bare("llama"), peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
    ).eval()
    shake(wrapped)
    theirs = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    graft = attach(tiny.bare("llama"), "lora(rank=3, alpha=5)")
    graft.model.eval()
    names = {
        name: "base_model.model."
        + name.replace(".lora_default.A", ".lora_A.default.weight").replace(
            ".lora_default.B", ".lora_B.default.weight"
        )
        for name in graft.parameters
    }
    assert set(names.values()) == set(theirs)
    with torch.no_grad():
        for name, parameter in graft.parameters.items():
            parameter.copy_(theirs[names[name]])
    for model in (wrapped, graft.model):
        given = tiny.batch()
        tiny.flat(model(**given), given["attention_mask"]).square().sum().backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.values())
    for name, parameter in graft.parameters.items():
        difference = (parameter.grad - theirs[names[name]].grad).abs().max()
        assert float(difference) < 1e-5 * largest, name


# ---- DoRA, PiSSA, embeddings, biases on models of transformers


FORMS = {
    "dora": ("dora(rank=3, alpha=5)", {"use_dora": True}),
    "biases": ("lora(rank=3, bias='all')", {"bias": "all"}),
    "some biases": ("lora(rank=3, bias='lora_only')", {"bias": "lora_only"}),
    "bias of B": ("lora(rank=3, lora_bias=True, alpha=5)", {"lora_bias": True}),
    "patterns": ("lora(rank=3, rank_pattern={'blocks[1]': 5, 'v': 2}, alpha_pattern={'blocks[0]': 7})",
                 {"rank_pattern": {"1.*": 5}, "alpha_pattern": {"q_proj|query|c_attn": 7}}),
    "use_rslora": ("dora(rank=3, use_rslora=True, rank_pattern={'blocks[-1]': 4})", {"use_dora": True, "use_rslora": True}),
}  # fmt: skip
# with and without a head in turn, so that each form and each kind of model has both
EACH_FORM = pytest.mark.parametrize(
    ("kind", "form", "headed"),
    [(kind, form, bool((i + j) % 2)) for i, kind in enumerate(tiny.KINDS) for j, form in enumerate(FORMS)],
)


@EACH_FORM
def test_peft_reads_our_forms(kind, form, headed, tmp_path):
    make = tiny.with_head if headed else tiny.bare
    text = FORMS[form][0] + (" + head(classes=3)" if headed else "")
    graft = shaken(make(kind), text)
    graft.save(tmp_path)
    wrapped = with_peft(make(kind), tmp_path)
    close(tiny.outputs(wrapped), tiny.outputs(graft.model), 1e-5, "outputs")
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "graft.json"}
    (tmp_path / "graft.json").unlink()  # as any adapter of PEFT
    close(
        tiny.outputs(load(make(kind), tmp_path).model),
        tiny.outputs(graft.model),
        1e-6,
        "outputs of PEFT's part",
    )


@EACH_FORM
def test_we_read_pefts_forms(kind, form, headed, tmp_path):
    make = tiny.with_head if headed else tiny.bare
    settings = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", "r": 4} | FORMS[form][1]
    if headed:
        settings |= {"task_type": "SEQ_CLS"}
    wrapped = write_with_peft(make(kind), tmp_path, **settings)
    graft = load(make(kind), tmp_path)
    close(tiny.outputs(graft.model), tiny.outputs(wrapped), 1e-5, "outputs")
    assert tiny.relative(tiny.outputs(make(kind)), tiny.outputs(wrapped)) > 1e-2


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "kind,targets", [("llama", ["embed_tokens", "q_proj"]), ("llama", ["lm_head"]), ("gpt2", ["wte"])]
)
def test_embeddings_and_heads_of_language_models(kind, targets, dora, tmp_path):
    """PEFT keeps the whole embedding beside an adapter of it."""
    wrapped = write_with_peft(
        tiny.causal(kind), tmp_path / "theirs", target_modules=targets, r=3, use_dora=dora
    )
    graft = load(tiny.causal(kind), tmp_path / "theirs")
    close(tiny.outputs(graft.model), tiny.outputs(wrapped), 1e-5, "outputs")
    assert all("_default." in name for name in graft.labels)
    graft.save(tmp_path / "ours")
    close(
        tiny.outputs(with_peft(tiny.causal(kind), tmp_path / "ours")), tiny.outputs(wrapped), 1e-5, "outputs"
    )


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_ways_to_start_that_change_the_base(start, use_rslora, tmp_path):
    """Refused as PEFT keeps them; read once it has made a plain LoRA of them."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value"], "use_rslora": use_rslora}
    wrapped = peft.get_peft_model(
        tiny.bare("bert"), peft.LoraConfig(init_lora_weights=start, **settings)
    ).eval()
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(str(tmp_path / "first"))
    wrapped.peft_config["default"].init_lora_weights = start
    shake(wrapped)
    wanted = tiny.outputs(wrapped)
    wrapped.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(
        UserError, match=f"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"
    ):
        load(tiny.bare("bert"), tmp_path / "raw")
    wrapped.save_pretrained(
        str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    graft = load(tiny.bare("bert"), tmp_path / "plain")
    assert graft.method.methods[0].rank == 6
    close(tiny.outputs(graft.model), wanted, 1e-5, "outputs")


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal", "mica", "eva"])
def test_ways_to_start_that_do_not_matter(start, tmp_path):
    settings = {"eva_config": peft.EvaConfig()} if start == "eva" else {}
    wrapped = write_with_peft(
        tiny.bare("bert"), tmp_path, target_modules=["query"], init_lora_weights=start, r=4, **settings
    )
    close(tiny.outputs(load(tiny.bare("bert"), tmp_path).model), tiny.outputs(wrapped), 1e-5, "outputs")


@pytest.mark.parametrize(
    "text", ["pissa(rank=3)", "pissa(rank=3, alpha=5, use_rslora=True, rank_pattern={'blocks[0]': 2})"]
)
@ALL_KINDS
def test_peft_reads_our_pissa_as_lora_of_twice_the_rank(kind, text, tmp_path):
    graft = shaken(tiny.bare(kind), text)
    graft.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 6 and "init_lora_weights" not in config
    close(tiny.outputs(with_peft(tiny.bare(kind), tmp_path)), tiny.outputs(graft.model), 1e-5, "outputs")
    again = load(tiny.bare(kind), tmp_path)
    assert str(again.method) == str(graft.method)
    assert torch.equal(tiny.outputs(again.model), tiny.outputs(graft.model))


# ---- what a forward pass keeps for the backward pass


@pytest.mark.parametrize(
    "text", ["lora(rank=4)", "dora(rank=4)", "lora(rank=4, dropout=0.1)", "dora(rank=4, dropout=0.1)"]
)
@ALL_KINDS
def test_no_more_is_kept_than_by_peft(kind, text, tmp_path):
    graft = shaken(tiny.bare(kind), text)
    graft.save(tmp_path)
    wrapped = peft.PeftModel.from_pretrained(tiny.bare(kind), str(tmp_path), is_trainable=True)

    def kept(model: nn.Module) -> int:
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model.train()(**tiny.batch(rows=8, length=40))
        del outputs
        return sum(sizes.values())

    assert kept(graft.model) <= kept(wrapped)
