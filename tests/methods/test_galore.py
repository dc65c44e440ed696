"""galore: Adam in a low-rank space of the gradient (Zhao et al. 2024), against a plain reference."""

import math

import pytest
import tiny
import torch

from graftkit import UserError, attach
from graftkit.optim.projected import ProjectedAdamW, space


def reference(weight, gradients, rank, interval, scale, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    """Algorithm 2 of the paper, written out; decay is decoupled, and acts on the whole weight."""
    weight = weight.clone()
    first = second = None
    for step, gradient in enumerate(gradients):
        tall = gradient.shape[0] >= gradient.shape[1]
        if step % interval == 0:
            U, _, V = torch.linalg.svd(gradient, full_matrices=False)
            P = V[:rank].T if tall else U[:, :rank]
        R = gradient @ P if tall else P.T @ gradient
        first = (0 if first is None else betas[0] * first) + (1 - betas[0]) * R
        second = (0 if second is None else betas[1] * second) + (1 - betas[1]) * R * R
        m = first / (1 - betas[0] ** (step + 1))
        v = second / (1 - betas[1] ** (step + 1))
        N = m / (v.sqrt() + eps)
        back = N @ P.T if tall else P @ N
        weight = weight - lr * decay * weight - lr * scale * back
    return weight


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_steps_are_those_of_the_algorithm(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(8)]
    parameter = torch.nn.Parameter(weight.clone())
    projection = {"rank": 2, "interval": 3, "scale": 0.25}
    optimizer = ProjectedAdamW([parameter], lr=0.01, weight_decay=0.1)
    optimizer.param_groups[0]["projection"] = projection
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), reference(weight, gradients, 2, 3, 0.25, 0.01, 0.1))


def test_a_gradient_along_the_axes_gives_the_steps_of_adam():
    """Where the singular vectors are the axes, nothing but the rank sets it apart from AdamW."""
    values = torch.tensor([5.0, 4.0, 3.0, 2.0])
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    projected = ProjectedAdamW(
        [{"params": [ours], "projection": {"rank": 4, "interval": 2, "scale": 1.0}}], lr=0.1
    )
    plain = torch.optim.AdamW([theirs], lr=0.1)
    for step in range(5):
        gradient = torch.zeros(6, 4)
        gradient[:4].diagonal().copy_(values * (1 + step))
        for parameter, optimizer in ((ours, projected), (theirs, plain)):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_a_closure_is_called_before_anything_is_projected():
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    made = [
        ProjectedAdamW([{"params": [p], "projection": {"rank": 2, "interval": 2, "scale": 1.0}}], fused=True)
        for p in parameters
    ]

    def closure():
        loss = parameters[0].square().sum()
        loss.backward()
        return loss

    assert made[0].step(closure) == start.square().sum()
    parameters[1].grad = 2 * start
    made[1].step()
    assert torch.equal(*parameters) and not torch.equal(parameters[0], start)


def test_the_space_is_that_of_the_shorter_side():
    for shape in ((9, 4), (4, 9)):
        found = space(torch.randn(shape, generator=torch.Generator().manual_seed(2)), 3)
        assert found.shape == (4, 3)
        torch.testing.assert_close(found.T @ found, torch.eye(3))


def steps(graft, optimizer, count=3):
    for step in range(count):
        batch = torch.randint(3, tiny.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(step))
        graft.model(input_ids=batch).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_the_optimizer_keeps_is_counted_exactly(kind):
    graft = attach(tiny.bare(kind), "galore(rank=3)")
    optimizer = graft.optimizer()
    steps(graft, optimizer, 1)
    assert isinstance(optimizer, ProjectedAdamW)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    low = 0
    for name, parameter in graft.parameters.items():
        kept = sum(t.numel() for key, t in optimizer.state[parameter].items() if key != "step")
        m, n = min(parameter.shape), max(parameter.shape)
        if "projection" in groups[id(parameter)]:
            low += 1
            assert kept == 3 * m + 2 * 3 * n, name  # the space, and two moments
        else:
            assert kept == 2 * parameter.numel() or kept == 0, name
    assert low == tiny.BLOCKS * {"bert": 6, "gpt2": 4, "llama": 7}[kind]


def test_the_rest_has_plain_adam():
    grafts = [attach(tiny.bare("bert"), text) for text in ("galore(rank=3, lr=0.001)", "full(lr=0.001)")]
    for graft in grafts:
        steps(graft, graft.optimizer(), 1)
    ours, theirs = (graft.parameters for graft in grafts)
    for name, label in grafts[0].labels.items():
        assert torch.equal(ours[name], theirs[name]) == (label.projection is None), name


def test_a_rank_that_projects_nothing_is_refused():
    with pytest.raises(UserError, match=r"galore\(rank=16\).*nothing would be projected.*full\(\)"):
        attach(tiny.bare("bert"), "galore(rank=16)")


def test_sites_choose_what_is_projected():
    graft = attach(tiny.bare("bert"), "galore(rank=2, sites='blocks[-1:].ffn')")
    low = {name for name, label in graft.labels.items() if label.projection is not None}
    assert low == {f"encoder.layer.2.{name}.dense.weight" for name in ("intermediate", "output")}


def test_where_there_is_no_matrix_it_is_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    with pytest.raises(UserError, match=r"galore\(\).*full\(\)"):
        attach(model, "galore()")


def test_a_run_trains_what_is_planned_and_goes_on_after_a_stop(ready):
    run = ready("galore(rank=2, interval=4) + head()")
    plan = run.prepared.plan
    done = list(run.loop)
    assert all(math.isfinite(step.loss) for step in done)
    moments = [t for state in run.loop.optimizer.state.values() for key, t in state.items() if key != "step"]
    assert plan.optimizer_bytes == sum(t.numel() * t.element_size() for t in moments)
    full = ready("full() + head()").prepared.plan
    assert plan.optimizer_bytes < full.optimizer_bytes and plan.trained_parameters == full.trained_parameters
