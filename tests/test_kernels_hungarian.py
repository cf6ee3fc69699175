"""Hungarian matching of batches against scipy called matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kernels import hungarian, hungarian_start


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _one_by_one(costs: Tensor, row_mask: Tensor, column_mask: Tensor) -> Tensor:
    """The same by scipy on each matrix cut down to its rows and columns; masks already have the leading dimensions."""
    matched = torch.full((*costs.shape[:-2], costs.shape[-1]), -1)
    for place in np.ndindex(*costs.shape[:-2]):
        rows, columns = row_mask[place].nonzero().flatten(), column_mask[place].nonzero().flatten()
        chosen_rows, chosen_columns = linear_sum_assignment(costs[place][rows][:, columns].double().numpy())
        matched[place][columns[chosen_columns]] = rows[chosen_rows]
    return matched


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_layers_and_images(threads: int) -> None:
    """6 layers x 2 images x 40x25: identical to scipy on each matrix, on any number of threads."""
    torch.set_num_threads(threads)
    costs = torch.randn(6, 2, 40, 25, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(6, 2, 40, dtype=torch.bool), torch.ones(6, 2, 25, dtype=torch.bool)
    found = hungarian(costs)
    assert found.dtype == torch.int64
    assert torch.equal(found, _one_by_one(costs, *everything))


@settings(deadline=None, max_examples=60)
@given(
    leading=st.sampled_from([(), (3,), (2, 3), (2, 1, 2), (0, 2)]),
    rows=st.integers(0, 7),
    columns=st.integers(0, 7),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    masked=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**32),
)
def test_any_shape_and_mask(
    leading: tuple[int, ...],
    rows: int,
    columns: int,
    dtype: torch.dtype,
    masked: tuple[bool, bool],
    seed: int,
) -> None:
    """More rows or more columns, none of either, masks given for the last image dimension only and broadcast over the
    rest, and NaN and infinity wherever a mask covers it: identical to scipy on what is not masked."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randn(*leading, rows, columns, generator=generator).to(dtype)
    row_mask = torch.rand(*leading[-1:], rows, generator=generator) < 0.6
    column_mask = torch.rand(*leading[-1:], columns, generator=generator) < 0.6
    full_rows = row_mask.expand(*leading, rows) if masked[0] else torch.ones(*leading, rows).bool()
    full_columns = column_mask.expand(*leading, columns) if masked[1] else torch.ones(*leading, columns).bool()
    expected = _one_by_one(costs, full_rows, full_columns)
    covered = ~(full_rows[..., None] & full_columns[..., None, :])
    costs = costs.masked_fill(covered, math.nan if seed % 2 else math.inf)
    found = hungarian(costs, row_mask if masked[0] else None, column_mask if masked[1] else None)
    assert torch.equal(found, expected)


def test_starting_is_not_waiting() -> None:
    """What is started twice and asked for in the other order comes out right, twice if asked twice."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 9, 5, generator=generator), torch.rand(3, 4, 6, generator=generator)
    matchings = hungarian_start(first), hungarian_start(second)
    for _ in range(2):
        assert torch.equal(matchings[1].result(), hungarian(second))
        assert torch.equal(matchings[0].result(), hungarian(first))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_costs_name_layer_and_image(bad: float) -> None:
    """The first bad matrix is named, whichever thread found it; the same number in a masked row is no error."""
    costs = torch.rand(6, 2, 8, 5)
    costs[3, 1, 2, 4] = bad
    costs[5, 0, 0, 0] = bad
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with pytest.raises(ValueError, match="layer 3, image 1 hold NaN or infinity"):
            hungarian(costs)
    with pytest.raises(ValueError, match="the costs of image 1 hold"):
        hungarian(costs[3])
    rows = torch.ones(6, 2, 8, dtype=torch.bool)
    rows[3, 1, 2] = rows[5, 0, 0] = False
    assert (hungarian(costs, rows) >= 0).all()


@pytest.mark.parametrize(
    ("costs", "rows", "columns", "message"),
    [
        (torch.zeros(4), None, None, r"costs must be floating and \(..., N, G\)"),
        (torch.zeros(2, 4, 3, dtype=torch.int64), None, None, "costs must be floating"),
        (torch.zeros(2, 4, 3), torch.ones(2, 3, dtype=torch.bool), None, "row_mask .* does not broadcast"),
        (torch.zeros(2, 4, 3), None, torch.ones(2, 3), "column_mask must be bool"),
    ],
)
def test_bad_input_is_refused(costs: Tensor, rows: Tensor | None, columns: Tensor | None, message: str) -> None:
    """Wrong shapes and dtypes give ValueError at the start, not when the result is asked for."""
    with pytest.raises(ValueError, match=message):
        hungarian_start(costs, rows, columns)
