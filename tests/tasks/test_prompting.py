"""Prompting: scores against plain loops of transformers, prompts that fit, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, make_rows, write_csv

import graftkit
from graftkit.backbone.load import load_backbone
from graftkit.backbone.source import auto_class, find_source
from graftkit.data.read import read_table
from graftkit.errors import UserError
from graftkit.recipe import schema as recipes
from graftkit.report.console import Console
from graftkit.runs.tune import plan
from graftkit.tasks.prompting import Prompting
from graftkit.tasks.shared.prompts.template import draw_shots, read_template

pytestmark = [pytest.mark.sampled, pytest.mark.usefixtures("few_compared")]

LABELS = ("fruit", "tool")
TEMPLATE = "my {text} is a {label}"
ONE = {"fruit": "plum", "tool": "saw"}
SEVERAL = {"fruit": "very old plum", "tool": "saw", "animal": "very new"}
LONG = {"fruit": "new plum", "tool": "saw"}


def folder_of(kind: str, place: Path) -> Path:
    """A tiny language model with a word tokenizer: causal (GPT-2) or masked (BERT)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Text", "Label", ":", "yes", "no")
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate((*special, *WORDS))}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "masked":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    size = tokenizer.get_vocab_size()
    named = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    named = named if kind == "masked" else {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **named).save_pretrained(place)
    torch.manual_seed(1)
    if kind == "masked":
        model = BertForMaskedLM(BertConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64,
        ))  # fmt: skip
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: folder_of(kind, tmp_path_factory.mktemp("models") / kind) for kind in ("causal", "masked")}


@pytest.fixture(scope="module")
def backbones(folders):
    found = {}
    for kind, folder in folders.items():
        source = find_source(str(folder))
        found[kind] = load_backbone(source, auto_class(source, Prompting.families), complete=True)
    return found


def resolved(rows: list[dict], **options) -> tuple[Prompting, object]:
    task = Prompting(**options)
    labels = tuple(sorted({row["label"] for row in rows}))
    columns = {name: name for name in ("text", "text_pair", "label") if name in rows[0]}
    examples = task.examples(read_table(rows), columns, labels, False)
    return task.resolve(examples, labels, 0), examples


def scores(task, examples, backbone, max_length: int = 64) -> np.ndarray:
    dataset = task.dataset(examples, backbone, max_length)
    with torch.no_grad():
        return dataset.call(backbone.model, dataset.batch(np.arange(len(examples)))).numpy()


def plain(model, tokenizer, prompt: str, word: str) -> tuple[float, int]:
    """log p of a word after a prompt, one token after the other; and how many there are."""
    total, ids = 0.0, tokenizer(prompt, return_tensors="pt")["input_ids"]
    word_ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for token in word_ids:
            total += float(model(input_ids=ids).logits[0, -1].log_softmax(-1)[token])
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return total, len(word_ids)


def plain_masked(model, tokenizer, template: str, word: str) -> tuple[float, int]:
    """log p of a word's tokens in place of as many masks."""
    word_ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    ids = tokenizer(template.format(label="[MASK]" * len(word_ids)), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
    places = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0].tolist()[-len(word_ids) :]
    return float(sum(logs[place, token] for place, token in zip(places, word_ids))), len(word_ids)


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("words", [ONE, SEVERAL])
def test_scores_are_those_of_a_plain_loop(backbones, kind, score, words):
    rows = make_rows(9, 3, tuple(words))
    task, examples = resolved(rows, template=TEMPLATE, words=words, score=score)
    got = scores(task, examples, backbones[kind])
    model, tokenizer = backbones[kind].model, backbones[kind].processor
    for row, found in zip(rows, got):
        for place, label in enumerate(sorted(words)):
            if kind == "causal":
                wanted, tokens = plain(model, tokenizer, f"my {row['text']} is a", words[label])
            else:
                template = TEMPLATE.replace("{text}", row["text"])
                wanted, tokens = plain_masked(model, tokenizer, template, words[label])
            wanted /= tokens if score == "mean" else 1
            assert found[place] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_examples_stand_before_the_row(backbones, kind):
    rows = make_rows(8, 3)
    task, examples = resolved(rows, template="{text} is {label}", words=ONE, shots=2, separator=" and ")
    assert {shot[-1] for shot in task.shown} == set(LABELS)
    context = "".join(f"{text} is {ONE[label]} and " for text, label in task.shown)
    got = scores(task, examples, backbones[kind])
    for row, found in zip(rows, got):
        for place, label in enumerate(LABELS):
            if kind == "causal":
                wanted, _ = plain(
                    backbones[kind].model, backbones[kind].processor, f"{context}{row['text']} is", ONE[label]
                )
            else:
                template = f"{context}{row['text']} is {{label}}"
                wanted, _ = plain_masked(
                    backbones[kind].model, backbones[kind].processor, template, ONE[label]
                )
            assert found[place] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_words_of_one_token_need_one_pass(backbones, kind):
    model, calls = backbones[kind].model, []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        apart = {"fruit": "very plum", "tool": "old saw"}
        for words, causal, masked in ((ONE, 1, 1), (LONG, 1, 2), (SEVERAL, 1, 3), (apart, 2, 1)):
            task, examples = resolved(make_rows(6, 3, tuple(words)), template=TEMPLATE, words=words)
            calls.clear()
            scores(task, examples, backbones[kind])
            assert len(calls) == {"causal": causal, "masked": masked}[kind]
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_calibration_divides_by_the_probabilities_without_content(backbones, kind):
    """Zhao et al. 2021, equation 1 with W = diag(p_cf)^-1 and b = 0."""
    rows = make_rows(6, 3)
    options = {"template": TEMPLATE, "words": ONE, "shots": 2}
    (raw, examples), (calibrated, _) = resolved(rows, **options), resolved(rows, **options, calibrate=True)
    plainly = torch.tensor(scores(raw, examples, backbones[kind])).softmax(1)
    dataset = raw.dataset(examples, backbones[kind], 64)
    with torch.no_grad():
        found = dataset.asking.scores(backbones[kind].model, dataset.asking.without_content(2), lambda t: t)
    assert len(found) == 2  # 'N/A' and nothing
    expected = plainly / found.softmax(1).mean(0)
    expected /= expected.sum(1, keepdim=True)
    got = torch.tensor(scores(calibrated, examples, backbones[kind])).softmax(1)
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
@pytest.mark.parametrize(
    "template", ["{text} is {label}", "my {text}\nis:{label}", "{text} {label}", "{text}\n{label}."]
)
def test_tokens_are_those_of_the_whole_text(backbones, monkeypatch, kind, template):
    """Tokens with the space before a word in them, as GPT-2 and as SentencePiece have them; words of several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if kind == "bytes" else pre_tokenizers.Metaspace()
    )
    tokenizer.decoder = decoders.ByteLevel() if kind == "bytes" else decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else list("\n:.")
    texts = [row["text"] for row in make_rows(60, 5)] + ["is is", "N/A"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="N")
    monkeypatch.setattr(backbones["causal"], "processor", whole)
    table = torch.nn.Embedding(len(whole), 1)  # only asked for its rows
    monkeypatch.setattr(backbones["causal"].model, "get_input_embeddings", lambda: table)
    words = {"fruit": "grapes", "tool": "hammer drill"}
    task, examples = resolved(make_rows(6, 3), template=template, words=words)
    dataset = task.dataset(examples, backbones["causal"], 64)
    for row, prompt in zip(make_rows(6, 3), dataset.prompts):
        for label, tokens in zip(words, dataset.asking.words):
            text = template.partition("{label}")[0].format(text=row["text"]) + words[label]
            assert [*prompt.ids[0], *tokens] == whole(text)["input_ids"]


def test_a_mask_in_a_text_is_not_the_answer(backbones):
    rows = [{"text": "the [MASK] saw", "label": "tool"}, {"text": "the plum", "label": "fruit"}]
    task, examples = resolved(rows, template="{text} is {label} and [PAD] here", words=ONE)
    prompts = task.dataset(examples, backbones["masked"], 64).prompts
    tokens = backbones["masked"].processor.convert_ids_to_tokens(prompts[0].ids[1])
    assert tokens.count("[MASK]") == 2 and tokens[prompts[0].places[1] - 1] == "is"
    after, _ = resolved(rows, template="{label} is {text}", words=ONE)
    prompts = after.dataset(examples, backbones["masked"], 64).prompts
    assert [prompt.places[1] for prompt in prompts] == [1, 1]


def test_what_has_no_room_is_left_out(backbones):
    rows = [
        *make_rows(8, 3),
        {"text": " ".join(["the"] * 30), "label": "tool"},
        {"text": " ".join(["a"] * 90), "label": "fruit"},
    ]
    task, examples = resolved(rows[:8], template=TEMPLATE, words=LONG, shots=3)
    _, examples = resolved(rows, template=TEMPLATE, words=LONG)
    for kind in ("causal", "masked"):
        dataset = task.dataset(examples, backbones[kind], 48)
        lengths = [prompt.length for prompt in dataset.prompts]
        assert max(lengths) <= 48 and dataset.truncated == 1
        assert dataset.prompts[0].shots > dataset.prompts[9].shots == 0
        assert dataset.prompts[8].shots < 3 and not dataset.prompts[8].cut and dataset.prompts[9].cut
        assert dataset.dropped == sum(prompt.shots < 3 for prompt in dataset.prompts) > 0
        assert "have no room for all 3 examples" in task.rendered(dataset)
        assert np.isfinite(scores(task, examples, backbones[kind], 48)).all()
        with pytest.raises(UserError, match=r"row 1: the template alone"):
            task.dataset(examples, backbones[kind], 4)


def test_examples_are_drawn_in_turn_and_by_the_seed():
    rows = make_rows(40, 3, ("fruit", "tool", "animal"))
    task, examples = resolved(rows, shots=7)
    labels = ("animal", "fruit", "tool")
    assert task.shown == draw_shots(examples, labels, 7, 0) != draw_shots(examples, labels, 7, 1)
    assert (
        sorted(shot[-1] for shot in task.shown[:3])
        == sorted(shot[-1] for shot in task.shown[3:6])
        == list(labels)
    )
    assert len(set(task.shown)) == 7
    with pytest.raises(UserError, match="there are 40 training rows"):
        draw_shots(examples, labels, 41, 0)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{txt} is {label}", "no place {txt}"),
        ("{text} is {label!r}", "no place"),
        ("{text:>9} is {label}", "no place"),
        ("it is {label}", "has no {text}"),
        ("{text}", "no place for the answer"),
        ("{text} {label} [MASK]", "2 places for the answer"),
        ("{text} { {label}", "a brace that is meant is written twice"),
    ],
)
def test_templates_that_are_refused(template, said):
    with pytest.raises(UserError) as caught:
        Prompting(template=template)
    assert said in str(caught.value)


def test_braces_and_masks_in_templates():
    template = read_template("{{{text}}}: [MASK].")
    assert template.fill({"text": "a {b}"}, "c") == "{a {b}}: c."


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"fruit": "plum"}, "lacks a word for 1 of the 2 labels ('tool')"),
        ({"fruit": "plum", "tol": "saw"}, "Did you mean 'tool'?"),
        ({"fruit": "plum", "tool": "plum"}, "have one word"),
        ({"fruit": "plum", "tool": True}, "words only in quotes"),
        ({"fruit": "plum", "tool": " "}, "must be a text"),
    ],
)
def test_words_that_are_refused(words, said):
    with pytest.raises(UserError) as caught:
        resolved(make_rows(8), words=words)
    assert said in str(caught.value)


def test_words_that_a_model_does_not_know(backbones):
    task, examples = resolved(make_rows(8), words={"fruit": "plum", "tool": "xylophone"})
    with pytest.raises(UserError, match="'xylophone' of label 'tool' is not in the model's vocabulary"):
        task.dataset(examples, backbones["causal"], 64)
    task, examples = resolved(make_rows(8), template="{label} is {text}", words=ONE)
    with pytest.raises(UserError, match="reads from left to right"):
        task.dataset(examples, backbones["causal"], 64)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shown": [["a plum"]]}, r"must be [text, label]"),
        ({"shown": [["a plum", "vegetable"]]}, "which the training rows do not have"),
        ({"shown": [["a plum", "fruit"]], "shots": 2}, "leave shots out"),
        ({"template": "{text} and {text_pair}: {label}"}, "the rows have one text each"),
    ],
)
def test_examples_that_are_refused(options, said):
    with pytest.raises(UserError) as caught:
        resolved(make_rows(8), **options)
    assert said in str(caught.value)


def test_pairs_need_both_places():
    rows = [{**row, "text_pair": "the saw"} for row in make_rows(8)]
    assert "{text_pair}" in resolved(rows)[0].template
    with pytest.raises(UserError, match=r"has no \{text_pair\}"):
        resolved(rows, template=TEMPLATE)


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.slow
def test_a_run_trains_nothing_and_can_be_used(folders, tmp_path, command, kind):
    rows = make_rows(40, 3)
    train, test = write_csv(tmp_path / "train.csv", rows[:24]), write_csv(tmp_path / "test.csv", rows[24:])
    out, task = tmp_path / "run", f"prompting(template={TEMPLATE!r}, words={ONE!r}, shots=2)"
    words = ["--model", folders[kind], "--task", task, "--train", train, "train.precision=fp32"]
    done = command("tune", *words, "--test", test, "--out", out)
    assert done.status == 0, done.err
    shown = done.out.partition("A row as the model reads it")[2].partition("Evaluation")[0]
    assert shown.count("is a") == 3 and "'plum', 'saw'" in shown and "trains nothing" not in done.err
    result = json.loads((out / "result.json").read_text())
    assert result["trained_parameters"] == result["steps"] == 0 and result["method"] == "none"
    assert {"accuracy", "macro_f1", "loss", "per_class", "accuracy_interval"} <= set(result["metrics"])
    assert [path.name for path in (out / "graft").glob("*.safetensors")] == ["confidence.safetensors"]
    assert not list((out / "checkpoints").glob("step*"))
    found = json.loads(command("evaluate", out, "--data", test, "--json").out)["metrics"]
    assert found == result["metrics"]
    answers = json.loads(command("predict", out, "the old plum", "--json").out)["predictions"]
    assert answers[0]["label"] in LABELS and answers[0]["text"] == "the old plum"
    assert command("predict", out, "--data", test).out.count("\n") == 16
    planned = command("plan", *words)
    assert planned.status == 0 and "0 of" in planned.out
    refused = command("export", out, "--to", tmp_path / "plain")
    assert refused.status == 1 and "nothing to export" in refused.err
    card = (out / "README.md").read_text()
    assert card.splitlines()[0].endswith(" with the unmodified model") and "graftkit export" not in card
    again = command("tune", "--resume", out)
    assert again.status == 0 and "already finished" in again.out
    (out / "result.json").unlink()
    assert command("tune", "--resume", out, "--json").status == 0
    assert json.loads((out / "result.json").read_text())["metrics"] == result["metrics"]


def test_a_run_remembers_its_examples(folders, tmp_path):
    """They are in the graft, so that the training rows are needed no more."""
    train = write_csv(tmp_path / "train.csv", make_rows(24, 3))
    task = {"prompting": {"template": TEMPLATE, "words": ONE, "shots": 4}}
    run = graftkit.tune(
        {
            "task": task,
            "model": str(folders["causal"]),
            "data": {"train": str(train)},
            "out": str(tmp_path / "run"),
            "seed": 3,
        }
    )
    before = run.predict(["the old plum"])
    train.unlink()
    assert run.predict(["the old plum"]) == before
    assert len(json.loads((run.path / "graft" / "graft.json").read_text())["task"].split("fruit")) > 2


def test_an_encoder_with_a_decoder_is_refused(backbones, monkeypatch):
    task, examples = resolved(make_rows(8), words=ONE)
    monkeypatch.setattr(backbones["masked"].model.config, "is_encoder_decoder", True)
    with pytest.raises(UserError, match="has an encoder and a decoder"):
        task.dataset(examples, backbones["masked"], 64)


def test_a_method_is_refused():
    with pytest.raises(UserError, match="trains nothing; leave the method out"):
        recipes.make({"model": "m", "task": "prompting()", "method": "lora()", "data": {"train": "t.csv"}})


def test_models_that_cannot_be_asked(tiny_bert, rows_folder, tmp_path):
    """A bare encoder has no trained head that could fill in a mask."""
    recipe = recipes.make({
        "model": str(tiny_bert), "task": "prompting()", "data": {"train": str(rows_folder / "train.csv")},
        "out": str(tmp_path / "run"),
    })  # fmt: skip
    with pytest.raises(UserError, match="contain no trained head"):
        plan(recipe, Console(quiet=True))
    assert not (tmp_path / "run").exists()
