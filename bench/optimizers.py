"""Optimizers: perplexity, bytes of state, peak memory and speed of a small Llama trained from scratch with each.

    python bench/optimizers.py [--quick] [--size tiny|60m|quick] [--steps N] [--scales 0.5,1,2] [--only galore] [--text FOLDER]
    python bench/optimizers.py --size 60m --write
    python bench/optimizers.py --meta-7b

A byte-level (tiny) or BPE (60m) language model of the text in FOLDER; of its last tenth, one half chooses the learning rate
and the other gives the perplexity. One process for each run, forked, with a linear warm-up over a tenth of the steps, then a
cosine. Learning rates stand in `ROWS`; --scales tries each times these. Products run in bf16 where this machine is made for
them. Rows marked 'per layer' step within the backward pass, so that no two gradients exist at once. Each run is kept in
bench/results/, so that what was interrupted goes on; --write puts the best of each row into docs/results.md.
--meta-7b counts the bytes of LLaMA-7B in bf16, without weights, beside those of the GaLore paper.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import resource
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

TEXT = common.ROOT.parent / "shared" / "data" / "text"
FILES = ("tinyshakespeare.txt", "wikitext2_valid.txt", "wikitext2_test.txt")


@dataclass(frozen=True)
class Size:
    """A geometry: that of the GaLore paper for 60m."""

    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    batch: int
    steps: int


SIZES = {
    "tiny": Size(128, 344, 4, 4, 256, 128, 16, 600),
    "quick": Size(64, 172, 2, 4, 256, 64, 8, 25),  # that all of it runs
    "60m": Size(512, 1376, 8, 8, 32000, 256, 2, 300),  # the paper trains on 5,000 times as many tokens
}


@dataclass(frozen=True)
class Row:
    """What is compared: `rank` in an expression stands for a quarter of the width."""

    name: str
    optimizer: str
    lr: float
    per_layer: bool = False
    method: str = "full()"


ROWS = (
    Row("AdamW", "adamw()", 3e-3),
    Row("AdamW, 8 bits", "adamw8bit()", 3e-3),
    Row("AdamW, 4 bits", "adamw4bit()", 3e-3),
    Row("Lion", "lion()", 1e-3),
    Row("Muon", "muon()", 3e-3),
    Row("GaLore", "galore(rank={rank}, interval=50)", 1e-2),
    Row("GaLore, 8 bits, per layer", "galore(rank={rank}, interval=50, bits=8)", 1e-2, per_layer=True),
    Row("GaLore, 8 bits, spaces in 4, per layer", "galore(rank={rank}, interval=50, bits=8, space_bits=4)", 1e-2, per_layer=True),
    Row("Fira", "fira(rank={rank}, interval=50)", 1e-2),
    Row("APOLLO", "apollo(rank={rank}, interval=50)", 1e-2),
    Row("APOLLO-Mini", "apollo(mini=True, interval=50)", 1e-2),
    Row("BAdam", "badam(interval=25)", 3e-3),
    Row(
        "LoRA", "adamw()", 3e-3, method="lora(rank={rank}, sites='all-linear') + unfreeze('norms') + "
        "unfreeze('embeddings') + unfreeze('head')"
    ),
)  # fmt: skip
# Zhao et al. 2024: total memory of 8-bit GaLore, rank 1,024, per layer, is this much below that of BF16 Adam
PAPER_LESS = 0.633


def tokens(size: Size, folder: str) -> tuple[Any, Any, Any, float]:
    """Return the tokens to train on, to choose by and to test on, and the bytes of text for each of the last."""
    import torch

    text = "\n".join((Path(folder) / name).read_text(encoding="utf-8") for name in FILES)
    cuts = len(text) * 18 // 20, len(text) * 19 // 20
    parts = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
    if size.vocabulary == 256:
        made = [torch.tensor(list(part.encode())) for part in parts]
    else:
        from tokenizers import ByteLevelBPETokenizer

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(parts[:1], vocab_size=size.vocabulary, show_progress=False)
        made = [torch.tensor(tokenizer.encode(part).ids) for part in parts]
    return made[0], made[1], made[2], len(parts[2].encode()) / len(made[2])


def llama(size: Size, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.inner,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, max_position_embeddings=size.length,
        bos_token_id=None, eos_token_id=None, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(name: str, size_name: str, steps: int, lr_scale: float, text: str) -> dict[str, Any]:
    """Train from scratch, and return the figures of a run."""
    import torch

    from graftkit import attach
    from graftkit.engine.precision import autocast, choose
    from graftkit.optim.base import as_optimizer

    row, size = next(row for row in ROWS if row.name == name), SIZES[size_name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    fit, held_out, test, bytes_per_token = tokens(size, text)
    precision = choose("auto", device)
    rank = size.width // 4
    graft = attach(llama(size).to(device), row.method.format(rank=rank))
    model, value = graft.model.train(), as_optimizer(row.optimizer.format(rank=rank))
    groups = graft.param_groups(row.lr * lr_scale, 0.0)
    value.check(groups)
    made = optimizers(value, groups, row.per_layer)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in made]
    generator = torch.Generator().manual_seed(1)
    per_step, seconds = size.batch * size.length, 0.0
    # With one thread, time of the processor, which other work on the machine does not change
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for step in range(steps):
        scale = min(1.0, (step + 1) / max(1, steps // 10)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer, own in zip(made, rates):
            for group, rate in zip(optimizer.param_groups, own):
                group["lr"] = rate * scale
        starts = torch.randint(len(fit) - size.length, (size.batch,), generator=generator)
        rows = torch.stack([fit[start : start + size.length] for start in starts]).to(device)
        began = clock()
        with autocast(device, precision):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        if not row.per_layer:
            made[0].step()
            made[0].zero_grad()
        seconds += clock() - began if step else 0.0  # the first step allocates
    with autocast(device, precision):
        chosen_by, loss = evaluate(model, held_out, size, device), evaluate(model, test, size, device)
    states = [v for o in made for state in o.state.values() for v in state.values() if torch.is_tensor(v)]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "name": name, "optimizer": str(value), "lr": row.lr * lr_scale, "precision": precision, "held_out_loss": chosen_by, "trained": sum(p.numel() for p in graft.parameters.values()),
        "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "state_bytes": sum(v.numel() * v.element_size() for v in states),
        "planned_bytes": value.total_bytes(groups), "peak_bytes": peak,
        "tokens_per_second": per_step * (steps - 1) / seconds if seconds else 0.0, "steps": steps,
        "machine": common.machine(),
    }  # fmt: skip


def optimizers(value: Any, groups: list[dict[str, Any]], per_layer: bool) -> list[Any]:
    """Return the optimizer of all groups; or one for each parameter, which steps as soon as its gradient is there."""
    if not per_layer:
        return [value.make(groups)]
    assert value.steps_in_backward
    made = []
    for group in groups:
        for index, parameter in enumerate(group["params"]):
            one = {key: [group[key][index]] for key in ("params", "blocks")}
            optimizer = value.make([group | one])
            made.append(optimizer)

            def step(parameter: Any, optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
    return made


def evaluate(model: Any, held_out: Any, size: Size, device: Any, batches: int = 8) -> float:
    """Return the mean loss of held-out text."""
    import torch

    model.eval()
    count = min(len(held_out) // size.length, batches * size.batch)
    rows = held_out[: count * size.length].view(count, size.length)
    losses = []
    with torch.no_grad():
        for part in rows.split(size.batch):
            losses.append(model(input_ids=part.to(device), labels=part.to(device)).loss.item() * len(part))
    return sum(losses) / count


def meta_7b() -> None:
    """Print the bytes of LLaMA-7B in bf16 for each optimizer, computed from shapes alone."""
    import torch

    from graftkit import attach
    from graftkit.optim.base import as_optimizer

    seven = Size(4096, 11008, 32, 32, 32000, 2048, 1, 1)
    with torch.device("meta"):
        model = llama(seven, dtype=torch.bfloat16).to(torch.bfloat16)
    graft = attach(model, "full()")
    groups = graft.param_groups()
    sizes = [p.numel() for p in graft.parameters.values()]
    weights, largest = 2 * sum(sizes), 2 * max(sizes)
    base = weights + weights + as_optimizer("adamw()").total_bytes(groups)
    print(f"LLaMA-7B: {sum(sizes):,} parameters, {gb(weights)} GB of weights in bf16, as many of gradients")
    print("\n| optimizer | state, GB | with weights and gradients | ... per layer | less than BF16 Adam |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for text in ("adamw()", "adamw8bit()", "adamw4bit()", "lion()", "muon()", "galore(rank=1024)",
                 "galore(rank=1024, bits=8)", "galore(rank=1024, bits=8, space_bits=4)", "fira(rank=1024)", "apollo(rank=256)", "apollo(mini=True)",
                 "badam()"):  # fmt: skip
        state = as_optimizer(text).total_bytes(groups)
        total, layered = state + 2 * weights, state + weights + largest
        print(f"| `{text}` | {gb(state)} | {gb(total)} | {gb(layered)} | {1 - layered / base:.1%} |")
    kept, whole = 0, 0
    for group in groups:
        for p in group["params"]:
            projected = as_optimizer("galore(rank=1024)").projects(group, p.shape)
            kept += min(p.shape) * 1024 + 2 * max(p.shape) * 1024 if projected else 2 * p.numel()
            whole += 2 * p.numel()
    print(f"\nNumbers that GaLore of rank 1,024 keeps: {kept / whole:.1%} of Adam's.")
    print(
        f"\n'per layer': one gradient at a time, that of the largest matrix; activations come on top everywhere. The "
        f"paper has {PAPER_LESS:.1%} less for 8-bit GaLore of rank 1,024, per layer, with activations, against BF16 Adam."
    )


def gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| | optimizer | learning rate | perplexity | bits per byte | state, MB | peak, MB | tokens/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        lines.append(
            f"| {row['name']} | `{row['optimizer']}` | {row['lr']:g} | {row['perplexity']:.2f} | {row['bits_per_byte']:.3f} | "
            f"{row['state_bytes'] / 1e6:.2f} | {row['peak_bytes'] / 1e6:.0f} | {row['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines)


def kept(name: str, size: str, steps: int, scale: float, text: str) -> dict[str, Any]:
    """Return the figures of a run, from its file if it has been made."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower())
    path = common.RESULTS / f"optimizer-{size}-{steps}-{plain}-{scale:g}.json"
    if not path.exists():
        path.write_text(json.dumps(forked(name, size, steps, scale, text), indent=1) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def write(size: str, steps: int) -> None:
    """Put the run of each row that is best on the held-out text into docs/results.md."""
    best: dict[str, dict[str, Any]] = {}
    tried: Counter[str] = Counter()
    for path in common.RESULTS.glob(f"optimizer-{size}-{steps}-*.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        tried[run["name"]] += 1
        if run["held_out_loss"] < best.get(run["name"], run)["held_out_loss"] or run["name"] not in best:
            best[run["name"]] = run
    rows = [best[row.name] for row in ROWS if row.name in best]
    shape = SIZES[size]
    counts = "; ".join(f"{row['name']}: {tried[row['name']]}" for row in rows)
    intro = (
        f"From `bench/optimizers.py --size {size}`: a Llama of {shape.layers} blocks of width {shape.width} and a vocabulary of "
        f"{shape.vocabulary:,}, {rows[0]['trained'] / 1e6:.1f} M parameters, from scratch, {steps} steps of {shape.batch} rows of "
        f"{shape.length} tokens. The learning rate is the best of those tried, on held-out text; perplexity is that of other text. "
        f"Tried were: {counts}; a row with one is not tuned. Peak is that of the "
        "process; with one thread, tokens per second are those of processor time."
    )
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    text = "\n\n".join(["## Optimizers", intro, table(rows), f"Machine: {machines}."])
    common.section(
        common.ROOT / "docs" / "results.md", "<!-- optimizers -->", "<!-- end of optimizers -->", text
    )


def forked(*arguments: Any) -> dict[str, Any]:
    """Return the row of `train` from a process of its own, so that peak memory is that of one optimizer."""
    import graftkit.grafts.graft  # noqa: F401  (once, and not in each process)

    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(train, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a check that all of it runs: --size quick")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--scales", default="1", help="learning rates to try, times those of the rows")
    parser.add_argument("--write", action="store_true", help="write the table into docs/results.md")
    parser.add_argument("--only", default="", help="rows whose name or optimizer contains this")
    parser.add_argument("--text", default=str(TEXT), help=f"a folder with {', '.join(FILES)}")
    parser.add_argument("--meta-7b", action="store_true", help="bytes of LLaMA-7B, from shapes alone")
    options = parser.parse_args()
    if options.meta_7b:
        meta_7b()
        return
    size = "quick" if options.quick else options.size
    steps, found = options.steps or SIZES[size].steps, []
    if options.write:
        write(size, steps)
        return
    make = forked if options.quick else kept
    for row in ROWS:
        if options.only.lower() in f"{row.name} {row.optimizer}".lower():
            for scale in map(float, options.scales.split(",")):
                found.append(make(row.name, size, steps, scale, options.text))
                print(
                    f"{row.name}, {found[-1]['lr']:g}: perplexity {found[-1]['perplexity']:.2f}", flush=True
                )
    print(f"\n{size}, {steps} steps of {SIZES[size].batch} rows of {SIZES[size].length} tokens\n")
    print(table(found))
    print(f"\n{common.machine()}")


if __name__ == "__main__":
    main()
