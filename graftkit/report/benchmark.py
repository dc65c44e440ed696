"""The result of `graftkit bench` as a Markdown table, to paste into an issue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftkit.report.console import Console, count

NAMES = {
    "products": "matrix products",
    "attention": "attention",
    "copies": "copies and casts",
    "elementwise": "element-wise",
    "host": "host (Python, launches, waiting)",
}


def show_bench(console: Console, found: Mapping[str, Any]) -> None:
    """Print what `graftkit bench` measured."""
    for line in bench_lines(found):
        console.line(line)


def bench_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a Markdown table of a measurement."""
    rows = [
        ("machine", f"{found['hardware']}, {found['threads']} threads, {found['system']}"),
        ("libraries", f"torch {found['torch']}, transformers {found['transformers']}"),
        ("model", f"{found['model']} ({found['class']}), {count(found['total_parameters'])} parameters"),
        ("method", f"{found['method']}, {count(found['trained_parameters'])} trained, task {found['task']}"),
        ("batch", f"{found['batch_size']} rows, {found['rows']}; {found['padding']:.1%} padding; {found['precision']}"),
        ("step", f"{1000 * found['seconds_per_step']:.1f} ms, median of {found['steps']}"),
        ("tokens per second", count(found["tokens_per_second"])),
        ("products, peak", _rate(found["peak_flops_per_second"])),
        ("products of the step's shapes", _rate(found["step_products_flops_per_second"])),
        ("model FLOPs", _rate(found["model_flops_per_second"])),
        ("share of the peak", "unknown" if found["share_of_peak"] is None else f"{found['share_of_peak']:.1%}"),
        *((f"time in {NAMES[kind]}", f"{share:.1%}") for kind, share in found["time"].items()),
    ]  # fmt: skip
    return ["| what | measured |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def _rate(flops: float | None) -> str:
    return "unknown" if flops is None else f"{flops / 1e9:,.1f} GFLOP/s"
