"""Give damaged input to every reader, and count what is neither read nor refused with a clear error.

    python bench/fuzz.py --minutes 60                 # all readers in turn
    python bench/fuzz.py --minutes 5 --only recipe    # those whose name contains a word

A try damages one file of a valid input: bytes flipped, cut, doubled or inserted; in JSON and YAML also values replaced by
values of other types. Whatever the reader does with it must be a result or a `UserError`, within the time limit and the
memory limit. Anything else is a fault: it is printed once for each place in the code, and its input is kept in `--keep`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]

from conftest import _make_bert, make_rows, write_csv  # noqa: E402
from task_cases import material  # noqa: E402

SECONDS = 10  # for one try; the slowest valid input takes under one
MEMORY = 12 * 2**30  # of address space, torch's included
ROUND = 40  # tries in one process
WORDS = (b"", b"\0", b"\xff\xfe", b"\r", b"\n\n", b",,,", b'"', b"{", b"[", b"null", b"NaN", b"1e999", b"-1", b"9" * 40, b"../",
         "\u202e\u0000\ud7ff\u00e9".encode(), b"\xed\xa0\x80", b"true", b"__class__", b"&a [*a]", b"!!python/name:os", b"%", b"\\u0000")  # fmt: skip
VALUES = (None, True, -1, 0, 1, 2**31, 2**63, 10**40, 0.5, 1e308, float("nan"), "", "x", "\0", "../x", "/dev/zero", [], {}, [[]],
          [None], {"": None}, ["a", 1], {"a": {"b": []}}, "9" * 5000)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A reader of files. `files`: those that are damaged, relative to the folder of valid input; `read`: gets the copy."""

    name: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], Any]


def damaged(raw: bytes, suffix: str, draw: random.Random) -> bytes:
    """Return the bytes with one to four things wrong with them."""
    if suffix in (".json", ".jsonl") and draw.random() < 0.6:
        try:
            return _other_values(raw, suffix, draw)
        except ValueError:
            pass
    found = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 4))):
        start = draw.randrange(len(found) + 1)
        end = min(len(found), start + draw.choice((1, 2, 8, 64)))
        kind = draw.randrange(6)
        if kind == 0 and found:
            found[min(start, len(found) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[start:end]
        elif kind == 2:
            found[start:start] = found[start:end]
        elif kind == 3:
            found[start:start] = draw.choice(WORDS)
        elif kind == 4:
            found[start:end] = draw.choice(WORDS)
        elif draw.random() < 0.3:
            del found[start:]
    return bytes(found)


def _other_values(raw: bytes, suffix: str, draw: random.Random) -> bytes:
    lines = raw.decode().splitlines() if suffix == ".jsonl" else [raw.decode()]
    at = draw.randrange(len(lines))
    whole = json.loads(lines[at])
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if isinstance(whole, dict | list):
        walk(whole)
    for _ in range(draw.choice((1, 1, 2))):
        if not places or draw.random() < 0.05:
            whole = draw.choice(VALUES)
            break
        node, key = draw.choice(places)
        try:
            kind = draw.randrange(3)
            if kind == 0:
                del node[key]
            elif kind == 1 and isinstance(node, dict):
                node[str(key) + draw.choice(("", "x", " ", "\0"))] = node.pop(key)
            else:
                node[key] = draw.choice(VALUES)
        except (KeyError, IndexError):
            pass
    lines[at] = json.dumps(whole)
    return "\n".join(lines).encode()


def readers(root: Path) -> list[Reader]:
    """Make valid input for every reader."""
    import graftkit
    from graftkit.backbone.load import load_backbone
    from graftkit.backbone.source import auto_class, find_source
    from graftkit.recipe import expressions, schema, selection, values
    from graftkit.recipe.patterns import Pattern
    from graftkit.runs.predict import load_run, open_run
    from graftkit.runs.prepare import method_of, prepare_backbone, prepare_rows
    from graftkit.runs.saved import log_lines, read_plan, read_result

    bert = root / "bert"
    _make_bert(bert)
    found: list[Reader] = []

    def rows(task: str, name: str, source: Path, *files: str, model: Path = bert) -> None:
        folder = source if source.is_dir() else source.parent

        def read(copy: Path) -> None:
            path = copy if source.is_dir() else copy / source.name
            recipe = schema.make(
                {
                    "model": str(bert),
                    "task": task,
                    "data": {"train": str(path), "eval": None},
                    "out": str(copy / "out"),
                }
            )
            read_rows = prepare_rows(recipe)
            found_task, labels = read_rows.task, read_rows.labels
            if "messages" not in read_rows.columns.values():  # these need a chat template
                backbone, _ = prepare_backbone(find_source(str(model)), method_of(recipe), found_task, labels)
                longest = found_task.max_length(None, backbone)
                found_task.dataset(read_rows.train, backbone, longest, training=True)

        found.append(Reader(f"{name}", folder, files or (source.name,), read))

    import pandas

    table = make_rows(12, 1)
    for suffix in ("csv", "tsv", "jsonl", "json", "parquet", "arrow"):
        path = root / suffix / f"rows.{suffix}"
        path.parent.mkdir()
        frame = pandas.DataFrame(table)
        if suffix in ("csv", "tsv"):
            frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
        elif suffix in ("jsonl", "json"):
            frame.to_json(path, orient="records", lines=suffix == "jsonl")
        elif suffix == "parquet":
            frame.to_parquet(path)
        else:
            frame.to_feather(path)
        rows("classify", f"table {suffix}", path)
    for case, task in (("tag", "tag"), ("span", "span"), ("generate", "generate")):
        (root / case).mkdir()
        made, source = material(case, root / case, bert)
        alone = root / f"{case}-rows" / source.name
        alone.parent.mkdir()
        shutil.copy(source, alone)
        rows(task, f"rows of {task}", alone, model=made)
    chat = root / "chat" / "rows.jsonl"
    chat.parent.mkdir()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a cat?"},
             {"role": "assistant", "content": "yes", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
             {"role": "tool", "content": "3", "name": "f"}, {"role": "assistant", "content": "no"}]  # fmt: skip
    chat.write_text(
        "\n".join(
            json.dumps({"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]})
            for _ in range(3)
        )
    )
    rows("generate", "conversations", chat)
    conll = root / "conll" / "rows.conll"
    conll.parent.mkdir()
    conll.write_text("the\tO\nold\tB-tool\nsaw\tI-tool\n\nmy\tO\ncat\tB-animal\n\n" * 4)
    rows("tag", "conll", conll)
    for case, name in (("image", "image_classify"), ("audio", "audio_classify")):
        (root / case).mkdir()
        made, source = material(case, root / case, bert)
        kind = "*.png" if case == "image" else "*.wav"
        rows(
            name,
            f"files of {name}",
            source,
            *(str(p.relative_to(source)) for p in sorted(source.rglob(kind))[:3]),
            model=made,
        )

    recipe = root / "recipe" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text(
        f"model: {bert}\ntask: classify(class_weights='balanced')\nmethod: lora(rank=2, sites='blocks[-2:].attention') + head()\n"
        "data: {train: a.csv, eval: 0.1, columns: {text: x}}\ntrain: {epochs: 2, lr: 1.0e-3, evaluate_every: 2 epochs}\n"
    )
    found.append(
        Reader(
            "recipe",
            recipe.parent,
            ("recipe.yaml",),
            lambda copy: schema.make(values.read(copy / "recipe.yaml")),
        )
    )

    def expression(copy: Path) -> None:
        text = (copy / "expression.txt").read_bytes().decode("utf-8", "replace")
        calls = expressions.parse(text, "method")
        expressions.build(calls, "method")
        for call in calls:
            if isinstance(call.arguments.get("sites"), str):
                selection.parse(call.arguments["sites"])

    (root / "expression").mkdir()
    (root / "expression" / "expression.txt").write_text(
        "lora(rank=8, alpha=16.0, sites='blocks[-4:].q,v') + freeze('embeddings') + head(pooling='mean')"
    )
    found.append(Reader("expression", root / "expression", ("expression.txt",), expression))

    def chosen(copy: Path) -> None:
        for line in (copy / "selection.txt").read_bytes().decode("utf-8", "replace").splitlines():
            if line.startswith("re:"):
                Pattern(line[3:], "the selection").fullmatch("bert.encoder.layer.0.attention.self.query")
            else:
                selection.parse(line)

    (root / "selection").mkdir()
    (root / "selection" / "selection.txt").write_text(
        "blocks[-4:].attention\nq,v,ffn\nre:.*\\.(query|value)\nall-linear\n"
    )
    found.append(Reader("selection", root / "selection", ("selection.txt",), chosen))

    def model(copy: Path, meta: bool = False) -> None:
        source = find_source(str(copy))
        load_backbone(source, auto_class(source), meta=meta)

    found.append(
        Reader("model folder", bert, tuple(p.name for p in sorted(bert.iterdir()) if p.is_file()), model)
    )
    run = root / "run"
    data = write_csv(root / "train.csv", make_rows(24, 1))
    graftkit.tune(model=str(bert), task="classify", train=data, method="lora(rank=2) + head()", out=run,
                  settings={"train.epochs": 1, "train.precision": "fp32"})  # fmt: skip
    names = [
        str(p.relative_to(run))
        for p in sorted(run.rglob("*"))
        if p.suffix in (".json", ".jsonl", ".yaml", ".safetensors")
    ]

    def finished(copy: Path) -> None:
        for read, name in (
            (read_plan, "plan.json"),
            (read_result, "result.json"),
            (log_lines, "metrics.jsonl"),
        ):
            if (copy / name).is_file():
                read(copy / name)
        load_run(open_run(copy))
        graftkit.Run(copy, {}).predict(["the cat"])

    found.append(Reader("run folder", run, tuple(names), finished))
    grafts = [n for n in names if n.startswith("graft/")]
    found.append(Reader("graft folder", run, tuple(grafts), lambda copy: load_run(open_run(copy))))
    return found


def work(reader: Reader, seed: int, tries: int, keep: Path, out: Any) -> None:
    """Make tries in this process, and write a line of JSON for each to `out`."""
    from graftkit.errors import UserError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")

    def late(*_: Any) -> None:
        raise TimeoutError(f"over {SECONDS} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGPROF, late)
    for number in range(seed, seed + tries):
        draw = random.Random(number)
        copy = keep / f"{reader.name.replace(' ', '-')}-{number}"
        shutil.copytree(reader.folder, copy, symlinks=True, ignore=shutil.ignore_patterns("out"))
        name = draw.choice(reader.files)
        path = copy / name
        path.write_bytes(damaged(path.read_bytes(), path.suffix, draw))
        said = {"try": number, "file": name, "input": str(copy), "fault": None, "end": "read"}
        out.write(json.dumps(said | {"end": "died"}) + "\n")
        out.flush()
        signal.setitimer(
            signal.ITIMER_PROF, SECONDS
        )  # of its own time, as other programs may keep it waiting
        signal.alarm(20 * SECONDS)
        try:
            reader.read(copy)
        except UserError:
            said["end"] = "refused"
        except BaseException as error:
            said["end"] = "fault"
            frames = traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if f"{os.sep}graftkit{os.sep}" in f.filename]
            at = own[-1] if own else frames[-1]
            said["fault"] = (
                f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno} ({str(error)[:100]!r})"
            )
            said["place"] = f"{type(error).__name__} {at.filename}:{at.lineno}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
        if said["end"] != "fault":
            shutil.rmtree(copy, ignore_errors=True)
        out.write(json.dumps(said) + "\n")
        out.flush()


def round_of(reader: Reader, seed: int, keep: Path) -> list[dict[str, Any]]:
    """Make a round of tries in a fork, and return the last line about each."""
    log = keep / "log.jsonl"
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with log.open("w") as out:
            work(reader, seed, ROUND, keep, out)
        os._exit(0)
    os.waitpid(child, 0)
    last: dict[int, dict[str, Any]] = {}
    for line in log.read_text().splitlines():
        said = json.loads(line)
        last[said["try"]] = said
    for said in last.values():
        if said["end"] == "died":
            said["fault"] = said["place"] = "the process died"
    return list(last.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name contains this")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the inputs of faults")
    given = parser.parse_args()
    keep = given.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    keep.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Counter] = {}
    seen: set[tuple[str, str]] = set()
    with tempfile.TemporaryDirectory() as root:
        chosen = [reader for reader in readers(Path(root)) if given.only in reader.name]
        end, seed = time.monotonic() + 60 * given.minutes, given.seed
        while time.monotonic() < end:
            for reader in chosen:
                for said in round_of(reader, seed, keep):
                    counts.setdefault(reader.name, Counter())[said["end"]] += 1
                    if said["fault"] and (reader.name, said["place"]) not in seen:
                        seen.add((reader.name, said["place"]))
                        print(f"{reader.name}, {said['file']}: {said['fault']}; {said['input']}", flush=True)
                    elif said["fault"]:
                        shutil.rmtree(said["input"], ignore_errors=True)
            seed += ROUND
    print("| reader | tries | read | refused | faults |\n| --- | ---: | ---: | ---: | ---: |")
    for name, count in counts.items():
        print(
            f"| {name} | {count.total():,} | {count['read']:,} | {count['refused']:,} | {count['fault'] + count['died']:,} |"
        )
    raise SystemExit(bool(seen))


if __name__ == "__main__":
    main()
