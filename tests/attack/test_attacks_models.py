"""Hostile and broken models, grafts and adapters."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import Attack, edited, folder_instead, linked, pipe, spoiled

CONFIG, WEIGHTS, INDEX = "model/config.json", "model/model.safetensors", "model/model.safetensors.index.json"
GRAFT, THEIRS = (
    "run/graft/graft.json",
    "run/graft/adapter_model.safetensors",
)
PREDICT = "predict run the"
MERGE = "merge run/graft run/graft --out merged"
EXPORT = "export run --to out"
INSPECT = "inspect model"
PLAN = "plan --model model --task classify --train train.csv --method head()"
DEEP = "[" * 100_000 + "]" * 100_000


def index(*names: object) -> Callable[[Path], object]:
    """Moves the weights to `part.safetensors`, and writes an index that names it and then `names`."""

    def write(path: Path) -> None:
        from safetensors import safe_open

        os.rename(path.with_name("model.safetensors"), path.with_name("part.safetensors"))
        with safe_open(path.with_name("part.safetensors"), "pt") as file:
            places: dict[str, object] = dict.fromkeys(file.keys(), "part.safetensors")
        places |= dict(zip(list(places)[: len(names)], names))
        path.write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return write


def twice(path: Path) -> None:
    """Moves the weights to `part.safetensors`, with a copy of them, and writes an index that names both."""
    index("other.safetensors")(path)
    shutil.copy(path.with_name("part.safetensors"), path.with_name("other.safetensors"))


def named(name: object, command: str = PLAN) -> Attack:
    says = "weight_map names .* read from .safetensors files in this folder only"
    return Attack(f"index-names-{name}", says, command, files={INDEX: index(name)})


def impossible(command: str = INSPECT, **changes: object) -> Attack:
    key, value = next(iter(changes.items()))
    return Attack(
        f"config-{key}={value}",
        rf"config\.json.*{key}",
        command,
        files={CONFIG: edited(**changes)},
        seconds=4,
    )


def irregular(path: str, how: Callable[[Path], object], command: str) -> Attack:
    name = f"{path}-is-a-{getattr(how, '__name__', 'link')}"
    return Attack(name, rf"{path}.*not a regular file", command, files={path: how}, seconds=4)


def other_json(path: str, text: str, says: str, command: str = INSPECT) -> Attack:
    return Attack(f"{path}-{text[:12]}", rf"{path}.*{says}", command, files={path: text}, seconds=4)


NAMES = [
    named("weights.bin"),
    named("../train.csv", INSPECT),
    named("/etc/passwd"),
    named("/dev/zero"),
    named("../model/part.safetensors"),
    named(3),
    named(None),
    Attack("index-of-a-missing-file", "lacks other.safetensors", PLAN, files={INDEX: index("other.safetensors")}),
    Attack(
        "index-of-an-empty-file", "empty.safetensors is empty", PLAN,
        files={INDEX: index("empty.safetensors"), "model/empty.safetensors": ""},
    ),
    Attack(
        "index-of-a-folder", "sub.safetensors is a folder", PLAN,
        files={INDEX: index("sub.safetensors"), "model/sub.safetensors": folder_instead},
    ),
    Attack("index-of-a-weight-in-two-files", "is in other.safetensors and in part.safetensors", PLAN, files={INDEX: twice}),
    Attack(
        "index-of-a-weight-that-is-elsewhere", "weight_map names other.safetensors for .* not in it", PLAN,
        files={INDEX: index("other.safetensors"), "model/other.safetensors": b"\2\0\0\0\0\0\0\0{}"},
    ),
    Attack("index-without-weights", "weight_map is missing", PLAN, files={INDEX: "{}", WEIGHTS: None, "model/x.safetensors": b"\2\0\0\0\0\0\0\0{}"}),
    Attack("index-beside-the-weights", "weight_map names 'x.bin'", PLAN, files={INDEX: '{"weight_map": {"x": "x.bin"}}'}),
    Attack("index-beside-the-weights-of-a-good-name", "", PLAN, status=0, files={INDEX: '{"weight_map": {"x": "x.safetensors"}}'}),
    Attack("adapter-in-the-model", "adapter_config.json.*beside the model", files={"model/adapter_config.json": "{}"}),
    Attack("weights-of-another-name", "neither model.safetensors nor", files={WEIGHTS: lambda path: path.rename(path.with_name("y.safetensors"))}),
    Attack("weights-missing", "has no weights", files={WEIGHTS: None}),
    Attack("code-of-a-repository", "_attn_implementation .* code of others", files={CONFIG: edited(_attn_implementation="a/b:c")}),
    Attack("weights-for-timm", "checkpoint_path .* other weights", files={CONFIG: edited(model_args={"checkpoint_path": "x.bin"})}),
    Attack("graft-names-a-file", "not part of a graft", PREDICT, files={GRAFT: edited(tensors={"x": {"file": "../x.bin", "key": "x"}})}),
    Attack("weights-behind-a-link", "", PLAN, status=0, files={  # as in the cache of the hub
        "blobs/x": b"", "model/model.safetensors": lambda path: (os.rename(path, path.parent / "../blobs/x"), path.symlink_to("../blobs/x")),
    }),
]  # fmt: skip

SIZES = [
    impossible(num_hidden_layers=10**9),
    impossible(PLAN, num_hidden_layers=10**9),
    impossible("tune" + PLAN[4:] + " --out out", num_hidden_layers=10**9),
    impossible(num_hidden_layers=1500),
    impossible(hidden_size=10**9),
    impossible(hidden_size=2**20, num_attention_heads=1),
    impossible("tune" + PLAN[4:] + " --out out", hidden_size=2**20, num_attention_heads=1),
    impossible(vocab_size=10**12),
    impossible(vocab_size=5_000_000),
    impossible(max_position_embeddings=10**15),
    impossible(num_labels=10**9),
]

INPUTS = [
    other_json("model/preprocessor_config.json", f'{{"{key}": {value}}}', says)
    for key, value, says in (
        ("size", '{"height": 200000, "width": 32}', "size.height is 200000, more than any model takes"),
        ("crop_size", "1000000000", "crop_size is 1000000000, more than"),
        ("num_mel_bins", "10000000", "num_mel_bins is 10000000, more than"),
        ("sampling_rate", "1e300", "sampling_rate is 1e.300, more than"),
        ("max_length", "1000000000", "max_length is 1000000000, more than"),
        ("image_mean", "[NaN, 0, 0]", "image_mean is NaN"),
    )
]
SPECIAL = [
    *(irregular(path, pipe, INSPECT) for path in (
        CONFIG, WEIGHTS, "model/tokenizer.json", "model/tokenizer_config.json", "model/generation_config.json",
        "model/chat_template.jinja", "model/sentence_bert_config.json", "model/1_Pooling/config.json",
    )),
    irregular(WEIGHTS, linked("/dev/zero"), PLAN),
    irregular(CONFIG, linked("/dev/zero"), PLAN),
    irregular(WEIGHTS, folder_instead, PLAN),
    irregular(CONFIG, folder_instead, PLAN),
    irregular(GRAFT, pipe, PREDICT),
    irregular(THEIRS, pipe, MERGE),
    irregular(THEIRS, linked("/dev/zero"), EXPORT),
    irregular("run/graft/adapter_config.json", pipe, MERGE),
    irregular("run/graft/confidence.safetensors", pipe, PREDICT),
    irregular("run/graft/confidence.safetensors", linked("/dev/zero"), PREDICT),
    Attack("weights-behind-a-link-to-nothing", "link that leads nowhere", PLAN, files={WEIGHTS: linked("nothing")}),
]  # fmt: skip

BROKEN = [
    other_json(CONFIG, "[]", "a list, not an object"),
    other_json(CONFIG, DEEP, "nested too deeply"),
    other_json(CONFIG, '{"a": \xff}', "not valid JSON"),
    *(impossible(**{key: value}) for key, value in (
        ("hidden_size", "32"), ("hidden_size", None), ("hidden_size", -32), ("hidden_size", 3.5), ("hidden_size", []),
        ("num_attention_heads", "4"), ("layer_norm_eps", float("nan")), ("layer_norm_eps", "x"), ("model_type", []),
        ("id2label", [1]), ("id2label", {"a": "b"}),
    )),
    Attack("config-of-no-width", "config.json describes it: ZeroDivisionError", INSPECT, files={CONFIG: edited(hidden_size=0)}),
    other_json("model/1_Pooling/config.json", "[]", "a list, not an object"),
    other_json("model/1_Pooling/config.json", "{'a'}", "not valid JSON"),
    other_json("model/1_Pooling/config.json", '{"pooling_mode_cls_token": "no"}', "pooling_mode_cls_token is 'no'"),
    other_json("model/sentence_bert_config.json", "3", "a number, not an object"),
    other_json("model/sentence_bert_config.json", '{"max_seq_length": "x"}', "max_seq_length is 'x'"),
    other_json("model/preprocessor_config.json", "[]", "a list, not an object"),
    other_json("model/tokenizer_config.json", DEEP, "nested too deeply"),
    other_json("model/special_tokens_map.json", "[]", "a list, not an object"),
    Attack("tokenizer.json-[]", "tokenizer.json.* cannot be read", INSPECT, files={"model/tokenizer.json": "[]"}),
    other_json(GRAFT, DEEP, "nested too deeply", PREDICT),
    *(
        Attack(f"graft-{key}={value}", f"graft.json: the entry '{key}' is missing or invalid", PREDICT, files={GRAFT: edited(**{key: value})})
        for key, value in (
            ("labels", {"a": 1}), ("labels", [1, 2]), ("max_length", "x"), ("max_length", -1), ("method", ...), ("missing", [[]]),
            ("precision", "int1"), ("columns", []), ("task", 3), ("base_values", {"a": ["x"]}),
        )
    ),
    Attack("graft-without-labels", "does not describe a run", PREDICT, files={GRAFT: edited(labels=...)}),
    Attack("graft-with-a-label-less", "graft.json: labels and method do not belong together", PREDICT, files={GRAFT: edited(labels=["tool"])}),
    Attack("graft-with-a-label-more", "graft.json: labels and method do not belong together", PREDICT, files={GRAFT: edited(labels=["a", "b", "c"])}),
]  # fmt: skip


B = 10**9
ADAPTER = "run/graft/adapter_config.json"
NO_DESCRIPTION = {GRAFT: None}  # so that the folder is one of PEFT's


def method(text: str, says: str, command: str = "plan") -> Attack:
    return Attack(
        f"{command}-{text[:40]}",
        says,
        f"{command} --model model --task classify --train train.csv --method {text} --out out",
        seconds=5,
    )


def grafted(name: str, says: str, command: str = PREDICT, **changes: object) -> Attack:
    return Attack(name, says, command, files={GRAFT: edited(**changes)}, seconds=5)


def adapter(says: str, command: str = "merge run/graft run/graft --out merged", **changes: object) -> Attack:
    key, value = next(iter(changes.items()))
    files = {**NO_DESCRIPTION, ADAPTER: edited(**changes)}
    return Attack(
        f"adapter-{key}={str(value)[:20]}", rf"adapter_config\.json.*{says}", command, files=files, seconds=5
    )


TOO_MANY = "would add more than"
OPTIONS = [
    *(method(f"{name}(rank={B})", r"the rank at '.*query.weight' is 1,000,000,000") for name in (
        "lora", "loha", "lokr", "pissa",
    )),
    method(f"lora(rank={B})", "the rank at '.*query.weight' is 1,000,000,000", "tune"),
    method("vera(rank=10000000)", "the rank at .* is 10,000,000", "tune"),
    method(f"lora(rank_pattern={{'blocks[0]':{B}}})", "the rank at '.*layer.0"),
    method(f"adalora(rank={B})", "the rank at"),
    *(method(f"{name}={B})", TOO_MANY, "tune") for name in (
        "adapter(bottleneck", "prefix(tokens", "prefix(hidden", "prompt(tokens", "ptuning(hidden", "head(hidden",
    )),
    method("lora(alpha=1e308)", "alpha is larger than any number"),
    method(f"lora(alpha=1{'0' * 300})", "alpha is .*too large"),
    method("adapter(scale=1e308)", "scale is larger than any number"),
    method("lora(sites='re:(.*.*.*.*)*x')", "matches nothing"),
    method("lora(sites='re:(?:(?:a{1000}){1000}){1000}')", "numbers of repeats"),
    method(f"lora(sites='re:{'(' * 3000}')", "regular expression is invalid"),
    grafted("graft-of-a-huge-rank", "the rank at '.*query.weight'", method=f"lora(rank={B}) + head(classes=2)"),
    grafted("graft-of-a-huge-vera", "the rank at", method=f"vera(rank={B}) + head(classes=2)"),
    grafted("graft-of-a-huge-head", TOO_MANY, method=f"lora(rank=4) + head(classes=2, hidden={B})"),
    grafted("graft-exported-of-a-huge-rank", "the rank at", EXPORT, method=f"lora(rank={B}) + head(classes=2)"),
    grafted("graft-of-a-slow-pattern", "numbers of repeats", method="lora(rank=4, sites='re:((a{999}){999}){999}') + head(classes=2)"),
    grafted("graft-that-imports", "PEFT would import", method="peft('lora', {'megatron_config': {'a': 1}, 'megatron_core': 'this'})"),
    grafted("graft-that-overflows", "gives NaN instead of numbers", method="lora(rank=4, alpha=1e38) + head(classes=2)"),
    Attack("merge-to-a-huge-rank", "", MERGE + f" --how svd --rank {B}", status=0, seconds=5),
    adapter("r is '4'", r="4"),
    adapter("r is 0", r=0),
    adapter("lora_alpha is None", lora_alpha=None),
    adapter("lora_alpha is \\[1\\]", lora_alpha=[1]),
    adapter("peft_type is 3", peft_type=3),
    adapter("peft_type is '/x/y.py'", peft_type="/x/y.py"),
    adapter("rank_pattern", rank_pattern=[1]),
    adapter("rank_pattern has .* numbers of repeats", rank_pattern={"((a{999}){999}){999}": 4}),
    adapter("alpha_pattern has .* invalid", alpha_pattern={"(": 4}),
    adapter("modules_to_save", modules_to_save=3),
    adapter("target_parameters", target_parameters=[[]]),
    Attack("adapter-is-a-list", "adapter_config.json contains a list", MERGE, files={**NO_DESCRIPTION, ADAPTER: "[]"}),
    Attack("adapter-of-a-huge-rank", "rank 50000000", MERGE, files={**NO_DESCRIPTION, ADAPTER: edited(r=50_000_000)}, seconds=5),
]  # fmt: skip


def _endless(tensor):
    tensor.view(-1)[0] = float("inf")
    return tensor


def _nothing(tensor):
    return tensor * float("nan")


def _one_nothing(tensor):
    tensor.view(-1)[1] = float("nan")  # not one of the values that tell whether the weights are others
    return tensor


def _stranger():
    import torch

    return torch.ones(2, 2)


VALUES = [
    *(
        Attack(f"{says[:3]}-{command[:8]}", f"adapter_model.safetensors: '.*lora_B.*' contains {says} values", command, files={
            THEIRS: spoiled(lora_B=how)
        })
        for command in (PREDICT, MERGE, EXPORT)
        for how, says in ((_endless, "infinite"), (_nothing, "NaN"))
    ),
    Attack("unknown-tensor", "adapter_model.safetensors contains '.*stranger.weight'", PREDICT, files={THEIRS: spoiled(_=_stranger)}),
    Attack("unknown-tensor-merged", "adapter_model.safetensors contains '.*stranger.weight'", MERGE, files={THEIRS: spoiled(_=_stranger)}),
    Attack("nan-in-the-model", "gives NaN instead of numbers", PREDICT + " --model model", files={WEIGHTS: spoiled(**{"value.weight": _one_nothing})}),
]  # fmt: skip
ATTACKS = [*NAMES, *SIZES, *INPUTS, *SPECIAL, *BROKEN, *OPTIONS, *VALUES]


@pytest.mark.sampled(16)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack(attack, command, tmp_path, tiny_bert, rows_folder, finished):
    attack.place(tmp_path, tiny_bert, rows_folder, finished)
    attack.check(command, tmp_path)


READING = (
    "tune --model model --task classify --train train.csv --method lora(rank=2)+head() --out out train.steps=2 data.eval=null",
    PLAN, INSPECT, "data check model train.csv", PREDICT, "evaluate run --data eval.csv", EXPORT, MERGE,
)  # fmt: skip


@pytest.mark.parametrize("words", READING, ids=lambda words: words.split(" ")[0])
def test_nothing_is_unpickled(words, command, tmp_path, tiny_bert, rows_folder, finished, monkeypatch):
    """With pickles at every place that a library looks at beside the files that are read."""
    import pickle

    import torch

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("something was unpickled")

    if words == READING[3]:
        words = "data check recipe.yaml"
    recipe = "model: model\ntask: classify\nmethod: head()\ndata: {train: train.csv}\n"
    pickles = (
        "model/pytorch_model.bin", "model/adapter_model.bin", "model/training_args.bin", "run/graft/adapter_model.bin",
        "run/graft/graft.bin", "run/checkpoints/optimizer.pt",
    )  # fmt: skip
    files = {
        name: pickle.dumps(print) for name in pickles if "run" in words.split() or not name.startswith("run")
    }
    Attack("", "", words, files={**files, "recipe.yaml": recipe}).place(
        tmp_path, tiny_bert, rows_folder, finished
    )
    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    done = command(*words.split(" "))
    assert done.status == 0, done.err
