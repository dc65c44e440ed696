"""The page of a comparison: who is on the front of quality and cost, and what its charts say."""

from __future__ import annotations

import re

from graftkit.report.comparison import comparison_page


def result(means: dict[str, float], seconds: dict[str, float]) -> dict:
    rows = [
        {
            "method": name, "mean": mean, "interval": [mean - 0.01, mean], "seeds": 2, "learning_rate": 0.01,
            "seconds": seconds[name], "peak_memory_bytes": 10**8, "trained_parameters": 1000, "graft_bytes": 4000,
            "failed": [], "tried": [{"learning_rate": 0.01, "value": None}],
        }
        for name, mean in means.items()
    ]  # fmt: skip
    refused = {"method": "bitfit()", "refused": "it has no bias."}
    return {
        "rows": [*rows, refused], "metric": "accuracy", "direction": "max", "pareto": ["head()"], "notes": [], "steps": 5,
        "measured_rows": 40, "split": "test", "model": "m", "task": "classify", "compare": "c", "differences": [],
        "at_once": 2, "threads": 1,
    }  # fmt: skip


def test_equal_quality_for_more_is_not_on_the_front():
    same = comparison_page(
        result({"head()": 1.0, "lora() + head()": 1.0}, {"head()": 2.0, "lora() + head()": 9.0})
    )
    assert "nothing is better for less" not in same
    near = comparison_page(
        result({"head()": 0.9, "lora() + head()": 0.8}, {"head()": 2.0, "lora() + head()": 1.99})
    )
    assert "nothing is better for less" not in near  # costs that differ by 1% are the same
    apart = comparison_page(
        result({"head()": 0.9, "lora() + head()": 0.8}, {"head()": 2.0, "lora() + head()": 1.0})
    )
    assert apart.count("nothing is better for less") == 1  # of time, not of memory or parameters


def test_shares_have_no_ticks_above_one_and_costs_say_how_runs_were_made():
    page = comparison_page(
        result({"head()": 1.0, "lora() + head()": 1.0}, {"head()": 2.0, "lora() + head()": 9.0})
    )
    ticks = [float(text) for text in re.findall(r'text-anchor="end"[^>]*>([0-9.]+)</text>', page)]
    assert ticks and max(ticks) <= 2  # 2: the number of a dot
    assert not [tick for tick in ticks if 1 < tick < 2]
    assert "2 runs trained at a time, with 1 thread each" in page and "it has no bias." in page
