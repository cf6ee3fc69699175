"""Memory that batches are read into, one after another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.cache.schema import Field


@dataclass
class BatchBuffers:
    """Memory that one batch is read into, reused by later batches: it grows to the largest batch and stays.

    The tensors of a CachedBatch are views of it; they are valid until it is passed to `read` again.
    """

    pin: bool = False
    _fields: tuple[Field, ...] = ()
    _samples: int = 0
    _tokens: int = 0
    _whole: dict[str, tuple[Tensor, npt.NDArray[Any]]] = field(default_factory=dict)  # the same memory
    _last: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    _address: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def fit(self, fields: tuple[Field, ...], samples: int, tokens: int) -> npt.NDArray[np.int64]:
        """Make room for so many rows of each field. Where they begin (F,)."""
        if fields is not self._fields or samples > self._samples or tokens > self._tokens:
            self._whole.clear()
            self._last.clear()
            self._fields = fields
            self._samples = max(self._samples, samples + samples // 4)
            self._tokens = max(self._tokens, tokens + tokens // 4)
            for made in fields:
                shape = (self._tokens if made.per == "token" else self._samples, *made.row_shape)
                memory = torch.empty(shape, dtype=getattr(torch, made.dtype), pin_memory=self.pin)
                self._whole[made.name] = memory, memory.numpy()
            self._address = np.array([self._whole[made.name][0].data_ptr() for made in fields])
        return self._address

    def rows(self, name: str, count: int) -> Tensor:
        """The first rows of a field, as a tensor (count, *row_shape). What was given last is given again if it is as
        long, and cut in numpy if not: after reading has emptied the processor's caches, torch takes several times as
        long."""
        length, rows = self._last.get(name, (-1, None))
        if rows is None or length != count:
            rows = torch.from_numpy(self._whole[name][1][:count])
            self._last[name] = count, rows
        return rows
