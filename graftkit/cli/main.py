"""The command line: from argv to a recipe to a run. Torch is imported only when work starts."""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import suppress
from errno import EIO, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.cli import bench as cli_bench
from graftkit.cli import cached as cli_cached
from graftkit.cli import compare as cli_compare
from graftkit.cli import data as cli_data
from graftkit.cli import explain as cli_explain
from graftkit.cli import fit as cli_fit
from graftkit.cli import label as cli_label
from graftkit.cli import plan as cli_plan
from graftkit.cli import pretraining
from graftkit.cli import reports as cli_reports
from graftkit.cli import runs as cli_runs
from graftkit.cli import tokenizer as cli_tokenizer
from graftkit.cli.options import (
    Arguments,
    Eval,
    Json,
    Memory,
    MethodName,
    Model,
    Out,
    TaskName,
    Test,
    Time,
    Train,
    Weights,
    console_of,
    emit,
    flush_output,
    given_values,
    limited,
    lost_output,
    recipe_values,
)
from graftkit.errors import Interrupted, Note, UserError, first_line
from graftkit.files import PERMIT

if TYPE_CHECKING:
    from graftkit.recipe.catalogue import Option

# typer bundles its own copy of click from 0.25 on, so find its errors by their common base
UsageMistake: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

NO_MEMORY = (
    "out of memory; lower train.batch_size or data.max_length, quantize the model, or choose a smaller one"
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Pre-train models, and adapt pre-trained ones to a task: heads, LoRA, adapters, prefixes, partial and full fine-tuning.",
)


_HOW = {"method": ", joined by '+'"}


def _help(family: str) -> str:
    """Return the list of a family's entries, one per line."""
    from graftkit.recipe.catalogue import FAMILIES, entries

    plural = FAMILIES[family].plural
    title = f"{plural.capitalize()}{_HOW.get(family, '')}"
    names = entries(family)
    width = max(map(len, names))
    lines = [f"{title} (`graftkit {plural} NAME` for details):", "", "\b"]
    lines += [f"{name:<{width}}  {entry.summary}" for name, entry in names.items()]
    return "\n".join(lines)


def _version(asked: bool) -> None:
    if asked:
        from graftkit import __version__

        print(f"graftkit {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    pass


@app.command()
def tune(
    arguments: Arguments = None, model: Model = None, weights: Weights = None, task: TaskName = None,
    train: Train = None, eval: Eval = None, test: Test = None, method: MethodName = None, out: Out = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="resume an unfinished run")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the run folder if it exists")] = False,
    force: Annotated[bool, typer.Option(help="resume although the recipe, rows or model have changed")] = False,
    memory: Memory = None, time: Time = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Fine-tune a model according to a recipe.

    The recipe is a YAML file, options and key=value settings, each of which overrides those before it.
    """
    given = given_values(model, weights, task, train, eval, test, method, out)
    console = console_of(as_json)
    if resume is not None:
        if arguments or any(value is not None for value in given.values()) or overwrite or memory or time:
            raise UserError(
                "--resume continues an unfinished run unchanged; it takes no other options or settings. To train a "
                f"finished run further: graftkit tune {resume}/recipe.yaml train.from={resume} train.epochs=N --out NEW"
            )
        from graftkit.runs.tune import resume_run

        emit(as_json, resume_run(resume, console, force=force).result)
        return
    if force:
        raise UserError("--force is for --resume RUN; a new run has nothing to compare its inputs with.")
    recipe, _ = limited(recipe_values(arguments, given), memory, time, console)
    from graftkit.runs.garbage import uncollected

    with uncollected():
        from graftkit.runs.tune import run_recipe

    emit(as_json, run_recipe(recipe, console, overwrite=overwrite).result)


app.command()(cli_plan.plan)
app.command(cls=cli_compare.SeveralValues)(cli_compare.compare)
app.command()(cli_compare.curve)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="model folder, hub id, or package.module:function")],
    weights: Weights = None, method: MethodName = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Show a model's anatomy, what selections match, and what a method would train."""
    from graftkit.recipe.expressions import parse

    if method is not None:
        parse(method, "method")
    from graftkit.runs.inspect import inspect_model, show

    found = inspect_model(model, method, weights)
    if as_json:
        emit(True, found)
    else:
        show(console_of(False), found)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="a method to describe")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or describe one of them."""
    _tell("method", name, as_json)


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="a task to describe")] = None,
    as_json: Json = False,
) -> None:
    """List the tasks, or describe one of them."""
    _tell("task", name, as_json)


@app.command()
def optimizers(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="an optimizer to describe")] = None,
    as_json: Json = False,
) -> None:
    """List the optimizers, or describe one of them."""
    _tell("optimizer", name, as_json)


def _tell(family: str, name: str | None, as_json: bool) -> None:
    """Print all entries of a family, or one of them in full."""
    from graftkit.recipe.catalogue import entries
    from graftkit.recipe.expressions import parse

    known = entries(family)
    if name is not None:
        name = parse(name.replace("-", "_"), family)[0].name
        known = {name: known[name]}
    if as_json:
        about = {n: {"docstring": e.docstring, "options": {o.name: o.default for o in e.options.values()}}
                 for n, e in known.items()}  # fmt: skip
        emit(True, about)
    elif name is None:
        print(_help(family).replace("\b\n", ""))
    else:
        options = [f"  {o.name} = {o.default!r}  {o.help}{_choices(o)}" for o in known[name].options.values()]
        print("\n".join([name, "", known[name].docstring, "", "Options:", *(options or ["  none"])]))


def _choices(option: Option) -> str:
    choices = option.bounds["choices"]
    return f" ({', '.join(map(str, choices))})" if choices else ""


app.command()(pretraining.pretrain)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_label.app, name="label")
app.add_typer(cli_cached.app, name="cache")
for finished in (
    cli_fit.fit,
    cli_runs.evaluate,
    cli_runs.predict,
    cli_explain.explain,
    cli_runs.calibrate,
    cli_runs.merge,
    cli_runs.export,
    cli_reports.report,
    cli_tokenizer.tokenizer,
    cli_bench.bench,
):
    app.command()(finished)


@app.command()
def recipe(
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON Schema of a recipe, for editors")
    ] = False,
    as_json: Json = False,
) -> None:
    """List all recipe keys."""
    from graftkit.recipe import schema as recipes

    if schema or as_json:
        print(json.dumps(recipes.schema(), indent=None if as_json else 2, ensure_ascii=False))
        return
    for key, description in recipes.keys().items():
        print(f"{key:<24} {description}")
    for family in ("task", "method", "optimizer"):
        print("\n" + _help(family).replace("\b\n", ""))


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="run folder")] = "runs/demo",
    overwrite: Annotated[bool, typer.Option(help="replace the run folder if it exists")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a packaged MiniLM on 77 banking intents, in about two minutes on two cores."""
    from graftkit.demo import run_demo

    emit(as_json, run_demo(console_of(as_json), out, overwrite))


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exit with 0, 1 for a user's mistake, 130 for Ctrl-C."""
    from graftkit.report.streams import standard_streams

    with standard_streams(), warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        plain = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, Note):
                print(f"note: {message}", file=sys.stderr)
            else:
                plain(message, category, *where, **more)

        warnings.showwarning = show
        _run(arguments)


def _run(arguments: list[str] | None) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tune_command = next(c for c in app.registered_commands if c.callback is tune)
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["tune"] and "--help" in words:
        tune_command.epilog = _help("method")
    as_json = "--json" in words
    try:
        result = app(args=arguments, standalone_mode=False)
        flush_output()
        if result == 130:  # typer's status for Ctrl-C, which it does not raise
            _stop(130, "\nstopped", as_json)
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
        from graftkit.report.streams import drop

        drop(sys.stdout)
        sys.exit(0)
    except PermissionError as error:
        _stop(1, f"error: {error.filename} may not be read or written by this user; {PERMIT}.", as_json)
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in (ENOSPC, EIO):
            _stop(1, f"error: {lost_output(error)}", as_json=False)
        from graftkit.backbone.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _stop(1, f"error: {NO_MEMORY} ({first_line(error)})", as_json)


def _usage(error: Any) -> str:
    if type(error).__name__ == "NoArgsIsHelpError":
        return error.format_message()
    hint = f" See `{error.ctx.command_path} --help`." if getattr(error, "ctx", None) else ""
    return f"error: {error.format_message()}{hint}"


def _stop(status: int, message: str, as_json: bool) -> None:
    """Print the message to standard error, with --json also as the one object on standard output, and exit."""
    print(message, file=sys.stderr)
    with suppress(UserError, BrokenPipeError):
        emit(as_json, {"error": message.strip().removeprefix("error: ")})
    sys.exit(status)


if __name__ == "__main__":
    main()
