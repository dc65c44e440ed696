"""lion against the paper's formula and the reference package."""

import pytest
import torch

from graftkit import Lion


def made(shape=(6, 5), steps=7):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps + 1)]


def take(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()


def test_steps_are_those_of_the_paper():
    weight, *gradients = made()
    parameter = torch.nn.Parameter(weight.clone())
    group = {"params": [parameter], "lr": 0.1, "weight_decay": 0.3}
    take(Lion(beta1=0.8, beta2=0.95).make([group]), parameter, gradients)
    moment = torch.zeros_like(weight)
    for gradient in gradients:
        weight = weight - 0.1 * (torch.sign(0.8 * moment + 0.2 * gradient) + 0.3 * weight)
        moment = 0.95 * moment + 0.05 * gradient
    torch.testing.assert_close(parameter.detach(), weight)


@pytest.mark.parametrize("package", ["lion_pytorch", "pytorch_optimizer"])
def test_steps_are_those_of_the_package(package):
    library = pytest.importorskip(package)
    weight, *gradients = made()
    ours, theirs = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    take(Lion().make([{"params": [ours], "lr": 0.01, "weight_decay": 0.1}]), ours, gradients)
    take(library.Lion([theirs], lr=0.01, weight_decay=0.1), theirs, gradients)
    torch.testing.assert_close(ours, theirs)
