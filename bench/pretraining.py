"""Pre-training on real texts: what the objectives learn in minutes, and whether it helps a task with few rows.

    python bench/pretraining.py objectives   # mlm_nsp, causal and glm on WikiText-2, beside the entropy of single tokens
    python bench/pretraining.py transfer     # 500 rows of banking77 with a pre-trained model and a random one, three seeds
    python bench/pretraining.py continued    # MiniLM continued on banking77's sentences, then ten rows of each class
    python bench/pretraining.py chinese      # poems of the Tang: lines written and completed
    python bench/pretraining.py muon         # steps that muon needs to reach AdamW's last loss, both over the same grid
    python bench/pretraining.py apart        # what it costs that packed documents do not attend to each other
    python bench/pretraining.py write        # the section of docs/results.md, from all that has been run

Texts come from ../shared/data (`--data`). Figures are kept in bench/results/pretrain-*.json, so that what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import MODEL, RESULTS, ROOT, machine
from pretraining_page import write

SEEDS = (0, 1, 2)
ENGLISH = ("tinyshakespeare.txt", "wikitext2_valid.txt", "wikitext2_test.txt")
LINES = "mlm(documents='lines')"
SHORT = {
    "data.max_length": 64,
    "train.batch_size": 32,
    "train.evaluate_every": "end",
    "train.schedule": "cosine",
}


def kept(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a measurement, from its file if it has been made."""
    path = RESULTS / f"pretrain-{name}.json"
    if not path.exists():
        print(f"{name} ...", flush=True)
        found = {**measure(), "machine": machine()}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def ran(out: Path, objective: str, train: Any, steps: int, **more: Any) -> Any:
    """Pre-train, and return the run."""
    import graftkit

    settings = {**SHORT, "train.steps": steps, "seed": more.pop("seed", 0), **more.pop("settings", {})}
    return graftkit.pretrain(
        objective=objective, train=train, out=out, settings=settings, overwrite=True, **more
    )


def single_tokens(model: Path, train: Path, test: Path) -> tuple[float, float]:
    """Return the cross-entropy of the test tokens under the frequencies of the training tokens, in nats, and the share of
    the most frequent one."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    counts = []
    for path in (train, test):
        ids = tokenizer(path.read_text(encoding="utf-8").splitlines(), add_special_tokens=False)["input_ids"]
        counts.append(np.bincount([i for line in ids for i in line], minlength=len(tokenizer)))
    frequencies = (counts[0] + 1) / (counts[0] + 1).sum()
    return float(-(counts[1] * np.log(frequencies)).sum() / counts[1].sum()), float(
        counts[1].max() / counts[1].sum()
    )


def objectives(data: Path) -> None:
    """What each objective learns of WikiText-2 in minutes, on its test part."""
    train, test = data / "text" / "wikitext2_valid.txt", data / "text" / "wikitext2_test.txt"
    for objective in ("mlm", "mlm_nsp", "causal", "glm"):
        steps = 2500

        def measure(objective: str = objective, steps: int = steps) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                settings = {"train.evaluate_every": steps // 4}
                run = ran(
                    Path(folder),
                    objective,
                    train,
                    steps,
                    size="tiny",
                    vocabulary=2048,
                    test=test,
                    settings=settings,
                )
                entropy, most = single_tokens(Path(folder) / "model", train, test)
                lines = [
                    json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
                ]
                losses = [round(line["loss"], 4) for line in lines if line["kind"] == "evaluation"]
                result = run.result
            return {"objective": objective, "test": run.metrics, "held_out": losses, "entropy": entropy, "most": most,
                    **{key: result[key] for key in ("steps", "tokens", "tokens_per_second", "seconds", "total_parameters")}}  # fmt: skip

        kept(f"objective-{objective}", measure)


def sample(data: Path, each: int, most: int, seed: int, folder: Path) -> tuple[Path, Path]:
    """Write `each` rows of each class of banking77, `most` in all, and 500 others to choose by; return both files."""
    with (data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    random.Random(seed).shuffle(rows)
    taken: dict[str, int] = {}
    chosen, others = [], []
    for row in rows:
        wanted = len(chosen) < most and taken.get(row["category"], 0) < each
        taken[row["category"]] = taken.get(row["category"], 0) + wanted
        (chosen if wanted else others).append(row)
    paths = folder / "rows.csv", folder / "held.csv"
    for path, kept_rows in zip(paths, (chosen, others[:500])):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "category"])
            writer.writeheader()
            writer.writerows(kept_rows)
    return paths


def sentences(data: Path, folder: Path) -> Path:
    """Write the texts of banking77's training rows, one a line, without their labels."""
    with (data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        texts = [" ".join(row["text"].split()) for row in csv.DictReader(file)]
    path = folder / "sentences.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def tuned(
    models: dict[str, str],
    rows: tuple[Path, Path],
    data: Path,
    folder: Path,
    seed: int,
    method: str,
    epochs: int,
    rates: tuple[float, ...],
) -> dict[str, Any]:
    """Return the test accuracy of each model fine-tuned on some rows, at the rate that is best on its held-out rows."""
    import graftkit

    found: dict[str, Any] = {}
    for name, model in models.items():
        made = {}
        for rate in rates:
            run = graftkit.tune(
                model=model, task="classify", train=rows[0], eval=rows[1], test=data / "banking77" / "test.csv",
                method=method, out=folder / "tuned", overwrite=True,
                settings={"train.epochs": epochs, "train.batch_size": 16, "train.lr": rate, "seed": seed,
                          "data.columns": {"label": "category"}, "data.max_length": 64, "train.evaluate_every": "end"},
            )  # fmt: skip
            made[rate] = run.result["evaluation"]["accuracy"], run.metrics["accuracy"]
        rate = max(made, key=lambda one: made[one][0])
        found |= {
            name: made[rate][1],
            f"{name}_lr": rate,
            f"{name}_held": {str(one): made[one][0] for one in made},
        }
    return found


def transfer(data: Path) -> None:
    """500 rows of banking77 with a model that saw the 10,003 sentences without labels, and with a random one."""
    for seed in SEEDS:

        def measure(seed: int = seed) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                rows = sample(data, 7, 500, seed, folder)
                settings = {"data.eval": None, "train.batch_size": 64, "train.lr": 2e-3}
                ran(folder / "pre", LINES, sentences(data, folder), 6000, size="tiny", vocabulary=2048, seed=seed,
                    settings=settings)  # fmt: skip
                models = {
                    "random": str(folder / "pre" / "initial"),
                    "pretrained": str(folder / "pre" / "model"),
                }
                method = "full() + head(pooling='mean')"
                return {
                    "seed": seed,
                    **tuned(models, rows, data, folder, seed, method, 30, (5e-4, 1e-3, 2e-3)),
                }

        kept(f"transfer-{seed}", measure)


def continued(data: Path) -> None:
    """MiniLM continued by masked language modelling on banking77's sentences, then ten rows of each class."""
    for seed in SEEDS:

        def measure(seed: int = seed) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                rows = sample(data, 10, 770, seed, folder)
                settings = {"data.eval": None, "train.lr": 5e-5}
                ran(folder / "pre", LINES, sentences(data, folder), 300, model=MODEL, method="full()", seed=seed,
                    settings=settings)  # fmt: skip
                models = {"before": MODEL, "after": str(folder / "pre" / "model")}
                method = "lora() + head(pooling='mean')"
                return {
                    "seed": seed,
                    **tuned(models, rows, data, folder, seed, method, 10, (5e-4, 1e-3, 2e-3)),
                }

        kept(f"continued-{seed}", measure)


def chinese(data: Path) -> None:
    """Pre-train on poems of the Tang; write one, and complete a line."""

    def measure() -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            texts = folder / "poems.txt"
            texts.write_text(
                (data / "text" / "tang_poems.txt").read_text(encoding="utf-8")[:900_000], encoding="utf-8"
            )
            found: dict[str, Any] = {}
            run = ran(folder / "causal", "causal", texts, 3000, size="tiny", vocabulary=4096)
            found["causal"] = run.metrics
            tokenizer = AutoTokenizer.from_pretrained(folder / "causal" / "model")
            model = AutoModelForCausalLM.from_pretrained(folder / "causal" / "model").eval()
            torch.manual_seed(0)
            start = tokenizer("明月", return_tensors="pt")
            poem = model.generate(**start, do_sample=True, top_k=20, max_new_tokens=40)
            found["poem"] = tokenizer.decode(poem[0], skip_special_tokens=True)
            run = ran(folder / "glm", "glm", texts, 3000, size="tiny", vocabulary=4096)
            found["glm"] = run.metrics
            lines = ["床前明月光，疑是地上[MASK]。", "春眠不覺曉，處處聞[MASK]。"]
            found["filled"] = run.predict(lines)
            shutil.rmtree(folder / "glm")
        return found

    kept("chinese", measure)


def muon(data: Path) -> None:
    """How many steps muon needs for AdamW's last held-out loss, each with the best learning rate of the same grid, where each
    text is read about once."""
    rates = (5e-4, 1e-3, 2e-3, 4e-3)
    steps = 300

    def measure(optimizer: str, rate: float, count: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            texts = [(data / "text" / one).read_text(encoding="utf-8") for one in ENGLISH]
            (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
            settings = {"train.optimizer": optimizer, "train.lr": rate, "train.batch_size": 64}
            more = {"size": "llama-mini", "vocabulary": 1024, "settings": settings}
            run = ran(folder / "run", "causal", folder / "texts.txt", count, **more)
        return {"optimizer": optimizer, "lr": rate, "steps": count, "loss": run.metrics["loss"]}

    best: dict[str, tuple[float, float]] = {}
    for optimizer in ("adamw()", "muon()"):
        for rate in rates:
            work = partial(measure, optimizer, rate, steps)
            found = kept(f"muon-{optimizer[:-2]}-{rate}-{steps}", work)
            best[optimizer] = min(best.get(optimizer, (math.inf, 0.0)), (found["loss"], rate))
    for share in (0.65, 0.58, 0.5):
        count = round(share * steps)

        def shorter(share: float = share, count: int = count) -> dict[str, Any]:
            return {
                **measure("muon()", best["muon()"][1], count),
                "share": share,
                "wanted": best["adamw()"][0],
            }

        kept(f"muon-share-{share}", shorter)


def apart(data: Path) -> None:
    """Tokens per second of `causal` with documents kept apart or not, in turn."""
    train = data / "text" / "wikitext2_valid.txt"

    def measure() -> dict[str, Any]:
        found: dict[str, list[float]] = {"true": [], "false": []}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(5):
                for how, speeds in found.items():
                    settings = {"data.max_length": 128, "data.eval": None}
                    run = ran(
                        Path(folder),
                        f"causal(apart={how})",
                        train,
                        60,
                        size="tiny",
                        vocabulary=2048,
                        settings=settings,
                    )
                    speeds.append(run.result["tokens_per_second"])
        ratio = statistics.median(left / right for left, right in zip(found["true"], found["false"]))
        return {"tokens_per_second": found, "ratio": ratio}

    kept("apart", measure)


COMMANDS = {
    "objectives": objectives,
    "transfer": transfer,
    "continued": continued,
    "chinese": chinese,
    "muon": muon,
    "apart": apart,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="+", choices=[*COMMANDS, "write"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    given = parser.parse_args()
    for command in given.command:
        write() if command == "write" else COMMANDS[command](given.data)


if __name__ == "__main__":
    main()
