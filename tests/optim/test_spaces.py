"""Low-rank spaces of gradients: exact and randomized singular vectors, and what happens when there are none."""

import pytest
import torch

from graftkit.optim.shared.projection import (
    OVERSAMPLING,
    ProjectionFallback,
    back,
    project,
    random_space,
    singular_space,
)

SHAPES = [(60, 40), (40, 60), (50, 50)]


def decaying(shape, power=1.0, seed=0):
    """A matrix whose singular values fall as k^-power."""
    generator = torch.Generator().manual_seed(seed)
    short = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], short, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], short, generator=generator)).Q
    return (left * torch.arange(1, short + 1) ** -power) @ right.T


def captured(gradient, space):
    return project(gradient, space).square().sum().item()


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_vectors_are_orthonormal_and_best(shape):
    gradient = decaying(shape)
    found = singular_space(gradient, 5, "full", 2, 0)
    assert found.shape == (min(shape), 5) and found.is_contiguous()
    torch.testing.assert_close(found.T @ found, torch.eye(5))
    expected = torch.linalg.svdvals(gradient)[:5].square().sum().item()
    assert captured(gradient, found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_randomized_vectors_are_almost_as_good(shape):
    """Flat spectra are the hard case: k^-1/2, of which power iterations make k^-5/2."""
    gradient = decaying(shape, power=0.5)
    best = captured(gradient, singular_space(gradient, 6, "full", 0, 0))
    shares = []
    for power in (0, 2):
        found = singular_space(gradient, 6, "randomized", power, 3)
        torch.testing.assert_close(found.T @ found, torch.eye(6))
        shares.append(captured(gradient, found) / best)
    assert shares[0] < shares[1] <= 1.00001 and shares[1] > 0.99


def test_a_sketch_depends_on_the_seed_alone():
    gradient = decaying((60, 40), power=0.5)
    first, again, other = (singular_space(gradient, 4, "randomized", 1, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.get_rng_state()
    singular_space(gradient, 4, "randomized", 1, 5)
    assert torch.equal(state, torch.get_rng_state())


def test_a_rank_close_to_the_side_is_computed_exactly():
    gradient = decaying((20, 12), power=0.5)
    rank = 12 - OVERSAMPLING
    found, exact = (singular_space(gradient, rank, svd, 0, 1) for svd in ("randomized", "full"))
    assert torch.equal(found, exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_projecting_a_matrix_of_the_space_and_back_changes_nothing(shape):
    gradient = decaying(shape)
    space = singular_space(gradient, 5, "full", 2, 0)
    within = back(project(gradient, space), space, shape)
    torch.testing.assert_close(back(project(within, space), space, shape), within)
    assert torch.linalg.matrix_rank(within) == 5


def test_random_spaces_keep_norms_on_average():
    gradient = torch.randn(300, 20, generator=torch.Generator().manual_seed(1))
    sizes = [project(gradient, random_space(gradient, 8, seed)).square().sum() for seed in range(200)]
    assert torch.stack(sizes).mean() == pytest.approx(gradient.square().sum().item(), rel=0.05)


def test_a_gradient_that_is_not_finite_keeps_the_space_before():
    gradient = decaying((30, 20))
    before = singular_space(gradient, 3, "full", 0, 0)
    gradient[2, 3] = float("nan")
    with pytest.warns(
        ProjectionFallback, match=r"\(30, 20\).*gradient is not finite; the space before is kept"
    ):
        assert torch.equal(singular_space(gradient, 3, "randomized", 1, 0, before), before)
    with pytest.warns(ProjectionFallback, match="a random space is used"):
        found = singular_space(gradient, 3, "full", 1, 0)
    torch.testing.assert_close(found.T @ found, torch.eye(3))


def fails(*arguments, **options):
    raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge.\nmore")


def test_an_svd_that_does_not_converge_is_replaced(monkeypatch):
    from graftkit.optim.shared import projection

    gradient = decaying((40, 30), power=2.0)
    exact = singular_space(gradient, 3, "full", 0, 0)
    monkeypatch.setattr(projection, "_full", fails)
    found = singular_space(gradient, 3, "full", 2, 0)  # the randomized one takes its place
    assert captured(gradient, found) == pytest.approx(captured(gradient, exact), rel=1e-3)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.warns(
        ProjectionFallback, match=r"does not converge \(linalg.svd: The algorithm failed to converge.\)"
    ):
        assert torch.equal(singular_space(gradient, 3, "full", 2, 0, exact), exact)
