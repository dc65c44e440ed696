"""Sums of methods: every pair has one meaning, in whichever order it is written, or one refusal that names both."""

from __future__ import annotations

import functools
import itertools

import pytest
import tiny
import torch
import zoo
from expressions import EXPRESSIONS
from peft_versions import has_tuner

from graftkit import UserError, attach, load
from graftkit.grafts.attach import attach_chain
from graftkit.methods.base import read
from graftkit.recipe import schema as recipes
from graftkit.recipe.catalogue import entries

pytestmark = pytest.mark.sampled

BERT = zoo.BY_NAME["bert"]  # of two blocks
# the others are what their names alone mean
EXAMPLES = {
    "adapter_fusion": "adapter_fusion(adapters=['adapter(2)', 'adapter(3)'])",
    "freeze": "freeze('norms')",
    "gradual_unfreeze": "gradual_unfreeze(decay=0.5)",
    "head": "head(classes=2, pooling='mean')",
    "new_tokens": EXPRESSIONS["new_tokens"][0],
    "unfreeze": "unfreeze('blocks[0]')",
}
METHODS = {name: EXAMPLES.get(name, f"{name}()") for name in entries("method")}
METHODS = {name: text for name, text in METHODS.items() if has_tuner(text)}
PAIRS = list(itertools.combinations(METHODS, 2))


@functools.cache
def labels_of(text):
    """Labels of a method on a model of shapes, or the message with which it is refused."""
    try:
        return attach(BERT.shapes(), text, keep_base=False).labels
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.slow
def test_a_sum_means_the_same_in_either_order_or_is_refused(first):
    for second in METHODS:
        if (first, second) not in PAIRS:
            continue
        text, reversed_ = (f"{METHODS[a]} + {METHODS[b]}" for a, b in ((first, second), (second, first)))
        labels = labels_of(text)
        if read(text).arranged() != read(reversed_).arranged():  # `attach` sees nothing but that
            assert labels == labels_of(reversed_), (first, second)
        if isinstance(labels, str):
            assert f"{first}(" in labels and f"{second}(" in labels, labels
        else:
            nothing_is_lost(first, second, labels)


def nothing_is_lost(first, second, labels):
    """Each of the two owns parameters, or changes those of the other; what neither has any more was taken out."""
    classes = {name: entries("method")[name].load() for name in (first, second)}
    for name, other in ((first, second), (second, first)):
        own = {n: group for n, group in labels.items() if group.method == name}
        alone = labels_of(METHODS[other])
        assert own or classes[name].needs_base, f"{name}() has nothing in a sum with {other}()"
        if not own:
            assert labels != alone, f"{name}() changes nothing beside {other}()"
    both = [labels_of(METHODS[name]) for name in (first, second)]
    given = {n for alone in both if isinstance(alone, dict) for n in alone}
    lost = given - set(labels)
    if any(method.takes_out for method in classes.values()):
        assert lost and all("LayerNorm" in n for n in lost)
    elif "head" in (first, second):
        assert all(n.startswith("pooler.") for n in lost), lost  # which that head passes by
    else:
        assert not lost, (first, second, sorted(lost)[:3])
    assert set(labels) <= given or any(method.needs_base for method in classes.values())


@pytest.mark.slow
def test_most_pairs_have_a_meaning():
    """The contract above would also hold if everything were refused."""
    accepted = {
        pair for pair in PAIRS if isinstance(labels_of(" + ".join(METHODS[name] for name in pair)), dict)
    }
    for pair in [("full", "layerwise_lr"), ("freeze", "full"), ("gradual_unfreeze", "layerwise_lr"), ("lora", "unfreeze"),
                 ("gradual_unfreeze", "lora"), ("adapter", "full"), ("bitfit", "lora"), ("ia3", "lora"), ("dora", "lora"),
                 ("adapter", "freeze"), ("adapter", "layerwise_lr"), ("norms", "prompt")]:  # fmt: skip
        assert pair in accepted, pair
    assert all(
        pair in accepted for pair in PAIRS if "head" in pair and not {"freeze", "layerwise_lr"} & set(pair)
    )
    assert len(accepted) > 0.7 * len(PAIRS), len(accepted)


@pytest.mark.parametrize(
    ("text", "names", "said"),
    [
        ("full() + gradual_unfreeze()", ("full", "gradual_unfreeze"), "leave one of them out"),
        ("full() + bitfit()", ("full", "bitfit"), "already trains what bitfit() would"),
        ("full() + lora()", ("full", "lora"), "adds an update to weights that full() already trains"),
        ("full() + freeze('embeddings') + loha()", ("full", "loha"), "adds an update to weights"),
        ("unfreeze('re:.*') + gradual_unfreeze()", ("unfreeze", "gradual_unfreeze"), "would train nothing"),
        ("unfreeze('blocks[0]') + freeze('blocks')", ("unfreeze", "freeze"), "freeze() takes it out"),
        ("unfreeze('pooler') + head(classes=2, pooling='mean')", ("unfreeze", "head"), "head() takes it out"),
        ("dora(bias='all') + lora(bias='all')", ("dora", "lora"), "both claim the parameter"),
        ("freeze('blocks[0]') + layerwise_lr()", ("freeze", "layerwise_lr"), "changes nothing"),
    ],
)  # fmt: skip
def test_what_a_refusal_says(text, names, said):
    """In either order the same, and every method of the sum is named."""
    message = labels_of(text)
    assert isinstance(message, str) and said in message, message
    assert all(f"{name}(" in message for name in names), message
    for order in itertools.permutations(text.split(" + ")):
        assert labels_of(" + ".join(order)) == message


LOW, HIGH = "encoder.layer.0.output.dense", "encoder.layer.1.output.dense"


@pytest.mark.parametrize(
    ("text", "owners"),
    [
        # of a parameter that both could train, the one that names it has it, at its own rate
        ("full() + unfreeze('blocks[-1:]', lr=1.0)",
         {f"{HIGH}.weight": ("unfreeze", 1.0, 1.0), f"{LOW}.weight": ("full", 5e-5, 1.0)}),
        ("gradual_unfreeze() + unfreeze('embeddings')",
         {"embeddings.word_embeddings.weight": ("unfreeze", 1e-4, 1.0), f"{LOW}.bias": ("gradual_unfreeze", 1e-4, 1.0)}),
        # biases that come along with an update: less than those that are named, more than the whole backbone
        ("lora(bias='all') + gradual_unfreeze()",
         {f"{LOW}.bias": ("lora", 1e-3, 1.0), f"{LOW}.weight": ("gradual_unfreeze", 1e-4, 1.0)}),
        ("lora(bias='all') + bitfit()",
         {f"{LOW}.bias": ("bitfit", 2e-3, 1.0), "embeddings.LayerNorm.bias": ("lora", 1e-3, 1.0)}),
        # rates are multiplied
        ("lora(bias='all') + layerwise_lr(decay=0.5)",
         {f"{LOW}.bias": ("lora", 1e-3, 0.5), f"{LOW}.lora_default.A": ("lora", 1e-3, 1.0)}),
        ("gradual_unfreeze(decay=0.5) + layerwise_lr(decay=0.5)", {f"{LOW}.bias": ("gradual_unfreeze", 1e-4, 0.25)}),
        # a weight that is trained and has an update: both move
        ("lora() + unfreeze('blocks[-1:]')",
         {f"{HIGH}.weight": ("unfreeze", 1e-4, 1.0), f"{HIGH}.lora_default.A": ("lora", 1e-3, 1.0)}),
        ("full() + freeze('all-linear') + lora()",
         {"embeddings.word_embeddings.weight": ("full", 5e-5, 1.0), f"{HIGH}.lora_default.B": ("lora", 1e-3, 1.0)}),
        ("full() + lora(sites='down', lr=1.0) + freeze('down')", {f"{HIGH}.lora_default.B": ("lora", 1.0, 1.0)}),
    ],
)  # fmt: skip
def test_what_a_sum_means(text, owners):
    for order in itertools.permutations(text.split(" + ")):
        labels = labels_of(" + ".join(order))
        assert isinstance(labels, dict), labels
        assert {
            name: (labels[name].method, labels[name].lr, labels[name].lr_scale) for name in owners
        } == owners


@pytest.mark.parametrize(
    "text",
    [
        "lora(rank=2) + ia3()",
        "dora(rank=2) + lora(rank=2)",
        "prompt(tokens=2) + ptuning(tokens=3)",
        "adapter(3) + lora(rank=2)",
        "head(classes=3, pooling='mean') + lora(rank=2)",
    ],
)
def test_the_order_in_which_a_sum_is_written_has_no_part_in_what_it_computes(text):
    first, second = text.split(" + ")
    outputs = []
    for written in (text, f"{second} + {first}"):
        model = BERT.fresh()
        torch.manual_seed(0)
        graft = shaken(attach(model, written))
        outputs.append(zoo.outputs(graft.model, BERT.batch()))
    assert torch.equal(*outputs)


def shaken(graft):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return graft


def test_a_head_of_the_model_gets_its_outputs_before_anything_is_placed_on_it():
    parts = ("lora(sites='all-linear,head')", "head(classes=5, pooling='own')")
    for written in itertools.permutations(parts):
        graft = attach(tiny.with_head("bert"), " + ".join(written))
        assert graft.labels["classifier.weight"].method == "head"
        assert graft.labels["classifier.lora_default.B"].method == "lora"
        assert graft.parameters["classifier.lora_default.B"].shape[0] == 5


def test_a_graft_that_was_saved_in_another_order_computes_what_it_did(tmp_path):
    """Before sums had an order of their own, that in which they were written decided what scales what."""
    old = shaken(attach_chain(BERT.fresh(), read("ia3() + lora(rank=2)"), "default"))
    wanted = zoo.outputs(old.model, BERT.batch())
    old.save(tmp_path / "old")
    assert torch.equal(zoo.outputs(load(BERT.fresh(), tmp_path / "old").model, BERT.batch()), wanted)
    assert str(attach(BERT.fresh(), "ia3() + lora(rank=2)").method) == "lora(rank=2) + ia3()"


def test_a_graft_of_a_sum_that_is_refused_today_still_loads(tmp_path):
    old = attach_chain(BERT.fresh(), read("full() + lora(rank=2)"), "default", stored=True)
    old.save(tmp_path / "old")
    assert load(BERT.fresh(), tmp_path / "old").labels == old.labels
    with pytest.raises(UserError, match="adds an update"):
        attach(BERT.fresh(), "full() + lora(rank=2)")


MINIMAL = {"model": "m", "data": {"train": "t.csv"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("full() + bitfit()", "full() already trains what bitfit() would"),
        ("norms() + full()", "full() already trains what norms() would"),
        ("full(lr=1) + gradual_unfreeze(lr=1)", "full() already trains what gradual_unfreeze() would"),
        ("lora() + full()", "lora() adds an update to weights that full() already trains"),
        ("loha() + full()", "loha() adds an update to weights that full() already trains"),
        ("ia3() + layerwise_lr()", "must be combined with a method that trains the backbone itself (bitfit(), full(), "),
        ("adapter(placement='pfeiffer') + freeze()", "frozen anyway"),
        ("prefix() + freeze('blocks')", "frozen anyway"),
    ],
)  # fmt: skip
def test_a_recipe_refuses_such_sums_before_a_model_is_loaded(text, said):
    for written in (text, " + ".join(reversed(text.split(" + ")))):
        with pytest.raises(UserError) as caught:
            recipes.make({**MINIMAL, "method": written})
        assert said in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "lora(bias='all') + layerwise_lr()",
        "dora(bias='lora_only') + freeze('blocks[0]')",
        "adapter() + layerwise_lr()",
        "adapter(placement='pfeiffer', norms=True) + layerwise_lr()",
        "norms() + layerwise_lr()",
        "full() + unfreeze('norms', lr=0.1)",
        "full() + freeze('all-linear') + lora()",
        "adapter() + full()",
    ],
)
def test_a_recipe_takes_sums_that_mean_something(text):
    assert recipes.make({**MINIMAL, "method": text}).method == f"{text} + head()"
