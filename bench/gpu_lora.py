"""LoRA on one GPU: tokens per second, TFLOP/s and peak memory of GraftKit, beside Trainer + PEFT in the same run.

    python bench/gpu_lora.py --json             on a machine with a GPU; no network is needed
    python bench/gpu_lora.py --json --tiny      tiny geometries on a CPU, to try the script

Options: --rows NAME ..., --seconds N (rows that would begin later are left out; default 350), --folder FOLDER (where models are
written: 19 GB; default: the temporary folder). Models have random weights and texts are made-up words, one token each: neither
speed nor memory depends on what they mean. Each side runs in a process of its own, through `graftkit.tune` and `Trainer.train`;
the first steps are not timed. What is not installed is said, and rows that need it are left out.

TFLOP/s are counted as NVIDIA NeMo AutoModel counts them, so that its published figures compare: of full training
3 x 2 x (linear layers, output layer, causal attention), of which LoRA needs the share (2 + trained / frozen) / 3. Nothing that is
computed twice counts. Ends with 1 if a row that was measured misses its bar.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from compared import on_gpu  # noqa: E402
from compared.on_gpu import FIRST, GEOMETRIES, RANK, STEPS  # noqa: E402

# row: geometry, tokens of a row, rows of a step, precision, quantized, peer, bar as (kind, value), libraries it needs
ROWS: dict[str, dict[str, Any]] = {
    "8b": {"geometry": "8b", "length": 4096, "batch": 2, "bar": ("tokens_per_second", 13_500)},
    "1b": {"geometry": "1b", "length": 2048, "batch": 4, "peer": {"liger": True}, "bar": ("ratio", 1.3), "peer_needs": ("peft", "liger_kernel")},
    "minilm": {"peer": {}, "bar": ("ratio", 5.0), "needs": ("sklearn",), "peer_needs": ("peft",)},
    "8b-nf4": {"geometry": "8b", "length": 2048, "batch": 2, "quantize": "nf4", "peer": {}, "bar": ("ratio", 1.3), "needs": ("bitsandbytes",), "peer_needs": ("peft",)},
    "8b-fp8": {"geometry": "8b", "length": 4096, "batch": 2, "precision": "fp8", "bar": ("tokens_per_second", 17_000)},
}  # fmt: skip
OURS = ("pydantic", "accelerate", "xxhash", "regex", "rich", "yaml")


def operations_per_token(geometry: dict[str, Any], length: int, trained: int, frozen: int) -> float:
    """Return the floating-point operations that LoRA needs for a token, counted as NeMo does."""
    hidden, blocks = geometry["hidden_size"], geometry["num_hidden_layers"]
    shared = geometry["num_key_value_heads"] / geometry["num_attention_heads"]
    linear = 12 + 12 * shared + 18 * geometry["intermediate_size"] / hidden
    output = 6 * geometry["vocab_size"] / (blocks * hidden)
    full = blocks * hidden * hidden * (linear + output + 6 * length / hidden)
    return full * (2 + trained / frozen) / 3


def lora_parameters(geometry: dict[str, Any]) -> tuple[int, int]:
    """Return the trained and the frozen parameters of LoRA on all linear layers of the blocks."""
    hidden, inner, blocks = (
        geometry["hidden_size"],
        geometry["intermediate_size"],
        geometry["num_hidden_layers"],
    )
    keys = hidden * geometry["num_key_value_heads"] // geometry["num_attention_heads"]
    shapes = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 3
    embeddings = geometry["vocab_size"] * hidden * (1 if geometry["tie_word_embeddings"] else 2)
    frozen = blocks * (sum(a * b for a, b in shapes) + 2 * hidden) + hidden + embeddings
    return blocks * sum(RANK * (a + b) for a, b in shapes), frozen


def apart(function: str, *given: Any) -> dict[str, Any]:
    """Call a function of bench/compared/on_gpu.py in a process of its own; an error becomes part of the result."""
    command = [sys.executable, __file__, "--child", json.dumps([function, *given])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:300]}


def measure(name: str, places: dict[str, str], folder: str, tiny: bool) -> dict[str, Any]:
    """Run both sides of a row, the peer if what it needs is installed."""
    row = {**ROWS[name], "name": name}
    without = [] if "peer" not in row else lacking(row["peer_needs"])
    if without and tiny:  # Liger does not run on a CPU
        without = [library for library in without if library != "liger_kernel"]
    theirs = {"error": f"not installed: {', '.join(without)}"} if without else None
    if name == "minilm":
        count = 96 if tiny else None
        return finished(row, apart("minilm_graftkit", count), theirs or apart("minilm_trainer", count))
    if tiny:
        row |= {"geometry": "tiny", "length": 32}
    geometry = row["geometry"]
    if geometry not in places:
        made = apart("make_model", geometry, f"{folder}/{geometry}")
        if "error" in made:
            return finished(row, made, None)
        places[geometry] = f"{folder}/{geometry}"
    given = (row, places[geometry], *((6, 2) if tiny else (STEPS, FIRST)))
    ours = apart("graftkit_side", *given)
    if "peer" in row and theirs is None:
        theirs = apart("trainer_side", *given)
    return finished(row, ours, theirs)


def finished(row: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, Any]:
    """Return the figures of a row, and whether its bar is reached; None without the peer."""
    found = {"name": row["name"], "graftkit": ours, "peer": theirs, "bar": list(row["bar"]), "passed": None}
    if "geometry" in row and "error" not in ours:
        geometry = GEOMETRIES[row["geometry"]]
        each = operations_per_token(geometry, row["length"], *lora_parameters(geometry))
        ours["tflops"] = ours["tokens_per_second"] * each / 1e12
        if theirs is not None and "error" not in theirs:
            theirs["tflops"] = theirs["tokens_per_second"] * each / 1e12
    if "error" in ours:
        return found | {"passed": False}
    if theirs is not None and "error" in theirs:
        return found
    kind, bar = row["bar"]
    if theirs is None:
        found["passed"] = ours[kind] >= bar
        return found
    rate = "tokens_per_second" if "tokens_per_second" in ours else None
    found["ratio"] = ours[rate] / theirs[rate] if rate else theirs["seconds"] / ours["seconds"]
    less = rate is None or ours["peak_bytes"] <= theirs["peak_bytes"]  # the bar of MiniLM is its time alone
    found["passed"] = found["ratio"] >= bar and less
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| row | side | tokens/s | TFLOP/s | seconds | peak | loss or accuracy | ratio | at least |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in found:
        if "skipped" in one:
            lines.append(f"| {one['name']} | not measured: {one['skipped']} | | | | | | | |")
            continue
        for side in ("graftkit", "peer"):
            values = one[side]
            if values is None:
                continue
            if "error" in values:
                lines.append(f"| {one['name']} | {side}: {values['error'].replace('|', '/')} | | | | | | | |")
                continue
            rate, tflops = values.get("tokens_per_second"), values.get("tflops")
            memory, quality = values.get("peak_bytes"), values.get("loss", values.get("accuracy"))
            cells = [
                "" if rate is None else f"{rate:,.0f}",
                "" if tflops is None else f"{tflops:.3g}",
                f"{values['seconds']:.2f}",
            ]
            cells += [
                "" if memory is None else f"{memory / 1e9:.1f} GB",
                "" if quality is None else f"{quality:.4f}",
            ]
            last = [f"{one['ratio']:.2f} x" if "ratio" in one else "", f"{one['bar'][0]} {one['bar'][1]:,}"]
            cells += last if side == "graftkit" else ["", ""]
            lines.append(f"| {one['name']} | {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def equal_loss(found: list[dict[str, Any]]) -> None:
    """The row of fp8 passes only if its loss is within one percent of that of bf16."""
    rows = {one["name"]: one for one in found if "error" not in one.get("graftkit", {"error": ""})}
    if "8b" in rows and "8b-fp8" in rows:
        plain, eight = (rows[name]["graftkit"]["loss"] for name in ("8b", "8b-fp8"))
        rows["8b-fp8"]["loss_ratio"] = eight / plain
        rows["8b-fp8"]["passed"] &= eight <= 1.01 * plain


def lacking(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=350.0)
    parser.add_argument("--folder", type=Path)
    return parser.parse_args()


def main() -> int:
    import torch

    given, start = options(), time.monotonic()
    if not given.tiny and not torch.cuda.is_available():
        sys.exit("needs a GPU; --tiny runs on a CPU")
    if missing := lacking(OURS):
        sys.exit(f"not installed: {', '.join(missing)}. GraftKit needs them; carry them to this machine.")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        places: dict[str, str] = {}
        for name in given.rows:
            without = lacking(ROWS[name].get("needs", ()))
            if without or (time.monotonic() - start > given.seconds and not given.tiny):
                why = f"not installed: {', '.join(without)}" if without else f"{given.seconds:.0f} s are over"
                found.append({"name": name, "skipped": why, "passed": None})
            else:
                found.append(measure(name, places, folder, given.tiny))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    equal_loss(found)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {
        "device": device,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - start),
        "tiny": given.tiny,
    }
    print(f"{table(found)}\n\n{about}")
    passed = not any(one["passed"] is False for one in found)
    if given.as_json:
        print(json.dumps({"rows": found, **about, "passed": passed}))
    return int(not given.tiny and not passed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        function, *values = json.loads(sys.argv[2])
        print(json.dumps(getattr(on_gpu, function)(*values)))
    else:
        sys.exit(main())
