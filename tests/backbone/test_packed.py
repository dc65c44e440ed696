"""Rows packed into one attend as separate rows do, without a mask of (length, length)."""

from __future__ import annotations

import pytest
import torch

from graftkit.backbone import Backbone
from graftkit.backbone.attention import keep_parts_apart
from graftkit.backbone.packed import Parts, packed
from graftkit.engine.recompute import Recompute


def tiny(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


SIZES = [[5, 3, 4], [1, 11]]


def inputs():
    torch.manual_seed(1)
    places = [torch.cat([torch.arange(size) for size in row]) for row in SIZES]
    return {"input_ids": torch.randint(50, (2, 12)), "position_ids": torch.stack(places)}


def gradients(model, logits):
    torch.manual_seed(2)
    model.zero_grad()
    (logits * torch.randn_like(logits)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("again", [False, True], ids=["", "recomputed"])
def test_packed_rows_give_the_logits_and_gradients_of_separate_rows(again, monkeypatch):
    model = tiny()
    given = inputs()
    alone = torch.stack([
        torch.cat([model(input_ids=ids[None]).logits[0] for ids in row.split(sizes)])
        for row, sizes in zip(given["input_ids"], SIZES)
    ])  # fmt: skip
    wanted = gradients(model, alone)
    assert keep_parts_apart(Backbone(model, None))
    lengths = []
    from transformers.integrations import sdpa_attention

    plain = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(
        sdpa_attention,
        "sdpa_attention_forward",
        lambda *a, **k: lengths.append(a[1].shape[2]) or plain(*a, **k),
    )
    recompute = Recompute(list(model.model.layers), "blocks" if again else "none")
    recompute.enter(0)
    with packed(Parts(SIZES)):
        logits = model(**given).logits
    found = gradients(model, logits)
    recompute.leave()
    assert sorted(set(lengths)) == [1, 3, 4, 5, 11], "the attention of all pairs was not computed"
    assert torch.allclose(logits, alone, atol=1e-5)
    assert all(
        torch.allclose(found[n], wanted[n], atol=1e-5 * float(wanted[n].abs().max()) + 1e-7) for n in wanted
    )
    logits = model(**given).logits
    assert lengths[-1] == 12 and torch.allclose(logits, alone, atol=1e-5), "without the parts, a mask"


def test_a_sliding_window_keeps_its_mask():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=3, use_cache=False,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    given = inputs()
    with torch.no_grad():
        wanted = model(**given).logits
        assert keep_parts_apart(Backbone(model, None))
        with packed(Parts(SIZES)):
            found = model(**given).logits
    assert torch.allclose(found, wanted, atol=1e-5)
