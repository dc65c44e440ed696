"""New tokens: trained rows of the input embedding and the output layer for tokens that the tokenizer lacks."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import base_modules, features, is_linear
from graftkit.backbone.walk import modules_of
from graftkit.backbone.weights import input_of
from graftkit.errors import UserError, listing
from graftkit.methods.base import Addition, Method, labels_of, multiply, place
from graftkit.methods.shared.advice import general
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class NewTokens(Method):
    """Add tokens to the tokenizer and train an embedding row for each; the rows of all other tokens stay frozen.

    At the word embedding, the trained rows replace the output for new tokens. At the output layer of a language model they
    give the logits of the new tokens; if the model ties its embeddings, both use the same rows, otherwise each has its own.
    Outputs equal those of a model resized with `resize_token_embeddings` that has these rows, but the model keeps its size,
    its parameters and their names. Each row starts as the mean of all existing rows (Hewitt 2021, 'Initializing New Word
    Embeddings for Pretrained Language Models').
    Until the graft is detached, `graft.backbone.processor` is a copy of the tokenizer that has the new tokens. A saved graft
    stores its tokens and the id of the first one. `load` adds them again, and rejects a tokenizer that assigns other ids.
    When: texts contain domain-specific words or markers with a single meaning, such as '<order>' or '<card>'.
    Parameters: tokens * width, or twice that for a language model with untied embeddings.
    """

    stage: ClassVar[int] = 3  # after updates of the embedding, which cannot handle ids beyond its rows

    tokens: tuple = option((), "the tokens to add, such as ['<order>', '<card>']")
    special: bool = option(False, "add them as special tokens, which generated text leaves out")
    first_id: int | None = option(
        None, "id of the first token, stored in a saved graft; null means the tokenizer's next id", at_least=1
    )
    lr: float | None = option(None, "learning rate; null means 0.001", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [token for token in self.tokens if not isinstance(token, str) or not token.strip()]
        if not self.tokens or wrong:
            found = f", not {listing(map(repr, wrong), 4)}" if wrong else ""
            raise UserError(
                f"new_tokens() needs one or more non-empty strings{found}, such as new_tokens(['<order>', '<card>'])."
            )
        twice = [token for token in dict.fromkeys(self.tokens) if self.tokens.count(token) > 1]
        if twice:
            raise UserError(f"new_tokens(): {listing(map(repr, twice), 4)} is listed twice; list it once.")

    def resolve(self, backbone: Backbone) -> NewTokens:
        """Return the method with `first_id` filled in."""
        tables_of(backbone)  # before the tokenizer: a model without tokens gets the more specific error
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
                f"new_tokens(): the ids of the new tokens start at {first:,}, but {backbone.source} has "
                f"rows for only {min(sizes):,} tokens, so the ids in between have none. Use the tokenizer that belongs to "
                "the model."
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
            n for n, m in modules_of(backbone.model).items() if n.endswith(ending) and isinstance(m, NewRows)
        ]
        return {key: value for owner in owners for key, value in labels_of(backbone, owner, group).items()}

    def _mean(self, weight: Tensor, first: int) -> Tensor:
        """Return the initial rows, (tokens, width), in fp32."""
        mean = weight.detach()[:first].mean(dim=0, dtype=torch.float32)
        return mean.expand(len(self.tokens), -1)

    def _grown(self, backbone: Backbone) -> tuple[Any, int] | None:
        """Return a copy of the tokenizer with the tokens, and the id of the first one; None for a saved graft on a
        backbone without a tokenizer."""
        tokenizer = backbone.processor
        if not hasattr(tokenizer, "add_tokens"):
            if self.first_id is not None:
                return None
            raise UserError(
                f"new_tokens() adds tokens to a tokenizer, but {backbone.source} has none: pass "
                "graftkit.Backbone(model, tokenizer) instead of the model alone."
            )
        vocabulary = tokenizer.get_vocab()
        there = [token for token in self.tokens if token in vocabulary]
        if there and [vocabulary.get(token) for token in self.tokens] != self._ids():
            raise UserError(
                f"new_tokens(): the tokenizer of {backbone.source} already has {listing(map(repr, there), 4)}; remove "
                "existing tokens from the list."
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(list(self.tokens), special_tokens=self.special)
        ids = [int(number) for number in tokenizer.convert_tokens_to_ids(list(self.tokens))]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise UserError(
                f"new_tokens(): the tokenizer of {backbone.source} assigns the ids {listing(map(str, ids), 6)}, which are "
                "not consecutive. Choose tokens that it does not split or normalise."
            )
        if self.first_id is not None and ids[0] != self.first_id:
            raise UserError(
                f"new_tokens(): the tokens were trained with ids starting at {self.first_id:,}, but in the tokenizer of "
                f"{backbone.source} they start at {ids[0]:,}: tokens were added to it or removed since then. Use the original "
                "tokenizer, or train the tokens again."
            )
        return tokenizer, ids[0]

    def _ids(self) -> list[int] | None:
        """Return the ids of the tokens; None if they are not known yet."""
        first = self.first_id
        return None if first is None else list(range(first, first + len(self.tokens)))

    def never_folds(self) -> str:
        return (
            "new_tokens() cannot be folded: the base model has no rows for the new tokens, and folding changes values, not "
            "shapes. Keep the graft folder and load it with graftkit.load; or save a model and a tokenizer that have the tokens "
            f"(tokenizer.add_tokens, then model.resize_token_embeddings(len(tokenizer))), and train it with {general()}."
        )


class NewRows(Addition):
    """Rows for `count` ids starting at `first`, (tokens, width) in fp32: its own parameter, or that of another addition.

    The first id is part of the parameter's name, so that rows are never loaded for other tokens.
    """

    def __init__(self, first: int, count: int, rows: Tensor | NewRows) -> None:
        super().__init__()
        self.first, self.count = first, count
        if isinstance(rows, NewRows):
            self.__dict__["owner"] = rows  # not a child, so that the parameter has only one name
        else:
            self.__dict__["owner"] = None
            self.register_parameter(f"rows_{first}", nn.Parameter(rows.clone()))

    @property
    def rows(self) -> Tensor:
        owner: NewRows = self.__dict__["owner"] or self
        return owner.get_parameter(f"rows_{self.first}")

    @classmethod
    def mix(cls, members: Any, weights: Tensor, site: nn.Module) -> Any:
        raise NotImplementedError("new tokens use the same rows for a whole batch")


class InputRows(NewRows):
    """At the word embedding: replace the output for new tokens by the trained rows."""

    lone = True

    def __init__(self, first: int, count: int, rows: Tensor | NewRows) -> None:
        super().__init__(first, count, rows)
        self.ids_until = first + count
        self.__dict__["ids"] = None  # of the current call

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        ids = input_of(args, kwargs)
        known = ids.masked_fill(self._new(ids), 0)
        self.__dict__["ids"] = ids
        return ((known, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): known})

    def after(self, site: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        ids, self.__dict__["ids"] = self.__dict__["ids"], None
        chosen = nn.functional.embedding((ids - self.first).clamp(0, self.count - 1), self.rows)
        chosen = chosen.to(output.dtype)
        scale = getattr(site, "embed_scale", None)  # some embeddings scale their output
        if scale is not None:
            chosen = chosen * (scale.to(output.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(self._new(ids).unsqueeze(-1), chosen, output)

    def _new(self, ids: Tensor) -> Tensor:
        return (ids >= self.first) & (ids < self.first + self.count)


class OutputColumns(NewRows):
    """At the output layer: logits of the new tokens, replacing unused columns and appended after the last one."""

    each_row_alone = True

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x, rows = input_of(args, kwargs), self.rows
        if not x.is_meta and not torch.is_autocast_enabled(x.device.type):
            rows = rows.to(x.dtype)
        new = multiply(x, rows).to(output.dtype)
        return torch.cat([output[..., : self.first], new, output[..., self.first + self.count :]], dim=-1)


class WiderLoss(Addition):
    """At the model: raise `vocab_size`, by which its own loss reshapes logits, to include the new tokens during a call."""

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
    """Return the objects whose `vocab_size` the loss of a model may read."""
    config: Any = getattr(model, "config", None)
    texts = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = [
        holder for holder in (model, config, texts) if isinstance(getattr(holder, "vocab_size", None), int)
    ]
    return list({id(holder): holder for holder in found}.values())


def tables_of(backbone: Backbone) -> dict[str, nn.Embedding]:
    """Return the word embedding and all modules that share its weight, by name.

    Raises `UserError` if the model has no plain word embedding.
    """
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
            f"{listing(modules, 4)} of {type(model).__name__} could each be the one: give the module a "
            f"method get_input_embeddings() that returns it, or use {general()} instead."
            if several
            else f"{type(model).__name__} reads no tokens; use {general()} instead."
        )
        raise UserError(f"new_tokens() adds rows to a model's word embedding, but {why}")
    if type(table) is not nn.Embedding and "ScaledWordEmbedding" not in type(table).__name__:
        raise UserError(
            f"new_tokens() supports plain word embeddings only, and that of {type(model).__name__} is a "
            f"{type(table).__name__}; use {general()} instead."
        )
    _refuse_second_table(model, table)
    return {name: module for name, module in modules.items() if module.weight is table.weight}


def _refuse_second_table(model: Any, table: nn.Embedding) -> None:
    """Raise `UserError` if the decoder has a word embedding of its own."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    own = model.get_decoder().get_input_embeddings()
    tied = own is None or own.weight is table.weight or (own.weight.is_meta and _says_tied(model))
    if not tied:
        raise UserError(
            f"new_tokens() adds rows to one word embedding, but the encoder and decoder of {type(model).__name__} have "
            f"different ones; use {general()} instead."
        )


def output_of(backbone: Backbone, table: nn.Embedding) -> Any:
    """Return the output layer of a language model, which computes the logit of each token; None if it has none."""
    find = getattr(backbone.model, "get_output_embeddings", None)
    output: Any = find() if find is not None else None
    if output is None:
        return None
    if not is_linear(output) or features(output)[0] != output.weight.shape[-1]:
        raise UserError(
            f"new_tokens() supports plain output layers only, and that of {type(backbone.model).__name__} is a "
            f"{type(output).__name__}; use {general()} instead."
        )
    return output


def _are_tied(backbone: Backbone, table: nn.Embedding, output: Any) -> bool:
    """Return whether the embedding and the output layer share one parameter. On the meta device, where moving a model
    unties them, the config decides."""
    return output.weight is table.weight or (output.weight.is_meta and _says_tied(backbone.model))


def _says_tied(model: Any) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "tie_word_embeddings", False))


def _refuse_bias_of_all(backbone: Backbone, count: int) -> None:
    """Raise `UserError` for a model that adds a bias of fixed size to its logits."""
    bias = getattr(backbone.model, "final_logits_bias", None)
    if isinstance(bias, Tensor) and bias.shape[-1] < count:
        raise UserError(
            f"new_tokens() appends logits, but {type(backbone.model).__name__} adds a bias of size {bias.shape[-1]:,} to its "
            f"logits (final_logits_bias), which would not fit; use {general()} instead."
        )
