"""What a module's forward takes is found out once, and not at each call."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import types
import weakref
from pathlib import Path

import pytest
import zoo
from torch import nn

import graftkit
from graftkit.backbone.calls import parameters_of, signature_of
from graftkit.backbone.pooling import named
from graftkit.backbone.tokens import by_name


class Adds(nn.Module):
    def forward(self, left, right=None, *, scale=1.0, **kwargs):
        return left


def other(left, centre):
    return left


def test_it_is_the_signature_of_forward():
    module = Adds()
    assert signature_of(module) == inspect.signature(module.forward)
    assert list(parameters_of(module)) == ["left", "right", "scale", "kwargs"]
    replaced = Adds()
    replaced.forward = other
    assert list(parameters_of(replaced)) == ["left", "centre"]
    replaced.forward = types.MethodType(other, replaced)  # the same function, whose first argument is bound
    assert list(parameters_of(replaced)) == ["centre"]
    replaced.forward = functools.wraps(module.forward)(functools.partial(other, centre=1))
    assert signature_of(replaced) == inspect.signature(replaced.forward)
    assert list(parameters_of(module)) == ["left", "right", "scale", "kwargs"]


@pytest.mark.slow
def test_a_replaced_forward_is_not_kept_alive():
    module = Adds()
    module.forward = lambda only: only
    assert list(parameters_of(module)) == ["only"]
    gone = weakref.ref(module.forward)
    del module
    gc.collect()
    assert gone() is None


def test_arguments_by_name():
    module = Adds()
    assert by_name(module, (1, 2), {"scale": 3}) == {"left": 1, "right": 2, "scale": 3}
    assert named(module, (1,), {"scale": 3, "more": 4}) == {
        "left": 1,
        "scale": 3,
        "kwargs": {"more": 4},
        "more": 4,
    }


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("transformer", "head(classes=3, pooling='mean')"),
        ("transformer", "prompt(tokens=2)"),
        ("vit", "prompt(tokens=2)"),
        ("bert", "head(classes=3, pooling='mean')"),
    ],
)
def test_a_second_pass_asks_for_no_signature(kind, method, monkeypatch):
    model = next(model for model in zoo.MODELS if model.name == kind)
    backbone = graftkit.Backbone(model.fresh())
    graftkit.attach(backbone, method)
    asked = []
    plain = inspect.signature

    def counted(function, **more):
        if "graftkit" in Path(sys._getframe(1).f_code.co_filename).parts:  # and not transformers
            asked.append(function)
        return plain(function, **more)

    batch = model.batch()
    values = list(batch.values())  # by position, as users' own loops call a model
    backbone.model(*values[:1], **dict(list(batch.items())[1:]))
    monkeypatch.setattr(inspect, "signature", counted)
    backbone.model(*values[:1], **dict(list(batch.items())[1:]))
    assert not asked
