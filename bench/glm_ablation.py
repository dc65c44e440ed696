"""GLM's shuffled spans and second position, each against leaving it out: how well blanks are filled on held-out text.

    python bench/glm_ablation.py run [--data ../shared/data/text] [--seeds 0,1,2] [--only both,neither] [--quick]
    python bench/glm_ablation.py show [--quick]

All variants have the same tokenizer, texts, batches, steps and blanks to fill in; they differ in the order of the blanks in
part B and in the positions of their tokens. The figures of a run are kept in bench/results/, so that an interrupted
measurement goes on. The evaluation leaves out the same spans of held-out documents in every run, in the order of the text:
`loss` and `token_accuracy` of a token given those before it in its blank, and all blanks before; and of texts with
one blank each, `single`, the loss of a token of the blank, and `exact`, the share of blanks that greedy decoding fills word
for word.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, machine

FOLDER = ROOT / "bench" / "results"
DATA = ROOT.parent / "shared" / "data" / "text"
VARIANTS = {  # (shuffled spans, second position)
    "both": (True, True),
    "no shuffling": (False, True),
    "one position": (True, False),
    "neither": (False, False),
}
WHOLE = {
    "texts": "wikitext2_valid.txt", "held": "wikitext2_test.txt", "characters": 1_100_000, "vocabulary": 2048, "width": 128,
    "layers": 2, "length": 64, "steps": 2000, "batch_size": 32, "lr": 2e-3, "blanks": 400,
}  # fmt: skip
QUICK = WHOLE | {
    "characters": 150_000, "vocabulary": 1024, "width": 64, "steps": 150, "batch_size": 16,
    "blanks": 40,
}  # fmt: skip
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by number of seeds


def prepare(data: Path, how: dict[str, Any], folder: Path) -> Any:
    """Write train.txt and held.txt, a paragraph each line, and return a tokenizer that was trained on the first."""
    from transformers import AutoTokenizer

    import graftkit

    for name, kept in (("texts", "train.txt"), ("held", "held.txt")):
        share = 1 if name == "texts" else 4
        text = (data / how[name]).read_text(encoding="utf-8")[: how["characters"] // share]
        lines = [line.strip() for line in text.splitlines()]
        (folder / kept).write_text("\n".join(line for line in lines if len(line) > 100), encoding="utf-8")
    graftkit.train_tokenizer(
        str(folder / "train.txt"), kind="wordpiece", vocab=how["vocabulary"], special="glm", lowercase=True,
        documents="lines", out=folder / "tokenizer",
    )  # fmt: skip
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def measure(variant: str, seed: int, data: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Pre-train one variant and fill in blanks with it."""
    import torch
    from transformers import AutoModelForMaskedLM

    import graftkit
    from graftkit.backbone.glm import GraftKitGlmConfig

    shuffle, two = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as place:
        folder, start = Path(place), time.perf_counter()
        tokenizer = prepare(data, how, folder)
        torch.manual_seed(seed)
        config = GraftKitGlmConfig(
            vocab_size=len(tokenizer), hidden_size=how["width"], num_hidden_layers=how["layers"],
            num_attention_heads=how["width"] // 32, intermediate_size=4 * how["width"],
            max_position_embeddings=how["length"], block_positions=two, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder / "model")
        tokenizer.model_max_length = how["length"]
        tokenizer.save_pretrained(folder / "model")
        run = graftkit.tune(
            model=str(folder / "model"), task=f"glm(shuffle={shuffle}, block=0.0, documents='lines')",
            train=str(folder / "train.txt"), eval=str(folder / "held.txt"), method="full()", out=folder / "run",
            settings={
                "seed": seed, "train.steps": how["steps"], "train.batch_size": how["batch_size"], "train.lr": how["lr"],
                "train.evaluate_every": "end", "train.precision": "fp32",
            },
        )  # fmt: skip
        texts, wanted = blanks(folder / "held.txt", how, tokenizer)
        found = [answer["blanks"][0] for answer in run.predict(texts, {"max_new_tokens": 16})]
        model = AutoModelForMaskedLM.from_pretrained(folder / "run" / "model").eval()
        single = loss_of(model, tokenizer, texts, wanted)
        read = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in wanted]
    exact = sum(a == b for a, b in zip(found, read)) / len(read)
    return {
        "variant": variant, "seed": seed, "machine": machine(), "how": how, "seconds": time.perf_counter() - start,
        "loss": run.metrics["loss"], "token_accuracy": run.metrics["token_accuracy"], "single": single, "exact": exact,
    }  # fmt: skip


def blanks(path: Path, how: dict[str, Any], tokenizer: Any) -> tuple[list[str], list[str]]:
    """Return texts of 20 words with one to three of them left out, the same each time, and these words."""
    import numpy as np

    random, texts, wanted = np.random.default_rng(0), [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()[:20]
        if len(tokenizer(" ".join(words))["input_ids"]) > how["length"] or len(texts) == how["blanks"]:
            continue
        size = int(random.integers(1, 4))
        start = int(random.integers(1, len(words) - size))
        wanted.append(" ".join(words[start : start + size]))
        texts.append(" ".join([*words[:start], "[MASK]", *words[start + size :]]))
    return texts, wanted


def loss_of(model: Any, tokenizer: Any, texts: list[str], wanted: list[str]) -> float:
    """Return the mean cross-entropy of the tokens of the blanks and their ends, for texts with one blank each."""
    import torch

    from graftkit.tasks.shared.blanks import marks_of

    marks, losses = marks_of(tokenizer, "the bench"), []
    for text, words in zip(texts, wanted):
        part_a, blank = tokenizer(text)["input_ids"], tokenizer(words, add_special_tokens=False)["input_ids"]
        first, length = len(part_a), len(part_a) + len(blank) + 1
        places = [*range(first), *[part_a.index(marks.token)] * (len(blank) + 1)]
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([[*part_a, marks.start, *blank]]),
                position_ids=torch.tensor([places if model.config.block_positions else range(length)]),
                block_position_ids=torch.tensor([[0] * first + list(range(1, len(blank) + 2))]),
            ).logits[0, first:]
        targets = torch.tensor([*blank, marks.end])
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses).mean().item()


def path_of(variant: str, seed: int, quick: bool) -> Path:
    return FOLDER / f"glm-{'quick-' * quick}{variant.replace(' ', '_')}-{seed}.json"


def run_all(data: Path, seeds: list[int], variants: list[str], quick: bool) -> None:
    FOLDER.mkdir(exist_ok=True)
    for seed in seeds:
        for variant in variants:
            path = path_of(variant, seed, quick)
            if not path.exists():
                found = measure(variant, seed, data, QUICK if quick else WHOLE)
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(
                    f"{variant}, seed {seed}: loss {found['loss']:.4f}, {found['seconds']:.0f} s", flush=True
                )


def show(quick: bool) -> str:
    """Return a table of the kept figures, and the difference of each variant from the one with both, by seed."""
    kept = [json.loads(path.read_text()) for path in sorted(FOLDER.glob(f"glm-{'quick-' * quick}*.json"))]
    kept = [one for one in kept if one["how"] == json.loads(json.dumps(QUICK if quick else WHOLE))]
    if not kept:
        return "no run is kept; begin with `python bench/glm_ablation.py run`."
    losses = {(one["variant"], one["seed"]): one["loss"] for one in kept}
    lines = []
    for variant in VARIANTS:
        runs = [one for one in kept if one["variant"] == variant]
        if not runs:
            continue
        names = "loss", "token_accuracy", "single", "exact"
        means = [statistics.mean(one[name] for one in runs) for name in names]
        differences = [
            one["loss"] - losses[both] for one in runs if (both := ("both", one["seed"])) in losses
        ]
        lines.append([
            variant, str(len(runs)), f"{means[0]:.4f}", f"{math.exp(means[0]):.1f}", f"{means[1]:.4f}", f"{means[2]:.4f}",
            f"{means[3]:.4f}", interval(differences) if variant != "both" else "",
        ])  # fmt: skip
    head = (
        "variant",
        "seeds",
        "loss",
        "perplexity",
        "token accuracy",
        "single blanks",
        "exact",
        "loss above both",
    )
    rows = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *lines)]
    return "\n".join([*rows, "", kept[0]["machine"]])


def interval(differences: list[float]) -> str:
    """Return the mean of differences by seed, with a 95% interval if there are several."""
    mean = statistics.mean(differences) if differences else math.nan
    if len(differences) not in T_95:
        return f"{mean:+.4f}"
    half = T_95[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, separated by commas")
    parser.add_argument("--quick", action="store_true", help="a smaller model on less text")
    given = parser.parse_args()
    if given.what == "run":
        seeds = [int(seed) for seed in given.seeds.split(",")]
        run_all(given.data, seeds, given.only.split(","), given.quick)
    print(show(given.quick))


if __name__ == "__main__":
    main()
