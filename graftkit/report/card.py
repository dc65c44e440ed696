"""The model card of a run: README.md in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftkit.errors import listing
from graftkit.report.console import count, duration, rows_of, size
from graftkit.report.summary import mistake, statistics_lines, title
from graftkit.report.values import Subject

SHOWN = 10  # worst examples
DATA = {"rows": ("rows",), "sizes": ("sizes", "truncated"), "labels": ("labels",), "more": ("also", "note")}


def model_card(
    subject: Subject, result: dict[str, Any], found: dict[str, Any], worst: list[dict[str, Any]],
    statistics: dict[str, Any],
) -> str:  # fmt: skip
    """Return the model card in Markdown. `statistics`: the task's, for each data split."""
    return f"""# {subject.task} with {subject.method or "the unmodified model"}

A graft on `{subject.model}`: {count(result["trained_parameters"])} trained parameters of {count(result["total_parameters"])}.

{_facts(subject, result)}

## Data

| data | {" | ".join(DATA)} |
| --- |{" --- |" * len(DATA)}
{_data_rows(statistics)}
{_figures(subject, result, found, worst)}
## Use

```
{_first_use(subject, result["run"])}
graftkit evaluate {result["run"]} --data FILE
{_export(subject, result["run"])}graftkit tune {result["run"]}/recipe.yaml --out AGAIN    # repeat the run
```

In Python:

```python
import graftkit
{_base(subject)}
graft = graftkit.load(model, {result["run"] + "/graft"!r})
```
{_temperature(result)}{_in_peft(result)}"""


def _facts(subject: Subject, result: dict[str, Any]) -> str:
    """List the data, labels and training setup."""
    columns = ", ".join(f"{name} in column `{column}`" for name, column in subject.columns.items())
    skipped = f" {subject.skipped} bad rows were skipped." if subject.skipped else ""
    labels = ", ".join(map(_plain, subject.labels[:20])) + (" ..." if len(subject.labels) > 20 else "")
    return f"""- data: {subject.rows:,} training rows of `{subject.data}`{f"; {columns}" if columns else ""}.{skipped}
{f"- labels ({len(subject.labels)}): {labels}" if labels else f"- task: {subject.task_name}"}
- training: {count(result["steps"])} steps of {rows_of(subject.batch_size, subject.batch_tokens)}{f" with {subject.optimizer}" if subject.optimizer else ""}, {result["precision"]}, seed {subject.seed};
  {duration(result["seconds"])}, peak memory {size(result["peak_memory_bytes"])} on {result["device"]}{_unused(result)}{_changed(result)}"""


def _changed(result: dict[str, Any]) -> str:
    """Name the inputs that changed while the run was interrupted."""
    changes = "; ".join(map(_plain, result.get("changed_when_resumed", ())))
    return f"\n- resumed with other inputs than it began with: {changes}" if changes else ""


def _figures(
    subject: Subject, result: dict[str, Any], found: dict[str, Any], worst: list[dict[str, Any]]
) -> str:
    """Return the tables of metrics, for each data split that was evaluated."""
    if not found:
        return "\nThe run had no rows to evaluate on.\n"
    names = list(dict.fromkeys([*subject.headline, "loss"]))
    names = [name for name in names if any(name in metrics for metrics in found.values())]
    figures = "\n".join(
        f"| {part} | {metrics['rows']:,} | {' | '.join(_figure(metrics, name) for name in names)} |"
        for part, metrics in found.items()
    )
    mistakes = "".join(f"| {' | '.join(map(_plain, cells))} |\n" for cells in map(_mistake, worst[:SHOWN]))
    return f"""
## Figures

Intervals are 95% bootstrap intervals over the rows.

| data | rows | {" | ".join(map(title, names))} |
| --- | --- |{" --- |" * len(names)}
{figures}
{_by_class(result["metrics"])}{_MOST_WRONG + mistakes if mistakes else ""}"""


def _by_class(metrics: dict[str, Any]) -> str:
    classes = "\n".join(
        f"| {_plain(label)} | {m['precision']:.3f} | {m['recall']:.3f} | {m['f1']:.3f} | {m['rows']} |"
        for label, m in (metrics.get("per_class") or {}).items()
    )
    if not classes:
        return ""
    return f"""
<details><summary>By class</summary>

| class | precision | recall | F1 | support |
| --- | --- | --- | --- | --- |
{classes}

</details>
"""


_MOST_WRONG = """
## Worst examples

The examples with the largest errors.

| where | example | expected | answer | loss |
| --- | --- | --- | --- | --- |
"""


def _unused(result: dict[str, Any]) -> str:
    told = {
        "parameters that do not affect the output and stayed unchanged": result["unused_parameters"],
        "parameters whose gradient was zero throughout the first epoch": result["zero_gradient_parameters"],
    }
    return "".join(f"\n- {what}: {listing(names, 4)}" for what, names in told.items() if names)


def _mistake(row: dict[str, Any]) -> tuple[str, ...]:
    where, *cells = mistake(row)
    return where.rpartition("/")[2], *cells, f"{row['loss']:.3f}" if "loss" in row else ""


def _data_rows(statistics: dict[str, Any]) -> str:
    """Return a table row of statistics for each data split."""
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


def _first_use(subject: Subject, run: str) -> str:
    """Return the command that a run is for: to predict, or to tune the model that it made."""
    if subject.makes_model:
        return f"graftkit tune --model {run}/model --task TASK --train FILE    # {run}/model is a plain model"
    return f"graftkit predict {run} {subject.predict}"


def _export(subject: Subject, run: str) -> str:
    if not subject.exports:
        return ""
    return f"graftkit export {run} --to FOLDER    # a plain model, if the method can be folded\n"


def _base(subject: Subject) -> str:
    """Return the Python lines that load the plain model."""
    package, _, function = subject.model.partition(":")
    called = bool(function) and not Path(subject.model).exists()
    lines = [f"from {package} import {function}"] if called else []
    place = f"{function}()" if called else repr(subject.model)
    if not subject.plain:
        return "\n".join([*lines, "", f"model = {place}.model    # with its weights loaded"])
    kind = subject.model_class
    return "\n".join(
        [*lines, f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({place})"]
    )


def _temperature(result: dict[str, Any]) -> str:
    """Say how logits of the graft alone become the probabilities of `predict`."""
    temperature = result.get("confidence", {}).get("temperature", 1.0)
    if temperature == 1:
        return ""
    return f"""
Logits of this model are those of the training; `graftkit predict` divides them by the temperature {temperature:.6g}, fitted on
evaluation rows, before they become probabilities.
"""


def _in_peft(result: dict[str, Any]) -> str:
    if not (Path(result["run"]) / "graft" / "adapter_config.json").is_file():
        return ""
    return """
The folder `graft` is also an adapter that PEFT loads on the same base: `PeftModel.from_pretrained(model, FOLDER)`.
PEFT does not support a head that pools; it is in `graft.safetensors`.
"""


def _plain(text: str) -> str:
    """Escape a label for one cell of a table."""
    return " ".join(text.splitlines()).replace("|", "\\|")
