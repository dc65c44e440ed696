"""Graft folders that are broken, tampered with, or of another model: each is one clear error."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from shaken import shaken

from graftkit import UserError, attach, load

pytestmark = pytest.mark.sampled

METHOD = "lora(rank=2) + head(classes=3, pooling='mean')"


@pytest.fixture
def folder(tmp_path):
    return attach(tiny.bare("bert"), METHOD).save(tmp_path / "graft")


def refused(folder, *parts: str, model=None) -> None:
    """Loading says all of `parts`, and the model stays as it was."""
    model = model or tiny.bare("bert")
    before = tiny.snapshot(model)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError) as caught:
        load(model, folder)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert [name for name, _ in model.named_modules()] == names
    after = tiny.snapshot(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def describe(folder, **changes) -> None:
    path = folder / "graft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, file: str, change) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def test_what_is_written(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "graft.json", "graft.safetensors",
    ]  # fmt: skip
    said = json.loads((folder / "graft.json").read_text())
    assert said["method"] == METHOD and said["backbone"] == "BertModel"
    stored = [tuple(entry.values()) for entry in said["tensors"].values()]
    assert len(set(stored)) == len(stored)
    for file, key in stored:
        assert key in load_file(folder / file)
    assert said["trained_parameters"] == sum(
        t.numel()
        for file in ("adapter_model", "graft")
        for t in load_file(folder / f"{file}.safetensors").values()
    )


def test_an_earlier_graft_in_the_folder_is_replaced(folder):
    graft = attach(tiny.bare("bert"), "bitfit()")
    graft.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["graft.json", "graft.safetensors"]
    assert load(tiny.bare("bert"), folder).method == graft.method


def test_more_about_it_is_kept(tmp_path):
    from graftkit.grafts.folder import read

    attach(tiny.bare("bert"), METHOD).save(tmp_path, task="classify", labels=["a", "b"])
    assert read(tmp_path).about["labels"] == ["a", "b"]


def test_another_backbone(folder):
    refused(folder, "trained on another backbone", "BertModel", model=tiny.bare("gpt2"))
    refused(folder, "trained on another backbone", model=tiny.bare("bert", vocab_size=41))


def test_a_head_of_another_size_is_the_same_backbone(tmp_path):
    graft = attach(tiny.with_head("bert"), "lora(rank=2) + head(classes=7)")
    graft.save(tmp_path)
    again = load(tiny.with_head("bert", num_labels=4), tmp_path)
    assert torch.equal(tiny.outputs(again.model), tiny.outputs(graft.model))


def test_no_folder(tmp_path):
    refused(tmp_path / "none", "does not exist", "none")
    refused(tmp_path, "neither graft.json nor adapter_config.json")


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        attach(tiny.bare("bert"), METHOD).save(tmp_path / "file")


def test_missing_files(folder):
    (folder / "graft.safetensors").unlink()
    refused(folder, "graft.safetensors is missing")


@pytest.mark.parametrize("file", ["graft.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 40, -8])
def test_truncated_tensors(folder, file, kept):
    path = folder / file
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, file, "broken or cut short")


def test_missing_tensor(folder):
    change_tensors(folder, "graft.safetensors", lambda t: t.pop("head_default.output.bias"))
    refused(folder, "graft.safetensors lacks 'head_default.output.bias'")


def test_tensor_that_the_description_leaves_out(folder):
    tensors = json.loads((folder / "graft.json").read_text())["tensors"]
    tensors.pop("head_default.output.bias")
    describe(folder, tensors=tensors)
    refused(folder, "graft.safetensors contains 'head_default.output.bias', which graft.json does not name")


def test_unexpected_tensor(folder):
    tensors = json.loads((folder / "graft.json").read_text())["tensors"]
    tensors["pooler.dense.bias"] = tensors["head_default.output.bias"]
    describe(folder, tensors=tensors)
    refused(folder, "unexpected pooler.dense.bias", "missing nothing")


def test_misshapen_tensor(folder):
    def cut(tensors):
        tensors["head_default.output.bias"] = tensors["head_default.output.bias"][:-1].clone()

    change_tensors(folder, "graft.safetensors", cut)
    refused(folder, "head_default.output.bias", "(2,)", "(3,)")


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "../graft.safetensors", "graft.safetensors/../x", "adapter_config.json"]
)
def test_other_file_names(folder, file):
    tensors = json.loads((folder / "graft.json").read_text())["tensors"]
    tensors["head_default.output.bias"]["file"] = file
    describe(folder, tensors=tensors)
    refused(folder, "not part of a graft", file)


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"format": 1'])
def test_broken_description(folder, text):
    (folder / "graft.json").write_text(text)
    refused(folder, "graft.json", "cannot be read")


@pytest.mark.parametrize(
    "text,says",
    [("[]", "a list"), ("3", "a number"), ("null", "null"), ("{}", "not the description of a graft")],
)
def test_a_description_of_something_else(folder, text, says):
    (folder / "graft.json").write_text(text)
    refused(folder, "graft.json", says)


@pytest.mark.parametrize("format", [2, "1", None])
def test_another_format(folder, format):
    describe(folder, format=format)
    refused(folder, f"format {format!r}", "Update graftkit")


@pytest.mark.parametrize(
    "key,value",
    [("method", 3), ("tensors", []), ("tensors", {"x": 1}), ("tensors", {"x": {"file": 1, "key": 2}}), ("fingerprint", None)],
)  # fmt: skip
def test_fields_of_another_type(folder, key, value):
    describe(folder, **{key: value})
    refused(folder, key, "missing or invalid")


@pytest.mark.parametrize(
    "method", ["__import__('os').system('false')", "lora(rank=2", "lora(rank=-1)", "lorra()"]
)
def test_a_method_that_is_none(folder, method):
    describe(folder, method=method)
    refused(folder, "method" if method != "lora(rank=-1)" else "rank")


@pytest.mark.parametrize(
    "text", ["lora() + norms()", "lora() + unfreeze('blocks[-1:]')", "ia3() + bitfit()", "lora() + ia3()"]
)
def test_no_adapter_is_written_where_it_would_be_a_part_only(text, tmp_path):
    graft = shaken(tiny.bare("bert"), text)
    graft.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert torch.equal(tiny.outputs(load(tiny.bare("bert"), tmp_path).model), tiny.outputs(graft.model))


def test_a_graft_that_was_saved_when_options_had_other_names(tmp_path):
    old = shaken(
        tiny.bare("bert"), "lora(rank=2, use_rslora=True, rank_pattern={'q': 4}, init='gaussian') + ia3()"
    )
    old.save(tmp_path / "old")
    told = json.loads((tmp_path / "old" / "graft.json").read_text())["method"]
    was = told.replace("use_rslora", "stabilised").replace("rank_pattern", "ranks").replace("init=", "start=")
    assert was.count("stabilised") == was.count("ranks") == was.count("start") == 1
    describe(tmp_path / "old", method=was)
    again = load(tiny.bare("bert"), tmp_path / "old")
    assert again.method == old.method
    assert torch.equal(tiny.outputs(again.model), tiny.outputs(old.model))
