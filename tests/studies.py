"""What studies of several trainings share: curves of average precision, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

import numpy as np
from matplotlib.axes import Axes


@dataclass(frozen=True)
class Curve:
    """AP in percent over steps or minutes, of each seed; interpolated between evaluations, from 0 at the beginning."""

    x: tuple[float, ...]
    aps: tuple[tuple[float, ...], ...]

    @property
    def final(self) -> tuple[float, ...]:
        return tuple(of_seed[-1] for of_seed in self.aps)

    @property
    def points(self) -> list[tuple[float, float]]:
        """(x, mean over seeds), the beginning included."""
        return [(0.0, 0.0), *zip(self.x, map(mean, zip(*self.aps, strict=True)), strict=True)]

    def at(self, x: float) -> float:
        """The mean over seeds at `x`."""
        return float(np.interp(x, *zip(*self.points, strict=True)))

    def reaches(self, ap: float) -> float | None:
        """Where the mean over seeds is at `ap` for the first time, None if it never is."""
        for (x0, ap0), (x1, ap1) in pairwise(self.points):
            if ap1 >= ap:
                return x0 + (x1 - x0) * max(0.0, (ap - ap0) / (ap1 - ap0))
        return None


def plot(panel: Axes, name: str, curve: Curve) -> None:
    """The mean over seeds; the band is their range."""
    x, means = zip(*curve.points, strict=True)
    (line,) = panel.plot(x, means, marker="o", markersize=3, label=name)
    aps = [(0.0, *of_seed) for of_seed in curve.aps]
    low, high = ([choose(at) for at in zip(*aps, strict=True)] for choose in (min, max))
    panel.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])
