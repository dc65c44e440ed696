"""Grafts that do not fit, that are damaged or tampered with: each is one clear error, and the model is untouched."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from expressions import EXPRESSIONS
from peft_versions import skip_without_tuner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel

from graftkit import Backbone, NotFoldable, UserError, attach, detach, load
from graftkit.methods.base import read

pytestmark = pytest.mark.sampled

OWN, THEIRS = "graft.safetensors", "adapter_model.safetensors"
METHOD = "lora(rank=2) + head(classes=3, pooling='mean')"
BRIDGED = "peft('hra', {'r': 4})"


def state(model: nn.Module) -> tuple:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [n for n, _ in model.named_modules()], hooks, [p.requires_grad for p in model.parameters()]


def refused(act: Callable[[nn.Module], Any], *parts: str, model: nn.Module | None = None) -> None:
    """`act` on a model is one error that says all of `parts`, and the model stays as it was."""
    model = model or tiny.bare("bert")
    values, before = tiny.snapshot(model), state(model)
    with pytest.raises(UserError) as caught:
        act(model)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "Traceback" not in message and "\n" not in message
    assert state(model) == before
    after = tiny.snapshot(model)
    assert after.keys() == values.keys() and all(torch.equal(after[n], value) for n, value in values.items())


def loading(folder: Path) -> Callable[[nn.Module], Any]:
    return lambda model: load(model, folder)


def attaching(text: str, **more: Any) -> Callable[[nn.Module], Any]:
    return lambda model: attach(model, text, **more)


@pytest.fixture(params=[METHOD, BRIDGED, "PEFT: lora(rank=2)", f"PEFT: {BRIDGED}"])
def folder(request, tmp_path) -> Path:
    """A graft folder, or one as PEFT writes it."""
    saved = attach(tiny.bare("bert"), request.param.removeprefix("PEFT: ")).save(tmp_path / "graft")
    if request.param.startswith("PEFT: "):
        (saved / "graft.json").unlink()
    return saved


@pytest.fixture
def graft(tmp_path) -> Path:
    return attach(tiny.bare("bert"), METHOD).save(tmp_path / "graft")


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A PEFT adapter that the bridge reads."""
    saved = attach(tiny.bare("bert"), BRIDGED).save(tmp_path / "adapter")
    (saved / "graft.json").unlink()
    return saved


def change(path: Path, act: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path)
    act(tensors)
    save_file(tensors, path)


def describe(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- another backbone


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"vocab_size": 41}, {"num_hidden_layers": 2}])
def test_another_backbone_of_the_same_kind(graft, changes):
    from transformers import BertModel

    config = tiny.config("bert")
    for name, value in changes.items():
        setattr(config, name, value)
    model = BertModel(config).eval()
    refused(loading(graft), "trained on another backbone", "fingerprint", model=model)


def test_parameters_of_the_same_shapes_by_other_names(graft):
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.bare("bert")

    refused(loading(graft), "trained on another backbone", model=Other())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_any_graft_on_another_architecture(folder, kind):
    refused(loading(folder), str(folder), model=tiny.bare(kind))


def test_an_adapter_of_peft_for_a_wider_model(adapter, tmp_path):
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                 intermediate_size=24, max_position_embeddings=48)).eval()  # fmt: skip
    refused(loading(adapter), "hra_u' has shape (16, 4)", "(32, 4)", model=model)
    lora = attach(tiny.bare("bert"), "lora(rank=2)").save(tmp_path / "lora")
    (lora / "graft.json").unlink()
    refused(loading(lora), "has shape (2, 16), but should have (2, 32)", model=model)


def test_an_adapter_of_peft_for_a_deeper_model(adapter):
    model = tiny.bare("bert")
    del model.encoder.layer[2]
    refused(loading(adapter), str(adapter), model=model)


def test_a_failed_load_leaves_the_backbone_value_as_it_was(graft):
    describe(graft / "graft.json", missing=["pooler.dense.weight"], method="lora(rank=3)")
    backbone = Backbone(tiny.bare("bert"))
    with pytest.raises(UserError):
        load(backbone, graft)
    assert backbone.missing == ()


# ---- keys


def test_missing_and_unexpected_keys_of_an_adapter_of_peft(adapter):
    name = "base_model.model.encoder.layer.1.attention.self.key.hra_u"
    whole = load_file(adapter / THEIRS)
    refused_after = loading(adapter)
    change(adapter / THEIRS, lambda t: t.update({name.replace("hra_u", "hra_v"): t[name].clone()}))
    refused(refused_after, "unexpected", "hra_v")
    save_file(whole, adapter / THEIRS)
    change(
        adapter / THEIRS, lambda t: t.update({"base_model.model.pooler.dense.oft_R.weight": t[name].clone()})
    )
    refused(refused_after, "'pooler.dense.oft_R.weight' is not a tensor of HRA")


def test_missing_keys_of_a_shared_matrix(tmp_path):
    text = "peft('vblora', {'num_vectors': 8, 'vector_length': 4}, sites='q,v')"
    saved = attach(tiny.bare("bert"), text).save(tmp_path)
    (saved / "graft.json").unlink()
    change(saved / THEIRS, lambda t: t.pop("base_model.vblora_vector_bank"))
    refused(loading(saved), "missing base_model.vblora_vector_bank", "unexpected nothing")


def test_a_key_that_is_half_there(tmp_path):
    saved = attach(tiny.bare("bert"), "lora(rank=2)").save(tmp_path)
    (saved / "graft.json").unlink()
    change(
        saved / THEIRS, lambda t: t.pop("base_model.model.encoder.layer.1.attention.self.key.lora_A.weight")
    )
    refused(loading(saved), "encoder.layer.1.attention.self.key")


def test_a_tensor_that_the_description_does_not_know(graft):
    change(graft / OWN, lambda t: t.update({"pooler.dense.weight": torch.ones(16, 16)}))
    refused(
        loading(graft), "graft.safetensors contains 'pooler.dense.weight', which graft.json does not name"
    )


def test_two_names_for_one_stored_tensor(graft):
    tensors = json.loads((graft / "graft.json").read_text())["tensors"]
    first, *_, last = (name for name, entry in tensors.items() if entry["file"] == OWN)
    tensors[first] = tensors[last]
    describe(graft / "graft.json", tensors=tensors)
    refused(loading(graft), "graft.safetensors contains", "graft.json does not name")


# ---- damaged files


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated(folder, share):
    path = folder / THEIRS
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(loading(folder), THEIRS, "broken or cut short")


def headed(path: Path, change_header: Callable[[dict], Any] | None = None, length: int | None = None) -> None:
    """Write a safetensors file with another header, or another length of it."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if change_header is not None:
        change_header(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize("length", [0, 7, 2**20, 2**40, 2**63])
def test_another_length_of_the_header(folder, length):
    headed(folder / THEIRS, length=length)
    refused(loading(folder), THEIRS, "broken or cut short")


def test_offsets_that_overlap_or_lead_outside(folder):
    def overlap(header: dict) -> None:
        names = [name for name in header if name != "__metadata__"]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]

    def outside(header: dict) -> None:
        name = [name for name in header if name != "__metadata__"][-1]
        header[name]["data_offsets"][1] += 4096

    for act in (overlap, outside):
        content = (folder / THEIRS).read_bytes()
        headed(folder / THEIRS, act)
        refused(loading(folder), THEIRS, "broken or cut short")
        (folder / THEIRS).write_bytes(content)


def test_another_type_of_values(folder):
    first = next(iter(load_file(folder / THEIRS)))
    for dtype in (torch.int64, torch.int8, torch.bool):
        change(folder / THEIRS, lambda t, dtype=dtype: t.update({first: t[first].to(dtype)}))
        refused(loading(folder), f"is stored as {dtype}, but ", "torch.float32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read(folder, dtype):
    change(folder / THEIRS, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    again = load(tiny.bare("bert"), folder)
    assert {p.dtype for p in again.parameters.values()} == {torch.float32}


def test_values_that_are_no_numbers(folder):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[list(tensors)[2]][0, 0] = float("nan")

    change(folder / THEIRS, spoil)
    refused(loading(folder), "contains NaN values")


def test_a_pickle_under_the_name(folder):
    torch.save({"x": torch.ones(2)}, folder / THEIRS)
    refused(loading(folder), THEIRS, "broken or cut short")


# ---- descriptions that were tampered with


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"fingerprint": "0" * 16}, "trained on another backbone"),
        (
            {"method": "lora(rank=3) + head(classes=3, pooling='mean')"},
            "has shape (2, 16), but should have (3, 16)",
        ),
        ({"method": "lora(rank=2)"}, "unexpected "),
        (
            {"method": "lora(rank=2) + norms() + head(classes=3, pooling='mean')"},
            "missing embeddings.LayerNorm",
        ),
        ({"method": "lora(rank=2, sites='q') + head(classes=3, pooling='mean')"}, "unexpected "),
        ({"method": "bitfit() + unfreeze(sites='norms')"}, "both claim"),
        ({"method": "peft('hra')"}, "missing "),
        ({"method": ""}, "unexpected "),
        ({"method": "lora() + " * 3000 + "lora()"}, "cannot be read"),
        ({"tensors": {}}, "missing "),
        ({"missing": "pooler"}, "missing or invalid"),
        ({"backbone": 3}, "missing or invalid"),
    ],
)
def test_a_description_that_says_something_else(graft, changes, said):
    describe(graft / "graft.json", **changes)
    refused(loading(graft), said)


@pytest.mark.parametrize("peft_type", ["NOPE", "nope", "", "XLORA", "PROMPT_TUNING2", "MIXED"])
def test_unknown_kinds_of_adapters(adapter, peft_type):
    describe(adapter / "adapter_config.json", peft_type=peft_type)
    refused(loading(adapter), "adapter_config.json", f"peft_type is {peft_type!r}")


@pytest.mark.parametrize("peft_type", [None, 3, ["LORA"], {"a": 1}])
def test_kinds_that_are_no_names(adapter, peft_type):
    describe(adapter / "adapter_config.json", peft_type=peft_type)
    refused(loading(adapter), "adapter_config.json", "peft_type is")


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"r": 3}, "has shape (16, 4) and is stored as torch.float32, but should have (16, 3)"),
        ({"r": 0}, "positive integer"),
        ({"r": "4"}, "does not fit"),
        ({"bias": "all"}, "bias='all'"),
        ({"something_new": 1}, "has no option 'something_new'"),
    ],
)
def test_a_configuration_that_is_not_of_its_tensors(adapter, changes, said):
    describe(adapter / "adapter_config.json", **changes)
    refused(loading(adapter), said)


# ---- methods on models they cannot handle


@pytest.mark.parametrize(
    "text",
    ["bitfit() + unfreeze('blocks')", "norms() + unfreeze('norms')", "unfreeze('ffn') + unfreeze('blocks')"],
)
def test_two_methods_claim_one_parameter(text):
    refused(attaching(text), "both claim the parameter '", "narrow the selection of one of them")


class Int8Linear(nn.Linear):
    """A map as libraries for quantization make it: eight bits a weight and a scale."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__(other.in_features, other.out_features, device="meta")
        scale = other.weight.detach().abs().max() / 127
        self.weight = nn.Parameter(
            (other.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )
        self.bias = other.bias
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantized() -> nn.Module:
    model = tiny.bare("bert")
    for name, module in list(model.encoder.named_modules()):
        if isinstance(module, nn.Linear):
            model.encoder.set_submodule(name, Int8Linear(module))
    return model


def one_block_for_all() -> nn.Module:
    config = AlbertConfig(
        vocab_size=tiny.VOCABULARY, embedding_size=8, hidden_size=tiny.WIDTH, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=tiny.INNER, max_position_embeddings=48, pad_token_id=0,
    )  # fmt: skip
    model = AlbertModel(config).eval()
    tiny.randomize(model, 0)
    return model


def one_block_under_two_names() -> nn.Module:
    model = tiny.bare("bert")
    model.encoder.layer[2] = model.encoder.layer[0]
    return model


@pytest.mark.parametrize("text", [texts[0] for texts in EXPRESSIONS.values()])
@pytest.mark.parametrize("make", [quantized, one_block_for_all, one_block_under_two_names])
def test_a_method_works_or_says_why_not(make, text, tmp_path):
    """On quantized maps and on shared layers: trained, saved, loaded, folded and disabled, or refused by name."""
    skip_without_tuner(text)
    model = make()
    base, before = tiny.outputs(model), state(model)
    try:
        graft = attach(model, text)
    except UserError as error:
        assert any(f"{method.name}(" in str(error) for method in read(text).methods), error
        modules = {name for name, _ in model.named_modules() if name} | {"Int8Linear"}
        assert any(name in str(error) for name in modules), error
        assert make is quantized and re.search(r"int8|integers", str(error)) and "use lora()" in str(error)
        assert state(model) == before and torch.equal(tiny.outputs(model), base)
        return
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.train()
    tiny.flat(model(**tiny.batch()), tiny.batch()["attention_mask"]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in graft.parameters.values())
    wanted = tiny.outputs(model)
    graft.save(tmp_path)
    assert torch.equal(tiny.outputs(load(make(), tmp_path).model), wanted)
    try:
        graft.fold()
    except NotFoldable as error:
        assert any(f"{method.name}(" in str(error) for method in read(text).methods), error
    else:
        assert tiny.relative(tiny.outputs(model), wanted) < 1e-5
    detach(graft)
    assert torch.equal(tiny.outputs(model), base) and state(model) == before


# ---- names


@pytest.mark.parametrize("name", ["", " ", "a b", "a.b", "a/b", "..", "a\n", "ü b"])
def test_invalid_names_of_grafts(name):
    refused(attaching("lora()", name=name), "graft name", "must be a plain word")


@pytest.mark.parametrize("text", [METHOD, BRIDGED, "full()", "prompt(tokens=2)"])
def test_a_graft_is_attached_once(text, tmp_path):
    model = tiny.bare("bert")
    graft = attach(model, text)
    graft.save(tmp_path)
    refused(attaching(text), "'default' is already attached", "give this one another name", model=model)
    refused(loading(tmp_path), "'default' is already attached", "give this one another name", model=model)
    assert torch.equal(tiny.outputs(detach(graft)), tiny.outputs(tiny.bare("bert")))
