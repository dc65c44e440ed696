"""galore: AdamW in a low-rank space of the gradient (Zhao et al. 2024), against a plain reference."""

import math

import pytest
import tiny
import torch

from graftkit import GaLore, UserError, attach
from graftkit.optim.galore import ProjectedAdamW
from graftkit.optim.shared.projection import singular_space


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


def make(parameters, lr=0.01, **options):
    group = {"params": parameters, "lr": lr, "weight_decay": 0.1, "hidden": True}
    return GaLore(**options).make([group])


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_steps_are_those_of_the_algorithm(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(8)]
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = make([parameter], rank=2, interval=3, scale=0.25)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), reference(weight, gradients, 2, 3, 0.25, 0.01, 0.1))


def test_betas_and_eps_are_those_of_the_options():
    generator = torch.Generator().manual_seed(4)
    weight, *gradients = (torch.randn(6, 4, generator=generator) for _ in range(5))
    ours = torch.nn.Parameter(weight.clone())
    bias, plain_bias = (torch.nn.Parameter(weight[0].clone()) for _ in range(2))
    optimizer = make([ours, bias], rank=2, interval=2, scale=1.0, beta1=0.5, beta2=0.7, eps=0.1)
    plain = torch.optim.AdamW([plain_bias], lr=0.01, weight_decay=0.1, betas=(0.5, 0.7), eps=0.1, fused=True)
    for gradient in gradients:
        ours.grad, bias.grad, plain_bias.grad = gradient.clone(), gradient[0].clone(), gradient[0].clone()
        optimizer.step()
        plain.step()
    expected = reference(weight, gradients, 2, 2, 1.0, 0.01, 0.1, betas=(0.5, 0.7), eps=0.1)
    torch.testing.assert_close(ours.detach(), expected)
    assert torch.equal(bias, plain_bias)


def test_a_gradient_along_the_axes_gives_the_steps_of_adam():
    """Where the singular vectors are the axes, nothing but the rank sets it apart from AdamW."""
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1e-3])
    start = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    projected = make([ours], lr=0.1, rank=4, interval=2, scale=1.0)
    plain = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)
    for step in range(5):
        gradient = torch.zeros(6, 5)
        gradient[:5].diagonal().copy_(values * (1 + step))
        for parameter, optimizer in ((ours, projected), (theirs, plain)):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours[:, :4], theirs[:, :4])


def test_a_closure_is_called_before_anything_is_projected():
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    made = [make([p], rank=2, interval=2) for p in parameters]

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
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        found = singular_space(gradient, 3, "full", 2, 0)
        assert found.shape == (4, 3)
        torch.testing.assert_close(found.T @ found, torch.eye(3))


def steps(graft, optimizer, count=3):
    for step in range(count):
        batch = torch.randint(3, tiny.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(step))
        graft.model(input_ids=batch).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def low_rank(optimizer):
    """The parameters whose gradients are projected, by identity."""
    return {id(p) for group in optimizer.param_groups if group["own"] for p in group["params"]}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_linear_layers_of_the_body_are_projected_and_counted_exactly(kind):
    graft = attach(tiny.bare(kind), "full()")
    optimizer = graft.optimizer(optimizer="galore(rank=3)")
    steps(graft, optimizer, 1)
    assert isinstance(optimizer, ProjectedAdamW)
    chosen = low_rank(optimizer)
    for name, parameter in graft.parameters.items():
        state = optimizer.state[parameter]
        kept = sum(t.numel() for key, t in state.items() if torch.is_tensor(t) and key != "step")
        m, n = min(parameter.shape), max(parameter.shape)
        if id(parameter) in chosen:
            assert "embed" not in name and "wte" not in name and "wpe" not in name
            assert kept == 3 * m + 2 * 3 * n, name  # the space, and two moments
        else:
            assert kept == 2 * parameter.numel() or kept == 0, name
    assert len(chosen) == tiny.BLOCKS * {"bert": 6, "gpt2": 4, "llama": 7}[kind]


def test_the_rest_has_plain_adamw():
    grafts = [attach(tiny.bare("bert"), "full(lr=0.001)") for _ in range(2)]
    optimizers = [
        graft.optimizer(optimizer=text) for graft, text in zip(grafts, ("galore(rank=3)", "adamw()"))
    ]
    for graft, optimizer in zip(grafts, optimizers):
        steps(graft, optimizer, 1)
    ours, theirs = (graft.parameters for graft in grafts)
    chosen = low_rank(optimizers[0])
    for name in grafts[0].labels:
        assert torch.equal(ours[name], theirs[name]) == (id(ours[name]) not in chosen), name


@pytest.mark.parametrize(
    "method,wanted",
    [
        ("unfreeze('blocks[-1:].ffn')", 2),
        ("gradual_unfreeze()", 6 * tiny.BLOCKS),
        ("full() + layerwise_lr(decay=0.5)", 6 * tiny.BLOCKS),
        ("full() + freeze('blocks[0]')", 6 * (tiny.BLOCKS - 1)),
        ("unfreeze('attention') + lora(rank=5, sites='ffn')", 4 * tiny.BLOCKS),  # and not what lora adds
        ("full() + head(classes=9, pooling='mean', hidden=9)", 6 * tiny.BLOCKS),  # nor the head
    ],
)
def test_it_goes_with_every_method_that_trains_linear_layers(method, wanted):
    graft = attach(tiny.bare("bert"), method)
    optimizer = graft.optimizer(optimizer=GaLore(rank=3))
    found = [name for name, p in graft.parameters.items() if id(p) in low_rank(optimizer)]
    assert len(found) == wanted and all(name.startswith("encoder.layer.") for name in found)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    plain = {id(p): group["lr"] for group in graft.param_groups() for p in group["params"]}
    assert rates == plain


@pytest.mark.parametrize(
    "method,optimizer",
    [("full()", "galore(rank=64)"), ("lora(rank=3)", "galore(rank=2)"), ("bitfit()", "galore(rank=1)")],
)
def test_what_would_project_nothing_is_refused(method, optimizer, ready):
    with pytest.raises(UserError, match=r"galore\(.*nothing would be projected.*lower rank"):
        attach(tiny.bare("bert"), method).optimizer(optimizer=optimizer)
    with pytest.raises(UserError, match=r"galore\(.*nothing would be projected"):
        ready(f"{method} + head()", optimizer=optimizer)


def test_where_there_is_no_matrix_it_is_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    with pytest.raises(UserError, match="nothing would be projected"):
        attach(model, "full()").optimizer(optimizer="galore(rank=1)")


def test_a_run_trains_what_is_planned(ready):
    run = ready("full() + head()", optimizer="galore(rank=2, interval=4)")
    plan = run.prepared.plan
    done = list(run.loop)
    assert all(math.isfinite(step.loss) for step in done)
    kept = [t for state in run.loop.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert plan.optimizer_bytes == sum(t.numel() * t.element_size() for t in kept)
    assert plan.optimizer == "galore(rank=2, interval=4)"
    full = ready("full() + head()").prepared.plan
    assert plan.optimizer_bytes < full.optimizer_bytes and plan.trained_parameters == full.trained_parameters
