"""Sentences of English and Chinese texts, as people divide them."""

from __future__ import annotations

import random

import pytest

from graftkit.data.corpora import split_sentences

CASES = {
    "abbreviations": [
        "Mr. Smith met Dr. J. R. Brown at 3.30 p.m. in the U.S. Senate.", "Then he left.", "See e.g. Fig. 3 and No. 5.",
    ],
    "an abbreviation at the end": ["He works at Apple Inc.", "The firm grew.", "I live in the U.S.", "It is big.", "So do I.", "Then we go."],
    "quotes": ['He said, "Go away!" and left.', '"Why?" she asked.', '"Because."', "It was so (really.)", "Next."],
    "curly quotes": ["“Stop.”", "He stopped.", "‘No!’ she cried."],
    "numbers": ["It costs 3.5 million.", "In 2000 it was 7.", "2001 was better."],
    "dots": ["Done...", "Maybe.", "And so on… he said.", "Really?!", "Yes!"],
    "small letters": ["Yahoo! is a company."],
    "tokenized, as in WikiText": ["In 2000 .", "He had @-@ 3.5 million .", "Mr. Box was cast in plays ."],
    "chinese": ["他说：“你好。”", "然后走了。", "你是谁？！", "我不知道……也许吧。", "「真的？」", "她問道。"],
    "a quote that goes on": ["你好，“世界。”，他说。", "完。"],
    "both": ["我用 PyTorch 2.0。", "好！", "真好!", "是的。", "It works.", "OK."],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_sentences(case: str) -> None:
    sentences = CASES[case]
    joined = ""
    for sentence in sentences:
        joined += (" " if joined and not (joined[-1] > "\u2e80" or sentence[0] > "\u2e80") else "") + sentence
    assert split_sentences(joined) == sentences


def test_lines() -> None:
    poem = "帝京篇十首 一\n秦川雄帝宅，函谷壯皇居。\n綺殿千尋起，\n離宮百雉餘。"
    assert split_sentences(poem) == [
        "帝京篇十首 一",
        "秦川雄帝宅，函谷壯皇居。",
        "綺殿千尋起，\n離宮百雉餘。",
    ]
    verse = "All:\nWhat authority surfeits on\nwould relieve us. If they\nwould yield, it\nis well.\n\nTitle\n\nText"
    assert split_sentences(verse) == [
        "All:\nWhat authority surfeits on\nwould relieve us.", "If they\nwould yield, it\nis well.", "Title", "Text",
    ]  # fmt: skip
    assert split_sentences(" \n ") == split_sentences("") == []


def test_nothing_is_lost_and_long_runs_take_linear_time() -> None:
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choices('aB.。!？"”」\n ,，字I', k=draw.randint(0, 40)))
        found = split_sentences(text)
        assert "".join("".join(found).split()) == "".join(text.split())
        assert all(sentence == sentence.strip() != "" for sentence in found)
    for run in (".", "!", " ", "\n ", '"', "。", "(", 'a."'):
        split_sentences(run * 100_000 + "a")  # in quadratic time, this takes minutes
