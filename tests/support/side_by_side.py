"""What the tests of several grafts share: grafts side by side on one model, and the rows of a batch."""

from __future__ import annotations

import pytest
import tiny
import torch
from shaken import shaken
from torch import Tensor, nn

from graftkit import UserError, using

NAMES = ("support-de", "support-fr", "sales")
HEADS = {
    "mean": ("lora(rank=2) + head(classes=4, pooling='mean')", "head(classes=4, pooling='mean')"),
    "attention": ("head(classes=2, pooling='attention', hidden=3)", "lora() + head(classes=2, pooling='attention', hidden=3)"),
    "own": ("lora(rank=2) + head(classes=3)", "lora(rank=3) + head(classes=3)"),
    "replaced": ("lora(rank=2) + head(classes=5)", "head(classes=5)"),
}  # fmt: skip


def several(model: nn.Module, texts: tuple[str, ...], names: tuple[str, ...] = NAMES):
    """Grafts with random values side by side, disabled."""
    grafts = []
    for i, (name, text) in enumerate(zip(names, texts)):
        grafts.append(shaken(model, text, name=name, seed=i + 5))
        grafts[-1].disable()
    return grafts


def states(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch)[0]


def row(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor[index : index + 1] for name, tensor in batch.items()}


def assert_rows_are_those_alone(model: nn.Module, rows: list[str | None]) -> None:
    batch = tiny.batch(rows=len(rows))
    before = tiny.snapshot(model)
    with using(model, rows=rows):
        got = states(model, batch)
    after = tiny.snapshot(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    whole = got.dim() == 3
    for i, name in enumerate(rows):
        with using(model, [name] if name else []):
            alone = states(model, row(batch, i))[0]
        real = batch["attention_mask"][i].bool()
        wanted, mine = (alone[real], got[i][real]) if whole else (alone, got[i])
        assert tiny.relative(mine, wanted) < 1e-5, (i, name)


def refusal(model: nn.Module, which=None, rows=None) -> str:
    active = {name: graft.active for name, graft in vars(model).get("graftkit_grafts", {}).items()}
    with pytest.raises(UserError) as caught, using(model, which, rows=rows):
        pass
    assert {name: graft.active for name, graft in vars(model).get("graftkit_grafts", {}).items()} == active
    return str(caught.value)
