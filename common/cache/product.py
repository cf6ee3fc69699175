"""Product quantisation of tokens: one byte for 8 (pq8) or 4 (pq4) numbers (Jégou, Douze and Schmid, 2011).

The channels of an encoder's memory are far from independent: an eighth of their principal components hold most of
what varies. Tokens are rotated onto these components, the components are dealt into groups of equal share (Ge, He, Ke
and Sun, 2013, eigenvalue allocation), and each group is stored as the number of the nearest of 256 centroids, found by
k-means on tokens drawn by their weight in the feature loss. Many and common values get many centroids.

What a centroid decodes to is not the mean of what it stands for. That would have the least error, but it pulls every
component towards its average, the small ones nearly all the way, and a student that learns such targets learned less:
it cost three times the AP where that was measured (docs/fidelity.md). Each component is instead stretched about its
mean until, over the tokens, decoded values rise as the true ones do. Stretching small components makes most noise;
dividing each by the fourth root of its variance before looking for the nearest centroid, so that they get more of the
256, makes it least.

A rotation leaves squared errors as they are. The feature loss therefore rotates the student's features and looks the
teacher's up; nothing is rotated back in training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from kernels import nearest_codes

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

CENTROIDS = 256
ROUNDS = 20  # of k-means; more change the error by less than a hundredth
NO_VARIANCE = 1e-12  # or less: rounding
MOST_STRETCHED = 20.0  # times, a component that its centroids hardly tell apart


@dataclass(frozen=True)
class Codebooks:
    """What a store has once of its product quantisation: C channels in M groups.

    rotation: (C, C), orthogonal; token @ rotation are its components, group after group. codebooks: (M, 256, C/M), the
    components that codes stand for. centroids: (M, 256, C/M), among which the nearest to the components times
    component_scale (C,) is chosen. codebook_error: (1,), what decoding changes of the tokens that all this was found
    with, squared, as a share of their variance.
    """

    rotation: Floats
    codebooks: Floats
    centroids: Floats
    component_scale: Floats
    codebook_error: Floats


def train_codebooks(tokens: Floats, weights: Floats, components: int) -> Codebooks:
    """Codebooks for groups of `components` numbers, which divides C, from tokens (N, C) that count weights (N,) >= 0
    each. The same tokens give the same codebooks."""
    variances, directions = principal_components(tokens, weights)
    dealt = deal(np.sqrt(np.maximum(variances, 0)), components)
    return codebooks_of(tokens, weights, directions[:, dealt.ravel()], components)


def principal_components(tokens: Floats, weights: Floats) -> tuple[npt.NDArray[np.float64], Floats]:
    """Variances (C,), largest first, and directions (C, C), one a column."""
    mass = _mass(weights)
    centred = tokens - np.average(tokens, axis=0, weights=mass)
    variances, directions = np.linalg.eigh((centred.T * mass) @ centred / mass.sum())
    return variances[::-1], directions[:, ::-1].astype(np.float32)


def codebooks_of(
    tokens: Floats, weights: Floats, rotation: Floats, components: int, *, stretched: bool = True
) -> Codebooks:
    """Codebooks for groups of neighbouring columns of tokens @ rotation. Not stretched: those of least error."""
    mass, rotation = _mass(weights), np.ascontiguousarray(rotation)
    rotated = tokens @ rotation
    mean = np.average(rotated, axis=0, weights=mass)
    variance = np.average(np.square(rotated - mean), axis=0, weights=mass)
    varies = variance > max(1e-12 * float(variance.max()), NO_VARIANCE)
    scale = np.power(variance, -0.25 * stretched, where=varies, out=np.ones_like(variance)).astype(np.float32)
    # A quarter of many tokens measures the slopes, which look steeper on tokens that the centroids were found with.
    measuring = np.arange(len(tokens)) % 4 == 3
    finding = ~measuring
    if len(tokens) <= 8 * CENTROIDS:
        measuring[:] = finding[:] = True
    groups = (rotated[finding] * scale).reshape(finding.sum(), -1, components).transpose(1, 0, 2)
    generator = np.random.Generator(np.random.Philox(key=[0, 2]))
    centroids = np.stack([_kmeans(np.ascontiguousarray(group), mass[finding], generator) for group in groups])

    means = (centroids / scale.reshape(len(centroids), 1, -1)).astype(np.float32)
    found = Codebooks(rotation, means, centroids, scale, np.zeros(1, np.float32))
    codes = encode_codes(tokens, found)
    if stretched:
        books = _stretch(means, mean, codes[measuring], rotated[measuring], mass[measuring])
        found = replace(found, codebooks=books)
    decoded = _look_up(codes, found.codebooks).reshape(rotated.shape)
    error = np.average(np.square(rotated - decoded), axis=0, weights=mass).sum() / max(variance.sum(), NO_VARIANCE)
    return replace(found, codebook_error=np.array([error], np.float32))


def _stretch(
    means: Floats,
    mean: npt.NDArray[np.float64],
    codes: Codes,
    components: Floats,
    mass: npt.NDArray[np.float64],
) -> Floats:
    """Codebooks (M, 256, d) moved away from the mean (C,), each component by as much as makes what codes (N, M) decode
    to rise as the components (N, C) do."""
    true = components - mean
    decoded = _look_up(codes, means).reshape(components.shape) - mean
    rise, run = (np.average(true * other, axis=0, weights=mass) for other in (decoded, true))
    slope = np.divide(rise, run, where=run > NO_VARIANCE, out=np.ones_like(run))
    stretch = (1 / np.clip(slope, 1 / MOST_STRETCHED, 1)).reshape(len(means), 1, -1)
    middle = mean.reshape(len(means), 1, -1)
    stretched: Floats = (middle + (means - middle) * stretch).astype(np.float32)
    return stretched


def deal(variances: npt.NDArray[np.float64], components: int) -> npt.NDArray[np.intp]:
    """Which components (M, components) each group gets: the largest that is left goes to the group whose product of
    variances is least, so that every group has as much to tell."""
    groups = len(variances) // components
    dealt: list[list[int]] = [[] for _ in range(groups)]
    logs = np.log2(np.maximum(variances, 1e-12 * variances.max() + 1e-30))
    logs -= logs.min()  # none negative, so that a group with more components has no less
    for component in np.argsort(-variances, kind="stable").tolist():
        open_groups = [group for group in range(groups) if len(dealt[group]) < components]
        dealt[min(open_groups, key=lambda group: sum(logs[c] for c in dealt[group]))].append(component)
    return np.array(dealt)


def encode_codes(tokens: Floats, books: Codebooks) -> Codes:
    """Codes (S, M) of tokens (S, C)."""
    components = torch.from_numpy(tokens @ books.rotation * books.component_scale)
    codes: Codes = nearest_codes(components, torch.from_numpy(books.centroids)).numpy()
    return codes


def decode_codes(codes: Codes, books: Codebooks) -> Floats:
    """Tokens (S, C) float32, rotated back."""
    tokens: Floats = _look_up(codes, books.codebooks).reshape(len(codes), -1) @ books.rotation.T
    return tokens


def distances(tokens: Floats, codes: Codes, books: Codebooks) -> Floats:
    """How far (S, M) each group of the tokens (S, C), in scaled components, is from the centroid of its code."""
    parts = (tokens @ books.rotation * books.component_scale).reshape(*codes.shape, -1)
    found: Floats = np.linalg.norm(parts - _look_up(codes, books.centroids), axis=2)
    return found


def _mass(weights: Floats) -> npt.NDArray[np.float64]:
    return weights.astype(np.float64) if weights.any() else np.ones(len(weights))


def _look_up(codes: Codes, books: Floats) -> Floats:
    found: Floats = books[np.arange(codes.shape[1]), codes]
    return found


def _kmeans(points: Floats, mass: npt.NDArray[np.float64], generator: np.random.Generator) -> Floats:
    """Centroids (256, d) of points (N, d): Lloyd's algorithm from points drawn by mass. A centroid that no point is
    nearest to moves to the point that is worst off. Fewer points than centroids are their own, repeated."""
    possible = np.flatnonzero(mass)
    start = possible
    if len(possible) > CENTROIDS:
        start = generator.choice(len(mass), CENTROIDS, replace=False, p=mass / mass.sum())
    centroids = points[np.resize(start, CENTROIDS)]
    if len(possible) <= CENTROIDS:
        return centroids
    for _ in range(ROUNDS):
        nearest = nearest_codes(torch.from_numpy(points), torch.from_numpy(centroids[None])).numpy()[:, 0]
        held = np.bincount(nearest, mass, CENTROIDS)
        sums = np.stack([np.bincount(nearest, mass * column, CENTROIDS) for column in points.T], axis=1)
        empty = held == 0
        errors = mass * np.square(points - centroids[nearest]).sum(axis=1)
        centroids = np.where(empty[:, None], centroids, sums / np.maximum(held, 1e-300)[:, None]).astype(np.float32)
        centroids[empty] = points[np.argsort(-errors, kind="stable")[: empty.sum()]]
    return centroids
