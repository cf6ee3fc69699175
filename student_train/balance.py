"""Loss weights that find themselves: each distillation loss is scaled until its gradient is its weight times as long as
the detection losses'. The weights then are ratios, which mean the same for every loss, data set and student.

Where gradients are measured: at the neck's features, the encoder's input. Every loss acts on them, through the encoder
or directly; no two samples meet in what follows them, so the squared length is a sum over samples, and parts and ranks
of a step add up to what one batch would have; and the backbone, half of a backward pass, is spared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import to_device
from student_train.config import LossWeights
from student_train.objective import LessonLosses, Losses

EVERY = 50  # steps between measurements
AT_FIRST = 10  # measurements in the first steps, one in each
NEWEST = 0.2  # of the newest measurement in the moving average, once there are 1 / NEWEST


@dataclass
class Balance:
    """The scales of the distillation losses, as of now; the same on every rank.

    weights: of the losses. teachers: names of those of the store; one needs none. logarithms and measured: the mean
    logarithm of each loss's scale, and how many measurements it had. They are the whole state.
    """

    weights: LossWeights
    teachers: Sequence[str] = ("",)
    logarithms: dict[str, float] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)

    @property
    def losses(self) -> list[str]:
        """Those that are computed, by the first part of their names."""
        return [name for name, weight in vars(self.weights).items() if weight]

    def name(self, loss: str, teacher: int) -> str:
        """Of a scale: "features" or, of several teachers, "features/TEACHER"."""
        return loss if len(self.teachers) == 1 else f"{loss}/{self.teachers[teacher]}"

    @property
    def scales(self) -> dict[str, float]:
        """What each loss is multiplied by, beside its weight: 0 until it has been measured."""
        names = [self.name(loss, teacher) for teacher in range(len(self.teachers)) for loss in self.losses]
        return {name: math.exp(self.logarithms[name]) if name in self.logarithms else 0.0 for name in names}

    def is_due(self, step: int) -> bool:
        """Whether to measure in this step: every EVERY, and at first until each loss had its AT_FIRST."""
        starting = step < EVERY and any(self.measured.get(name, 0) < AT_FIRST for name in self.scales)
        return starting or step % EVERY == 0

    def scaled(self, taught: Sequence[LessonLosses]) -> list[LessonLosses]:
        """The same losses, each times its scale."""
        scales = self.scales
        return [
            (lesson, {n: scales[self.name(_kind(n), lesson.teacher)] * loss for n, loss in losses.items()})
            for lesson, losses in taught
        ]

    def measure(
        self,
        own: Losses,
        taught: Sequence[LessonLosses],
        neck: Tensor,
        enlarged: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> Tensor:
        """(teachers, losses, 2) float64: squared lengths of the gradients of a part of a step, to be added up.

        The first is that of each loss at weight 1, the second the detection losses' on the same samples: those that the
        teacher teaches; both are 0 where it teaches none. own, taught: of `separate_losses`. neck: (B, T, C), of the
        same forward pass. enlarged: what losses go through against underflow, e.g. GradScaler.scale.
        """

        def squared(losses: Losses) -> Tensor:
            """(B,), of each sample."""
            total = enlarged(torch.stack(list(losses.values())).sum())
            (gradient,) = torch.autograd.grad(total, neck, retain_graph=True, allow_unused=True, materialize_grads=True)
            lengths: Tensor = torch.linalg.vector_norm(gradient, dim=(1, 2), dtype=torch.float64)
            return lengths.square()

        squares = torch.zeros(len(self.teachers), len(self.losses), 2, dtype=torch.float64, device=neck.device)
        of_detection = squared(own)
        for lesson, losses in taught:
            taught_here = of_detection
            if lesson.samples is not None:
                taught_here = of_detection[to_device(lesson.samples, neck.device)]
            detection = taught_here.sum()
            for place, kind in enumerate(self.losses):
                weight = getattr(self.weights, kind) * lesson.weight
                of_loss = squared({n: loss for n, loss in losses.items() if _kind(n) == kind}).sum() / weight**2
                squares[lesson.teacher, place] = torch.stack((of_loss, detection))
        return squares

    def update(self, squares: Tensor) -> None:
        """Let a measurement of the whole step, (teachers, losses, 2), into the geometric moving averages.

        A loss is left as it is where a gradient is zero or not finite.
        """
        for teacher, of_teacher in enumerate(squares.tolist()):
            for loss, (of_loss, of_detection) in zip(self.losses, of_teacher, strict=True):
                if not (0 < of_loss < math.inf and 0 < of_detection < math.inf):
                    continue
                name, logarithm = self.name(loss, teacher), 0.5 * (math.log(of_detection) - math.log(of_loss))
                self.measured[name] = self.measured.get(name, 0) + 1
                before, share = self.logarithms.get(name, 0.0), max(NEWEST, 1 / self.measured[name])
                self.logarithms[name] = before + share * (logarithm - before)

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"logarithms": dict(self.logarithms), "measured": dict(self.measured)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        self.logarithms = dict(state["logarithms"])
        self.measured = {name: int(count) for name, count in state["measured"].items()}


def _kind(name: str) -> str:
    """ "logits" of "logits/class"."""
    return name.partition("/")[0]
