"""`graftkit compare` and `graftkit curve` with a tiny model."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from conftest import make_rows, write_csv

import graftkit
from graftkit.errors import Interrupted
from graftkit.recipe import schema as recipes
from graftkit.report.console import Console
from graftkit.runs.best import Best
from graftkit.runs.prepare import prepare_rows
from graftkit.runs.scores import read_scores
from graftkit.studies import compare as comparing
from graftkit.studies.study import Study

HEAD, BITFIT = "head(pooling='mean')", "bitfit() + head(pooling='mean')"
SMALL = ("train.precision=fp32", "train.batch_size=16", "train.steps=4", "train.evaluate_every=2")


def words(model, rows, out, *more: object) -> list[object]:
    return [
        "--model",
        model,
        "--train",
        rows / "train.csv",
        "--test",
        rows / "eval.csv",
        "--out",
        out,
        *SMALL,
        *more,
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    write_csv(folder / "train.csv", [*make_rows(40, 1), *[{"text": "a cat", "label": "animal"}] * 12])
    write_csv(folder / "eval.csv", make_rows(40, 2))
    return folder


def test_methods_are_compared(command, short_bert, rows, tmp_path):
    out = tmp_path / "out"
    asked = words(
        short_bert, rows, out, "--seeds", 2, "--search", 2, "--methods", HEAD, BITFIT, "lora(sites='nowhere')",
        HEAD.replace("=", " = "),
    )  # fmt: skip
    done = command("compare", *asked, "--json")
    assert done.status == 0, done.err
    result = json.loads(done.out)
    *trained, refused = result["rows"]
    assert {row["method"] for row in trained} == {HEAD, BITFIT} and f"is the same as {HEAD}" in done.err
    assert "nowhere" in refused["refused"] and refused["method"] == "lora(sites='nowhere')"
    for row in trained:
        runs = [
            json.loads((out / "runs" / name / "result.json").read_text()) for name in map(_name, row["runs"])
        ]
        assert row["mean"] == pytest.approx(sum(run["metrics"]["accuracy"] for run in runs) / 2)
        assert row["interval"][0] <= row["mean"] <= row["interval"][1]
        assert row["metric"] == "accuracy" and row["seeds"] == 2 and row["graft_bytes"] > 0
        assert row["trained_parameters"] == runs[0]["trained_parameters"] and row["peak_memory_bytes"] > 10**7
        assert len(row["tried"]) == 2 and row["learning_rate"] in [
            one["learning_rate"] for one in row["tried"]
        ]
        recipes = [
            yaml.safe_load((out / "runs" / _name(run) / "recipe.yaml").read_text()) for run in row["runs"]
        ]
        assert [one["seed"] for one in recipes] == [0, 1] and [one["data"]["seed"] for one in recipes] == [
            0,
            0,
        ]
        assert {run["steps"] for run in runs} == {4}
    first, second = trained
    assert first["mean"] >= second["mean"] and first["next"]["than"] == second["method"]
    assert first["next"]["by"] == pytest.approx(first["mean"] - second["mean"])
    assert "(6 of 6)" in done.err
    assert set(result["pareto"]) <= {HEAD, BITFIT} and result["pareto"]
    assert result["split"] == "test" and result["measured_rows"] == 40
    page = (out / "report.html").read_text()
    assert (
        result["report"] == str(out / "report.html") and "Quality and cost" in page and "<script" not in page
    )

    # finished runs are not made again, half ones are; methods may be added, but not another recipe
    runs = sorted((out / "runs").iterdir())
    kept, half = runs[0] / "result.json", runs[1] / "result.json"
    before = kept.stat().st_mtime_ns
    half.unlink()
    again = command("compare", "--resume", out, "--json")
    assert again.status == 0, again.err
    assert json.loads(again.out)["rows"][0]["mean"] == first["mean"]
    assert (
        kept.stat().st_mtime_ns == before
        and half.is_file()
        and again.err.count("done before") == len(runs) - 1
    )
    other = command("compare", *asked, "train.weight_decay=0.5")
    assert other.status == 1 and "of another recipe: train.weight_decay was 0.01 and is 0.5" in other.err
    for name in ("report", "evaluate"):
        done = command(name, out, *(["--data", rows / "eval.csv"] if name == "evaluate" else []))
        assert done.status == 1 and "holds a comparison, whose report is report.html there" in done.err
    refused = command("compare", "--resume", out, "--seeds", 3)
    assert refused.status == 1 and "--resume goes on as it began" in refused.err
    shutil.rmtree(out)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def test_few_rows_in_memory_without_test_rows(short_bert, tmp_path):
    told = {
        "model": str(short_bert),
        "methods": [HEAD],
        "seeds": 2,
        "search": 1,
        "train": make_rows(40, 1),
        "eval": 0.5,
    }
    settings = dict(one.split("=") for one in SMALL) | {
        "train.batch_size": 16,
        "train.steps": 2,
        "train.evaluate_every": 2,
    }
    found = graftkit.compare(**told, few=[4, 2], out=tmp_path / "few", settings=settings)
    assert [row["few"] for row in found.rows] == [2, 4] and found.result["split"] == "evaluation"
    assert "chose the learning rates" in found.result["notes"][0]
    for row in found.rows:
        plans = [
            json.loads((tmp_path / "few" / "runs" / _name(run) / "plan.json").read_text())
            for run in row["runs"]
        ]
        assert {plan["rows"] for plan in plans} == {2 * row["few"]} and {plan["steps"] for plan in plans} == {
            2
        }
        assert plans[0]["rows_sha256"]["eval"] == plans[1]["rows_sha256"]["eval"]
        assert plans[0]["rows_sha256"]["train"] != plans[1]["rows_sha256"]["train"]
    with pytest.raises(graftkit.UserError, match="were in memory"):
        comparing.resume_compare(tmp_path / "few", Console(quiet=True))
    assert "Rows and quality" in (tmp_path / "few" / "report.html").read_text()


def test_mistakes_are_told_before_anything_is_trained(command, short_bert, rows, tmp_path):
    out = tmp_path / "out"

    def error(*more: object) -> str:
        done = command("compare", *words(short_bert, rows, out, *more))
        assert done.status == 1 and not (out / "runs").exists(), done.out
        return done.err

    assert "class 'animal' has 11 rows to train on" in error("--methods", HEAD, "--few", 5, 50)
    assert "name the methods to compare" in error()
    assert "--seeds is 0" in error("--methods", HEAD, "--seeds", 0)
    assert "set data.eval" in error("--methods", HEAD, "data.eval=null")
    assert "none of the methods can be trained" in error("--methods", "lora(sites='nowhere')")
    assert "leave data.rows" in error("--methods", HEAD, "data.rows=5")
    assert "Did you mean 'head'?" in error("--methods", HEAD, "haed()")
    tagged = tmp_path / "tagged.conll"
    tagged.write_text("".join(f"apple{i} B-FRUIT\nis O\nold O\n\n" for i in range(8)))
    done = command(
        "compare", "--model", short_bert, "--task", "tag", "--train", tagged, "--methods", HEAD, "--few", 2, "--out", out
    )  # fmt: skip
    assert done.status == 1 and "the rows of tag() have no single class each; leave it out" in done.err
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("x")
    assert "holds files that are not of a comparison (mine.txt)" in error("--methods", HEAD)
    for text, wrong in ((None, "no comparison to go on with"), ("{}", "does not describe a comparison")):
        if text is not None:
            (out / "compare.json").write_text(text)
        done = command("compare", "--resume", out)
        assert done.status == 1 and wrong in done.err


def test_a_learning_curve(command, short_bert, rows, tmp_path):
    out = tmp_path / "curve"
    done = command(
        "curve",
        *words(short_bert, rows, out, "--method", HEAD, "--points", 3, "--seeds", 1, "train.steps=2"),
        "--json",
    )
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert [point["rows"] for point in result["points"]] == [12, 24, 47]
    assert [one["rows"] for one in result["predicted"]] == [94, 188]
    assert result["predicted"][0]["interval"][0] <= result["predicted"][0]["value"] + 1e-9
    assert (
        result["sentence"].startswith("By the curve, 94 rows instead of 47") and result["fit"]["exponent"] > 0
    )
    assert "Would more rows help?" in (out / "report.html").read_text()
    few = command("curve", *words(short_bert, rows, tmp_path / "no", "--points", 9))
    assert few.status == 1 and "47 rows are too few for a curve of 9 points" in few.err


def test_scores_by_row_are_those_of_the_metrics(finished):
    metrics = json.loads((finished / "result.json").read_text())["metrics"]
    scores = read_scores(finished)
    assert set(scores) == {"accuracy", "loss"}
    for name, values in scores.items():
        above, below = values.sum(axis=0)
        assert len(values) == 40 and above / below == pytest.approx(metrics[name], rel=1e-5)


def test_all_are_those_that_stand_alone(short_bert, rows, monkeypatch):
    monkeypatch.setattr(comparing, "entries", lambda family: ["bitfit", "freeze", "full", "new_tokens"])
    recipe = recipes.make({"model": str(short_bert), "data": {"train": str(rows / "train.csv")}})
    study = Study("compare", rows, {}, Console(quiet=True))
    work = comparing._Comparing(
        study, prepare_rows(recipe), Best("accuracy", "max"), comparing.Asked(("all",))
    )
    found, refused = work.candidates(recipe)
    assert {one.method: one.rates for one in found} == {
        "bitfit() + head()": {"bitfit": 0.002, "head": 0.005}, "full() + head()": {"full": 5e-05, "head": 0.005},
    }  # fmt: skip
    assert not refused and found[0].rate == 0.002


@pytest.mark.parametrize(
    "tables, how", [({}, "graftkit compare --resume"), ({"train": []}, "graftkit.compare(..., out=")]
)
def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, tables, how):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graftkit.studies.study.run_recipe", stop)
    recipe = recipes.make({"model": "m", "data": {"train": "t.csv"}})
    with pytest.raises(Interrupted) as stopped:
        study = Study("compare", tmp_path, {}, Console(quiet=True), tables)
        study.all([study.runs([(recipe, "one")], lambda *_: None)])
    assert how in str(stopped.value)


OWN = """
from torch import nn


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.output = nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask):
        states = self.embedding(input_ids)
        for block in self.blocks:
            states = block(states).relu()
        return self.output(states.mean(1))


def make():
    from graftkit import Backbone
    from transformers import AutoTokenizer

    return Backbone(Reader(), AutoTokenizer.from_pretrained(FOLDER), max_length=32)
"""


def test_a_users_module_takes_each_method(tiny_bert, rows, tmp_path, monkeypatch):
    (tmp_path / "own_compared.py").write_text(f"FOLDER = {str(tiny_bert)!r}\n{OWN}")
    monkeypatch.syspath_prepend(tmp_path)
    from graftkit.backbone.source import find_source
    from graftkit.files import write_tensors

    made = find_source("own_compared:make").made
    write_tensors(tmp_path / "weights.safetensors", dict(made.model.state_dict()))
    recipe = recipes.make({
        "model": "own_compared:make", "weights": str(tmp_path / "weights.safetensors"),
        "data": {"train": str(rows / "train.csv")},
    })  # fmt: skip
    asked = comparing.Asked(("lora(rank=2, sites='re:blocks.*')", "unfreeze('embedding')"))
    work = comparing._Comparing(
        Study("compare", rows, {}, Console(quiet=True)), prepare_rows(recipe), Best("accuracy", "max"), asked
    )
    found, refused = work.candidates(recipe)
    assert not refused and len(found) == 2
