"""Which versions of the libraries are supported, and what happens with others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from shaken import shaken

from graftkit import UserError, attach, libraries
from graftkit.libraries import UntestedVersion

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
WITNESSED = [name for name in libraries.WITNESSES]


@pytest.fixture
def fresh(monkeypatch):
    """What was found out about the libraries is forgotten, before and after."""
    kept = (libraries.cache_name, libraries._witness, libraries._rotary_names, libraries.warn_of_untested)
    for function in kept:
        function.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for function in kept:
        function.cache_clear()


def places(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


# ---- names that are asked for


def test_the_cache_has_the_name_that_models_give_it():
    import inspect

    from transformers import LlamaModel, MambaModel

    assert libraries.cache_name() in inspect.signature(LlamaModel.forward).parameters
    assert set(libraries.cache_names()) & set(inspect.signature(MambaModel.forward).parameters)
    assert libraries.takes_cache(tiny.bare("llama")) and not libraries.takes_cache(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("text", ["prefix(tokens=3, shift=True)", "prefix(tokens=3, shift=True, hidden=5)"])
def test_a_prefix_keeps_its_form_for_peft(kind, text, tmp_path):
    shaken(tiny.causal(kind), text).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PREFIX_TUNING" and config["num_virtual_tokens"] == 3


def test_a_prefix_at_the_texts_positions_keeps_its_form_for_peft(tmp_path):
    """Needs the names of rotary positions too."""
    shaken(tiny.causal("llama"), "prefix(tokens=3)").save(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_name_for_the_cache_is_an_error(fresh, kind, tmp_path):
    """Not a prefix without a form for PEFT, nor virtual tokens that are read again with each token."""
    from transformers import modeling_outputs

    prefix = attach(tiny.causal(kind), "prefix(tokens=3, shift=True)")
    prompt = attach(tiny.causal(kind), "prompt(tokens=3)").model
    fresh.setattr(modeling_outputs, "BaseModelOutputWithPast", lambda hidden_states=None, memory=None: None)
    libraries.cache_name.cache_clear()
    told = "transformers .* calls the cache of its models neither 'cache' nor 'past_key_values'"
    with pytest.raises(UserError, match=told):
        prefix.save(tmp_path)
    with pytest.raises(UserError, match=told):
        prompt(**tiny.batch())


@pytest.mark.parametrize("name", ["inv_freq", "rope_type"])
def test_no_name_for_rotary_positions_is_an_error(fresh, name, tmp_path):
    from transformers.models.llama import modeling_llama

    graft = attach(tiny.causal("llama"), "prefix(tokens=3)")
    made = SimpleNamespace(**{other: None for other in ("inv_freq", "rope_type") if other != name})
    fresh.setattr(modeling_llama, "LlamaRotaryEmbedding", lambda config: made)
    with pytest.raises(UserError, match=f"transformers .* has no {name} in Llama's rotary positions"):
        graft.save(tmp_path)


def test_no_function_for_rotary_positions_is_an_error(fresh, tmp_path):
    from transformers.models.llama import modeling_llama

    graft = attach(tiny.causal("llama"), "prefix(tokens=3)")
    fresh.delattr(modeling_llama, "apply_rotary_pos_emb")
    with pytest.raises(UserError, match="has no apply_rotary_pos_emb"):
        graft.save(tmp_path)


def test_an_attention_that_is_not_taken_is_an_error(monkeypatch):
    model = tiny.bare("bert")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(UserError, match="leaves BertModel with another attention than graftkit_sdpa"):
        attach(model, "prefix(tokens=3)")


@pytest.mark.parametrize("name", WITNESSED)
def test_methods_that_models_have(fresh, name):
    assert libraries.method_of(tiny.bare("bert"), name) is None  # and transformers still has it elsewhere
    module, kind = libraries.WITNESSES[name]
    fresh.setattr(sys.modules[module], kind, object)
    libraries._witness.cache_clear()
    with pytest.raises(UserError, match=rf"transformers .* has no {kind}\.{name}"):
        libraries.method_of(tiny.bare("bert"), name)


@pytest.mark.parametrize("what", libraries.PEFT_PARTS)
def test_parts_of_peft(monkeypatch, what):
    pytest.importorskip("peft")
    assert libraries.peft_part(what)
    module, name = libraries.PEFT_PARTS[what]
    monkeypatch.delattr(sys.modules[module], name)
    with pytest.raises(UserError, match=rf"peft .* has no {module}\.{name}"):
        libraries.peft_part(what)


def test_a_tuner_that_came_later(monkeypatch):
    pytest.importorskip("peft")
    kinds = {k: v for k, v in libraries.peft_part("configurations").items() if k.value != "HIRA"}
    monkeypatch.setattr(sys.modules["peft.mapping"], "PEFT_TYPE_TO_CONFIG_MAPPING", kinds)
    with pytest.raises(UserError, match=r"PEFT .* has no such tuner .* It came with PEFT 0\.20\."):
        attach(tiny.bare("bert"), "peft()")


def test_peft_without_its_cast_is_no_mistake_in_the_options():
    with pytest.raises(UserError, match=r"peft .* has no _cast_adapter_dtype in Namespace"):
        libraries.cast_adapter(type("Namespace", (), {})(), "default")


def test_bitsandbytes_without_its_switch():
    with pytest.raises(UserError, match=r"bitsandbytes .* has no Linear4bit\.support_avx512bf16_for_cpu"):
        libraries.leave_unpacked(type("Linear4bit", (), {})())


# ---- versions


def test_a_newer_version_is_warned_of_once(fresh):
    fresh.setattr(libraries, "installed", lambda name: {"transformers": "99.1.0"}.get(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            attach(tiny.bare("bert"), "lora()")
    told = [str(warning.message) for warning in caught if warning.category is UntestedVersion]
    bound = next(line for line in EXTRAS["tested"] if line.startswith("transformers")).partition("<")[2]
    assert told == [f"GraftKit was not tested with transformers 99.1.0 (tested: 5.17 up to below {bound})"]


def test_what_is_installed_here_was_tested():
    found = libraries.tested()
    assert set(found) == set(libraries.WATCHED)
    for name, versions in found.items():
        version = libraries.installed(name)
        assert version is None or versions.has(version), f"{name} {version}; tested: {versions}"


@pytest.mark.parametrize(
    "version,inside",
    [
        ("2.10.1", False),
        ("2.11.0", True),
        ("2.13.0+cpu", True),
        ("2.15.9", True),
        ("2.16.0", False),
        ("3.0", False),
    ],
)
def test_ends_of_a_range(version, inside):
    assert libraries.Tested("torch", "2.11", "2.16").has(version) is inside


def test_the_warning_is_one_line_and_is_not_shown_with_help():
    """And nothing heavy is imported to find out."""
    code = """
import sys
from graftkit import libraries
from graftkit.cli import main as cli
libraries.installed = lambda name: "99.0"
if sys.argv[1:]:
    cli.main()
libraries.warn_of_untested()
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    run = [sys.executable, "-c", code]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stderr
    assert told.count("\n") == 1 and "torch 99.0 (tested: 2.11 up to below" in told
    helped = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True)
    assert "GraftKit" not in helped.stderr


# ---- what the files of the repository say


def test_the_constraints_are_within_the_ranges():
    lines = [*PROJECT["dependencies"], *(line for part in EXTRAS.values() for line in part)]
    for line in lines:
        name, limits = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?([^;]*)(?:;.*)?", line).groups()
        if name == "graftkit":
            continue
        pin = next(
            (v for n, v in PINS.items() if n.lower().replace("_", "-") == name.lower().replace("_", "-")),
            None,
        )
        assert pin is not None, f"constraints.txt has no {name}: make lock"
        for sign, limit in re.findall(r"(>=|<)([\d.]+)", limits):
            assert places(pin) >= places(limit) if sign == ">=" else places(pin) < places(limit), (line, pin)


def test_the_constraints_hold_for_every_machine():
    for name, version in PINS.items():
        assert not re.match("nvidia|cuda|triton|graftkit", name) and re.fullmatch(
            r"[\d.]+(post\d+)?", version
        ), name


def test_whoever_installs_uses_the_constraints():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installs = re.findall(r"\$\(PIP\) install.*", makefile)
    assert len(installs) == 4 and all("-c $(CONSTRAINTS)" in line for line in installs)
    assert re.search(r"^CONSTRAINTS \?= constraints\.txt$", makefile, re.M)
    assert re.search(r"^\$\(VENV\)/\.torch: .*\$\(CONSTRAINTS\)$", makefile, re.M)
    assert re.search(r"make .*test\b", (ROOT / ".ci/run").read_text(encoding="utf-8"))


def test_both_ends_are_read_from_the_ranges():
    def ends(which: str) -> set[str]:
        script = [sys.executable, str(ROOT / ".ci/versions.py"), which]
        return set(subprocess.run(script, capture_output=True, text=True, check=True).stdout.split())

    assert {"torch==2.11", "transformers==5.17", "peft==0.18"} <= ends("oldest")
    assert {"torch==2.15.*", "transformers==5.24.*", "peft==0.21.*"} <= ends("newest")
