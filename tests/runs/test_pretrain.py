"""`graftkit pretrain`: new and continued models, plain models at the end, resuming, budgets, probes and mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal_bits, graft_tensors, write_csv
from killing import killed
from objectives import WORDS, tiny_model, word_tokenizer, write_texts

import graftkit
from graftkit.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_compared")]

FAST = {
    "train.precision": "fp32",
    "train.batch_size": 8,
    "train.lr": 0.01,
    "train.steps": 6,
    "data.max_length": 24,
}
WORDS_OF_FAST = [f"{key}={value}" for key, value in FAST.items()]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts.txt", 60)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(folder / kind, kind) for kind in ("bert", "pairs", "gpt")}


KINDS = {"mlm": "bert", "mlm_nsp": "pairs", "causal": "gpt"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts, models) -> dict[str, graftkit.Run]:
    """A run of each objective that continues with a tiny model."""
    out = tmp_path_factory.mktemp("finished")
    return {
        name: graftkit.pretrain(
            objective=name, train=texts, model=str(models[kind]), out=out / name, settings=FAST
        )
        for name, kind in KINDS.items()
    }


def dataset_of(run: graftkit.Run):
    """The held-out rows of a run."""
    from graftkit.recipe import schema as recipes
    from graftkit.runs.prepare import prepare, prepare_rows

    recipe = recipes.make(recipes.read(run.path / "recipe.yaml"), stored=True)
    rows = prepare_rows(recipe)
    prepared = prepare(recipe, rows)
    return prepared.rows.task.dataset(rows.eval, prepared.backbone, prepared.max_length)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_plain_model_has_the_loss_that_the_run_reports(finished, name):
    import transformers as t

    run = finished[name]
    auto = {
        "mlm": t.AutoModelForMaskedLM,
        "mlm_nsp": t.AutoModelForPreTraining,
        "causal": t.AutoModelForCausalLM,
    }[name]
    model = auto.from_pretrained(run.result["model"]).eval()
    assert len(t.AutoTokenizer.from_pretrained(run.result["model"])) == model.config.vocab_size
    model.config.use_cache = False  # with a cache, documents in one row would attend to each other
    dataset = dataset_of(run)
    batch = dataset.batch(np.arange(len(dataset)))
    output = model(**dataset.model_inputs(batch))
    logits = output.prediction_logits if name == "mlm_nsp" else output.logits
    chosen = logits[batch.inputs["target_rows"], batch.inputs["target_places"]]
    targets = batch.inputs["targets"]
    loss = torch.nn.functional.cross_entropy(chosen, targets)
    found = run.metrics
    assert float(loss) == pytest.approx(found.get("masked_loss", found["loss"]), rel=1e-4)
    right = float((chosen.argmax(-1) == targets).float().mean())
    assert right == pytest.approx(
        found["token_accuracy" if name == "causal" else "masked_accuracy"], abs=1e-6
    )
    if name == "mlm_nsp":
        order = torch.nn.functional.cross_entropy(output.seq_relationship_logits, batch.inputs["order"])
        assert float(order) == pytest.approx(found["nsp_loss"], rel=1e-4)
        assert found["loss"] == pytest.approx(found["masked_loss"] + found["nsp_loss"])


@pytest.mark.parametrize("name", KINDS)
def test_result_and_log_have_the_promised_figures(finished, name):
    run = finished[name]
    result = json.loads((run.path / "result.json").read_text())
    assert result["problems"] == []
    assert Path(result["model"]) == run.path / "model"
    assert result["tokens"] > 0 and result["tokens_per_second"] > 0 and result["steps"] == 6
    assert result["peak_memory_bytes"] > 0 and result["seconds"] > 0
    found = result["metrics"]
    assert {"loss", "bits_per_byte", "perplexity"} <= set(found)
    assert found["perplexity"] == pytest.approx(math.exp(found.get("masked_loss", found["loss"])))
    card = (run.path / "README.md").read_text()
    assert f"graftkit tune --model {run.path}/model" in card and "graftkit predict" not in card
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "step")
    assert found["loss"] < first["loss"]


def test_evaluating_the_run_gives_its_own_metrics(finished, texts, tmp_path):
    other = write_texts(tmp_path / "other.txt", 20, seed=5)
    found = finished["mlm"].evaluate(other)
    assert 0 < found["loss"] < 10 and found["rows"] > 1
    with pytest.raises(UserError, match="no answers to predict"):
        finished["mlm"].predict(["a text"])


@pytest.mark.parametrize("moment", ["mid-write", "before-result"])
@pytest.mark.slow
def test_a_killed_run_is_resumed_bit_for_bit(finished, texts, models, tmp_path, moment):
    out = tmp_path / "run"
    words = [
        "pretrain", "--objective", "mlm", "--train", texts, "--from", models["bert"], "--out", out, *WORDS_OF_FAST,
        "train.checkpoint_every=2",
    ]  # fmt: skip
    killed(moment, 2, [str(word) for word in words])
    assert not (out / "result.json").exists()
    run = graftkit.resume(out)
    assert equal_bits(graft_tensors(out), graft_tensors(finished["mlm"].path))
    assert run.metrics == finished["mlm"].metrics
    assert run.result["tokens"] == finished["mlm"].result["tokens"]
    assert (out / "model" / "model.safetensors").is_file()


def test_the_batches_do_not_depend_on_what_was_made_before(finished):
    """Any worker may make any batch: each is a function of the rows and the pass alone."""
    from graftkit.data.source import Pass

    for run in finished.values():
        one, two = dataset_of(run), dataset_of(run)
        at = Pass(7, 3, 0.5)
        one.inputs(np.array([0]), Pass(1, 1))
        for rows in (np.array([1, 0]), np.array([0])):
            left, right = one.inputs(rows, at), two.inputs(rows, at)
            assert all(torch.equal(left[name], right[name]) for name in left)
        assert one.digest() == two.digest()


@pytest.mark.slow
def test_a_new_model_with_a_new_tokenizer_is_tuned_as_any_other(texts, tmp_path, command):
    done = command(
        "pretrain", "--objective", "mlm(unit='word')", "--train", texts, "--size", "tiny", "--vocabulary", 120,
        "--out", tmp_path / "run", *WORDS_OF_FAST, "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert result["model"] == str(tmp_path / "run" / "model") and result["problems"] == []
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert f"model: {tmp_path / 'run' / 'initial'}" in recipe
    rows = write_csv(
        tmp_path / "rows.csv", [{"text": WORDS[i % 30], "label": "ab"[i % 2]} for i in range(40)]
    )
    tuned = command(
        "tune", "--model", result["model"], "--task", "classify", "--train", rows, "--method", "head()", "--out",
        tmp_path / "tuned", "train.steps=2",
    )  # fmt: skip
    assert tuned.status == 0, tuned.err
    again = command("pretrain", "--resume", tmp_path / "run")
    assert again.status == 0 and "already finished" in again.err + again.out
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert graftkit.runs.predict.evaluate(moved, str(texts))["metrics"]["loss"] > 0


@pytest.mark.slow
def test_overwriting_keeps_nothing_of_the_old_run_and_mistakes_keep_it(texts, tmp_path):
    out = tmp_path / "run"
    given = {"train": texts, "size": "tiny", "tokenizer": word_tokenizer(tmp_path / "words"), "out": out}
    settings = {**FAST, "train.steps": 1}
    graftkit.pretrain(objective="mlm", settings=settings, **given)
    before = (out / "initial" / "model.safetensors").read_bytes()
    for left in ("initial.1.part", "model.1.part"):  # of a killed process
        (out / left).mkdir()
    with pytest.raises(UserError, match="at most"):
        graftkit.pretrain(
            objective="mlm", settings={**settings, "data.max_length": 4000}, overwrite=True, **given
        )
    assert (out / "result.json").exists() and not list(out.glob("*.part"))
    graftkit.pretrain(objective="mlm", settings={**settings, "seed": 3}, overwrite=True, **given)
    assert (out / "initial" / "model.safetensors").read_bytes() != before
    assert sorted(p.name for p in out.iterdir() if "part" in p.name) == []


def test_a_lora_on_a_pre_trained_model_ends_in_a_plain_model(texts, models, tmp_path):
    run = graftkit.pretrain(
        objective="mlm",
        train=texts,
        model=str(models["bert"]),
        method="lora(rank=2)",
        out=tmp_path / "run",
        settings=FAST,
    )
    assert run.result["trained_parameters"] < run.result["total_parameters"] / 4
    assert (run.path / "model" / "model.safetensors").is_file()


def test_a_model_without_the_head_gets_a_new_one_that_is_trained(texts, models, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    bare = tmp_path / "bare"  # as sentence encoders are
    AutoModel.from_pretrained(models["bert"]).save_pretrained(bare)
    AutoTokenizer.from_pretrained(models["bert"]).save_pretrained(bare)
    given = {"objective": "mlm", "train": texts, "model": str(bare), "settings": FAST}
    with pytest.raises(UserError, match=r"lack the head for mlm .*unfreeze"):
        graftkit.pretrain(method="lora(rank=2)", out=tmp_path / "frozen", **given)
    run = graftkit.pretrain(method="lora(rank=2) + unfreeze('head')", out=tmp_path / "run", **given)
    assert run.result["problems"] == [] and (run.path / "model" / "model.safetensors").is_file()
    assert run.evaluate(texts)["loss"] < math.log(37) * 1.5


def test_a_corpus_that_another_run_tokenizes_is_waited_for(texts, models, monkeypatch):
    from graftkit.claims import InUse
    from graftkit.tasks.objectives import base

    tries = []

    def busy(*given, **more):
        tries.append(given)
        if len(tries) < 3:
            raise InUse("the folder is in use by process 1")
        return "shards"

    monkeypatch.setattr(base, "tokenized", busy)
    monkeypatch.setattr(base, "POLL", 0.0)
    from transformers import AutoTokenizer

    from graftkit.runs.prepare import make_task
    from graftkit.tasks.base import Reading

    task = make_task("mlm")
    table = task.read(texts, Reading(), "train")
    examples = task.examples(table, {}, (), False)
    assert (
        task.shards(examples, AutoTokenizer.from_pretrained(models["bert"])) == "shards" and len(tries) == 3
    )


def test_another_encoding_is_another_corpus(models, tmp_path):
    """A run with a wrong encoding stands in the way of none that has the right one."""
    path = tmp_path / "texts.txt"
    path.write_bytes("\n\n".join(f"kara lone mishi café {i}" for i in range(60)).encode("latin-1"))
    found = []
    for encoding in ("latin-1", "cp1250"):
        run = graftkit.pretrain(
            objective="mlm", train=path, model=str(models["bert"]), out=tmp_path / encoding,
            settings={**FAST, "data.encoding": encoding, "train.steps": 1},
        )  # fmt: skip
        found.append(run.result["steps"])
    assert found == [1, 1]


def test_several_files_are_one_corpus_in_python(texts, models, tmp_path):
    more = write_texts(tmp_path / "more.txt", 20, seed=9)
    run = graftkit.pretrain(
        objective="causal",
        train=[texts, more],
        eval=texts,
        model=str(models["gpt"]),
        out=tmp_path / "run",
        settings=FAST,
    )
    assert run.result["problems"] == [] and (run.path / "model" / "model.safetensors").is_file()
    plan = json.loads((run.path / "plan.json").read_text())
    assert plan["statistics"]["train"]["documents"] == 80 and plan["statistics"]["eval"]["documents"] == 60


def test_a_run_in_the_place_of_a_model_is_an_error_that_names_its_model(finished, texts, tmp_path):
    refused(
        "its model is .*model",
        objective="mlm",
        train=texts,
        model=str(finished["mlm"].path),
        out=tmp_path / "run",
    )


def test_a_probe_is_logged_at_each_evaluation(texts, models, tmp_path):
    rows = [{"text": f"{WORDS[(3 * i) % 30]} {WORDS[i % 2]}", "label": "ab"[i % 2]} for i in range(60)]
    probe = write_csv(tmp_path / "probe.csv", rows)
    run = graftkit.pretrain(
        objective="mlm", train=texts, model=str(models["bert"]), probe=probe, out=tmp_path / "run",
        settings={**FAST, "train.evaluate_every": 3},
    )  # fmt: skip
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    found = [line["probe_accuracy"] for line in lines if line["kind"] == "evaluation"]
    assert len(found) == 2 and all(accuracy > 0.8 for accuracy in found)  # the last word tells the label


@pytest.mark.slow
def test_a_budget_chooses_steps_and_batch_and_tells_why(texts, models, tmp_path, command):
    done = command(
        "pretrain", "--objective", "mlm", "--train", texts, "--from", models["bert"], "--budget", "0.5 s", "--out",
        tmp_path / "run", "data.max_length=24", "train.precision=fp32",
    )  # fmt: skip
    assert done.status == 0, done.err
    said = done.out + done.err
    assert "per parameter" in said and "tokens per second, measured" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] >= 1
    recipe = graftkit.runs.tune.recipes.read(tmp_path / "run" / "recipe.yaml")
    assert recipe["train"]["steps"] == result["steps"] and recipe["budget"] is None


def test_checking_rows_is_not_for_corpora(texts, command):
    done = command("data", "check", "--task", "mlm", "--train", texts)
    assert done.status == 1 and "reads a corpus" in done.err


def test_a_plan_of_a_new_model_trains_nothing(texts, tmp_path, command):
    done = command(
        "plan", "--task", "causal", "--train", texts, "size=tiny", f"tokenizer={word_tokenizer(tmp_path / 'w', end=True)}",
        "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert json.loads(done.out)["trained_parameters"] > 500_000
    assert not (tmp_path / "runs").exists()


# ---- mistakes


def refused(message: str, **given) -> None:
    with pytest.raises(UserError, match=message):
        graftkit.pretrain(**given)


def test_wrong_combinations_are_refused_before_anything_is_read(tmp_path, models):
    bert = str(models["bert"])
    given = {"train": str(tmp_path / "missing.txt"), "out": tmp_path / "run"}
    refused("objective is missing", **given)
    refused("no objective", objective="classify", model=bert, **given)
    refused("leave out one of the two", objective="mlm", model=bert, size="mini", **given)
    refused("leave out one of the two", objective="mlm", model=bert, tokenizer=bert, **given)
    refused("leave out one of the two", objective="mlm", size="mini", tokenizer=bert, vocabulary=100, **given)
    refused("must be a time", objective="mlm", budget="soon", **given)
    refused("apart", objective="mlm(apart=False)", model=bert, **given)  # of another objective
    refused("share", objective="causal(share=0.2)", model=bert, **given)
    with pytest.raises(UserError):
        graftkit.pretrain(objective="mlm() + causal()", model=bert, **given)
    with pytest.raises(UserError, match="is for pre-training"):
        graftkit.tune(model=bert, task="classify", train="rows.csv", settings={"data.probe": "rows.csv"})
    assert not (tmp_path / "run").exists()


def test_models_and_tokenizers_that_do_not_fit_are_refused(texts, models, tmp_path):
    from transformers import AutoTokenizer

    given = {"train": texts, "out": tmp_path / "run", "settings": FAST}
    refused(
        "mask token",
        objective="mlm",
        size="tiny",
        tokenizer=word_tokenizer(tmp_path / "bare", mask=False),
        **given,
    )
    refused(
        "end token", objective="causal", size="tiny", tokenizer=word_tokenizer(tmp_path / "words"), **given
    )
    refused("no head for the order", objective="mlm_nsp", model=str(models["gpt"]), **given)
    refused("not a language model that", objective="mlm", model=str(models["gpt"]), **given)
    small = tiny_model(tmp_path / "small", "bert", vocabulary=20)
    refused(
        r"len\(tokenizer\) is 37, but the embedding has 20 rows", objective="mlm", model=str(small), **given
    )
    bare = tiny_model(tmp_path / "lost", "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    refused("has no tokenizer", objective="mlm", model=str(bare), **given)
    refused("unknown", objective="mlm", size="enormous", **given)
    refused("takes at most 32 tokens", objective="mlm", train=texts, model=str(models["bert"]), out=tmp_path / "run",
            settings={"data.max_length": 33})  # fmt: skip
    refused("the new model takes at most 128 tokens", objective="mlm", size="tiny", vocabulary=200,
            train=texts, out=tmp_path / "run", settings={"data.max_length": 129})  # fmt: skip
    assert AutoTokenizer.from_pretrained(small) is not None
    assert not (tmp_path / "run").exists()


def test_corpora_that_an_objective_cannot_use_are_refused(models, tmp_path):
    given = {"model": str(models["pairs"]), "out": tmp_path / "run", "settings": FAST}
    one = tmp_path / "one.txt"
    one.write_text("Kara lone. Mishi supo.\n", encoding="utf-8")
    refused("none can be held out", objective="mlm_nsp", train=one, **given)
    refused("has 1 document", objective="mlm_nsp", train=one, eval=None, **given)
    lines = tmp_path / "lines.txt"
    lines.write_text("\n\n".join("Kara lone mishi." for _ in range(30)), encoding="utf-8")
    refused("documents of several sentences", objective="mlm_nsp", train=lines, **given)
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(UserError):
        graftkit.pretrain(objective="mlm", train=tmp_path / "empty.txt", **given)
    refused("reads a corpus from files", objective="mlm", train=[{"text": "kara"}], **given)


def test_a_budget_for_less_than_a_step_is_refused(texts, models, tmp_path):
    given = {"objective": "mlm", "train": texts, "model": str(models["bert"]), "out": tmp_path / "run"}
    refused("too small for one step", budget="0.00001 s", **given)
    refused("train.steps is set too", budget="10 s", settings={"train.steps": 3}, **given)
