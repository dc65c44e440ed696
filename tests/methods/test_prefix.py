"""Trained keys and values against plain attention and against transformers' own cache."""

from __future__ import annotations

import math
from functools import partial

import pytest
import tiny
import torch
import zoo
from shaken import ALL_KINDS, message, shaken
from torch import Tensor, nn
from transformers import DynamicCache

from graftkit import UserError, attach, detach

pytestmark = pytest.mark.sampled

W, L, INNER, V = tiny.WIDTH, tiny.BLOCKS, tiny.INNER, tiny.VOCABULARY


def prefixes(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer, (kv heads, tokens, d)."""
    slots = [
        m for name, m in model.named_modules() if name.endswith("prefix_default") and hasattr(m, "start")
    ]
    return [slot.keys_values() for slot in slots]


def test_prefix_in_bert_is_attention_over_prefix_and_tokens():
    graft = shaken(tiny.bare("bert"), "prefix(tokens=3)")
    model, given = graft.model, tiny.batch()
    inputs, seen = {}, {}

    def note(module, args, kwargs, output, index):
        inputs[index], seen[index] = args[0] if args else kwargs["hidden_states"], output[0]

    for index, block in enumerate(model.encoder.layer):
        block.attention.self.register_forward_hook(partial(note, index=index), with_kwargs=True)
    with torch.no_grad():
        model(**given)
        for index, (block, (key, value)) in enumerate(zip(model.encoder.layer, prefixes(model))):
            attention, x = block.attention.self, inputs[index]
            split = (*x.shape[:2], tiny.HEADS, W // tiny.HEADS)
            q, k, v = (
                m(x).view(split).transpose(1, 2) for m in (attention.query, attention.key, attention.value)
            )
            rows = len(x)
            k = torch.cat([key.expand(rows, -1, -1, -1), k], 2)
            v = torch.cat([value.expand(rows, -1, -1, -1), v], 2)
            allowed = torch.cat([torch.ones(rows, 3), given["attention_mask"]], 1).bool()[:, None, None, :]
            scores = (q @ k.transpose(2, 3) / math.sqrt(split[3])).masked_fill(~allowed, -torch.inf)
            wanted = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
            torch.testing.assert_close(seen[index], wanted)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("text", ["prefix(tokens=3)", "prefix(tokens=3, hidden=5)"])
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_prefix_in_a_decoder_is_a_cache_in_front(kind, text, side):
    """transformers' own cache with the same keys and values, the tokens' positions left as they are."""
    graft = shaken(tiny.bare(kind), text)
    given = tiny.batch(side="left" if side == "left" else "right")
    if side == "none":
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    rows, length = given["input_ids"].shape
    positions = torch.arange(length).expand(rows, -1)
    real = given["attention_mask"].bool()
    with torch.no_grad():
        got = graft.model(**given, position_ids=positions).last_hidden_state
        cache = DynamicCache(config=graft.model.config)
        for layer, (key, value) in enumerate(prefixes(graft.model)):
            cache.update(key.repeat(rows, 1, 1, 1), value.repeat(rows, 1, 1, 1), layer)
        plain = tiny.bare(kind)
        mask = torch.cat([torch.ones(rows, 3, dtype=torch.long), given["attention_mask"]], 1)
        wanted = plain(
            input_ids=given["input_ids"], attention_mask=mask, past_key_values=cache, position_ids=positions
        ).last_hidden_state
    torch.testing.assert_close(got[real], wanted[real])
    with torch.no_grad():
        assert (
            tiny.relative(plain(**given, position_ids=positions).last_hidden_state[real], wanted[real]) > 0.01
        )


@ALL_KINDS
def test_prefix_without_a_mask_equals_a_mask_of_ones(kind):
    model = shaken(tiny.bare(kind), "prefix(tokens=3)").model
    ids = tiny.batch()["input_ids"]
    with torch.no_grad():
        bare = model(input_ids=ids).last_hidden_state
        masked = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(bare, masked)


def test_prefix_reparameterisation_is_the_formula():
    graft = shaken(tiny.bare("llama"), "prefix(tokens=3, hidden=5)")
    E, W1, b1, W2, b2 = (
        graft.parameters[f"prefix_default.{name}"]
        for name in ("embedding", "trunk.weight", "trunk.bias", "out.weight", "out.bias")
    )
    table = torch.tanh(E @ W1.T + b1) @ W2.T + b2
    size = W // tiny.HEADS
    parts = table.view(3, L, 2, tiny.KV_HEADS, size)
    for layer, (key, value) in enumerate(prefixes(graft.model)):
        torch.testing.assert_close(key, parts[:, layer, 0].transpose(0, 1))
        torch.testing.assert_close(value, parts[:, layer, 1].transpose(0, 1))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "text", ["prefix(tokens=3)", "prefix(tokens=3, hidden=5)", "prefix(tokens=3, shift=True)", "lora(rank=2)"]
)
@pytest.mark.parametrize("side", ["none", "left"])
def test_generation_with_and_without_cache(kind, text, side):
    model = shaken(tiny.causal(kind), text).model
    given = tiny.batch(rows=3, length=5, side=side)
    if side == "none":
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**given, use_cache=True, **settings)
    plain = model.generate(**given, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)
    base = tiny.causal(kind).generate(**given, **settings)
    assert not torch.allclose(torch.stack(base.logits), torch.stack(plain.logits), atol=1e-2)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "qwen3", "glm", "modernbert"])
def test_shifted_text_is_a_text_at_later_positions(name):
    model = zoo.BY_NAME[name].fresh()
    given = zoo.BY_NAME[name].batch()
    positions = torch.arange(given["input_ids"].shape[1]).expand(len(given["input_ids"]), -1)

    def outputs(text: str, **more: Tensor) -> Tensor:
        graft = shaken(model, text)
        with torch.no_grad():
            for i, parameter in enumerate(graft.parameters.values()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
            found = zoo.flat(model(**given, **more), given)
        detach(graft)
        return found

    wanted = outputs("prefix(tokens=3)", position_ids=positions + 3)
    torch.testing.assert_close(outputs("prefix(tokens=3, shift=True)"), wanted)
    torch.testing.assert_close(outputs("prefix(tokens=3, shift=True)", position_ids=positions), wanted)
    assert tiny.relative(outputs("prefix(tokens=3)"), wanted) > 1e-3 or name != "gpt2"


def test_robertas_padding_keeps_its_position():
    kind = zoo.BY_NAME["roberta"]
    plain, graft = kind.fresh(), shaken(kind.fresh(), "prefix(tokens=3, shift=True)")
    given, seen = kind.batch(), []
    for model in (plain, graft.model):
        table = model.roberta.embeddings.position_embeddings
        table.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(output), with_kwargs=True
        )
        model(**given)
    table = plain.roberta.embeddings.position_embeddings.weight
    assert torch.equal(seen[1][0], table[4:11]) and torch.equal(seen[0][0], table[1:8])
    assert torch.equal(seen[1][2, -2:], table[[0, 0]])


def test_what_cannot_be_shifted():
    for name in ("vit", "t5"):
        told = message(zoo.BY_NAME[name].fresh(), "prefix(shift=True)")
        assert "shift=False" in told and "prefix(" in told
    assert "48 positions" in message(tiny.bare("gpt2"), "prefix(tokens=48, shift=True)")
    model = attach(tiny.bare("gpt2"), "prefix(tokens=8, shift=True)").model
    model(input_ids=torch.ones(1, 40, dtype=torch.long))
    with pytest.raises(UserError, match=r"41 tokens does not fit after the 8 of the prefix: .* 40 tokens"):
        model(input_ids=torch.ones(1, 41, dtype=torch.long))


def test_t5_has_no_position_for_a_prefix():
    """Its relative bias towards added keys is nothing, in the encoder, the decoder and between them."""
    kind = zoo.BY_NAME["t5"]
    graft, given = shaken(kind.fresh(), "prefix(tokens=3)"), kind.batch()
    attention = graft.model.encoder.block[0].layer[0].SelfAttention
    seen = {}

    def note(module, args, kwargs, output):
        seen["x"], seen["bias"], seen["out"] = (
            (args[0] if args else kwargs["hidden_states"]),
            output[1],
            output[0],
        )

    attention.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        graft.model(**given)
        x, (key, value) = seen["x"], attention.prefix_default.keys_values()
        split = (*x.shape[:2], 4, 4)
        q, k, v = (m(x).view(split).transpose(1, 2) for m in (attention.q, attention.k, attention.v))
        k = torch.cat([key.expand(len(x), -1, -1, -1), k], 2)
        v = torch.cat([value.expand(len(x), -1, -1, -1), v], 2)
        bias = nn.functional.pad(attention.compute_bias(x.shape[1], x.shape[1]), (3, 0))
        allowed = nn.functional.pad(given["attention_mask"].bool(), (3, 0), value=True)[:, None, None, :]
        scores = (q @ k.transpose(2, 3) + bias).masked_fill(~allowed, -torch.inf)
        wanted = attention.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], -1))
    torch.testing.assert_close(seen["out"], wanted)


def test_prefix_is_refused_where_attention_is_not_transformers():
    layer = nn.TransformerEncoderLayer(W, 4, batch_first=True)
    text = message(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "prefix()")
    assert "prefix" in text or "attention" in text
    assert "lora" in text
