"""Tagging: the same rows in every form, labels where they belong, answers put together, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conlleval import conlleval

from graftkit.backbone.load import load_backbone
from graftkit.backbone.source import find_source
from graftkit.data.columns import find_again, find_columns
from graftkit.errors import UserError
from graftkit.tasks.base import Batch, Reading
from graftkit.tasks.tag.entities import bio, chunks, names_of
from graftkit.tasks.tag.task import Tag
from graftkit.tasks.tag.words import text_of

TEXT = "Ada Lovelace met Alan Turing's cat in London, UK."
TOKENS = ["Ada", "Lovelace", "met", "Alan", "Turing", "'", "s", "cat", "in", "London", ",", "UK", "."]
TAGS = [
    "B-person",
    "I-person",
    "O",
    "B-person",
    "I-person",
    "O",
    "O",
    "O",
    "O",
    "B-place",
    "O",
    "B-place",
    "O",
]
SPANS = [(0, 12, "person"), (17, 28, "person"), (38, 44, "place"), (46, 48, "place")]


def read(rows, task=None, columns=None, **more):
    task = task or Tag()
    table = task.read(rows, Reading(columns=columns or {}), "rows")
    found = find_columns(table, task.columns, columns or {})
    labels = task.label_names(table, found, more.get("skip_bad", False))
    return labels, task.examples(table, found, labels, **{"skip_bad": False, **more})


def test_every_form_says_the_same(tmp_path):
    """CoNLL of four schemes, tokens with tags, CSV, places of characters: one and the same targets."""
    import datasets

    spans = [{"start": a, "end": b, "label": kind} for a, b, kind in SPANS]
    schemes = {
        "bio": TAGS,
        "iob1": [tag.replace("B-", "I-") for tag in TAGS],
        "bioes": [
            "B-person",
            "E-person",
            "O",
            "B-person",
            "E-person",
            "O",
            "O",
            "O",
            "O",
            "S-place",
            "O",
            "S-place",
            "O",
        ],
        "bilou": [
            "B-person",
            "L-person",
            "O",
            "B-person",
            "L-person",
            "O",
            "O",
            "O",
            "O",
            "U-place",
            "O",
            "U-place",
            "O",
        ],
    }
    forms = {"tokens": [{"tokens": TOKENS, "tags": TAGS}], "words": [{"words": TOKENS, "ner_tags": TAGS}]}
    for name, tags in schemes.items():
        path = tmp_path / f"{name}.conll"
        path.write_text("".join(f"{token}\t{tag}\n" for token, tag in zip(TOKENS, tags)))
        forms[name] = str(path)
    forms["txt"] = str((tmp_path / "bio.conll").rename(tmp_path / "bio.txt"))
    del forms["bio"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT, "entities": spans}) + "\n")
    forms["spans"] = str(tmp_path / "rows.jsonl")
    forms["triples"] = [{"text": TEXT, "label": [list(span) for span in SPANS]}]
    forms["other keys"] = [{"text": TEXT, "entities": [
        {"start_offset": a, "end_offset": b, "type": kind} for a, b, kind in SPANS]}]  # fmt: skip
    forms["cells"] = {"sentence": [" ".join(TOKENS)], "tags": [" ".join(TAGS)]}
    forms["json cells"] = {"tokens": [json.dumps(TOKENS)], "tags": [json.dumps(TAGS)]}
    names = list(names_of(("person", "place")))
    features = datasets.Features({
        "tokens": datasets.Sequence(datasets.Value("string")),
        "ner_tags": datasets.Sequence(datasets.ClassLabel(names=names)),
    })  # fmt: skip
    forms["datasets"] = datasets.Dataset.from_dict(
        {"tokens": [TOKENS], "ner_tags": [[names.index(tag) for tag in TAGS]]}, features=features
    )
    for name, rows in forms.items():
        labels, examples = read(rows)
        assert labels == names_of(("person", "place")), name
        assert [labels[i] for i in examples.targets[0]] == TAGS, name
        assert [
            text_of(examples.values["tokens"][0])[0][a:b] for a, b in text_of(examples.values["tokens"][0])[1]
        ] == TOKENS


def test_columns_are_found_again_in_another_form():
    task, columns = Tag(), {"tokens": "tokens", "tags": "tags"}
    table = task.read([{"text": TEXT, "entities": []}], Reading(), "rows")
    assert find_again(table, task.columns, columns) == {"tokens": "text", "tags": "entities"}
    assert find_again(table, task.columns, columns, leave_out=task.labelled) == {"tokens": "text"}
    given = task.given([TEXT, TOKENS], columns)
    assert given == [{"tokens": TEXT}, {"tokens": TOKENS}]
    assert task.given([{"text": "a"}], columns) is None


def test_parts_of_speech():
    rows = [{"tokens": ["a", "cat", "sat"], "upos": ["DET", "NOUN", "VERB"]}] * 3
    labels, examples = read(rows)
    assert labels == ("DET", "NOUN", "VERB") and examples.targets[0].tolist() == [0, 1, 2]
    numbers = [{"tokens": ["a", "cat"], "tags": [7, 11]}, {"tokens": ["sat"], "tags": [16.0]}]
    assert read(numbers)[0] == ("11", "16", "7")


LONG = {"tokens": ["x"], "tags": ["B-a"]}
BAD = [
    ({"tokens": ["x", "y"], "tags": ["O"]}, "row 2: 1 tag for 2 tokens."),
    ({"tokens": ["x", "y"], "tags": ["O", None]}, "row 2: token 2 ('y') has no tag."),
    ({"tokens": ["x", ""], "tags": ["O", "O"]}, "row 2: token 2 of 2 is '', not a non-empty text."),
    ({"tokens": [], "tags": []}, "row 2: the list of tokens is empty."),
    ({"tokens": ["x"], "tags": None}, "row 2: it has no tags."),
    ({"tokens": None, "tags": ["O"]}, "row 2: there is no text."),
    ({"tokens": {"a": 1}, "tags": ["O"]}, "row 2: a dict, where a text or a list of tokens should be."),
    ({"tokens": " ", "tags": []}, "row 2: the text is empty."),
    ({"tokens": ["x"], "tags": [{"start": 0, "end": 1, "label": "a"}]}, "its entities are character spans"),
    ({"tokens": ["x"], "tags": ["PERSON"]}, "tag 1, 'PERSON', is neither O nor B- or I- with a type (a)."),
    ({"tokens": "x y", "tags": [{"start": 2, "end": 9, "label": "a"}]}, "goes from 2 to 9, which is not within the 3"),
    ({"tokens": "x y", "tags": [{"start": -1, "end": 1, "label": "a"}]}, "goes from -1 to 1"),
    ({"tokens": "x y", "tags": [{"start": 1, "end": 1, "label": "a"}]}, "goes from 1 to 1"),
    ({"tokens": "x y", "tags": [[0, 1]]}, "entity 1 is [0, 1], and not {'start'"),
    ({"tokens": "x y", "tags": [{"start": "0", "end": 1, "label": "a"}]}, "entity 1 is {'start': '0'"),
    ({"tokens": "x y", "tags": [{"start": 0, "end": 1, "label": ""}]}, "entity 1 (0 to 1) has no label."),
    ({"tokens": "x  y", "tags": [[1, 3, "a"]]}, "has no word in it."),
    ({"tokens": "x y z", "tags": [[0, 3, "a"], [2, 5, "a"]]}, "'x y' (a, 0 to 3) and 'y z' (a, 2 to 5) overlap."),
    ({"tokens": "xyz", "tags": [[0, 1, "a"], [2, 3, "a"]]}, "are in one word, which has one tag."),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_told(row, message):
    with pytest.raises(UserError) as caught:
        read([LONG, row])
    assert message in str(caught.value) and "data.skip_bad=true" in str(caught.value)
    labels, examples = read([LONG, row], skip_bad=True)
    assert len(examples) == 1 and labels == ("O", "B-a", "I-a") and message in examples.skipped[0]


def test_nothing_to_learn():
    with pytest.raises(UserError, match="has no entity at all, so there is nothing to tell apart"):
        read([{"tokens": ["x"], "tags": ["O"]}] * 3)
    with pytest.raises(UserError, match="has the one tag 'NOUN'"):
        read([{"tokens": ["x"], "tags": ["NOUN"]}] * 3)
    with pytest.raises(UserError, match="does not look like tags"):
        read([{"tokens": ["x"] * 300, "tags": [f"t{i}" for i in range(300)]}])
    with pytest.raises(UserError, match=r"no column of .* looks like the tags"):
        read([{"tokens": ["x"]}])


def test_types_that_were_not_trained_are_refused():
    task, columns = Tag(), {"tokens": "tokens", "tags": "tags"}
    for tags, labels, message in (
        (["B-persom"], names_of(("person", "place")), "'B-persom' is of none of the 2 types of the training data "
         "(person, place). Did you mean 'person'?"),
        (["ADJ"], ("ADV", "NOUN"), "tag 'ADJ' is not among the 2 of the training data (ADV, NOUN)"),
    ):  # fmt: skip
        table = task.read([{"tokens": ["x"], "tags": tags}], Reading(), "eval")
        with pytest.raises(UserError) as caught:
            task.examples(table, columns, labels, False)
        assert f"eval (in memory), row 1: {message}" in str(caught.value)


def test_spans_within_a_word_are_widened_and_counted(tiny_bert):
    labels, examples = read([{"text": "the cats here", "entities": [[4, 7, "animal"]]}])
    assert [labels[i] for i in examples.targets[0]] == ["O", "B-animal", "O"]
    backbone = load_backbone(find_source(str(tiny_bert)))
    told = Tag().statistics(Tag().dataset(examples, backbone, 64), labels)
    assert told["spans_widened"] == 1 and told["notes"] == [
        "entities that end within a word, widened to it: 1"
    ]


@pytest.fixture(scope="module")
def backbone(tiny_bert):
    return load_backbone(find_source(str(tiny_bert)))


def test_a_label_is_on_the_first_token_of_a_word(backbone):
    """In transformers' own alignment: the first token with a `word_ids` of the word, -100 elsewhere."""
    tokens = ["my", "cats", "apples", "is", "hens"]
    _, examples = read([{"tokens": tokens, "tags": ["O", "B-animal", "B-fruit", "O", "B-animal"]}])
    dataset = Tag().dataset(examples, backbone, 64)
    batch = dataset.batch(np.array([0]))
    split = backbone.processor(tokens, is_split_into_words=True)
    assert batch.inputs["input_ids"][0].tolist() == split["input_ids"]
    assert len(split["input_ids"]) > len(tokens) + 2
    expected, before = [], None
    for word in split.word_ids():
        expected.append(-100 if word is None or word == before else int(examples.targets[0][word]))
        before = word
    assert batch.targets[0].tolist() == expected
    assert dataset.units.tolist() == [5]


def test_the_loss_is_that_of_transformers(backbone):
    labels, examples = read(
        [{"tokens": ["my", "cats"], "tags": ["O", "B-a"]}, {"tokens": ["here"], "tags": ["O"]}]
    )
    task = Tag()
    dataset = task.dataset(examples, backbone, 64)
    batch = dataset.batch(np.array([0, 1]))
    logits = torch.randn(*batch.targets.shape, 3, generator=torch.Generator().manual_seed(0))
    scores = task.learner(dataset, labels, 0.0)(lambda _: logits, batch)["loss"]
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert scores.losses.sum() / dataset.units.sum() == pytest.approx(mean.item())
    right = (logits.argmax(-1) == batch.targets).sum()
    assert scores.correct.sum() == right


class Says:
    """A model that gives the logits it was made with, by the place of a token in the text."""

    def __init__(self, table: dict[int, np.ndarray]) -> None:
        self.table = table

    def __call__(self, batch: Batch) -> torch.Tensor:
        width = int(batch.source.lengths[batch.rows].max())
        logits = torch.zeros(len(batch.rows), width, 5)
        for i, row in enumerate(batch.rows):
            part = batch.source.parts[row]
            for word, place in zip(part.words, part.places):
                logits[i, place] = torch.from_numpy(self.table[part.example][word])
        return logits


@pytest.mark.parametrize("max_length", [6, 9, 64])
def test_split_sentences_are_rejoined(backbone, max_length):
    """Figures and answers are those of whole sentences, whatever the length of their parts, and conlleval's."""
    draw = np.random.default_rng(0)
    labels = names_of(("animal", "fruit"))
    words = ["the", "cats", "apples", "old", ".", "hen", "plums", "my"]
    rows = []
    for _ in range(8):
        size = int(draw.integers(1, 40))
        tags = bio(chunks(draw.choice(labels, size)), size)
        rows.append({"tokens": draw.choice(words, size).tolist(), "tags": tags})
    found_labels, examples = read(rows)
    assert found_labels == labels
    task = Tag()
    dataset = task.dataset(examples, backbone, max_length)
    assert (len(dataset) > len(rows)) == (max_length < 64) and max(dataset.lengths) <= max_length
    table = {
        i: (draw.normal(size=(len(gold), 5)) + 2 * np.eye(5)[gold]).astype(np.float32)
        for i, gold in enumerate(examples.targets)
    }
    outcomes = [
        outcome
        for row in range(len(dataset))
        for outcome in task.outcomes(Says(table), dataset.batch(np.array([row])))
    ]
    raw = [[labels[i] for i in table[i_row].argmax(1)] for i_row in range(len(rows))]
    metrics, expected = task.metrics(outcomes, dataset, labels), conlleval([row["tags"] for row in rows], raw)
    for name in ("precision", "recall", "f1"):
        assert metrics[name] == pytest.approx(expected[name])
    answers = task.answers(outcomes, dataset, labels)
    for answer, tags in zip(answers, raw):
        assert answer["tags"] == bio(chunks(tags), len(tags))  # and what is written is BIO
    assert (
        conlleval([row["tags"] for row in rows], [a["tags"] for a in answers])["accuracy"]
        == metrics["accuracy"]
    )
    logs = {i: torch.from_numpy(values).log_softmax(1).numpy() for i, values in table.items()}
    losses = np.concatenate([-logs[i][range(len(gold)), gold] for i, gold in enumerate(examples.targets)])
    assert metrics["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert metrics["rows"] == len(rows) and metrics["words"] == len(losses)
    worst = task.worst(outcomes, dataset, labels, 3)
    per_row = {
        f"rows (in memory), row {i + 1}": float(-logs[i][range(len(g)), g].sum())
        for i, g in enumerate(examples.targets)
    }
    assert [row["where"] for row in worst] == sorted(per_row, key=per_row.get, reverse=True)[:3]
    for row in worst:
        for name in ("expected", "answer"):
            marked = [f"[{row['text'][start:end]}]({kind})" for start, end, kind in row["marks"][name]]
            assert (", ".join(marked) or "no entity") == row[name]
    bins = metrics["calibration"]["bins"]
    assert sum(one[2] for one in bins) == len(losses)
    assert sum(one[2] * one[4] for one in bins) == pytest.approx(metrics["accuracy"] * len(losses))


def test_words_that_vanish_go_on_with_the_entity_around_them(backbone):
    tokens = ["my", "cat", "\u200b", "cow", "\u200b"]
    labels, examples = read([{"tokens": tokens, "tags": ["O", "B-a", "I-a", "I-a", "B-b"]}])
    task = Tag()
    dataset = task.dataset(examples, backbone, 64)
    assert task.statistics(dataset, labels)["words_without_token"] in (0, 2)
    logits = np.zeros((5, 5), dtype=np.float32)
    logits[range(5), [0, 1, 0, 2, 0]] = 5
    part = dataset.parts[0]
    kept = np.isin(part.words, [0, 1, 3])  # as a tokenizer leaves out what it does not print
    object.__setattr__(part, "words", part.words[kept])
    object.__setattr__(part, "places", part.places[kept])
    object.__setattr__(part, "own", part.own[kept])
    dataset.labels = None
    outcomes = task.outcomes(Says({0: logits}), dataset.batch(np.array([0])))
    assert task.answers(outcomes, dataset, labels)[0]["tags"] == ["O", "B-a", "I-a", "I-a", "O"]
    metrics = task.metrics(outcomes, dataset, labels)
    assert metrics["words"] == 5 and metrics["recall"] == 0.5


def test_answers_to_texts(backbone):
    labels = names_of(("person", "place"))
    task = Tag()
    table = task.read([{"tokens": TEXT}, {"tokens": TOKENS}], Reading(), "rows")
    examples = task.examples(table, {"tokens": "tokens"}, labels, False, targets=False)
    dataset = task.dataset(examples, backbone, 64)
    logits = 4 * np.eye(5, dtype=np.float32)[[labels.index(tag) for tag in TAGS]]
    outcomes = task.outcomes(Says({0: logits, 1: logits}), dataset.batch(np.array([0, 1])))
    raw, tokens = task.answers(outcomes, dataset, labels)
    chance = round(float(np.exp(4) / (np.exp(4) + 4)), 4)
    assert raw == {"entities": [
        {"start": a, "end": b, "label": kind, "text": TEXT[a:b], "probability": chance} for a, b, kind in SPANS
    ]}  # fmt: skip
    assert tokens == {"tags": TAGS, "probabilities": [chance] * len(TAGS)}
    marked = "[Ada Lovelace](person) met [Alan Turing](person)'s cat in [London](place), [UK](place)."
    assert task.line({**task.asked(examples, 0), **raw}) == marked
    assert task.line({**task.asked(examples, 1), **tokens}).startswith(
        "[Ada Lovelace](person) met [Alan Turing]"
    )
    assert task.line({"tokens": ["a", "cat"], "tags": ["DET", "NOUN"]}) == "a/DET cat/NOUN"
