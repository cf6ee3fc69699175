"""The operators in which training a DETR from a cache spends its time.

One facade per operator; behind it a pure-PyTorch reference (the truth), a CPU version (numba) and a Triton version.
"""

from kernels.deformable import deformable_attention
from kernels.feature_loss import cached_feature_loss
from kernels.matching import Matching, hungarian, hungarian_start

__all__ = ["Matching", "cached_feature_loss", "deformable_attention", "hungarian", "hungarian_start"]
