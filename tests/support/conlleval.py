"""What conlleval.pl (Tjong Kim Sang, 1999 to 2004) computes, from its published algorithm: one pass over the lines, with
the state of the sentence in a few variables. The tests compare with it; nothing of ours is used here."""

from __future__ import annotations

from collections import Counter


def conlleval(wanted: list[list[str]], guessed: list[list[str]]) -> dict:
    """Percentages as fractions: accuracy, precision, recall, f1, and by type (precision, recall, f1)."""
    correct_chunk, found_correct, found_guessed = Counter(), Counter(), Counter()
    correct_tags = tokens = 0
    in_correct = False
    last_correct = last_guessed = "O"
    last_correct_type = last_guessed_type = ""
    for gold, guess in zip(wanted, guessed):
        for correct, guessing in [*zip(gold, guess), ("O", "O")]:  # a boundary reads as O
            correct_tag, _, correct_type = correct.partition("-")
            guess_tag, _, guess_type = guessing.partition("-")
            if in_correct:
                ends = end_of_chunk(last_correct, correct_tag, last_correct_type, correct_type)
                guess_ends = end_of_chunk(last_guessed, guess_tag, last_guessed_type, guess_type)
                if ends and guess_ends and last_guessed_type == last_correct_type:
                    in_correct = False
                    correct_chunk[last_correct_type] += 1
                elif ends != guess_ends or guess_type != correct_type:
                    in_correct = False
            starts = start_of_chunk(last_correct, correct_tag, last_correct_type, correct_type)
            guess_starts = start_of_chunk(last_guessed, guess_tag, last_guessed_type, guess_type)
            if starts and guess_starts and guess_type == correct_type:
                in_correct = True
            found_correct[correct_type] += starts
            found_guessed[guess_type] += guess_starts
            correct_tags += correct_tag == guess_tag and guess_type == correct_type
            tokens += 1
            last_correct, last_guessed = correct_tag, guess_tag
            last_correct_type, last_guessed_type = correct_type, guess_type
        correct_tags, tokens = correct_tags - 1, tokens - 1  # the boundary is no token

    def figures(right: int, guesses: int, golds: int) -> tuple[float, float, float]:
        precision = right / guesses if guesses else 0.0
        recall = right / golds if golds else 0.0
        both = precision + recall
        return precision, recall, 2 * precision * recall / both if both else 0.0

    precision, recall, f1 = figures(correct_chunk.total(), found_guessed.total(), found_correct.total())
    types = sorted(kind for kind in {*found_correct, *found_guessed} if kind)
    return {
        "accuracy": correct_tags / tokens,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "types": {
            kind: figures(correct_chunk[kind], found_guessed[kind], found_correct[kind]) for kind in types
        },
    }


def end_of_chunk(before: str, tag: str, type_before: str, kind: str) -> bool:
    pairs = {"BB", "BO", "IB", "IO", "EE", "EI", "EO"}
    return before + tag in pairs or (before not in "O." and type_before != kind)


def start_of_chunk(before: str, tag: str, type_before: str, kind: str) -> bool:
    pairs = {"BB", "IB", "OB", "OI", "EE", "EI", "OE"}
    return before + tag in pairs or (tag not in "O." and type_before != kind)
