"""Causal language modelling: packing against a plain best fit, documents kept apart, and every token a target once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from objectives import examples, fake_tokenizer, random_documents, texts_of

from graftkit.backbone import Backbone
from graftkit.data.source import Pass
from graftkit.errors import UserError
from graftkit.tasks.objectives.base import PLACES, ROWS, TARGETS
from graftkit.tasks.objectives.causal import Causal, CausalRows, packed_pieces
from graftkit.tasks.shared.scores import LABEL

VOCABULARY, LENGTH = 60, 24


def rows_of(documents, apart=True) -> CausalRows:
    return CausalRows(examples(), texts_of(documents), fake_tokenizer(VOCABULARY), LENGTH, apart)


def test_pieces_are_packed_by_best_fit_decreasing():
    random = np.random.default_rng(0)
    lengths = random.integers(0, 70, 200)
    pieces = packed_pieces(lengths, LENGTH)
    sizes = [min(LENGTH, n + 1 - start) for n in lengths for start in range(0, n + 1, LENGTH)]
    bins: list[int] = []  # the plain algorithm: the fullest row that has room, else a new one
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, used in enumerate(bins) if used + size <= LENGTH]
        if fitting:
            bins[max(fitting, key=lambda i: bins[i])] += size
        else:
            bins.append(size)
    assert sorted(pieces.targets.tolist()) == sorted(bins)
    assert sorted(pieces.sizes.tolist()) == sorted(sizes)
    assert pieces.cut == int((lengths + 1 > LENGTH).sum())


def test_every_token_and_every_end_is_a_target_once():
    documents = random_documents(80, VOCABULARY, longest=70)
    rows = rows_of(documents)
    batch = rows.inputs(np.arange(len(rows)), Pass())
    found: dict[int, list] = {}
    begin = 0
    targets = batch[TARGETS].numpy()
    for piece in range(len(rows.pieces.sizes)):
        size = int(rows.pieces.sizes[piece])
        document, start = int(rows.pieces.documents[piece]), int(rows.pieces.starts[piece])
        found.setdefault(document, []).append((start, targets[begin : begin + size]))
        begin += size
    assert begin == len(targets) == rows.predicted == sum(len(d[0]) + 1 for d in documents)
    for document, parts in found.items():
        assert np.concatenate([part for _, part in sorted(parts, key=lambda p: p[0])]).tolist() == [
            *documents[document][0],
            3,
        ]
    assert rows.count(np.arange(len(rows)), Pass()) == {"tokens": float(len(targets))}


def test_each_token_predicts_the_next_one_of_its_document():
    rows = rows_of([[[10, 11, 12]], [[20, 21]]])
    batch = rows.inputs(np.arange(1), Pass())
    assert batch["input_ids"][0].tolist()[:7] == [3, 10, 11, 12, 3, 20, 21]
    assert batch[TARGETS].tolist() == [10, 11, 12, 3, 20, 21, 3]
    assert batch[PLACES].tolist() == list(range(7)) and batch[ROWS].tolist() == [0] * 7
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2]


@pytest.fixture(scope="module")
def gpt():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ).eval()


def losses_alone(model, document: list[int]) -> torch.Tensor:
    ids = torch.tensor([[3, *document, 3]])
    logs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)[0]
    return -logs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]


@torch.no_grad()
def test_documents_in_one_row_are_predicted_as_each_alone(gpt):
    documents = [d for d in random_documents(12, VOCABULARY, longest=20) if len(d[0]) < LENGTH]
    expected = sum(float(losses_alone(gpt, d[0]).sum()) for d in documents)
    rows = rows_of(documents)
    assert len(rows) < len(documents)
    apart = -rows.call(gpt, rows.batch(np.arange(len(rows))))[:, LABEL].sum()
    assert float(apart) == pytest.approx(expected, rel=1e-5)
    together = rows_of(documents, apart=False)
    mixed = -together.call(gpt, together.batch(np.arange(len(rows))))[:, LABEL].sum()
    assert abs(float(mixed) - expected) > 1e-3


@torch.no_grad()
def test_bits_per_byte_are_those_of_the_texts(gpt):
    documents = [d for d in random_documents(10, VOCABULARY, longest=20) if len(d[0]) < LENGTH]
    rows, task = rows_of(documents), Causal()
    batch = rows.batch(np.arange(len(rows)))
    found = task.metrics(task.outcomes(lambda b: rows.call(gpt, b), batch), rows, ())
    nats = sum(float(losses_alone(gpt, d[0]).sum()) for d in documents)
    size = sum(4 * len(d[0]) for d in documents)  # bytes, as the shards say
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(nats / rows.predicted), rel=1e-5)


def test_statistics_tell_padding_and_cut_documents():
    documents = random_documents(80, VOCABULARY, longest=70)
    rows = rows_of(documents)
    found = Causal().statistics(rows, ())
    assert found["padded_share"] == pytest.approx(1 - rows.predicted / (len(rows) * LENGTH))
    assert found["cropped_share"] == 0 and found["documents_cut"] == sum(
        len(d[0]) + 1 > LENGTH for d in documents
    )


def test_models_that_read_both_ways_and_tokenizers_without_an_end_are_refused(gpt):
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(UserError, match="both directions"):
        Causal().refuse(fake_tokenizer(20), Backbone(BertLMHeadModel(config)))
    tokenizer = fake_tokenizer(20)
    tokenizer.eos_token_id = None
    with pytest.raises(UserError, match="end token"):
        Causal().refuse(tokenizer, Backbone(gpt))
