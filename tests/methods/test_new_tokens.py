"""New tokens against models that were really enlarged, in runs, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import language_models
import pytest
import tiny
import torch
from conftest import equal_bits, forked, graft_tensors, tune_words, write_csv
from torch import Tensor, nn
from transformers import AutoTokenizer

import graftkit
from graftkit import Backbone, NotFoldable, UserError, attach, detach, load
from graftkit.backbone.fit import token_rows
from graftkit.data.chat import TEMPLATES
from graftkit.engine.checkpoint import load_parameters
from graftkit.tasks.generate.text import Writing, write
from graftkit.tasks.shared.scores import token_scores

V = tiny.VOCABULARY
NEW = "new_tokens(['<order>', '<card>'], first_id={})"


def shaken(model: nn.Module, method: str, scale: float = 0.3) -> graftkit.Graft:
    graft = attach(model, method)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return graft


def enlarged(graft: graftkit.Graft, plain: Any, first: int) -> Any:
    """The plain model with rows for two more tokens, as transformers makes it, and the graft's values there."""
    with torch.no_grad():
        plain.resize_token_embeddings(max(first + 2, token_rows(plain) or 0), mean_resizing=False)
        rows = list(graft.parameters.values())
        plain.get_input_embeddings().weight[first : first + 2] = rows[0]
        if plain.get_output_embeddings() is not None:
            plain.get_output_embeddings().weight[first : first + 2] = rows[-1]
    return plain.eval()


def batch_with(*ids: int, size: int = V) -> dict[str, Tensor]:
    given = tiny.batch()
    given["input_ids"][:, 1], given["input_ids"][0, 3:5] = ids[0], torch.tensor(ids)
    assert int(given["input_ids"].max()) < size + 2
    return given


@pytest.mark.parametrize(
    "first", [V, V - 1, V - 6]
)  # behind the table, across its end, in rows that no token has
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifier_gives_what_an_enlarged_one_does(kind, first):
    plain = tiny.with_head(kind)
    graft = shaken(copy.deepcopy(plain), NEW.format(first))
    given = batch_with(first, first + 1)
    wanted = tiny.outputs(enlarged(graft, plain, first), given)
    assert tiny.relative(tiny.outputs(graft.model, given), wanted) < 1e-6


def lm(kind: str, **changes: Any) -> Any:
    return tiny.causal(kind, **changes) if kind in tiny.CAUSAL else language_models.model(kind, **changes)


LANGUAGE = [
    ("gpt2", {}, 1), ("llama", {"tie_word_embeddings": True}, 1), ("llama", {"tie_word_embeddings": False}, 2),
    ("gemma2", {}, 1), ("t5", {"tie_word_embeddings": True}, 1), ("opt", {}, 1),
]  # fmt: skip


@pytest.mark.parametrize("at_end", [0, -1])
@pytest.mark.parametrize("kind,changes,tables", LANGUAGE)
@pytest.mark.sampled(2)
def test_a_language_model_gives_what_an_enlarged_one_does(kind, changes, tables, at_end):
    """Logits, the model's own loss, the scores of generate(), and texts written with the cache."""
    plain = lm(kind, **changes)
    first = (token_rows(plain) or 0) + at_end
    size = token_rows(plain)
    graft = shaken(copy.deepcopy(plain), NEW.format(first))
    assert len(graft.parameters) == tables
    assert token_rows(graft.model) == first + 2 and token_rows(plain) == size
    reference = enlarged(graft, plain, first)
    given = batch_with(first, first + 1, size=first + 2)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    with torch.no_grad():
        got, wanted = (m(**given, labels=labels) for m in (graft.model, reference))
    assert got.logits.shape[-1] == first + 2
    assert tiny.relative(got.logits, wanted.logits) < 1e-6
    assert float(got.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
    assert graft.model.config.vocab_size == size
    rows, places = (labels[:, 1:] >= 0).nonzero(as_tuple=True)
    if graft.model.config.is_encoder_decoder:
        given["decoder_input_ids"] = labels.clamp(0)
    targets = labels[:, 1:][rows, places]
    scores = [
        token_scores(m, given, rows, places, targets, chunk) for m in (graft.model, reference) for chunk in (1 << 24, 200)
    ]  # fmt: skip
    assert all(torch.allclose(some, scores[2], rtol=1e-4, atol=1e-5) for some in scores)
    ids = [m.generate(given["input_ids"][:1], max_new_tokens=9, do_sample=False, pad_token_id=0)
           for m in (graft.model, reference)]  # fmt: skip
    assert torch.equal(*ids)


def test_new_tokens_are_written():
    """A row that the output layer likes best is what is written, also with a cache, and what is read afterwards."""
    tokenizer = language_models.tokenizer()
    model = language_models.model("llama", vocab_size=len(tokenizer))
    graft = attach(Backbone(model, tokenizer), "new_tokens(['<order>'])")
    assert len(tokenizer) == token_rows(copy.deepcopy(model)) - 1 == len(graft.backbone.processor) - 1
    with torch.no_grad():
        (_, rows) = graft.parameters.values()
        hidden = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
        rows.copy_(100 * hidden)
    how = Writing(2, 0.0, 1.0, 0, 0, (), ())
    prompt = torch.tensor([5, 6, 7]).numpy()
    (text,) = write(model, graft.backbone.processor, [prompt], how, torch.device("cpu"), False)
    assert text.startswith("<order>")


def test_large_vocabularies_are_scored_in_parts_with_the_same_gradients():
    graft = shaken(tiny.causal("llama"), NEW.format(V))
    given = batch_with(V, V + 1)
    rows, places = torch.tensor([0, 0, 1]), torch.tensor([2, 3, 1])
    found = []
    for chunk in (1 << 24, 50):
        graft.model.zero_grad()
        token_scores(graft.model, given, rows, places, torch.tensor([V, V + 1, 3]), chunk)[
            :, 0
        ].sum().backward()
        found.append([p.grad.clone() for p in graft.parameters.values()])
    assert all(torch.allclose(a, b, atol=1e-6) and bool(a.any()) for a, b in zip(*found))


def test_rows_start_as_the_mean_of_the_old_ones():
    model = tiny.causal("llama")
    table, output = attach(model, NEW.format(V)).parameters.values()
    for rows, old in ((table, model.get_input_embeddings()), (output, model.get_output_embeddings())):
        assert torch.allclose(rows, old.weight.mean(0).expand(2, -1), atol=1e-6)
    inside = attach(tiny.bare("bert"), NEW.format(30))
    (rows,) = inside.parameters.values()
    assert torch.allclose(rows[1], inside.model.get_input_embeddings().weight[:30].mean(0), atol=1e-6)


def test_updates_of_the_embedding_leave_the_new_rows_alone():
    graft = shaken(tiny.bare("bert"), f"lora(rank=2, sites='embeddings') + {NEW.format(V)}")
    (rows,) = (p for name, p in graft.parameters.items() if "new_tokens" in name)
    found = graft.model.get_input_embeddings()(torch.tensor([[V, 5, V + 1]]))
    assert torch.equal(found[0, [0, 2]], rows)
    plain = tiny.bare("bert").get_input_embeddings().weight[5]
    assert not torch.allclose(found[0, 1], plain)
    graft = shaken(tiny.causal("llama"), f"lora(rank=2, sites='lm_head') + {NEW.format(V)}")
    (rows,) = (p for name, p in graft.parameters.items() if "lm_head.new_tokens" in name)
    x = torch.randn(3, tiny.WIDTH)
    logits = graft.model.lm_head(x)
    assert torch.allclose(logits[:, V:], x @ rows.T, atol=1e-5)
    assert not torch.allclose(logits[:, :V], tiny.causal("llama").lm_head(x))


def test_embeddings_that_a_caller_gives_are_left_alone():
    graft = shaken(tiny.bare("bert"), NEW.format(V - 2))
    given = {"inputs_embeds": torch.randn(2, 5, tiny.WIDTH), "attention_mask": torch.ones(2, 5)}
    assert torch.equal(tiny.outputs(graft.model, given), tiny.outputs(tiny.bare("bert"), given))


# the tokenizer


def pair() -> tuple[Any, Any]:
    tokenizer = language_models.tokenizer()
    return language_models.model("gpt2", vocab_size=len(tokenizer)), tokenizer


def test_the_tokenizer_is_a_copy_until_the_graft_is_detached(tmp_path):
    model, tokenizer = pair()
    size = len(tokenizer)
    backbone = Backbone(model, tokenizer)
    with pytest.raises(UserError):
        attach(backbone, "new_tokens(['<order>']) + lora(sites='nowhere')")
    assert backbone.processor is tokenizer and len(tokenizer) == size
    graft = attach(backbone, "new_tokens(['<order>', '<card>']) + lora(rank=2)")
    assert len(tokenizer) == size
    assert graft.backbone.processor("<order>")["input_ids"] == [size]
    assert f"first_id={size}" in str(graft.method)
    with pytest.raises(UserError, match="already has '<card>'"):
        attach(backbone, "new_tokens(['<card>'])", name="again")
    graft.save(tmp_path / "graft")
    second = attach(backbone, "lora(rank=3)", name="second")
    detach(graft)
    assert backbone.processor is tokenizer
    detach(second)
    assert backbone.processor is tokenizer

    again = load(backbone, tmp_path / "graft")
    assert again.backbone.processor.convert_tokens_to_ids("<card>") == size + 1
    with pytest.raises(UserError, match="only one of them can be active"):
        load(backbone, tmp_path / "graft", name="twin")
    again.disable()
    twin = load(backbone, tmp_path / "graft", name="twin")  # the same tokens with the same ids
    assert twin.backbone.processor.convert_tokens_to_ids("<card>") == size + 1


def test_a_tokenizer_that_has_grown_is_refused(tmp_path):
    model, tokenizer = pair()
    attach(Backbone(model, tokenizer), "new_tokens(['<order>'])").save(tmp_path / "graft")
    described = json.loads((tmp_path / "graft" / "graft.json").read_text())
    assert described["method"] == f"new_tokens(tokens=['<order>'], first_id={len(tokenizer)})"
    model, _ = pair()
    tokenizer.add_tokens(["<other>"])
    backbone = Backbone(model, tokenizer)
    with pytest.raises(UserError, match=r"ids starting at \d+, but .* start at \d+: tokens were added"):
        load(backbone, tmp_path / "graft")
    assert backbone.processor is tokenizer and "<order>" not in tokenizer.get_vocab()


def test_a_checkpoint_of_other_ids_is_refused():
    """A run that is resumed has the ids of its tokenizer; those of the checkpoint stand in the names."""
    states = [attach(tiny.bare("bert"), NEW.format(first)).state for first in (V, V - 1)]
    with pytest.raises(UserError, match="different parameters"):
        load_parameters(states[0], states[1], Path("step-00000001.safetensors"))


def test_a_prompt_does_not_start_from_rows_that_are_still_to_be_trained():
    with pytest.raises(UserError, match="'<order>'"):
        attach(Backbone(*pair()), "new_tokens(['<order>']) + prompt(init='text', init_text='<order> grass')")


def test_rows_of_one_batch_cannot_have_other_tokens():
    model = tiny.bare("bert")
    attach(model, NEW.format(V)).disable()
    attach(model, "lora(rank=2)", name="other")
    with (
        pytest.raises(UserError, match="the same rows for a whole batch"),
        graftkit.using(model, rows=["default", "other"]),
    ):
        pass


def test_special_tokens_are_left_out_of_texts():
    model, tokenizer = pair()
    for special, text in ((False, "<order> green"), (True, " green")):
        graft = attach(Backbone(model, tokenizer), f"new_tokens(['<order>'], special={special})")
        ids = graft.backbone.processor("<order> green")["input_ids"]
        assert graft.backbone.processor.decode(ids, skip_special_tokens=True) == text
        detach(graft)


# runs


TOKENS = "new_tokens(['<order>', '<card>'], lr=0.05) + lora(rank=2) + head()"


@pytest.fixture(scope="module")
def support(tmp_path_factory) -> Path:
    """Rows that only the new tokens tell apart: the tokenizer knows neither."""
    path = tmp_path_factory.mktemp("rows")
    rows = [
        {"text": f"the {'old ' * (i % 3)}{'<order>' if i % 2 else '<card>'} is here", "label": "ab"[i % 2]} for i in range(48)
    ]  # fmt: skip
    write_csv(path / "train.csv", rows)
    write_csv(path / "eval.csv", rows[:12])
    return path


@pytest.mark.slow
def test_a_run_from_the_command_line(tiny_bert, support, tmp_path, command):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    assert tokenizer.tokenize("<order>") != ["<order>"] and len(set(tokenizer.tokenize("<order><card>"))) == 1
    ran = command(*tune_words(tiny_bert, support, tmp_path / "run", "train.epochs=7", method=TOKENS))
    assert ran.status == 0, ran.err
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())
    assert metrics["metrics"]["accuracy"] == 1.0
    assert not (tmp_path / "run" / "graft" / "adapter_config.json").exists()  # PEFT has no form for the whole
    for word, label in (("<order>", "b"), ("<card>", "a")):
        said = command("predict", tmp_path / "run", f"my {word} was old", "--json")
        assert said.status == 0 and f'"{label}"' in said.out, (said.out, said.err)
    refused = command("export", tmp_path / "run", "--to", tmp_path / "plain")
    assert refused.status != 0 and "resize_token_embeddings" in refused.err
    further = command(*tune_words(
        tiny_bert, support, tmp_path / "further", "train.steps=1", f"train.from={tmp_path / 'run'}", method=TOKENS
    ))  # fmt: skip
    assert further.status == 0, further.err


@pytest.mark.slow
def test_killed_and_resumed(tiny_bert, support, tmp_path):
    words = tune_words(
        tiny_bert, support, tmp_path / "killed", "train.steps=4", "train.checkpoint_every=1", method=TOKENS
    )
    whole = tune_words(
        tiny_bert, support, tmp_path / "whole", "train.steps=4", "train.checkpoint_every=1", method=TOKENS
    )

    def dying() -> None:
        from graftkit.cli.main import main

        plain = os.replace

        def replace(source: Any, target: Any) -> None:
            plain(source, target)
            if "step-00000002" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        main(words)

    def running() -> None:
        from graftkit.cli.main import main

        main(whole)

    assert forked(running).status == 0
    assert forked(dying).status == -signal.SIGKILL
    from graftkit.runs.tune import resume

    resume(tmp_path / "killed")
    assert equal_bits(graft_tensors(tmp_path / "killed"), graft_tensors(tmp_path / "whole"))


@pytest.mark.slow
def test_a_language_model_learns_to_write_them(tmp_path):
    folder = language_models.folder(tmp_path / "llama", "llama", TEMPLATES["chatml"])
    rows = [
        {"prompt": f"what is {thing}?", "completion": mark}
        for thing, mark in (("grass", "<plant>"), ("coal", "<stone>")) * 12
    ]
    run = graftkit.tune(
        model=str(folder), task="generate(max_new_tokens=3)", train=rows, eval=None, out=tmp_path / "run",
        method="new_tokens(['<plant>', '<stone>']) + lora(rank=4)",
        settings={"train.precision": "fp32", "train.lr": 0.02, "train.epochs": 12.0, "train.batch_size": 8},
    )  # fmt: skip
    answers = run.predict(["what is grass?", "what is coal?"])
    assert [answer["completion"] for answer in answers] == ["<plant>", "<stone>"]


# what is refused


class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(9, 4)


@pytest.mark.parametrize(
    "make,method,said",
    [
        (lambda: tiny.bare("bert"), "new_tokens(['<a>'])", "has none: pass graftkit.Backbone"),
        (lambda: tiny.bare("bert"), "new_tokens(['<a>'], first_id=41)", "rows for only 40 tokens"),
        (lambda: tiny.bare("bert"), "new_tokens([])", "one or more non-empty strings"),
        (lambda: tiny.bare("bert"), "new_tokens(['<a>', ' '])", "not ' '"),
        (lambda: tiny.bare("bert"), "new_tokens(['<a>', 3])", "not 3"),
        (lambda: tiny.bare("bert"), "new_tokens(['<a>', '<a>'])", "'<a>' is listed twice"),
        (TwoTables, "new_tokens(['<a>'], first_id=9)", "words, places of TwoTables could each be the one"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "new_tokens(['<a>'], first_id=9)", "reads no tokens; use"),
        (lambda: language_models.model("bart"), "new_tokens(['<a>'], first_id=300)", "final_logits_bias"),
        (lambda: Backbone(*pair()), "new_tokens(['<s>', '<a>'])", "already has '<s>'"),
    ],
)
def test_refusals(make, method, said):
    with pytest.raises(UserError, match=re.escape(said)):
        attach(make(), method)


def test_it_is_not_folded():
    with pytest.raises(NotFoldable, match=r"model\.resize_token_embeddings"):
        shaken(tiny.bare("bert"), NEW.format(V)).fold()
