"""The exponential moving average of a student's weights over the steps, which is often the better student."""

from __future__ import annotations

import copy

import torch

from common.detr.detector import DeformableDetr


class MovingAverage:
    """average <- d * average + (1 - d) * weights after each step, buffers included.

    d = min(decay, (1 + steps) / (10 + steps)), as TensorFlow's ExponentialMovingAverage has it: the first steps count
    for little as soon as there are others. `student` is the averaged detector, to be evaluated and saved.
    """

    def __init__(self, detector: DeformableDetr, decay: float) -> None:
        self.student = copy.deepcopy(detector).requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, detector: DeformableDetr, steps: int) -> None:
        """Take in the weights after one more step; steps: done so far."""
        weight = 1 - min(self._decay, (1 + steps) / (10 + steps))
        averages, values = self.student.state_dict(), detector.state_dict()
        floating = [name for name, value in averages.items() if value.is_floating_point()]
        torch._foreach_lerp_([averages[name] for name in floating], [values[name] for name in floating], weight)
        for name in averages.keys() - set(floating):  # counters
            averages[name].copy_(values[name])
