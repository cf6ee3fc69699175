"""Product quantisation, the way in: which of a group's 256 centroids is nearest to each part of each token.

This is what writing a cache costs beside the teacher: 512 C multiplications and additions a token. The CPU version
keeps a group's distances in the first-level cache; the plain one writes them out, a block of tokens at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.jit import inlined, jit
from kernels.threads import finish, parallel, take

CODES = 256  # centroids of a group, so that a code is a byte
_BLOCK = 4096  # tokens whose distances exist at once, in the plain version
_TOGETHER = 512  # tokens that a thread takes at a time


def nearest_codes(features: Tensor, codebooks: Tensor) -> Tensor:
    """argmin_k ||features[s, m*d : (m+1)*d] - codebooks[m, k]||^2, as (S, M) uint8; of equal ones the first.

    features: (S, C) float32. codebooks: (M, 256, C/M) float32, on the same device. Distances are compared in float32.
    Raises ValueError for other shapes and dtypes.
    """
    if features.dim() != 2 or features.dtype != torch.float32:
        raise ValueError(f"features must be float32 and (S, C), got {features.dtype} {tuple(features.shape)}")
    groups, codes, width = codebooks.shape
    if codes != CODES or groups * width != features.shape[1] or codebooks.dtype != torch.float32:
        raise ValueError(
            f"codebooks must be float32 and (M, {CODES}, C/M) for C = {features.shape[1]}, got {codebooks.dtype}"
            f" {tuple(codebooks.shape)}"
        )
    return (
        _on_cpu(features, codebooks) if features.device.type == "cpu" else nearest_codes_reference(features, codebooks)
    )


def nearest_codes_reference(features: Tensor, codebooks: Tensor) -> Tensor:
    """`nearest_codes` in plain PyTorch."""
    groups, _, width = codebooks.shape
    half_norms = codebooks.square().sum(2).unsqueeze(1) / 2  # (M, 1, 256)
    transposed = codebooks.transpose(1, 2)
    found = []
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK]
        parts = block.reshape(len(block), groups, width).transpose(0, 1)
        found.append(torch.baddbmm(half_norms, parts, transposed, alpha=-1).argmin(2).to(torch.uint8).T)
    return torch.cat(found) if found else torch.empty((0, groups), dtype=torch.uint8, device=features.device)


def _on_cpu(features: Tensor, codebooks: Tensor) -> Tensor:
    found = torch.empty((len(features), len(codebooks)), dtype=torch.uint8)
    half_norms = (codebooks.square().sum(2) / 2).numpy()
    arrays = (features.contiguous().numpy(), codebooks.transpose(1, 2).contiguous().numpy(), half_norms, found.numpy())
    parallel(_nearest, -(-len(features) // _TOGETHER), *arrays)
    return found


@inlined("contract", "reassoc", "nnan", "nsz")
def _distances_of_8(row, part, book, half, distance):  # type: ignore[no-untyped-def]
    """Written out for the usual width, so that nothing is read back in between."""
    f0, f1, f2, f3 = row[part], row[part + 1], row[part + 2], row[part + 3]
    f4, f5, f6, f7 = row[part + 4], row[part + 5], row[part + 6], row[part + 7]
    b0, b1, b2, b3, b4, b5, b6, b7 = book[0], book[1], book[2], book[3], book[4], book[5], book[6], book[7]
    for k in range(256):
        low = f0 * b0[k] + f1 * b1[k] + f2 * b2[k] + f3 * b3[k]
        high = f4 * b4[k] + f5 * b5[k] + f6 * b6[k] + f7 * b7[k]
        distance[k] = half[k] - (low + high)


@jit("contract", "reassoc", "nnan", "nsz")
def _nearest(progress, features, transposed, half_norms, found):  # type: ignore[no-untyped-def]
    """transposed: the codebooks as (M, C/M, 256), so that the 256 distances of a part are computed side by side, from a
    codebook that stays in the first-level cache while all tokens pass."""
    width = transposed.shape[1]
    distance = np.empty(256, np.float32)
    bits, order = distance.view(np.int32), np.empty(256, np.int32)
    while True:
        block = take(progress)
        if block < 0:
            break
        for m in range(transposed.shape[0]):
            book, half, part = transposed[m], half_norms[m], m * width
            for s in range(block * _TOGETHER, min((block + 1) * _TOGETHER, len(features))):
                if width == 8:
                    _distances_of_8(features[s], part, book, half, distance)
                else:
                    for k in range(256):
                        distance[k] = half[k]
                    for j in range(width):
                        value = features[s, part + j]
                        for k in range(256):
                            distance[k] -= value * book[j, k]
                # Floats compare like their bits as whole numbers, once those of negative ones are turned round; and
                # only the least of whole numbers is something that compilers find side by side.
                least = np.int32(2**31 - 1)
                for k in range(256):
                    order[k] = bits[k] ^ ((bits[k] >> np.int32(31)) & np.int32(2**31 - 1))
                    least = min(least, order[k])
                code = np.int32(255)
                for k in range(256):
                    code = min(code, np.int32(k) if order[k] == least else np.int32(255))
                found[s, m] = code
        finish(progress)
