"""Refusing NaN and infinity by name: no detector that gives them is evaluated, stored, or learnt from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.errors import UserError


def check_finite(fields: Mapping[str, Sequence[Tensor] | Tensor], images: Sequence[object], whose: str) -> None:
    """UserError, naming fields and images, where a value is NaN or infinite.

    fields: name -> a tensor for each image, or one with images along its first axis. whose: says who gave them.
    """
    finite = torch.stack([torch.stack([value.isfinite().all() for value in values]) for values in fields.values()])
    broken = ~finite.cpu()  # (fields, images), in one piece from the device
    if broken.any():
        names = [name for name, row in zip(fields, broken, strict=True) if row.any()]
        where = [str(image) for image, column in zip(images, broken.T, strict=True) if column.any()]
        shown = ", ".join(where[:8]) + (", ..." if len(where) > 8 else "")
        raise UserError(f"{whose} gave NaN or infinite {', '.join(names)} for image {shown}: check its weights")
