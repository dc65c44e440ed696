"""Blanks filled by a GLM: against a loop without a cache, in batches, with sampling, and what texts come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from test_glm_objective import LENGTH, glm, tokenizer_with_marks

from graftkit import UserError
from graftkit.tasks.shared.blanks import marks_of
from graftkit.tasks.shared.filling import CHINESE, Sampling, fill, write_blanks

pytestmark = pytest.mark.slow

TEXTS = ["apple [MASK] hammer", "[gMASK]", "pear [MASK] saw [sMASK] plum apple [MASK]"]


@pytest.fixture(scope="module", params=[True, False], ids=["two positions", "one position"])
def made(request, tmp_path_factory):
    tokenizer = tokenizer_with_marks(tmp_path_factory.mktemp("glm"))
    model = glm(tokenizer, block_positions=request.param)
    zoo.randomize(model, 1)
    return model, tokenizer


@torch.no_grad()
def slow(model, tokenizer, text: str, most: int) -> list[list[int]]:
    """Greedy blanks: the whole input is computed again for each token, as in training."""
    marks = marks_of(tokenizer, "test")
    part_a = tokenizer(text)["input_ids"]
    ids, places, numbers = list(part_a), list(range(len(part_a))), [0] * len(part_a)
    banned = sorted({*tokenizer.all_special_ids} - {marks.end})
    blanks = []
    for place in [i for i, token in enumerate(part_a) if token in marks.masks]:
        blank, token = [], marks.start
        while token != marks.end and len(blank) < most:
            ids.append(token)
            numbers.append(len(blank) + 1)
            places.append(place if model.config.block_positions else len(places))
            rows = {"input_ids": ids, "position_ids": places, "block_position_ids": numbers}
            logits = model(**{name: torch.tensor([row]) for name, row in rows.items()}).logits[0, -1]
            logits[banned] = -torch.inf
            if not blank:
                logits[marks.end] = -torch.inf
            token = int(logits.argmax())
            blank += [token] if token != marks.end else []
        blanks.append(blank)
    return blanks


def test_a_batch_with_a_cache_is_what_single_rows_without_one_are(made) -> None:
    model, tokenizer = made
    prompts = [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]
    found = write_blanks(model, tokenizer, marks_of(tokenizer, "test"), prompts, Sampling(new_tokens=5))
    assert found == [slow(model, tokenizer, text, 5) for text in TEXTS]
    assert [len(row) for row in found] == [1, 1, 3] and all(blank for row in found for blank in row)


def test_texts_and_their_blanks(made) -> None:
    model, tokenizer = made
    one = fill(model, tokenizer, TEXTS[2], new_tokens=3)
    assert len(one.blanks) == 3 and "MASK" not in one.text
    first, second, third = one.blanks
    assert one.text == f"pear {first} saw {second} plum apple {third}"
    assert fill(model, tokenizer, TEXTS[2:], new_tokens=3) == [one]


def test_sampling_depends_on_its_seed(made) -> None:
    model, tokenizer = made
    drawn = [fill(model, tokenizer, TEXTS[2], temperature=2.0, seed=seed, new_tokens=4) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = fill(model, tokenizer, TEXTS[2], new_tokens=4)
    assert fill(model, tokenizer, TEXTS[2], temperature=1.0, top_k=1, new_tokens=4) == greedy
    assert fill(model, tokenizer, TEXTS[2], temperature=1.0, top_p=1e-6, new_tokens=4) == greedy


def test_texts_that_cannot_be_filled_are_refused(made) -> None:
    model, tokenizer = made
    with pytest.raises(UserError, match=r"text 2 has no blank: write \[MASK\]"):
        fill(model, tokenizer, ["apple [MASK]", "apple"])
    with pytest.raises(UserError, match=f"has {LENGTH + 3} tokens, but the model has {LENGTH} places"):
        fill(model, tokenizer, "[MASK] " + "apple " * LENGTH)


def test_chinese_characters_stand_without_spaces() -> None:
    assert CHINESE.sub("", "春 风 , a b 吹") == "春风 , a b 吹"
