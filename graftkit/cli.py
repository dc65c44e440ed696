"""The command line: argv to recipe to run. Torch is imported only when work begins."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.errors import Interrupted, UserError

if TYPE_CHECKING:
    from graftkit.report.console import Console

# typer brings its own copy of click from 0.25 on, so its errors are told by their common base
UsageMistake: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Adapt a pre-trained model to a task: heads, LoRA, adapters, prefixes, partial and full fine-tuning.",
)

Json = Annotated[
    bool, typer.Option("--json", help="print one JSON object on standard output and nothing else there")
]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE.yaml] [key=value ...]", help="a recipe, and settings put over it"),
]
Model = Annotated[str | None, typer.Option(help="model folder, hub id, or package.module:function")]
Weights = Annotated[
    str | None, typer.Option(help="safetensors file for the module that package.module:function makes")
]
TaskName = Annotated[str | None, typer.Option("--task", help="what is learned, for example classify")]
Train = Annotated[str | None, typer.Option(help="training rows")]
Eval = Annotated[
    str | None, typer.Option(help="rows to evaluate on, or the share of the training rows to hold out")
]
Test = Annotated[str | None, typer.Option(help="rows that are only looked at in the end")]
MethodName = Annotated[str | None, typer.Option("--method", help="how, for example 'lora(rank=8) + head()'")]
Out = Annotated[str | None, typer.Option(help="run folder; default: a new one under runs/")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]


def _methods_help() -> str:
    from graftkit.catalogue import entries

    lines = ["Methods, joined by '+' (`graftkit methods NAME` says more):", "", "\b"]
    names = entries("method")
    width = max(map(len, names))
    lines += [f"{name:<{width}}  {entry.summary}" for name, entry in names.items()]
    return "\n".join(lines)


def _recipe_values(arguments: list[str] | None, given: dict[str, Any]) -> dict[str, Any]:
    from graftkit import recipe as recipes

    arguments = list(arguments or [])
    values: dict[str, Any] = {}
    if arguments and "=" not in arguments[0]:
        values = recipes.read(Path(arguments.pop(0)))
    files = [argument for argument in arguments if "=" not in argument]
    if files:
        raise UserError(f"{files[0]!r} is neither the recipe (which comes first) nor a key=value setting.")
    for key, value in given.items():
        if isinstance(value, str) and not value.strip():
            raise UserError(f"--{key.removeprefix('data.')} is empty.")
        if value is not None:
            recipes.place(values, key, _share(value) if key == "data.eval" else value)
    return recipes.override(values, arguments)


def _share(text: str) -> str | float | None:
    if text in ("null", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _given(model: Any, weights: Any, task: Any, train: Any, eval: Any, test: Any, method: Any,
           out: Any) -> dict[str, Any]:  # fmt: skip
    return {
        "model": model, "weights": weights, "task": task, "data.train": train, "data.eval": eval, "data.test": test,
        "method": method, "out": out,
    }  # fmt: skip


def _console(as_json: bool) -> Console:
    from graftkit.report.console import Console

    return Console(json=as_json)


def _emit(as_json: bool, value: dict[str, Any]) -> None:
    if as_json and os.environ.get("RANK", "0") == "0":  # the first of several processes
        print(json.dumps(value, ensure_ascii=False))


@app.command()
def tune(
    arguments: Arguments = None, model: Model = None, weights: Weights = None, task: TaskName = None,
    train: Train = None, eval: Eval = None, test: Test = None, method: MethodName = None, out: Out = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="go on with an unfinished run")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the run folder if it exists")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Fine-tune a model as a recipe says.

    The recipe is a YAML file, key=value settings, options, or all of them: later ones are put over earlier ones.
    """
    given = _given(model, weights, task, train, eval, test, method, out)
    console = _console(as_json)
    if resume is not None:
        if arguments or any(value is not None for value in given.values()) or overwrite:
            raise UserError(
                "--resume goes on with a run as it is; give no other options or settings with it."
            )
        from graftkit.run import resume_run

        _emit(as_json, resume_run(resume, console).result)
        return
    from graftkit import recipe as recipes

    recipe = recipes.make(_recipe_values(arguments, given))
    from graftkit.run import run_recipe

    _emit(as_json, run_recipe(recipe, console, overwrite=overwrite).result)


@app.command()
def plan(
    arguments: Arguments = None, model: Model = None, weights: Weights = None, task: TaskName = None,
    train: Train = None, eval: Eval = None, test: Test = None, method: MethodName = None, out: Out = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Say what a recipe will cost: parameters, bytes and steps. Nothing is trained."""
    from graftkit import recipe as recipes

    recipe = recipes.make(
        _recipe_values(arguments, _given(model, weights, task, train, eval, test, method, out))
    )
    from graftkit.run import plan as run_plan

    _emit(as_json, run_plan(recipe, _console(as_json)).as_dict())


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="model folder, hub id, or package.module:function")],
    weights: Weights = None, method: MethodName = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Show a model's anatomy, what selections match, and what a method would train."""
    from graftkit.catalogue import parse

    if method is not None:
        parse(method, "method")
    from graftkit.inspect_model import inspect_model, show

    found = inspect_model(model, method, weights)
    if as_json:
        _emit(True, found)
    else:
        show(_console(False), found)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one method, in full")] = None,
    as_json: Json = False,
) -> None:
    """Say what methods there are, and what one of them does."""
    from graftkit.catalogue import entries, parse

    known = entries("method")
    if name is not None:
        known = {name: known[parse(name, "method")[0].name]}
    if as_json:
        about = {n: {"docstring": e.docstring, "options": {o.name: o.default for o in e.options.values()}}
                 for n, e in known.items()}  # fmt: skip
        _emit(True, about)
    elif name is None:
        typer.echo(_methods_help().replace("\b\n", ""))
    else:
        options = [f"  {o.name} = {o.default!r}  {o.help}" for o in known[name].options.values()]
        typer.echo("\n".join([name, "", known[name].docstring, "", "Options:", *(options or ["  none"])]))


@app.command()
def evaluate(
    run: RunFolder, data: Annotated[str, typer.Option(help="labelled rows")], as_json: Json = False
) -> None:
    """Metrics of a run on labelled rows."""
    _refuse_empty(data)
    from graftkit.use import evaluate as run_evaluate

    found = run_evaluate(run, data)
    if as_json:
        _emit(True, found)
        return
    from graftkit.report.summary import show_metrics

    show_metrics(_console(False), found, found["headline"])


def _refuse_empty(data: str | None) -> None:
    if data is not None and not data.strip():
        raise UserError("--data is empty; name a file of rows.")


@app.command()
def predict(
    run: RunFolder,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT ...]", help="texts to answer")] = None,
    data: Annotated[str | None, typer.Option(help="rows to answer, a file")] = None,
    out: Annotated[
        Path | None, typer.Option(help="write the answers as JSON lines or, for .csv, as CSV")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the file of answers if it exists")] = False,
    as_json: Json = False,
) -> None:
    """Answers of a run for texts or for the rows of a file."""
    if bool(texts) == (data is not None):
        raise UserError("give either texts or --data FILE to predict.")
    _refuse_empty(data)
    from graftkit.report.table import check_path, write_rows

    if out is not None:
        check_path(out, data, overwrite)
    from graftkit.use import answer

    found = answer(run, data if data is not None else texts)
    predictions = found["predictions"]
    if out is not None:
        write_rows(out, predictions)
    lines = found.pop("lines")
    if found["skipped"]:
        print(
            f"{found['skipped']} bad rows were left out:",
            *found["skipped_rows"][:20],
            sep="\n",
            file=sys.stderr,
        )
    if as_json:
        _emit(True, {"run": str(run), **found})
    elif out is not None:
        print(f"{len(predictions)} answers are in {out}", file=sys.stderr)
    else:
        print("\n".join(lines))


@app.command()
def merge(
    grafts: Annotated[list[Path], typer.Argument(metavar="GRAFT", help="LoRA grafts: folders of grafts, runs or PEFT")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    weights: Annotated[str | None, typer.Option(help="one for each graft, as in 0.7,0.3; default: all the same")] = None,
    how: Annotated[str, typer.Option(help="cat, svd, linear, ties, dare, magnitude; ties-svd and the like")] = "cat",
    density: Annotated[float | None, typer.Option(help="share kept by ties, dare and magnitude")] = None,
    rank: Annotated[int | None, typer.Option(help="rank of the result of svd; default: the largest of the grafts")] = None,
    heads: Annotated[str, typer.Option(help="mean (by weight), first or none")] = "mean",
    sign: Annotated[str, typer.Option(help="majority in ties: total (by sum) or frequency")] = "total",
    seed: Annotated[int, typer.Option(help="seed of dare")] = 0,
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it exists")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make one LoRA graft of several, without loading their model.

    cat is the weighted sum itself, with a rank as large as all together; svd comes nearest to it at a lower rank.
    """
    from graftkit.merging import merge as run_merge

    folder = run_merge(
        grafts, out, weights=_numbers(weights), how=how, density=density, rank=rank, heads=heads, sign=sign, seed=seed,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        _emit(True, {"graft": str(folder)})
    else:
        print(f"the merged graft is in {folder}", file=sys.stderr)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights is {text!r}; write numbers with commas between them: 0.7,0.3.") from None


@app.command()
def export(
    run: RunFolder, to: Annotated[Path, typer.Option(help="folder to write")],
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it holds a model")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a run as a plain model: the graft folded in, compared with the run on real rows."""
    from graftkit.export import export as run_export

    done = run_export(run, to, overwrite=overwrite)
    _emit(as_json, done)
    if not as_json:
        print(f"written: {done['to']} ({', '.join(done['files'])})")
        which = "rows" if done["rows_real"] else "made-up rows (no data file of the run could be read)"
        print(
            f"compared on {done['rows_compared']} {which}: largest difference of a logit {done['largest_difference']:.2g}"
        )
        print(f"load it with: {done['load_with']}")


@app.command()
def recipe(
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON Schema of a recipe, for editors")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what can stand in a recipe."""
    from graftkit import recipe as recipes

    if schema or as_json:
        print(json.dumps(recipes.schema(), indent=None if as_json else 2, ensure_ascii=False))
        return
    for key, description in recipes.keys().items():
        print(f"{key:<24} {description}")
    print("\n" + _methods_help().replace("\b\n", ""))


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="run folder")] = "runs/demo",
    overwrite: Annotated[bool, typer.Option(help="replace the run folder if it exists")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a packaged MiniLM on 77 intents of bank customers, in about two minutes on two cores."""
    from graftkit.demo import run_demo

    _emit(as_json, run_demo(_console(as_json), out, overwrite))


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exit with 0, 1 for a user's mistake, 130 for Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tune_command = next(c for c in app.registered_commands if c.callback is tune)
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["tune"] and "--help" in words:
        tune_command.epilog = _methods_help()
    as_json = "--json" in words
    try:
        result = app(args=arguments, standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except UserError as error:
        _stop(1, f"error: {error}", as_json)
    except UsageMistake as error:  # type: ignore[misc]
        _stop(1, _usage(error), as_json)
    except Interrupted as stop:
        _stop(130, f"\n{stop}", as_json)
    except (KeyboardInterrupt, typer.Abort):
        _stop(130, "\nstopped", as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _usage(error: Any) -> str:
    if type(error).__name__ == "NoArgsIsHelpError":
        return error.format_message()
    hint = f" See `{error.ctx.command_path} --help`." if getattr(error, "ctx", None) else ""
    return f"error: {error.format_message()}{hint}"


def _stop(status: int, message: str, as_json: bool) -> None:
    """Say why on standard error, with --json also as the one object on standard output."""
    print(message, file=sys.stderr)
    _emit(as_json, {"error": message.strip().removeprefix("error: ")})
    sys.exit(status)


if __name__ == "__main__":
    main()
