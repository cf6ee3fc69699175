"""Product quantisation of tokens: one byte for 8 (pq8) or 4 (pq4) numbers (Jégou, Douze and Schmid, 2011).

The channels of an encoder's memory are far from independent: an eighth of their principal components hold most of
what varies. Tokens are rotated onto these components, the components are dealt into groups of equal share (Ge, He, Ke
and Sun, 2013, eigenvalue allocation), and each group is stored as the number of the nearest of 256 centroids, found by
k-means on tokens drawn by their weight in the feature loss. Many and common values get many centroids, so that at one
bit a number the error is below that of two evenly spaced bits on the channels as they are (docs/fidelity.md).

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


@dataclass(frozen=True)
class Codebooks:
    """rotation: (C, C), orthogonal; token @ rotation are its components, group after group. codebooks: (M, 256, C/M).
    codebook_error: (1,), the share lost of the variance of the tokens that the codebooks were found with."""

    rotation: Floats
    codebooks: Floats
    codebook_error: Floats


def train_codebooks(tokens: Floats, weights: Floats, components: int) -> Codebooks:
    """Codebooks for groups of `components` numbers, which divides C: the least squared error that k-means finds over
    tokens (N, C) that count weights (N,) >= 0 each. The same tokens give the same codebooks."""
    variances, directions = principal_components(tokens, weights)
    return codebooks_of(tokens, weights, directions[:, deal(variances, components).ravel()], components)


def principal_components(tokens: Floats, weights: Floats) -> tuple[npt.NDArray[np.float64], Floats]:
    """Variances (C,), largest first, and directions (C, C), one a column."""
    mass = _mass(weights)
    centred = tokens - np.average(tokens, axis=0, weights=mass)
    variances, directions = np.linalg.eigh((centred.T * mass) @ centred / mass.sum())
    return variances[::-1], directions[:, ::-1].astype(np.float32)


def codebooks_of(tokens: Floats, weights: Floats, rotation: Floats, components: int) -> Codebooks:
    """Codebooks for groups of neighbouring columns of tokens @ rotation."""
    mass, rotation = _mass(weights), np.ascontiguousarray(rotation)
    rotated = tokens @ rotation
    groups = rotated.reshape(len(tokens), -1, components).transpose(1, 0, 2)
    generator = np.random.Generator(np.random.Philox(key=[0, 2]))
    books = np.stack([_kmeans(np.ascontiguousarray(group), mass, generator) for group in groups])
    found = Codebooks(rotation, books, np.zeros(1, np.float32))
    lost = mass @ np.square(distances(tokens, encode_codes(tokens, found), found)).sum(axis=1)
    spread = mass @ np.square(rotated - np.average(rotated, axis=0, weights=mass)).sum(axis=1)
    return replace(found, codebook_error=np.array([lost / max(spread, 1e-30)], np.float32))


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
    codes: Codes = nearest_codes(torch.from_numpy(tokens @ books.rotation), torch.from_numpy(books.codebooks)).numpy()
    return codes


def decode_codes(codes: Codes, books: Codebooks) -> Floats:
    """Tokens (S, C) float32, rotated back."""
    tokens: Floats = _look_up(codes, books).reshape(len(codes), -1) @ books.rotation.T
    return tokens


def distances(tokens: Floats, codes: Codes, books: Codebooks) -> Floats:
    """How far (S, M) each group of the tokens (S, C) is from the centroid of its code."""
    parts = (tokens @ books.rotation).reshape(*codes.shape, -1)
    found: Floats = np.linalg.norm(parts - _look_up(codes, books), axis=2)
    return found


def _mass(weights: Floats) -> npt.NDArray[np.float64]:
    return weights.astype(np.float64) if weights.any() else np.ones(len(weights))


def _look_up(codes: Codes, books: Codebooks) -> Floats:
    found: Floats = books.codebooks[np.arange(codes.shape[1]), codes]
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
