"""Inputs for the tests of the feature loss: every token format, empty samples, tokens in no order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Arguments of `cached_feature_loss`, and the float64 loss and gradient written out token by token."""

    student: Tensor
    tokens: Tensor
    positions: Tensor
    weights: Tensor
    offsets: Tensor
    scales: Tensor | None
    channel_scale: Tensor | None
    channel_shift: Tensor | None
    codebooks: Tensor | None

    def arguments(self) -> tuple[Tensor | None, ...]:
        return (
            self.student,
            self.tokens,
            self.positions,
            self.weights,
            self.offsets,
            self.scales,
            self.channel_scale,
            self.channel_shift,
            self.codebooks,
        )

    def written_out(self) -> tuple[float, Tensor]:
        """Loss and gradient in plain loops over tokens and channels, from the formula of the facade's docstring."""
        student, channels = self.student.detach(), self.student.shape[2]
        loss, grad = 0.0, torch.zeros(student.shape, dtype=torch.float64)
        for sample in range(len(self.offsets) - 1):
            for s in range(int(self.offsets[sample]), int(self.offsets[sample + 1])):
                position = int(self.positions[s])
                for c in range(channels):
                    stored = self._stored(s, c)
                    if self.scales is not None:
                        stored *= float(self.scales[s, c * self.scales.shape[1] // channels])
                    if self.channel_scale is not None:
                        stored *= float(self.channel_scale[c])
                    if self.channel_shift is not None:
                        stored += float(self.channel_shift[c])
                    difference = float(student[sample, position, c]) - stored
                    loss += float(self.weights[s]) * difference**2
                    grad[sample, position, c] = 2 * float(self.weights[s]) * difference
        return loss, grad

    def _stored(self, s: int, c: int) -> float:
        if self.tokens.dtype != torch.uint8:
            return float(self.tokens[s, c])
        if self.codebooks is not None:
            m, j = divmod(c, self.codebooks.shape[2])
            return float(self.codebooks[m, int(self.tokens[s, m]), j])
        nibble = int(self.tokens[s, c // 2]) >> (4 * (c % 2)) & 15
        return float(nibble - 16 if nibble > 7 else nibble)


CASES = {
    "int8": ("int8", torch.float32, 1, True),
    "int8, groups": ("int8", torch.float32, 4, True),
    "int8, nothing else": ("int8", torch.float32, 0, False),
    "int4": ("int4", torch.float32, 4, True),
    "codes for 4": ("codes for 4", torch.float32, 0, False),
    "codes for 2": ("codes for 2", torch.float32, 0, False),
    "codes for 3, channel factors": ("codes for 3", torch.float32, 0, True),
    "codes for 4, groups": ("codes for 4", torch.float32, 3, True),
    "codes for 4, bf16 student": ("codes for 4", torch.bfloat16, 0, False),
    "codes for 1, fp16 student": ("codes for 1", torch.float16, 0, False),
    "float16": ("float16", torch.float32, 0, False),
    "float32": ("float32", torch.float32, 0, False),
    "float32, bf16 student": ("float32", torch.bfloat16, 2, True),
    "float16, groups": ("float16", torch.float32, 2, True),
    "int8, bf16 student": ("int8", torch.bfloat16, 2, True),
    "int4, fp16 student": ("int4", torch.float16, 1, True),
}


def inputs(name: str, channels: int = 12, length: int = 9, counts: tuple[int, ...] = (5, 0, 9)) -> Inputs:
    """A case of CASES: three samples, the second without tokens, the third with all of its positions."""
    kind, student_dtype, groups, channelwise = CASES[name]
    generator = torch.Generator().manual_seed(0)
    total, codebooks = sum(counts), None
    if kind == "int8":
        tokens = torch.randint(-128, 128, (total, channels), dtype=torch.int8, generator=generator)
    elif kind == "int4":
        tokens = torch.randint(256, (total, channels // 2), dtype=torch.uint8, generator=generator)
    elif kind.startswith("codes for "):
        width = int(kind.removeprefix("codes for "))
        tokens = torch.randint(256, (total, channels // width), dtype=torch.uint8, generator=generator)
        codebooks = torch.randn(channels // width, 256, width, generator=generator)
    elif kind == "float32":
        tokens = torch.randn(total, channels, generator=generator)
    else:
        tokens = torch.randn(total, channels, generator=generator).half()
        tokens.view(-1)[:6] = torch.tensor([0.0, -0.0, 6e-8, -3e-6, 65504.0, 6.2e-5]).half()  # subnormal and largest
    student = torch.randn(len(counts), length, channels, generator=generator).to(student_dtype)
    return Inputs(
        student.requires_grad_(),
        tokens,
        torch.cat([torch.randperm(length, generator=generator)[:count] for count in counts]),
        torch.rand(total, generator=generator),
        torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]),
        (torch.rand(total, groups, generator=generator) / 50).to(torch.float16 if groups > 1 else torch.float32)
        if groups
        else None,
        torch.rand(channels, generator=generator) if channelwise else None,
        torch.randn(channels, generator=generator) if channelwise else None,
        codebooks,
    )
