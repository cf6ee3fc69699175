"""Hungarian matching of many small cost matrices: one transfer, solved on threads while the device goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kernels.threads import HELPERS

Mask = npt.NDArray[np.bool_]


def hungarian(costs: Tensor, row_mask: Tensor | None = None, column_mask: Tensor | None = None) -> Tensor:
    """For each column (target) the row (query) that the assignment with the least total cost gives it.

    costs: (..., N, G), any floating dtype and device; the leading dimensions are typically (layers, images).
    row_mask: (..., N) and column_mask: (..., G) bool, True where the row or column takes part; they broadcast over the
    leading dimensions, and are best on the host, wherever the costs are. Returns (..., G) int64 on the host: -1 where
    the column is masked or, with fewer rows than columns, left over. The costs of masked rows and columns may be
    anything.

    The matrices go to the host in one transfer and are solved exactly by scipy's `linear_sum_assignment`, which
    releases the GIL, on `torch.get_num_threads()` threads, the caller's among them.

    Raises ValueError for shapes that do not fit, and for a NaN or infinite cost, naming its layer and image.
    """
    return _start(costs, row_mask, column_mask, helpers=torch.get_num_threads() - 1).result()


def hungarian_start(costs: Tensor, row_mask: Tensor | None = None, column_mask: Tensor | None = None) -> Matching:
    """`hungarian` in two steps: start, and go on with other work until `.result()` is called.

    Costs on a GPU may be overwritten at once; costs on the CPU are read in place, so leave them alone until the result.
    """
    return _start(costs, row_mask, column_mask, helpers=max(1, torch.get_num_threads() - 1))


@dataclass(frozen=True)
class Matching:
    """A matching under way on helping threads. `result()` takes a hand in what is left, and waits for what they have
    begun."""

    _solve: Callable[[], None]
    _done: Event
    _errors: dict[int, Exception]
    _matched: npt.NDArray[np.int64]
    _leading: torch.Size

    def result(self) -> Tensor:
        """(..., G) int64 on the host, and the errors, of `hungarian`."""
        self._solve()
        self._done.wait()
        if self._errors:
            raise self._errors[min(self._errors)]
        return torch.from_numpy(self._matched).view(*self._leading, self._matched.shape[1])


def _start(costs: Tensor, row_mask: Tensor | None, column_mask: Tensor | None, helpers: int) -> Matching:
    """Copy to the host, and let `helpers` threads begin."""
    if costs.dim() < 2 or not costs.is_floating_point():
        raise ValueError(f"costs must be floating and (..., N, G), got {costs.dtype} {tuple(costs.shape)}")
    leading, rows, columns = costs.shape[:-2], costs.shape[-2], costs.shape[-1]
    row_mask = _expand("row_mask", row_mask, leading, rows)
    column_mask = _expand("column_mask", column_mask, leading, columns)
    if costs.dtype not in (torch.float32, torch.float64):
        costs = costs.float()
    hosts = [_to_host(tensor) for tensor in (costs.detach(), row_mask, column_mask)]
    copied = torch.cuda.Event() if costs.is_cuda else None  # type: ignore[no-untyped-call]
    if copied is not None:
        copied.record(torch.cuda.current_stream(costs.device))

    count = leading.numel()
    matched = np.full((count, columns), -1, dtype=np.int64)
    indices = iter(range(count))  # shared: each thread takes the next matrix when it is free
    finished, done, errors = itertools.count(1), Event(), dict[int, Exception]()
    if count == 0:
        done.set()

    def solve() -> None:
        if copied is not None:
            copied.synchronize()
        costs_, rows_, columns_ = (host.numpy().reshape(count, *host.shape[len(leading) :]) for host in hosts)
        for i in indices:
            try:
                _solve_one(costs_[i], rows_[i], columns_[i], matched[i], i, leading)
            except Exception as error:  # the caller's to raise, whichever thread meets it
                errors[i] = error
            if next(finished) == count:
                done.set()

    HELPERS.start(min(helpers, count), solve)
    return Matching(solve, done, errors, matched, leading)


def _solve_one(
    cost: npt.NDArray[np.floating],
    row_mask: Mask,
    column_mask: Mask,
    matched: npt.NDArray[np.int64],
    index: int,
    leading: torch.Size,
) -> None:
    """Write the row of each matched column into `matched` (G,). ValueError where a cost that counts is not finite."""
    rows, columns = np.flatnonzero(row_mask), np.flatnonzero(column_mask)
    if len(rows) < cost.shape[0] or len(columns) < cost.shape[1]:
        cost = cost[np.ix_(rows, columns)]
    if not np.isfinite(cost).all():
        raise ValueError(
            f"the costs of {_name(index, leading)} hold NaN or infinity: look at that layer's predictions (a diverged "
            "loss, a box of no size) before it is matched"
        )
    row_choice, column_choice = linear_sum_assignment(cost)
    matched[columns[column_choice]] = rows[row_choice]


def _expand(name: str, mask: Tensor | None, leading: torch.Size, size: int) -> Tensor:
    if mask is None:
        return torch.ones(()).bool().expand(*leading, size)
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, True where it takes part; got {mask.dtype}")
    try:
        return mask.broadcast_to((*leading, size))
    except RuntimeError:
        raise ValueError(f"{name} {tuple(mask.shape)} does not broadcast to {(*leading, size)}") from None


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor on the host, without waiting: into pinned memory when it comes from a CUDA device."""
    if not tensor.is_cuda:
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _name(index: int, leading: torch.Size) -> str:
    place = [int(i) for i in np.unravel_index(index, tuple(leading))] if leading else []
    if len(place) == 2:
        return f"layer {place[0]}, image {place[1]}"
    return f"image {place[0]}" if len(place) == 1 else f"matrix {tuple(place)}"
