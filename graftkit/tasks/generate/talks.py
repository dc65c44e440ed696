"""Rows of messages: validated, with their tools, and optionally split into one row for each answer."""

from __future__ import annotations

from typing import Any

from graftkit.data.messages import Message, answer_text, read_messages, read_tools
from graftkit.data.split import hold_out
from graftkit.data.table import Table
from graftkit.tasks.base import Examples, check_rows
from graftkit.tasks.generate.data import Dialogues


def read_talks(table: Table, columns: dict[str, str], skip_bad: bool, targets: bool, each: bool) -> Dialogues:
    """Validate rows of messages. `each`: make one row for each answer, with the row number of its conversation."""
    talks: list[list[Message]] = []
    tools: list[Any] = []

    def problem(row: int) -> str | None:
        found = read_messages(table.columns[columns["messages"]][row])
        if isinstance(found, list) and targets and found[-1]["role"] != "assistant":
            found = f"ends with a message of {found[-1]['role']!r}, not of the assistant: there is no answer to learn"
        known = read_tools(table.columns[columns["tools"]][row]) if "tools" in columns else None
        for name, value in (("messages", found), ("tools", known)):
            if isinstance(value, str):
                return f"{table.where(row)}: column {columns[name]!r} {value}."
        assert isinstance(found, list)
        talks.append(found)
        tools.append(known)
        return None

    kept, skipped = check_rows(table, problem, skip_bad)
    ends = [
        (row, end)
        for row, talk in enumerate(talks)
        for end in range(1, len(talk) + 1)
        if end == len(talk) or (each and talk[end - 1]["role"] == "assistant")
    ]
    answered = [talks[row][end - 1]["role"] == "assistant" for row, end in ends]
    values: dict[str, list[Any]] = {
        "messages": [talks[row][: end - said] for (row, end), said in zip(ends, answered)]
    }
    if "tools" in columns:
        values["tools"] = [tools[row] for row, _ in ends]
    if not targets:
        return Dialogues(kept, values, None, skipped, skip_bad)
    values["completion"] = [talks[row][end - 1] for row, end in ends]
    answers = [answer_text(message) for message in values["completion"]]
    return Dialogues(kept.take([row for row, _ in ends]), values, answers, skipped, skip_bad, each)


def hold_out_talks(examples: Examples, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows into row numbers to train on and to evaluate on, keeping the rows of a conversation together."""
    numbers = list(dict.fromkeys(examples.table.numbers))
    held = {numbers[place] for place in hold_out([0] * len(numbers), share, seed)[1]}
    rows = list(enumerate(examples.table.numbers))
    return [row for row, number in rows if number not in held], [
        row for row, number in rows if number in held
    ]
