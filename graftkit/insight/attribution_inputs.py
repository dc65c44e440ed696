"""One row as values that can be changed - token embeddings, pixels, samples or features - and the answer as their function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone.walk import modules_of
from graftkit.engine.forward import Forward
from graftkit.engine.memory import in_parts
from graftkit.errors import UserError
from graftkit.tasks.base import Dataset, Task
from graftkit.tasks.explained import Aim

BATCH = 16  # copies of the row that are computed together
IDS = "input_ids"
ADVICE = "use a device with more memory, or fewer or shorter texts."


class Unfit(UserError):
    """A method of explanation does not fit the model or its input."""


class RowInput:
    """What the model reads of one row, divided into parts.

    `values`: (1, length, width) token embeddings, (1, channels, height, width) pixels, or (1, ...) samples or features of a
    sound, in fp32. `absent`: the same without any of the parts. `owners`: the part of each place, -1 for none, in a shape
    that broadcasts to values[0]. `parts`: what is said of each.
    """

    def __init__(self, forward: Forward, task: Task, dataset: Dataset, aim: Aim) -> None:
        self.forward, self.task, self.dataset, self.aim = forward, task, dataset, aim
        self.inputs = dataset.batch(np.array([aim.row]), forward.device).inputs
        cut = task.divide(dataset, aim.row, forward.graft.backbone, self.inputs)
        if not cut.parts:
            raise UserError(
                f"{dataset.where(aim.row)}: nothing of it reaches the model, so there is nothing to explain."
            )
        self.parts, self.name = cut.parts, cut.name
        self.owners = torch.from_numpy(np.array(cut.owners, np.int64)).to(forward.device)
        self.table: nn.Module | None = None
        if cut.name is not None:
            assert cut.absent is not None
            self.values, self.absent = self.inputs[cut.name].float(), cut.absent.float()
        else:
            self.table = self._table()
            self.values = self._embedded(self.inputs[IDS])
            self.absent = self._without_words()
            self.owners = self.owners[:, None]

    @property
    def is_image(self) -> bool:
        return self.values.dim() == 4

    @property
    def is_text(self) -> bool:
        return self.table is not None

    def graded(self, values: Tensor) -> Tensor:
        """Return what the task grades the outputs for `values` (n, ...) with, (n, ...) in fp32."""
        given = {name: one.expand(len(values), *one.shape[1:]) for name, one in self.inputs.items()}
        with ExitStack() as stack:
            if self.name is not None:
                given[self.name] = values
            else:
                assert self.table is not None
                stack.enter_context(_substituting(self.table, given[IDS], values))
            return self.task.graded(self._outputs(given))

    def __call__(self, values: Tensor) -> Tensor:
        """Return the explained value for `values` (n, ...), (n,)."""
        return self.aimed(self.graded(values))

    def aimed(self, graded: Tensor) -> Tensor:
        """Return the explained value of each row, (n,), of graded outputs (n, ...)."""
        place: Any = (slice(None), *self.aim.at)
        return graded[place]

    def each(self, work: Callable[[np.ndarray], Tensor], count: int) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Do `work` on the numbers below `count`, 16 at a time or, if memory runs out, fewer."""
        for start in range(0, count, BATCH):
            numbers = np.arange(start, min(start + BATCH, count))
            yield from in_parts(numbers, self.forward.device, work, ADVICE)

    @torch.no_grad()
    def without(self, gone: Sequence[Sequence[int]]) -> Tensor:
        """Return what the task grades the row with if parts are gone, (len(gone), ...); `gone`: numbers of parts."""
        found = [
            made
            for _, made in self.each(
                lambda at: self.graded(torch.cat([self.left(gone[i]) for i in at])), len(gone)
            )
        ]
        return torch.cat(found)

    def left(self, gone: Sequence[int]) -> Tensor:
        """Return the values without some parts, (1, ...)."""
        which = torch.zeros(len(self.parts) + 1, dtype=torch.bool, device=self.owners.device)
        which[list(gone)] = True
        return torch.where(which[self.owners], self.absent, self.values)  # -1 is the last, which stays

    def by_part(self, found: Tensor) -> np.ndarray:
        """Return the sum over each part, (parts,) in fp64, of values (1, ...) to which the owners broadcast."""
        owners = self.owners.expand(found.shape[1:]).flatten().cpu()
        sums = torch.zeros(len(self.parts) + 1, dtype=torch.float64)
        values = found[0].detach().flatten().cpu().double()
        return sums.index_add_(0, owners.where(owners >= 0, len(self.parts)), values)[:-1].numpy()

    def _outputs(self, given: dict[str, Tensor]) -> Tensor:
        rows = np.full(len(next(iter(given.values()))), self.aim.row)
        batch = self.dataset.batch(rows, self.forward.device)
        batch.inputs = given
        return self.forward(batch).float()

    @torch.no_grad()
    def _table(self) -> nn.Module:
        """Return the embedding that the model looks the ids of tokens up in."""
        model: Any = self.forward.graft.model
        tables = [module for module in modules_of(model).values() if isinstance(module, nn.Embedding)]
        if hasattr(model, "get_input_embeddings"):
            named = model.get_input_embeddings()
            tables = [named, *(table for table in tables if table is not named)]
        got: dict[nn.Module, Tensor] = {}
        ids = self.inputs[IDS]
        with ExitStack() as stack:
            for table in tables:
                stack.enter_context(_capturing(table, ids, got))
            self._outputs(self.inputs)
        if not got:
            raise UserError(
                f"{self.forward.graft.backbone.source} looks its token ids up in no embedding (torch.nn.Embedding), so its "
                "answers cannot be explained by words."
            )
        return next(table for table in tables if table in got)

    @torch.no_grad()
    def _embedded(self, ids: Tensor) -> Tensor:
        """Return the embeddings of token ids (1, length), (1, length, width)."""
        assert self.table is not None
        got: dict[nn.Module, Tensor] = {}
        with _capturing(self.table, ids, got):
            self._outputs({**self.inputs, IDS: ids})
        return got[self.table].float()

    def _without_words(self) -> Tensor:
        """Return the embeddings of the row with its words masked: the mask token's or, where there is none, that of unknown
        words or padding, else zeros. Special tokens stay."""
        tokenizer = self.forward.graft.backbone.processor
        names = ("mask_token_id", "unk_token_id", "pad_token_id")
        mask = next((i for name in names if (i := getattr(tokenizer, name, None)) is not None), None)
        words = self.owners >= 0
        if mask is None:
            return torch.where(words[:, None], torch.zeros_like(self.values), self.values)
        return self._embedded(torch.where(words, mask, self.inputs[IDS]))


def _looked_up(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]


@contextmanager
def _capturing(table: nn.Module, ids: Tensor, got: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Keep what a module first gives for these ids."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = _looked_up(args, kwargs)
        if module not in got and given.shape == ids.shape and torch.equal(given, ids) and output.dim() == 3:
            got[module] = output.detach().clone()

    handle = table.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _substituting(table: nn.Module, ids: Tensor, values: Tensor) -> Iterator[None]:
    """Make an embedding give `values` (n, length, width) for `ids` (n, length), also for those that follow a first one, as
    a decoder reads the ids of its encoder."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        given = _looked_up(args, kwargs)
        if given.shape != ids.shape:
            return output
        if torch.equal(given, ids):
            return values.to(output.dtype)
        if torch.equal(given[:, 1:], ids[:, :-1]):
            return torch.cat([output[:, :1], values[:, :-1].to(output.dtype)], dim=1)
        return output

    handle = table.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
