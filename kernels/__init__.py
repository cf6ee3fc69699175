"""The operators in which training a DETR from a cache spends its time.

One facade per operator; behind it a pure-PyTorch reference (the truth), a CPU version (numba) and a Triton version.
"""

from typing import TYPE_CHECKING

from kernels.deformable import deformable_attention
from kernels.feature_loss import cached_feature_loss
from kernels.feature_loss_reference import decode_tokens
from kernels.matching import Matching, hungarian, hungarian_start
from kernels.nearest_codes import nearest_codes
from kernels.transfer import to_device

__all__ = [
    "Matching",
    "cached_feature_loss",
    "decode_tokens",
    "deformable_attention",
    "hungarian",
    "hungarian_start",
    "nearest_codes",
    "to_device",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> None:
        """Hugging Face's libraries import these from PyPI's package of our name, where that is installed too."""
        if name in ("CUDAProperties", "LayerRepository", "Mode", "get_kernel", "kernelize"):
            raise ImportError(
                f"{name} is wanted of PyPI's `kernels`, which DETRCache's package of that name hides: run"
                " `pip uninstall kernels`, or call teacher_dump.transformers_teacher.import_transformers() first"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
