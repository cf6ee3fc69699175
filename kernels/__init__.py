"""The operators in which training a DETR from a cache spends its time.

One facade per operator; behind it a pure-PyTorch reference (the truth), a CPU version (numba) and a Triton version.
"""

from kernels.deformable import deformable_attention

__all__ = ["deformable_attention"]
