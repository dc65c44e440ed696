"""One epoch of LoRA: GraftKit beside Hugging Face Trainer + PEFT, in turn, in fp32 and bf16.

The work is the first row of bench/compare_hf.py (bench/compared/texts.py): MiniLM, LoRA of rank 8 on query and value, batch 32,
6,919 sentences of the length of SST-2's. That script compares the defaults; this one shows what the number type and the order of
the rows do on each side. Usage: python bench/speed_lora.py [rounds]
"""

from __future__ import annotations

import json
import statistics
import sys

from common import child, child_arguments, gflops, machine
from compared import texts

SIDES = {
    "Trainer + PEFT, defaults (fp32)": ("trainer_side", {}),
    "Trainer + PEFT, bf16": ("trainer_side", {"bf16": True}),
    "Trainer + PEFT, bf16, grouped by length": ("trainer_side", {"bf16": True, "grouped": True}),
    "GraftKit, fp32": ("graftkit_side", {"precision": "fp32"}),
    "GraftKit, defaults": ("graftkit_side", {}),
}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    results: dict[str, list[dict]] = {name: [] for name in SIDES}
    for seed in range(rounds):
        for name, (function, arguments) in SIDES.items():
            given = {"function": function, "work": "lora", "quick": False, "seed": seed, **arguments}
            results[name].append(child(__file__, given))
            print(name, results[name][-1], flush=True)
    base = statistics.median(r["seconds"] for r in results["Trainer + PEFT, defaults (fp32)"])
    print("\n| side | seconds, median | of which training | accuracy, mean | peak memory, GB | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        seconds = statistics.median(r["seconds"] for r in runs)
        training = statistics.median(r["training"] for r in runs)
        accuracy = statistics.mean(r["accuracy"] for r in runs)
        memory = max(r["memory"] for r in runs) / 1e9
        print(
            f"| {name} | {seconds:.1f} | {training:.1f} | {accuracy:.4f} | {memory:.2f} | {base / seconds:.2f} x |"
        )
    print(f"\n{rounds} rounds in turn, each in a process of its own. {machine()}; ", end="")
    print(f"matrix products: fp32 {gflops('float32'):.0f}, bf16 {gflops('bfloat16'):.0f} GFLOP/s.")


if __name__ == "__main__":
    given = child_arguments()
    if given is None:
        main()
    else:
        print(json.dumps(getattr(texts, given.pop("function"))(**given)))
