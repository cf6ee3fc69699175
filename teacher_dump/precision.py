"""A teacher in the precision that `--amp` names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from common.cache.schema import TeacherAmp
from common.errors import UserError
from common.teacher import Teacher, TeacherOutput


def in_precision(teacher: Teacher, amp: TeacherAmp | None, device: torch.device) -> Teacher:
    """The same teacher, computing as `amp` says: bf16, autocast; tf32, products of 10 bits on a GPU; None, float32.

    Its answers are float32 in any case. UserError for tf32 where there is none.
    """
    if amp == "tf32" and device.type not in ("cuda", "meta"):
        raise UserError(f"--amp tf32 expects a GPU, found {device.type}: leave it out, or use --amp bf16")

    def run(images: Sequence[Tensor]) -> TeacherOutput:
        with _tf32(amp == "tf32"), torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
            output = teacher.run(images)
        return TeacherOutput(
            memory=[tokens.float() for tokens in output.memory],
            queries=output.queries.float(),
            logits=output.logits.float(),
            boxes_cxcywh=output.boxes_cxcywh.float(),
            neck=None if output.neck is None else [tokens.float() for tokens in output.neck],
        )

    return replace(teacher, info=replace(teacher.info, amp=amp), run=run)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Let products and convolutions on a GPU round their inputs to TF32 meanwhile, or not, as torch by itself lets
    convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
