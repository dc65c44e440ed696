"""Questions on texts: the official figures, where answers stand, windows, the search, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from squad_rows import articles, find_best_thresh, official_1, official_2, write_squad

from graftkit.backbone.load import load_backbone
from graftkit.backbone.source import find_source
from graftkit.data.squad import locate, squad_table
from graftkit.errors import UserError
from graftkit.tasks.base import Reading
from graftkit.tasks.shared.masked import masked_cross_entropy
from graftkit.tasks.span.metrics import best_threshold, score
from graftkit.tasks.span.task import Span
from graftkit.tasks.span.windows import Found, Window, cut_windows, gather, search

COLUMNS = {"question": "question", "context": "context", "answers": "answers"}
TEXTS = [
    "", "the", "The", "a an", ".", "...", "the cat", "cat", "The cat.", "cat's", "cats", "U.S.", "US", "3.14", "314",
    "naïve café", "NAÏVE CAFÉ", "nai\u0308ve", "«quoted»", "quoted", "東京", "東京 タワー", "東京。", "İstanbul", "straße",
    "an apple a day", "apple day", "day  apple\tday", "ananas the", "thecat", "-5", "5", "x" * 30, "\u200b", "\xa0cat",
    "one two three four", "two three", "three two two", "a.", "‘the’ end", "“the end”",
]  # fmt: skip


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.slow
def test_figures_are_the_official_ones(second):
    official = official_2 if second else official_1
    for answer in TEXTS:
        for i in range(len(TEXTS)):
            for golds in ([TEXTS[i]], TEXTS[i : i + 3], [*TEXTS[i : i + 2], "the cat"]):
                assert score(answer, golds, second) == pytest.approx(official(golds, answer), abs=1e-12)
    if second:
        assert score("", [], True) == official_2([], "") == (1, 1) and score("cat", [], True) == (0, 0)


def test_the_threshold_is_as_good_as_the_official_one():
    draw = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        for _ in range(20):
            leads, f1s, has = draw.normal(size=size), draw.random(size), draw.random(size) < 0.6
            f1s = f1s * has
            keys = range(size)
            best, _ = find_best_thresh(dict(zip(keys, f1s)), dict(zip(keys, leads)), dict(zip(keys, has)))
            limit = best_threshold(leads, f1s, has)
            got = np.where(leads > limit, ~has, f1s).mean()
            assert got == pytest.approx(best) and np.isfinite(limit)


@pytest.mark.parametrize(
    ("text", "start", "found"),
    [
        ("cat", 4, ("cat", 4, False)),
        ("cat", 5, ("cat", 4, True)),  # one of two cats, and the only one nearby
        ("cat", None, None),
        ("dog", None, ("dog", 8, False)),
        ("dog", 90, ("dog", 8, True)),
        (" dog ", 7, ("dog", 8, False)),
        ("dog", -1, ("dog", 8, True)),
        ("naïve", 0, ("naïve", 128, True)),
    ],
)
def test_where_an_answer_stands(text, start, found):
    context = f"the cat dog {'x' * 100}       the cat  naïve"
    if found is None:
        with pytest.raises(
            ValueError, match="occurs 2 times in the context, at 4, 123; choose one with answer_start"
        ):
            locate(context, text, start)
        return
    assert locate(context, text, start) == found
    assert context.startswith(found[0], found[1])


def examples(rows, task=None, **more):
    task = task or Span()
    table = task.read(rows, Reading(), "rows")
    return task.examples(
        table, COLUMNS, task.label_names(table, COLUMNS, False), **{"skip_bad": False, **more}
    )


def row(**more):
    return {
        "question": "who?",
        "context": "the cat sat",
        "answers": {"text": ["cat"], "answer_start": [4]},
        **more,
    }


def test_all_forms_of_answers_mean_the_same():
    forms = [
        {"answers": {"text": ["cat"], "answer_start": [4]}},
        {"answers": {"text": np.array(["cat"]), "answer_start": np.array([4])}},
        {"answers": [{"text": "cat", "answer_start": 4}]},
        {"answers": '{"text": ["cat"], "answer_start": [4]}'},
        {"answers": ["cat"], "answer_start": [4]},
        {"answers": "cat", "answer_start": "4"},
        {"answers": "cat", "answer_start": 4.0},
        {"answers": "cat"},
    ]
    for form in forms:
        assert examples([row(**form)]).targets[0].answers == (("cat", 4),)
    for empty in ({"text": [], "answer_start": []}, [], "[]"):
        assert examples([row(answers=empty)]).targets[0].answers == ()
    assert examples([row(answers="", is_impossible="True")]).targets[0].answers == ()
    assert examples([row(answers="[1] or", context="see [1] or")]).targets[0].answers == (("[1] or", 4),)


def test_squad_files_of_both_versions(tmp_path):
    data = articles(3, answerless=True)
    data[0]["paragraphs"][0]["qas"][2]["plausible_answers"] = [{"text": "cat", "answer_start": 0}]
    task = Span()
    table = task.read(str(write_squad(tmp_path / "two.json", data)), Reading(), "train")
    assert len(table) == 9 and table.where(8).endswith("two.json, question 9")
    assert table.columns["title"][8] == "article 2" and table.columns["is_impossible"][:3] == [
        False,
        False,
        True,
    ]
    assert task.label_names(table, COLUMNS, False) == ("answer", "no answer")
    flat = [{"id": str(i), **row()} for i in range(2)]
    (tmp_path / "flat.json").write_text(json.dumps({"version": "x", "data": flat}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, flat)))
    for name in ("flat.json", "lines.json"):
        table = task.read(str(tmp_path / name), Reading(), "train")
        assert table.columns["id"] == ["0", "1"] and task.label_names(table, COLUMNS, False) == ()
    assert len(task.read({"data": data}, Reading(), "train")) == 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": " "}, "row 1: column 'question' is empty"),
        ({"context": None}, "row 1: column 'context' is empty"),
        ({"context": ["a"]}, "column 'context' is a list, not a text"),
        ({"context": "\ud800 cat"}, "half of a surrogate pair"),
        ({"answers": None}, "has no answer; for an unanswerable question, write an empty list"),
        ({"answers": ""}, "has no answer"),
        ({"answers": {"text": [" "], "answer_start": [0]}}, "an answer is empty"),
        ({"answers": {"text": ["dog"], "answer_start": [4]}}, "'dog' is not in the context (answer_start is 4; the text there is 'cat')"),
        ({"answers": {"text": ["Cat"], "answer_start": [99]}}, "which is past its end); the context has 'cat' at 4"),
        ({"answers": {"text": ["cat"], "answer_start": ["x"]}}, "answer_start is 'x', not a whole number"),
        ({"answers": {"text": ["cat", "sat"], "answer_start": [4]}}, "2 answers but 1 of answer_start"),
        ({"answers": {"texts": ["cat"]}}, "answers has no 'text' (it has: texts)"),
        ({"answers": [3, None]}, "an answer is missing or null, not a text"),
        ({"is_impossible": True}, "is_impossible is true, but there are answers"),
    ],
)  # fmt: skip
def test_bad_rows(change, said):
    with pytest.raises(UserError) as error:
        examples([row(**change)])
    assert said in str(error.value) and "(in memory), row 1" in str(error.value)
    assert "data.skip_bad=true" in str(error.value)
    kept = examples([row(**change), row()], skip_bad=True)
    assert len(kept) == 1 and said in kept.skipped[0]


def test_an_id_that_is_no_value():
    with pytest.raises(UserError, match=r"row 1: id is \['a'\], but must be a text or a number"):
        examples([row(id=["a"])])


def test_an_id_that_comes_twice():
    with pytest.raises(UserError, match=r"row 3: id 'a' is that of rows \(in memory\), row 1 too"):
        examples([row(id="a"), row(id="b"), row(id="a")])


def test_no_column_of_answers():
    rows = [{"question": "who?", "context": "the cat sat"}]
    task, columns = Span(), {"question": "question", "context": "context"}
    table = task.read(rows, Reading(), "rows")
    with pytest.raises(UserError, match="no column 'answers'"):
        task.examples(table, columns, (), False)
    assert task.examples(table, columns, (), False, targets=False).targets is None


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        ({"data": "x"}, "data is a string, but must be a list in SQuAD's format"),
        ({"data": [3]}, "data[0] is a number, but must be an object in SQuAD's format"),
        ({"data": [{"title": "t"}]}, "data[0].paragraphs is missing or null"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, "data[0].paragraphs[0].context is missing"),
        ({"data": [{"paragraphs": [{"context": "c", "qas": {}}]}]}, "paragraphs[0].qas is an object"),
        ({"data": [{"paragraphs": [{"context": "c", "qas": ["q"]}]}]}, "data[0].paragraphs[0].qas[0] is a string"),
        ({"data": [{"paragraphs": [{"context": "c", "qas": [{"question": 3}]}]}]}, "qas[0].question is a number"),
        ({"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": ["a"]}]}]}]},
         "qas[0].answers[0] is a string"),
        ({"paragraphs": {}}, "paragraphs is an object"),
        ({"data": []}, "has no questions"),
    ],
)  # fmt: skip
def test_json_of_another_form(whole, said, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError) as error:
        Span().read(str(path), Reading(), "train")
    assert str(path) in str(error.value) and said in str(error.value)


def test_a_bad_question_in_a_file_is_left_out():
    good = {"question": "q", "answers": [{"text": "c", "answer_start": 0}]}
    whole = {"data": [{"paragraphs": [{"context": "c d", "qas": [{"question": None}, good]}]}]}
    table = squad_table(whole, "f.json", skip_bad=True)
    assert table.numbers == [2] and "f.json: data[0].paragraphs[0].qas[0].question" in table.skipped[0]


def test_whole_articles_are_held_out():
    task, found = Span(), examples({"data": articles(20)})
    kept, held = task.hold_out(found, 0.2, 3)
    titles = [{found.table.columns["title"][i] for i in part} for part in (kept, held)]
    assert not titles[0] & titles[1] and len(titles[1]) == 4 and sorted(kept + held) == list(range(60))
    assert task.hold_out(found, 0.2, 3) == (kept, held) != task.hold_out(found, 0.2, 4)
    flat = examples(
        [row(context=f"the cat {i // 3}") for i in range(12)]
    )  # by context where there are no titles
    kept, held = task.hold_out(flat, 0.25, 0)
    assert len(held) == 3 and len({flat.values["context"][i] for i in held}) == 1
    with pytest.raises(UserError, match=r"all questions of .* are on one text"):
        task.hold_out(examples([row(), row(question="when?")]), 0.5, 0)


CONTEXT = "Zürich — 東京 naïve  café,\tthe 3½ cats of O'Neill's \u200bhouse; «fin» 😀 end. " * 3


def fast_tokenizers():
    """WordPiece, byte-level BPE with and without trimmed offsets, and Unigram with '▁', trained on the text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]

    def made(model, trainer, pre, processor=None, normalizer=None, **more):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.train_from_iterator([CONTEXT, "who is where?"], trainer)
        if processor:
            tokenizer.post_processor = processor
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]"} | more
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

    pair = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    end = processors.TemplateProcessing(
        single="$A [SEP] [CLS]", pair="$A [SEP] $B [SEP] [CLS]:2", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    marks = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    yield made(
        models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=120, special_tokens=special),
        pre_tokenizers.BertPreTokenizer(), pair, normalizers.BertNormalizer(), **marks,
    )  # fmt: skip
    for trim in (False, True):
        yield made(
            models.BPE(unk_token="[UNK]"), bpe, pre_tokenizers.ByteLevel(add_prefix_space=False),
            processors.ByteLevel(trim_offsets=trim),
        )  # fmt: skip
    yield made(
        models.Unigram(), trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="[UNK]"),
        pre_tokenizers.Metaspace(), end, padding_side="left", **marks,
    )  # fmt: skip


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("length", [40, 400])
def test_answers_are_found_again_through_every_tokenizer(number, length):
    """Scores of 1 at the tokens of an answer give back its text, whole where it does not lie inside a token."""
    tokenizer = list(fast_tokenizers())[number]
    first = tokenizer.padding_side == "right"
    tested = 0
    for text in ("Zürich", "東京", "naïve  café", "3½ cats", "O'Neill's", "«fin»", "😀", "end."):
        at = CONTEXT.index(text, 30)  # not the first of them
        given = [
            {
                "question": "who is where?",
                "context": CONTEXT,
                "answers": {"text": [text], "answer_start": [at]},
            }
        ]
        made = examples(given)
        windows = cut_windows(tokenizer, made, length, 8, first)
        assert (len(windows) > 1) == (length == 40)
        for i, window in enumerate(windows):
            ids = window.features["input_ids"]
            assert len(ids) <= length and len(window.offsets) == window.last - window.first + 1
            place = window.tokens_of(text, at, (i == 0, i == len(windows) - 1))
            scores = np.zeros((len(ids), 2))
            if place is None:
                continue
            scores[place[0], 0] = scores[place[1], 1] = 5
            found = gather([search(window, scores, 30, 5)], np.zeros(1), [CONTEXT], 5, False)[0]
            got = CONTEXT[found.start : found.end]
            assert text in got and len(got) <= len(text) + 1 and found.start in (at, at - 1), got
            tested += 1
    assert tested >= 8


def test_windows_cover_the_context_and_share_their_stride(tiny_bert):
    backbone = load_backbone(find_source(str(tiny_bert)))
    words = " ".join(["apple", "pear", "plum", "cat", "dog"] * 20)
    made = examples(
        [row(context=words, answers={"text": ["cat"], "answer_start": [words.index("cat", 200)]})]
    )
    dataset = Span(doc_stride=10).dataset(made, backbone, 40)
    seen = [tuple(map(tuple, window.offsets.tolist())) for window in dataset.windows]
    assert len(seen) > 3 and {len(part) for part in seen[:-1]} == {len(seen[0])}
    for left, right in pairwise(seen):
        assert left[-10:] == right[:10]
    assert {pair for part in seen for pair in part} == {
        (begin, begin + len(word)) for begin, word in zip(np.cumsum([0] + [len(w) + 1 for w in words.split()]), words.split())
    }  # fmt: skip
    holding = [i for i, (start, *_) in enumerate(dataset.numbers) if start != dataset.windows[i].null]
    assert 1 <= len(holding) <= 2 and dataset.units.all() and dataset.truncated == 0
    tokens = dataset.batch(np.array(holding)).inputs["input_ids"]
    cat = backbone.processor.convert_tokens_to_ids("cat")
    for ids, i in zip(tokens, holding):
        assert ids[dataset.numbers[i, 0]] == ids[dataset.numbers[i, 1]] == cat


def test_an_answer_longer_than_any_window_is_not_learned(tiny_bert):
    backbone = load_backbone(find_source(str(tiny_bert)))
    words = " ".join(["apple"] * 60)
    long = row(context=words, answers={"text": [words[:200]], "answer_start": [0]})
    dataset = Span().dataset(examples([long, row(context=words + " cat")]), backbone, 32)
    assert dataset.truncated == 1
    first = dataset.question_of == 0
    assert not dataset.units[first].any() and dataset.units[~first].all()
    batch = dataset.batch(np.arange(len(dataset)))
    logits = torch.randn(len(dataset), int(dataset.lengths.max()), 2)
    losses = Span().learner(dataset, (), 0.0)(lambda _: logits, batch)["loss"].losses
    assert not losses[torch.tensor(first)].any() and (losses[torch.tensor(~first)] > 0).all()
    with pytest.raises(UserError, match=r"no answer of .* is whole in a window of 32 tokens"):
        Span().dataset(examples([long]), backbone, 32, training=True)


def test_a_question_that_leaves_no_room(tiny_bert):
    backbone = load_backbone(find_source(str(tiny_bert)))
    made = examples([row(), row(question="the cat " * 20)])
    with pytest.raises(
        UserError, match=r"row 2: the question has 40 tokens, which leaves 0 for the context in a window"
    ):
        Span().dataset(made, backbone, 32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_over_context_and_no_answer(tiny_bert, smoothing):
    """Mean of the cross-entropies of start and end where the question's and the padding's logits are cut out."""
    backbone = load_backbone(find_source(str(tiny_bert)))
    rows = [row(context="the cat is here"), row(context="the old cat and the dog"), row(answers=[])]
    dataset = Span().dataset(examples(rows), backbone, 32)
    batch = dataset.batch(np.arange(3))
    logits = torch.randn(3, int(dataset.lengths.max()), 2, generator=torch.Generator().manual_seed(0))
    got = Span().learner(dataset, (), smoothing)(lambda _: logits, batch)["loss"].losses
    for i, (start, end, first, last, null) in enumerate(dataset.numbers):
        kept = [null, *range(first, last + 1)]
        assert null == 0 and (start == 0) == (i == 2)
        wanted = [
            torch.nn.functional.cross_entropy(
                logits[i, kept, side], torch.tensor(kept.index(place)), label_smoothing=smoothing
            )
            for side, place in enumerate((start, end))
        ]
        assert got[i].item() == pytest.approx(float(sum(wanted)) / 2, rel=1e-5)


def test_masked_cross_entropy_has_finite_gradients():
    logits = torch.randn(4, 5, requires_grad=True)
    allowed = torch.rand(4, 5) < 0.5
    allowed[:, 0] = True
    masked_cross_entropy(logits, torch.zeros(4, dtype=torch.long), allowed, 0.1).sum().backward()
    assert torch.isfinite(logits.grad).all() and not logits.grad[~allowed].any()


def window_of(length, first=3):
    offsets = np.array([[2 * i, 2 * i + 1] for i in range(length)], dtype=np.int32)
    return Window(0, first, first + length - 1, 0, offsets, {})


@pytest.mark.parametrize(("longest", "count"), [(1, 4), (4, 7), (30, 1000)])
def test_search_is_exhaustive(longest, count):
    draw = np.random.default_rng(longest)
    for length in (1, 2, 9):
        scores = draw.normal(size=(length + 5, 2)).astype(np.float32)
        window = window_of(length)
        found = search(window, scores, longest, count)
        every = sorted(
            ((float(scores[3 + a, 0] + scores[3 + b, 1]), 2 * a, 2 * b + 1)
             for a in range(length) for b in range(a, min(length, a + longest))), reverse=True,
        )  # fmt: skip
        assert [span[1:] for span in found.spans] == [span[1:] for span in every[:count]]
        assert found.null == pytest.approx(float(scores[0].sum()))


def test_windows_of_one_question_are_compared():
    outcomes = [
        Found(2.0, [(3.0, 0, 3), (1.0, 4, 7)], 0.5),
        Found(-1.0, [(4.0, 4, 7), (3.5, 8, 11)], 1.5),
        Found(9.0, [(1.0, 0, 3)]),
    ]
    first, second = gather(outcomes, np.array([0, 0, 1]), ["cat dog  hen", "cat"], 20, True)
    assert (first.start, first.end, first.score, first.lead, first.loss) == (4, 7, 4.0, -5.0, 1.0)
    chances = np.exp([4.0, 3.5, 3.0, -1.0])  # 'dog' counts once; no answer is the lowest of all windows
    assert first.probability == pytest.approx(chances[0] / chances.sum())
    assert first.null_probability == pytest.approx(chances[-1] / chances.sum())
    assert second.lead == 8 and second.null_probability > 0.99 and np.isnan(second.loss)


def test_blanks_around_an_answer_are_cut():
    outcome = Found(0.0, [(1.0, 3, 8)])
    found = gather([outcome], np.array([0]), ["the cat  sat"], 5, False)[0]
    assert (found.start, found.end) == (4, 7)


def test_figures_of_whole_answers(tiny_bert):
    """Metrics of known spans beside the official scripts, with a threshold that is found, given, or set."""
    backbone = load_backbone(find_source(str(tiny_bert)))
    rows = [
        row(context="the old cat is here", answers={"text": ["cat", "old cat"], "answer_start": [8, 4]}),
        row(context="my dog was here", answers={"text": ["dog"], "answer_start": [3]}),
        row(context="my hen was there", answers=[]),
    ]
    task, made = Span(), examples(rows)
    dataset = task.dataset(made, backbone, 32)
    outcomes = [
        Found(0.0, [(2.0, 4, 11)], 1.0),
        Found(1.0, [(2.0, 0, 6)], 2.0),
        Found(4.0, [(2.0, 0, 2)], 3.0),
    ]
    labels = ("answer", "no answer")
    said = ["old cat", "my dog", ""]
    golds = [["cat", "old cat"], ["dog"], []]
    wanted = np.mean([official_2(gold, text) for gold, text in zip(golds, said)], axis=0)
    got = task.metrics(outcomes, dataset, labels)
    assert (got["exact_match"], got["f1"]) == pytest.approx(tuple(wanted))
    assert got["loss"] == 2 and got["rows"] == 3 and -1 < got["threshold"] < 2
    assert got["no_answer_f1"] == 1 and got["has_answer_rows"] == 2
    low, high = got["f1_interval"]
    assert low < got["f1"] < high
    settled = task.decided(got)
    assert settled == Span(threshold=got["threshold"]) and eval(str(settled), {"span": Span}) == settled
    assert settled.metrics(outcomes, dataset, labels) == got
    assert Span(threshold=-5.0).metrics(outcomes, dataset, labels)["has_answer_f1"] == 0
    assert task.decided(None) == Span(threshold=0.0) and task.decided({"f1": 1}) == task
    answers = settled.answers(outcomes, dataset, labels)
    assert [answer["answer"] for answer in answers] == said
    assert (answers[0]["start"], answers[0]["end"], answers[2]["start"]) == (4, 11, None)
    assert settled.line({**answers[2], "question": "who?"}).split("\t")[0] == "(no answer)"
    worst = settled.worst(outcomes, dataset, labels, 5)
    assert [(found["expected"], found["answer"]) for found in worst] == [("dog", "my dog")]
    only = task.metrics(outcomes[:2], task.dataset(examples(rows[:2]), backbone, 32), ())
    assert "threshold" not in only and only["f1"] == pytest.approx(
        np.mean([1, official_1(["dog"], "my dog")[1]])
    )


def test_what_predict_is_given():
    task, columns = Span(), COLUMNS
    pair = [{"question": "who?", "context": "the cat"}]
    assert task.given(["who?", "the cat"], columns) == task.given([("who?", "the cat")], columns) == pair
    assert task.given([{"question": "who?"}], columns) is None
    for items, said in (
        (["who?"], "give both, QUESTION and CONTEXT"),
        (["a", "b", "c"], "3 texts are given"),
        ([("who?", " ")], "the context of pair 1 of 1 is empty"),
        ([], "no question"),
    ):
        with pytest.raises(UserError, match=said):
            task.given(items, columns)


def test_a_slow_tokenizer_is_refused():
    slow = SimpleNamespace(processor=SimpleNamespace(pad_token_id=0, is_fast=False), source="m")
    with pytest.raises(UserError, match="fast tokenizer"):
        Span().dataset(examples([row()]), slow, 32)
