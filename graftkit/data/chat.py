"""Conversations as a model reads them: rendered by a chat template, with what is to be learned marked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.errors import UserError, first_line, listing, nearest

ROLES = ("system", "user", "assistant", "tool")
END = "<|im_end|>"  # of a turn in ChatML; the tokenizer's end token stands in where it has no such token
TEMPLATES = {  # newlines within expressions: one behind a block would be dropped
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% elif messages[0].get('input') %}"
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.{% else %}Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.{% endif %}"
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
        "{% elif message['role'] != 'system' %}"
        "{{ '\\n\\n### Instruction:\\n' + message.get('instruction', message['content']) }}"
        "{% if message.get('input') %}{{ '\\n\\n### Input:\\n' + message['input'] }}{% endif %}"
        "{{ '\\n\\n### Response:\\n' }}{% endif %}{% endfor %}"
    ),
    "plain": (
        "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}"
        "{% elif not message['content'][-1:].isspace() %}{{ '\\n' }}{% endif %}{% endfor %}"
    ),
}
PROBE = "the-answer-of-the-probe"

Message = dict[str, str]


class TemplateFails(Exception):
    """What is wrong with a conversation, as its template sees it."""


def check_template(template: str | None, task: str) -> None:
    """Raise `UserError` for what is neither a template's name nor Jinja."""
    if template is not None and template not in TEMPLATES and "{" not in template:
        raise UserError(
            f"{task}(): template {template!r} is neither a name ({listing(TEMPLATES)}) nor a Jinja template."
            f"{nearest(template, TEMPLATES)}"
        )


def read_messages(value: Any) -> list[Message] | str:
    """The messages of one row, or what is wrong with them. A JSON text is read as what it says."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return "is a text, not a list of messages [{role: user, content: ...}, ...]"
    if value is None or (isinstance(value, list | tuple | np.ndarray) and not len(value)):
        return "is empty"
    if not isinstance(value, list | tuple | np.ndarray):
        return f"is a {type(value).__name__}, not a list of messages [{{role: user, content: ...}}, ...]"
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return f"has no role and content in message {number}"
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return f"has the unknown role {role!r} in message {number} (roles: {listing(ROLES)}){nearest(str(role), ROLES)}"
        if not isinstance(content, str) or (not content.strip() and role != "system"):
            what = "is empty" if content is None or isinstance(content, str) else "is no text"
            return f"has a message {number} of {role!r} whose content {what}"
        messages.append({str(key): item for key, item in message.items() if item is not None})
    return _order_problem([message["role"] for message in messages]) or messages


def _order_problem(roles: Sequence[str]) -> str | None:
    """What is wrong with the order: an optional system message, then user and assistant by turns."""
    for number, role in enumerate(roles, start=1):
        before = roles[number - 2] if number > 1 else None
        if role == "system" and number > 1:
            return f"has a system message as number {number}; there can be one, in front"
        wanted = {None: ("system", "user"), "system": ("user",), "user": ("assistant",),
                  "assistant": ("user", "tool"), "tool": ("assistant", "tool")}[before]  # fmt: skip
        if role not in wanted:
            where = "comes first" if before is None else f"follows one of {before!r}"
            return (
                f"has roles that do not alternate: message {number} of {role!r} {where}, where one of "
                f"{listing(wanted)} should be"
            )
    return None


@dataclass(frozen=True)
class Marked:
    """A text, the stretches of it that are learned (from, to, in characters), and how it becomes tokens.

    `special`: the tokenizer adds what it puts around texts; `close`: the end token follows, and is learned; `open`: what
    is learned only shows where the tokens of a prompt end, as a space there is often of the answer's first token.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    special: bool
    close: bool = False
    open: bool = False


class Template:
    """How a conversation is written for one tokenizer. Raises `UserError` where there is no way to."""

    def __init__(self, tokenizer: Any, wanted: str | None, source: str) -> None:
        self.tokenizer = tokenizer
        own = getattr(tokenizer, "chat_template", None)
        self.name = (
            wanted if wanted in TEMPLATES else "the tokenizer's own" if wanted is None else "the recipe's own"
        )
        self.given = wanted is not None or bool(own)
        self.special = wanted in TEMPLATES
        text = TEMPLATES.get(wanted or "", wanted)
        if wanted is None and not own:
            text, self.name, self.special = TEMPLATES["plain"], "plain", True
        if wanted == "chatml" and not _knows(tokenizer, END) and tokenizer.eos_token is not None:
            assert text is not None
            text = text.replace(END, tokenizer.eos_token)
        self.text = text
        self.source = source

    def write(self, messages: Sequence[Message], prompt: bool) -> str:
        """The conversation as text; `prompt`: up to where the assistant's answer begins. Raises `TemplateFails`."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.text, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # Jinja's own, or whatever the code within a template runs into
            whose = self.name if self.name == "the recipe's own" else f"{self.name}, of {self.source}"
            reason = first_line(error).rstrip(".")
            if type(error).__name__ == "TemplateSyntaxError":  # for any row
                raise UserError(f"the chat template ({whose}) is not valid Jinja: {reason}.") from None
            raise TemplateFails(f"the chat template ({whose}) fails: {reason}") from None

    def mark(self, messages: Sequence[Message], everything: bool) -> Marked:
        """A conversation with its assistant's turns, ends included, to be learned.

        Where each begins and ends is found by writing the conversation up to there: no template tells it.
        """
        whole = self.write(messages, False)
        spans, close = [], False
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, asked = self.write(messages[:place], False), self.write(messages[:place], True)
            after = whole if place == len(messages) - 1 else self.write(messages[: place + 1], False)
            start = _common(asked, after)
            if not whole.startswith(after) or start < _common(before, after) or start < len(before.rstrip()):
                raise TemplateFails(
                    f"the chat template ({self.name}, of {self.source}) writes the turns before message {place + 1} "
                    "otherwise once later ones are there, so that what is learned cannot be told apart; give each "
                    "answer as a row of its own, or another template"
                )
            end = max(start, len(after.rstrip()))
            close = after[start:end].endswith(message["content"].strip())  # nothing ends the turn
            if close and place < len(messages) - 1:
                end = len(after)  # but white space
            spans.append((start, end))
        text = whole[: spans[-1][1]] if close else whole
        return Marked(text, ((0, len(text)),) if everything else tuple(spans), self.special, close)

    def prompt(self, messages: Sequence[Message]) -> Marked:
        """A conversation up to where the assistant's answer begins."""
        text = self.write(messages, True)
        return Marked(f"{text}a", ((len(text), len(text) + 1),), self.special, open=True)

    def end(self) -> str:
        """What the template writes behind an answer; empty where it writes nothing."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        try:
            return self.write(messages, False).rpartition(PROBE)[2].strip()
        except TemplateFails:
            return ""


def _knows(tokenizer: Any, token: str) -> bool:
    return token in tokenizer.get_vocab()


def _common(left: str, right: str) -> int:
    """How many characters two texts begin with alike."""
    if right.startswith(left):
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def tokens_of(tokenizer: Any, texts: Sequence[Marked]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, learned) of each text, (tokens,) int32 and bool. A token is learned if any of its characters is.

    Of what the tokenizer puts around a text only the front stays: the end token is `close`'s to set. The first token
    is never learned, since nothing stands before it.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    if not texts:
        return found
    special = texts[0].special
    encoding = tokenizer(
        [text.text for text in texts], add_special_tokens=special, return_offsets_mapping=True,
        return_special_tokens_mask=True, return_attention_mask=False, verbose=False,
    )  # fmt: skip
    for i, text in enumerate(texts):
        ids = np.asarray(encoding["input_ids"][i], dtype=np.int32)
        offsets = np.asarray(encoding["offset_mapping"][i], dtype=np.int64).reshape(-1, 2)
        added = (offsets[:, 0] == offsets[:, 1]) & np.asarray(encoding["special_tokens_mask"][i], dtype=bool)
        size = len(ids)
        while size and added[size - 1]:
            size -= 1
        ids, offsets = ids[:size], offsets[:size]
        learned = np.zeros(size, dtype=bool)
        for start, end in text.learned:
            learned |= (offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
        end_token = tokenizer.eos_token_id
        if text.close and end_token is not None and not (size and ids[-1] == end_token):
            ids, learned = np.append(ids, np.int32(end_token)), np.append(learned, True)
        if text.open:
            ids = ids[: int(learned.argmax())]
            learned = np.ones(len(ids), dtype=bool)
        learned[:1] = False
        found.append((ids, learned))
    return found
