"""What every method must hold, in each of its forms, on three kinds of model. tests/contract.py has the promises."""

from __future__ import annotations

from pathlib import Path

import contract
import pytest
import torch
import zoo
from peft_versions import skip_without_tuner
from torch import nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added
from graftkit.catalogue import entries
from graftkit.methods.base import Labels, read

# At least one example of each method; those that only change other methods stand beside one. The first is the one
# of the matrix in docs/methods.md, which runs it on every model of tests/zoo.py; the others run on three of them.
EXPRESSIONS = {
    "adalora": ["adalora(rank=4, target_rank=2)"],
    "adapter": [
        "adapter(bottleneck=5)",
        "adapter(bottleneck=3, norms=False, sites='blocks[-1:]', nonlinearity='tanh', dropout=0.5)",
        "adapter(bottleneck=3, placement='pfeiffer')",
        "adapter(bottleneck=3, placement='parallel', norms=True)",
    ],
    "adapter_fusion": [
        """adapter_fusion(adapters=["adapter(bottleneck=3, placement='pfeiffer')", "adapter(2, 'pfeiffer')"])""",
        """adapter_fusion(adapters=["adapter(3, 'houlsby')", "adapter(2, 'houlsby')"]) + head(classes=2)""",
        """adapter_fusion(adapters=["adapter(3, 'parallel')", "adapter(2, 'parallel')"], regularization=0)""",
    ],
    "bitfit": ["bitfit()", "bitfit(sites='q,up')"],
    "dora": [
        "dora(rank=3)",
        "dora(rank=2, sites='attention', dropout=0.5, stabilised=True) + head(classes=2)",
    ],
    "freeze": ["full() + freeze('blocks[0]')", "full() + freeze('embeddings')"],
    "full": ["full()"],
    "galore": ["galore(rank=3)", "galore(rank=2, sites='blocks[-1:].ffn', interval=1) + head(classes=2)"],
    "gradual_unfreeze": ["gradual_unfreeze()", "gradual_unfreeze(unit='steps', decay=0.5) + head(classes=3)"],
    "head": [
        "head(classes=5)",
        "head(classes=3, pooling='mean', hidden=6)",
        "head(classes=2, pooling='attention')",
        "head(classes=3, pooling='tokens', hidden=4)",
    ],
    "ia3": ["ia3()", "ia3(sites='all-linear') + head(classes=2)"],
    "layerwise_lr": ["unfreeze('blocks') + layerwise_lr(decay=0.5)"],
    "loha": ["loha(rank=3)", "loha(rank=2, effective_conv=True, alpha=3)"],
    "lokr": ["lokr(rank=2)", "lokr(rank=2, decompose_both=True, factor=4, effective_conv=True)"],
    "lora": [
        "lora(rank=3)",
        "lora(rank=2, sites='q,v', dropout=0.5, alpha=3) + head(classes=2)",
        "lora(rank=2, sites='embeddings, ffn', ranks={'blocks[-1:]': 4}, b_rate=4.0, stabilised=True)",
        "lora(rank=3, bias='all', start='gaussian') + head(classes=2)",
    ],
    "norms": ["norms()", "norms(sites='blocks[0].norms')"],
    "peft": [
        "peft(options={'r': 3})",
        "peft('hra', {'r': 4})",
        "peft('oft', {'oft_block_size': 4})",
        "peft('fourierft', {'n_frequency': 20, 'scaling': 3}, sites='attention')",
    ],
    "pissa": ["pissa(rank=3)", "pissa(rank=2, iterations=0, dropout=0.5) + head(classes=2)"],
    "prefix": ["prefix(tokens=3)", "prefix(tokens=2, hidden=5)", "prefix(tokens=2, shift=True)"],
    "prompt": ["prompt(tokens=3)", "prompt(tokens=2, start='vocabulary') + head(classes=2)"],
    "ptuning": ["ptuning(tokens=3, hidden=5)", "ptuning(tokens=2, encoder='lstm', hidden=4, layers=1)"],
    "unfreeze": ["unfreeze('blocks[-1:]')"],
    "vera": ["vera(rank=5)", "vera(rank=3, save_projection=False, seed=3, dropout=0.5)"],
}
KINDS = ("bert", "gpt2", "llama")
REFUSED = {
    ("llama", "bitfit()"),
    ("llama", "bitfit(sites='q,up')"),
    ("gpt2", "peft('hra', {'r': 4})"),
    ("gpt2", "peft('oft', {'oft_block_size': 4})"),
}
WITH_HEAD = ("roberta", "modernbert", "glm", "qwen3")
NATIVE = [
    "lora(rank=2) + head(classes=3)",
    "unfreeze('blocks[-1:]') + head(classes=5)",
    "full() + head(classes=3)",
]
# Methods that say they start as the base model, exactly
IDENTITIES = {
    "lora",
    "dora",
    "pissa",
    "adalora",
    "loha",
    "lokr",
    "vera",
    "adapter",
    "bitfit",
    "full",
    "galore",
    "ia3",
    "norms",
    "unfreeze",
    "freeze",
    "gradual_unfreeze",
    "layerwise_lr",
}

CASES = [(kind, text) for name in sorted(EXPRESSIONS) for text in EXPRESSIONS[name] for kind in KINDS]
CASES += [(kind, text) for text in NATIVE for kind in WITH_HEAD]


def starts_as_base(text: str) -> bool:
    return {method.name for method in read(text).methods} <= IDENTITIES


def test_every_method_has_an_example() -> None:
    known = {n for n, entry in entries("method").items() if entry.module.startswith("graftkit.")}
    assert set(EXPRESSIONS) == known, "give a new method its examples in EXPRESSIONS"
    for name, texts in EXPRESSIONS.items():
        assert all(name in {m.name for m in read(text).methods} for text in texts)


@pytest.mark.parametrize("kind,text", CASES, ids=lambda value: value)
def test_every_promise_is_kept(kind: str, text: str, tmp_path: Path) -> None:
    skip_without_tuner(text)
    outcome = contract.check(zoo.BY_NAME[kind], text, tmp_path, starts_as_base(text))
    assert (outcome != contract.PASSES) == ((kind, text) in REFUSED), outcome


def dead(backbone: Backbone, labels: Labels) -> Labels:
    """A parameter that has no part in the output."""
    backbone.model.pooler.add_module("bitfit_default", unused := Added())
    unused.weight = nn.Parameter(torch.ones(2))
    return {**labels, "pooler.bitfit_default.weight": next(iter(labels.values()))}


def meddling(backbone: Backbone, labels: Labels) -> Labels:
    with torch.no_grad():
        backbone.model.pooler.dense.weight.mul_(1.01)
    return labels


def leaving(backbone: Backbone, labels: Labels) -> Labels:
    backbone.model.pooler.register_forward_hook(lambda *_: None)
    return labels


@pytest.mark.parametrize(
    "fault,promise",
    [
        (dead, "labelled_trains_and_nothing_else_moves"),
        (meddling, "base_is_untouched"),
        (leaving, "failed_attach_leaves_the_model_as_it_was"),
    ],
)
def test_a_fault_is_found(fault, promise: str, tmp_path: Path, monkeypatch) -> None:
    bitfit = entries("method")["bitfit"].load()
    attach = bitfit.attach
    monkeypatch.setattr(bitfit, "attach", lambda *given: fault(given[1], attach(*given)))
    with pytest.raises(contract.Broke, match=f"{promise}: bitfit.. on bert: "):
        contract.check(zoo.BY_NAME["bert"], "bitfit()", tmp_path, identity=True)


def test_a_wrong_fold_is_found(tmp_path: Path, monkeypatch) -> None:
    bitfit = entries("method")["bitfit"].load()
    wrong = {"encoder.layer.0.output.dense.bias": torch.ones(zoo.WIDTH)}
    monkeypatch.setattr(bitfit, "fold", lambda *given: wrong)
    with pytest.raises(contract.Broke, match="folds_or_says_why_not: "):
        contract.check(zoo.BY_NAME["bert"], "bitfit()", tmp_path)
