"""Stop texts and streamed text, found in the last tokens alone: as in the whole text, in linear time."""

from __future__ import annotations

import random

import pytest
import torch
from language_models import EOS, tokenizer

from graftkit.tasks.generate.text import _cut, _Stops, _Streamer


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, made) -> None:
        self.made, self.all_special_ids, self.decoded = made, made.all_special_ids, 0

    def decode(self, tokens, **more):
        self.decoded += len(tokens)
        return self.made.decode(tokens, **more)


TEXT = "naïve 猫🙂 ohne Ende — "
WORDS = ["what colour", " is", " grass?", "\n", "###", "END", "E", "N", "D", "🙂", "é", " ", "猫", "\n\n"]
STOPS = [("END",), ("\n\n", "###"), ("🙂猫",), ("é END\n",)]


def drawn(made, seed: int, count: int = 60) -> list[int]:
    """Tokens of random words, with special tokens and single bytes of characters between them."""
    draw = random.Random(seed)
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += made(draw.choice(WORDS), add_special_tokens=False)["input_ids"]
        if draw.random() < 0.1:
            tokens.append(draw.choice([EOS, tokens[0]]))
    return tokens


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_rows_end_where_the_whole_text_has_a_stop(stop):
    made = tokenizer()
    rows = [drawn(made, seed)[:60] for seed in range(8)]
    ids, skip = torch.tensor(rows), 5
    stops, ended = _Stops(made, stop, skip), torch.zeros(len(rows), dtype=torch.bool)
    wanted_before = ended
    for length in range(skip + 1, ids.shape[1] + 1):
        ended = ended | stops(ids[:, :length], None)
        texts = [made.decode(row[skip:length], skip_special_tokens=True) for row in rows]
        wanted = torch.tensor([_cut(text, stop)[1] for text in texts])
        assert torch.equal(ended, wanted | wanted_before), length
        wanted_before = wanted | wanted_before


@pytest.mark.parametrize("stop", [(), *STOPS], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_streamed_is_the_text(stop, seed):
    made = tokenizer()
    tokens = drawn(made, seed, 200)
    if stop:  # the end comes once, at the end
        tokens = made(TEXT * 6 + stop[0], add_special_tokens=False)["input_ids"]
    parts: list[str] = []
    streamer = _Streamer(made, 2, stop, parts.append)
    streamer.put(torch.tensor([tokens[:2]]))
    assert not parts
    for count, token in enumerate(tokens[2:], start=3):
        streamer.put(torch.tensor([token]))
        so_far = made.decode(tokens[2:count], skip_special_tokens=True)
        shown = "".join(parts)
        assert so_far.startswith(shown) and len(so_far) - len(shown) <= max(map(len, stop), default=1) + 1
    streamer.end()
    assert "".join(parts) == _cut(made.decode(tokens[2:], skip_special_tokens=True), stop)[0]


def test_each_token_is_decoded_a_bounded_number_of_times():
    counts = {}
    for size in (100, 400):
        made = Counting(tokenizer())
        tokens = made.made(TEXT * 60, add_special_tokens=False)["input_ids"][:size]
        stops, streamer = _Stops(made, ("END",), 0), _Streamer(made, 0, ("END",), lambda text: None)
        for length in range(1, size + 1):
            stops(torch.tensor([tokens[:length]]), None)
            streamer.put(torch.tensor([tokens[length - 1]]))
        counts[size] = made.decoded
    assert counts[400] < 5 * counts[100]
