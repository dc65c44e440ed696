"""Small questions on texts, and the metric of SQuAD's official scripts."""

from __future__ import annotations

import collections
import json
import random
import re
import string
from pathlib import Path

from conftest import ANIMAL, FILLER, FRUIT, TOOL

KINDS = {"fruit": FRUIT, "tool": TOOL, "animal": ANIMAL}
SIGNS = {"fruit": "apple", "tool": "hammer", "animal": "cat"}  # a word of the kind stands for the question


def articles(count: int, seed: int = 0, words: int = 6, answerless: bool = False) -> list[dict]:
    """Articles of SQuAD's form: each text has one fruit, one tool and, unless `answerless`, one animal; the questions
    ask for one each."""
    draw, found = random.Random(seed), []
    for number in range(count):
        inside = dict(fruit=draw.choice(FRUIT[1:]), tool=draw.choice(TOOL[1:]))
        if not answerless:
            inside["animal"] = draw.choice(ANIMAL[1:])
        text = draw.choices(FILLER, k=words)
        for word in inside.values():
            text.insert(draw.randrange(len(text) + 1), word)
        context = " ".join(text)
        qas = []
        for kind in KINDS:
            answers = [{"text": inside[kind], "answer_start": context.index(f" {inside[kind]} ") + 1
                        if f" {inside[kind]} " in context else context.index(inside[kind])}] if kind in inside else []  # fmt: skip
            qa = {"id": f"{seed}-{number}-{kind}", "question": f"the {SIGNS[kind]} here", "answers": answers}
            qas.append({**qa, "is_impossible": not answers} if answerless else qa)
        found.append({"title": f"article {number}", "paragraphs": [{"context": context, "qas": qas}]})
    return found


def write_squad(path: Path, data: list[dict]) -> Path:
    path.write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")
    return path


# What follows is the arithmetic of evaluate-v1.1.py and evaluate-v2.0.py of SQuAD, function by function.


def normalize_answer(s):
    def remove_articles(text):
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def f1_1(prediction, ground_truth):
    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(ground_truth).split()
    common = collections.Counter(prediction_tokens) & collections.Counter(ground_truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def official_1(golds, prediction):
    """Exact match and F1 of evaluate-v1.1."""
    exact = max(normalize_answer(prediction) == normalize_answer(gold) for gold in golds)
    return float(exact), max(f1_1(prediction, gold) for gold in golds)


def f1_2(a_gold, a_pred):
    gold_toks = normalize_answer(a_gold).split() if a_gold else []
    pred_toks = normalize_answer(a_pred).split() if a_pred else []
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def official_2(golds, prediction):
    """Exact match and F1 of evaluate-v2.0."""
    gold_answers = [gold for gold in golds if normalize_answer(gold)]
    if not gold_answers:
        gold_answers = [""]
    exact = max(int(normalize_answer(gold) == normalize_answer(prediction)) for gold in gold_answers)
    return float(exact), max(f1_2(gold, prediction) for gold in gold_answers)


def find_best_thresh(scores, na_probs, has_answer):
    """Best mean of scores, and threshold, of evaluate-v2.0: dicts by question id."""
    num_no_ans = sum(1 for k in has_answer if not has_answer[k])
    cur_score = best_score = num_no_ans
    best_thresh = 0.0
    for qid in sorted(na_probs, key=lambda k: na_probs[k]):
        cur_score += scores[qid] if has_answer[qid] else -1
        if cur_score > best_score:
            best_score, best_thresh = cur_score, na_probs[qid]
    return best_score / len(scores), best_thresh
