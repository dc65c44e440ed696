"""New tokens: rows of the word embedding, and of the output layer, for tokens that the tokenizer does not have yet."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import base_modules, features, is_linear
from graftkit.backbone.weights import input_of
from graftkit.errors import UserError, listing
from graftkit.methods.base import Addition, Method, labels_of, multiply, place
from graftkit.methods.shared.advice import general
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class NewTokens(Method):
    """Tokens are added to the tokenizer, and a row is trained for each of them; the rows of all others stay as they are.

    At the word embedding, the trained rows stand in for what the table would give. At the output layer of a language
    model they give the logits of the new tokens: the same rows where the model ties the two, and rows of their own
    where it does not. Outputs are those of a model that was enlarged by `resize_token_embeddings` and has these rows, but
    the model keeps its size, its parameters and their names. Each row starts as the mean of all old ones (Hewitt 2021,
    'Initializing New Word Embeddings for Pretrained Language Models').
    The backbone gets a copy of its tokenizer with the tokens, `graft.backbone.processor`, until the graft is detached.
    A saved graft names its tokens and their first id: `load` adds them again, and refuses a tokenizer that gives them
    other ids.
    When: texts have words or marks of their own that stand for one thing each, such as '<order>' or '<card>'.
    Parameters: tokens * width, twice that for a language model with an output layer of its own.
    """

    stage: ClassVar[int] = 3  # behind updates of the embedding, which know nothing of ids beyond its rows

    tokens: tuple = option((), "the tokens to add, such as ['<order>', '<card>']")
    special: bool = option(False, "they are marks and no text: written answers leave them out")
    first_id: int | None = option(
        None, "id of the first, which a saved graft fills in; null means the tokenizer's next", at_least=1
    )
    lr: float | None = option(None, "learning rate; null means 0.001", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [token for token in self.tokens if not isinstance(token, str) or not token.strip()]
        if not self.tokens or wrong:
            found = f", and {listing(map(repr, wrong), 4)} is none" if wrong else ""
            raise UserError(
                f"new_tokens() needs the texts of one or more tokens{found}: new_tokens(['<order>', '<card>'])."
            )
        twice = [token for token in dict.fromkeys(self.tokens) if self.tokens.count(token) > 1]
        if twice:
            raise UserError(f"new_tokens(): {listing(map(repr, twice), 4)} stands there twice; name it once.")

    def resolve(self, backbone: Backbone) -> NewTokens:
        """The same with the id of the first token."""
        tables_of(backbone)  # a model that reads no tokens is told as such, not as one without a tokenizer
        grown = self._grown(backbone)
        return self if grown is None else dataclasses.replace(self, first_id=grown[1])

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        tables = tables_of(backbone)
        grown = self._grown(backbone)
        first = self.first_id if grown is None else grown[1]
        assert first is not None
        table: Any = next(iter(tables.values()))
        output = output_of(backbone, table)
        sizes = [table.num_embeddings] + ([features(output)[1]] if output is not None else [])
        if first > min(sizes):
            raise UserError(
                f"new_tokens(): the new tokens have ids from {first:,} on, but {backbone.source} has rows for {min(sizes):,} "
                "tokens, so that some in between would have none. Use a tokenizer that belongs to the model."
            )
        name, count, rows = f"new_tokens_{graft}", len(self.tokens), None
        for module in tables.values():
            added = InputRows(first, count, self._mean(table.weight, first) if rows is None else rows)
            rows = rows or added
            place(module, name, added)
        if output is not None:
            tied = _are_tied(backbone, table, output)
            place(
                output,
                name,
                OutputColumns(first, count, rows if tied else self._mean(output.weight, first)),  # type: ignore[arg-type]
            )
            _refuse_bias_of_all(backbone, first + count)
            if first + count > features(output)[1]:
                place(backbone.model, name, WiderLoss(first + count))
        if grown is not None:
            backbone.processor = grown[0]
        group = Group("added", self.lr or 1e-3, self.name, self.lr is not None)
        ending = f".{name}" if name else ""
        owners = [
            n for n, m in backbone.model.named_modules() if n.endswith(ending) and isinstance(m, NewRows)
        ]
        return {key: value for owner in owners for key, value in labels_of(backbone, owner, group).items()}

    def _mean(self, weight: Tensor, first: int) -> Tensor:
        """The rows to start from, (tokens, width), in fp32."""
        mean = weight.detach()[:first].mean(dim=0, dtype=torch.float32)
        return mean.expand(len(self.tokens), -1)

    def _grown(self, backbone: Backbone) -> tuple[Any, int] | None:
        """A copy of the tokenizer with the tokens, and the id of the first; None for a graft that needs none."""
        tokenizer = backbone.processor
        if not hasattr(tokenizer, "add_tokens"):
            if self.first_id is not None:
                return None
            raise UserError(
                f"new_tokens() adds tokens to a tokenizer, and {backbone.source} was given without one: pass "
                "graftkit.Backbone(model, tokenizer) instead of the model alone."
            )
        vocabulary = tokenizer.get_vocab()
        there = [token for token in self.tokens if token in vocabulary]
        if there and [vocabulary.get(token) for token in self.tokens] != self._ids():
            raise UserError(
                f"new_tokens(): the tokenizer of {backbone.source} has {listing(map(repr, there), 4)} already; leave out "
                "what is there."
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(list(self.tokens), special_tokens=self.special)
        ids = [int(number) for number in tokenizer.convert_tokens_to_ids(list(self.tokens))]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise UserError(
                f"new_tokens(): the tokenizer of {backbone.source} gives the tokens the ids {listing(map(str, ids), 6)}, "
                "which do not follow one another. Name tokens that it does not take apart or change."
            )
        if self.first_id is not None and ids[0] != self.first_id:
            raise UserError(
                f"new_tokens(): the tokens were trained with ids from {self.first_id:,} on, but the tokenizer of "
                f"{backbone.source} gives them ids from {ids[0]:,} on: tokens were added to it, or taken away, since then. "
                "Use the tokenizer of that time, or train the tokens again."
            )
        return tokenizer, ids[0]

    def _ids(self) -> list[int] | None:
        """The ids of the tokens, once they are known."""
        first = self.first_id
        return None if first is None else list(range(first, first + len(self.tokens)))

    def never_folds(self) -> str:
        return (
            "new_tokens() cannot be folded: the plain model has no rows for the new tokens, and folding changes values, not "
            "sizes. Keep the graft folder and load it with graftkit.load; or save a model and a tokenizer that have the tokens "
            f"(tokenizer.add_tokens, then model.resize_token_embeddings(len(tokenizer))), and train that with {general()}."
        )


class NewRows(Addition):
    """Rows for the ids from `first` on, (tokens, width) in fp32: its own, or those of another addition.

    The first id is part of the parameter's name, so that no values come to other tokens than theirs.
    """

    def __init__(self, first: int, count: int, rows: Tensor | NewRows) -> None:
        super().__init__()
        self.first, self.count = first, count
        if isinstance(rows, NewRows):
            self.__dict__["owner"] = rows  # no child: its parameter has one name
        else:
            self.__dict__["owner"] = None
            self.register_parameter(f"rows_{first}", nn.Parameter(rows.clone()))

    @property
    def rows(self) -> Tensor:
        owner: NewRows = self.__dict__["owner"] or self
        return owner.get_parameter(f"rows_{self.first}")

    @classmethod
    def mix(cls, members: Any, weights: Tensor, site: nn.Module) -> Any:
        raise NotImplementedError("new tokens have one row for a whole batch")


class InputRows(NewRows):
    """At the word embedding: trained rows in the places of new tokens."""

    lone = True

    def __init__(self, first: int, count: int, rows: Tensor | NewRows) -> None:
        super().__init__(first, count, rows)
        self.ids_until = first + count
        self.__dict__["ids"] = None  # of the call that is under way

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        ids = input_of(args, kwargs)
        known = ids.masked_fill(self._new(ids), 0)
        self.__dict__["ids"] = ids
        return ((known, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): known})

    def after(self, site: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        ids, self.__dict__["ids"] = self.__dict__["ids"], None
        chosen = nn.functional.embedding((ids - self.first).clamp(0, self.count - 1), self.rows)
        chosen = chosen.to(output.dtype)
        scale = getattr(site, "embed_scale", None)  # of embeddings that multiply what they found
        if scale is not None:
            chosen = chosen * (scale.to(output.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(self._new(ids).unsqueeze(-1), chosen, output)

    def _new(self, ids: Tensor) -> Tensor:
        return (ids >= self.first) & (ids < self.first + self.count)


class OutputColumns(NewRows):
    """At the output layer: logits of the new tokens, in the place of columns that no token had, and behind the last."""

    each_row_alone = True

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x, rows = input_of(args, kwargs), self.rows
        if not x.is_meta and not torch.is_autocast_enabled(x.device.type):
            rows = rows.to(x.dtype)
        new = multiply(x, rows).to(output.dtype)
        return torch.cat([output[..., : self.first], new, output[..., self.first + self.count :]], dim=-1)


class WiderLoss(Addition):
    """At the model: the size of its vocabulary, by which its own loss shapes logits, counts new tokens during a call."""

    replaces = True
    changes_outputs = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.__dict__["sizes"] = []

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for holder in _holders(site):
            self.__dict__["sizes"].append((holder, holder.vocab_size))
            holder.vocab_size = self.size

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        for holder, size in self.__dict__["sizes"]:
            holder.vocab_size = size
        self.__dict__["sizes"].clear()
        return output


def _holders(model: Any) -> list[Any]:
    """What says the size of the vocabulary to a model's loss."""
    config: Any = getattr(model, "config", None)
    texts = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = [
        holder for holder in (model, config, texts) if isinstance(getattr(holder, "vocab_size", None), int)
    ]
    return list({id(holder): holder for holder in found}.values())


def tables_of(backbone: Backbone) -> dict[str, nn.Embedding]:
    """The word embedding by name, and every other module that has the same weight; raises `UserError` without one."""
    model: Any = backbone.model
    modules = {name: m for name, m in base_modules(model) if isinstance(m, nn.Embedding)}
    if hasattr(model, "get_input_embeddings"):
        try:
            table = model.get_input_embeddings()
        except (AttributeError, NotImplementedError, KeyError):
            table = None
    else:
        table = next(iter(modules.values())) if len(modules) == 1 else None
    if not isinstance(table, nn.Embedding):
        several = not hasattr(model, "get_input_embeddings") and len(modules) > 1
        why = (
            f"{listing(modules, 4)} of {type(model).__name__} could each be it: give the module a method "
            f"get_input_embeddings() that returns it, or use {general()} instead."
            if several
            else f"{type(model).__name__} reads no tokens; use {general()} instead."
        )
        raise UserError(f"new_tokens() adds rows to a model's word embedding, and {why}")
    if type(table) is not nn.Embedding and "ScaledWordEmbedding" not in type(table).__name__:
        raise UserError(
            f"new_tokens() knows what a plain word embedding gives for a row, and that of {type(model).__name__} is a "
            f"{type(table).__name__}; use {general()} instead."
        )
    _refuse_second_table(model, table)
    return {name: module for name, module in modules.items() if module.weight is table.weight}


def _refuse_second_table(model: Any, table: nn.Embedding) -> None:
    """Raise `UserError` for a decoder that looks its tokens up in a table of its own."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    own = model.get_decoder().get_input_embeddings()
    tied = own is None or own.weight is table.weight or (own.weight.is_meta and _says_tied(model))
    if not tied:
        raise UserError(
            f"new_tokens() adds rows to one word embedding, and the decoder of {type(model).__name__} has another one than "
            f"the encoder; use {general()} instead."
        )


def output_of(backbone: Backbone, table: nn.Embedding) -> Any:
    """The output layer of a language model, which gives a logit for each token; None where there is none."""
    find = getattr(backbone.model, "get_output_embeddings", None)
    output: Any = find() if find is not None else None
    if output is None:
        return None
    if not is_linear(output) or features(output)[0] != output.weight.shape[-1]:
        raise UserError(
            f"new_tokens() adds columns to a plain output layer, and that of {type(backbone.model).__name__} is a "
            f"{type(output).__name__}; use {general()} instead."
        )
    return output


def _are_tied(backbone: Backbone, table: nn.Embedding, output: Any) -> bool:
    """Whether embedding and output layer are one parameter. On the meta device, moving a model parts them."""
    return output.weight is table.weight or (output.weight.is_meta and _says_tied(backbone.model))


def _says_tied(model: Any) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "tie_word_embeddings", False))


def _refuse_bias_of_all(backbone: Backbone, count: int) -> None:
    """Raise `UserError` for a model that adds a vector of its own to all logits."""
    bias = getattr(backbone.model, "final_logits_bias", None)
    if isinstance(bias, Tensor) and bias.shape[-1] < count:
        raise UserError(
            f"new_tokens() adds logits behind those of {type(backbone.model).__name__}, to which it adds a bias of "
            f"{bias.shape[-1]:,} (final_logits_bias), so that they do not fit; use {general()} instead."
        )
