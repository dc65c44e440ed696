"""What the contracts of learner and source can say: the smallest thing of each that one loss on one table cannot."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from graftkit.data.order import Permuted
from graftkit.data.source import Pass, Source
from graftkit.engine.ahead import Ahead
from graftkit.engine.forward import Forward
from graftkit.engine.frozen import phases
from graftkit.engine.loop import Loop
from graftkit.engine.readings import Reading
from graftkit.engine.settings import Settings
from graftkit.grafts.attach import attach
from graftkit.optim.adamw import AdamW
from graftkit.tasks.base import Term

SETTINGS = Settings(
    steps=4, batch_size=4, accumulate=2, optimizer=AdamW(), lr=0.01, weight_decay=0.0, warmup=0.0, schedule="constant", clip=0.0, seed=3,
)  # fmt: skip


class Numbers(Source):
    """Rows of numbers that are computed from their number: nothing is held, whatever the size."""

    unit = "numbers"
    uniform = True

    def __init__(self, rows: int) -> None:
        self.rows, self.lengths = rows, 6
        self.made: list[np.ndarray] = []

    def __len__(self) -> int:
        return self.rows

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, torch.Tensor]:
        self.made.append(rows)
        drawn = [at.generator(row).normal(size=6) for row in rows]
        return {"x": torch.from_numpy(np.stack(drawn)).float()}

    def digest(self) -> str:
        return f"{self.rows}"


class Pair(Numbers):
    """Each row has one answer, and as many tokens as its number says."""

    def count(self, rows: np.ndarray, at: Pass) -> dict[str, float]:
        return {"rows": float(len(rows)), "tokens": float((1 + rows % 3).sum())}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.hidden_size = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(x)))


def loop_of(source: Source, learn, method: str = "full()", settings: Settings = SETTINGS) -> Loop:
    torch.manual_seed(0)
    graft = attach(Net(), method)
    forward = Forward(graft, torch.device("cpu"), "fp32")
    return Loop(graft, source, forward, phases(graft, settings.steps, 10**9), learn, settings)


def terms(outputs: torch.Tensor, rows: np.ndarray) -> dict[str, Term]:
    tokens = torch.from_numpy(1 + rows % 3)
    return {
        "rows": Term(outputs[:, 0].square(), outputs[:, 0] > 0),
        "tokens": Term((outputs[:, 1:].square().sum(1)) * tokens, weight=0.25),
    }


def test_two_terms_have_units_of_their_own():
    """The loss of a step is the weighted sum over terms of (their sum over all batches / all their units)."""
    loop = loop_of(Pair(24), lambda forward, batch: terms(forward(batch), batch.rows))
    work = loop.work(0)
    sums = loop._gradients(work)
    found = {name: p.grad.clone() for name, p in loop.graft.parameters.items()}
    rows = np.concatenate(work.rows)
    loop.graft.model.zero_grad()
    whole = terms(loop.forward(loop.source.batch(rows, at=Pass(3, 0))), rows)
    loss = whole["rows"].losses.sum() / 8 + 0.25 * whole["tokens"].losses.sum() / (1 + rows % 3).sum()
    loss.backward()
    for name, parameter in loop.graft.parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)
    reading = Reading(0, work, sums, torch.zeros(()))
    loop.readings.add(reading)
    read = loop._figures(reading)
    total, figures = read.loss, read.terms
    assert total == pytest.approx(loss.item(), rel=1e-6)
    assert (
        figures["rows"].accuracy == float(whole["rows"].correct.sum()) / 8
        and figures["tokens"].accuracy is None
    )


def test_terms_must_be_those_that_are_counted():
    loop = loop_of(Numbers(24), lambda forward, batch: terms(forward(batch), batch.rows))
    with pytest.raises(ValueError, match=r"\['rows', 'tokens'\], but the source counts units of \['loss'\]"):
        loop._gradients(loop.work(0))


@pytest.mark.parametrize("method", ["lora(rank=2, lr=0.05)", "full()"])
def test_a_learner_may_ask_the_model_without_its_graft(method):
    """The squared distance from what the base gives: zero at the start, and its gradient pulls back afterwards."""
    asked = []

    def learn(forward, batch):
        now, before = forward(batch), forward.base(batch)
        asked.append((now.detach(), before))
        assert now.requires_grad and not before.requires_grad
        return {"loss": Term((now - before).square().sum(1) + 0.1 * now.sum(1))}

    loop = loop_of(Numbers(24), learn, method)
    base = [loop.graft.model(**loop.work(step).own[0].inputs).detach() for step in range(4)]
    for _ in loop:
        pass
    assert torch.equal(*asked[0])
    for step in range(4):
        now, before = asked[2 * step]
        torch.testing.assert_close(before, base[step])
        assert step == 0 or not torch.equal(now, before)


def test_a_hundred_million_rows_open_shuffle_and_resume_at_once():
    tracemalloc.start()
    settings = Settings(**{**vars(SETTINGS), "steps": 2 * 10**7})
    loop = loop_of(
        Numbers(10**8),
        lambda forward, batch: {"loss": Term(forward(batch).square().sum(1))},
        settings=settings,
    )
    loop.step = 10**7
    steps = iter(loop)
    assert [next(steps).number, next(steps).number] == [10**7 + 1, 10**7 + 2]
    steps.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24, "held for each row"
    assert sum(map(len, loop.source.made)) <= 8 * 5, (
        "no rows are made but those of these steps and the next two"
    )
    again = loop_of(Numbers(10**8), loop.learn, settings=settings)
    for mine, other in zip(loop.batches(10**7), again.batches(10**7)):
        assert np.array_equal(mine, other)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100, 4097])
def test_a_permutation_that_is_computed_holds_each_row_once(rows):
    order = Permuted(rows, 8, 5, 1)
    whole = np.concatenate(order.batches(0, len(order)))
    assert sorted(whole.tolist()) == list(range(rows))
    assert np.array_equal(np.concatenate([order.batches(i, i + 1)[0] for i in range(len(order))]), whole)
    others = [np.concatenate(Permuted(rows, 8, *key).batches(0, len(order))) for key in ((5, 2), (6, 1))]
    assert rows < 100 or not any(np.array_equal(whole, other) for other in others)


def test_a_permutation_looks_random():
    found = Permuted(10**5, 8, 0, 0).at(np.arange(10**5, dtype=np.uint64))
    assert abs(np.corrcoef(found, np.arange(10**5))[0, 1]) < 0.02
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.02
    assert (np.abs(np.diff(found)) < 10).mean() < 0.001


def test_what_is_drawn_depends_on_seed_epoch_and_row_alone():
    source, rows = Numbers(100), np.array([5, 17, 3])
    together = source.inputs(rows, Pass(1, 2))["x"]
    for place, row in enumerate(rows):
        assert torch.equal(source.inputs(np.array([row]), Pass(1, 2))["x"][0], together[place])
    for other in (Pass(1, 3), Pass(2, 2)):
        assert not torch.equal(source.inputs(rows, other)["x"], together)


def test_batches_are_made_ahead_in_order_and_errors_come_to_whom_takes_them():
    seen: list[int] = []

    def make(step: int) -> int:
        seen.append(step)
        if step == 3:
            raise OSError("gone")
        return step * step

    ahead = Ahead(make, steps=5)
    assert [ahead.take(0), ahead.take(1)] == [0, 1]
    assert ahead.take(2) == 4
    with pytest.raises(OSError, match="gone"):
        ahead.take(3)
    assert ahead.take(4) == 16
    ahead.close()
    assert seen == [0, 1, 2, 3, 4]


def test_a_step_reads_back_once(monkeypatch):
    """However many micro-batches: no loss is read within a step."""
    read = SimpleNamespace(count=0)
    for name in ("item", "tolist", "__float__", "__bool__", "cpu"):
        plain = getattr(torch.Tensor, name)

        def counting(self, *args, plain=plain, **kwargs):
            read.count += 1
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)
    settings = Settings(**{**vars(SETTINGS), "accumulate": 6, "steps": 6})
    loop = loop_of(
        Numbers(10**4),
        lambda forward, batch: {"loss": Term(forward(batch).square().sum(1))},
        settings=settings,
    )
    counts = []
    for _ in loop:
        counts.append(read.count)
        read.count = 0
    assert set(counts[3:]) == {1}, counts  # after the audit's steps
