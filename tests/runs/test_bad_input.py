"""Mistakes that users make: each gives one clear message, exit status 1, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import FAST, make_rows, tune_words, write_csv


@pytest.fixture
def refused(command, tiny_bert, rows_folder, tmp_path):
    """`refused(*told, key=...)`: tune with these options must fail with all of `told` in one message, and leave no run."""

    def check(*told: str, settings: tuple[str, ...] = (), **options: object) -> str:
        given = {
            "model": tiny_bert, "task": "classify", "train": rows_folder / "train.csv",
            "eval": rows_folder / "eval.csv", "method": "lora(rank=2) + head()", "out": tmp_path / "run", **options,
        }  # fmt: skip
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        done = command("tune", *words, *FAST, "train.steps=2", *settings)
        assert done.status == 1
        assert done.err.startswith("error: ") and "Result" not in done.out
        assert done.err.count("\n") == 1, "one message"
        for part in told:
            assert part in done.err, done.err
        assert not Path(given["out"]).exists(), "nothing may be left"
        return done.err

    return check


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- data


def test_missing_file(refused, rows_folder):
    refused("trian.csv does not exist", "Did you mean 'train.csv'?", train=rows_folder / "trian.csv")
    refused("evil.csv does not exist", "Did you mean 'eval.csv'?", eval=rows_folder / "evil.csv")


def test_a_folder_where_a_file_should_be(refused, rows_folder):
    refused("is a folder where a file should be", "train.csv", train=rows_folder)


def test_wrong_column(refused):
    refused(
        "'lable' is not in",
        "columns: text, label",
        "Did you mean 'label'?",
        settings=("data.columns={label: lable}",),
    )
    refused("'tekst'", "Did you mean 'text'?", settings=("data.columns={tekst: text}",))


def test_no_column_that_fits(refused, tmp_path):
    rows = [{"one": f"words {i}", "two": f"other words {i}", "three": i % 2} for i in range(20)]
    refused(
        "could be 'one' or 'two'", "data.columns=", train=write_csv(tmp_path / "t.csv", rows), eval="none"
    )


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_empty_file(refused, tmp_path, content):
    refused("t.csv", "empty", train=written(tmp_path / "t.csv", content))


def test_only_a_header(refused, tmp_path):
    refused("t.csv has no rows", "columns: text, label", train=written(tmp_path / "t.csv", "text,label\n"))


@pytest.mark.parametrize(
    ("row", "column"), [(",fruit", "text"), ("the plum,", "label"), ('"  ",fruit', "text")]
)
def test_an_empty_text_or_label(refused, command, tiny_bert, rows_folder, tmp_path, row, column):
    good = [f"{r['text']},{r['label']}" for r in make_rows(20)]
    path = written(tmp_path / "t.csv", "\n".join(["text,label", *good[:9], row, *good[9:]]) + "\n")
    refused("t.csv, line 11", f"column '{column}' is empty", "data.skip_bad=true", train=path)
    words = tune_words(
        tiny_bert, rows_folder, tmp_path / "ok", "train.steps=2", "data.skip_bad=true", "--train", str(path)
    )
    done = command(*words, "--json")
    assert done.status == 0 and "1 bad rows" in done.err and "line 11" in done.err
    assert json.loads(done.out)["rows_skipped"] == 1
    assert "20 training rows" in (tmp_path / "ok" / "README.md").read_text()
    assert "1 bad rows were skipped" in (tmp_path / "ok" / "README.md").read_text()


def test_one_class_only(refused, tmp_path):
    path = write_csv(tmp_path / "t.csv", [{"text": f"plum {i}", "label": "fruit"} for i in range(9)])
    refused("only one class ('fruit')", "data.columns={label: ...}", train=path)


def test_a_label_that_is_none(refused, tmp_path):
    path = write_csv(tmp_path / "t.csv", [{"text": f"plum {i}", "label": f"kind {i}"} for i in range(60)])
    refused("60 different values in 60 rows", "data.columns={label: ...}", train=path)


def test_a_label_in_eval_that_training_never_had(refused, tmp_path):
    path = write_csv(tmp_path / "e.csv", [*make_rows(4), {"text": "a cat", "label": "tol"}])
    refused("e.csv, line 6", "'tol'", "fruit, tool", "Did you mean 'tool'?", eval=path)


def test_not_utf8(refused, command, tiny_bert, rows_folder, tmp_path):
    rows = "text,label\n" + "".join(
        f"我的卡丢了{i} {r['text']},{r['label']}\n" for i, r in enumerate(make_rows(20))
    )
    path = written(tmp_path / "t.csv", rows.encode("gb18030"))
    refused("byte 0xce", "line 2", "data.encoding=gb18030", train=path, eval="none")
    refused(
        "data.encoding='gb1803'", "Did you mean 'gb18030'?", train=path, settings=("data.encoding=gb1803",)
    )
    words = tune_words(tiny_bert, rows_folder, tmp_path / "ok", "train.steps=2", "data.encoding=gb18030")
    assert command(*words, "--train", path, "--eval", "none").status == 0


def test_broken_json_line(refused, tmp_path):
    lines = [json.dumps(row) for row in make_rows(6)]
    lines[3] = lines[3][:-4]
    refused(
        "t.jsonl, line 4", "not JSON", "data.skip_bad", train=written(tmp_path / "t.jsonl", "\n".join(lines))
    )


def test_a_suffix_that_is_unknown(refused, tmp_path):
    refused("'.xlsx'", ".csv", train=written(tmp_path / "t.xlsx", "PK"))


# --- model


def test_model_that_is_not_there(refused, tiny_bert, tmp_path):
    refused("does not exist", "Did you mean 'tiny-bert'?", model=tiny_bert.parent / "tiny-brt")
    refused("is a file", "config.json", model=written(tmp_path / "model.safetensors", "x"))
    refused("'no_such_package'", "Install", model="no_such_package:get")
    refused("json has no 'lods'", "Did you mean 'loads'?", model="json:lods")


def test_hub_id_while_offline(refused):
    refused("'google/no-such-bert'", "HF_HUB_OFFLINE", "local model folder", model="google/no-such-bert")


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("tokenizer*", ["has no tokenizer", "tokenizer.json"]),
        ("*.safetensors", ["has no weights", "safetensors"]),
        ("config.json", ["has no config.json"]),
    ],
)
def test_model_folder_that_lacks_a_part(refused, tiny_bert, tmp_path, missing, told):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    for path in folder.glob(missing):
        path.unlink()
    refused(*told, model=folder)


def test_weights_that_are_a_pickle(refused, tiny_bert, tmp_path):
    import torch
    from transformers import BertModel

    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "attacked"), "w"))

    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save(
        {**BertModel.from_pretrained(tiny_bert).state_dict(), "x": Attack()}, folder / "pytorch_model.bin"
    )
    refused("pickle", "pytorch_model.bin", "save_pretrained", model=folder)
    assert not (tmp_path / "attacked").exists()


def test_broken_config_and_weights(refused, tiny_bert, tmp_path):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 5, 200, len(whole) - 1000):
        (folder / "model.safetensors").write_bytes(whole[:length])
        refused(str(folder), model=folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text('{"model_type": "bert", ')
    refused("config.json cannot be read: it is cut short", model=folder)
    (folder / "config.json").write_text('{"model_type": "no_such_architecture"}')
    refused("no_such_architecture", model=folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 133466304\n"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"]
)
def test_a_model_whose_files_are_pointers_or_empty(refused, tiny_bert, tmp_path, name):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    (folder / name).write_text(POINTER)
    refused(str(folder / name), f"is a Git LFS pointer of {len(POINTER)} bytes", "git lfs pull", model=folder)
    (folder / name).write_text("")
    refused(str(folder / name), "is empty", "download it again", model=folder)


def test_a_model_whose_files_are_cut_short(refused, tiny_bert, tmp_path):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size - 1000)
    refused(
        str(weights), f"is cut short ({size - 1000:,} of {size:,} bytes)", "download it again", model=folder
    )
    os.truncate(weights, 200)
    refused(str(weights), "is cut short (200 of ", model=folder)
    shutil.copy(tiny_bert / "model.safetensors", weights)
    os.truncate(folder / "tokenizer.json", 100)
    refused(str(folder / "tokenizer.json"), "is cut short after 100 bytes", model=folder)


def test_a_model_that_lacks_one_of_its_weights_files(refused, tiny_bert, tmp_path):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("lacks model-00002-of-00002.safetensors", "model.safetensors.index.json", model=folder)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("vit", "no image processor (preprocessor_config.json)"),
        ("wav2vec2", "no feature extractor"),
        ("bert", "no tokenizer"),
    ],
)
def test_a_model_without_a_processor(refused, tiny_bert, tmp_path, kind, told):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    for path in [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
        path.unlink()
    refused(told, "from_pretrained(ORIGINAL)", model=folder)


def test_rows_that_are_a_pointer(refused, tmp_path):
    for name in ("t.csv", "t.parquet", "t.jsonl"):
        refused(name, "is a Git LFS pointer", "git lfs pull", train=written(tmp_path / name, POINTER))


def test_a_graft_whose_files_are_pointers(command, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("graft.json", "adapter_model.safetensors"):
        whole = (folder / "graft" / name).read_bytes()
        (folder / "graft" / name).write_text(POINTER)
        done = command("predict", folder, "a plum")
        assert done.status == 1 and name in done.err and "git lfs pull" in done.err
        (folder / "graft" / name).write_bytes(whole)


def test_weights_of_another_shape(refused, tiny_bert, tmp_path):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    refused("lack", "config.json", model=folder)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    refused(str(folder), model=folder)


def test_a_model_without_tokenizer_from_a_function(refused, tmp_path, monkeypatch):
    written(
        tmp_path / "made_model.py",
        "import torch\ndef make():\n    return torch.nn.Sequential(*map(torch.nn.Linear, (3, 3), (3, 3)))\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    refused("no tokenizer", model="made_model:make", method="full() + head(pooling='own')")


def test_a_model_that_is_a_single_layer_has_no_head_to_replace(refused, tmp_path, monkeypatch):
    written(tmp_path / "lone_model.py", "import torch\ndef make():\n    return torch.nn.Linear(3, 3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused(
        "a single Linear, which cannot be replaced", model="lone_model:make", method="head(pooling='own')"
    )


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("json:loads", "calling loads() without arguments failed"),
        ("json:decoder", "is a module, not a function"),
        (":x", "cannot be imported"),
        (".x:y", "cannot be imported"),
        ("os.path:join", "calling join() without arguments failed"),
    ],
)
def test_a_function_that_makes_no_model(refused, model, told):
    refused(f"model '{model}'", told, model=model)


def test_roberta_counts_positions_behind_the_padding(refused, command, tiny_bert, rows_folder, tmp_path):
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert, model_max_length=1000)
    model = RobertaModel(
        RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=34, pad_token_id=1, type_vocab_size=2,
        )
    )  # fmt: skip
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    model.save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    refused("33", "32 tokens", model=tmp_path / "roberta", settings=("data.max_length=33",))
    path = write_csv(tmp_path / "t.csv", [*make_rows(20), {"text": "the plum " * 40, "label": "fruit"}])
    words = tune_words(tmp_path / "roberta", rows_folder, tmp_path / "run", "train.steps=2", method="head()")
    done = command(*words, "--train", path)
    assert done.status == 0 and "longer than 32 tokens" in done.out


def test_a_run_or_an_adapter_instead_of_a_model(refused, finished):
    refused("run of graftkit", model=finished)
    refused("adapter", model=finished / "graft")


# --- method


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("lorra() + head()", ["'lorra'", "Did you mean 'lora'?"]),
        ("lora(rnak=8)", ["'rnak'", "Did you mean 'rank'?"]),
        ("lora(rank=0)", ["rank is 0", "at least 1"]),
        ("lora(rank=-3)", ["rank is -3", "at least 1"]),
        ("lora(lr=-0.1)", ["lr is -0.1", "above 0"]),
        ("lora(sites='quary')", ["'quary' matches nothing", "query", "Did you mean 'query'?"]),
        ("lora(sites='blocks[-2:')", ["blocks[-2:]"]),
        ("unfreeze('blocks[7]')", ["matches nothing", "blocks[0] to blocks[2]"]),
        ("unfreeze('re:nothing.*')", ["matches nothing", "attention"]),
        ("lora(sites='re:(')", ["regular expression"]),
        ("lora(sites='norms')", ["none of them are weights that lora", "LayerNorm"]),
        ("head(hidden=-1)", ["hidden is -1"]),
        ("head(classes=3)", ["head(classes=3)", "2 labels", "leave classes out"]),
        ("head(classes=1, pooling='mean')", ["head(classes=1)", "2 labels"]),
        ("head(pooling='tokens')", ["'tokens'", "needs one for each row"]),
        ("lora(rank=999999999999)", ["the rank at", "can use 32 at most"]),
    ],
)
def test_method(refused, method, told):
    refused(*told, method=method)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.lr=-1", ["train.lr", "-1"]),
        ("train.lrr=1", ["'train.lrr'", "Did you mean 'train.lr'?"]),
        ("data.max_length=999", ["data.max_length is 999", "64 tokens"]),
        ("data.max_length=1", ["data.max_length", "1"]),
        ("seed=4294967296", ["seed", "4294967296"]),
        ("train.early_stopping=0", ["train.early_stopping"]),
    ],
)
def test_settings(refused, setting, told):
    refused(*told, settings=(setting,))


@pytest.mark.slow
def test_a_text_longer_than_the_model_takes_is_truncated_counted_and_reported(
    command, tiny_bert, rows_folder, tmp_path
):
    long = [{"text": " ".join(["the plum"] * 40), "label": "fruit"}, {"text": "plum " * 62, "label": "fruit"}]
    path = write_csv(tmp_path / "t.csv", [*make_rows(20), *long])
    done = command(
        *tune_words(tiny_bert, rows_folder, tmp_path / "run", "train.steps=2", "--json", "--train", str(path))
    )
    assert done.status == 0 and "1 of 62 rows are longer than 64 tokens and were truncated" in done.err
    assert json.loads(done.out)["rows_truncated"] == 1
    found = json.loads(command("evaluate", tmp_path / "run", "--data", path, "--json").out)
    assert found["truncated"] == 1
    assert command("predict", tmp_path / "run", "the plum " * 90).status == 0
