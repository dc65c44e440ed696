"""What every optimizer promises: exact bytes, a state that checkpoints hold, steps like those of a reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graftkit import AdamW, UserError
from graftkit.engine import checkpoint
from graftkit.optim.base import Optimizer, as_optimizer
from graftkit.recipe.catalogue import entries

SHAPES = {
    "scalar": (),
    "vector": (7,),
    "tall": (9, 5),
    "wide": (5, 9),
    "thin": (9, 2),
    "convolution": (4, 3, 3),
    "large": (67, 63),  # more than 4,096, and not a multiple of a block or of two
}
# options beside the defaults, where these would leave out what an optimizer does
OPTIONS = {
    "galore": (
        "rank=3, interval=2",
        "rank=3, interval=2, svd='full'",
        "rank=62, interval=2, bits=8, space_bits=4",
    ),
    "fira": ("rank=3, interval=2",),
    "apollo": ("rank=3, interval=2", "mini=True, interval=2"),
    "badam": ("interval=2", "interval=2, outside='turn'"),
}
EXPRESSIONS = [f"{name}({text})" for name in entries("optimizer") for text in OPTIONS.get(name, ("",))]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def grouped(members: dict[str, nn.Parameter]) -> list[dict]:
    """Groups as `param_groups` gives them: with other rates, and one that is no part of the network's body."""
    first, *rest = members.values()
    return [
        {"params": rest[:2], "lr": 0.01, "weight_decay": 0.1, "hidden": True},
        {"params": rest[2:3], "lr": 0.02, "weight_decay": 0.1, "hidden": False},
        {"params": rest[3:], "lr": 0.02, "weight_decay": 0.1, "hidden": True},
        {"params": [first], "lr": 0.01, "weight_decay": 0.0, "hidden": False},
    ]


def take(optimizer: torch.optim.Optimizer, members: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in members.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def kept(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    tensors = [value for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_state_bytes_are_those_of_the_state(text, dtype):
    value = as_optimizer(text)
    for shape in SHAPES.values():
        parameter = nn.Parameter(torch.ones(shape, dtype=dtype))
        optimizer = value.make([{"params": [parameter], "lr": 0.01, "weight_decay": 0.0}])
        take(optimizer, {"": parameter}, range(2))
        assert value.state_bytes(shape, dtype) == kept(optimizer, parameter), shape
    members = parameters(dtype=dtype)
    groups = grouped(members)
    optimizer = value.make(groups)
    take(optimizer, members, range(2))
    for group in groups:
        assert value.group_bytes(group) == sum(kept(optimizer, p) for p in group["params"])
    assert value.total_bytes(groups) == sum(kept(optimizer, p) for p in members.values())
    planned = [group | {"params": [p.float() for p in group["params"]]} for group in groups]
    assert value.total_bytes(planned, dtype) == value.total_bytes(groups)


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_state_comes_back_from_a_checkpoint_bit_for_bit(text, tmp_path):
    value = as_optimizer(text)
    whole, first, second = parameters(), parameters(), parameters(seed=1)
    optimizer = value.make(grouped(whole))
    take(optimizer, whole, range(5))

    before = value.make(grouped(first))
    take(before, first, range(3))
    checkpoint.save(tmp_path, 3, dict(first), before, {})
    after = value.make(grouped(second))
    assert checkpoint.restore(tmp_path, dict(second), after) == ({"step": 3}, [])
    for name, parameter in first.items():
        states = before.state[parameter], after.state[second[name]]
        assert states[0].keys() == states[1].keys()
        for key, kept in states[0].items():
            assert type(states[1][key]) is type(kept)
            assert torch.equal(torch.as_tensor(states[1][key]), torch.as_tensor(kept)), (name, key)
    take(after, second, range(3, 5))
    assert all(torch.equal(second[name], whole[name]) for name in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_state_comes_back_from_a_state_dict_bit_for_bit(text, dtype):
    """torch casts what it loads to the dtype of the parameter, which is wrong for indices and moments in fp32."""
    value = as_optimizer(text)
    whole, first = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer, before = value.make(grouped(whole)), value.make(grouped(first))
    take(optimizer, whole, range(5))
    take(before, first, range(3))
    second = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    after = value.make(grouped(second))
    after.load_state_dict(before.state_dict())
    take(after, second, range(3, 5))
    assert all(torch.equal(second[name], whole[name]) for name in SHAPES)


class Counting(torch.optim.SGD):
    """An optimizer that keeps numbers of Python: of a parameter, and of all in a group."""

    def step(self, closure=None):  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            group["total"] = group.get("total", 0.5) + 1
            for parameter in group["params"]:
                self.state[parameter]["taken"] = self.state[parameter].get("taken", 0) + 1


def test_numbers_come_back_with_their_types(tmp_path):
    members = {"weight": nn.Parameter(torch.ones(2, 2))}
    before = Counting(members.values(), lr=0.1)
    take(before, members, range(2))
    checkpoint.save(tmp_path, 2, dict(members), before, {})
    after = Counting(members.values(), lr=0.1)
    checkpoint.restore(tmp_path, dict(members), after)
    assert after.param_groups[0]["total"] == 2.5 and after.state[members["weight"]] == {"taken": 2}
    assert type(after.state[members["weight"]]["taken"]) is int
    before.state[members["weight"]]["history"] = [torch.ones(2)]
    with pytest.raises(UserError, match="Counting stores 'history' of a parameter as a list"):
        checkpoint.save(tmp_path, 3, dict(members), before, {})


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_it_is_made_for_no_parameters_too(text):
    as_optimizer(text).make([]).step()


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_parameters_without_a_gradient_stay_as_they_are(text):
    members = parameters()
    optimizer = as_optimizer(text).make(grouped(members))
    members["tall"].grad = torch.ones(SHAPES["tall"])
    before = {name: p.detach().clone() for name, p in members.items()}
    optimizer.step()
    moved = {name for name, p in members.items() if not torch.equal(p, before[name])}
    assert moved == {"tall"} == {name for name, p in members.items() if optimizer.state.get(p)}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_it_says_whether_it_can_step_within_the_backward_pass(text):
    """If it can, the steps of single parameters together are the step of all."""
    value = as_optimizer(text)
    assert isinstance(value, Optimizer) and isinstance(value.steps_in_backward, bool)
    if value.steps_in_backward:
        together, apart = parameters(), parameters()
        take(value.make(grouped(together)), together, range(3))
        for group in grouped(apart):
            for parameter in group["params"]:
                optimizer = value.make([group | {"params": [parameter]}])
                for step in range(3):
                    take_one(optimizer, apart, parameter, step)
        assert all(torch.equal(together[name], apart[name]) for name in SHAPES)


def take_one(optimizer, members, parameter, step) -> None:
    """The step that `take` would take, of one parameter alone."""
    generator = torch.Generator().manual_seed(100 + step)
    gradients = {id(p): torch.randn(p.shape, generator=generator) for p in members.values()}
    parameter.grad = gradients[id(parameter)]
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"beta1": 0.8, "beta2": 0.95, "eps": 1e-4}])
def test_adamw_is_that_of_torch(options):
    ours, theirs = parameters(), parameters()
    betas = options.get("beta1", 0.9), options.get("beta2", 0.999)
    plain = torch.optim.AdamW(grouped(theirs), betas=betas, eps=options.get("eps", 1e-8), fused=True)
    take(AdamW(**options).make(grouped(ours)), ours, range(4))
    take(plain, theirs, range(4))
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)
