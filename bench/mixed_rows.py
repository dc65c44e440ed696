"""One batch whose rows use different LoRA grafts: ours, PEFT's (`adapter_names=[...]`), and the rows one after the other.

BERT-base with random weights, fp32, 8 rows of 128 tokens, a graft of rank 8 on every linear map for each row; outputs
without gradients. All ways hold the same grafts (ours, written and read by PEFT) and are checked to give the same
states. They run in turn in one process; times are medians. Entering `graftkit.using`, where the factors of all grafts
are laid side by side, is timed by itself.
Usage: python bench/mixed_rows.py [rounds [threads [layers]]]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from common import machine

ROWS, LENGTH, VOCABULARY, RANK = 8, 128, 30000, 8
NAMES = [f"graft{i}" for i in range(ROWS)]
ENTERED = ExitStack()


def base(layers: int):
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()


def grafted(layers: int):
    """Our side: a graft for each row, with small random values, all disabled."""
    import torch

    from graftkit import attach

    model = base(layers)
    for index, name in enumerate(NAMES):
        graft = attach(model, f"lora(rank={RANK})", name=name)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in graft.parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        graft.disable()
    return model


def peer(model, layers: int):
    """PEFT's side, with the same grafts."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            model.graftkit_grafts[name].save(Path(folder) / name)
        wrapped = PeftModel.from_pretrained(base(layers), f"{folder}/{NAMES[0]}", adapter_name=NAMES[0])
        for name in NAMES[1:]:
            wrapped.load_adapter(f"{folder}/{name}", adapter_name=name)
    return wrapped.eval()


def ways(layers: int) -> dict[str, Callable]:
    """Each way of computing the states (rows, length, width) of one batch."""
    import torch

    from graftkit import using

    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    model = grafted(layers)
    wrapped = peer(model, layers)
    mixed = grafted(layers)
    ENTERED.enter_context(using(mixed, rows=NAMES))

    def one_after_the_other():
        found = []
        for index, name in enumerate(NAMES):
            with using(model, name):
                found.append(model(ids[index : index + 1]).last_hidden_state)
        return torch.cat(found)

    def entered_each_time():
        with using(model, rows=NAMES):
            return model(ids).last_hidden_state

    return {
        "ours": lambda: mixed(ids).last_hidden_state,
        "ours, entered each time": entered_each_time,
        "PEFT": lambda: wrapped(ids, adapter_names=NAMES).last_hidden_state,
        "row by row": one_after_the_other,
        "base alone": lambda: model(ids).last_hidden_state,
    }


def main() -> None:
    rounds, threads, layers = ([int(a) for a in sys.argv[1:]] + [15, 2, 12][len(sys.argv) - 1 :])[:3]
    import torch

    torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {}
    with ENTERED, torch.no_grad():
        functions = ways(layers)
        wanted = functions["row by row"]()
        for name, function in functions.items():
            difference = float((function() - wanted).abs().max() / wanted.abs().max())
            if name != "base alone" and difference > 1e-4:
                raise SystemExit(f"{name} does not compute the same: {difference:.1e}")
        for index in range(rounds):
            for name in list(functions)[:: 1 if index % 2 else -1]:
                start = time.perf_counter()
                functions[name]()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"| {ROWS} rows, {ROWS} grafts | seconds | times ours |\n| --- | --- | --- |")
    for name in functions:
        print(f"| {name} | {medians[name]:.3f} | {medians[name] / medians['ours']:.2f} |")
    print(f"\n{layers} layers, {rounds} rounds. {machine()}")


if __name__ == "__main__":
    main()
