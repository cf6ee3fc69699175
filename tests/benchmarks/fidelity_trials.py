"""Ways to lower the gradient's error at equal bytes that were tried: `python -m tests.benchmarks.fidelity_trials`.

Measured as in `fidelity`, for two of its settings, against what stores do now: along which order and with what chances
tokens are drawn, and how many bits and what transform of the channels their values get. Writes its table into
docs/fidelity.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from common.cache.codec import ChannelStatistics, decode_tokens, encode_tokens
from common.cache.product import (
    Codebooks,
    codebooks_of,
    deal,
    decode_codes,
    encode_codes,
    principal_components,
    train_codebooks,
)
from common.cache.sampling import draw_tokens
from common.records import CachedBatch
from tests.benchmarks.fidelity import (
    DOCS,
    Floats,
    Gradients,
    Setting,
    batches,
    calibrated,
    calibration_tokens,
    errors,
    prepare,
    settings,
)

BEGIN, END = "<!-- trials -->", "<!-- end of trials -->"
KEEP = 0.5
CURVE_BITS = 10  # a curve through 1024 x 1024 places
GROUP = 64  # channels that share a scale

Integers = npt.NDArray[np.intp]
Coding = Literal["exact", "int4", "2 bits", "1 bit", "channels", "in order", "least error", "unweighted", "pq8", "pq4"]


@dataclass(frozen=True)
class Trial:
    """order: in which the systematic draw walks over the tokens: row by row (as now) or along a Hilbert curve, level by
    level or through all levels at once. chances: what the chance to be kept is proportional to: W (as now), a power of
    it, or W times how much the token differs from its four neighbours, or from the channels' means. coding: how values
    are stored: exactly, in evenly spaced steps, or as product quantisation of groups of eight channels or components.
    """

    name: str
    keep: float
    order: Literal["rows", "curve", "levels"] = "rows"
    chances: Literal["weight", "power .8", "power .6", "neighbours", "means"] = "weight"
    coding: Coding = "exact"


TRIALS = [
    Trial("half of the tokens, drawn by W, row by row (as now)", KEEP),
    Trial("along a Hilbert curve in each level", KEEP, order="curve"),
    Trial("along one Hilbert curve through all levels", KEEP, order="levels"),
    Trial("chance W^.8", KEEP, chances="power .8"),
    Trial("chance W^.6", KEEP, chances="power .6"),
    Trial("chance W x difference from its neighbours", KEEP, chances="neighbours"),
    Trial("chance W x difference from the mean token", KEEP, chances="means"),
    Trial("all tokens, 4 bits a value, evenly spaced (int4)", 1.0, coding="int4"),
    Trial("2 bits a value, evenly spaced", 1.0, coding="2 bits"),
    Trial("2 bits a value, product quantisation (pq4)", 1.0, coding="pq4"),
    Trial("1 bit a value, evenly spaced", 1.0, coding="1 bit"),
    Trial("1 bit, product quantisation of channels as they are", 1.0, coding="channels"),
    Trial("1 bit, of principal components, in order", 1.0, coding="in order"),
    Trial("1 bit, of components dealt evenly", 1.0, coding="least error"),
    Trial("1 bit, the same, right on average (pq8)", 1.0, coding="pq8"),
    Trial("1 bit, pq8 found with each token alike", 1.0, coding="unweighted"),
]


@dataclass(frozen=True)
class Codecs:
    """What each coding needs, found with the same tokens."""

    channels: ChannelStatistics
    books: dict[Coding, Codebooks]

    def decoded(self, tokens: Floats, coding: Coding) -> Floats:
        """Tokens (S, C) as the coding gives them back."""
        if coding == "exact":
            return tokens
        if coding == "int4":
            return decode_tokens(dict(encode_tokens(tokens, "int4", self.channels)), self.channels)
        if coding in ("2 bits", "1 bit"):
            return evenly_spaced(tokens, self.channels, 4 if coding == "2 bits" else 2)
        return decode_codes(encode_codes(tokens, self.books[coding]), self.books[coding])


def find_codecs(tokens: Floats, weights: Floats, channels: ChannelStatistics) -> Codecs:
    """From tokens (N, C) that count weights (N,)."""
    alike, identity = np.ones_like(weights), np.eye(tokens.shape[1], dtype=np.float32)
    variances, directions = principal_components(tokens, weights)
    dealt = directions[:, deal(variances, 8).ravel()]
    books: dict[Coding, Codebooks] = {
        "pq8": train_codebooks(tokens, weights, 8),
        "pq4": train_codebooks(tokens, weights, 4),
        "unweighted": train_codebooks(tokens, alike, 8),
        "least error": codebooks_of(tokens, weights, dealt, 8, stretched=False),
        "in order": codebooks_of(tokens, weights, directions, 8, stretched=False),
        "channels": codebooks_of(tokens, weights, identity, 8, stretched=False),
    }
    return Codecs(channels, books)


def evenly_spaced(tokens: Floats, channels: ChannelStatistics, levels: int) -> Floats:
    """Decoded from so many evenly spaced levels about 0, with each group's scale of least squares, found
    by Lloyd's algorithm."""
    normalised = (tokens - channels.channel_shift) / channels.channel_scale
    values = normalised.reshape(len(tokens), -(-tokens.shape[1] // GROUP), -1)
    top = levels - 1
    scales = np.sqrt(np.square(values).mean(axis=2, keepdims=True)) / top
    for _ in range(5):
        level = np.clip(2 * np.floor(values / np.maximum(2 * scales, 1e-30)) + 1, -top, top)
        scales = (values * level).sum(axis=2, keepdims=True) / np.square(level).sum(axis=2, keepdims=True)
    decoded: Floats = (level * scales).reshape(tokens.shape) * channels.channel_scale + channels.channel_shift
    return decoded.astype(np.float32)


def hilbert(rows: Integers, columns: Integers) -> Integers:
    """Place (N,) of points of a square of 2^CURVE_BITS along Hilbert's curve, quadrant by quadrant."""
    place = np.zeros_like(rows)
    y, x = rows.copy(), columns.copy()
    for bit in reversed(range(CURVE_BITS)):
        side = 1 << bit
        right, low = (x >> bit) & 1, (y >> bit) & 1
        place += side * side * ((3 * right) ^ low)
        x, y = x & (side - 1), y & (side - 1)
        turned = (low == 0) & (right == 1)
        x, y = np.where(turned, side - 1 - x, x), np.where(turned, side - 1 - y, y)
        x, y = np.where(low == 0, y, x), np.where(low == 0, x, y)
    return place


def walk(shapes: Sequence[tuple[int, int]], order: str) -> Integers:
    """The tokens (T,) of a sample in that order."""
    places, first = [], 0
    for height, width in shapes:
        rows, columns = np.divmod(np.arange(height * width), width)
        if order == "rows":
            place = first + np.arange(height * width)
        elif order == "curve":
            place = first * 4**CURVE_BITS + hilbert(rows, columns)
        else:
            side = 1 << CURVE_BITS
            place = hilbert((rows * 2 + 1) * side // (2 * height), (columns * 2 + 1) * side // (2 * width))
        places.append(place)
        first += height * width
    return np.argsort(np.concatenate(places), kind="stable")


def chance(weights: Floats, normalised: Floats, shapes: Sequence[tuple[int, int]], chances: str) -> Floats:
    """What the tokens' chances (T,) to be kept are proportional to."""
    if chances.startswith("power"):
        return weights ** np.float32(chances.split()[1])
    if chances == "means":
        return weights * np.linalg.norm(normalised, axis=1).astype(np.float32)
    if chances == "neighbours":
        found, first = [], 0
        for height, width in shapes:
            level = normalised[first : first + height * width].reshape(height, width, -1)
            wide = np.pad(level, ((1, 1), (1, 1), (0, 0)), mode="edge")
            mean = (wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]) / 4
            found.append(np.linalg.norm(level - mean, axis=2).ravel())
            first += height * width
        return weights * (np.concatenate(found) + 1e-3).astype(np.float32)
    return weights


def stored(exact: CachedBatch, trial: Trial, codecs: Codecs, ids: Sequence[int], draw: int) -> CachedBatch:
    """The batch as a store written in that way would give it, decoded."""
    parts: list[tuple[Floats, npt.NDArray[np.int32], Floats]] = []
    channels = codecs.channels
    for index, (first, last) in enumerate(itertools.pairwise(exact.token_offsets.tolist())):
        tokens, weights = exact.tokens[first:last].numpy(), exact.token_weights[first:last].numpy()
        shapes = [(int(height), int(width)) for height, width in exact.level_shapes[index].tolist()]
        normalised = (tokens - channels.channel_shift) / channels.channel_scale
        order, base = walk(shapes, trial.order), chance(weights, normalised, shapes, trial.chances)
        places, base_weights = draw_tokens(base[order], max(1, round(trial.keep * len(tokens))), (0, ids[index], draw))
        kept = order[places]
        kept_weights = weights[kept] * (base_weights / np.maximum(base[kept], 1e-30))  # W / pi
        found = codecs.decoded(tokens[kept], trial.coding)
        parts.append((found, kept.astype(np.int32), kept_weights.astype(np.float32)))
    tokens_of, positions, weights_of = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    offsets = torch.tensor([0, *np.cumsum([len(part[1]) for part in parts])])
    return replace(exact, tokens=tokens_of, token_positions=positions, token_weights=weights_of, token_offsets=offsets)


def measure(setting: Setting, folder: Path, steps: int, count: int, draws: int) -> dict[str, tuple[float, ...]]:
    """Relative L2 of the feature loss's gradient, root mean square over batches and draws, and medians of the cosine of
    that and of the total gradient."""
    _, reader, student = prepare(setting, folder / f"{setting.name.split(',')[0]}.zarr", steps)
    channels = calibrated(reader)[0]
    assert isinstance(channels, ChannelStatistics)
    codecs = find_codecs(*calibration_tokens(reader), channels)
    found: dict[str, list[tuple[float, ...]]] = {trial.name: [] for trial in TRIALS}
    for batch, exact, ids in itertools.islice(batches(setting, reader, seed=1, unseen=True), count):
        gradients = Gradients(student, student(batch.images, batch.padding_mask), batch, setting.distillation)
        dense, rest = gradients.features(exact), gradients.others(exact)
        for trial in TRIALS:
            for draw in range(1 if trial.keep == 1 else draws):
                estimate = gradients.features(stored(exact, trial, codecs, ids, draw))
                found[trial.name].append((*errors(estimate, dense), *errors(estimate + rest, dense + rest)))
    reader.close()
    result = {}
    for name, values in found.items():
        l2, cosine, _, total = zip(*values, strict=True)
        result[name] = (
            float(np.sqrt(np.mean(np.square(l2)))),
            statistics.median(cosine),
            statistics.median(total),
        )
    return result


def table(results: dict[str, dict[str, tuple[float, ...]]]) -> str:
    """For docs/fidelity.md."""
    lines = ["| | " + " | ".join(f"{name}: features L2, cosine; total" for name in results) + " |"]
    lines.append("|---" * (1 + len(results)) + "|")
    for trial in TRIALS:
        cells = [
            f"{l2:.3f}, {cosine:.4f}; {total:.5f}" for l2, cosine, total in (r[trial.name] for r in results.values())
        ]
        lines.append(f"| {trial.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fidelity_trials", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/fidelity"), help="default: %(default)s")
    parser.add_argument("--shared", type=Path, default=DOCS.parents[1] / "shared" / "data", help="of deimv2_atto")
    parser.add_argument("--steps", type=int, default=20, help="that students learn first; default: %(default)s")
    parser.add_argument("--batches", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--draws", type=int, default=8, help="of each batch; default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for setting in settings(arguments.folder, arguments.shared):
        if setting.init or "DEIM" in setting.name:
            found = measure(setting, arguments.folder, arguments.steps, arguments.batches, arguments.draws)
            results[setting.name.split(",")[0]] = found
            print(json.dumps(found, indent=1), flush=True)
    page = DOCS / "fidelity.md"
    before, after = page.read_text().split(BEGIN)[0], page.read_text().split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
