"""`graftkit report`: pages of run folders, which can be made again, and what is refused."""

from __future__ import annotations

import importlib
import json
import re
import sys
import webbrowser

import pytest
from run_folders import write_run

import graftkit
from graftkit.errors import UserError


def test_a_run_ends_with_a_report_that_can_be_made_again(finished, command, tmp_path):
    page = (finished / "report.html").read_text(encoding="utf-8")
    result = json.loads((finished / "result.json").read_text())
    value = result["metrics"]["accuracy"]
    assert f'<div class="big">{value:.4f}</div>' in page
    assert set(result["versions"]) >= {"python", "torch", "transformers"}
    assert result["task"] == "classify" and result["headline"] == ["accuracy", "macro_f1"]
    bins = result["metrics"]["calibration"]["bins"]
    assert sum(one[2] for one in bins) == result["metrics"]["rows"]
    right = sum(one[2] * one[4] for one in bins) / result["metrics"]["rows"]
    assert right == pytest.approx(value)
    done = command("report", finished, "--out", tmp_path / "again.html", "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page
    assert told["bytes"] == len(page.encode()) and told["runs"][0]["value"] == value
    assert told["runs"][0]["interval"] == result["metrics"]["accuracy_interval"]


def test_python_makes_reports_too(tmp_path, monkeypatch):
    opened: list = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    folders = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    done = graftkit.make_report(folders[0], open=True)
    assert done["report"] == str(folders[0] / "report.html") and opened == [
        (folders[0] / "report.html").as_uri()
    ]
    both = graftkit.make_report(*folders, out=tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert len(both["runs"]) == 2 and all(
        re.search(f'scope="row"[^>]*>{name}/run<', text) for name in ("a", "b")
    )
    importlib.import_module("graftkit.report.page")  # of the package of the same name
    assert graftkit.make_report(folders[0])["bytes"] == done["bytes"]


def test_a_report_imports_no_torch(tmp_path, command, monkeypatch):
    folder = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would fail
    assert command("report", folder).status == 0


def damaged(folder, name, text):
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("case, told", [
    ("missing", "run folder '{}/missing' does not exist"),
    ("empty", "is not a run folder (it has no recipe.yaml)"),
    ("half", "the run in {}/half is not finished; resume it with `graftkit tune --resume {}/half`"),
    ("cut", "result.json cannot be read: it is cut short after 10 bytes"),
    ("number", "result.json: metrics is missing or not an object; restore the file from a copy"),
    ("log", "metrics.jsonl, line 1 is not JSON; restore the file from a copy"),
    ("previews", "previews.json contains an object, not a list; restore it from a copy"),
    ("recipe", "recipe.yaml"),
])  # fmt: skip
def test_folders_that_hold_no_finished_run_are_refused(tmp_path, command, case, told):
    folder = tmp_path / case
    if case == "empty":
        folder.mkdir()
    elif case != "missing":
        write_run(folder)
    if case == "half":
        (folder / "result.json").unlink()
    name, text = {
        "cut": ("result.json", '{"metrics"'), "number": ("result.json", '{"metrics": 3}'), "previews": ("previews.json", "{}"),
        "log": ("metrics.jsonl", 'no\n{"kind": "step"}\n{}\n'), "recipe": ("recipe.yaml", "a: [\n"),
    }.get(case, ("", ""))  # fmt: skip
    if name:
        (folder / name).write_text(text)
    done = command("report", folder)
    assert done.status == 1 and told.replace("{}", str(tmp_path)) in done.err, done.err
    assert not (folder / "report.html").exists()


def test_a_log_cut_short_at_its_end_is_read(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "fin')
    (folder / "plan.json").unlink()
    assert graftkit.make_report(folder)["bytes"] > 10_000


def test_runs_that_cannot_be_compared_and_files_that_are_no_reports_are_refused(tmp_path, command):
    one, same = write_run(tmp_path / "one"), write_run(tmp_path / "same")
    tags = write_run(tmp_path / "tags", task="tag")
    kappa = write_run(
        tmp_path / "kappa",
        task="classify(kind='ordinal')",
        found={"kappa": 0.5, "rows": 3},
        result={"headline": ["kappa"]},
    )
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    out = tmp_path / "both.html"
    for words, told in (
        (
            [one, tags, "--out", out],
            "is a run of classify and {}/tags one of tag; a report compares runs of one task",
        ),
        ([one, kappa, "--out", out], "is evaluated by accuracy and {}/kappa by kappa"),
        ([one, same], "a report of several runs needs a file to write: --out FILE.html"),
        ([one, "--out", tmp_path / "notes.html"], "notes.html exists and is not a report of GraftKit"),
        ([one, "--out", tmp_path / "page.txt"], "use a name that ends in .html"),
        ([one, "--out", tmp_path / "folder.html"], "folder.html is a folder"),
        ([*[one] * 1, *[tmp_path / f"{i}" for i in range(60)], "--out", out], "does not exist"),
    ):
        (tmp_path / "folder.html").mkdir(exist_ok=True)
        done = command("report", *words)
        assert done.status == 1 and told.replace("{}", str(tmp_path)) in done.err, done.err
        assert not out.exists()
    assert (tmp_path / "notes.html").read_text() == "<p>mine</p>"
    for _ in range(2):  # an older report is replaced
        assert command("report", one, same, "--out", out).status == 0
    with pytest.raises(UserError, match="at least one run"):
        graftkit.make_report()
