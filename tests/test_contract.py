"""What every method must hold, in each of its forms, on three kinds of model. tests/contract.py has the promises."""

from __future__ import annotations

from pathlib import Path

import contract
import pytest
import zoo

from graftkit.catalogue import entries
from graftkit.methods.base import read

# At least one example of each method; those that only change other methods stand beside one. The first is the one
# of the matrix in docs/methods.md, which runs it on every model of tests/zoo.py; the others run on three of them.
EXPRESSIONS = {
    "adapter": ["adapter(bottleneck=5)", "adapter(bottleneck=3, norms=False)"],
    "bitfit": ["bitfit()"],
    "freeze": ["full() + freeze('blocks[0]')", "full() + freeze('embeddings')"],
    "full": ["full()"],
    "head": [
        "head(classes=5)",
        "head(classes=3, pooling='mean', hidden=6)",
        "head(classes=2, pooling='attention')",
    ],
    "layerwise_lr": ["unfreeze('blocks') + layerwise_lr(decay=0.5)"],
    "lora": ["lora(rank=3)", "lora(rank=2, sites='q,v', dropout=0.5, alpha=3) + head(classes=2)"],
    "prefix": ["prefix(tokens=3)", "prefix(tokens=2, hidden=5)"],
    "prompt": ["prompt(tokens=3)", "prompt(tokens=2, start='vocabulary') + head(classes=2)"],
    "ptuning": ["ptuning(tokens=3, hidden=5)", "ptuning(tokens=2, encoder='lstm', hidden=4, layers=1)"],
    "unfreeze": ["unfreeze('blocks[-1:]')"],
}
KINDS = ("bert", "gpt2", "llama")
REFUSED = {("llama", "bitfit()")}
WITH_HEAD = ("roberta", "modernbert", "glm", "qwen3")
NATIVE = [
    "lora(rank=2) + head(classes=3)",
    "unfreeze('blocks[-1:]') + head(classes=5)",
    "full() + head(classes=3)",
]
# Methods that say they start as the base model, exactly
IDENTITIES = {"lora", "adapter", "bitfit", "full", "unfreeze", "freeze", "layerwise_lr"}

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
    outcome = contract.check(zoo.BY_NAME[kind], text, tmp_path, starts_as_base(text))
    assert (outcome != contract.PASSES) == ((kind, text) in REFUSED), outcome
