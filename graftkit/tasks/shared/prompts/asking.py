"""Build prompts of rows as token ids for one model, and score words after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.errors import UserError
from graftkit.tasks.base import Examples, Task
from graftkit.tasks.shared.blanks import marks_of
from graftkit.tasks.shared.prompts.scores import Move, Prompt, causal_scores, masked_scores, padded
from graftkit.tasks.shared.prompts.template import Template
from graftkit.tasks.shared.texts import tokenizer_of

NO_CONTENT = (
    "N/A",
    "",
)  # Zhao et al. 2021 have the mask's name as a third, which a masked model would fill in


class Asking:
    """A prompt with its words and examples, for the tokenizer of one model. Raises `UserError` if they do not fit it."""

    def __init__(
        self,
        template: Template,
        words: Mapping[str, str],
        shots: Sequence[Sequence[str]],
        separator: str,
        score: str,
        backbone: Backbone,
        task: Task,
        max_length: int,
        columns: Sequence[str],
    ) -> None:
        self.template, self.shots, self.max_length, self.columns = template, shots, max_length, columns
        self.separator, self.mean = separator, score == "mean"
        self.tokenizer = tokenizer_of(backbone, task)
        self.masked = _is_masked(backbone)
        blanks = getattr(backbone.model, "fills_blanks", False)
        self.opening = marks_of(self.tokenizer, f"{task.name}()").start if blanks else None
        if not self.masked and {name for _, name in template.after} & set(columns):
            raise UserError(
                f"{backbone.source} is a causal model, which reads from left to right, so all texts stand before the "
                "answer; put {label} behind {text} in the template."
            )
        self.solved = [template.fill(dict(zip(columns, shot)), words[shot[-1]]) + separator for shot in shots]
        self.words = [self._tokens(label, word) for label, word in words.items()]
        self._refuse_twins(words)
        self.lengths = sorted({len(word) for word in self.words}) if self.masked else [0]
        if self.opening is not None:
            self.lengths = [1]  # one mask for a word of any length
        probe = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self.tail = (
            0 if self.masked else next(i for i, added in enumerate(reversed([0, *probe])) if not added)
        )
        behind = max(map(len, self.words)) - (self.opening is None)
        self.room = max_length - (0 if self.masked and self.opening is None else behind)

    def _tokens(self, label: str, word: str) -> tuple[int, ...]:
        """Return the ids of a word in the prompt, including the space before it, if any."""
        lead = self.template.lead
        if self.template.before and not lead.strip():
            lead = f"a{lead or ' '}"  # some word, as the text would be
        before = lead.rstrip(" ")
        start = self._ids(before) if before else []
        whole = self._ids(lead + word)
        if whole[: len(start)] != start:
            raise UserError(
                f"this model's tokens join {before[-10:]!r}, the end of the template before {{label}}, with the word "
                f"{word!r}; put a space or a new line between them."
            )
        tokens = tuple(whole[len(start) :])
        unknown = self.tokenizer.unk_token_id
        if not tokens or (unknown is not None and unknown in tokens):
            raise UserError(
                f"the word {word!r} of label {label!r} is not in the model's vocabulary; name another one with "
                "words={label: word}."
            )
        return tokens

    def _refuse_twins(self, words: Mapping[str, str]) -> None:
        seen: dict[tuple[int, ...], str] = {}
        for word, tokens in zip(words.values(), self.words):
            if tokens in seen:
                raise UserError(
                    f"the words {seen[tokens]!r} and {word!r} are the same tokens to this model; nothing tells them "
                    "apart. Name others with words={label: word}."
                )
            seen[tokens] = word

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prompts(self, examples: Examples) -> list[Prompt]:
        """Return the prompt of each row, with as many of the first examples as fit."""
        rows = [dict(zip(examples.values, row)) for row in zip(*examples.values.values())]
        whole = self._encode(rows, len(self.shots))
        return [
            prompt if prompt.length <= self.room else self._shortened(row, examples.where(i))
            for i, (row, prompt) in enumerate(zip(rows, whole))
        ]

    def without_content(self, shots: int) -> list[Prompt]:
        """Return content-free prompts, except empty ones."""
        found = self._encode([dict.fromkeys(self.columns, text) for text in NO_CONTENT], shots)
        return [prompt for prompt in found if prompt.length]

    def _shortened(self, row: dict[str, str], where: str) -> Prompt:
        for shots in range(max(0, len(self.shots) - 1), -1, -1):
            prompt = self._encode([row], shots)[0]
            if prompt.length <= self.room:
                return prompt
        row = dict(row)
        while True:
            excess = prompt.length - self.room
            tokens = {name: self._ids(text) for name, text in row.items()}
            longest = max(tokens, key=lambda name: len(tokens[name]))
            kept = min(len(tokens[longest]) - 1, max(1, len(tokens[longest]) - excess))
            if kept < 1:
                raise UserError(
                    f"{where}: the template alone, without examples and with one token of each text, has more than "
                    f"{self.max_length} tokens; shorten the template, or raise data.max_length."
                )
            row[longest] = self._beginning(row[longest], tokens[longest], kept)
            prompt = self._encode([row], 0, cut=True)[0]
            if prompt.length <= self.room:
                return prompt

    def _beginning(self, text: str, tokens: Sequence[int], kept: int) -> str:
        if not self.tokenizer.is_fast:
            return self.tokenizer.decode(tokens[:kept])
        places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        shorter = text[: places[kept - 1][1]]
        return shorter if len(shorter) < len(text) else text[:-1]

    def _encode(self, rows: Sequence[Mapping[str, str]], shots: int, cut: bool = False) -> list[Prompt]:
        """Encode rows, each after the first `shots` examples."""
        context = "".join(self.solved[:shots])
        begun = [context + self.template.start(row) for row in rows]
        if not self.masked:
            found = self.tokenizer([text.rstrip(" ") for text in begun], verbose=False)["input_ids"]
            ids = (np.array(row[: len(row) - self.tail], dtype=np.int32) for row in found)
            return [Prompt({0: row}, {0: len(row)}, shots, cut) for row in ids]
        filled: dict[int, tuple[Any, list[int]]] = {}
        for length in self.lengths:
            masks = self.tokenizer.mask_token * length
            texts = [context + self.template.fill(row, masks) for row in rows]
            found = self.tokenizer(texts, return_offsets_mapping=self.tokenizer.is_fast, verbose=False)
            filled[length] = (
                found["input_ids"],
                [self._place(found, i, len(text)) for i, text in enumerate(begun)],
            )
        return [
            Prompt(
                {length: np.array(ids[i], dtype=np.int32) for length, (ids, _) in filled.items()},
                {length: places[i] for length, (_, places) in filled.items()}, shots, cut,
            )
            for i in range(len(rows))
        ]  # fmt: skip

    def _place(self, found: Mapping[str, Any], row: int, begins: int) -> int:
        """Return the position of the first mask at or after character `begins`: a row's text may contain mask tokens."""
        masks = [
            i for i, token in enumerate(found["input_ids"][row]) if token == self.tokenizer.mask_token_id
        ]
        if "offset_mapping" in found:
            masks = [i for i in masks if found["offset_mapping"][row][i][1] > begins]
        return masks[0]

    def scores(self, model: nn.Module, prompts: Sequence[Prompt], move: Move) -> Tensor:
        """Return the scores of all words, (rows, words), in fp32."""
        given = model, prompts, self.words, self.tokenizer.pad_token_id or 0, move
        whole = self.masked and self.opening is None
        found = masked_scores(*given) if whole else causal_scores(*given, self.opening)
        if self.mean:
            found = found / found.new_tensor([len(word) for word in self.words])
        return found

    def padded(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Return model inputs for the shortest form of each prompt."""
        return padded([prompt.ids[self.lengths[0]] for prompt in prompts], self.tokenizer.pad_token_id or 0)

    def rendered(self, prompt: Prompt) -> str:
        """Return a prompt decoded from its tokens, and the words that are scored."""
        text = self.tokenizer.decode(prompt.ids[self.lengths[0]])
        words = ", ".join(repr(self.tokenizer.decode(word)) for word in self.words[:8])
        where = "in place of the mask" if self.masked else "next"
        return f"{text}\n\n({where}: {words}{', ...' if len(self.words) > 8 else ''})"


def _is_masked(backbone: Backbone) -> bool:
    """Return whether a model reads a mask in the place of the answer; otherwise it is causal."""
    from transformers.models.auto import modeling_auto

    kind = type(backbone.model).__name__
    if getattr(getattr(backbone.model, "config", None), "is_encoder_decoder", False):
        raise UserError(
            f"{backbone.source} has an encoder and a decoder, which prompting() does not ask; name a causal or a masked "
            "language model."
        )
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return masked or getattr(backbone.model, "fills_blanks", False)
