"""Each method against a plain reference: a formula, a plain implementation, or transformers' own cache."""

from __future__ import annotations

import math
from functools import partial

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel, DynamicCache

from graftkit import Backbone, UserError, attach, detach, load
from graftkit.methods.base import read

W, L, INNER, V = tiny.WIDTH, tiny.BLOCKS, tiny.INNER, tiny.VOCABULARY
KV = {"bert": W, "gpt2": W, "llama": tiny.KV_HEADS * W // tiny.HEADS}
MAPS = {  # (in, out) of each linear map of a block
    "bert": [(W, W)] * 4 + [(W, INNER), (INNER, W)],
    "gpt2": [(W, 3 * W), (W, W), (W, INNER), (INNER, W)],
    "llama": [(W, W), (W, KV["llama"]), (W, KV["llama"]), (W, W), (W, INNER), (W, INNER), (INNER, W)],
}
NORMS = {"bert": 2 * 2 * W, "gpt2": 2 * 2 * W, "llama": 2 * W}  # parameters of the norms of a block
EMBEDDINGS = {"bert": (V + 48 + 2) * W + 2 * W, "gpt2": (V + 48) * W, "llama": V * W}
ALL_KINDS = pytest.mark.parametrize("kind", tiny.KINDS)


def shaken(model: nn.Module, text: str, name: str = "default", seed: int = 5):
    """A graft with random values in all that it trains."""
    graft = attach(model, text, name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return graft


def count(graft) -> int:
    return sum(p.numel() for p in graft.parameters.values())


def message(model: nn.Module, text: str, **more) -> str:
    with pytest.raises(UserError) as caught:
        attach(model, text, **more)
    return str(caught.value)


# ---- parameter counts, as the docstrings give them


@ALL_KINDS
def test_parameter_counts(kind):
    def trained(text: str) -> int:
        return count(attach(tiny.bare(kind), text))

    rank, bottleneck, tokens, hidden = 5, 7, 3, 11
    assert trained(f"lora(rank={rank})") == L * sum(rank * (i + o) for i, o in MAPS[kind])
    assert (
        trained(f"adapter(bottleneck={bottleneck})")
        == 2 * L * (2 * W * bottleneck + bottleneck + W) + L * NORMS[kind]
    )
    assert trained(f"prefix(tokens={tokens})") == 2 * L * tokens * KV[kind]
    assert (
        trained(f"prefix(tokens={tokens}, hidden={hidden})")
        == tokens * W + hidden * (W + 1) + (hidden + 1) * 2 * L * KV[kind]
    )
    assert trained("head(classes=4, pooling='mean')") == 4 * (W + 1)
    assert trained(f"head(classes=4, pooling='mean', hidden={hidden})") == 4 * (hidden + 1) + hidden * (W + 1)
    biases = 0 if kind == "llama" else sum(o for _, o in MAPS[kind]) + NORMS[kind] // 2
    block = sum(i * o for i, o in MAPS[kind]) + biases + (NORMS[kind] // 2 if biases else NORMS[kind])
    assert trained("unfreeze('blocks[-2:]')") == 2 * block
    outside = {"bert": W * W + W, "gpt2": 2 * W, "llama": W}[kind]
    assert trained("full()") == L * block + EMBEDDINGS[kind] + outside
    assert trained("full() + freeze('embeddings, norms')") == trained("full()") - trained(
        "unfreeze('embeddings, norms')"
    )
    if biases:
        assert trained("bitfit()") == L * biases


# ---- LoRA


def test_lora_is_the_formula():
    model = tiny.bare("bert")
    graft = shaken(model, "lora(rank=3, alpha=5, sites='re:encoder.layer.1.intermediate.dense')")
    site = model.encoder.layer[1].intermediate.dense
    x = torch.randn(2, 4, W)
    A, B = graft.parameters.values()
    torch.testing.assert_close(site(x), x @ site.weight.T + site.bias + 5 / 3 * (x @ A.T @ B.T))


def test_lora_on_a_transposed_map():
    model = tiny.bare("gpt2")
    graft = shaken(model, "lora(rank=3, sites='blocks[0].up')")
    site = model.h[0].mlp.c_fc
    x = torch.randn(2, 4, W)
    A, B = graft.parameters.values()
    assert A.shape == (3, W) and B.shape == (INNER, 3)
    torch.testing.assert_close(site(x), x @ site.weight + site.bias + 2 * (x @ A.T @ B.T))


def test_lora_dropout_acts_on_the_input_of_a_in_training_only():
    model = tiny.bare("bert")
    graft = shaken(model, "lora(rank=3, dropout=0.5, sites='blocks[0].up')")
    site = model.encoder.layer[0].intermediate.dense
    A, B = graft.parameters.values()
    x = torch.randn(4, W)
    site.train()
    torch.manual_seed(3)
    got = site(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(got, F.linear(x, site.weight, site.bias) + 2 * (dropped @ A.T @ B.T))
    site.eval()
    torch.testing.assert_close(site(x), F.linear(x, site.weight, site.bias) + 2 * (x @ A.T @ B.T))


def test_rank_may_exceed_the_width():
    graft = shaken(tiny.bare("llama"), f"lora(rank={3 * W})")
    wanted = tiny.outputs(graft.model)
    graft.fold()
    assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5


def test_a_tied_weight_is_not_folded():
    graft = shaken(tiny.causal("llama", tie_word_embeddings=True), "lora(sites='lm_head')")
    before = tiny.snapshot(graft.model)
    with pytest.raises(UserError, match=r"tied.*leave them out") as caught:
        graft.fold()
    assert "lm_head.weight" in str(caught.value) and "embed_tokens.weight" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in tiny.snapshot(graft.model).items())


class Convolutions(nn.Module):
    """A user's own module: an embedding, a dilated and a grouped convolution, attention, a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, W)
        self.dilated = nn.Conv1d(W, W, 3, padding=2, dilation=2)
        self.grouped = nn.Conv1d(W, W, 3, padding=1, groups=4)
        self.mix = nn.MultiheadAttention(W, 4, batch_first=True)
        self.inner = nn.Linear(W, W)
        self.classifier = nn.Linear(W, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.grouped(self.dilated(self.embed(ids).transpose(1, 2))).transpose(1, 2)
        x, _ = self.mix(x, x, x)
        return self.classifier(self.inner(x).mean(1))


@pytest.mark.parametrize(
    "name,kind",
    [("dilated", "Conv1d"), ("grouped", "Conv1d"), ("embed", "Embedding"),
     ("mix.out_proj", "NonDynamicallyQuantizableLinear"), ("mix", "MultiheadAttention")],
)  # fmt: skip
def test_lora_refuses_what_is_no_linear_map_by_name(name, kind):
    said = message(Convolutions(), f"lora(sites='re:{name}')")
    assert kind in said and "none of them are linear maps" in said


def test_lora_on_a_module_of_the_users_own():
    model = Convolutions()
    graft = attach(model, "lora(rank=2) + unfreeze('dilated, grouped') + head(classes=2)")
    assert "inner.lora_default.A" in graft.labels and not any(n.startswith("mix") for n in graft.labels)
    optimizer = torch.optim.SGD(graft.param_groups(lr=0.1))
    before = tiny.snapshot(model)
    for _ in range(2):
        model(tiny.batch()["input_ids"]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tiny.snapshot(model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(graft.labels)


def test_a_quantized_map_is_not_folded():
    graft = attach(tiny.bare("bert"), "lora(rank=2, sites='blocks[0].q')")
    site = graft.model.encoder.layer[0].attention.self.query
    site.weight = nn.Parameter(site.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"lora\(\) cannot be folded.*int8"):
        graft.fold()


# ---- adapters


def bert_with_adapters(model: BertModel, added: list[tuple[Tensor, ...]], given: dict[str, Tensor]) -> Tensor:
    """Last hidden states of BERT with Houlsby adapters, written out; `added` holds two bottlenecks a block."""
    mask = torch.where(given["attention_mask"].bool(), 0.0, -1e30)[:, None, None, :]
    x = model.embeddings(given["input_ids"])
    rows, length, width = x.shape
    split = (rows, length, tiny.HEADS, width // tiny.HEADS)

    def bottleneck(y: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        down, down_bias, up, up_bias = parts
        return y + F.gelu(y @ down.T + down_bias) @ up.T + up_bias

    for index, block in enumerate(model.encoder.layer):
        attention, output = block.attention.self, block.attention.output
        q, k, v = (
            m(x).view(split).transpose(1, 2) for m in (attention.query, attention.key, attention.value)
        )
        weights = (q @ k.transpose(2, 3) / math.sqrt(split[3]) + mask).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(x.shape)
        y = F.linear(mixed, output.dense.weight, output.dense.bias)
        x = output.LayerNorm(x + bottleneck(y, added[2 * index]))
        inner = F.gelu(block.intermediate.dense(x))
        y = F.linear(inner, block.output.dense.weight, block.output.dense.bias)
        x = block.output.LayerNorm(x + bottleneck(y, added[2 * index + 1]))
    return x


def test_adapter_is_houlsby_on_bert():
    graft = shaken(tiny.bare("bert"), "adapter(bottleneck=5)")
    parameters = graft.parameters
    parts = {}
    for name in parameters:
        site, _, leaf = name.rpartition(".")
        if site.endswith("adapter_default"):
            parts.setdefault(site, {})[leaf] = parameters[name]
    names = ("down", "down_bias", "up", "up_bias")
    added = [tuple(part[name] for name in names) for part in parts.values()]
    assert len(added) == 2 * L
    given = tiny.batch()
    with torch.no_grad():
        got = graft.model(**given).last_hidden_state
        wanted = bert_with_adapters(graft.model, added, given)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(got[real], wanted[real])


def test_adapter_stands_behind_the_dropout():
    model = tiny.bare("bert")
    attach(model, "adapter()")
    block = model.encoder.layer[0]
    assert hasattr(block.attention.output.dropout, "adapter_default")
    assert hasattr(block.output.dropout, "adapter_default")
    assert not hasattr(block.attention.self.dropout, "adapter_default")
    model = tiny.bare("gpt2")
    attach(model, "adapter()")
    assert hasattr(model.h[0].attn.resid_dropout, "adapter_default")
    assert not hasattr(model.h[0].attn.attn_dropout, "adapter_default")
    model = tiny.bare("llama")
    attach(model, "adapter()")
    assert hasattr(model.layers[0].self_attn.o_proj, "adapter_default")
    assert hasattr(model.layers[0].mlp.down_proj, "adapter_default")


# ---- prefixes


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
@pytest.mark.parametrize("text", ["prefix(tokens=3)", "prefix(tokens=3, hidden=5)", "lora(rank=2)"])
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


def test_prefix_is_refused_where_attention_is_not_transformers():
    layer = nn.TransformerEncoderLayer(W, 4, batch_first=True)
    text = message(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "prefix()")
    assert "prefix" in text or "attention" in text
    assert "lora" in text


# ---- heads


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "attention"])
@pytest.mark.parametrize("hidden", [0, 6])
def test_head_pooling(side, pooling, hidden):
    model = tiny.bare("bert")
    graft = shaken(model, f"head(classes=4, pooling={pooling!r}, hidden={hidden})")
    given = tiny.batch(side=side)
    with torch.no_grad():
        got = model(**given).logits
        last = tiny.bare("bert")(**given).last_hidden_state
        values = {name.removeprefix("head_default."): p for name, p in graft.parameters.items()}
        pooled = []
        for row, mask in zip(last, given["attention_mask"]):
            real = row[mask.bool()]
            if pooling == "attention":
                weights = (real @ values["query.weight"][0]).softmax(0)
                pooled.append(weights @ real)
            else:
                pooled.append({"cls": real[0], "last": real[-1], "mean": real.mean(0)}[pooling])
        features = torch.stack(pooled)
        if hidden:
            features = F.gelu(F.linear(features, values["hidden.weight"], values["hidden.bias"]))
        wanted = F.linear(features, values["output.weight"], values["output.bias"])
    torch.testing.assert_close(got, wanted)


def test_head_takes_a_positional_mask_and_none():
    model = tiny.bare("bert")
    attach(model, "head(classes=2, pooling='mean')")
    given = tiny.batch()
    with torch.no_grad():
        named = model(**given).logits
        torch.testing.assert_close(model(given["input_ids"], given["attention_mask"]).logits, named)
        ones = model(given["input_ids"], torch.ones_like(given["input_ids"])).logits
        torch.testing.assert_close(model(given["input_ids"]).logits, ones)


def test_head_loss_is_cross_entropy():
    model = tiny.bare("bert")
    attach(model, "head(classes=4, pooling='mean')")
    labels = torch.tensor([0, 3, 1, 2])
    with torch.no_grad():
        output = model(**tiny.batch(), labels=labels)
        torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
        again = model(**tiny.batch(), labels=labels, num_items_in_batch=8)
        torch.testing.assert_close(again.loss, output.loss / 2)
        assert model(**tiny.batch()).loss is None


def test_head_chooses_its_pooling():
    def pooling(model) -> str:
        return attach(model, "head(classes=3)").method.methods[0].pooling

    assert pooling(tiny.with_head("bert")) == "own"
    assert pooling(tiny.bare("bert")) == "cls"
    assert pooling(tiny.bare("gpt2")) == pooling(tiny.bare("llama")) == "last"
    assert pooling(Backbone(tiny.bare("bert"), pooling="mean")) == "mean"


@ALL_KINDS
@pytest.mark.parametrize("classes", [3, 5])
def test_own_head(kind, classes):
    model = tiny.with_head(kind)
    leaf = "classifier" if kind == "bert" else "score"
    old = getattr(model, leaf)
    graft = attach(model, f"head(classes={classes})")
    new = getattr(model, leaf)
    assert set(graft.labels) == {f"{leaf}.{name}" for name, _ in new.named_parameters()}
    assert (new is old) == (classes == 3)
    assert new.weight.shape == (classes, W) and (new.bias is None) == (old.bias is None)
    assert model.config.num_labels == model.num_labels == classes
    given = tiny.batch()
    output = model(**given, labels=torch.tensor([0, 1, 2, 1]))
    assert output.logits.shape == (4, classes)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([0, 1, 2, 1])))


def test_own_head_where_there_is_none():
    assert "no head of its own" in message(tiny.bare("bert"), "head(classes=2, pooling='own')")


def test_a_pooler_that_the_weights_lack_is_trained_with_its_head():
    missing = ("bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight")
    graft = attach(Backbone(tiny.with_head("bert"), missing=missing), "lora(rank=2) + head(classes=3)")
    assert set(missing) <= set(graft.labels)


def test_head_needs_classes():
    assert "head(classes=3)" in message(tiny.bare("bert"), "head()")


def test_a_pooler_that_the_head_passes_by_is_not_trained():
    graft = attach(tiny.bare("bert"), "full() + head(classes=2, pooling='mean')")
    assert not any("pooler" in name for name in graft.labels)


def test_a_trained_pooler_is_loaded_on_a_plain_model(tmp_path):
    missing = ("bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight")
    graft = shaken(Backbone(tiny.with_head("bert"), missing=missing), "lora(rank=2) + head(classes=3)")
    graft.save(tmp_path)
    again = load(tiny.with_head("bert"), tmp_path)
    assert torch.equal(tiny.outputs(again.model), tiny.outputs(graft.model))


# ---- rates, freezing, claims


def test_layerwise_rates():
    graft = attach(tiny.with_head("bert"), "full(lr=1.0) + layerwise_lr(decay=0.5) + head(classes=3, lr=7.0)")
    by_parameter = {
        id(p): group["lr"] for group in graft.param_groups(lr=3.0) for p in group["params"]
    }  # rates in the method win over lr=
    rates = {name: by_parameter[id(p)] for name, p in graft.parameters.items()}
    for name, rate in rates.items():
        if ".embeddings." in name:
            assert rate == 0.5**L, name
        elif ".layer." in name:
            assert rate == 0.5 ** (L - 1 - int(name.split(".layer.")[1].split(".")[0])), name
        else:
            assert rate == (7.0 if name.startswith("classifier") else 1.0), name
    assert rates["bert.encoder.layer.2.output.dense.weight"] == 1.0
    assert rates["bert.pooler.dense.weight"] == 1.0


@pytest.mark.parametrize("kind,above", [("gpt2", "ln_f.weight"), ("llama", "norm.weight")])
def test_layerwise_rates_of_the_last_norm(kind, above):
    graft = attach(tiny.bare(kind), "full() + layerwise_lr(decay=0.5)")
    assert graft.labels[above].lr_scale == 1.0
    assert min(group.lr_scale for group in graft.labels.values()) == 0.5**L


def test_rates_and_decay_of_groups():
    graft = attach(tiny.bare("bert"), "lora(rank=2) + unfreeze('norms', lr=0.5) + head(classes=2)")
    groups = {(g["lr"], g["weight_decay"]) for g in graft.param_groups(lr=0.1, weight_decay=0.2)}
    assert groups == {(0.1, 0.2), (0.5, 0.0), (0.1, 0.0)}
    assert {g["lr"] for g in graft.param_groups()} == {1e-3, 0.5, 5e-3}
    decays = {g["weight_decay"] for g in attach(tiny.bare("bert"), "bitfit()").param_groups(weight_decay=0.2)}
    assert decays == {0.0}


def test_layerwise_lr_needs_base_parameters():
    assert "changes nothing" in message(tiny.bare("bert"), "lora() + layerwise_lr()")


def test_freeze_takes_parts_out():
    graft = attach(tiny.bare("bert"), "full() + freeze('blocks[:2], embeddings')")
    assert not any("embeddings.word" in name or ".layer.0." in name for name in graft.labels)
    assert any(".layer.2." in name for name in graft.labels)
    assert "changes nothing" in message(tiny.bare("bert"), "lora() + freeze('embeddings')")


def test_a_new_head_cannot_stay_random():
    assert "would stay random" in message(tiny.with_head("bert"), "lora() + head(classes=5) + freeze('head')")
    graft = attach(tiny.with_head("bert"), "lora() + head(classes=3) + freeze('head')")
    assert not any("classifier" in name for name in graft.labels)


@pytest.mark.parametrize(
    "text",
    [
        "bitfit() + unfreeze('blocks')",
        "adapter() + unfreeze('norms')",
        "unfreeze('blocks') + unfreeze('ffn')",
    ],
)
def test_overlapping_claims_are_errors(text):
    assert "both claim" in message(tiny.bare("bert"), text)


def test_full_leaves_a_claimed_parameter_to_the_other():
    graft = attach(
        tiny.with_head("bert"), "full(lr=1.0) + head(classes=3, lr=2.0) + unfreeze('norms', lr=3.0)"
    )
    rates = {name: group.lr for name, group in graft.labels.items()}
    assert rates["classifier.weight"] == 2.0
    assert rates["bert.encoder.layer.0.output.LayerNorm.weight"] == 3.0
    assert rates["bert.encoder.layer.0.output.dense.weight"] == 1.0


def test_a_method_twice():
    with pytest.raises(UserError, match="stands twice"):
        read("lora() + lora()")


def test_bitfit_is_refused_without_biases():
    text = message(tiny.bare("llama"), "bitfit()")
    assert "have none" in text and "lora()" in text


@pytest.mark.parametrize("kind,text", [("bert", "lora(sites='qkv')"), ("llama", "unfreeze('pooler')"),
                                       ("gpt2", "freeze('blocks[7]') + full()")])  # fmt: skip
def test_a_selection_of_nothing_lists_what_there_is(kind, text):
    said = message(tiny.bare(kind), text)
    assert "matches nothing" in said and "attention, " in said and "blocks[0] to blocks[2]" in said


def test_lora_on_norms_says_what_they_are():
    assert "LayerNorm" in message(tiny.bare("bert"), "lora(sites='norms')")


# ---- several grafts on one model


def test_the_same_name_twice_leaves_the_first_graft_intact():
    graft = shaken(tiny.bare("bert"), "lora(rank=2)")
    wanted = tiny.outputs(graft.model)
    for text in ("lora(rank=3)", "adapter()", "bitfit()", "head(classes=2)"):
        assert "'default' is attached" in message(graft.model, text)
        assert torch.equal(tiny.outputs(graft.model), wanted)
    assert {n for n, p in graft.model.named_parameters() if p.requires_grad} == set(graft.labels)


def test_names_that_end_alike_are_kept_apart():
    model = tiny.bare("bert")
    first = shaken(model, "lora(rank=2)", name="b")
    second = shaken(model, "lora(rank=3)", name="a_b", seed=6)
    assert {n for n, _ in first.additions()}.isdisjoint(n for n, _ in second.additions())
    detach(first)
    assert len(second.parameters) == len(second.labels)


@pytest.mark.parametrize("text", ["lora(rank=2)", "adapter(norms=False)", "prefix(tokens=3, hidden=4)"])
@ALL_KINDS
def test_two_grafts_side_by_side(kind, text, tmp_path):
    alone = {}
    for name, seed in (("one", 5), ("two", 6)):
        graft = shaken(tiny.bare(kind), text, seed=seed)
        alone[name] = tiny.outputs(graft.model)
        graft.save(tmp_path / name)
    model = tiny.bare(kind)
    first = load(model, tmp_path / "one", name="one")
    second = load(model, tmp_path / "two", name="two")
    with second.disabled():
        assert torch.equal(tiny.outputs(model), alone["one"])
    with first.disabled():
        assert torch.equal(tiny.outputs(model), alone["two"])
    with first.disabled(), second.disabled():
        assert torch.equal(tiny.outputs(model), tiny.outputs(tiny.bare(kind)))
    second.save(tmp_path / "again")
    assert torch.equal(tiny.outputs(load(tiny.bare(kind), tmp_path / "again").model), alone["two"])
    detach(first)
    assert torch.equal(tiny.outputs(model), alone["two"])
    detach(second)
    assert torch.equal(tiny.outputs(model), tiny.outputs(tiny.bare(kind)))


def test_a_backbone_is_used_again_after_its_head_was_replaced():
    backbone = Backbone(tiny.with_head("bert"))
    wanted = tiny.outputs(backbone.model)
    for classes in (5, 3, 2):
        graft = attach(backbone, f"lora(rank=2) + head(classes={classes})")
        assert graft.model.classifier.out_features == classes
        detach(graft)
        assert torch.equal(tiny.outputs(backbone.model), wanted)
    assert attach(backbone, "unfreeze('head')").parameters


@pytest.mark.parametrize("name", ["", "a b", "x.y", "1st"])
def test_graft_names(name):
    assert "plain word" in message(tiny.bare("bert"), "lora()", name=name)
