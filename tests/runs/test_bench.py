"""graftkit bench: what it counts agrees with torch's own counter of FLOPs, and its table has what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from graftkit.backbone import Backbone
from graftkit.engine.frozen import frozen_depth
from graftkit.errors import UserError
from graftkit.grafts.attach import attach
from graftkit.plan.work import flops_of
from graftkit.runs.bench import bench, kind_of


def counted(model, run) -> float:
    """FLOPs of forward and backward as torch counts them, without what only a gradient of frozen weights would need."""
    with FlopCounterMode(display=False) as counter:
        run(model).sum().backward()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts():
    import torch

    ids = torch.randint(3, 40, (2, 48))
    lengths = np.array([48, 48])
    for method, depth in (
        ("lora(rank=2, sites='all-linear')", 0),
        ("unfreeze('blocks[-2:]')", 2),
        ("full()", 0),
    ):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128
        )
        model = BertModel(config, add_pooling_layer=False)
        model.set_attn_implementation("eager")  # so that its products are counted on a CPU
        graft = attach(Backbone(model), method)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in graft.labels)
        assert frozen_depth(graft) == depth
        wanted = counted(model, lambda model: model(ids).last_hidden_state)
        # the input of the lowest trained layer needs no gradient
        assert flops_of(graft, depth, lengths, 0.0) == pytest.approx(wanted, rel=0.12), method


def test_lora_is_two_thirds_of_full_training_and_a_bit_and_the_output_layer_counts():
    config = LlamaConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    short = np.array([1])  # attention is nothing
    full = attach(Backbone(LlamaForCausalLM(config)), "full()")
    whole = flops_of(full, 0, short, 0.0)
    frozen = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert whole == pytest.approx(6 * frozen, rel=0.03)
    lora = attach(Backbone(LlamaForCausalLM(config)), "lora(rank=4, sites='all-linear')")
    added = sum(p.numel() for p in lora.parameters.values())
    # an added weight takes 6 as any trained one; NeMo's formula gives it 2
    assert flops_of(lora, 0, short, 0.0) == pytest.approx(4 * frozen + 6 * added, rel=0.03)
    scored = flops_of(lora, 0, short, 3.0) - flops_of(lora, 0, short, 0.0)
    assert scored == 3 * 4 * 500 * 32
    assert flops_of(full, 0, short, 1.0) - whole == 6 * 500 * 32


@pytest.mark.slow
def test_it_measures_made_rows_and_a_users(command, tiny_bert, rows_folder):
    done = command(
        "bench",
        tiny_bert,
        "--method",
        "lora(rank=2) + head()",
        "--tokens",
        "16",
        "--batch-size",
        "4",
        "--json",
    )
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["padding"] == 0 and 0 < found["share_of_peak"] < 1 and found["rows"] == "made"
    assert found["tokens_per_second"] * found["seconds_per_step"] == pytest.approx(64, rel=0.01)
    assert sum(found["time"].values()) == pytest.approx(1, abs=0.01) and found["time"]["products"] > 0
    done = command("bench", tiny_bert, "--train", rows_folder / "train.csv", "--batch-size", "4")
    assert done.status == 0 and "| share of the peak |" in done.out and "0.0% padding" not in done.out


def test_rows_that_cannot_be_made_are_asked_for(tiny_bert):
    for task in ("tag", "causal"):
        with pytest.raises(UserError, match="name rows with --train"):
            bench(str(tiny_bert), task=task)


def test_kinds_of_operations():
    names = {
        "products": ["aten::addmm", "aten::bmm", "sm90_xmma_gemm_bf16bf16_bf16f32", "aten::mkldnn_linear", "nvjet_hsh_128x256"],
        "attention": ["aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_softmax", "flash_fwd_kernel", "fmha_cutlassF_bf16"],
        "copies": ["aten::copy_", "aten::_to_copy", "Memcpy DtoH", "aten::embedding_dense_backward", "aten::cat"],
        "elementwise": ["aten::add_", "aten::gelu", "vectorized_elementwise_kernel", "aten::native_layer_norm"],
    }  # fmt: skip
    for kind, members in names.items():
        assert [kind_of(name) for name in members] == [kind] * len(members)
