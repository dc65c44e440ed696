"""The command line from end to end, on a tiny model."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import graft_tensors, in_process, tune_words

import graftkit


def only_object(out: str) -> dict:
    """Standard output holds one JSON object and nothing else."""
    assert out.count("\n") == 1
    value = json.loads(out)
    assert isinstance(value, dict)
    return value


def test_tune_by_options(command, tiny_bert, rows_folder, tmp_path):
    done = command(*tune_words(tiny_bert, rows_folder, tmp_path / "run", "train.epochs=10", "--json"))
    assert done.status == 0
    found = only_object(done.out)
    assert {
        "run",
        "metrics",
        "trained_parameters",
        "total_parameters",
        "seconds",
        "peak_memory_bytes",
    } <= set(found)
    assert found["run"] == str(tmp_path / "run")
    low, high = found["metrics"]["accuracy_interval"]
    assert 0.85 < found["metrics"]["accuracy"] <= 1 and low <= found["metrics"]["accuracy"] <= high
    for told in (
        "Found",
        "2: fruit, tool",
        "Plan",
        "trained",
        "Training",
        "accuracy",
        "rows/s",
        "left",
        "run folder",
    ):
        assert told in done.err


def test_tune_by_recipe_with_settings_and_options_over_it(command, tiny_bert, rows_folder, tmp_path):
    recipe = {
        "model": str(tiny_bert), "method": "head()", "seed": 5,
        "data": {"train": str(rows_folder / "train.csv"), "eval": str(rows_folder / "eval.csv")},
        "train": {"epochs": 9, "precision": "fp32", "batch_size": 16},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = command(
        "tune", "r.yaml", "train.epochs=1", "train.lr=1e-2", "--method", "bitfit() + head()", "--out", "o"
    )
    assert done.status == 0 and "Result" in done.out
    saved = yaml.safe_load((tmp_path / "o" / "recipe.yaml").read_text())
    assert (
        saved["train"]["epochs"] == 1 and saved["train"]["lr"] == 0.01 and saved["train"]["batch_size"] == 16
    )
    assert saved["seed"] == 5 and saved["method"].startswith("bitfit()")
    assert json.loads((tmp_path / "o" / "result.json").read_text())["steps"] == 6


@pytest.mark.slow
def test_a_share_is_held_out_and_none_is_possible(command, tiny_bert, rows_folder, tmp_path):
    words = tune_words(tiny_bert, rows_folder, tmp_path / "a", "train.steps=2", "--json", "--eval", "0.25")
    found = only_object(command(*words).out)
    assert found["metrics"]["rows"] == 24
    words = tune_words(tiny_bert, rows_folder, tmp_path / "b", "train.steps=2", "--json", "--eval", "none")
    assert only_object(command(*words).out)["metrics"] == {}
    assert "no rows to evaluate on" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        # 3 blocks, width 32, inner width 64, 2 classes
        ("lora(rank=4, sites='q,v') + head()", 3 * 2 * 4 * (32 + 32) + 2 * 33),
        ("head(pooling='mean')", 2 * 33),
        ("full() + head(pooling='own')", (38 + 64 + 2 + 2) * 32 + 3 * 8544 + 32 * 33 + 2 * 33),
        ("head(pooling='mean', hidden=8)", 8 * 33 + 2 * 9),
        ("prefix(tokens=5) + head(pooling='cls')", 2 * 3 * 5 * 32 + 2 * 33),
        ("unfreeze('blocks[-1:]') + head(pooling='mean')", 4 * 32 * 33 + 32 * 65 + 64 * 33 + 2 * 64 + 2 * 33),
    ],
)
@pytest.mark.slow
def test_plan_trains_nothing_and_counts_what_tune_counts(
    command, tiny_bert, rows_folder, tmp_path, method, formula
):
    words = tune_words(tiny_bert, rows_folder, tmp_path / "run", "train.steps=2", "--json", method=method)
    planned = only_object(command("plan", *words[1:]).out)
    assert not (tmp_path / "run").exists()
    assert planned["trained_parameters"] == formula
    assert planned["gradient_bytes"] == 4 * formula
    assert 0 <= planned["optimizer_bytes"] - 8 * formula < 4 * 100, "two moments, and a count for each tensor"
    tuned = only_object(command(*words).out)
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert written.pop("rows_sha256") and written.pop("statistics")
    for name in ("base_values", "recipe", "config_sha256", "processes"):
        written.pop(name)
    assert planned == written
    assert tuned["trained_parameters"] == formula and tuned["total_parameters"] == planned["total_parameters"]
    if "prefix" not in method:  # PEFT keeps all layers of a prefix in one matrix beside ours
        tensors = graft_tensors(tmp_path / "run")
        assert sum(t.numel() for name, t in tensors.items() if not name.startswith("confidence")) == formula


@pytest.mark.slow
def test_plan_counts_a_pooler_that_the_weights_lack(command, tiny_bert, rows_folder, tmp_path):
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "model")
    for method in ("lora(rank=2) + head()", "full() + head(pooling='mean')"):
        words = tune_words(tmp_path / "model", rows_folder, tmp_path / "run", "train.steps=2", method=method)
        planned = only_object(command("plan", *words[1:], "--json").out)
        assert command(*words, "--overwrite").status == 0
        written = json.loads((tmp_path / "run" / "plan.json").read_text())
        assert written.pop("rows_sha256") and written.pop("statistics")
        for name in ("base_values", "recipe", "config_sha256", "processes"):
            written.pop(name)
        assert planned == written


def test_plan_for_a_person(command, tiny_bert, rows_folder, tmp_path):
    done = command("plan", *tune_words(tiny_bert, rows_folder, tmp_path / "run")[1:])
    assert done.status == 0 and "weights" in done.out and "30 of 16 rows (6 an epoch)" in done.out


def test_inspect(command, tiny_bert):
    done = command("inspect", tiny_bert)
    assert done.status == 0 and "blocks[0] to blocks[2], 3 alike" in done.out and "attention" in done.out
    done = command("inspect", tiny_bert, "--method", "lora(rank=2, sites='q') + head()", "--json")
    found = only_object(done.out)
    assert found["trained_parameters"] == 3 * 2 * 64 + 2 * 33
    assert found["selections"]["q"]["modules"] == 3 and len(found["blocks"]) == 3
    done = command("inspect", tiny_bert, "--method", "lora(sites='q')")
    assert "lora_default" in done.out and "trains" in done.out
    assert "a head is counted" not in done.out
    for head, told in (("head()", "2 classes"), ("head(classes=5)", "5 classes")):
        assert f"a head is counted for {told}" in command("inspect", tiny_bert, "--method", head).out


@pytest.mark.slow
def test_evaluate_gives_the_figures_of_tune(command, finished, rows_folder):
    found = only_object(command("evaluate", finished, "--data", rows_folder / "eval.csv", "--json").out)
    told = json.loads((finished / "result.json").read_text())["metrics"]
    assert found["metrics"].pop("loss") == pytest.approx(told.pop("loss"), rel=1e-5)
    assert found["metrics"] == told
    done = command("evaluate", finished, "--data", rows_folder / "eval.csv")
    assert "accuracy" in done.out and "By class" in done.out and "fruit" in done.out


def test_predict_texts(command, finished):
    done = command("predict", finished, "the old hammer", "a very new plum")
    assert [line.split("\t")[0] for line in done.out.splitlines()] == ["tool", "fruit"]
    found = only_object(command("predict", finished, "the old hammer", "--json").out)
    assert found["predictions"][0]["label"] == "tool" and 0.5 < found["predictions"][0]["probability"] <= 1


def test_predict_a_file_into_files(command, finished, rows_folder, tmp_path):
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        done = command("predict", finished, "--data", rows_folder / "eval.csv", "--out", tmp_path / name)
        assert done.status == 0 and done.out == ""
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "a.tsv").open(newline="") as file:
        tabbed = list(csv.DictReader(file, delimiter="\t"))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == 40 and rows == tabbed
    assert [row["label"] for row in rows] == [row["label"] for row in lines]
    done = command("predict", finished, "a plum", "--out", tmp_path / "a.xlsx")
    assert (
        done.status == 1
        and "a.xlsx" in done.err
        and ".csv" in done.err
        and not (tmp_path / "a.xlsx").exists()
    )


def test_recipe_lists_every_key_and_method(command):
    listed = command("recipe").out
    assert "train.epochs" in listed and "data.skip_bad" in listed and "lora(" in listed and "rank" in listed
    assert json.loads(command("recipe", "--schema").out)["properties"]["train"]
    only_object(command("recipe", "--json").out)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tune", "--modle", "x"], "--modle"),
        (["tun"], "tune"),
        (["predict"], "RUN"),
        (["evaluate", "x"], "--data"),
        (["tune", "a.yaml", "b.yaml"], "a.yaml"),
        (["tune"], "'model' is missing"),
        (["tune", "--model", "x"], "'data.train' is missing"),
        (["tune", "seed=0", "other"], "'other' is neither"),
        (["predict", "x"], "texts or --data"),
        (["predict", "x", "--data", ""], "--data is empty"),
        (["evaluate", "x", "--data", ""], "--data is empty"),
        (["tune", "--model", "x", "--train", ""], "--train is empty"),
        (["tune", "--model", "x", "--train", "t.csv", "--eval", ""], "--eval is empty"),
        (["predict", "x", "text", "--data", "f.csv"], "texts or --data"),
    ],
)
def test_usage_mistakes(command, words, told):
    done = command(*words)
    assert done.status == 1 and told in done.err and done.err.startswith("error: ") and done.out == ""
    as_json = command(*words, "--json")
    assert as_json.status == 1 and told in only_object(as_json.out)["error"]


def test_no_words_at_all(command):
    done = command()
    assert done.status == 1 and "Usage" in done.err and "tune" in done.err


def test_the_version():
    assert in_process("--version").stdout == f"graftkit {graftkit.__version__}\n"


@pytest.mark.slow
def test_help_imports_no_torch():
    code = (
        "import sys; from graftkit.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "tune" in done.stdout
    assert "lora(" in in_process("tune", "--help").stdout


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error():
    script = "graftkit recipe --schema | head -c 10; exit ${PIPESTATUS[0]}"
    path = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=path)
    assert "Traceback" not in done.stderr


def test_predict_overwrites_no_file_unasked(command, finished, rows_folder, tmp_path, monkeypatch):
    mine = tmp_path / "my.csv"
    mine.write_bytes(before := (rows_folder / "eval.csv").read_bytes())
    (tmp_path / "link.csv").symlink_to(mine)
    (tmp_path / "old.csv").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(
            "graftkit.runs.predict.answer", lambda *given: pytest.fail("nothing is answered before the check")
        )
        for out, more, told in (
            ("my.csv", (), "rows to answer"),
            ("link.csv", ("--overwrite",), "rows to answer"),
            ("old.csv", (), "--overwrite"),
            ("new.xlsx", (), ".jsonl"),
            ("old.csv/new.csv", (), "not a folder"),
        ):
            done = command("predict", finished, "--data", mine, "--out", tmp_path / out, *more)
            assert done.status == 1 and told in done.err
    assert mine.read_bytes() == before and (tmp_path / "old.csv").read_text() == "old"
    done = command("predict", finished, "--data", mine, "--out", tmp_path / "old.csv", "--overwrite")
    assert done.status == 0 and "probability" in (tmp_path / "old.csv").read_text()


def test_predict_names_its_rows_and_those_left_out(command, finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    bad = tmp_path / "t.csv"
    bad.write_text("text,label\na plum,fruit\n,tool\nthe saw,tool\n")
    done = command("predict", run, "--data", bad)
    assert done.status == 1 and "line 3" in done.err and str(run / "recipe.yaml") in done.err
    recipe["data"]["skip_bad"] = True
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = command("predict", run, "--data", bad, "--json")
    found = only_object(done.out)
    assert [row["row"] for row in found["predictions"]] == [2, 4]
    assert found["skipped"] == 1 and "line 3" in found["skipped_rows"][0]
    assert "1 bad rows were skipped" in done.err and "line 3" in done.err
    assert "row" not in only_object(command("predict", run, "a plum", "--json").out)["predictions"][0]
    assert "text 2 of 2 is empty" in command("predict", run, "a plum", " ").err


def test_predict_does_not_answer_the_labels(command, finished, tmp_path):
    for column in ("label", "intent"):
        (tmp_path / "t.csv").write_text(f"{column},id\nfruit salad,1\ntool box,2\n")
        done = command("predict", finished, "--data", tmp_path / "t.csv")
        assert done.status == 1 and "looks like the text" in done.err and "Rename" in done.err
    (tmp_path / "t.csv").write_text("words,intent\nthe saw,tool\na plum,fruit\n")
    assert "the saw" in command("predict", finished, "--data", tmp_path / "t.csv").out


def test_a_run_whose_description_has_gone(command, finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "graft" / "graft.json").unlink()
    done = command("predict", run, "a plum")
    assert done.status == 1 and "graft.json" in done.err and done.err.startswith("error: ")


def test_cells_and_lines_are_shown_as_they_are(capsys):
    from graftkit.report.console import Console

    console = Console()
    console.table(["[/red]", "F1"], [["[/red]", "1"], [":smile: [b]x[/b]", "2"]])
    console.line(":smile: [/red]")
    console.pairs([("labels", "[/red], :smile:")])
    console.heading("[/b]")
    out = capsys.readouterr().out
    assert out.count("[/red]") == 4 and out.count(":smile:") == 3 and "[b]x[/b]" in out


def test_a_label_stays_in_its_cell_of_the_card():
    from graftkit.report.card import _plain

    assert _plain("a|b\nc") == "a\\|b c"


def test_what_an_option_may_be_is_told(command):
    done = command("tasks", "audio-classify")
    assert "cut = 'start'  which part of a longer sound is used (start, middle)\n" in done.out
    assert "(kaiming, " in command("methods", "lora").out


def test_rows_in_place_of_a_recipe(command, rows_folder):
    done = command("tune", rows_folder / "train.csv")
    assert done.status == 1 and "holds rows, not a recipe; write --train" in done.err


@pytest.mark.parametrize(
    ("task", "columns", "told"),
    [
        ("classify", ["text", "label"], '"a text"'),
        ("classify", ["text", "text_pair", "label"], '"a text" "its pair"'),
        ("prompting", ["text", "label"], '"a text"'),
        ("tag", ["tokens", "tags"], '"a text"'),
        ("span", ["question", "context", "answers"], '"a question" "a context"'),
        ("choice", ["question", "choices", "label"], '"a question" "a choice" "a choice"'),
        ("choice", ["choices", "label"], '"a choice" "a choice"'),
        ("choice", ["question", "context", "choices", "label"], "--data FILE"),
        ("generate", ["prompt", "completion"], '"a prompt"'),
        ("generate", ["text"], '"a text"'),
        ("image_classify", ["image", "label"], "picture.jpg"),
        ("audio_classify", ["audio", "label"], "sound.wav"),
    ],
)
def test_a_card_says_what_predict_takes(task, columns, told):
    from graftkit.runs.prepare import make_task

    assert make_task(task).predict_arguments(dict.fromkeys(columns, "")) == told


def test_ctrl_c_ends_a_command_with_one_word(command, monkeypatch):
    import graftkit.runs.fit

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(graftkit.runs.fit, "fit_values", interrupted)
    done = command("fit", "some/model", "--train", "rows.csv", "--json")
    assert (
        done.status == 130 and done.err.strip() == "stopped" and json.loads(done.out) == {"error": "stopped"}
    )
