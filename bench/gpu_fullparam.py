"""All weights of a model of LLaMA-7B's geometry trained on one GPU: peak memory and tokens per second.

Weights and gradients are in bf16, one row of made-up tokens a step, activations are recomputed layer by layer, and each
parameter takes its step within the backward pass (`train.step_in_backward`, graftkit/engine/updates.py). The model is
random: neither memory nor speed depends on its values. Each case runs in a process of its own. Needs torch and
transformers, and no network.

Usage: python bench/gpu_fullparam.py              on a machine with a GPU of 24 GB or more
       python bench/gpu_fullparam.py --tiny       a tiny geometry on a CPU, in seconds
Options: --optimizers E ..., --lengths N ..., --steps N, --rounding (stochastic rounding of bf16, train.weight_type=bf16),
--after (the ordinary step after the backward pass, for comparison), --out FILE (JSON).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Touvron et al. 2023, 'LLaMA', table 2; the vocabulary and inner width are those of the released weights
LLAMA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
OPTIMIZERS = ("adamw4bit()", "galore(bits=8, rank=1024, interval=500)", "apollo(rank=256)")
LIMIT = 24e9  # bytes of a card that each case should fit into


def model_of(geometry: dict[str, int], device: torch.device) -> torch.nn.Module:
    """Return a random causal model in bf16, whose layers are recomputed in the backward pass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**geometry, use_cache=False, tie_word_embeddings=False))
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def groups_of(model: torch.nn.Module, lr: float = 1e-4, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Return groups as `graftkit.optim.groups.param_groups` does: matrices of the body are `hidden`, vectors not decayed."""
    found: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() > 1
        key = matrix and ".layers." in name, weight_decay if matrix else 0.0
        found.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": lr, "weight_decay": decay, "hidden": hidden}
        for (hidden, decay), members in found.items()
    ]


def measure(
    expression: str, length: int, steps: int, tiny: bool, rounding: bool, after: bool
) -> dict[str, Any]:
    """Train one row of `length` tokens for `steps` steps. The first is not timed: it makes state and spaces."""
    from graftkit.engine.rounding import Rounding
    from graftkit.engine.updates import AfterBackward, WithinBackward
    from graftkit.optim.base import as_optimizer

    device = torch.device("cpu" if tiny or not torch.cuda.is_available() else "cuda")
    model = model_of(TINY if tiny else LLAMA_7B, device)
    optimizer = as_optimizer(expression).make(groups_of(model))
    kind = AfterBackward if after else WithinBackward
    updates = kind(optimizer, 1.0, Rounding(0) if rounding else None)
    updates.enter(dict(model.named_parameters()))
    largest, losses, seconds = 0, [], []

    def seen(name: str, gradient: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, gradient.numel() * gradient.element_size())

    tokens = torch.randint(0, model.config.vocab_size, (1, length + 1), device=device)
    for step in range(steps):
        wait(device)
        start = time.perf_counter()
        updates.begin(step, seen)
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().view(-1, logits.shape[-1]), tokens[0, 1:])
        del logits
        updates.backward(loss)
        norm = float(updates.norm())
        updates.step(norm)
        optimizer.zero_grad()
        losses.append(float(loss))
        wait(device)
        seconds.append(time.perf_counter() - start)
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0], losses
    weights = list(model.parameters())
    state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return {
        "optimizer": expression, "length": length, "rounding": rounding, "within_backward": not after,
        "parameters": sum(p.numel() for p in weights), "weight_bytes": sum(map(size, weights)),
        "optimizer_bytes": sum(map(size, state)), "gradient_bytes": sum(map(size, weights)) if after else largest,
        "peak_bytes": peak(device), "reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        "first_step_seconds": seconds[0], "tokens_per_second": length / (sum(seconds[1:]) / (steps - 1)),
        "losses": losses, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
    }  # fmt: skip


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device) -> int:
    """Return the most bytes that tensors took on the GPU; on a CPU, those of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results."""
    lines = [
        "| optimizer | tokens a row | weights | optimizer | largest gradient | peak | below 24 GB | tokens/s | first step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for one in results:
        if "error" in one:
            lines.append(f"| `{one['optimizer']}` | {one['length']} | {one['error']} | | | | | | |")
            continue
        sizes = (one[f"{key}_bytes"] / 1e9 for key in ("weight", "optimizer", "gradient", "peak"))
        cells = " | ".join(f"{value:.3g} GB" for value in sizes)
        lines.append(
            f"| `{one['optimizer']}` | {one['length']:,} | {cells} | {'yes' if one['peak_bytes'] < LIMIT else 'no'} | "
            f"{one['tokens_per_second']:,.0f} | {one['first_step_seconds']:.1f} s |"
        )
    return "\n".join(lines)


def case(words: list[str]) -> dict[str, Any]:
    """Run one case in a process of its own, so that its peak is its own."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:200]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--optimizers", nargs="+")
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounding", action="store_true")
    parser.add_argument("--after", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    optimizers = given.optimizers or (["adamw()"] if given.tiny else OPTIMIZERS)
    lengths = given.lengths or ([64, 16] if given.tiny else [2048, 256])
    flags = {"--tiny": given.tiny, "--rounding": given.rounding, "--after": given.after}
    if given.one:
        print(json.dumps(measure(optimizers[0], lengths[0], given.steps, *flags.values())))
        return
    if not given.tiny and not torch.cuda.is_available():
        sys.exit("needs a GPU; --tiny runs on a CPU")
    results = []
    for expression in optimizers:
        for length in lengths:
            words = [word for word, on in flags.items() if on]
            words += [
                "--one",
                "--optimizers",
                expression,
                "--lengths",
                str(length),
                "--steps",
                str(given.steps),
            ]
            results.append({"optimizer": expression, "length": length} | case(words))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
