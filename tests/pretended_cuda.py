"""A CUDA device that is not there: tensors that say `cuda` and compute on the CPU, and a record of what the host waits
for.

Inside `pretended_cuda()` a tensor made on or moved to "cuda:0" holds a CPU tensor. Every operation runs on that, so a
step gives real numbers, but

- tensors of different devices in one operation are an error, as on a GPU (a CPU scalar among elementwise operands is
  allowed there, and here);
- whatever makes the host wait is recorded with the product's line that asked for it: reading a value, indexing by a
  boolean mask, copies to the host, and copies to the device from memory that is not pinned or that are not
  `non_blocking`; of matchings, whose copies are asynchronous, the event that is waited for;
- an asynchronous copy to the host arrives when its event is waited for, not before.

What it cannot see: whether a CUDA kernel exists for an operation, its numbers and its speed, kernels that wait inside
(cuDNN's search, allocation of memory, a Triton kernel's compilation), the order of streams, nccl, memory that is used
again while a copy from it is under way, and code that hides behind `is_cuda` in compiled extensions. The operators of
`kernels` run in their CPU version; `test_pretended_cuda.py` sends the Triton versions' host code through by itself.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from kernels import backends

aten = torch.ops.aten
REPOSITORY = Path(__file__).resolve().parents[1]
ROOMS = ("common", "kernels", "student_train", "teacher_dump")
CUDA = torch.device("cuda", 0)
# Whose result's size, or whose value, the host has to be told.
CAPTURING = next(name for name in dir(torch.optim.Optimizer) if name.endswith("_graph_capture_health_check"))
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim,
         aten.unique_consecutive, aten.bincount, aten.histc)  # fmt: skip
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)


class OnCuda(Tensor):
    """A tensor that says it is on `cuda`. inner: its values, on the CPU.

    PyTorch's compiled code takes it for a tensor of the CPU, since it calls the driver for any other, so that what goes
    by the device there is told here.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCuda:
        made: OnCuda = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="cpu",
        )
        made.inner = inner
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = device or CUDA, dtype or self.dtype
        if device.type == "cuda" and dtype == self.dtype and memory_format is None and not copy:
            return self
        copied: Tensor = aten._to_copy(
            self, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=memory_format
        )
        return copied

    def cpu(self, memory_format: torch.memory_format | None = None) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def __reduce_ex__(self, protocol: Any) -> Any:  # as torch.save writes it, for map_location="cpu"
        return self.detach().to("cpu").__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnCuda({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside pretended_cuda(), or in another thread")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class Device(TorchDispatchMode):
    """waits: what the host waited for, as "file:function operation"."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.arriving: list[Callable[[], object]] = []  # copies to the host, under way
        self._pinned: list[tuple[int, int]] = []
        self._kept: list[Tensor] = []  # pinned memory, so that no other is taken for it

    def wait(self, what: str) -> None:
        self.waits[f"{_asker()} {what}"] += 1

    def arrive(self) -> None:
        while self.arriving:
            self.arriving.pop(0)()

    def pin(self, tensor: Tensor) -> Tensor:
        begin = tensor.untyped_storage().data_ptr()
        self._pinned.append((begin, begin + max(1, tensor.untyped_storage().nbytes())))
        self._kept.append(tensor)
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.numel() == 0 or any(begin <= tensor.data_ptr() < end for begin, end in self._pinned)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        if kwargs.get("device") is not None and torch._C._current_graph_task_id() != -1:
            kwargs["device"] = CUDA  # autograd takes what it goes back through for tensors of the CPU
        if packet == aten.is_pinned:
            return self.is_pinned(args[0])
        if packet == aten._pin_memory:
            return self.pin(args[0].clone())
        if packet in (aten._to_copy, aten.copy_):
            return self._copy(func, args, kwargs)
        operands = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        on_device = [x for x in operands if isinstance(x, OnCuda)]
        asked = kwargs.get("device")
        if not on_device and (asked is None or torch.device(asked).type != "cuda"):
            return func(*args, **kwargs)
        self._check(func, operands, on_device)
        if packet in READS or (packet == aten.repeat_interleave and kwargs.get("output_size") is None):
            self.wait(str(packet))
        indices = args[1] if packet in INDEXED else ()
        if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices):
            self.wait(f"{packet} by a mask")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if func.namespace == "detrcache":  # the CPU's version of the project's own operators
            args = tuple("cpu" if x == "triton" else x for x in args)
        made = func(*_inner(args), **_inner(kwargs))
        if packet == aten._local_scalar_dense:
            return made
        made = tree_map(lambda x: OnCuda(x) if isinstance(x, Tensor) else x, made)
        return return_and_correct_aliasing(func, args, kwargs, made) if on_device else made

    def _check(self, func: Any, operands: list[Tensor], on_device: list[OnCuda]) -> None:
        """Raise where a tensor of the CPU takes part that a GPU would not take."""
        if not on_device:
            return
        for x in operands:
            scalar = x.dim() == 0 and (torch.Tag.pointwise in func.tags or func.overloadpacket in _TAKE_SCALARS)
            if not isinstance(x, OnCuda) and not scalar:
                raise RuntimeError(f"{func} of tensors on cuda and on the CPU, {tuple(x.shape)} ({_asker()})")

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Within a device, to it and from it."""
        into = func.overloadpacket == aten.copy_
        source, target = (args[1], args[0]) if into else (args[0], None)
        non_blocking = bool(args[2] if into and len(args) > 2 else kwargs.get("non_blocking", False))
        asked = kwargs.get("device")
        if into or asked is None:
            to_cuda = isinstance(target if into else source, OnCuda)
        else:
            to_cuda = torch.device(asked).type == "cuda"
        from_cuda = isinstance(source, OnCuda)
        values = source.inner if from_cuda else source
        as_argument = into and source.dim() == 0  # a number that a kernel is launched with
        if to_cuda and not from_cuda and not as_argument and not (non_blocking and self.is_pinned(source)):
            self.wait("copy to the device" if not non_blocking else "copy to the device of memory not pinned")
        if from_cuda and not to_cuda and not (into and non_blocking and self.is_pinned(target)):
            self.wait("copy to the host")
        if into and from_cuda and not to_cuda and non_blocking:
            target.fill_(-(2**30) if target.dtype != torch.bool else False)  # nothing sensible until it has arrived
            late = values.clone()
            self.arriving.append(lambda: target.copy_(late))
            return target
        if into:
            (target.inner if to_cuda else target).copy_(values)
            return target
        kwargs = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format")}
        made = func(values, **kwargs)
        made = made.clone() if made is values else made
        return OnCuda(made) if to_cuda else made


_TAKE_SCALARS = (aten.index_put_, aten.index_put, aten._foreach_lerp_, aten._foreach_mul_, aten._fused_adamw_)


def _inner(values: Any) -> Any:
    leaves, spec = tree_flatten(values)
    return tree_unflatten([x.inner if isinstance(x, OnCuda) else x for x in leaves], spec)


def _asker() -> str:
    """The innermost function of the product on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        inside = path.is_relative_to(REPOSITORY) and path.relative_to(REPOSITORY).parts[0] in ROOMS
        if inside and not frame.f_code.co_name.startswith("<"):
            return f"{path.relative_to(REPOSITORY)}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "tests"


@contextmanager
def pretended_cuda() -> Iterator[Device]:
    """Everything inside finds one CUDA device, `cuda:0`."""
    device, main = Device(), threading.get_ident()

    class Event:
        """The copies that were under way when it was recorded have arrived when it is waited for."""

        def record(self, stream: object = None) -> None:
            pass

        def synchronize(self) -> None:
            with arriving:
                device.arrive()
            if threading.get_ident() == main:
                device.wait("event")

    arriving, real_empty, real_autocast = threading.Lock(), torch.empty, torch.autocast

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = real_empty(*args, **kwargs)
        return device.pin(made) if pin_memory else made

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made: Tensor = real_tensor(data, **options)
        return made if device is None else made.to(device)

    def grouped(tensors: Any, with_indices: bool = False) -> Any:
        made = real_grouped(tensors, with_indices)
        there = isinstance(tensors[0][0], OnCuda)
        return {(CUDA if there else place, dtype): rest for (place, dtype), rest in made.items()}

    real_tensor, real_grouped = torch.tensor, torch._C._group_tensors_by_device_and_dtype
    replaced: list[tuple[object, str, object]] = [
        (torch, "empty", empty),  # also in threads, where no mode is
        (torch, "tensor", tensor),
        (torch._C, "_group_tensors_by_device_and_dtype", grouped),  # for optimisers
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "current_stream", lambda device=None: None),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "Event", Event),
        (backends, "_has_triton", lambda: True),
        (torch, "autocast", lambda device_type, *more, **options: real_autocast("cpu", *more, **options)),
        (torch.optim.Optimizer, CAPTURING, lambda self: None),
        (torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),  # not `parameter.data = ...`
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(device)
        yield device
