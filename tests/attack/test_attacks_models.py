"""Hostile and broken models, grafts and adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import Attack, edited, folder_instead, linked, pipe

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
]  # fmt: skip


@pytest.mark.parametrize("attack", [*NAMES, *SIZES, *SPECIAL, *BROKEN], ids=lambda attack: attack.name)
def test_attack(attack, command, tmp_path, tiny_bert, rows_folder, finished):
    attack.place(tmp_path, tiny_bert, rows_folder, finished)
    attack.check(command, tmp_path)
