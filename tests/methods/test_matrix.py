"""Every method on every model of the zoo: it keeps its promises, or is refused as docs/matrix.json says.

Those that do not depend on how a model is put together (`contract.DETAILS`) are tried on one model of each family, with
each method on the next one; `python docs/generate.py --matrix` tries all of them on all pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import contract
import pytest
import zoo
from expressions import EXPRESSIONS, starts_as_base
from peft_versions import skip_without_tuner

from graftkit.recipe.catalogue import entries

pytestmark = pytest.mark.sampled

STORED = Path(__file__).parents[2] / "docs" / "matrix.json"
METHODS = list(entries("method"))
OWN = {name for name, entry in entries("method").items() if not entry.module.startswith("graftkit.")}
# models that are made of the same kinds of modules; each of the others has some of its own
FAMILIES = (
    ("bert", "roberta", "deberta_v2", "modernbert"),
    ("llama", "qwen3", "glm"),
    ("vit", "swin", "ast", "whisper"),
    ("wav2vec2", "wavlm"),
    ("convnext", "resnet", "squeezenet", "resnet20"),
)


def detailed(method: str, model: str) -> bool:
    """Whether a pair is one of those on which the details are tried: each pair of a user's own method is."""
    family = next((family for family in FAMILIES if model in family), (model,))
    return method in OWN or model == family[METHODS.index(method) % len(family)]


def expression(method: str) -> str:
    """The expression by which a method stands in the matrix; its defaults where it is the user's own."""
    return EXPRESSIONS[method][0] if method in EXPRESSIONS else f"{method}()"


def outcome(method: str, model: zoo.Model, folder: Path, details: bool = True) -> str:
    text = expression(method)
    return contract.check(model, text, folder, starts_as_base(text), details)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("model", zoo.MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_pair(method: str, model: zoo.Model, stored, tmp_path: Path) -> None:
    skip_without_tuner(expression(method))
    got = outcome(method, model, tmp_path, detailed(method, model.name))
    if method not in OWN:
        assert got == stored["pairs"][method][model.name], "run `python docs/generate.py --matrix`"


def test_details_are_tried_with_each_method_and_on_each_model() -> None:
    tried = [
        (method, model.name) for method in METHODS for model in zoo.MODELS if detailed(method, model.name)
    ]
    for method in METHODS:
        assert sum(method == given for given, _ in tried) >= len(FAMILIES) + 4
    for model in zoo.MODELS:
        assert sum(model.name == given for _, given in tried) >= len(METHODS) // 4


def test_the_matrix_is_whole(stored) -> None:
    assert {name: expression(name) for name in METHODS if name not in OWN} == stored["expressions"]
    assert list(stored["models"]) == [model.name for model in zoo.MODELS]
    for outcomes in stored["pairs"].values():
        assert set(outcomes) == set(stored["models"])


def test_most_pairs_pass(stored) -> None:
    every = [outcome for outcomes in stored["pairs"].values() for outcome in outcomes.values()]
    assert every.count(contract.PASSES) >= 0.85 * len(every)
