"""Masked language modelling: rows, masks against their formulas, and the head on masked tokens alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from objectives import examples, fake_tokenizer, random_documents, texts_of

from graftkit.data.source import Pass
from graftkit.errors import UserError
from graftkit.recipe.catalogue import entries
from graftkit.tasks.objectives.base import PLACES, ROWS, TARGETS
from graftkit.tasks.objectives.mlm import MaskedRows, Mlm
from graftkit.tasks.shared.bodies import scores_of_chosen

VOCABULARY, LENGTH = 60, 34  # 32 tokens between [CLS] and [SEP]


def rows_of(documents, training=True, tokens=None, **options) -> MaskedRows:
    tokenizer = fake_tokenizer(VOCABULARY, tokens)
    return MaskedRows(examples(), texts_of(documents), tokenizer, LENGTH, Mlm(**options), training)


@pytest.fixture(scope="module")
def documents():
    return random_documents(500, VOCABULARY)


def test_the_rows_are_the_documents_in_sequence_with_separators(documents):
    rows = rows_of(documents)
    whole = np.concatenate([[*document[0], 3] for document in documents])[:-1]
    found = np.concatenate([rows.text(row)[1:-1] for row in range(len(rows))])
    assert (found == whole[: len(found)]).all()
    assert len(whole) - len(found) == rows.dropped < 32
    assert all(rows.text(row)[0] == 2 and rows.text(row)[-1] == 3 for row in range(len(rows)))


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("share", [0.15, 0.4])
def test_each_row_has_the_same_number_of_masked_tokens_and_none_is_special(documents, unit, share):
    rows = rows_of(documents, share=share, unit=unit, tokens={i: f"##{i}" for i in range(30, VOCABULARY)})
    everything = np.arange(len(rows))
    batch = rows.inputs(everything, Pass(1, 2))
    counts = np.bincount(batch[ROWS].numpy(), minlength=len(rows))
    assert set(counts) == {round(share * 32)}
    assert rows.count(everything, Pass(1, 2)) == {"tokens": float(counts.sum())}
    texts = np.stack([rows.text(row) for row in everything])
    assert (texts[batch[ROWS], batch[PLACES]] == batch[TARGETS].numpy()).all()
    assert (batch[TARGETS] >= 5).all()
    changed = batch["input_ids"].numpy() != texts
    changed[batch[ROWS], batch[PLACES]] = False
    assert not changed.any()


def test_the_replacements_are_80_10_10(documents):
    rows = rows_of(documents, share=0.5)
    batches = [rows.inputs(np.arange(len(rows)), Pass(0, epoch)) for epoch in range(2)]
    kinds = torch.cat([b["input_ids"][b[ROWS], b[PLACES]] for b in batches])
    targets = torch.cat([b[TARGETS] for b in batches])
    n = len(kinds)
    assert n > 5000
    for share, expected in (
        ((kinds == 4).double().mean(), 0.8),
        ((kinds == targets).double().mean(), 0.1 + 0.1 / (VOCABULARY - 5)),
    ):
        assert abs(float(share) - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
    assert ((kinds == 4) | (kinds >= 5)).all()
    only = rows_of(documents, replace="mask").inputs(np.arange(20), Pass())
    assert (only["input_ids"][only[ROWS], only[PLACES]] == 4).all()


def test_every_position_is_masked_equally_often(documents):
    whole = [[np.random.default_rng(1).integers(5, VOCABULARY, 32 * 400).tolist()]]
    rows = rows_of(whole)
    counts = np.zeros(LENGTH)
    for epoch in range(5):
        counts += np.bincount(rows.inputs(np.arange(400), Pass(0, epoch))[PLACES].numpy(), minlength=LENGTH)
    inner = counts[1:-1]
    expected = inner.sum() / 32
    assert counts[0] == counts[-1] == 0
    assert (
        (inner - expected) ** 2 / expected
    ).sum() < 70  # chi-square with 31 degrees of freedom: p < 0.0001


def test_masks_are_functions_of_seed_epoch_and_row(documents):
    rows = rows_of(documents)
    chosen = np.array([3, 1, 7])
    one, again = rows.inputs(chosen, Pass(5, 1)), rows.inputs(chosen[::-1].copy(), Pass(5, 1))
    assert torch.equal(one["input_ids"], again["input_ids"].flip(0))
    for other in (Pass(5, 2), Pass(6, 1)):
        assert not torch.equal(one["input_ids"], rows.inputs(chosen, other)["input_ids"])


def test_a_schedule_falls_over_the_run_and_is_not_for_evaluation(documents):
    training, evaluated = rows_of(documents, share="0.3->0.15"), rows_of(documents, False, share="0.3->0.15")
    counts = [training.masked(Pass(0, 0, progress)) for progress in (0.0, 0.5, 1.0)]
    assert counts == [round(0.3 * 32), round(0.225 * 32), round(0.15 * 32)]
    assert {evaluated.masked(Pass(0, 0, progress)) for progress in (0.0, 1.0)} == {round(0.15 * 32)}
    constant = rows_of(documents, False)
    assert torch.equal(
        constant.inputs(np.arange(5), Pass())["input_ids"],
        evaluated.inputs(np.arange(5), Pass())["input_ids"],
    )


def test_words_are_masked_whole_but_for_one(documents):
    rows = rows_of(documents, unit="word", share=0.3, tokens={i: f"##{i}" for i in range(30, VOCABULARY)})
    broken = 0
    for row in range(100):
        batch = rows.inputs(np.array([row]), Pass())
        ids, masked = rows.text(row), np.zeros(LENGTH, dtype=bool)
        masked[batch[PLACES]] = True
        word = np.cumsum((ids < 30) | (ids < 5))
        parts = [masked[(word == w) & (ids >= 5)] for w in np.unique(word)]
        broken += sum(part.any() and not part.all() for part in parts)
        assert sum(bool(part.any() and not part.all()) for part in parts) <= 1
    assert broken < 50


def test_spans_are_long_and_replaced_alike():
    rows = rows_of(
        [[np.random.default_rng(1).integers(5, VOCABULARY, 32 * 300).tolist()]], unit="span", share=0.3
    )
    lengths, alike = [], []
    for row in range(300):
        batch = rows.inputs(np.array([row]), Pass())
        places = batch[PLACES].numpy()
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        lengths += [len(run) for run in runs]
        alike += [len({int(batch["input_ids"][0, p]) == 4 for p in run}) == 1 for run in runs if len(run) > 1]
    assert 2.5 < np.mean(lengths) < 4.5  # spans of 3.8 on average, the last one cut
    assert np.mean(alike) > 0.7  # two spans may touch


KINDS = {
    "bert": {}, "roberta": {}, "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2},
    "albert": {"embedding_size": 16}, "electra": {"embedding_size": 16}, "modernbert": {"pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_on_masked_tokens_gives_the_logits_of_the_whole_model(kind):
    import transformers as t

    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 40,
    }  # fmt: skip
    torch.manual_seed(0)
    model = t.AutoModelForMaskedLM.from_config(
        t.AutoConfig.for_model(kind, **{**sizes, **KINDS[kind]})
    ).eval()
    ids = torch.randint(5, VOCABULARY, (3, 12))
    rows, places = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, 7, 3, 0, 11])
    targets = torch.tensor([6, 9, 30, 50, 8])
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape))
    scores = scores_of_chosen(model, {"input_ids": ids}, rows, places, targets)
    handle.remove()
    expected = model(input_ids=ids).logits[rows, places].log_softmax(-1)[torch.arange(5), targets]
    assert torch.allclose(scores[:, 0], expected, atol=1e-5)
    assert seen == [(1, 2, VOCABULARY), (5, VOCABULARY)], "two rows show what becomes of logits"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "between 0 and 1"),
        ({"share": "0.3->"}, "between 0 and 1"),
        ({"share": "high"}, "between 0 and 1"),
        ({"unit": "letter"}, "must be one of"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Mlm(**options)


def test_a_tokenizer_without_a_mask_or_without_words_is_refused():
    tokenizer = fake_tokenizer(VOCABULARY)
    with pytest.raises(UserError, match="do not tell where a word begins"):
        Mlm(unit="word").refuse(tokenizer, None)
    tokenizer.mask_token_id = None
    with pytest.raises(UserError, match="mask token"):
        Mlm().refuse(tokenizer, None)


def test_the_objectives_are_tasks_named_by_their_files():
    known = entries("task")
    assert {name for name in ("mlm", "mlm_nsp", "causal")} <= set(known)
    assert "base" not in known and known["mlm"].module == "graftkit.tasks.objectives.mlm"
