"""The section about pre-training in docs/results.md, from the figures that bench/pretraining.py has kept."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from typing import Any

from common import RESULTS, ROOT, section

PAGE = ROOT / "docs" / "results.md"
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by number of seeds


def found_of(start: str) -> Iterator[dict[str, Any]]:
    for path in sorted(RESULTS.glob(f"pretrain-{start}*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def interval(values: list[float]) -> str:
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    half = T_95[len(values)] * spread / len(values) ** 0.5
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def lines() -> Iterator[str]:
    """Yield the lines of the section in docs/results.md."""
    yield "## Pre-training"
    yield ""
    yield (
        "From `bench/pretraining.py`, on two CPU cores: models of size `tiny` (2 blocks of width 128; `causal` 4) with a new tokenizer of "
        "2,048 tokens, trained on `wikitext2_valid.txt` (1.1 MB) in rows of 64 tokens, tested on `wikitext2_test.txt`. A tenth of the "
        "training documents is held out; its loss is shown at each quarter of the steps. Beside the test figures stand the cross-entropy "
        "of the test tokens under the frequencies of single training tokens, and the share of the most frequent token."
    )
    yield ""
    yield "| objective | parameters | steps | seconds | held-out loss on the way | test | single tokens |"
    yield "| --- | ---: | ---: | ---: | --- | --- | --- |"
    machines = set()
    for one in found_of("objective-"):
        names = (
            "loss",
            "perplexity",
            "bits_per_byte",
            "masked_accuracy",
            "token_accuracy",
            "masked_loss",
            "nsp_accuracy",
        )
        test = ", ".join(f"{name} {one['test'][name]:.3f}" for name in names if name in one["test"])
        losses = ", ".join(f"{loss:.2f}" for loss in one["held_out"])
        machines.add(one["machine"])
        yield (
            f"| `{one['objective']}` | {one['total_parameters']:,} | {one['steps']:,} | {one['seconds']:.0f} | {losses} | {test} | "
            f"entropy {one['entropy']:.3f}, most frequent {one['most']:.4f} |"
        )
    yield ""
    said = {
        "transfer": ("500 rows of banking77, test accuracy, from a random model and from the same model after 6,000 steps of `mlm` on the "
                     "10,003 sentences without labels, each at the best of three learning rates on 500 held-out rows", "random", "pretrained"),
        "continued": ("Ten rows of each class of banking77, test accuracy of `lora()` on MiniLM as it is, and after 300 steps of `mlm` on "
                      "the sentences, each at the best of three learning rates on 500 held-out rows", "before", "after"),
    }  # fmt: skip
    for name, (what, left, right) in said.items():
        found = list(found_of(f"{name}-"))
        if len(found) > 1:
            pairs = "; ".join(f"{row[left]:.4f} and {row[right]:.4f}" for row in found)
            gain = interval([row[right] - row[left] for row in found])
            yield f"- {what}, by seed: {pairs}. Gain {gain}, 95% interval of {len(found)} seeds."
    for one in found_of("chinese"):
        yield f"- Chinese poems: `causal` loss {one['causal']['loss']:.3f} on held-out poems; a poem that it writes: {one['poem']!r}."
    complete = any("share" in one for one in found_of("muon-"))  # else the grid is not
    if complete:
        yield (
            "- Muon and AdamW, `causal` on a `llama-mini` with 64 rows of 64 tokens a step, English texts read about once; the best of the "
            "same learning rates for each:"
        )
    for one in found_of("muon-") if complete else ():
        what = f"{one['share']:.2f} of the steps" if "share" in one else f"learning rate {one['lr']}"
        wanted = f", to reach {one['wanted']:.4f}" if "wanted" in one else ""
        yield f"    - `{one['optimizer']}`, {what} ({one['steps']:,}): held-out loss {one['loss']:.4f}{wanted}."
    for one in found_of("apart"):
        yield (
            f"- `causal(apart=true)` against `apart=false`, rows of 128 tokens: {one['ratio']:.3f} of the tokens per second, median of "
            f"{len(one['tokens_per_second']['true'])} pairs."
        )
    starts = ("objective-", "transfer-", "continued-", "chinese", "muon-share-", "apart")
    lacking = [start.strip("-").removesuffix("-share") for start in starts if not any(found_of(start))]
    if lacking:
        yield f"- Not measured yet: {', '.join(f'`{name}`' for name in lacking)}."
    yield ""
    yield f"Machine: {'; '.join(sorted(machines))}."


def write() -> None:
    """Replace the section in docs/results.md."""
    section(PAGE, "<!-- pre-training -->", "<!-- end of pre-training -->", "\n".join(lines()))
