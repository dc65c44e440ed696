"""Commands for the files that keep outputs of frozen layers."""

from __future__ import annotations

import time

import typer

from graftkit.cli.options import Json, console_of, emit

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Show or remove the cached outputs of frozen layers."
)


@app.callback()
def cache() -> None:
    """Show or remove the cached outputs of frozen layers."""


@app.command("list")
def list_cached(as_json: Json = False) -> None:
    """List the outputs of frozen layers that are kept in files, those used last first."""
    from graftkit.engine.blocks import home, limit, stored

    found = stored()
    total = sum(size for _, _, size, _ in found)
    console = console_of(as_json)
    for key, files, size, used in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
        console.line(f"{key}  {size / 1e6:>10,.1f} MB  {files:>5,} files  used {when}")
    console.line(f"{total / 1e9:,.2f} of at most {limit() / 1e9:,.1f} GB in {home()}")
    keys = ("key", "files", "bytes", "used")
    emit(
        as_json,
        {
            "folder": str(home()),
            "bytes": total,
            "limit": limit(),
            "entries": [dict(zip(keys, one)) for one in found],
        },
    )


@app.command()
def clear(as_json: Json = False) -> None:
    """Remove all of them. Runs that are reading them go on; later runs compute them again."""
    from graftkit.engine.blocks import home, prune

    count, size = prune(0)
    console_of(as_json).line(f"removed {count:,} files ({size / 1e6:,.1f} MB) from {home()}")
    emit(as_json, {"folder": str(home()), "files": count, "bytes": size})
