"""The runs whose losses are recorded, and what is recorded of them. Of GraftKit only `graftkit.tune` is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from inputs import (
    answered,
    choices,
    numbers,
    pairs,
    pictures,
    questions,
    sets,
    sounds,
    steps,
    tagged,
    texts,
)

import graftkit

STEPS = 10
ROWS = 20  # with batches of 8: three steps an epoch, the last of them smaller
SETTINGS = {
    "train.precision": "fp32",
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.evaluate_every": "end",
    "seed": 7,
}


@dataclass(frozen=True)
class Case:
    """One run: a task with a method, or with none for `prompting`."""

    task: str
    model: str
    rows: Callable[[int], list[dict[str, Any]]]
    method: str | None
    count: int = ROWS
    eval: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


HEAD = "head(lr=0.03)"
METHODS = {
    "lora": "lora(rank=4, lr=0.02)",
    "dora": "dora(rank=4, lr=0.02)",
    "adapter": "adapter(lr=0.02)",
    "ia3": "ia3(lr=0.05)",
    "full": "full(lr=0.005) + layerwise_lr(decay=0.9)",
    "unfreeze": "unfreeze('blocks[-1:]', lr=0.005)",  # with texts, images and sounds, those below are kept
    "gradual": "gradual_unfreeze(every=4, unit='steps', lr=0.005)",  # the head, then one more block, then two
}
MORE_METHODS = {  # with `classify` alone
    "bitfit": "bitfit(lr=0.02)",
    "norms": "norms(lr=0.02)",
    "pissa": "pissa(rank=4, lr=0.005)",
    "adalora": "adalora(rank=4, target_rank=2, warmup_steps=2, final_steps=2, lr=0.02)",
    "vera": "vera(rank=8, lr=0.05)",
    "loha": "loha(rank=2, lr=0.02)",
    "lokr": "lokr(rank=2, lr=0.02)",
    "freeze": "full(lr=0.005) + freeze('embeddings,blocks[0]')",
}
TASKS = {
    "classify": Case("classify", "bert", texts, None),
    "tag": Case("tag", "bert", tagged, None),
    "span": Case("span(doc_stride=8)", "bert", questions, None, settings={"data.max_length": 32}),
    "choice": Case("choice", "bert", choices, None),
    "generate": Case("generate", "llama", answered, None),
    "image_classify": Case("image_classify", "vit", pictures, None),
    "audio_classify": Case("audio_classify", "ast", sounds, None),
}
HEADLESS = {"generate"}
TEMPLATE = "{text} is a {label}"


def _cases() -> dict[str, Case]:
    found = {}
    for name, case in TASKS.items():
        for short, method in METHODS.items():
            whole = method if name in HEADLESS else f"{method} + {HEAD}"
            found[f"{name}-{short}"] = replace(case, method=whole, eval=0.2 if short == "lora" else None)
        if name not in HEADLESS:
            found[f"{name}-head"] = replace(case, method=HEAD)
    for short, method in MORE_METHODS.items():
        found[f"classify-{short}"] = replace(TASKS["classify"], method=f"{method} + {HEAD}")
    found["classify-galore"] = replace(
        TASKS["classify"],
        method=f"full(lr=0.005) + {HEAD}",
        settings={"train.optimizer": "galore(rank=4, scale=1.0)"},
    )
    lora = f"{METHODS['lora']} + {HEAD}"
    order = "order=['short', 'middle', 'long']"
    found |= {
        "classify_pairs-lora": Case("classify(class_weights='balanced')", "bert", pairs, lora),
        "classify_pooled-head": Case("classify", "bert", texts, "head(pooling='mean', lr=0.03)"),
        "tag_pooled-head": Case("tag", "bert", tagged, "head(pooling='tokens', lr=0.03)"),
        "classify_multi-lora": Case("classify(kind='multi')", "bert", sets, lora),
        "classify_ordinal-lora": Case(f"classify(kind='ordinal', {order})", "bert", steps, lora),
        "classify_regression-lora": Case("classify(kind='regression')", "bert", numbers, lora),
        "classify_accumulate-lora": replace(
            TASKS["classify"], method=lora, settings={"train.accumulate": 2, "train.label_smoothing": 0.1}
        ),
        "generate_packing-lora": Case(
            "generate(packing=True)", "llama", answered, METHODS["lora"], 40, settings={"train.batch_size": 2}
        ),
        "generate_packing-full": Case(
            "generate(packing=True)", "llama", answered, METHODS["full"], 40, settings={"train.batch_size": 2}
        ),
        "generate_all-lora": Case("generate(loss='all')", "llama", answered, METHODS["lora"]),
        "generate_t5-lora": Case("generate", "t5", answered, METHODS["lora"]),
        "image_changes-lora": Case(
            "image_classify(flip=0.5, mixup=0.2, randaugment=1)", "vit", pictures, lora
        ),
        "audio_changes-lora": Case("audio_classify(gain=6, shift=0.02, spec_augment=True)", "ast", sounds, lora),
        "audio_waves-full": Case("audio_classify", "wav2vec2", sounds, f"{METHODS['full']} + {HEAD}"),
    }  # fmt: skip
    for model in ("masked", "gpt2"):
        for options in ("", ", shots=2", ", calibrate=True"):
            name = f"prompting-{model}{options.replace(', ', '-').replace('=', '')}"
            found[name] = Case(f"prompting(template={TEMPLATE!r}{options})", model, texts, None, eval=0.5)
    return found


CASES = _cases()


def run(name: str, model: Path, out: Path) -> dict[str, Any]:
    """What one case gives, on one thread: `loss` and `gradient_norm` of each step, with `evaluation` the loss of the held
    out rows where there are any; or `metrics` where nothing is trained."""
    case = CASES[name]
    settings = SETTINGS | case.settings
    if case.method is None:
        del settings["train.steps"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = graftkit.tune(
            model=str(model), task=case.task, train=case.rows(case.count), eval=case.eval, method=case.method, out=out,
            settings=settings,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    if case.method is None:
        return {"metrics": {key: v for key, v in done.metrics.items() if isinstance(v, int | float)}}
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    found: dict[str, Any] = {"loss": [], "gradient_norm": []}
    for line in lines:
        if line["kind"] == "step":
            found["loss"].append(line["loss"])
            found["gradient_norm"].append(line["gradient_norm"])
        elif line["kind"] == "evaluation":
            found["evaluation"] = line["loss"]
    return found
