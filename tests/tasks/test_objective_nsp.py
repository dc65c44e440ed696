"""BERT's pairs: their properties, and their truncation against the loop of the paper's code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from objectives import examples, fake_tokenizer, texts_of

from graftkit.data.source import Pass
from graftkit.errors import UserError
from graftkit.tasks.objectives.base import PLACES, ROWS, TARGETS
from graftkit.tasks.objectives.mlm_nsp import ORDER, MlmNsp, PairRows
from graftkit.tasks.objectives.pairs import Sentences, draw_pairs, truncated

VOCABULARY, LENGTH = 60, 27  # 24 tokens in both segments
MOST = LENGTH - 3


def documents_of(count: int, seed: int = 0, sentences: int = 12, longest: int = 10) -> list[list[list[int]]]:
    random = np.random.default_rng(seed)
    return [
        [
            random.integers(5, VOCABULARY, random.integers(1, longest)).tolist()
            for _ in range(random.integers(1, sentences))
        ]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def documents():
    return documents_of(300)


@pytest.fixture(scope="module")
def drawn(documents):
    sentences = Sentences(texts_of(documents))
    return sentences, draw_pairs(sentences, MOST, Pass(3, 0))


def document_of(sentences: Sentences, sentence: np.ndarray) -> np.ndarray:
    return np.searchsorted(sentences.begins, sentence, side="right") - 1


def test_the_second_segment_follows_or_is_from_another_document(drawn):
    sentences, pairs = drawn
    a, b = document_of(sentences, pairs.a[:, 0]), document_of(sentences, pairs.b[:, 0])
    assert (b[~pairs.random] == a[~pairs.random]).all()
    assert (pairs.b[~pairs.random, 0] == pairs.a[~pairs.random, 1]).all()
    assert (b[pairs.random] != a[pairs.random]).all()
    for part, where in ((pairs.a, a), (pairs.b, b)):
        assert (part[:, 1] > part[:, 0]).all() and (document_of(sentences, part[:, 1] - 1) == where).all()
    sizes = np.concatenate([[0], np.cumsum(sentences.sizes)])
    assert (pairs.sizes == sum(sizes[part[:, 1]] - sizes[part[:, 0]] for part in (pairs.a, pairs.b))).all()


def test_the_sentences_of_a_document_are_used_in_turn(drawn):
    """The next pair begins behind A if B was random, so that its unused sentences go back, else behind B."""
    sentences, pairs = drawn
    where = document_of(sentences, pairs.a[:, 0])
    behind = np.where(pairs.random, pairs.a[:, 1], pairs.b[:, 1])
    for i in range(len(pairs) - 1):
        if where[i] == where[i + 1]:
            assert pairs.a[i + 1, 0] == behind[i]
        else:
            assert behind[i] == sentences.begins[where[i] + 1]
            assert pairs.a[i + 1, 0] == sentences.begins[where[i + 1]]


def test_half_of_the_pairs_that_could_follow_are_random(drawn):
    sentences, _ = drawn
    free, random = 0, 0
    for epoch in range(5):
        pairs = draw_pairs(sentences, MOST, Pass(3, epoch))
        ends = sentences.begins[document_of(sentences, pairs.a[:, 0]) + 1]
        # one sentence that reaches the target or ends the document leaves no choice
        single = (pairs.a[:, 1] - pairs.a[:, 0] == 1) & pairs.random
        alone = single & ((pairs.a[:, 1] == ends) | (sentences.sizes[pairs.a[:, 0]] >= MOST))
        free, random = free + int((~alone).sum()), random + int((pairs.random & ~alone).sum())
    # short targets make a few more lone sentences: 10% of the documents
    assert free > 1000 and 0.47 < random / free < 0.60


def test_segments_reach_the_target_unless_the_document_ends(drawn):
    sentences, pairs = drawn
    following = ~pairs.random
    ends = pairs.b[following, 1] == sentences.begins[document_of(sentences, pairs.a[following, 0]) + 1]
    reached = pairs.sizes[following] >= MOST
    assert (ends | reached).mean() > 0.8  # all but those of shorter targets
    last = sentences.sizes[pairs.b[following, 1] - 1]
    assert (pairs.sizes[following] - last < MOST).all()


@pytest.mark.parametrize("sizes", [(30, 5), (5, 30), (20, 20), (13, 12), (3, 4)])
def test_truncation_is_that_of_the_papers_code(sizes):
    a, b = np.arange(sizes[0]), 100 + np.arange(sizes[1])
    coins = iter(np.random.default_rng(9).random(max(0, sum(sizes) - MOST)) < 0.5)
    first, second = a.tolist(), b.tolist()
    while len(first) + len(second) > MOST:
        longer = first if len(first) > len(second) else second
        if next(coins):
            del longer[0]
        else:
            longer.pop()
    found = truncated(np.random.default_rng(9), a, b, MOST)
    assert [part.tolist() for part in found] == [first, second]


def rows_of(documents, training=True, **options) -> PairRows:
    return PairRows(
        examples(), texts_of(documents), fake_tokenizer(VOCABULARY), LENGTH, MlmNsp(**options), training
    )


def test_rows_are_two_segments_with_types_masks_and_order(documents):
    rows = rows_of(documents)
    chosen, at = np.arange(60), Pass(4, 1)
    batch = rows.inputs(chosen, at)
    lengths = batch["attention_mask"].sum(1)
    assert (lengths.numpy() == rows.sizes_of(chosen, at)).all() and lengths.max() <= LENGTH
    for i, row in enumerate(chosen):
        ids, begin, random = rows.text(int(row), at)
        assert ids[0] == 2 and ids[begin - 1] == 3 and ids[-1] == 3 and len(ids) == lengths[i]
        assert begin > 2 and begin < len(ids) - 1  # neither segment is empty
        assert batch["token_type_ids"][i, : len(ids)].tolist() == [0] * begin + [1] * (len(ids) - begin)
        assert int(batch[ORDER][i]) == random
        places = batch[PLACES][batch[ROWS] == i]
        assert len(places) == max(1, round(0.15 * len(ids)))
        assert (ids[places] == batch[TARGETS][batch[ROWS] == i].numpy()).all() and (ids[places] >= 5).all()
    assert rows.count(chosen, at) == {"tokens": float(len(batch[TARGETS])), "nsp": 60.0}


def test_pairs_are_functions_of_seed_and_epoch(documents):
    one, two = rows_of(documents), rows_of(documents)
    assert torch.equal(
        one.inputs(np.array([5]), Pass(1, 3))["input_ids"], two.inputs(np.array([5]), Pass(1, 3))["input_ids"]
    )
    assert not np.array_equal(one.pairs(1, 3).a, one.pairs(1, 4).a)
    for epoch in range(4):  # an epoch has about as many pairs as it has rows
        assert len(one.pairs(1, epoch)) == pytest.approx(len(one), rel=0.1)


@torch.no_grad()
def test_both_losses_are_those_of_the_plain_model(documents):
    import transformers as t

    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40,
    )  # fmt: skip
    model = t.BertForPreTraining(config).eval()
    rows, task = rows_of(documents, training=False), MlmNsp()
    batch = rows.batch(np.arange(20))
    given = batch.inputs
    labels = torch.full_like(given["input_ids"], -100)
    labels[given[ROWS], given[PLACES]] = given[TARGETS]
    expected = model(**rows.model_inputs(batch), labels=labels, next_sentence_label=given[ORDER])
    outcomes = task.outcomes(lambda b: rows.call(model, b), batch)
    units = rows.count(np.arange(20), Pass())
    sums = np.sum(outcomes, axis=0)
    assert sums[0] / units["tokens"] + sums[2] / units["nsp"] == pytest.approx(float(expected.loss), rel=1e-5)
    right = (expected.seq_relationship_logits.argmax(-1) == given[ORDER]).sum()
    assert sums[3] == int(right)


def test_documents_that_make_no_pairs_are_refused():
    with pytest.raises(UserError, match="has 1 document with text"):
        rows_of(documents_of(1, sentences=9))
    with pytest.raises(UserError, match="documents of several sentences"):
        rows_of([[[7, 8, 9]], [[10, 11]], [[12]]])
