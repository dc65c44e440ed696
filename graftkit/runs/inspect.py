"""`graftkit inspect`: show a model's parts, what selections match and what a method would train."""

from __future__ import annotations

from collections import Counter
from typing import Any

from graftkit.backbone import Backbone, Site, select
from graftkit.backbone.anatomy import is_conv, is_map
from graftkit.backbone.backbone import widths
from graftkit.backbone.source import CLASSES, find_source
from graftkit.errors import UserError
from graftkit.methods.base import read
from graftkit.recipe import selection
from graftkit.report.console import Console, count
from graftkit.runs.prepare import attach_new, prepare_backbone
from graftkit.runs.reporting import width_of
from graftkit.tasks.base import Task

EXAMPLE_CLASSES = 2  # a head needs a number of classes before the data is known


class AnyTask(Task):
    """A placeholder for a classification task over any input of the model."""

    families = CLASSES


def inspect_model(model: str, method: str | None, weights: str | None = None) -> dict[str, Any]:
    """Return the anatomy as plain values; with a method, also what it trains. No weights are read."""
    chain = read(method) if method else read("head(pooling='auto')")
    given = (getattr(m, "classes", None) for m in chain.methods if m.gives_outputs)
    classes = next(given, None) or EXAMPLE_CLASSES
    labels = tuple(map(str, range(classes)))
    backbone, chain = prepare_backbone(find_source(model, weights), chain, AnyTask(), labels, meta=True)
    found: dict[str, Any] = {
        "model": model,
        "class": type(backbone.model).__name__,
        "width": width_of(backbone),
        "blocks": list(backbone.blocks),
        "total_parameters": sum(p.numel() for p in backbone.model.parameters()),
        "sites": [_site(site) for site in backbone.sites],
        "selections": _selections(backbone),
    }
    if method is not None:
        graft = attach_new(backbone, chain, meta=True)
        parameters = graft.parameters
        found["method"] = str(graft.method)
        if any(m.gives_outputs for m in graft.method.methods):
            found["classes"] = classes
        found["trained_parameters"] = sum(p.numel() for p in parameters.values())
        found["total_with_method"] = sum(p.numel() for p in graft.model.parameters())
        found["trained"] = {name: list(p.shape) for name, p in parameters.items()}
    return found


def _site(site: Site) -> dict[str, Any]:
    module: Any = site.module
    return {
        "name": site.name, "role": site.role, "block": site.block, "class": type(module).__name__,
        "shape": list(widths(module)) if is_map(module) else None,
        "kernel": list(module.kernel_size) if is_conv(module) else None, "parameters": site.parameters,
    }  # fmt: skip


def _selections(backbone: Backbone) -> dict[str, dict[str, int]]:
    result = {}
    for word in (*selection.ROLES_OF_WORD, "blocks", "blocks[-2:]"):
        try:
            sites = select(backbone, word)
        except UserError:
            continue
        result[word] = {"modules": len(sites), "parameters": sum(site.parameters for site in sites)}
    return result


def show(console: Console, found: dict[str, Any]) -> None:
    """Print what `inspect_model` found."""
    console.heading(f"{found['model']} ({found['class']}, {count(found['total_parameters'])} parameters)")
    for line in _tree(found):
        console.line(line)
    console.heading("Selections")
    console.table(
        ["selection", "modules", "parameters"],
        [[word, count(s["modules"]), count(s["parameters"])] for word, s in found["selections"].items()],
    )
    if "method" in found:
        console.heading(f"Method {found['method']}")
        console.line(
            f"trains {count(found['trained_parameters'])} of {count(found['total_with_method'])} parameters "
            f"({found['trained_parameters'] / found['total_with_method']:.2%})"
            + (f"; a head is counted for {found['classes']} classes" if "classes" in found else "")
        )
        shapes = Counter((_generic(name), tuple(shape)) for name, shape in found["trained"].items())
        console.table(
            ["trained", "shape", "times"],
            [[name, " x ".join(map(str, shape)), str(times)] for (name, shape), times in shapes.items()],
        )


def _generic(name: str) -> str:
    """Replace block numbers in a parameter name: layer.0 and layer.5 become layer.*."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _tree(found: dict[str, Any]) -> list[str]:
    """Draw the sites by block; identical blocks are drawn once."""
    lines: list[str] = []
    drawn: dict[tuple, list[int]] = {}
    for block in range(len(found["blocks"])):
        drawn.setdefault(
            tuple(_row(site, found) for site in found["sites"] if site["block"] == block), []
        ).append(block)
    done = False
    for site in found["sites"]:
        if site["block"] is None:
            lines.append(f"├─ {_row(site, found)}")
        elif not done:
            done = True
            for rows, blocks in drawn.items():
                span = f"blocks[{blocks[0]}]" + (
                    f" to blocks[{blocks[-1]}], {len(blocks)} alike" if len(blocks) > 1 else ""
                )
                lines.append(f"├─ {span}  ({found['blocks'][blocks[0]]})")
                lines += [f"│  ├─ {row}" for row in rows]
    return lines


def _row(site: dict[str, Any], found: dict[str, Any]) -> str:
    name = site["name"]
    if site["block"] is not None:
        name = name[len(found["blocks"][site["block"]]) + 1 :]
    shape = f"{site['shape'][0]} -> {site['shape'][1]}" if site["shape"] else ""
    if site["kernel"]:
        shape += f", {' x '.join(map(str, site['kernel']))}"
    return f"{name:<40} {site['role']:<10} {site['class']:<12} {shape:<16} {count(site['parameters']):>12}"
