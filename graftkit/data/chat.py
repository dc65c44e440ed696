"""Render conversations with a chat template, and mark the parts to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from graftkit.data.messages import Message
from graftkit.data.template_limits import LONGEST, MEMORY, SECONDS, TooLong, has_power, limited
from graftkit.errors import UserError, first_line, listing, nearest

END = "<|im_end|>"  # of a turn in ChatML; the tokenizer's end token stands in where it has no such token
TEMPLATES = {  # newlines within expressions: one behind a block would be dropped
    "chatml": (
        "{% if tools %}{{ '<|im_start|>system\\n' }}{% if messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] + '\\n\\n' }}{% endif %}{{ '# Tools\\n\\n<tools>' }}{% for tool in tools %}"
        "{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}{% endif %}"
        "{% for message in messages %}{% if not (tools and loop.first and message['role'] == 'system') %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}"
        "{% for call in message.get('tool_calls') or [] %}{% if message['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
        "{{ '<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
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


Tools = Sequence[Mapping[str, Any]] | None


class TemplateFails(Exception):
    """A conversation that its chat template cannot render, or not in a usable way."""


def check_template(template: str | None, task: str) -> None:
    """Raise `UserError` if `template` is neither the name of a template nor Jinja."""
    if template is not None and template not in TEMPLATES and "{" not in template:
        raise UserError(
            f"{task}(): template {template!r} is neither a name ({listing(TEMPLATES)}) nor a Jinja template."
            f"{nearest(template, TEMPLATES)}"
        )


@dataclass(frozen=True)
class Marked:
    """A text, its spans to train on (start, end, in characters), and how it is tokenized.

    `special`: the tokenizer adds its special tokens; `close`: the end token follows, as a target; `open`: the span only
    marks where the tokens of a prompt end, because a space there often belongs to the answer's first token.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    special: bool
    close: bool = False
    open: bool = False


class Template:
    """The chat template of one tokenizer. Raises `UserError` if it is not valid."""

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
        used = [text] if text is not None else list(own.values()) if isinstance(own, Mapping) else [own]
        if any(isinstance(one, str) and has_power(one) for one in used):
            raise UserError(
                f"the chat template ({self.whose}) uses the operator '**', which can take forever; rewrite it, or name "
                f"another template ({listing(TEMPLATES)})."
            )

    def write(self, messages: Sequence[Message], prompt: bool, tools: Tools = None) -> str:
        """Render a conversation; `prompt`: up to where the assistant's answer begins. Raises `TemplateFails`.

        A tool call without a text has the content None, or an empty text for templates that cannot handle None.
        """
        try:
            return self._written(messages, prompt, tools)
        except TemplateFails:
            if all(message["content"] is not None for message in messages):
                raise
        return self._written([{**m, "content": m["content"] or ""} for m in messages], prompt, tools)

    def _written(self, messages: Sequence[Message], prompt: bool, tools: Tools) -> str:
        more = {} if tools is None else {"tools": list(tools)}
        try:
            with limited():
                written = self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self.text,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **more,
                )
            if len(written) > LONGEST:
                raise TemplateFails(
                    f"its text has {len(written):,} characters, and at most {LONGEST:,} are read"
                )
            return written
        except TooLong:
            raise UserError(
                f"the chat template ({self.whose}) takes more than {SECONDS:.0f} s for one conversation: it may have an "
                f"endless loop. Fix it, or name another template ({listing(TEMPLATES)})."
            ) from None
        except MemoryError:
            raise UserError(
                f"the chat template ({self.whose}) takes more than {MEMORY / 2**30:.0f} GB of memory for one conversation. "
                f"Fix it, or name another template ({listing(TEMPLATES)})."
            ) from None
        except Exception as error:  # Jinja's own, or whatever the code within a template runs into
            reason = first_line(error).rstrip(".")
            if type(error).__name__ == "TemplateSyntaxError":  # for any row
                raise UserError(f"the chat template ({self.whose}) is not valid Jinja: {reason}.") from None
            raise TemplateFails(f"the chat template ({self.whose}) fails: {reason}") from None

    @property
    def whose(self) -> str:
        return self.name if self.name == "the recipe's own" else f"{self.name}, of {self.source}"

    def mark(
        self, messages: Sequence[Message], everything: bool, tools: Tools = None, last: bool = False
    ) -> Marked:
        """Render a conversation and mark its assistant turns, including their ends, as targets; `last`: only the last one.

        The start and end of each turn are found by rendering the conversation up to there, as templates do not report them.
        """
        messages = [self._without_end(message) for message in messages]
        whole = self.write(messages, False, tools)
        if tools is not None and whole == self.write(messages, False):
            raise TemplateFails(
                f"the chat template ({self.whose}) does not write the tools of the row; name one that does, such as "
                "generate(template='chatml'), or leave the column out with data.columns={messages: ...}"
            )
        spans, close = [], False
        for place, message in enumerate(messages):
            if message["role"] != "assistant" or (last and place < len(messages) - 1):
                continue
            start, after = self._turn(messages, place, whole, tools)
            end = max(start, len(after.rstrip()))
            close = self._is_open(message, after[start:end])  # nothing ends the turn
            if close and place < len(messages) - 1:
                end = len(after)  # but white space
            spans.append((start, end))
        text = whole[: spans[-1][1]] if close else whole
        return Marked(text, ((0, len(text)),) if everything else tuple(spans), self.special, close)

    def _turn(self, messages: Sequence[Message], place: int, whole: str, tools: Tools) -> tuple[int, str]:
        """Return where the assistant turn at index `place` begins, and the conversation up to its end."""
        before, asked = (self.write(messages[:place], prompt, tools) for prompt in (False, True))
        after = whole if place == len(messages) - 1 else self.write(messages[: place + 1], False, tools)
        start = _common(asked, after)
        if not whole.startswith(after) or start < _common(before, after) or start < len(before.rstrip()):
            raise TemplateFails(
                f"the chat template ({self.whose}) writes the turns before message {place + 1} otherwise once later ones "
                "are there, so that what is learned cannot be told apart; let each answer be a row of its own with "
                "generate(turns='each'), or name another template"
            )
        for call in messages[place].get("tool_calls", ()):
            if call["function"]["name"] not in after[start:]:
                raise TemplateFails(
                    f"the chat template ({self.whose}) does not write the call of {call['function']['name']!r} in message "
                    f"{place + 1}; name one that writes tool_calls, such as generate(template='chatml')"
                )
        return start, after

    def _is_open(self, message: Message, written: str) -> bool:
        """Return whether the template writes no end after a turn."""
        if message.get("tool_calls"):
            return not self.end()
        return written.endswith(message["content"].strip())

    def _without_end(self, message: Message) -> Message:
        """Strip from an answer the end that the template or the tokenizer adds, so that it is not there twice."""
        content, shorter = message["content"], message["content"]
        if message["role"] != "assistant" or content is None:
            return message
        while end := next((end for end in self.ends if shorter.rstrip().endswith(end)), None):
            shorter = shorter.rstrip().removesuffix(end)
        return message if shorter == content or not shorter.strip() else {**message, "content": shorter}

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The texts that end an answer: what the template writes after one, and the tokenizer's end token."""
        return tuple(filter(None, dict.fromkeys([self.end(), self.tokenizer.eos_token])))

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> Marked:
        """Render a conversation up to where the assistant's answer begins."""
        text = self.write(messages, True, tools)
        return Marked(f"{text}a", ((len(text), len(text) + 1),), self.special, open=True)

    def end(self) -> str:
        """Return what the template writes after an answer; empty if it writes nothing."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        try:
            return self.write(messages, False).rpartition(PROBE)[2].strip()
        except TemplateFails:
            return ""


def _knows(tokenizer: Any, token: str) -> bool:
    return token in tokenizer.get_vocab()


def _common(left: str, right: str) -> int:
    """Return the length of the common prefix of two texts."""
    if right.startswith(left):
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def tokens_of(tokenizer: Any, texts: Sequence[Marked]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ids and loss mask of each text, (tokens,) int32 and bool. A token is a target if any of its characters is.

    Of the special tokens that the tokenizer adds, only those in front are kept, and not twice if a text begins with them
    already. The end token is added only with `close`. The first token is never a target, because nothing precedes it.
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
        begin = _doubled(ids[:size], added[:size], tokenizer.bos_token_id)
        ids, offsets, size = ids[begin:size], offsets[begin:size], size - begin
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


def _doubled(ids: np.ndarray, added: np.ndarray, begin: int | None) -> int:
    """Return how many tokens in front are duplicated: those that the tokenizer added, or the begin token."""
    front, dropped = int(np.argmin([*added, False])), 0
    if front and np.array_equal(ids[:front], ids[front : 2 * front]):
        dropped = front
    while begin is not None and len(ids) > dropped + 1 and ids[dropped] == ids[dropped + 1] == begin:
        dropped += 1
    return dropped
