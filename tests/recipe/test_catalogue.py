"""Expressions, their checks, and the options that are read without importing anything heavy."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing

import pytest
from peft_versions import peft_has

from graftkit import LoRA, UserError
from graftkit.libraries import TUNERS_SINCE
from graftkit.methods.base import Chain, read
from graftkit.recipe import catalogue
from graftkit.recipe.catalogue import FAMILIES, entries, entry_name
from graftkit.recipe.expressions import Call, as_expression, build, parse, renewed


@pytest.mark.filterwarnings("error")
def test_a_regular_expression_needs_no_raw_string():
    assert parse(r"lora(sites='re:a\.b')", "method") == (Call("lora", {"sites": r"re:a\.b"}),)


@pytest.mark.slow
def test_torch_is_not_imported():
    script = (
        "import sys, graftkit, graftkit.recipe.catalogue, graftkit.recipe.expressions, graftkit.recipe.schema, graftkit.cli.main, graftkit.recipe.selection\n"
        "graftkit.recipe.catalogue.entries('method'), graftkit.recipe.catalogue.entries('task')\n"
        "graftkit.recipe.schema.make({'model': 'm', 'data': {'train': 't'}, 'train': {'optimizer': 'galore()'}})\n"
        "graftkit.recipe.expressions.parse('lora(rank=8) + head()', 'method'), dir(graftkit)\n"
        "assert not {'torch', 'transformers', 'datasets', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("family", FAMILIES)
def test_options_are_those_of_the_dataclass(family):
    assert entries(family)
    for name, entry in entries(family).items():
        made = entry.load()
        fields = {field.name: field for field in dataclasses.fields(made)}
        assert list(entry.options) == list(fields), name
        types = typing.get_type_hints(made)
        for key, option in entry.options.items():
            field = fields[key]
            assert option.type == field.type and types[key], key
            wanted = None if field.default is dataclasses.MISSING else field.default
            assert option.default == wanted, f"{name}.{key}"
            assert {"help": option.help, "formerly": option.formerly, **option.bounds} == dict(field.metadata)
            assert option.help
        assert entry.summary == made.__doc__.split("\n\n")[0].replace("\n", " ").strip()
        assert entry.module == made.__module__ and entry_name(entry.module) == name


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_pass_their_own_checks(family):
    for name, entry in entries(family).items():
        for option in entry.options.values():
            option.check(option.default, f"{name}()")


@pytest.mark.parametrize(
    "text,calls",
    [
        ("lora", [("lora", {})]),
        ("lora()", [("lora", {})]),
        (" lora(4) ", [("lora", {"rank": 4})]),
        ("lora(4, 'q,v')", [("lora", {"rank": 4, "sites": "q,v"})]),
        ("lora(rank=4)+head(classes=3)", [("lora", {"rank": 4}), ("head", {"classes": 3})]),
        ("full() + (freeze() + head)", [("full", {}), ("freeze", {}), ("head", {})]),
        ("head(pooling=mean)", [("head", {"pooling": "mean"})]),
        ("lora(alpha=null, dropout=0)", [("lora", {"alpha": None, "dropout": 0})]),
        ("adapter(norms=false)", [("adapter", {"norms": False})]),
        (r"lora(sites='re:.*\.dense')", [("lora", {"sites": r"re:.*\.dense"})]),
    ],
)
def test_what_expressions_mean(text, calls):
    parsed = parse(text, "method")
    assert parsed == tuple(Call(*call) for call in calls)
    again = parse(" + ".join(map(str, parsed)), "method")
    assert again == parsed


@pytest.mark.parametrize(
    "text,said",
    [
        ("", "cannot be read"),
        ("lora(sites=q,v)", "lora(sites='q,v')"),
        ("lora()" + " + lora()" * 20000, "too many parts"),
        ("lora(", "cannot be read"),
        ("lora(rank=)", "cannot be read"),
        ("lora\x00", "cannot be read"),
        ("lorra()", "Did you mean 'lora'?"),
        ("lora(rnk=4)", "Did you mean 'rank'?"),
        ("lora(rank=4, rank=5)", "given twice"),
        ("lora(4, rank=5)", "given twice"),
        ("freeze('q', 'v')", "takes 1 values, but 2"),
        ("lora(**{})", "'**'"),
        ("lora(rank='4')", "rank is '4', but must be int"),
        ("lora(rank=4.0)", "must be int"),
        ("lora(rank=True)", "must be int"),
        ("lora(rank=0)", "at least 1"),
        ("lora(dropout=1)", "below 1"),
        ("lora(dropout=-0.1)", "at least 0"),
        ("lora(lr=0)", "above 0"),
        ("lora(lr=1e999)", "finite"),
        ("lora(alpha='x')", "must be float or null"),
        ("head(pooling=men)", "Did you mean 'mean'?"),
        ("adapter(norms=1)", "must be bool"),
        ("lora(rank=f())", "not a plain value"),
        ("lora(rank={[]: 1})", "not a plain value"),
        ("lora() - head()", "can only be joined by '+'"),
        ("lora().x", "is not a method's name"),
        ("__import__('os')", "there is no method"),
        ("3", "is not a method's name"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(UserError) as caught:
        parse(text, "method")
    assert said in str(caught.value)


def test_values_made_in_python_are_checked_alike():
    for changes in ({"rank": 0}, {"rank": "8"}, {"dropout": 1.0}, {"lr": float("nan")}, {"sites": 3}):
        with pytest.raises(UserError, match=r"lora\(\): "):
            LoRA(**changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_round_trips(family):
    for name, entry in entries(family).items():
        if name == "peft" and not peft_has(TUNERS_SINCE["HIRA"]):  # which is its default
            continue
        given = (
            {"tokens": ("<x>",)}
            if "tokens" in entry.options and entry.options["tokens"].type == "tuple"
            else {}
        )
        value = entry.load()(**given)
        assert as_expression(value) == str(Call(name, given))
        assert build(parse(as_expression(value), family), family) == [value]
    assert (
        str(LoRA(rank=3, alpha=0.1, sites=r"re:a'b\.c")) == r"""lora(rank=3, sites="re:a'b\\.c", alpha=0.1)"""
    )
    assert read(str(LoRA(alpha=0.1))) == Chain((LoRA(alpha=0.1),))


def test_only_methods_join_with_plus():
    for method in (LoRA(), read("lora()")):
        with pytest.raises(TypeError, match="unsupported operand"):
            method + 3
    with pytest.raises(UserError, match="write it once with both selections"):
        read("lora() + lora()")
    with pytest.raises(UserError, match=r"write it once\."):
        read("full() + full()")


def test_methods_join_with_plus():
    joined = LoRA(rank=3) + read("head(classes=2) + freeze()")
    assert joined == read("lora(rank=3) + head(classes=2) + freeze()")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """`own(name, text)` writes a file of a folder of one's own, which GRAFTKIT_METHODS names."""
    monkeypatch.setenv("GRAFTKIT_METHODS", str(tmp_path))

    def write(name: str, text: str):
        path = tmp_path / f"{name}.py"
        path.write_text(
            "from dataclasses import dataclass\nfrom graftkit.recipe.catalogue import option\n" + text
        )
        return path

    return write


BODY = "    rank: int = option(3, 'a low one', at_least=1)\n    more: bool = option(False, 'one more')\n"


@pytest.mark.parametrize(
    "text",
    [
        "from graftkit import LoRA\n@dataclass(frozen=True)\nclass Low(LoRA):\n",
        "import graftkit\n@dataclass(frozen=True)\nclass Low(graftkit.LoRA):\n",
        "from graftkit.methods.lora import LoRA as Base\n@dataclass(frozen=True)\nclass Low(Base):\n",
        "from graftkit.methods import lora\n@dataclass(frozen=True)\nclass Low(lora.LoRA):\n",
        "import graftkit.methods.lora as l\n@dataclass(frozen=True)\nclass Low(l.LoRA):\n",
        "from graftkit.methods.lora import *\n@dataclass(frozen=True)\nclass Low(LoRA):\n",
        "from graftkit import LoRA\n@dataclass(frozen=True)\nclass LoRA(LoRA):\n",
        "from graftkit import LoRA\nclass Between(LoRA):\n    pass\n\n@dataclass(frozen=True)\nclass Low(Between):\n",
        "from enum import Enum\nfrom graftkit import LoRA\nclass Color(Enum):\n    red = 1\n\n"
        "@dataclass(frozen=True)\nclass Low(LoRA):\n",
    ],
)
def test_options_of_base_classes_are_inherited(own, text):
    own("low", text + BODY)
    entry = entries("method")["low"]
    made = entry.load()
    assert list(entry.options) == [field.name for field in dataclasses.fields(made)]
    assert list(entry.options) == [*entries("method")["lora"].options, "more"]
    assert entry.options["rank"].default == 3 == made().rank and entry.options["rank"].help == "a low one"
    assert parse("low(5, 'q')", "method") == (Call("low", {"rank": 5, "sites": "q"}),)
    with pytest.raises(UserError, match=r"low\(\): dropout is 2"):
        parse("low(dropout=2)", "method")
    sys.modules.pop(entry.module)


def test_a_file_that_holds_no_method_is_passed_by(own):
    own("helpers", "class Helper:\n    pass\n")
    own(
        "tasks",
        "from graftkit.tasks.base import Task\n@dataclass(frozen=True)\nclass Mine(Task):\n    pass\n",
    )
    own("other", "import torch\nclass Net(torch.nn.Module):\n    pass\n")
    assert set(entries("method")) & {"helpers", "tasks", "other"} == set()


def test_constants_of_base_classes_are_inherited():
    assert entries("task")["span"].constants["trains"] is True
    assert entries("task")["prompting"].constants["trains"] is False


@pytest.mark.parametrize(
    "text,family,said",
    [
        ("galore(rank=8) + head()", "method", "galore() is an optimizer, not a method: write train.optimizer=galore(rank=8)"),
        ("adamw", "method", "write train.optimizer=adamw "),
        ("lora()", "optimizer", "lora() is a method, not an optimizer: write method=lora()"),
        ("classify()", "method", "classify() is a task, not a method: write task=classify()"),
        ("lora()", "task", "lora() is a method, not a task"),
        ("galore()", "task", "galore() is an optimizer, not a task"),
        ("galor()", "optimizer", "galore, lion, muon). Did you mean 'galore'?"),
        ("sgd()", "optimizer", "To use an optimizer of your own, set GRAFTKIT_OPTIMIZERS to its folder."),
        ("galore(rang=8)", "optimizer", "galore() has no option 'rang' (options: rank, interval, scale, beta1, beta2, eps, svd, power, bits, space_bits). Did you mean 'rank'?"),
        ("galore(rank=0)", "optimizer", "rank is 0, but must be at least 1"),
        ("adamw(beta1=1.0)", "optimizer", "beta1 is 1.0, but must be below 1"),
    ],
)  # fmt: skip
def test_what_belongs_to_another_family_is_named(text, family, said):
    with pytest.raises(UserError) as caught:
        parse(text, family)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lora(b_rate=4.0)", "lora(loraplus_lr_ratio=4.0)"),
        ("dora(stabilised=True)", "dora(use_rslora=True)"),
        ("pissa(ranks={'q': 4}, alphas={'q': 8})", "pissa(rank_pattern={'q': 4}, alpha_pattern={'q': 8})"),
        ("lora(b_bias=True, start='gaussian')", "lora(lora_bias=True, init='gaussian')"),
        ("loha(effective_conv=True)", "loha(use_effective_conv2d=True)"),
        ("lokr(effective_conv=True)", "lokr(use_effective_conv2d=True)"),
        ("lora(plain_conv=True)", "lora(peft_conv=True)"),
        ("prompt(start='text', text='a b')", "prompt(init='text', init_text='a b')"),
    ],
)
def test_an_option_with_another_name_than_before(old, new):
    """Who writes the old one is told the new one; what was saved with it is read as ever."""
    was, now = (re.findall(r"(\w+)=", text) for text in (old, new))
    with pytest.raises(UserError) as caught:
        parse(old, "method")
    assert f"{was[0]} is now called {now[0]}." in str(caught.value)
    assert parse(old, "method", stored=True) == parse(new, "method")
    assert renewed(f"{old} + head()", "method") == f"{new} + head()"
    assert read(new)
    with pytest.raises(UserError, match="twice"):
        parse(f"{new[:-1]}, {old.partition('(')[2]}", "method", stored=True)


def test_what_has_no_old_names_is_left_as_it_is():
    for text in ("adapter( 3 ) + head", "lora(rank=", "prompt(init='text', init_text='start=3')"):
        assert text.startswith("prompt") or renewed(text, "method") == text
    assert (
        parse(renewed("prompt(init='text', init_text='start=3')", "method"), "method")[0].arguments[
            "init_text"
        ]
        == "start=3"
    )


def test_old_names_are_those_of_no_option():
    for family in ("method", "task", "optimizer"):
        for entry in entries(family).values():
            old = [option.formerly for option in entry.options.values() if option.formerly]
            assert len(set(old)) == len(old) and not set(old) & set(entry.options), entry.name


@pytest.mark.parametrize(
    ("written", "family", "name"),
    [
        ("text-classification", "task", "classify"),
        ("sequence-classification", "task", "classify"),
        ("token-classification", "task", "tag"),
        ("ner", "task", "tag"),
        ("NER", "task", "tag"),
        ("question-answering", "task", "span"),
        ("qa", "task", "span"),
        ("sft", "task", "generate"),
        ("causal-lm", "task", "generate"),
        ("multiple-choice", "task", "choice"),
        ("image-classification", "task", "image_classify"),
        ("audio-classification", "task", "audio_classify"),
        ("full_finetuning", "method", "full"),
    ],
)
def test_other_names_are_understood(written, family, name):
    from graftkit.recipe.expressions import parse
    from graftkit.recipe.schema import make

    assert parse(written.replace("-", "_"), family)[0].name == name
    if family == "task":
        assert make({"model": "m", "task": written, "data": {"train": "t.csv"}}).task


@pytest.mark.parametrize(
    ("written", "meant"), [("regression", "regression"), ("multi-label", "multi"), ("ordinal", "ordinal")]
)
def test_names_of_what_is_an_option_are_told_how_to_write_it(written, meant):
    from graftkit.recipe.schema import make

    with pytest.raises(UserError, match=rf"there is no task .* Write classify\(kind='{meant}'\)\.$"):
        make({"model": "m", "task": written, "data": {"train": "t.csv"}})


def test_a_name_is_looked_up_in_its_own_file(monkeypatch):
    opened, whole = [], catalogue._read
    monkeypatch.setattr(
        catalogue, "_read", lambda path, *more: opened.append(path.stem) or whole(path, *more)
    )
    found = catalogue.Packaged(catalogue.FAMILIES["method"])
    assert found["lora"].class_name == "LoRA" and "nothing" not in found
    assert opened == ["lora"]
    assert list(found) == list(catalogue.entries("method")) and len(opened) > len(found) > 20
