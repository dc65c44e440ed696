"""The report of one run as a page: what was run, what came out, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from graftkit.report.classes import calibration_sections, class_sections
from graftkit.report.console import count, duration, rows_of, size
from graftkit.report.doubtful import doubtful_sections
from graftkit.report.finished import Finished, interval_of, mapping, number
from graftkit.report.html import Child, Markup, Section, details, element, figure_text, page, short, table
from graftkit.report.mistakes import mistake_sections
from graftkit.report.summary import statistics_lines, title
from graftkit.report.svg import Line, chart, whisker

RECIPE = 20_000  # characters of a recipe
PROBE = "probe_accuracy"
RATIOS = (
    "accuracy",
    "f1",
    "recall",
    "precision",
    "match",
)  # metrics between 0 and 1, by a part of their names
PARTS = {"eval": "evaluation"}  # what the parts of the data are called, if not by their own names
WRONG = ("problems", "warnings", "changed_when_resumed")


def run_page(run: Finished) -> str:
    """Return the report of a run."""
    sections = [
        *_curves(run), *class_sections(run), *calibration_sections(run), *mistake_sections(run), *doubtful_sections(run), *_cost(run),
        Section("What was run", "run", _facts(run)),
    ]  # fmt: skip
    if run.found:
        sections.insert(0, Section("Figures", "figures", _figures(run)))
    method = short(run.recipe.get("method") or "model unchanged", 160)
    lead = [
        element("p", f"{short(run.recipe.get('model', 'model'), 100)}, run {short(run.name, 60)}", class_="over", dir="auto"),
        element("h1", short(run.task_name, 40).replace("_", " "), element("small", method)),
        _headline(run), *_warnings(run),
    ]  # fmt: skip
    foot = f"Made by GraftKit from the files of {run.folder}; `graftkit report` makes it again."
    return page(f"{short(run.task_name, 40)}: {short(run.name, 60)}", lead, sections, foot)


def told(value: Any, form: Callable[[float], str]) -> str:
    """Format a number, or a dash for anything else."""
    known = number(value)
    return "–" if known is None or not math.isfinite(known) else form(known)


def named(name: str) -> str:
    text = title(short(name, 60))
    return text[:1].upper() + text[1:]


def ends_of(name: str, values: list[float]) -> tuple[float, float]:
    """Return the ends of an axis for values of a metric with their intervals."""
    low, high = min(values), max(values)
    if any(part in name for part in RATIOS) and low >= 0 and high <= 1:
        return (0.0, 1.0) if low < 0.5 else (math.floor(low * 10 - 0.5) / 10, 1.0)
    room = (high - low) * 0.25 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _headline(run: Finished) -> Markup:
    """Return the first metric in large, its interval, and tiles with others."""
    first, *others = run.headline
    parts: list[Child] = []
    if first in run.metrics:
        interval, value = interval_of(run.metrics, first), number(run.metrics[first])
        rows = told(run.metrics.get("rows"), count)
        what: list[Child] = [f"{named(first)} on {rows} {run.split()} rows"]
        drawn = None
        if interval and value is not None and math.isfinite(value):
            what += [element("br"), f"95% interval {figure_text(interval[0])} to {figure_text(interval[1])}"]
            drawn = whisker(value, *interval, ends_of(first, [value, *interval]), width=220, scale=True)
        figure = element("div", figure_text(value), class_="big")
        parts.append(element("div", figure, element("p", what, class_="what"), drawn))
    tiles = [(named(name), figure_text(run.metrics[name])) for name in others[:3] if name in run.metrics]
    result = run.result
    tiles += [
        ("Trained parameters", told(result.get("trained_parameters"), count)),
        ("Time", told(result.get("seconds"), duration)),
        ("Peak memory", told(result.get("peak_memory_bytes"), size)),
    ]
    parts.append(
        element("dl", [element("div", element("dt", k), element("dd", v)) for k, v in tiles], class_="tiles")
    )
    return element("div", parts, class_="headline")


def _warnings(run: Finished) -> Iterator[Markup]:
    """Yield a box with what went wrong or deserves a look."""
    result = run.result
    lists = [*(result.get(key) for key in WRONG), run.plan.get("warnings")]
    texts = list(dict.fromkeys(str(text) for one in lists if isinstance(one, list) for text in one))
    for key, what in (
        ("rows_skipped", "bad rows were skipped"),
        ("rows_truncated", "rows were longer than the limit and were cut"),
    ):
        if number(result.get(key)):
            texts.append(f"{told(result[key], count)} {what}")
    for key, what in (
        ("unused_parameters", "parameters do not affect the output and stayed unchanged"),
        ("zero_gradient_parameters", "parameters had a gradient of zero throughout the first epoch"),
    ):
        if isinstance(result.get(key), list) and result[key]:
            texts.append(
                f"{len(result[key])} {what}: {short(result[key][0], 80)}{' ...' if len(result[key]) > 1 else ''}"
            )
    if texts:
        items = [element("li", short(text, 400), dir="auto") for text in texts[:20]]
        more = f"and {len(texts) - 20} more" if len(texts) > 20 else None
        yield element(
            "aside", element("p", element("strong", "Worth a look")), element("ul", items), more, class_="note",
            aria_label="Warnings and problems",
        )  # fmt: skip


def _figures(run: Finished) -> Child:
    """Return a table of all metrics, by data split."""
    names = list(dict.fromkeys([*run.headline, *(
        name for metrics in run.found.values() for name, value in metrics.items()
        if number(value) is not None and name not in ("step", "rows")
    )]))[:30]  # fmt: skip
    heads = ["metric"]
    rows: list[list[Child]] = [[named(name)] for name in names]
    for part, metrics in run.found.items():
        heads.append(PARTS.get(part, part))
        intervals = [interval_of(metrics, name) for name in names]
        for row, name in zip(rows, names):
            row.append(figure_text(metrics.get(name)))
        if any(intervals):
            heads.append("95% interval")
            for row, ends in zip(rows, intervals):
                row.append(f"{figure_text(ends[0])} to {figure_text(ends[1])}" if ends else "")
    sizes = ", ".join(
        f"{told(metrics.get('rows'), count)} {PARTS.get(part, part)} rows"
        for part, metrics in run.found.items()
    )
    return table(sizes, heads, rows)


def _curves(run: Finished) -> list[Section]:
    """Return the section with what was logged over the steps."""
    best = number(mapping(run.result.get("evaluation")).get("step"))
    note = (
        "; dashed line: the weights that were kept"
        if best is not None and len(run.evaluations("loss")) > 1
        else ""
    )
    loss = [
        Line("training", run.steps("loss"), noisy=True, colour=0),
        Line("evaluation", run.evaluations("loss"), dots=True, colour=1),
    ]
    charts = [chart("Loss", loss, mark=best if note else None, note=note.removeprefix("; "))]
    for name in [
        name for name in dict.fromkeys([*run.headline[:3], "bits_per_byte", PROBE]) if name != "loss"
    ]:
        trained = run.steps(name) if name == "accuracy" else []
        lines = [
            Line("training", trained, noisy=True, colour=0),
            Line("evaluation", run.evaluations(name), dots=True, colour=1),
        ]
        charts.append(chart(named(name), lines))
    base = number(mapping(run.recipe.get("train")).get("lr"))
    rates = [
        (step, factor * (base or 1)) for step, factor in run.steps("lr_factor") if number(factor) is not None
    ]
    charts.append(
        chart("Learning rate", [Line("learning rate", rates)], unit="" if base else "as a share of its peak")
    )
    charts.append(_tried(run.lr_find))
    charts.append(chart("Gradient norm", [Line("gradient norm", run.steps("gradient_norm"), noisy=True)]))
    drawn = [one for one in charts if one is not None]
    return [Section("Training", "training", element("div", drawn, class_="figures"))] if drawn else []


def _tried(curve: dict[str, Any]) -> Markup | None:
    """Return the chart of a learning-rate range test; None if there was none."""
    rates, losses, chosen = (curve.get(name) for name in ("rates", "smoothed", "chosen"))
    if not isinstance(rates, list) or not isinstance(losses, list):
        return None
    points = [(math.log10(rate), loss) for rate, loss in zip(rates, losses) if (number(rate) or 0) > 0]
    at = number(chosen)
    mark = math.log10(at) if at is not None and at > 0 else None
    note = "" if mark is None else f"dashed line: the one chosen, {at:.2g}"
    line = Line("smoothed loss", points)
    return chart("Loss by learning rate tried", [line], x="log10 of the learning rate", mark=mark, note=note)


def _cost(run: Finished) -> list[Section]:
    """Return the section that compares the plan with what happened, as far as the run stored both."""
    predicted, measured = (
        mapping(run.result.get("predicted")),
        mapping(run.result.get("measured")) or run.result,
    )
    rows: list[list[Child]] = []
    for key, name, form in (("peak_memory_bytes", "Peak memory", size), ("seconds", "Time", duration)):
        before, after = number(predicted.get(key)), number(measured.get(key))
        if before and after is not None and math.isfinite(before) and math.isfinite(after):
            rows.append([name, form(before), form(after), f"{after / before - 1:+.1%}"])
    if not rows:
        return []
    caption = "What the plan said before the first step, and what the run took"
    return [
        Section("Plan and reality", "cost", table(caption, ["", "planned", "measured", "difference"], rows))
    ]


def _facts(run: Finished) -> Child:
    """Return what was run, with what, on what: data, model, versions, and the recipe."""
    result, plan, data = run.result, run.plan, run.data
    splits = [
        f"{part}: {short(data[part], 120)}" for part in ("train", "eval", "test") if data.get(part) is not None
    ]  # fmt: skip
    about = mapping(plan.get("statistics"))
    labels = list(mapping(mapping(about.get("train")).get("labels")))
    steps = f"{told(result.get('steps'), count)} steps of {rows_of(told(plan.get('batch_size'), count), number(plan.get('batch_tokens')))}"
    optimizer = (
        f" with {short(result['optimizer'], 60)}" if result.get("optimizer") and result.get("steps") else ""
    )
    trained, total = number(result.get("trained_parameters")), number(result.get("total_parameters"))
    share = f" of {count(total)} ({trained / total:.2%})" if trained is not None and total else ""
    facts: list[tuple[str, Child]] = [
        ("Task", short(run.task, 200)),
        ("Method", short(result.get("method", "none"), 300)),
        ("Model", short(run.recipe.get("model", ""), 200)),
        ("Data", [element("div", one, dir="auto") for one in splits]),
        ("Evaluated on", short(result["evaluated_on"], 200) if result.get("evaluated_on") else None),
        ("Labels", f"{len(labels):,}: {', '.join(short(one, 40) for one in labels[:12])}{' ...' if len(labels) > 12 else ''}" if labels else None),
        ("Trained", f"{told(trained, count)} parameters{share}"),
        ("Training", f"{steps}{optimizer}, {short(result.get('precision', ''), 20)}, seed {short(run.recipe.get('seed', ''), 20)}"),
        ("Speed", f"{told(result.get('tokens_per_second'), count)} tokens a second" if result.get("tokens_per_second") else None),
        ("Device", short(result.get("device", ""), 60)),
        ("Versions", ", ".join(f"{short(k, 20)} {short(v, 30)}" for k, v in mapping(result.get("versions")).items()) or None),
        ("Folder", str(run.folder)),
    ]  # fmt: skip
    pairs = [(element("dt", name), element("dd", value, dir="auto")) for name, value in facts if value]
    recipe = run.recipe_text[:RECIPE]
    return [
        element("dl", pairs, class_="facts"),
        details(
            "The recipe, with all defaults filled in", element("pre", recipe, tabindex=0, aria_label="Recipe")
        ),
        _statistics(about),
    ]


def _statistics(about: dict[str, Any]) -> Child:
    """Return a table with the statistics of each data split that the plan stored."""
    rows: list[list[Child]] = []
    for name, part in about.items():
        try:
            lines = statistics_lines(part)
        except (KeyError, TypeError, ValueError, AttributeError):  # edited, or of another version
            continue
        rows.append(
            [
                short(name, 20),
                element("div", [element("div", f"{what}: {short(text, 300)}") for what, text in lines]),
            ]
        )
    return (
        details(
            "The rows", table("The rows of each part of the data", ["part", "what is in it"], rows, words=2)
        )
        if rows
        else None
    )
