"""The command for pre-training. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graftkit.cli.options import Arguments, Eval, Json, MethodName, Out, Test, console_of, emit, recipe_values
from graftkit.errors import UserError

Objective = Annotated[str | None, typer.Option(help="the objective, for example 'mlm(share=0.2)' or causal")]
Texts = Annotated[
    str | None,
    typer.Option("--train", help="texts: a text, JSON lines or Parquet file, or a folder of these"),
]
Size = Annotated[
    str | None, typer.Option(help="a new model of this size, such as mini or bert-small; default: mini")
]
From = Annotated[
    str | None, typer.Option("--from", metavar="MODEL", help="continue with this model instead of a new one")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="folder with the tokenizer of a new model; default: one trained on the texts"),
]
Vocabulary = Annotated[
    int | None, typer.Option(help="tokens of a new tokenizer; default: what suits the size")
]
Budget = Annotated[
    str | None, typer.Option(help="how long it may take, such as '20 min'; chooses size, batch and steps")
]
Probe = Annotated[
    str | None, typer.Option(help="labelled rows to classify from frozen features at each evaluation")
]


def pretrain(
    arguments: Arguments = None, objective: Objective = None, train: Texts = None, eval: Eval = None, test: Test = None,
    size: Size = None, start: From = None, tokenizer: Tokenizer = None, vocabulary: Vocabulary = None,
    budget: Budget = None, probe: Probe = None, method: MethodName = None, out: Out = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="resume an unfinished run")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the run folder if it exists")] = False,
    force: Annotated[bool, typer.Option(help="resume although the recipe, texts or model have changed")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Pre-train a new model on texts without labels, or continue with an existing one.

    The recipe is that of `graftkit tune`, with an objective as its task. The result is a plain model in RUN/model, which
    transformers and `graftkit tune --model RUN/model` load.
    """
    given: dict[str, Any] = {
        "task": objective, "data.train": train, "data.eval": eval, "data.test": test, "size": size, "model": start,
        "tokenizer": tokenizer, "vocabulary": vocabulary, "budget": budget, "data.probe": probe, "method": method,
        "out": out,
    }  # fmt: skip
    console = console_of(as_json)
    if resume is not None:
        if arguments or any(value is not None for value in given.values()) or overwrite:
            raise UserError(
                "--resume continues an unfinished run unchanged; it takes no other options or settings."
            )
        from graftkit.runs.tune import resume_run

        emit(as_json, resume_run(resume, console, force=force).result)
        return
    if force:
        raise UserError("--force is for --resume RUN; a new run has nothing to compare its inputs with.")
    from graftkit.recipe import schema as recipes

    recipe = recipes.for_pretraining(recipe_values(arguments, given))
    from graftkit.runs.tune import run_recipe

    emit(as_json, run_recipe(recipe, console, overwrite=overwrite).result)
