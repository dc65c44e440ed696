"""Span corruption: masks and rows against a naive reference and the invariants of the T5 paper, the loss, and a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from objectives import examples, random_documents, texts_of, write_texts
from torch.nn.functional import cross_entropy

from graftkit import UserError
from graftkit.backbone import Backbone
from graftkit.data.source import Pass
from graftkit.engine.forward import Forward
from graftkit.grafts.attach import attach
from graftkit.tasks.objectives.base import TARGETS, TOKENS
from graftkit.tasks.objectives.span_corruption import (
    SpanCorruption,
    SpanRows,
    corrupted,
    noise_counts,
    noise_mask,
)

VOCABULARY, END, PAD = 60, 1, 0
SENTINELS = {f"<extra_id_{i}>": VOCABULARY + i for i in range(20)}


def tokenizer(sentinels: int = 20):
    known = {name: number for name, number in list(SENTINELS.items())[:sentinels]}
    words = {f"w{i}": i for i in range(VOCABULARY)}
    return SimpleNamespace(get_vocab=lambda: words | known, eos_token_id=END, decode=str)


def rows_of(documents, max_length=32, **more) -> SpanRows:
    return SpanRows(examples(), texts_of(documents), tokenizer(), max_length, PAD, **more)


@pytest.fixture(scope="module")
def documents():
    return random_documents(200, VOCABULARY)


def plain(ids, mask):
    """Inputs and targets token by token."""
    inputs, targets, spans, before = [], [], 0, False
    for token, noise in zip(ids, mask):
        if noise and not before:
            inputs.append(VOCABULARY + spans)
            targets.append(VOCABULARY + spans)
            spans += 1
        (targets if noise else inputs).append(int(token))
        before = noise
    return [*inputs, END], [*targets, END]


@pytest.mark.parametrize(("length", "share", "mean"), [(512, 0.15, 3.0), (40, 0.5, 1.0), (9, 0.9, 1.0), (2, 0.15, 3.0)])  # fmt: skip
def test_a_mask_has_the_papers_numbers_of_tokens_and_spans(length, share, mean):
    noise, spans = noise_counts(length, share, mean)
    assert noise == min(max(1, round(share * length)), length - 1)
    if share < 0.8:
        assert spans == max(1, round(noise / mean))
    random = np.random.default_rng(0)
    for _ in range(20):
        mask = noise_mask(random, length, share, mean)
        assert len(mask) == length and mask.sum() == noise
        assert (np.diff(mask.astype(int)) == 1).sum() == spans and not mask[0] and mask[-1]
        ids = random.integers(5, VOCABULARY, length)
        found = corrupted(ids, mask, np.array(list(SENTINELS.values()) * 5), END)
        if spans <= len(SENTINELS):
            assert tuple(part.tolist() for part in found) == plain(ids, mask)


def test_all_masks_with_these_counts_are_equally_likely():
    """5 tokens kept and 4 left out in 2 spans: C(4, 1) * C(3, 1) = 12 masks."""
    random = np.random.default_rng(0)
    seen: dict[bytes, int] = {}
    for _ in range(6000):
        key = noise_mask(random, 9, 0.45, 2.0).tobytes()
        seen[key] = seen.get(key, 0) + 1
    counts = np.array(list(seen.values()))
    assert len(counts) == 12
    assert ((counts - 500) ** 2 / 500).sum() < 31.3  # chi square with 11 degrees of freedom, p = 0.001


def test_inputs_and_targets_give_the_text_back(documents):
    rows = rows_of(documents)
    batch = rows.inputs(np.arange(len(rows)), Pass(1, 2))
    stream = np.concatenate([document[0] for document in documents])
    assert batch["input_ids"].shape[1] <= 32 < rows._sizes(rows.body + 1)[0]
    targets = batch[TARGETS].view(len(rows), -1)
    assert (batch["decoder_input_ids"][:, 0] == PAD).all()
    assert torch.equal(batch["decoder_input_ids"][:, 1:], targets[:, :-1])
    assert rows.count(np.arange(len(rows)), Pass()) == {TOKENS: float(targets.numel())}
    found = []
    for ids, written in zip(batch["input_ids"].tolist(), targets.tolist()):
        assert ids[-1] == written[-1] == END
        spans: dict[int, list[int]] = {}
        for token in written[:-1]:
            if token >= VOCABULARY:
                span = spans[token] = []
            else:
                span.append(token)
        assert list(spans) == [VOCABULARY + i for i in range(rows.spans)]
        assert sum(map(len, spans.values())) == rows.noise == round(0.15 * rows.body)
        for token in ids[:-1]:
            found += spans[token] if token >= VOCABULARY else [token]
    assert found == stream[: len(found)].tolist() and len(stream) - len(found) == rows.dropped < rows.body


def test_masks_are_functions_of_seed_epoch_and_row(documents):
    rows, again = rows_of(documents), rows_of(documents)
    few = np.array([3, 0, 5])
    batch = rows.inputs(few, Pass(1, 1))
    rows.inputs(few[::-1], Pass(1, 2))
    for name, tensor in again.inputs(few, Pass(1, 1)).items():
        assert torch.equal(tensor, batch[name])
    assert torch.equal(again.inputs(few[1:2], Pass(1, 1))["input_ids"][0], batch["input_ids"][1])
    for at in (Pass(1, 2), Pass(2, 1)):
        assert not torch.equal(again.inputs(few, at)["input_ids"], batch["input_ids"])


def t5():
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY + 20, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=PAD,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def test_the_loss_is_that_of_transformers(documents):
    model = t5()
    task, rows = SpanCorruption(), rows_of(documents)
    forward = Forward(attach(Backbone(model, tokenizer()), "full()"), torch.device("cpu"), "fp32")
    batch = rows.batch(np.array([2, 7]), at=Pass(5, 1))
    term = task.learner(rows, (), 0.0)(forward, batch)[TOKENS]
    labels = batch.inputs[TARGETS].view(2, -1)
    with torch.no_grad():
        logits = model(input_ids=batch.inputs["input_ids"], labels=labels).logits
    wanted = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    assert term.losses.item() == pytest.approx(wanted.sum().item(), rel=1e-5)
    assert term.correct.item() == (logits.argmax(-1) == labels).sum().item()
    assert term.each().tolist() == pytest.approx(wanted.view(2, -1).sum(1).tolist(), rel=1e-5)


def test_evaluation_has_the_papers_share_and_bits_count_sentinels(documents):
    backbone = Backbone(t5(), tokenizer())
    task = SpanCorruption(share=0.4, mean_span=2.0)
    texts = texts_of(documents)
    training, held = (task.rows(examples(), texts, backbone, 32, training) for training in (True, False))
    assert held.noise == round(0.15 * held.body) and training.noise == round(0.4 * training.body)
    # a mean of 1 bit per target is (noise + spans + 1) / noise bits for each token that was left out
    per_token = held.bits_per_byte(np.log(2)) * texts.bytes / texts.lengths.sum()
    assert per_token == pytest.approx((held.noise + held.spans + 1) / held.noise, rel=1e-3)


def test_what_does_not_fit_is_refused(documents, tiny_bert):
    import transformers

    backbone, texts = Backbone(t5(), tokenizer()), texts_of(documents)
    with pytest.raises(
        UserError, match=r"data.max_length is 2, but span_corruption\(\) needs at least 3 tokens"
    ):
        SpanCorruption().rows(examples(), texts, backbone, 2, True)
    with pytest.raises(UserError, match=r"a row has 2. spans, but the tokenizer of .* has 20 sentinels"):
        SpanCorruption().rows(examples(), texts, backbone, 512, True)
    with pytest.raises(UserError, match="has a single token"):
        SpanCorruption().rows(examples(), texts_of([[[7]]]), backbone, 32, True)
    with pytest.raises(UserError, match="needs a tokenizer with an end token and the sentinels <extra_id_0>"):
        SpanCorruption().refuse(tokenizer(0), backbone)
    bert = transformers.AutoModelForMaskedLM.from_pretrained(tiny_bert)
    with pytest.raises(UserError, match=r"an encoder with a decoder, but .* is a BertForMaskedLM.*t5-mini"):
        SpanCorruption().refuse(tokenizer(), Backbone(bert, tokenizer()))
    with pytest.raises(UserError, match="must be"):
        SpanCorruption(share=1.0)


@pytest.mark.slow
def test_a_run_learns_and_gives_a_plain_t5(tmp_path: Path, monkeypatch) -> None:
    import transformers

    import graftkit

    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    corpus = write_texts(tmp_path / "corpus.txt", 300)
    run = graftkit.pretrain(
        objective="t5", train=str(corpus), size="t5-tiny", vocabulary=260, out=tmp_path / "run",
        settings={"train.steps": 30, "train.batch_size": 8, "train.precision": "fp32", "data.max_length": 32},
    )  # fmt: skip
    metrics = run.result["metrics"]
    assert metrics["loss"] < 4.2 < np.log(260) and metrics["token_accuracy"] > 0.1
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(run.result["model"])
    made = transformers.AutoTokenizer.from_pretrained(run.result["model"])
    assert model.config.decoder_start_token_id == made.pad_token_id == 0 and made.eos_token_id == 1
    assert made("Ka ra")["input_ids"][-1] == 1 and made.convert_tokens_to_ids("<extra_id_99>") < len(made)
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion\n" + "kara lone,mishi\nsupo tewu,kada\n" * 4)
    tuned = graftkit.tune(
        model=run.result["model"], task="generate", train=str(table), eval=None, out=tmp_path / "tuned", method="full()",
        settings={"train.steps": 2, "train.batch_size": 2},
    )  # fmt: skip
    assert tuned.result["steps"] == 2
