"""What the losses of a step are divided by: counts of the whole step, however ranks and micro-batches share it.

They follow from the ground truth alone, so they are known before the first forward pass, and the gradients of
micro-batches add up to the gradient of the step as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.devices import mean_over_ranks
from kernels import to_device


@dataclass(frozen=True)
class StepCounts:
    """Counts per rank on average, scalars of at least 1 on one device.

    samples. boxes: of the ground truth. positives: pairs of a student query and a teacher query that has a box, in one
    decoder layer. negatives: pairs of those left over. pairs: where all of the teacher's queries are matched at once.
    """

    samples: Tensor
    boxes: Tensor
    positives: Tensor
    negatives: Tensor
    pairs: Tensor

    @classmethod
    def of_mean(cls, mean: Tensor) -> StepCounts:
        """From the mean over ranks of `own_counts`."""
        return cls(*mean.float().clamp(min=1).unbind())


def counts_of_step(
    boxes: Sequence[int], student_queries: int, teacher_queries: Sequence[int], device: torch.device
) -> list[StepCounts]:
    """For each teacher, from the boxes of this rank's samples. All ranks have to call this at once."""
    mean = mean_over_ranks(to_device(own_counts(boxes, student_queries, teacher_queries), device))
    return [StepCounts.of_mean(of_teacher) for of_teacher in mean]


def own_counts(boxes: Sequence[int], student_queries: int, teacher_queries: Sequence[int]) -> Tensor:
    """The counts (M, 5) float64 of one rank's samples with these numbers of ground-truth boxes.

    teacher_queries: Q of each of M teachers, whichever samples it teaches; without a teacher there is one row, too.
    """
    rows = [_counts_of_teacher(boxes, student_queries, queries) for queries in teacher_queries or (student_queries,)]
    return torch.tensor(rows, dtype=torch.float64)


def _counts_of_teacher(boxes: Sequence[int], student_queries: int, teacher_queries: int) -> tuple[int, ...]:
    """A matching pairs off as many as there are on the smaller side: the teacher's own gave min(boxes, Q) a box."""
    with_box = [min(count, teacher_queries) for count in boxes]
    positives = [min(count, student_queries) for count in with_box]
    negatives = [
        min(teacher_queries - teacher, student_queries - student)
        for teacher, student in zip(with_box, positives, strict=True)
    ]
    pairs = len(boxes) * min(teacher_queries, student_queries)
    return len(boxes), sum(boxes), sum(positives), sum(negatives), pairs
