"""Forward and backward of one batch: our lora, dora, ia3 and adapter beside PEFT's (adapter: beside wrapped modules).

BERT-base and a Llama geometry of 150 M parameters, random weights, fp32, 8 rows of 128 tokens, no dropout; the loss is
the mean square of the last states. Both sides hold the same adapter (ours, written and read by PEFT) and are checked to
give the same loss. PEFT has no bottleneck adapters: ours stand beside modules that wrap the same places, written out
here. Time: the two sides in turn, step by step, in one process, and once more in another one in which the other side is
made first. Memory: what the peak of a step lies above the
resident model, each side in a process of its own, freed memory given back at once.
The whole measurement, all 12 layers, is written to bench/results/speed_methods.json and docs/performance.md; a row that is in
that file is not measured again, so that an interrupted measurement goes on.
Usage: python bench/speed_methods.py [steps [threads [layers]]]
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, child, child_arguments, machine

METHODS = {
    "lora": "lora(rank=8)",
    "dora": "dora(rank=8)",
    "ia3": "ia3()",
    "adapter": "adapter(bottleneck=64, norms=False)",
}
MODELS = ("BERT-base", "Llama, 150 M")
ROWS, LENGTH, VOCABULARY, LAYERS = 8, 128, 30000, 12
TITLE = "## Forward and backward of a method\n"
SECTION = """
Output of `python bench/speed_methods.py`: one batch of 8 rows of 128 tokens through BERT-base and through a Llama
architecture of 150 M parameters (width 768, 12 blocks, vocabulary of 48,000), random weights, fp32, no dropout. Both sides
hold the same adapter and the same frozen weights in memory and compute the same loss; they alternate step by step. Seconds
are medians, and "as fast" is the median ratio of neighbouring steps; differences of one percent are noise. Memory is the
peak of a step above the resident model. PEFT has no bottleneck adapters: ours are compared with modules that wrap the same
layers.

{table}

`lora` gains because its last product is added to the output of the linear layer in one call, and for rank < 16 the
gradients of its narrow factors are computed with these on the left, which takes a CPU a third to a half of the time. `dora`
gains most: PEFT computes W + s B A and its norm in each pass; ours computes the norm by rows from
||W||^2 + 2 s <W A', B> + s^2 <B A A', B>, passes twice over the output of the frozen layer, stores nothing else of that size,
and derives the gradient of the magnitude from that of B. `ia3` and the adapter cost next to nothing compared with the frozen
layers, on either side.
"""
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def base(name: str, layers: int):
    """The model; the same random weights each time."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    if name == "BERT-base":
        config = BertConfig(
            num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        return BertModel(config, add_pooling_layer=False)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=layers, vocab_size=48000
    )  # fmt: skip
    return LlamaModel(config)


def grafted(name: str, layers: int, text: str):
    """Our side, with small random values in all that is trained."""
    import torch

    from graftkit import attach

    graft = attach(base(name, layers), text)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return graft


def peer(name: str, layers: int, text: str):
    """The other side, with the values of ours."""
    graft = grafted(name, layers, text)
    if text.startswith("adapter"):
        return wrapped(base(name, layers), graft)
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        graft.save(folder)
        return PeftModel.from_pretrained(base(name, layers), folder, is_trainable=True)


def wrapped(model, graft):
    """Bottlenecks in modules that stand in the place of those they wrap."""
    import torch
    from torch import nn

    class Wrapper(nn.Module):
        def __init__(self, module, values):
            super().__init__()
            self.base_layer = module
            width, bottleneck = values["up"].shape
            self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
            names = {
                "down": self.down.weight,
                "down_bias": self.down.bias,
                "up": self.up.weight,
                "up_bias": self.up.bias,
            }
            with torch.no_grad():
                for key, parameter in names.items():
                    parameter.copy_(values[key])

        def forward(self, *args, **kwargs):
            hidden = self.base_layer(*args, **kwargs)
            return hidden + self.up(nn.functional.gelu(self.down(hidden)))

    model.requires_grad_(False)
    values: dict[str, dict] = {}
    for key, parameter in graft.parameters.items():
        place, leaf = re.fullmatch(r"(.+)\.adapter_default\.(\w+)", key).groups()
        values.setdefault(place, {})[leaf] = parameter
    for place, given in values.items():
        model.set_submodule(place, Wrapper(model.get_submodule(place), given))
    return model


def share(ours, theirs) -> None:
    """One memory for the frozen weights of both sides: where they happen to lie makes a difference of one percent."""
    values = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            parameter.data = values[name.replace("base_model.model.", "").replace(".base_layer", "")].data


def step(model) -> float:
    """Forward and backward; the loss."""
    import torch

    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    loss = model(input_ids=ids).last_hidden_state.square().mean()
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return float(loss.detach())


def measure_time(name: str, layers: int, text: str, steps: int, threads: int, first: str) -> dict:
    """Seconds of each step of both sides, of which `first` is made first: that alone
    makes a difference of 0.3%."""
    import torch

    torch.set_num_threads(threads)
    makers = {"ours": lambda: grafted(name, layers, text).model, "theirs": lambda: peer(name, layers, text)}
    sides = {side: makers[side]().train() for side in sorted(makers, key=lambda side: side != first)}
    share(sides["ours"], sides["theirs"])
    losses = {side: step(model) for side, model in sides.items()}
    if abs(losses["ours"] - losses["theirs"]) > 1e-4 * abs(losses["theirs"]):
        raise SystemExit(f"{name}, {text}: the two sides do not compute the same: {losses}")
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for index in range(steps):
        for side in list(sides)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            step(sides[side])
            seconds[side].append(time.perf_counter() - start)
    return seconds | {"machine": machine()}


def measure_memory(name: str, layers: int, text: str, side: str, threads: int) -> dict:
    import gc

    import torch

    torch.set_num_threads(threads)
    model = (grafted(name, layers, text).model if side == "ours" else peer(name, layers, text)).train()
    step(model)
    peaks = []
    for _ in range(3):
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
        step(model)
        peaks.append(status("VmHWM") - before)
    return {"bytes": statistics.median(peaks)}


def status(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def main() -> None:
    steps, threads, layers = ([int(a) for a in sys.argv[1:]] + [7, 2, LAYERS][len(sys.argv) - 1 :])[:3]
    path = ROOT / "bench" / "results" / "speed_methods.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if layers == LAYERS and path.exists() else []
    result: dict = {"machine": "", "rows": kept}
    for name in MODELS:
        for method, text in METHODS.items():
            if any((row["model"], row["method"]) == (name, method) for row in kept):
                continue
            what = {"name": name, "layers": layers, "text": text, "threads": threads}
            halves = [
                child(__file__, {"function": "measure_time", **what, "steps": steps, "first": first})
                for first in ("ours", "theirs")
            ]
            timed = {side: halves[0][side] + halves[1][side] for side in ("ours", "theirs")}
            os.environ.update(GIVES_BACK)
            memory = {
                side: child(__file__, {"function": "measure_memory", **what, "side": side})["bytes"]
                for side in ("ours", "theirs")
            }
            for key in GIVES_BACK:
                del os.environ[key]
            seconds = {side: statistics.median(timed[side]) for side in ("ours", "theirs")}
            ratio = statistics.median(b / a for a, b in zip(timed["ours"], timed["theirs"], strict=True))
            peer = "wrapped modules" if method == "adapter" else "PEFT"
            result["rows"].append(
                {
                    "model": name,
                    "method": method,
                    "seconds": seconds,
                    "ratio": ratio,
                    "memory": memory,
                    "peer": peer,
                    "steps": 2 * steps,
                }
            )
            result["machine"] = halves[0]["machine"]
            print(line(result["rows"][-1]), flush=True)
            if layers == LAYERS:
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not result["machine"]:
        result["machine"] = machine()
    print("\n" + table(result))
    if layers == LAYERS and len(result["rows"]) == len(MODELS) * len(METHODS):
        write_section(result)


def write_section(result: dict) -> None:
    """Put the table into docs/performance.md, in the place of an earlier one."""
    path = ROOT / "docs" / "performance.md"
    before, _, after = path.read_text(encoding="utf-8").partition(TITLE)
    _, heading, after = after.partition("\n## ")
    section = SECTION.format(table=table(result))
    path.write_text(f"{before.rstrip()}\n\n{TITLE}{section}{heading}{after}", encoding="utf-8")


def line(row: dict) -> str:
    ours, theirs = row["seconds"]["ours"], row["seconds"]["theirs"]
    mine, other = row["memory"]["ours"] / 1e6, row["memory"]["theirs"] / 1e6
    return (
        f"| {row['model']} | {row['method']} | {row['peer']} | {ours:.3f} | {theirs:.3f} | {row['ratio']:.2f} x "
        f"| {mine:.0f} | {other:.0f} | {mine / other:.2f} |"
    )


def table(result: dict) -> str:
    steps = " or ".join(map(str, sorted({row["steps"] for row in result["rows"]})))
    head = (
        "| model | method | beside | ours, s | theirs, s | as fast | ours, MB | theirs, MB | memory |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    return (
        head + "\n".join(map(line, result["rows"])) + f"\n\n{steps} steps of each side. {result['machine']}."
    )


if __name__ == "__main__":
    given = child_arguments()
    if given is None:
        main()
    else:
        function = globals()[given.pop("function")]
        print(json.dumps(function(**given)))
