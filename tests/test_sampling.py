"""Which tokens are kept: against the definition of the inclusion probabilities, and the loss over all tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from common.cache.sampling import draw_tokens, inclusion_probabilities
from kernels.feature_loss_reference import cached_feature_loss_reference

DRAWS = 3000


def spread_weights(tokens: int = 200, seed: int = 0) -> npt.NDArray[np.float32]:
    """Weights that differ as much as a teacher's: the heaviest tenth has about half of the sum."""
    return np.exp(1.3 * np.random.default_rng(seed).standard_normal(tokens)).astype(np.float32)


def draws(weights: npt.NDArray[np.float32], kept: int, count: int = DRAWS) -> npt.NDArray[np.float64]:
    """(count, T): the weight that each token is kept with in each draw, 0 where it is not kept."""
    found = np.zeros((count, len(weights)))
    for view in range(count):
        positions, kept_weights = draw_tokens(weights, kept, (5, 17, view))
        found[view, positions] = kept_weights
    return found


@pytest.mark.parametrize("kept", [1, 7, 50, 120, 199])
def test_probabilities_solve_their_equation(kept: int) -> None:
    """min(1, c W) with c found by bisection in float64, against ours: equal to 1e-9; they add up to `kept`."""
    weights = spread_weights()
    low, high = 0.0, kept / float(weights.min())
    for _ in range(200):
        middle = (low + high) / 2
        if np.minimum(1, middle * weights.astype(np.float64)).sum() < kept:
            low = middle
        else:
            high = middle
    probabilities = inclusion_probabilities(weights, kept)
    np.testing.assert_allclose(probabilities, np.minimum(1, low * weights.astype(np.float64)), rtol=1e-9)
    assert probabilities.sum() == pytest.approx(kept, rel=1e-12)
    assert probabilities.max() <= 1


@pytest.mark.parametrize("kept", [1, 20, 100, 199])
def test_inclusion_counts_match_the_probabilities(kept: int) -> None:
    """Of 3000 draws, how many keep each token, against pi: within 5 standard errors of a binomial count for every one
    of the 200 tokens, and always for those of pi 1. Every draw keeps exactly `kept`, with weight W / pi."""
    weights = spread_weights()
    probabilities = inclusion_probabilities(weights, kept)
    found = draws(weights, kept)
    assert ((found > 0).sum(axis=1) == kept).all()
    error = (found > 0).mean(axis=0) - probabilities
    assert (np.abs(error) <= 5 * np.sqrt(probabilities * (1 - probabilities) / DRAWS) + 1e-12).all()
    _, tokens = np.nonzero(found)
    np.testing.assert_allclose(found[found > 0], (weights / probabilities)[tokens], rtol=1e-6)


@pytest.mark.parametrize("kept", [10, 50])
def test_mean_over_draws_is_the_dense_loss_and_gradient(kept: int) -> None:
    """Loss and gradient of the student's features, averaged over 3000 draws, against the loss over all tokens: every
    number within 5 of its own standard errors, which are measured on the draws. The means come as near as 4% (loss)
    and 12% (relative L2 of the gradient), where a single draw's gradient is off by more than half."""
    generator = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(200, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = spread_weights()
    student.requires_grad_()

    def loss_and_gradient(
        positions: npt.NDArray[np.int32], kept_weights: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64]:
        rows = torch.from_numpy(positions.astype(np.int64))
        chosen = torch.from_numpy(kept_weights.astype(np.float64))
        loss = cached_feature_loss_reference(student.unsqueeze(0), teacher[rows], rows, chosen, None, None, None)
        (gradient,) = torch.autograd.grad(loss, student)
        return torch.cat((loss.detach().reshape(1), gradient.flatten())).numpy()

    dense = loss_and_gradient(np.arange(200, dtype=np.int32), weights)
    found = np.stack([loss_and_gradient(*draw_tokens(weights, kept, (5, 17, view))) for view in range(DRAWS)])
    mean, error = found.mean(axis=0), found.std(axis=0) / np.sqrt(DRAWS)
    assert (np.abs(mean - dense) <= 5 * error + 1e-5 * np.abs(dense)).all()
    assert abs(mean[0] / dense[0] - 1) < 0.04
    assert np.linalg.norm(mean[1:] - dense[1:]) < 0.12 * np.linalg.norm(dense[1:])
    assert np.linalg.norm(found[0, 1:] - dense[1:]) > 0.5 * np.linalg.norm(dense[1:])


def test_heaviest_tokens_alone_would_be_biased() -> None:
    """The same number of tokens, but always the heaviest, with their own weights: their sum is a quarter short, which
    the test above would notice."""
    weights = np.sort(spread_weights())
    assert weights[-50:].sum() < 0.75 * weights.sum()


def test_all_tokens_are_kept_as_they_are() -> None:
    weights = spread_weights()
    positions, kept_weights = draw_tokens(weights, len(weights), (0, 1, 2))
    np.testing.assert_array_equal(positions, np.arange(len(weights)))
    np.testing.assert_array_equal(kept_weights, weights)


@pytest.mark.parametrize(("weighing", "kept"), [(0, 30), (10, 30), (30, 30), (60, 30), (1, 99)])
def test_weights_of_zero(weighing: int, kept: int) -> None:
    """Of 100 tokens `weighing` count at all. All of those are kept where there is room, with their own weights, and
    the others fill up the rest with weight 0; exactly `kept` different ones, in ascending order."""
    weights = np.zeros(100, np.float32)
    weights[np.random.default_rng(0).permutation(100)[:weighing]] = spread_weights(weighing)
    for view in range(20):
        positions, kept_weights = draw_tokens(weights, kept, (0, 3, view))
        assert len(positions) == kept
        assert (np.diff(positions) > 0).all()
        if weighing <= kept:
            np.testing.assert_array_equal(kept_weights, weights[positions])
            assert kept_weights.sum() == pytest.approx(weights.sum(), rel=1e-6)
        else:
            assert (weights[positions] > 0).all()


def test_one_token_with_nearly_all_the_weight() -> None:
    """Weights over 12 orders of magnitude: exactly as many as asked for, the heaviest among them, nothing infinite."""
    weights = np.logspace(-9, 3, 300).astype(np.float32)
    for kept in (1, 2, 17, 299):
        positions, kept_weights = draw_tokens(weights, kept, (0, 3, 4))
        assert len(set(positions.tolist())) == kept
        assert np.isfinite(kept_weights).all()
        if kept > 1:
            assert positions[-1] == 299


def test_the_key_alone_decides() -> None:
    """The same key draws the same tokens; of 50 other seeds, images and views each, nearly all draw others."""
    weights = spread_weights()
    first, first_weights = draw_tokens(weights, 40, (1, 2, 3))
    again, again_weights = draw_tokens(weights.copy(), 40, (1, 2, 3))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first_weights, again_weights)
    for place in range(3):
        keys = [
            tuple(value + (step if index == place else 0) for index, value in enumerate((1, 2, 3)))
            for step in range(1, 51)
        ]
        others = [draw_tokens(weights, 40, key)[0] for key in keys]  # type: ignore[arg-type]
        assert sum(bool((other != first).any()) for other in others) >= 45
