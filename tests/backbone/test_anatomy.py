"""Parts are found from the modules: the same roles in each block of many architectures, and methods that train there."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModel

import graftkit
from graftkit.backbone import Backbone
from graftkit.engine.audit import Audit
from graftkit.errors import UserError

pytestmark = pytest.mark.sampled

BLOCKS = 3
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
SEPARATE, FUSED = {"q", "k", "v", "o", "up", "down"}, {"qkv", "o", "up", "down"}
ARCHITECTURES = {
    "Roberta": ({**SIZES, "pad_token_id": 0}, SEPARATE),
    "Electra": ({**SIZES, "embedding_size": 16}, SEPARATE),
    "MPNet": ({**SIZES, "pad_token_id": 0}, SEPARATE),
    "DistilBert": (
        {"vocab_size": 60, "dim": 32, "n_layers": BLOCKS, "n_heads": 4, "hidden_dim": 64, "pad_token_id": 0},
        SEPARATE,
    ),
    "DebertaV2": (
        {**SIZES, "pad_token_id": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        SEPARATE | {"linear"},
    ),
    "ModernBert": (
        {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        FUSED,
    ),
    "Qwen3": ({**GROUPED, "head_dim": 8}, SEPARATE | {"gate"}),
    "Mistral": (GROUPED, SEPARATE | {"gate"}),
    "Gemma2": ({**GROUPED, "head_dim": 8, "pad_token_id": 0}, SEPARATE | {"gate"}),
    "Phi": (SIZES, SEPARATE),
    "OPT": (
        {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "ffn_dim": 64,
         "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0},
        SEPARATE,
    ),
    "GPTNeoX": (SIZES, FUSED),
    "Bloom": ({"vocab_size": 60, "hidden_size": 32, "n_layer": BLOCKS, "n_head": 4}, FUSED),
}  # fmt: skip
METHODS = ("lora()", "adapter()", "prefix()", "unfreeze()", "full() + layerwise_lr()")


def make(name: str) -> Backbone:
    torch.manual_seed(0)
    sizes, _ = ARCHITECTURES[name]
    return Backbone(AutoModel.from_config(getattr(transformers, f"{name}Config")(**sizes)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_block_has_the_same_parts(name: str) -> None:
    backbone = make(name)
    assert len(backbone.blocks) == BLOCKS
    for block in range(BLOCKS):
        roles = [site.role for site in backbone.sites if site.block == block and site.role != "norm"]
        assert set(roles) == ARCHITECTURES[name][1]
        for role in ("q", "k", "v", "qkv", "o", "down"):
            assert roles.count(role) <= 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_methods_train_there_or_say_why_not(name: str, method: str) -> None:
    backbone = make(name)
    try:
        graft = graftkit.attach(backbone, f"{method} + head(classes=3)")
    except UserError as error:
        assert method == "prefix()"  # models whose attention cannot be reached
        assert name + "Model" in str(error) and "Use lora or adapter instead" in str(error)
        return
    model = graft.model
    optimizer = torch.optim.AdamW(graft.param_groups())
    audit = Audit(model, graft.labels)
    ids = torch.randint(3, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    for _ in range(2):
        model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
        audit.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        audit.after_step()
    assert audit.done


def test_a_router_of_experts_is_no_map_to_update():
    """Llama 4's is a linear map by its class, but gives scores and logits."""
    config = transformers.Llama4TextConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, intermediate_size_mlp=48, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    graft = graftkit.attach(transformers.Llama4ForCausalLM(config), "lora(rank=2)")
    assert not any("router" in name for name in graft.parameters)
    ids = torch.randint(3, 60, (2, 5))
    graft.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in graft.parameters.values())


@pytest.mark.slow
def test_maps_that_their_attention_multiplies_by_itself():
    """WavLM hands its weights to torch's attention and calls none of the maps: the update stands in for them."""
    config = transformers.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=[8, 8],
        conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        layerdrop=0.0, mask_time_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WavLMModel(config).eval()
    x = torch.randn(2, 400)
    plain = model(x)[0].detach()
    called = {
        site.name.rpartition(".")[2]: site.called for site in Backbone(model).sites if site.block is not None
    }
    assert (
        not any(called[name] for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
        and called["gru_rel_pos_linear"]
    )
    graft = graftkit.attach(model, "lora(rank=2, sites='attention')")
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.normal_(std=0.3)
    changed = model(x)[0]
    changed.square().sum().backward()
    assert all(p.grad.any() for p in graft.parameters.values())
    assert (changed - plain).abs().max() > 1e-2
    folded = graft.fold()(x)[0]
    torch.testing.assert_close(folded, changed.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["XLMRoberta", "Roberta", "Electra", "MPNet", "DistilBert"])
def test_the_head_of_a_classifier_wherever_it_is_defined(name):
    """XLM-RoBERTa's class defines it in front of the encoder."""
    sizes, _ = ARCHITECTURES["Roberta" if name == "XLMRoberta" else name]
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    heads = [site.name for site in Backbone(model).sites if site.role == "head"]
    assert len(heads) == 2 and all("classifier" in head for head in heads)


@pytest.mark.parametrize("name", ["DINOv3ViT", "DINOv3ConvNext"])
def test_a_bare_model_has_no_head_though_its_encoder_has_the_base_s_name(name):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    if name == "DINOv3ConvNext":
        sizes = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    assert not [site.name for site in Backbone(model).sites if site.role == "head"]
    graft = graftkit.attach(model.eval(), "full() + head(classes=2, pooling='mean')")
    graft.model(pixel_values=torch.randn(2, 3, 64, 64)).logits.sum().backward()
    assert all(p.grad is not None for p in graft.parameters.values())
