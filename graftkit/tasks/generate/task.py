"""Instruction tuning: a language model learns to answer, or to go on with texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.backbone.fit import check_token_ids
from graftkit.data.chat import Template, check_template
from graftkit.data.columns import Column
from graftkit.data.read import Table
from graftkit.data.source import Batch
from graftkit.errors import UserError
from graftkit.recipe.catalogue import option
from graftkit.tasks.base import Calls, Dataset, Examples, Learn, Task, Term, check_rows, one_term
from graftkit.tasks.generate.data import (
    Dialogues,
    GenerateDataset,
    PromptedDataset,
    causal_rows,
    cut,
    good_rows,
    marked_text,
    packed_groups,
    prompted_rows,
    start_of,
)
from graftkit.tasks.generate.scores import LABEL, MEAN, OTHER
from graftkit.tasks.generate.talks import hold_out_talks, read_talks
from graftkit.tasks.generate.text import Writing, ends_of, room_for, write
from graftkit.tasks.shared.items import check_kinds
from graftkit.tasks.shared.labels import is_missing
from graftkit.tasks.shared.texts import made_up_texts, text_problem, tokenizer_of

PROMPT = ("instruction", "question", "query", "source", "article", "document")
COMPLETION = ("output", "answer", "response", "target", "summary", "translation", "reply")
MESSAGES = ("conversations", "conversation", "dialogue", "dialog", "chat")
FORMATS = "'prompt' and 'completion', or 'messages', or 'text'"


@dataclass(frozen=True)
class Answered:
    """What is kept of one row: log probability of each learned token and of the likeliest other one, (tokens, 2);
    and what the model wrote itself, where it was asked to."""

    scores: np.ndarray | None
    text: str | None = None


@dataclass(frozen=True)
class Generate(Task):
    """Answers to instructions, written by a causal model or by an encoder and a decoder; or texts gone on with.

    Rows are a prompt (and an input) with a completion, or messages with roles, or plain texts.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("prompt", PROMPT, "prompt", required=False),
        Column("input", ("context",), "input", required=False),
        Column("completion", COMPLETION, "completion", required=False),
        Column("messages", MESSAGES, "messages", required=False),
        Column("tools", ("functions",), "messages", required=False),
        Column("text", ("content",), "text", required=False),
    )
    labelled: ClassVar[tuple[str, ...]] = ("completion",)
    method: ClassVar[str] = "lora()"
    head: ClassVar[bool] = False
    headline: ClassVar[tuple[str, ...]] = ("perplexity", "exact_match", "token_accuracy")
    directions: ClassVar[Mapping[str, str | None]] = {"perplexity": "min", "loss": "min"}
    families: ClassVar[tuple[str, ...]] = ("SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM")
    using: ClassVar[tuple[str, ...]] = (
        "exact_match", "max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed",
    )  # fmt: skip

    template: str | None = option(
        None,
        "how messages are written: 'chatml', 'alpaca', 'plain' or a Jinja template; null means the tokenizer's",
    )
    loss: str = option(
        "completion", "what is learned: answers alone, or all tokens", choices=("completion", "all")
    )
    turns: str = option(
        "all",
        "of messages with several answers: 'all' in one row, or 'each' in a row of its own that ends there",
        choices=("all", "each"),
    )
    packing: bool = option(False, "several rows in one of data.max_length tokens, without seeing each other")
    exact_match: bool = option(False, "write answers in each evaluation and compare them, which takes long")
    max_new_tokens: int = option(128, "length of a written answer at most", at_least=1)
    temperature: float = option(0.0, "of sampling; 0 takes the likeliest token", at_least=0)
    top_p: float = option(1.0, "sample from the likeliest tokens of so much probability", above=0, at_most=1)
    top_k: int = option(0, "sample from so many tokens; 0 for all", at_least=0)
    stop: str | tuple | None = option(None, "a text, or several, that end an answer")
    seed: int = option(0, "of sampling", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template, self.name)

    # what is handed over

    def used(self, columns: Mapping[str, str], named: Mapping[str, str], table: Table) -> dict[str, str]:
        """The columns of one format: prompt and completion before messages before text, those that are named first."""
        found = dict(columns)
        if "prompt" not in found and "completion" in found and "input" in found:
            found["prompt"] = found.pop("input")
        formats = [("prompt", "input", "completion"), ("messages", "tools"), ("text",)]
        formats.sort(key=lambda names: not set(names) & set(named))
        for names in formats:
            if all(name in found for name in names if name not in ("input", "tools")):
                return {name: found[name] for name in names if name in found}
        raise UserError(
            f"{table.source} has columns {', '.join(map(repr, table.columns))}, but {self.name}() needs {FORMATS}. Name "
            "them with data.columns={prompt: ..., completion: ...}."
        )

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        if "messages" in columns:
            return read_talks(table, columns, skip_bad, targets, each=targets and self.turns == "each")

        def problem(row: int) -> str | None:
            for name in ("prompt", "text", "completion"):
                if name in columns and (targets or name != "completion"):
                    said = text_problem(table, columns[name], row)
                    if (
                        said is not None
                        and name == "completion"
                        and is_missing(table.columns[columns[name]][row])
                    ):
                        said = f"{said.rstrip('.')}, so there is nothing to learn."
                    if said is not None:
                        return said
            return None

        kept, skipped = check_rows(table, problem, skip_bad)
        values: dict[str, list[Any]] = {
            name: ["" if is_missing(value) else str(value) for value in kept.columns[columns[name]]]
            for name in ("prompt", "input", "text") if name in columns
        }  # fmt: skip
        answers = (
            [str(value) for value in kept.columns[columns["completion"]]]
            if "completion" in columns and targets
            else (values.get("text", []))
        )
        return Dialogues(kept, values, answers if targets else None, skipped, skip_bad)

    def hold_out(self, examples: Examples, share: float, seed: int) -> tuple[list[int], list[int]]:
        """Rows of one conversation stay together."""
        return hold_out_talks(examples, share, seed)

    def given(self, items: list[Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
        if not items:
            raise UserError("there is no prompt to answer; give one or more, or --data FILE.")
        check_kinds(items, (str,))
        tools = {columns["tools"]: None} if "tools" in columns else {}
        if all(isinstance(item, list) for item in items) and "messages" in columns:
            return [{columns["messages"]: item, **tools} for item in items]
        if not all(isinstance(item, str) for item in items):
            return None
        for number, item in enumerate(items, start=1):
            if not item.strip():
                raise UserError(f"prompt {number} of {len(items)} is empty; there is nothing to answer.")
        if "messages" in columns:
            return [{columns["messages"]: [{"role": "user", "content": item}], **tools} for item in items]
        more = {columns["input"]: ""} if "input" in columns else {}
        return [{columns["prompt" if "prompt" in columns else "text"]: item, **more} for item in items]

    def predict_arguments(self, columns: Mapping[str, str]) -> str:
        return '"a prompt"' if {"prompt", "messages"} & columns.keys() else '"a text"'

    def made_up(self, columns: Mapping[str, str], labels: Sequence[str]) -> list[Any]:
        return made_up_texts(labels)

    # what the model sees

    def settle(self, backbone: Backbone) -> None:
        """A template that the recipe names becomes the tokenizer's, and goes with it into an export."""
        tokenizer = backbone.processor
        if self.template is not None and hasattr(tokenizer, "chat_template"):
            tokenizer.chat_template = Template(tokenizer, self.template, backbone.source).text

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        assert isinstance(examples, Dialogues)
        model: Any = backbone.model
        tokenizer = tokenizer_of(backbone, self)
        if not hasattr(model, "generate") or model.get_output_embeddings() is None:
            raise UserError(
                f"{backbone.source} is no language model of transformers, which {self.name}() needs."
            )
        both = bool(model.config.is_encoder_decoder)
        if not both and not backbone.is_decoder and not getattr(model.config, "is_decoder", False):
            raise UserError(
                f"{backbone.source} ({type(model).__name__}) reads a text from both sides, so it cannot write one; "
                f"{self.name}() needs a causal language model, or an encoder with a decoder."
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer of {backbone.source} does not tell which characters its tokens are of, so that completions "
                f"cannot be told from prompts; {self.name}() needs a fast one (tokenizer.json)."
            )
        template = Template(tokenizer, self.template, backbone.source)
        if "messages" in examples.values and not template.given:
            raise UserError(
                f"rows of messages need a chat template, and the tokenizer of {backbone.source} has none; name one: "
                f"{self.name}(template='chatml')."
            )
        writing = None
        room = None
        if examples.targets is None or self.exact_match:
            room, new = room_for(model, self.max_new_tokens)
            ends, stop = ends_of(model, tokenizer, "" if "text" in examples.values else template.end())
            own = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
            writing = Writing(new, self.temperature, self.top_p, self.top_k, self.seed, ends, (*stop, *own))
        if both:
            self._refuse_both(examples, backbone)
            rows, problems = prompted_rows(examples, tokenizer, template, max_length)
        else:
            rows, problems = causal_rows(
                examples, tokenizer, template, max_length, self.loss == "all", writing is not None
            )
        for ids in ([row.ids for row in rows], [row.prompt for row in rows]):
            check_token_ids(backbone, ids, examples.where)
        kept, rows = good_rows(examples, rows, problems)
        rows, truncated = cut(rows, max_length, room, both)
        if both:
            return PromptedDataset(
                kept, rows, tokenizer, truncated=truncated, writing=writing, start=start_of(backbone)
            )
        groups = packed_groups(self, backbone, rows, max_length) if self.packing and training else None
        return GenerateDataset(kept, rows, tokenizer, groups, truncated, writing)

    def _refuse_both(self, examples: Examples, backbone: Backbone) -> None:
        what = f"{backbone.source} has an encoder and a decoder"
        if "text" in examples.values:
            raise UserError(
                f"{what}, so rows need a prompt and a completion; plain texts have one part only."
            )
        if self.packing:
            raise UserError(
                f"{self.name}(packing=True): {what}, and rows of such models are not packed; leave it out."
            )
        if self.loss == "all":
            raise UserError(
                f"{self.name}(loss='all'): {what}, and only the completion is written; leave it out."
            )

    def rendered(self, dataset: Dataset) -> str:
        assert isinstance(dataset, GenerateDataset)
        return (
            f"{marked_text(dataset.shown(0))}\n({_share(dataset)} tokens are learned, as marked in this row)"
        )

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        assert isinstance(dataset, GenerateDataset)
        found = super().statistics(dataset, labels)
        if dataset.packed:
            found["packed_rows"] = len(dataset)
        parts = [{"text": text, "learned": learned} for text, learned in dataset.shown(0)]
        found["learned"] = int(dataset.units.sum()) if dataset.answered else 0
        found["example"] = {"where": dataset.where(0), "parts": parts}
        return found

    # what is learned

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        """Cross-entropy over the learned tokens, summed by row."""

        def scores(found: Tensor, batch: Batch) -> Term:
            tokens = -(1 - label_smoothing) * found[:, LABEL] - label_smoothing * found[:, MEAN]
            counts = torch.from_numpy(dataset.units[batch.rows].astype(np.int64)).to(found.device)
            rows = torch.arange(len(counts), device=found.device).repeat_interleave(counts)
            losses = torch.zeros(len(counts), device=found.device).index_add(0, rows, tokens)
            return Term(losses, (found[:, LABEL] >= found[:, OTHER]).detach())

        return one_term(scores)

    # what comes out

    def outcomes(self, forward: Calls, batch: Batch) -> Sequence[Any]:
        dataset = batch.source
        assert isinstance(dataset, GenerateDataset)
        texts: list[str | None] = [None] * len(batch.rows)
        if dataset.writing is not None and "text" not in (
            dataset.examples.values if dataset.answered else ()
        ):
            texts = [*self._write(forward, dataset, batch.rows)]
        if not dataset.answered:
            return [Answered(None, text) for text in texts]
        found = forward(batch).float().cpu().numpy()[:, [LABEL, OTHER]]
        ends = np.cumsum(dataset.units[batch.rows].astype(int))[:-1]
        return [Answered(scores, text) for scores, text in zip(np.split(found, ends), texts)]

    def _write(
        self,
        forward: Calls,
        dataset: GenerateDataset,
        rows: np.ndarray,
        show: Callable[[str], None] | None = None,
    ) -> list[str]:
        assert dataset.writing is not None
        half = getattr(forward, "precision", "fp32") == "bf16"
        prompts = [dataset.prompts[row] for row in rows]
        return write(
            forward.graft.model, dataset.tokenizer, prompts, dataset.writing, forward.device, half, show
        )

    def stream(self, forward: Calls, dataset: Dataset, show: Callable[[str], None]) -> Sequence[Any]:
        assert isinstance(dataset, GenerateDataset)
        return [Answered(None, *self._write(forward, dataset, np.array([0]), show))]

    def metrics(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], intervals: bool = True
    ) -> dict[str, Any]:
        """Loss and perplexity by token, with an interval over rows; how many tokens, and whole answers, are right."""
        assert dataset.examples.targets is not None
        losses = np.array([-float(out.scores[:, 0].astype(np.float64).sum()) for out in outcomes])
        hits = sum(int((out.scores[:, 0] >= out.scores[:, 1]).sum()) for out in outcomes)
        tokens = np.array([len(out.scores) for out in outcomes])
        loss = float(losses.sum() / tokens.sum())
        error = 1.96 * float(np.sqrt(((losses - loss * tokens) ** 2).sum())) / float(tokens.sum())
        found: dict[str, Any] = {
            "loss": loss,
            "perplexity": _exp(loss),
            "perplexity_interval": [_exp(loss - error), _exp(loss + error)],
            "token_accuracy": hits / float(tokens.sum()),
            "tokens": int(tokens.sum()),
            "rows": len(outcomes),
        }
        if outcomes[0].text is not None:
            pairs = zip(outcomes, dataset.examples.targets)
            found["exact_match"] = float(
                np.mean([out.text.strip() == str(text).strip() for out, text in pairs])
            )
        return found

    def answers(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        return [{"completion": out.text} for out in outcomes]

    def asked(self, examples: Examples, row: int) -> dict[str, Any]:
        values = super().asked(examples, row)
        return {"prompt": values["text"]} if "text" in values else values

    def line(self, answer: dict[str, Any]) -> str:
        return str(answer["completion"])

    def worst(
        self, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        """The answers that the model found least likely by token, with the token that it expected least."""
        assert isinstance(dataset, GenerateDataset) and dataset.examples.targets is not None
        losses = np.array([-float(out.scores[:, 0].mean()) for out in outcomes])
        found = []
        for row in np.argsort(-losses)[:count].tolist():
            least = int(outcomes[row].scores[:, 0].argmin())
            token = dataset.tokenizer.decode([int(dataset.labels(np.array([row]))[least])])
            said = f"perplexity {_exp(losses[row]):.1f}, {token!r} expected least"
            found.append({
                "where": dataset.where(row), **self.asked(dataset.examples, row),
                "expected": dataset.examples.targets[row], "answer": outcomes[row].text or said,
                "loss": round(float(losses[row]), 4),
            })  # fmt: skip
        return found


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _share(dataset: GenerateDataset) -> str:
    return f"{int(dataset.units.sum()):,} of {int(dataset.lengths.sum()):,}"
