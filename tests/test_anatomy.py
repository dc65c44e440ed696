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
