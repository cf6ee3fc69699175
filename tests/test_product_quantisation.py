"""Product quantisation of tokens: the search for the nearest centroid, the codebooks, and what they lose."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.cluster.vq import kmeans2, vq

from common.cache.codec import decode_tokens, encode_tokens
from common.cache.product import (
    Codebooks,
    codebooks_of,
    deal,
    decode_codes,
    distances,
    encode_codes,
    principal_components,
    train_codebooks,
)
from kernels import cached_feature_loss, nearest_codes
from kernels.nearest_codes import nearest_codes_reference
from student_train.feature_loss import rotated

Floats = npt.NDArray[np.float32]


def correlated(count: int, channels: int = 32, seed: int = 0) -> Floats:
    """Tokens whose k-th component has a variance of 1 / k^1.5, mixed over all channels, with a mean."""
    generator = np.random.default_rng(seed)
    mixing = np.linalg.qr(np.random.default_rng(99).standard_normal((channels, channels)))[0]
    components = generator.standard_normal((count, channels)) * np.arange(1, channels + 1) ** -0.75
    return (components @ mixing + 3).astype(np.float32)


@pytest.mark.parametrize(("groups", "width"), [(1, 8), (5, 8), (3, 4), (2, 3), (4, 1)])
def test_nearest_codes_against_scipy(groups: int, width: int) -> None:
    """Both versions against scipy's vq, group by group: the same centroids, but for ties in float32's rounding, where
    the squares of the distances agree to 4e-6."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5003, groups * width, generator=generator)
    codebooks = torch.randn(groups, 256, width, generator=generator)
    for found in (nearest_codes(features, codebooks), nearest_codes_reference(features, codebooks)):
        assert found.dtype == torch.uint8
        assert found.shape == (5003, groups)
        for group in range(groups):
            part, book = features[:, group * width : (group + 1) * width].double(), codebooks[group].double()
            expected, distance = vq(part.numpy(), book.numpy())
            ours = (part - book[found[:, group].long()]).norm(dim=1).numpy()
            np.testing.assert_allclose(ours**2, distance**2, atol=4e-6)
            assert (found[:, group].numpy() == expected).mean() > 0.99


def test_nearest_codes_at_the_edges() -> None:
    """Of equal centroids the first; no tokens at all; the same codes with one and two threads; wrong shapes refused."""
    codebooks = torch.zeros(2, 256, 8)
    codebooks[:, 200:] = 1
    features = torch.cat((torch.zeros(1, 16), torch.ones(1, 16), -torch.ones(1, 16)))
    assert nearest_codes(features, codebooks).tolist() == [[0, 0], [200, 200], [0, 0]]
    assert nearest_codes(torch.empty(0, 16), codebooks).shape == (0, 2)
    assert nearest_codes_reference(torch.empty(0, 16), codebooks).shape == (0, 2)
    many = torch.randn(999, 16)
    threads, books = torch.get_num_threads(), torch.randn(2, 256, 8)
    try:
        torch.set_num_threads(1)
        alone = nearest_codes(many, books)
        torch.set_num_threads(2)
        assert nearest_codes(many, books).equal(alone)
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(ValueError, match=r"codebooks must be float32 and \(M, 256, C/M\) for C = 16"):
        nearest_codes(many, torch.randn(3, 256, 8))
    with pytest.raises(ValueError, match="features must be float32"):
        nearest_codes(many.double(), books)


def test_components_are_dealt_evenly() -> None:
    """Each component once; the products of the groups' variances within a factor of 4, where in order they differ by
    more than a billion; and the largest four in four groups."""
    variances = np.arange(1, 33) ** -3.0
    dealt = deal(variances, 8)
    assert sorted(dealt.ravel().tolist()) == list(range(32))
    products = np.log2([variances[group].prod() for group in dealt])
    assert np.ptp(products) < 2
    in_order = np.log2(variances.reshape(4, 8).prod(axis=1))
    assert np.ptp(in_order) > 30
    assert {int(np.flatnonzero((dealt == component).any(axis=1))[0]) for component in range(4)} == {0, 1, 2, 3}


def squared_error(tokens: Floats, books: Codebooks) -> float:
    return float(np.square(decode_codes(encode_codes(tokens, books), books) - tokens).sum())


@pytest.mark.parametrize("components", [4, 8])
def test_codebooks_lose_little(components: int) -> None:
    """Codebooks of least error, of tokens that they were not found with: the squared error against scipy's k-means of
    the same rotated groups, at most 5% above, and against that of the channels as they are, below .8 of it; the stated
    share within a tenth of what is lost of the training tokens. The rotation is orthogonal to 1e-5."""
    training, tokens = correlated(4000), correlated(1000, seed=1)
    alike = np.ones(len(training), np.float32)
    variances, directions = principal_components(training, alike)
    dealt = directions[:, deal(variances, components).ravel()]
    books = codebooks_of(training, alike, dealt, components, stretched=False)
    np.testing.assert_allclose(books.rotation.T @ books.rotation, np.eye(32), atol=1e-5)
    codes = encode_codes(tokens, books)
    error = squared_error(tokens, books)
    np.testing.assert_array_equal(encode_codes(decode_codes(codes, books), books), codes)
    assert np.square(distances(tokens, codes, books)).sum() == pytest.approx(error, rel=1e-3)

    def by_scipy(rotated: Floats, unseen: Floats) -> float:
        total = 0.0
        for group in range(32 // components):
            part = slice(group * components, (group + 1) * components)
            centroids, _ = kmeans2(rotated[:, part].astype(np.float64), 256, minit="points", iter=15, seed=0)
            total += float(np.square(vq(unseen[:, part].astype(np.float64), centroids)[1]).sum())
        return total

    assert error < 1.05 * by_scipy(training[:3000] @ books.rotation, tokens @ books.rotation)
    assert error < 0.8 * by_scipy(training[:3000], tokens)
    variance = np.square(training - training.mean(axis=0)).sum()
    assert books.codebook_error.item() == pytest.approx(squared_error(training, books) / variance, rel=0.1)


@pytest.mark.parametrize("components", [4, 8])
def test_decoded_tokens_are_right_on_average(components: int) -> None:
    """Of tokens that the codebooks were not found with, the slope of decoded against true values, component by
    component: .9 to 1.1 for each, where codebooks of least error are below .5 for the smallest; their squared error is
    below twice that one's."""
    training, tokens = correlated(6000), correlated(6000, seed=1)
    alike = np.ones(len(training), np.float32)
    variances, directions = principal_components(training, alike)
    plain = codebooks_of(
        training, alike, directions[:, deal(variances, components).ravel()], components, stretched=False
    )
    books = train_codebooks(training, alike, components)

    def slopes(books: Codebooks) -> Floats:
        decoded = (decode_codes(encode_codes(tokens, books), books) - 3) @ directions
        true = (tokens - 3) @ directions
        found: Floats = (decoded * true).mean(axis=0) / np.square(true).mean(axis=0)
        return found

    assert np.abs(slopes(books) - 1).max() < 0.1
    assert slopes(plain).min() < (0.5 if components == 8 else 0.9)
    assert squared_error(tokens, plain) < squared_error(tokens, books) < 2 * squared_error(tokens, plain)


def test_weights_decide_where_centroids_go() -> None:
    """Two kinds of tokens, one of which counts a hundred times as much: its error is below .6 of what it is when
    both count alike, and training twice gives the same codebooks."""
    tokens = np.concatenate((correlated(4000), correlated(4000, seed=1)[:, ::-1] * 3))
    heavy = np.repeat(np.array([100, 1], np.float32), 4000)
    alike = train_codebooks(tokens, np.ones(8000, np.float32), 8)
    books = train_codebooks(tokens, heavy, 8)
    assert squared_error(tokens[:4000], books) < 0.6 * squared_error(tokens[:4000], alike)
    again = train_codebooks(tokens, heavy, 8)
    for name, value in vars(books).items():
        np.testing.assert_array_equal(value, getattr(again, name))


def test_few_and_equal_tokens() -> None:
    """Fewer tokens than centroids come back to rounding; weights that are all 0, and tokens without variance, are no
    trouble."""
    few = correlated(40)
    books = train_codebooks(few, np.zeros(40, np.float32), 8)
    np.testing.assert_allclose(decode_codes(encode_codes(few, books), books), few, atol=1e-4)
    equal = np.full((300, 16), 2.5, np.float32)
    books = train_codebooks(equal, np.ones(300, np.float32), 8)
    np.testing.assert_allclose(decode_codes(encode_codes(equal, books), books), equal, atol=1e-5)
    assert books.codebook_error.item() < 1e-3


def test_the_feature_loss_of_codes_is_that_of_the_decoded_tokens() -> None:
    """The loss and its gradient from codes, with the student rotated into the codebooks' space, against those from the
    tokens that the codec decodes, in float64: 1e-5 relative."""
    tokens = correlated(600)
    books = train_codebooks(tokens, np.ones(600, np.float32), 8)
    stored = encode_tokens(tokens, "pq8", books)
    student = torch.randn(1, 700, 32)
    positions, offsets, weights = torch.randperm(700)[:600], torch.tensor([0, 600]), torch.rand(600)

    def loss_and_gradient(of_codes: bool) -> tuple[float, torch.Tensor]:
        if of_codes:
            features = student.clone().requires_grad_()
            loss = cached_feature_loss(
                rotated(features, torch.from_numpy(books.rotation)),
                torch.from_numpy(stored["tokens"]),
                positions,
                weights,
                offsets,
                codebooks=torch.from_numpy(books.codebooks),
            )
        else:
            features = student.double().requires_grad_()
            decoded = torch.from_numpy(decode_tokens(stored, books)).double()
            loss = cached_feature_loss(features, decoded.float(), positions, weights, offsets, backend="reference")
        loss.backward()
        assert features.grad is not None
        return loss.item(), features.grad.double()

    (ours, gradient), (expected, exact) = loss_and_gradient(True), loss_and_gradient(False)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert (gradient - exact).norm() < 1e-5 * exact.norm()
