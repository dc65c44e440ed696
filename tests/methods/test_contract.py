"""What every method must hold, in each of its forms, on three kinds of model. tests/support/contract.py has the promises."""

from __future__ import annotations

from pathlib import Path

import contract
import pytest
import torch
import zoo
from expressions import EXPRESSIONS, starts_as_base
from peft_versions import has_tuner, skip_without_tuner
from torch import nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added
from graftkit.methods.base import read
from graftkit.optim.labels import Labels
from graftkit.recipe.catalogue import entries

KINDS = ("bert", "gpt2", "llama")
REFUSED = {
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

QUICK = {(KINDS[0], texts[0]) for texts in EXPRESSIONS.values()}  # what `make check` tries of each method
# test_matrix.py runs the first form of each method on the other models
CASES = [(KINDS[0], EXPRESSIONS[name][0]) for name in sorted(EXPRESSIONS)]
CASES += [(kind, text) for name in sorted(EXPRESSIONS) for text in EXPRESSIONS[name][1:] for kind in KINDS]
CASES += [(kind, text) for text in NATIVE for kind in WITH_HEAD]
# those on which `contract.DETAILS` are tried: of each form's, one, of the next form the next kind
FORMS = list(dict.fromkeys(text for _, text in CASES))


def detailed(kind: str, text: str) -> bool:
    kinds = [k for k, given in CASES if given == text]
    return kind == kinds[FORMS.index(text) % len(kinds)]


def test_every_method_has_an_example() -> None:
    known = {n for n, entry in entries("method").items() if entry.module.startswith("graftkit.")}
    assert set(EXPRESSIONS) == known, "give a new method its examples in EXPRESSIONS"
    for name, texts in EXPRESSIONS.items():
        there = [text for text in texts if has_tuner(text)]
        assert all(name in {m.name for m in read(text).methods} for text in there)


@pytest.mark.parametrize(
    "kind,text",
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=lambda value: value,
)
def test_every_promise_is_kept(kind: str, text: str, tmp_path: Path) -> None:
    skip_without_tuner(text)
    outcome = contract.check(zoo.BY_NAME[kind], text, tmp_path, starts_as_base(text), detailed(kind, text))
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
        (leaving, "failed_attach_and_detach_leave_the_model_as_it_was"),
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
