"""muon: `torch.optim.Muon` for matrices of the body, AdamW for the rest."""

import pytest
import tiny
import torch

from graftkit import Muon, UserError, attach

SHAPES = {"tall": (9, 5), "wide": (5, 9), "bias": (7,), "embedding": (9, 6)}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(s, generator=generator)) for name, s in SHAPES.items()}


def groups(p):
    return [
        {"params": [p["tall"], p["wide"], p["bias"]], "lr": 0.02, "weight_decay": 0.1, "hidden": True},
        {"params": [p["embedding"]], "lr": 0.01, "weight_decay": 0.1, "hidden": False},
    ]


def take(optimizers, members, steps=4):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for parameter in members.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(
    "size,rule,nesterov", [("rms", "match_rms_adamw", True), ("original", "original", False)]
)
def test_matrices_have_muon_of_torch_and_the_rest_adamw(size, rule, nesterov):
    ours, theirs = parameters(), parameters()
    value = Muon(momentum=0.9, iterations=4, size=size, rest=0.1, nesterov=nesterov, beta1=0.8)
    take([value.make(groups(ours))], ours)
    matrices = torch.optim.Muon(
        [theirs["tall"], theirs["wide"]], lr=0.02, weight_decay=0.1, momentum=0.9, ns_steps=4,
        adjust_lr_fn=rule, nesterov=nesterov,
    )  # fmt: skip
    rest = torch.optim.AdamW(
        [{"params": [theirs["bias"]], "lr": 0.002}, {"params": [theirs["embedding"]], "lr": 0.001}],
        weight_decay=0.1,
        betas=(0.8, 0.999),
        fused=True,
    )
    take([matrices, rest], theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_the_first_step_is_nearly_orthogonal():
    """Jordan et al. 2024: five iterations bring the singular values of the gradient to between 0.7 and 1.2 or so."""
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.zeros(20, 12))
    parameter.grad = torch.randn(20, 12, generator=generator)
    Muon().make([{"params": [parameter], "lr": 1.0, "weight_decay": 0.0}]).step()
    left, _, right = torch.linalg.svd(parameter.grad, full_matrices=False)
    change = -parameter.detach() / (0.2 * 20**0.5)  # Liu et al. 2025, equation 4
    sizes = torch.linalg.svdvals(change)
    assert sizes.min() > 0.6 and sizes.max() < 1.3
    cosine = (change * (left @ right)).sum() / change.norm() / (left @ right).norm()
    assert cosine > 0.97


def test_rates_follow_a_schedule_and_layers():
    """The training loop sets the learning rate of each group anew in each step."""
    members = parameters()
    optimizer = Muon(rest=0.1).make(groups(members))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.02, 0.002, 0.001])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: p.detach().clone() for name, p in members.items()}
    take([optimizer], members, 1)
    assert all(torch.equal(members[name], before[name]) for name in SHAPES)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_matrices_of_the_body_have_one_number_each(kind):
    graft = attach(tiny.bare(kind), "full()")
    optimizer = graft.optimizer(optimizer="muon()")
    batch = torch.randint(3, tiny.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    graft.model(input_ids=batch).last_hidden_state.square().mean().backward()
    optimizer.step()
    chosen = [name for name, p in graft.parameters.items() if "momentum_buffer" in optimizer.state[p]]
    assert len(chosen) == tiny.BLOCKS * {"bert": 6, "gpt2": 4, "llama": 7}[kind]
    assert not any("embed" in name or "wte" in name or "wpe" in name for name in chosen)
    assert all(set(optimizer.state[graft.parameters[name]]) == {"momentum_buffer"} for name in chosen)


def test_without_a_matrix_it_is_refused():
    with pytest.raises(UserError, match=r"muon\(.*no linear layer of the backbone is trained"):
        attach(tiny.bare("bert"), "bitfit()").optimizer(optimizer="muon()")
