"""Ways to lower the gradient's error at equal bytes that were tried: `python -m tests.benchmarks.fidelity_trials`.

Measured as in `fidelity`, for two of its settings, against what stores do now: along which order and with what chances
tokens are drawn, and whether a token's rounding error is carried on to the next one. Each changes only what is written,
not how it is read. Writes its table into docs/fidelity.md.
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

from common.cache.codec import ChannelStatistics, decode_tokens, encode_tokens, measure_channels, token_steps
from common.cache.sampling import draw_tokens
from common.records import CachedBatch
from tests.benchmarks.fidelity import DOCS, Floats, Gradients, Setting, batches, errors, prepare, settings

BEGIN, END = "<!-- trials -->", "<!-- end of trials -->"
KEEP = 0.57  # of `--preset compact`
CURVE_BITS = 10  # a curve through 1024 x 1024 places

Integers = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Trial:
    """order: in which the systematic draw walks over the tokens: row by row (as now) or along a Hilbert curve, level by
    level or through all levels at once. chances: what the chance to be kept is
    proportional to: W (as now), a power of it, or W times how much the token differs from its four neighbours, or from
    the channels' means. int2: none keeps the tokens exact. carry: share of what rounding leaves over of a token that is
    added to the next one before that is rounded, along a Hilbert curve in each level.
    """

    name: str
    keep: float
    int2: bool
    order: Literal["rows", "curve", "levels"] = "rows"
    chances: Literal["weight", "power .8", "power .6", "neighbours", "means"] = "weight"
    carry: float = 0.0


TRIALS = [
    Trial("drawn by W, row by row (as now)", KEEP, int2=False),
    Trial("along a Hilbert curve in each level", KEEP, int2=False, order="curve"),
    Trial("along one Hilbert curve through all levels", KEEP, int2=False, order="levels"),
    Trial("chance W^.8", KEEP, int2=False, chances="power .8"),
    Trial("chance W^.6", KEEP, int2=False, chances="power .6"),
    Trial("chance W x difference from its neighbours", KEEP, int2=False, chances="neighbours"),
    Trial("chance W x difference from the mean token", KEEP, int2=False, chances="means"),
    Trial("all tokens, int2 (as now)", 1.0, int2=True),
    Trial("all tokens, int2, half of each error carried on", 1.0, int2=True, carry=0.5),
    Trial("all tokens, int2, each error carried on", 1.0, int2=True, carry=1.0),
    Trial("drawn, int2 (as now: compact)", KEEP, int2=True),
    Trial("drawn, int2, half of each error carried on", KEEP, int2=True, carry=0.5),
]


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


def carried(tokens: Floats, weights: Floats, order: Integers, share: float, channels: ChannelStatistics) -> Floats:
    """int2 tokens (S, C), decoded, where each token takes on what rounding left over of the one before it in `order`.

    The feature loss adds up weight x error over tokens, so this is done in the ratio of the weights, but never enlarged
    (error diffusion: Floyd and Steinberg, 1976).
    """
    steps = token_steps(encode_tokens(tokens, "int2", channels)["token_scales"], channels)
    decoded, left = np.empty_like(tokens), np.zeros(tokens.shape[1], np.float32)
    for token, following in itertools.pairwise([*order.tolist(), int(order[-1])]):
        wanted = tokens[token] - channels.channel_shift + left
        step = steps[token]
        level = np.clip(2 * np.floor(wanted / (2 * step)) + 1, -3, 3) * step
        decoded[token] = level + channels.channel_shift
        ratio = min(1.0, float(weights[token]) / max(float(weights[following]), 1e-9))
        left = (share * ratio * np.clip(wanted - level, -step, step)).astype(np.float32)
    return decoded


def stored(exact: CachedBatch, trial: Trial, channels: ChannelStatistics, ids: Sequence[int], draw: int) -> CachedBatch:
    """The batch as a store written in that way would give it, decoded."""
    parts: list[tuple[Floats, npt.NDArray[np.int32], Floats]] = []
    for index, (first, last) in enumerate(itertools.pairwise(exact.token_offsets.tolist())):
        tokens, weights = exact.tokens[first:last].numpy(), exact.token_weights[first:last].numpy()
        shapes = [(int(height), int(width)) for height, width in exact.level_shapes[index].tolist()]
        normalised = (tokens - channels.channel_shift) / channels.channel_scale
        order, base = walk(shapes, trial.order), chance(weights, normalised, shapes, trial.chances)
        places, base_weights = draw_tokens(base[order], max(1, round(trial.keep * len(tokens))), (0, ids[index], draw))
        kept = order[places]
        kept_weights = weights[kept] * (base_weights / np.maximum(base[kept], 1e-30))  # W / pi
        found = tokens[kept]
        if trial.carry:
            along = np.argsort(np.argsort(walk(shapes, "curve"))[kept])
            found = carried(found, kept_weights, along, trial.carry, channels)
        elif trial.int2:
            found = decode_tokens(dict(encode_tokens(found, "int2", channels)), channels)
        parts.append((found, kept.astype(np.int32), kept_weights.astype(np.float32)))
    tokens_of, positions, weights_of = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    offsets = torch.tensor([0, *np.cumsum([len(part[1]) for part in parts])])
    return replace(exact, tokens=tokens_of, token_positions=positions, token_weights=weights_of, token_offsets=offsets)


def measure(setting: Setting, folder: Path, steps: int, count: int, draws: int) -> dict[str, tuple[float, ...]]:
    """Relative L2 of the feature loss's gradient, root mean square over batches and draws, and medians of the cosine of
    that and of the total gradient."""
    _, reader, student = prepare(setting, folder / f"{setting.name.split(',')[0]}.zarr", steps)
    channels = measure_channels(reader.read(range(min(16, len(reader)))).tokens.numpy())
    found: dict[str, list[tuple[float, ...]]] = {trial.name: [] for trial in TRIALS}
    for batch, exact, ids in itertools.islice(batches(setting, reader, seed=1), count):
        gradients = Gradients(student, student(batch.images, batch.padding_mask), batch, setting.distillation)
        dense, rest = gradients.features(exact), gradients.others(exact)
        for trial in TRIALS:
            for draw in range(1 if trial.keep == 1 else draws):
                estimate = gradients.features(stored(exact, trial, channels, ids, draw))
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
