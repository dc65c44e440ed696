"""A step of AdamW with 8-bit and 4-bit states: the table that finds the nearest value of a code against a search, and small parts.

    python bench/lowbit.py [--millions 16] [--rounds 5]

`before` is the step with `torch.bucketize` and parts of 8 million numbers, as it was but for faster reading; `now` is the project's. Both take turns,
with one thread, in seconds of the processor; medians, for a million numbers, and the ratio of each round's median. Both store the
same indices, which is checked.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from common import machine


@contextmanager
def before() -> Iterator[None]:
    """Search in the middles, and expand 8 million numbers at a time."""
    import torch

    from graftkit.optim.shared import blockwise, moments

    def middles(bits: int, code: str, device: Any) -> tuple[Any]:
        values = blockwise._code(bits, code, device)
        return ((values[1:] + values[:-1]) / 2,)

    def search(numbers: Any, middle: Any) -> Any:
        return torch.bucketize(numbers, middle, out_int32=True).to(torch.uint8)

    kept = blockwise._nearest, blockwise._table, moments.CHUNK_ON_CPU
    blockwise._nearest, blockwise._table, moments.CHUNK_ON_CPU = search, middles, moments.CHUNK  # type: ignore[assignment]
    try:
        yield
    finally:
        blockwise._nearest, blockwise._table, moments.CHUNK_ON_CPU = kept


def timed(work: Callable[[], None]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import torch

    from graftkit.optim.base import as_optimizer

    torch.set_num_threads(1)
    print("| optimizer | before, ms | now, ms | ratio |\n| --- | ---: | ---: | ---: |")
    for name in ("adamw8bit()", "adamw4bit()"):
        torch.manual_seed(0)
        sides = []
        start = torch.randn(options.millions, 1_000_000)
        for _ in range(2):
            parameter = torch.nn.Parameter(start.clone())
            group = {"params": [parameter], "blocks": [None], "lr": 1e-3, "weight_decay": 0.0}
            sides.append((parameter, as_optimizer(name).make([group])))
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.rounds):
            gradient = torch.randn_like(start)
            for parameter, _ in sides:
                parameter.grad = gradient
            with before():
                taken[0].append(timed(sides[0][1].step))
            taken[1].append(timed(sides[1][1].step))
        states = [optimizer.state[parameter] for parameter, optimizer in sides]
        for key, value in states[0].items():
            assert not torch.is_tensor(value) or torch.equal(value, states[1][key]), key
        each = [1e3 * statistics.median(some) / options.millions for some in taken]
        ratio = statistics.median(left / right for left, right in zip(*taken))
        print(f"| `{name}` | {each[0]:.1f} | {each[1]:.1f} | {ratio:.1f} |", flush=True)
    print(f"\nMilliseconds of one core for a million numbers. {machine()}")


if __name__ == "__main__":
    main()
