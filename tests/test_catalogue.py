"""Expressions, their checks, and the options that are read without importing anything heavy."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing

import pytest
from peft_versions import peft_has

from graftkit import LoRA, UserError
from graftkit.catalogue import FAMILIES, Call, as_expression, build, entries, parse
from graftkit.libraries import TUNERS_SINCE
from graftkit.methods.base import Chain, read


@pytest.mark.filterwarnings("error")
def test_a_regular_expression_needs_no_raw_string():
    assert parse(r"lora(sites='re:a\.b')", "method") == (Call("lora", {"sites": r"re:a\.b"}),)


def test_torch_is_not_imported():
    script = (
        "import sys, graftkit, graftkit.catalogue, graftkit.recipe, graftkit.cli, graftkit.selection\n"
        "graftkit.catalogue.entries('method'), graftkit.catalogue.entries('task')\n"
        "graftkit.catalogue.parse('lora(rank=8) + head()', 'method'), dir(graftkit)\n"
        "assert not {'torch', 'transformers', 'datasets', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("family", FAMILIES)
def test_options_are_those_of_the_dataclass(family):
    assert entries(family)
    for name, entry in entries(family).items():
        made = entry.load()
        fields = {field.name: field for field in dataclasses.fields(made)}
        assert set(entry.options) == set(fields), name
        types = typing.get_type_hints(made)
        for key, option in entry.options.items():
            field = fields[key]
            assert option.type == field.type and types[key], key
            wanted = None if field.default is dataclasses.MISSING else field.default
            assert option.default == wanted, f"{name}.{key}"
            assert {"help": option.help, **option.bounds} == dict(field.metadata)
            assert option.help
        assert entry.summary == made.__doc__.split("\n\n")[0].replace("\n", " ").strip()
        assert entry.module == made.__module__ and entry.module.endswith(f".{name}")


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
        ("lora() - head()", "joined by '+' only"),
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
        value = entry.load()()
        assert as_expression(value) == f"{name}()"
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
