"""Runs of generate: tuned, asked, streamed, resumed, exported, and read by PEFT and transformers."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal_bits, forked, graft_tensors
from language_models import EOS, PAD, folder, model, rows, tokenizer

import graftkit
from graftkit.backbone import Backbone
from graftkit.data.chat import TEMPLATES
from graftkit.data.columns import find_columns
from graftkit.data.read import read_table
from graftkit.engine.forward import Forward
from graftkit.engine.predict import predict as run_predict
from graftkit.errors import UserError
from graftkit.grafts.attach import attach
from graftkit.tasks.generate.task import Generate

pytestmark = [pytest.mark.sampled, pytest.mark.usefixtures("few_compared")]

FAST = {"train.precision": "fp32", "train.batch_size": 8, "train.lr": 0.01}
QUESTIONS = ["what colour is coal?", "what colour is the sea?", "what is it???", "snow?"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("models") / "llama", "llama", TEMPLATES["chatml"])


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("models") / "t5", "t5", post="$A </s>")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    return path


def tune(
    model: Path, data, out: Path, task: str = "generate()", method: str | None = "full(lr=0.01)", **settings
):
    return graftkit.tune(
        model=str(model), task=task, train=data, eval=0.2, method=method, out=out,
        settings=FAST | {"train.epochs": 8.0} | {f"train.{k}": v for k, v in settings.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(llama, data, tmp_path_factory):
    return tune(llama, data, tmp_path_factory.mktemp("runs") / "run", epochs=16.0, evaluate_every="end")


@pytest.mark.slow
def test_it_learns_to_answer(finished):
    assert finished.metrics["perplexity"] < 1.2 and finished.metrics["token_accuracy"] > 0.95
    assert finished.metrics["perplexity"] == pytest.approx(math.exp(finished.metrics["loss"]))
    low, high = finished.metrics["perplexity_interval"]
    assert low <= finished.metrics["perplexity"] <= high
    answers = finished.predict([row["prompt"] for row in rows(5)])
    assert answers == [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows(5)]
    found = finished.evaluate(rows(10), {"exact_match": True, "max_new_tokens": 8})
    assert found["exact_match"] == 1.0 and found["rows"] == 10
    wrong = finished.evaluate(
        [{"prompt": "what colour is coal?", "completion": "pink"}], {"exact_match": True}
    )
    assert wrong["exact_match"] == 0.0 and wrong["perplexity"] > 2
    assert "exact_match" not in finished.metrics


def test_what_is_shown_and_kept(llama, data, tmp_path, command):
    words = ["--model", llama, "--task", "generate(exact_match=True, max_new_tokens=4)", "--train", data]
    words += [f"{key}={value}" for key, value in FAST.items()]
    shown = command("plan", *words, "train.epochs=1")
    assert shown.status == 0 and "lora()" in shown.out
    done = command("tune", *words, "train.epochs=1", "--out", tmp_path / "run")
    assert done.status == 0, done.err
    first = rows(40)[0]["prompt"]
    assert (
        f"<|im_start|>user\n  {first}<|im_end|>\n  <|im_start|>assistant\n  ⟦green<|im_end|>⟧" in done.out
        or "⟦" in done.out
    )
    assert "tokens are learned, as marked in this row" in done.out and "exact match" in done.out
    statistics = json.loads((tmp_path / "run" / "plan.json").read_text())["statistics"]["train"]
    parts = statistics["example"]["parts"]
    assert [part["learned"] for part in parts] == [False, True, False] and parts[1]["text"].endswith(
        "<|im_end|>"
    )
    assert statistics["learned"] > 36 and statistics["rows"] == 36
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"loss", "perplexity", "exact_match", "token_accuracy"} <= set(result["metrics"])
    worst = [json.loads(line) for line in (tmp_path / "run" / "worst.jsonl").read_text().splitlines()]
    assert {"where", "prompt", "expected", "answer", "loss"} <= set(worst[0])
    assert [row["loss"] for row in worst] == sorted((row["loss"] for row in worst), reverse=True)


@pytest.mark.slow
def test_predict_from_files_and_streamed(finished, data, tmp_path, command):
    out = tmp_path / "answers.jsonl"
    asked = tmp_path / "asked.csv"
    asked.write_text("prompt\nwhat colour is coal?\nwhat colour is snow?\n")
    assert command("predict", finished.path, "--data", asked, "--out", out).status == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [
        {"row": 2, "prompt": "what colour is coal?", "completion": "black"},
        {"row": 3, "prompt": "what colour is snow?", "completion": "white"},
    ]
    plain = command("predict", finished.path, "what colour is coal?")
    streamed = command("predict", finished.path, "what colour is coal?", "--stream")
    assert plain.out == streamed.out == "black\n"
    assert command("predict", finished.path, *QUESTIONS[:2]).out == "black\nblue\n"
    cut = command("predict", finished.path, "what colour is coal?", "--option", "stop=ack", "--json")
    assert json.loads(cut.out)["predictions"][0]["completion"] == "bl"
    short = command(
        "predict", finished.path, "what colour is coal?", "--option", "max_new_tokens=1", "--json"
    )
    assert len(json.loads(short.out)["predictions"][0]["completion"]) < len("black")
    bad = command("predict", finished.path, "x", "--option", "temprature=1")
    assert bad.status == 1 and "Did you mean 'temperature'" in bad.err
    bad = command("predict", finished.path, "x", "--option", "top_p=0")
    assert bad.status == 1 and "top_p is 0, but must be above 0" in bad.err
    assert "prompt 1 of 1 is empty" in command("predict", finished.path, " ").err
    assert (
        command("evaluate", finished.path, "--data", data, "--option", "exact_match=true").out.count(
            "exact match"
        )
        == 1
    )


def ask(base: Backbone, prompts: list[str], batch: int = 8, task: Generate | None = None) -> list[str]:
    task = task or Generate(max_new_tokens=12)
    table = read_table([{"prompt": prompt} for prompt in prompts])
    examples = task.examples(table, find_columns(table, task.columns, {}), (), False, targets=False)
    dataset = task.dataset(examples, base, 80)
    forward = (
        Forward(attach(base, "lora()"), torch.device("cpu"), "fp32")
        if not hasattr(base, "asked")
        else base.asked
    )
    base.asked = forward
    return [out.text for out in run_predict(dataset, forward, task, batch)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.slow
def test_greedy_answers_of_a_batch_are_those_of_each_alone_and_of_transformers(kind):
    tok = tokenizer(post="$A </s>" if kind == "t5" else "")
    base = Backbone(model(kind, seed=8 if kind == "bart" else 0), tok)
    together = ask(base, QUESTIONS)
    assert together == ask(base, QUESTIONS, batch=1)
    assert any(together)
    for prompt, text in zip(QUESTIONS, together):
        ids = tok(prompt if kind in ("t5", "bart") else f"{prompt}\n", return_tensors="pt")["input_ids"]
        base.model.generation_config.forced_eos_token_id = None
        written = base.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, num_beams=1, eos_token_id=EOS,
            pad_token_id=PAD,
        )[0]  # fmt: skip
        new = written[1:] if kind in ("t5", "bart") else written[ids.shape[1] :]
        assert text == tok.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    "method",
    ["lora()", "full()", "ia3()", "adapter()", "prefix(tokens=3)", "prompt(tokens=3)", "ptuning(tokens=3)"],
)
def test_methods_write_with_the_cache_what_they_would_without(kind, method):
    base = Backbone(model(kind), tokenizer(post="$A </s>" if kind == "t5" else ""))
    graft = attach(base, method)
    with torch.no_grad():
        for name, parameter in graft.parameters.items():
            if "_default" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    base.asked = Forward(graft, torch.device("cpu"), "fp32")
    base.model.config.use_cache = False  # as runs leave it
    with torch.no_grad():
        expected = [without_cache(base, prompt, 8) for prompt in QUESTIONS]
    assert ask(base, QUESTIONS, task=Generate(max_new_tokens=8)) == expected


def without_cache(base: Backbone, prompt: str, count: int) -> str:
    """Greedy, one whole forward pass for each token."""
    tok, made = base.processor, base.model
    both = made.config.is_encoder_decoder
    ids = tok(prompt if both else f"{prompt}\n", return_tensors="pt")["input_ids"]
    new: list[int] = []
    for _ in range(count):
        more = torch.tensor([new], dtype=torch.long)
        given = {"input_ids": ids, "decoder_input_ids": torch.cat([torch.tensor([[PAD]]), more], 1)} if both else {
            "input_ids": torch.cat([ids, more], 1)}  # fmt: skip
        token = int(made(**given, use_cache=False).logits[0, -1].argmax())
        if token == EOS:
            break
        new.append(token)
    return tok.decode(new, skip_special_tokens=True)


@pytest.mark.slow
def test_sampling():
    base = Backbone(model("llama"), tokenizer())
    greedy = ask(base, QUESTIONS)
    assert ask(base, QUESTIONS, task=Generate(max_new_tokens=12, temperature=1.0, top_k=1)) == greedy
    assert ask(base, QUESTIONS, task=Generate(max_new_tokens=12, temperature=1.0, top_p=1e-6)) == greedy
    drawn = [
        ask(base, QUESTIONS, task=Generate(max_new_tokens=12, temperature=2.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_streamed_pieces_are_the_answer():
    base = Backbone(model("llama"), tokenizer())
    task = Generate(max_new_tokens=20, stop="zz")
    whole = ask(base, ["snow?"], task=task)
    table = read_table([{"prompt": "snow?"}])
    examples = task.examples(table, {"prompt": "prompt"}, (), False, targets=False)
    pieces: list[str] = []
    (out,) = task.stream(base.asked, task.dataset(examples, base, 80), pieces.append)
    assert "".join(pieces) == out.text == whole[0] and len(pieces) > 3


@pytest.mark.slow
def test_a_prompt_that_is_too_long_keeps_its_end():
    base = Backbone(model("gpt2"), tokenizer())  # 96 learned positions
    assert len(ask(base, ["what colour is snow? " * 40], task=Generate(max_new_tokens=30))) == 1
    long, short = "is " * 300 + "what colour is coal?", "is " * 299 + "what colour is coal?"
    task = Generate(max_new_tokens=40)
    assert ask(base, [long], task=task) == ask(base, [short], task=task)


@pytest.mark.parametrize("form", ["messages", "text", "packed", "unfreeze", "loss all"])
def test_forms_and_methods(llama, tmp_path, form):
    task, method, table = "generate()", None, rows(24)
    if form == "messages":
        table = [
            {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]},
                          {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]}
            for row in table
        ]  # fmt: skip
    elif form == "text":
        table = [{"text": f"{row['prompt']} {row['completion']}"} for row in table]
    elif form == "packed":
        task = "generate(packing=True)"
    elif form == "unfreeze":
        method = "unfreeze('blocks[-1:]', lr=0.01)"
    else:
        task = "generate(loss='all')"
    run = tune(llama, table, tmp_path / "run", task, method, epochs=2.0)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert losses[-1] < losses[0] and run.metrics["rows"] == 5
    plan = json.loads((run.path / "plan.json").read_text())
    if form == "packed":
        assert (
            plan["rows"]
            == plan["statistics"]["train"]["packed_rows"]
            < 19
            == plan["statistics"]["train"]["rows"]
        )
    asked = table[0]["messages"][:1] if form == "messages" else "what colour is coal?"
    answer = run.predict([asked], {"max_new_tokens": 3})[0]
    assert isinstance(answer["completion"], str)
    assert answer["messages" if form == "messages" else "prompt"] == asked


def test_the_loss_of_a_packed_run_is_that_of_separate_rows(llama, tmp_path):
    """All rows in one step: the same gradient, so the same weights."""
    runs = [
        graftkit.tune(
            model=str(llama), task=task, train=rows(16), eval=None, method="lora(dropout=0.0)", out=tmp_path / task,
            settings=FAST | {"train.steps": 2, "train.batch_size": 16, "data.max_length": 90},
        )
        for task in ("generate()", "generate(packing=True)")
    ]  # fmt: skip
    alone, packed = (graft_tensors(run.path) for run in runs)
    assert alone.keys() == packed.keys()
    for name, tensor in alone.items():
        assert torch.allclose(tensor, packed[name], atol=1e-4), name


@pytest.mark.slow
def test_encoder_and_decoder(t5, data, tmp_path):
    run = tune(t5, data, tmp_path / "run", method="full(lr=0.02)", epochs=28.0, evaluate_every="end")
    assert run.metrics["perplexity"] < 2
    assert run.predict(["what colour is coal?"]) == [
        {"prompt": "what colour is coal?", "completion": "black"}
    ]
    done = run.export(tmp_path / "plain")
    assert done["rows_real"]


@pytest.mark.slow
def test_exported(llama, data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tune(llama, data, tmp_path / "run", method="lora(lr=0.02)", epochs=4.0, evaluate_every="end")
    done = run.export(tmp_path / "plain")
    assert done["native"] and done["rows_real"] and done["same_answers"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    tok = AutoTokenizer.from_pretrained(tmp_path / "plain")
    for answer in run.predict(QUESTIONS, {"max_new_tokens": 6}):
        talk = [{"role": "user", "content": answer["prompt"]}]
        ids = tok.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        ends = [EOS, tok.convert_tokens_to_ids("<|im_end|>")]
        new = plain.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=ends)[0, ids.shape[1] :]
        assert tok.decode(new, skip_special_tokens=True) == answer["completion"]


@pytest.mark.parametrize("method", ["lora(lr=0.02)", "ia3(lr=0.02)", "prefix(tokens=3)", "prompt(tokens=3)"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_graft_is_an_adapter_of_peft(llama, t5, data, tmp_path, method, kind):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from graftkit.runs.predict import load_run, open_run

    source = llama if kind == "llama" else t5
    run = tune(source, data, tmp_path / "run", method=method, epochs=1.0)
    config = run.path / "graft" / "adapter_config.json"
    if not config.is_file():
        pytest.skip(f"{method} on {kind} has no form in PEFT")
    assert json.loads(config.read_text())["task_type"] == ("CAUSAL_LM" if kind == "llama" else "SEQ_2_SEQ_LM")
    auto = AutoModelForCausalLM if kind == "llama" else AutoModelForSeq2SeqLM
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(source), run.path / "graft").eval()
    ours = load_run(open_run(run.path)).graft.model
    ids = torch.randint(6, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given |= {"decoder_input_ids": ids[:, :4]} if kind == "t5" else {}
    with torch.no_grad():
        expected, found = ours(**given).logits, theirs(**given).logits[:, -(4 if kind == "t5" else 9) :]
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["generate()", "generate(packing=True)"])
def test_killed_and_resumed(llama, data, tmp_path, task):
    """Killed behind its third checkpoint, it ends with the same graft, bit for bit."""
    settings = [f"{key}={value}" for key, value in FAST.items()]
    words = [
        "tune",
        "--model",
        llama,
        "--task",
        task,
        "--train",
        data,
        "--method",
        "lora(rank=2, dropout=0.1)",
    ]
    words = [
        str(word)
        for word in [*words, *settings, "train.steps=6", "train.checkpoint_every=1", "data.max_length=60"]
    ]

    def run(*more: str) -> None:
        from graftkit.cli.main import main

        main([*words, *more])

    def dying() -> None:
        plain = os.replace

        def replace(source, target):
            plain(source, target)
            if Path(target).name.startswith("step-") and "3" in Path(target).name:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        run("--out", str(tmp_path / "killed"))

    assert forked(lambda: run("--out", str(tmp_path / "whole"))).status == 0
    assert forked(dying).status == -signal.SIGKILL
    from graftkit.runs.tune import resume

    resume(tmp_path / "killed")
    assert equal_bits(graft_tensors(tmp_path / "killed"), graft_tensors(tmp_path / "whole"))


def test_models_that_are_no_language_models(tiny_bert, tmp_path):
    with pytest.raises(UserError, match="no trained head"):
        tune(tiny_bert, rows(4), tmp_path / "run", method="lora()")
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=16)).save_pretrained(tmp_path / "masked")  # fmt: skip
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "masked")
    with pytest.raises(UserError, match="is bidirectional, so it cannot generate text"):
        tune(tmp_path / "masked", rows(4), tmp_path / "run", method="lora()")
    with pytest.raises(UserError, match="leave head"):
        tune(tiny_bert, rows(4), tmp_path / "run", method="lora() + head()")


def test_bad_rows_that_only_tokens_tell_are_counted(llama, tmp_path):
    table = [*rows(12), {"prompt": "what colour is snow? " * 9, "completion": "white"}]
    with pytest.raises(UserError, match=r"train \(in memory\), row 13: nothing is left to learn"):
        graftkit.tune(model=str(llama), task="generate()", train=table, eval=None, out=tmp_path / "a",
                      settings=FAST | {"data.max_length": 60, "train.steps": 1})  # fmt: skip
    assert not (tmp_path / "a").exists()
    run = graftkit.tune(model=str(llama), task="generate()", train=table, eval=None, out=tmp_path / "b",
                        settings=FAST | {"data.max_length": 60, "train.steps": 1, "data.skip_bad": True})  # fmt: skip
    assert run.result["rows_skipped"] == 1


def test_units_are_labelled_tokens():
    base = Backbone(model("llama"), tokenizer())
    task = Generate()
    table = read_table(
        [{"prompt": "snow?", "completion": "white"}, {"prompt": "snow?", "completion": "white and cold"}]
    )
    examples = task.examples(table, find_columns(table, task.columns, {}), (), False)
    data = task.dataset(examples, base, 80)
    tok = base.processor
    assert data.units.tolist() == [len(tok(text)["input_ids"]) + 1 for text in ("white", "white and cold")]
    assert np.array_equal(data.units, [mask.sum() for mask in data.learned])
