"""Hostile and broken recipes, tables and commands."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import PLAN, Attack

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


def repeated(text: str, rows: int) -> Callable[[Path], None]:
    """Make a Parquet or Feather file of a few kilobytes: one text for all rows, which is stored once."""

    def make(path: Path) -> None:
        import numpy as np
        import pyarrow
        from pyarrow import feather, parquet

        column = pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int8), [text])
        table = pyarrow.table({"text": column, "label": column})
        feather.write_feather(table, path) if path.suffix == ".arrow" else parquet.write_table(table, path)

    return make


def beyond_its_end(path: Path) -> None:
    """An Arrow file with a text whose last byte lies far behind all bytes."""
    import numpy as np
    import pyarrow
    from pyarrow import feather

    feather.write_feather(
        pyarrow.table({"text": ["a", "b"], "label": ["c", "d"]}), path, compression="uncompressed"
    )
    ends, wrong = np.array([0, 1, 2], np.int32).tobytes(), np.array([0, 1, 2**30], np.int32).tobytes()
    assert ends in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(ends, wrong))


HEAD = "model: model\nmethod: head()\ndata: {train: train.csv, eval: eval.csv}\n"
LARGE = 3_000_000


def recipe(name: str, text: str | bytes, says: str, **more) -> Attack:
    content = text if isinstance(text, bytes) or callable(text) else HEAD + text
    return Attack(f"recipe-{name}", says, "plan r.yaml", {"r.yaml": content}, **more)


def setting(name: str, setting: str, says: str) -> Attack:
    return Attack(f"setting-{name}", says, f"{PLAN} {setting}")


def socket_at(path: Path) -> None:
    os.chdir(path.parent)  # its name may be at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


RECIPES = [
    recipe("laughs", LAUGHS, "r.yaml', line 5: aliases such as .a0 are not supported"),
    recipe("merge-alias", "x: &x {seed: 1}\ntrain:\n  <<: *x\n", "line 6: aliases"),
    recipe("deep", "x: " + "[" * 10_000, "line 4: values are nested more than 20 deep"),
    recipe("deep-maps", "x: " + "{a: " * 5_000, "line 4: values are nested more than 20 deep"),
    recipe("deep-block", "x:\n" + "- " * 5_000, "line 5: values are nested more than 20 deep"),
    recipe("many", "x: [" + "1, " * 100_000 + "]", "more than 10,000 values"),
    recipe("large", b"#" * LARGE, "r.yaml' has more than 1,000,000 bytes"),
    recipe("endless", lambda path: path.symlink_to("/dev/zero"), "r.yaml' is a device, not a file"),
    recipe("pipe", os.mkfifo, "r.yaml' is a named pipe, not a file"),
    recipe("socket", socket_at, "r.yaml' is a socket, not a file"),
    recipe("twice", "seed: 1\nout: a\nseed: 2\n", "r.yaml', line 6: the key 'seed' is already on line 4"),
    recipe("section-twice", "train: {lr: 1}\ntrain: {epochs: 1}\n", "line 5: the key 'train' is already"),
    recipe("inner-twice", "train: {lr: 1, lr: 2}\n", "line 4: the key 'lr' is already on line 4"),
    recipe("digits", "seed: " + "9" * 5_000, "line 4: a number has 5,000 digits"),
    recipe("hex", "seed: 0x" + "f" * 5_000, "line 4: a number has 5,002 digits"),
    recipe("base-60", "seed: 1" + ":59" * 100, "seed is .* less than 4294967296"),
    recipe(
        "many-steps", f"train: {{steps: {10**30}}}", "train.steps is 1000.* less than or equal to 1000000000"
    ),
    recipe("many-epochs", "train: {epochs: 1e300}", "train.epochs is 1e.300, but must be less than"),
    recipe("infinity", "train: {lr: .inf}", "train.lr is inf, but must be a finite number"),
    recipe("nan", "train: {weight_decay: .nan}", "train.weight_decay is nan, but must be a finite number"),
    recipe("nul", 'out: "a\\0b"', "r.yaml|the recipe: out is .*NUL character"),
    recipe("nul-inside", 'train: {from: "a\\0b"}', "the recipe: train.from is .*NUL character"),
    recipe("date", "weights: 2024-99-99", "2024-99-99"),
    recipe("set", "out: !!set {a, b}", "out is .* must be a valid string"),
    recipe("binary", "out: !!binary aGFsbG8=", "out is b'hallo', but must be a valid string"),
    recipe("not-int", "seed: !!int x", "line 4: 'x' cannot be read"),
    recipe("tag", "out: !!python/object/apply:os.system [ls]", "not valid YAML"),
    recipe("numbers-as-keys", "1: 2", "unknown key '1'|keys should be strings"),
    recipe("list-as-key", "? [a, b]\n: 1\n", "not valid YAML"),
    recipe("utf-16", HEAD.encode("utf-16"), "not valid YAML"),
    recipe("two-documents", "---\nseed: 1\n", "not valid YAML"),
]

SETTINGS = [
    setting("digits", "seed=" + "9" * 5_000, "setting 'seed=999.*a number has 5,000 digits"),
    setting("twice", 'data.columns={"text":"text","text":"label"}', "the key 'text' is already"),
    setting("deep", "train.lr=" + "[" * 5_000, "setting 'train.lr=.*nested more than 20 deep"),
    setting("deep-key", "a." * 5_000 + "a=1", "a holds values that are nested more than 20 deep"),
    setting("batch", f"train.batch_size={10**20}", "train.batch_size is .* less than or equal"),
    setting("evaluate", f"train.evaluate_every={10**30}", "train.evaluate_every is .*1 to 1,000,000,000"),
    setting("evaluate-epochs", f"train.evaluate_every={'9' * 300}\tepochs", "train.evaluate_every is '999"),
    setting("rank", f"method=lora(rank=0x{'f' * 5_000})", "rank is too large to show, which is too large"),
    setting("rank-large", f"method=lora(rank={10**30})", "rank is 1000.*too large"),
    setting("long-name", f"method={'x' * 50_000}()", "there is no method 'xxx"),
]


def table(name: str, content: str | bytes | Callable, says: str, file: str = "t.csv", **more) -> Attack:
    return Attack(f"table-{name}", says, PLAN.replace("train.csv", file, 1), {file: content}, **more)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


ROW = '{"text": "a b", "label": "x"}\n{"text": "c", "label": "y"}\n'
DEEP, DEEPER = ("[" * depth + "]" * depth for depth in (300, 100_000))

TABLES = [
    table(
        "columns",
        lambda path: path.write_text(",".join(f"c{i}" for i in range(10**6)) + "\n1\n"),
        "t.csv, line 1 .the header.: there are 1,000,000",
    ),
    table(
        "columns-tsv",
        lambda path: path.write_text("\t".join(f"c{i}" for i in range(10**6))),
        "there are 1,000,000 columns",
        "t.tsv",
    ),
    table(
        "columns-json",
        "".join(f'{{"c{i}": 1}}\n' for i in range(3_000)),
        "there are 3,000 columns",
        "t.jsonl",
    ),
    table(
        "long-line",
        "text,label\n" + "a" * 11_000_000 + ",b\n",
        "t.csv, line 2: a value has 11,000,000 characters",
    ),
    table(
        "long-quoted",
        'text,label\n"' + ("a" * 6_000_000 + "\n") * 2 + '",b\n',
        "line 2: a value has 12,000,002 characters",
    ),
    table(
        "long-json",
        ROW + f'{{"text": "{"a" * 11_000_000}", "label": "x"}}',
        "line 3: a value has 11,000,000",
        "t.jsonl",
    ),
    table(
        "long-line-of-nothing", "text,label\n" + "\0" * 11_000_000, "t.csv, line 2: .*characters|zero bytes"
    ),
    table(
        "deep-json",
        f'{{"text": "a", "label": {DEEPER}}}\n',
        "t.jsonl, line 1: .*more than 100 deep",
        "t.jsonl",
    ),
    table(
        "deep-json-300",
        ROW + f'{{"text": {DEEP}, "label": "x"}}\n',
        "line 3: .*more than 100 deep",
        "t.jsonl",
    ),
    table(
        "deep-json-whole",
        f'[{{"text": {DEEPER}}}]',
        "t.json is not JSON that can be read: it is nested",
        "t.json",
    ),
    table(
        "digits-json",
        f'{{"text": "a", "label": {"9" * 5_000}}}',
        "t.jsonl, line 1: not JSON that can be",
        "t.jsonl",
    ),
    table(
        "keys-twice-json",
        ROW + '{"text": "a", "text": "b", "label": "x"}',
        "line 3: .*'text' is given twice",
        "t.jsonl",
    ),
    table("keys-twice-inside", '[{"text": "a", "label": {"b": 1, "b": 2}}]', "'b' is given twice", "t.json"),
    *[
        Attack(f"{kind}-{name}", f"{file} is a .*not a file", command.replace("FILE", file), {file: make})
        for kind, make in (("pipe", os.mkfifo), ("endless", endless), ("socket", socket_at))
        for name, file, command in (
            ("train", "t.csv", PLAN.replace("train.csv", "FILE")),
            ("eval", "t.jsonl", PLAN.replace("eval.csv", "FILE")),
            ("squad", "t.json", "plan --model model --task span --train FILE"),
            ("conll", "t.conll", "plan --model model --task tag --train FILE"),
            ("predict", "t.csv", "predict run --data FILE"),
            ("predict-arrow", "t.arrow", "predict run --data FILE --out a.jsonl"),
        )
    ],
    Attack(
        "pipe-image",
        "a.png is a named pipe",
        "plan --model model --task image_classify --train p",
        {"p/x/a.png": os.mkfifo, "p/y/b.png": b"1"},
    ),
    Attack(
        "endless-image",
        "a.png is a device",
        "plan --model model --task image_classify --train p.csv",
        {"a.png": endless, "p.csv": "image,label\na.png,x\na.png,y\n"},
    ),
]


def damaged(
    name: str, file: str, content: str | bytes, says: str, command: str = "tune --resume run"
) -> Attack:
    """A run that is not finished, one of whose files is broken."""
    files = {f"run/{file}": content}
    if file != "result.json" and "--resume" in command:
        files["run/result.json"] = None
    return Attack(f"run-{name}", says, command, files)


def variables(name: str, says: str, command: str = PLAN, **environment: str) -> Attack:
    return Attack(f"environment-{name}", says, command, environment=environment)


EVALUATE = "evaluate run --data eval.csv"

RUNS = [
    damaged("plan-list", "plan.json", "[1, 2]", "run/plan.json contains a list, not an object"),
    damaged("plan-null", "plan.json", "null", "run/plan.json contains null, not an object"),
    damaged(
        "plan-digests",
        "plan.json",
        '{"rows_sha256": [1]}',
        r"run/plan.json: rows_sha256 is \[1\], but must be digests",
    ),
    damaged(
        "plan-digest",
        "plan.json",
        '{"rows_sha256": {"train": 1}}',
        "rows_sha256 is {'train': 1}, but must be",
    ),
    damaged(
        "plan-samples",
        "plan.json",
        '{"base_values": {"a": ["x"]}}',
        "plan.json: base_values is .*lists of numbers",
    ),
    damaged("plan-binary", "plan.json", b"\xff\xfe\0", "run/plan.json cannot be read"),
    damaged(
        "log-binary",
        "metrics.jsonl",
        b"\x80\x81\n" * 10,
        "run/metrics.jsonl cannot be read .*utf-8.*move it away",
    ),
    damaged("result-list", "result.json", "[]", "run/result.json contains a list, not an object"),
    damaged(
        "result-metrics", "result.json", '{"metrics": [1]}', r"run/result.json: metrics is \[1\], but must be"
    ),
    damaged("recipe-list", "recipe.yaml", "- a", "run/recipe.yaml' must hold keys and values"),
    damaged("recipe-binary", "recipe.yaml", b"\xff\0", "run/recipe.yaml' is not valid YAML"),
    damaged("recipe-type", "recipe.yaml", HEAD + "seed: x\n", "run/recipe.yaml: seed is 'x'"),
    damaged("recipe-predict", "recipe.yaml", "a: [", "run/recipe.yaml' is not valid YAML", EVALUATE),
    damaged(
        "recipe-missing-key",
        "recipe.yaml",
        "model: model\n",
        "run/recipe.yaml: 'data.train' is missing",
        EVALUATE,
    ),
    damaged(
        "result-predict", "result.json", "7", "run/result.json contains a number, not an object", EVALUATE
    ),
    damaged("result-pipe", "result.json", "{", "run/result.json cannot be read", "predict run apple"),
    variables(
        "world-word", "variable WORLD_SIZE is 'x', but must be a whole number of at least 1", WORLD_SIZE="x"
    ),
    variables("world-zero", "variable WORLD_SIZE is '0', but must be", WORLD_SIZE="0"),
    variables("rank-minus", "variable RANK is '-1', but must be a whole number of at least 0", RANK="-1"),
    variables("rank-large", "variable RANK is 5, but WORLD_SIZE is 2", RANK="5", WORLD_SIZE="2"),
    variables("local-rank", "variable LOCAL_RANK is 'x'", LOCAL_RANK="x", RANK="0", WORLD_SIZE="2"),
    variables(
        "no-address", "WORLD_SIZE is 2, but MASTER_ADDR is not set", RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"
    ),
    variables("rank-predict", "variable RANK is 'x'", "predict run apple --json", RANK="x"),
    variables("local-world", "variable LOCAL_WORLD_SIZE is '0'", LOCAL_WORLD_SIZE="0"),
    variables(
        "methods-file",
        "GRAFTKIT_METHODS names 'train.csv', which is not a folder",
        GRAFTKIT_METHODS="train.csv",
    ),
    *[
        Attack(f"own-{name}", says, files={"own/x.py": make}, environment={"GRAFTKIT_METHODS": "own"})
        for name, make, says in (
            ("pipe", os.mkfifo, "own/x.py is a named pipe, not a Python file"),
            ("folder", os.mkdir, "own/x.py cannot be read as a Python file"),
            ("binary", b"\xff", "own/x.py cannot be read as a Python file"),
            ("nul", b"a\0b", "own/x.py.* null bytes"),
            ("deep", "x = " + "(" * 5_000, "own/x.py"),
            ("deep-sum", "x = " + "-" * 50_000 + "1", "own/x.py"),
        )
    ],
]

ATTACKS = [
    Attack(
        "table-parquet-pipe",
        "t.parquet is a named pipe",
        PLAN.replace("train.csv", "t.parquet"),
        {"t.parquet": os.mkfifo},
    ),
    *[
        Attack(
            f"{name}-{command.split()[0]}",
            f"{file} has .* too many for its size",
            command,
            {file: repeated(text, rows)},
        )
        for name, file, text, rows in (
            ("many-rows", "t.parquet", "a", 20_000_000),
            ("long-texts", "t.parquet", "a" * 5_000_000, 1000),
            ("long-texts-of-arrow", "t.arrow", "a" * 5_000_000, 1000),
        )
        for command in (PLAN.replace("train.csv", file), f"predict run --data {file}")
    ],
    *[
        Attack(
            f"arrow-beyond-{command.split()[0]}",
            "t.arrow is not a whole Arrow file",
            command,
            {"t.arrow": beyond_its_end},
        )
        for command in (PLAN.replace("train.csv", "t.arrow"), "predict run --data t.arrow")
    ],
    Attack("table-missing", "nope.csv", "plan --model model --task classify --train nope.csv"),
    *RECIPES,
    *SETTINGS,
    *TABLES,
    *RUNS,
    Attack(
        "text-is-a-table",
        "'test.csv' is the name of a file, not a text.*--data test.csv",
        "predict run test.csv",
    ),
    Attack("text-is-rows", "'data/x.jsonl' is the name of a file", "predict run apple data/x.jsonl"),
    Attack("export-into-run", "run/model' is in the folder of the run", "export run --to run/model"),
    Attack("export-deep-into-run", "in the folder of the run", "export run --to run/graft/a/b"),
    Attack(
        "option-no-value", "'x' is not an option of a task; .*temperature", "predict run apple --option x"
    ),
    Attack("resume-a-recipe", "has no recipe.yaml|does not exist", "tune --resume nope/recipe.yaml"),
]


@pytest.mark.sampled(16)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack(attack, command, tmp_path, tiny_bert, rows_folder, finished, monkeypatch):
    for name, value in attack.environment.items():
        monkeypatch.setenv(name, value)
    attack.place(tmp_path, tiny_bert, rows_folder, finished)
    attack.check(command, tmp_path)
