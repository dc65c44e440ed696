"""Heads against plain formulas."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from shaken import ALL_KINDS, message, shaken
from torch.nn import functional as F

import graftkit
from graftkit import Backbone, attach, load
from graftkit.backbone.load import load_backbone
from graftkit.backbone.source import find_source

pytestmark = pytest.mark.sampled

W, L, INNER, V = tiny.WIDTH, tiny.BLOCKS, tiny.INNER, tiny.VOCABULARY


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


@pytest.mark.parametrize("hidden", [0, 6])
def test_a_head_for_each_token(hidden):
    """Logits (batch, length, classes) of the last states, and the mean loss over what is labelled."""
    model = tiny.bare("bert")
    graft = shaken(model, f"head(classes=4, pooling='tokens', hidden={hidden})")
    given = tiny.batch()
    labels = torch.full_like(given["input_ids"], -100)
    labels[:, 1:3] = torch.tensor([[0, 3], [1, 2], [2, 2], [3, 0]])[: len(labels)]
    with torch.no_grad():
        output = model(**given, labels=labels)
        states = tiny.bare("bert")(**given).last_hidden_state
        values = {name.removeprefix("head_default."): p for name, p in graft.parameters.items()}
        if hidden:
            states = F.gelu(F.linear(states, values["hidden.weight"], values["hidden.bias"]))
        wanted = F.linear(states, values["output.weight"], values["output.bias"])
        loss = F.cross_entropy(wanted.transpose(1, 2), labels)
        torch.testing.assert_close(output.logits, wanted)
        torch.testing.assert_close(output.loss, loss)
        again = model(**given, labels=labels, num_items_in_batch=16)
        torch.testing.assert_close(again.loss, loss * (labels != -100).sum() / 16)


def test_heads_for_each_token_mixed_by_row():
    model = tiny.bare("bert")
    given = tiny.batch()
    wanted = {}
    for seed, name in enumerate(("a", "b")):
        graft = shaken(model, "head(classes=4, pooling='tokens', hidden=3)", name, seed)
        with torch.no_grad():
            wanted[name] = model(**given).logits
        graft.disable()
    rows = ["a", "b"] * (len(given["input_ids"]) // 2)
    with torch.no_grad(), graftkit.using(model, rows=rows):
        got = model(**given).logits
    for i, name in enumerate(rows):
        torch.testing.assert_close(got[i], wanted[name][i])


@pytest.mark.parametrize("has_head", [False, True])
def test_a_head_for_each_token_of_a_module_of_ones_own(has_head):
    """On the states it gives, or on those that come into its own head."""

    class Own(torch.nn.Module):
        hidden_size = W

        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(V, W)
            self.layers = torch.nn.ModuleList(
                [torch.nn.TransformerEncoderLayer(W, 2, 8, batch_first=True) for _ in range(2)]
            )
            if has_head:
                self.classifier = torch.nn.Linear(W, 7)

        def states(self, input_ids):
            states = self.embedding(input_ids)
            for layer in self.layers:
                states = layer(states)
            return states

        def forward(self, input_ids):
            states = self.states(input_ids)
            return self.classifier(states) if has_head else states

    model = Own().eval()
    given = tiny.batch()["input_ids"]
    graft = shaken(model, "head(classes=5, pooling='tokens')")
    with torch.no_grad():
        wanted = F.linear(model.states(given), *graft.parameters.values())
        torch.testing.assert_close(model(given).logits, wanted)


def test_no_head_for_each_token_of_maps():
    import zoo

    told = message(zoo.BY_NAME["resnet"].fresh(), "head(classes=2, pooling='tokens')")
    assert "takes tokens, but" in told and "feature maps" in told


def test_a_trained_head_that_knows_the_labels_in_another_order_answers_in_the_order_of_the_task(
    tiny_bert, tmp_path
):
    """Heads for inference, say, are trained as entailment, neutral, contradiction; labels of a run are sorted."""
    known = ["entailment", "neutral", "contradiction"]
    model = tiny.with_head("bert", id2label=dict(enumerate(known)), vocab_size=200)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    for folder in (tmp_path / "model", tmp_path / "other"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    wanted = sorted(known)
    for labels in (wanted, ["a", "b", "c"]):  # names it does not know: nothing is moved
        source = find_source(str(tmp_path / "model"))
        backbone = load_backbone(source, "AutoModelForSequenceClassification", labels=labels)
        given = backbone.model(torch.tensor([[2, 7, 9]])).logits
        places = [known.index(label) for label in labels] if labels == wanted else [0, 1, 2]
        torch.testing.assert_close(given, model(torch.tensor([[2, 7, 9]])).logits[:, places])
