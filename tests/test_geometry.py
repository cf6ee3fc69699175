"""The arithmetic of feature grids against what the model does with a padded batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.detr.detector import DeformableDetr, DetectorConfig
from common.geometry import level_shapes, token_count, token_positions_in_batch

SIZES = [(128, 192), (97, 64), (65, 190), (1, 1)]


@pytest.fixture(scope="module", params=[1, 3, 4])
def model(request: pytest.FixtureRequest) -> DeformableDetr:
    config = DetectorConfig("tiny", 3, width=32, encoder_layers=1, decoder_layers=1, queries=5, levels=request.param)
    return DeformableDetr(config).eval()


def test_positions_are_the_unmasked_tokens_of_the_model(model):
    """Each sample's tokens, by ceil division, are exactly the tokens that the model's padding mask leaves of it.

    Compared with `DeformableDetr.encode` on a batch of unequal sizes padded to a multiple of 64: equal index sets,
    and equal level shapes of the batch.
    """
    mask = torch.ones(len(SIZES), 128, 192, dtype=torch.bool)
    for index, (height, width) in enumerate(SIZES):
        mask[index, :height, :width] = False
    with torch.no_grad():
        encoded = model.encode(torch.zeros(len(SIZES), 3, 128, 192), mask)
    assert encoded.level_shapes == level_shapes(128, 192, model.strides)
    for index, (height, width) in enumerate(SIZES):
        own = level_shapes(height, width, model.strides)
        positions = token_positions_in_batch(own, encoded.level_shapes)
        assert len(positions) == token_count(own)
        assert torch.equal(positions, (~encoded.token_mask[index]).nonzero()[:, 0])


@pytest.mark.parametrize("size", [(96, 101), (130, 65)])
def test_shapes_of_any_image_size(model, size):
    """Ceil division also gives the model's maps for sizes that no stride divides (exact)."""
    with torch.no_grad():
        encoded = model.encode(torch.zeros(1, 3, *size), torch.zeros(1, *size, dtype=torch.bool))
    assert encoded.level_shapes == level_shapes(*size, model.strides)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_positions_pick_the_samples_corner(sizes):
    """Against slicing: cutting the top left corner out of each level of a numbered batch gives the same numbers."""
    sample = [(h, w) for h, w, _, _ in sizes]
    batch = [(h + down, w + right) for h, w, down, right in sizes]
    numbers = torch.arange(token_count(batch)).split([h * w for h, w in batch])
    corners = [n.view(shape)[:h, :w].flatten() for n, shape, (h, w) in zip(numbers, batch, sample, strict=True)]
    assert torch.equal(token_positions_in_batch(sample, batch), torch.cat(corners))


def test_grids_that_do_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        token_positions_in_batch([(4, 5)], [(4, 4)])
    with pytest.raises(ValueError, match="levels"):
        token_positions_in_batch([(4, 4)], [(4, 4), (2, 2)])
