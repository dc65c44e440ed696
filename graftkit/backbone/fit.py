"""Check that the output of a tokenizer or processor fits the model, before training, with or without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from graftkit.backbone.anatomy import Added
from graftkit.backbone.backbone import Backbone
from graftkit.backbone.memory import is_out_of_memory
from graftkit.errors import UserError, listing

NAMED = ("pad_token", "bos_token", "eos_token", "unk_token", "cls_token", "sep_token", "mask_token")
CHUNK = 4096  # rows whose ids are checked together


def token_rows(model: nn.Module) -> int | None:
    """Rows of the embedding of tokens, those that a graft adds among them; None for a model that has none, or does not
    say which it is."""
    try:
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, KeyError):
        return None
    if not isinstance(table, nn.Embedding):
        return None
    added = [module.ids_until for module in table.children() if isinstance(module, Added) and module.active]
    return max([table.num_embeddings, *added])


def refuse_tokens_without_rows(model: nn.Module, tokenizer: Any, source: str) -> None:
    """Raise `UserError` for a tokenizer with tokens beyond the rows of the embedding.

    Special tokens other than the seven that a tokenizer names, such as placeholders for images, are accepted until a
    text contains one: published folders have them.
    """
    rows = token_rows(model)
    if rows is None or len(tokenizer) <= rows:
        return
    added = tokenizer.added_tokens_decoder
    named = {getattr(tokenizer, name, None) for name in NAMED}
    beyond = [
        token
        for token, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        if number >= rows and (number not in added or not added[number].special or token in named)
    ]
    if beyond:
        raise UserError(_without_row(beyond, len(tokenizer), rows, source))


def refuse_misfit_tokenizer(backbone: Backbone, tokenizer: Any, config: Any, pools: bool) -> None:
    """Raise `UserError` for tokens without an embedding, or if a pooling head cannot find the end of a row."""
    refuse_tokens_without_rows(backbone.model, tokenizer, backbone.source)
    if not pools:
        return
    if tokenizer.pad_token_id is None and backbone.is_decoder:
        raise UserError(
            f"the tokenizer of {backbone.source!r} has no padding token and no end token, and the model's own head needs "
            "one to find the end of a row; use head(pooling='mean'), or 'last'."
        )
    end = getattr(config, "eos_token_id", None) if getattr(config, "is_encoder_decoder", False) else None
    if isinstance(end, int) and end not in tokenizer("a")["input_ids"]:
        raise UserError(
            f"the tokenizer of {backbone.source!r} puts no end token after a text, and the model's own head reads the state "
            "there; use head(pooling='mean'), or save the tokenizer with one."
        )


def _without_row(tokens: Sequence[str], size: int, rows: int, source: str) -> str:
    count = "1 token has" if len(tokens) == 1 else f"{len(tokens):,} tokens have"
    return (
        f"model {source!r}: len(tokenizer) is {size:,}, but the embedding has {rows:,} rows, so {count} no row "
        f"({listing(map(repr, tokens), 4)}). Tokens were added to the tokenizer alone: enlarge the model with "
        "model.resize_token_embeddings(len(tokenizer)) and save both."
    )


def check_token_ids(
    backbone: Backbone, rows: Iterable[np.ndarray | Sequence[int]], where: Callable[[int], str]
) -> None:
    """Raise `UserError` if a row contains an id beyond the embedding's rows. `where` describes the place of a row."""
    known = token_rows(backbone.model)
    if known is None:
        return
    coming, begin = iter(rows), 0
    while chunk := [np.asarray(row) for row in islice(coming, CHUNK)]:
        if max((int(row.max()) for row in (np.concatenate(chunk),) if len(row)), default=0) >= known:
            place, ids = next((i, row) for i, row in enumerate(chunk) if len(row) and row.max() >= known)
            token = backbone.processor.convert_ids_to_tokens(int(ids.max()))
            told = _without_row([token], len(backbone.processor), known, backbone.source)
            raise UserError(f"{where(begin + place)}: {told}")
        begin += len(chunk)


def check_token_types(backbone: Backbone, rows: Iterable[np.ndarray]) -> None:
    """Raise `UserError` if a tokenizer returns token types that the model has no embedding for."""
    tables = (
        module.num_embeddings
        for name, module in backbone.model.named_modules()
        if name.endswith("token_type_embeddings") and isinstance(module, nn.Embedding)
    )
    known = min(tables, default=None)
    most = max((int(row.max()) for row in rows if len(row)), default=0) if known is not None else 0
    if known is not None and most >= known:
        raise UserError(
            f"model {backbone.source!r}: its tokenizer returns token types up to {most}, but the model has {known} "
            f"token type{'s' * (known != 1)}. Save the tokenizer without them: tokenizer.model_input_names = "
            "['input_ids', 'attention_mask'], then tokenizer.save_pretrained(FOLDER)."
        )


@torch.no_grad()
def misfit(model: nn.Module, run: Callable[[torch.device], Any]) -> Exception | None:
    """Return the error raised when `run` calls the model with a row on its device, or None.

    Modes and random state are restored. On the meta device only shapes are checked, and operations that it does not
    support are not reported.
    """
    modes = [(module, module.training) for module in model.modules()]
    some = next(model.parameters())
    half = not some.is_meta and any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    state = torch.get_rng_state()
    try:
        model.eval()
        with torch.autocast("cpu" if some.is_meta else some.device.type, torch.bfloat16, enabled=half):
            run(some.device)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        unknown = some.is_meta and ("meta" in str(error).lower() or isinstance(error, NotImplementedError))
        return None if unknown else error
    finally:
        torch.set_rng_state(state)
        for module, training in modes:
            module.training = training
    return None
