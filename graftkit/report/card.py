"""The model card of a run: README.md in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import listing
from graftkit.report.console import count, duration, size
from graftkit.report.summary import mistake, statistics_lines, title

if TYPE_CHECKING:
    from graftkit.runs.prepare import Prepared

SHOWN = 10  # examples that went most wrong
DATA = {"rows": ("rows",), "sizes": ("sizes", "truncated"), "labels": ("labels",), "more": ("also", "note")}


def model_card(
    prepared: Prepared, result: dict[str, Any], found: dict[str, Any], worst: list[dict[str, Any]],
    statistics: dict[str, Any],
) -> str:  # fmt: skip
    """Markdown: what was trained on what, how well it does, and how to load it. `statistics` of each part of the data."""
    rows, recipe = prepared.rows, prepared.recipe
    names = list(dict.fromkeys([*rows.task.headline, "loss"]))
    names = [name for name in names if any(name in metrics for metrics in found.values())]
    figures = "\n".join(
        f"| {part} | {metrics['rows']:,} | {' | '.join(_figure(metrics, name) for name in names)} |"
        for part, metrics in found.items()
    )
    metrics = result["metrics"]
    classes = "\n".join(
        f"| {_plain(label)} | {m['precision']:.3f} | {m['recall']:.3f} | {m['f1']:.3f} | {m['rows']} |"
        for label, m in (metrics.get("per_class") or {}).items()
    )
    skipped = f" {len(rows.train.skipped)} bad rows were left out." if rows.train.skipped else ""
    labels = ", ".join(map(_plain, rows.labels[:20])) + (" ..." if len(rows.labels) > 20 else "")
    columns = ", ".join(f"{name} in column `{column}`" for name, column in rows.columns.items())
    by_class = (
        f"""
<details><summary>By class</summary>

| class | precision | recall | F1 | support |
| --- | --- | --- | --- | --- |
{classes}

</details>
"""
        if classes
        else ""
    )
    mistakes = "".join(f"| {' | '.join(map(_plain, cells))} |\n" for cells in map(_mistake, worst[:SHOWN]))
    tables = (
        f"""
## Figures

Intervals are 95% bootstrap intervals over the rows.

| data | rows | {" | ".join(map(title, names))} |
| --- | --- |{" --- |" * len(names)}
{figures}
{by_class}{_MOST_WRONG + mistakes if mistakes else ""}"""
        if found
        else "\nThe run had no rows to evaluate on.\n"
    )
    return f"""# {recipe.task} with {str(prepared.graft.method) or "the model as it is"}

A graft on `{recipe.model}`: {count(result["trained_parameters"])} trained parameters of {count(result["total_parameters"])}.

- data: {len(rows.train):,} training rows of `{recipe.data.train}`{f"; {columns}" if columns else ""}.{skipped}
{f"- labels ({len(rows.labels)}): {labels}" if labels else f"- task: {rows.task.name}"}
- training: {count(result["steps"])} steps of {prepared.plan.batch_size} rows{_optimizer(prepared)}, {result["precision"]}, seed {recipe.seed};
  {duration(result["seconds"])}, peak memory {size(result["peak_memory_bytes"])} on {result["device"]}{_unused(result)}

## Data

| data | {" | ".join(DATA)} |
| --- |{" --- |" * len(DATA)}
{_data_rows(statistics)}
{tables}
## Use

```
graftkit predict {result["run"]} {_example(rows.task.modality, rows.columns)}
graftkit evaluate {result["run"]} --data FILE
{_export(prepared, result["run"])}graftkit tune {result["run"]}/recipe.yaml --out AGAIN    # the same run once more
```

In Python:

```python
import graftkit
{_base(prepared)}
graft = graftkit.load(model, {result["run"] + "/graft"!r})
```
{_in_peft(result)}"""


_MOST_WRONG = """
## Most wrong

Examples whose answers were furthest from what was expected.

| where | example | expected | answer | loss |
| --- | --- | --- | --- | --- |
"""


def _optimizer(prepared: Prepared) -> str:
    return f" with {prepared.plan.optimizer}" if prepared.rows.task.trains else ""


def _unused(result: dict[str, Any]) -> str:
    told = {
        "without a part in the output, and as they were": result["unused_parameters"],
        "with a gradient of zero in the whole first epoch": result["zero_gradient_parameters"],
    }
    return "".join(f"\n- {what}: {listing(names, 4)}" for what, names in told.items() if names)


def _mistake(row: dict[str, Any]) -> tuple[str, ...]:
    where, *cells = mistake(row)
    return where.rpartition("/")[2], *cells, f"{row['loss']:.3f}" if "loss" in row else ""


def _data_rows(statistics: dict[str, Any]) -> str:
    """A row for each part of the data, from what its task says of it."""
    lines = []
    for name, part in statistics.items():
        told = statistics_lines(part)
        cells = [
            "; ".join(f"{title}: {text}" if title == "truncated" else text for title, text in told if title in titles)
            for titles in DATA.values()
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(map(_plain, cells))} |")
    return "\n".join(lines)


def _figure(metrics: dict[str, Any], name: str) -> str:
    if name not in metrics:
        return ""
    low, high = metrics.get(f"{name}_interval") or (None, None)
    return f"{metrics[name]:.4f}" + ("" if low is None else f" ({low:.4f} to {high:.4f})")


def _export(prepared: Prepared, run: str) -> str:
    if not prepared.rows.task.trains or not hasattr(prepared.backbone.model, "config"):
        return ""
    return f"graftkit export {run} --to FOLDER    # a plain model, where the method can be folded\n"


def _example(modality: str, columns: Mapping[str, str]) -> str:
    """What `predict` takes on a command line."""
    if modality != "text":
        return {"image": "picture.jpg", "audio": "sound.wav"}[modality]
    if {"choices", "context"} <= columns.keys():
        return "--data FILE"
    if "text_pair" in columns:
        return '"a text" "its pair"'
    asked = [name for name in ("question", "context", "prompt") if name in columns]
    if "choices" in columns:
        asked += ["choice", "choice"]
    return " ".join(f'"a {name}"' for name in asked or ["text"])


def _base(prepared: Prepared) -> str:
    """The lines that make the plain model."""
    name = prepared.recipe.model
    kind = type(prepared.backbone.model).__name__
    package, _, function = name.partition(":")
    called = bool(function) and not Path(name).exists()
    lines = [f"from {package} import {function}"] if called else []
    place = f"{function}()" if called else repr(name)
    if not hasattr(prepared.backbone.model, "config"):
        return "\n".join([*lines, "", f"model = {place}.model    # with its weights loaded"])
    return "\n".join(
        [*lines, f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({place})"]
    )


def _in_peft(result: dict[str, Any]) -> str:
    if not (Path(result["run"]) / "graft" / "adapter_config.json").is_file():
        return ""
    return """
The folder `graft` is also an adapter that PEFT loads on the same base: `PeftModel.from_pretrained(model, FOLDER)`.
A head that pools is not among what PEFT knows; it is in `graft.safetensors`.
"""


def _plain(text: str) -> str:
    """A label within one cell of a table."""
    return " ".join(text.splitlines()).replace("|", "\\|")
