"""badam: AdamW on one block after another, with state for that block alone."""

import math

import pytest
import tiny
import torch

from graftkit import AdamW, BAdam, UserError, attach
from graftkit.engine import checkpoint
from graftkit.optim.groups import hidden_matrices, param_groups

LR, DECAY, INTERVAL = 0.01, 0.1, 2
BLOCKS = [None, 0, 0, 1, 2]  # of five parameters, in two groups


def members(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 4, generator=generator).to(dtype)) for _ in BLOCKS]


def groups(parameters):
    return [
        {"params": parameters[:2], "blocks": BLOCKS[:2], "lr": LR, "weight_decay": DECAY, "hidden": True},
        {"params": parameters[2:], "blocks": BLOCKS[2:], "lr": 2 * LR, "weight_decay": 0.0, "hidden": False},
    ]


def gradients(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(3, 4, generator=generator).to(dtype) for _ in BLOCKS]


def take(optimizer, parameters, steps, dtype=torch.float32):
    """Take steps; return the indices of the parameters that moved, for each step."""
    moved = []
    for step in steps:
        before = [p.detach().clone() for p in parameters]
        for parameter, gradient in zip(parameters, gradients(step, dtype)):
            parameter.grad = gradient
        optimizer.step()
        moved.append([i for i, (p, b) in enumerate(zip(parameters, before)) if not torch.equal(p, b)])
    return moved


def has_state(optimizer, parameters):
    return [
        i for i, p in enumerate(parameters) if any(torch.is_tensor(v) for v in optimizer.state[p].values())
    ]


@pytest.mark.parametrize(
    "options,turns",
    [
        ({"order": "ascending"}, [[0, 1, 2], [0, 3], [0, 4], [0, 1, 2]]),
        ({"order": "descending"}, [[0, 4], [0, 3], [0, 1, 2], [0, 4]]),
        ({"order": "ascending", "outside": "turn"}, [[0], [1, 2], [3], [4]]),
    ],
)
def test_blocks_take_turns_and_others_keep_no_state(options, turns):
    parameters = members()
    optimizer = BAdam(interval=INTERVAL, **options).make(groups(parameters))
    for turn, expected in enumerate(turns):
        for step in range(INTERVAL):
            assert take(optimizer, parameters, [turn * INTERVAL + step]) == [expected]
            assert has_state(optimizer, parameters) == expected


def test_a_random_order_has_each_block_once_per_cycle_and_depends_on_the_seed():
    orders = set()
    for seed in range(6):
        parameters = members()
        moved = take(BAdam(interval=1, seed=seed).make(groups(parameters)), parameters, range(12))
        cycles = [moved[start : start + 3] for start in range(0, 12, 3)]
        assert all(sorted(cycle) == [[0, 1, 2], [0, 3], [0, 4]] for cycle in cycles)
        again = members()
        assert moved == take(BAdam(interval=1, seed=seed).make(groups(again)), again, range(12))
        orders.add(str(moved))
    assert len(orders) > 3


def test_a_turn_is_adamw_from_the_beginning():
    ours, theirs = members(), members()
    take(BAdam(interval=INTERVAL, order="ascending").make(groups(ours)), ours, range(8))
    always = torch.optim.AdamW([theirs[0]], lr=LR, weight_decay=DECAY)
    for turn, active in enumerate([[1, 2], [3], [4], [1, 2]]):
        fresh = [
            torch.optim.AdamW([theirs[i]], lr=LR if i < 2 else 2 * LR, weight_decay=DECAY if i < 2 else 0.0)
            for i in active
        ]
        for step in range(turn * INTERVAL, (turn + 1) * INTERVAL):
            for i, gradient in enumerate(gradients(step)):
                theirs[i].grad = gradient
            for optimizer in (always, *fresh):
                optimizer.step()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other)


def test_half_precision_moves_by_less_than_its_own_resolution():
    """50 steps of 1e-4 each are half of the distance to the next number of bf16: a copy in fp32 adds them up."""
    parameters = [torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2)]
    group = {"params": parameters, "blocks": [0, 1], "lr": 1e-4, "weight_decay": 0.0}
    value = BAdam(interval=100, order="ascending")
    optimizer, plain = value.make([group]), AdamW().make([{**group, "params": [parameters[1]]}])
    for _ in range(60):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        plain.step()
    assert parameters[0][0].item() == pytest.approx(1 - 0.006, abs=0.002)
    assert parameters[1][0].item() == 1.0  # by itself, it stands still
    kept = sum(
        v.numel() * v.element_size() for v in optimizer.state[parameters[0]].values() if torch.is_tensor(v)
    )
    assert kept == value.state_bytes((4,), torch.bfloat16) == 4 * 3 * 4


def test_a_run_goes_on_in_the_middle_of_a_turn(tmp_path):
    value = BAdam(interval=3)
    whole, first, second = members(), members(), members()
    optimizer = value.make(groups(whole))
    take(optimizer, whole, range(10))
    before = value.make(groups(first))
    take(before, first, range(5))
    names = [f"layer{i}" for i in range(len(BLOCKS))]
    checkpoint.save(tmp_path, 5, dict(zip(names, first)), before, {})
    after = value.make(groups(second))
    checkpoint.restore(tmp_path, dict(zip(names, second)), after)
    take(after, second, range(5, 10))
    assert all(torch.equal(mine, other) for mine, other in zip(second, whole))


def test_the_most_state_is_that_of_the_largest_block():
    parameters = members()
    value = BAdam(interval=1, order="ascending")
    optimizer, most = value.make(groups(parameters)), 0
    for step in range(3):
        take(optimizer, parameters, [step])
        states = [v for p in parameters for v in optimizer.state[p].values() if torch.is_tensor(v)]
        most = max(most, sum(v.numel() * v.element_size() for v in states))
    assert value.total_bytes(groups(parameters)) == most == 3 * 2 * 12 * 4
    assert BAdam(outside="turn").total_bytes(groups(parameters)) == 2 * 2 * 12 * 4


def test_groups_name_the_block_of_each_parameter():
    graft = attach(
        tiny.bare("bert"), "unfreeze('ffn') + lora(rank=2, sites='q') + head(classes=3, pooling='mean')"
    )
    assert len(graft.backbone.blocks) == tiny.BLOCKS
    found = param_groups(graft.parameters, graft.labels, None, 0.01, hidden_matrices(graft.backbone), graft.backbone.blocks)  # fmt: skip
    names = {id(p): name for name, p in graft.parameters.items()}
    for group in found:
        for parameter, block in zip(group["params"], group["blocks"]):
            name = names[id(parameter)]
            assert block == (int(name.split(".layer.")[1].split(".")[0]) if ".layer." in name else None), name


def test_a_run_trains_one_block_at_a_time(ready):
    run = ready("full() + head()", optimizer="badam(interval=2)")
    plan = run.prepared.plan
    done, most = [], 0
    for step in run.loop:
        done.append(step)
        states = [
            v for state in run.loop.optimizer.state.values() for v in state.values() if torch.is_tensor(v)
        ]
        most = max(most, sum(v.numel() * v.element_size() for v in states))
    assert all(math.isfinite(step.loss) for step in done) and len(done) > 2
    assert plan.optimizer_bytes == most
    assert most < ready("full() + head()").prepared.plan.optimizer_bytes


@pytest.mark.parametrize("method", ["unfreeze('blocks[-1:]')", "head(classes=3, pooling='mean')"])
def test_fewer_than_two_blocks_are_refused(method):
    with pytest.raises(UserError, match=r"badam\(.*fewer than two blocks of the backbone are trained"):
        attach(tiny.bare("bert"), method).optimizer(optimizer="badam()")
