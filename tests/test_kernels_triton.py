"""The Triton kernels without a GPU: interpreted against the references, and compiled for sm_80 and sm_90."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import cached_feature_loss, deformable_attention

ROOT = Path(__file__).resolve().parents[1]

triton = pytest.importorskip("triton", reason="triton is not installed (it comes with torch on Linux)")

ATOMIC = re.compile(r"\s(atom|red)\.")
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}
ATTENTION = {"HEADS": 8, "WIDTH": 32, "LEVELS": 4, "POINTS": 4, "BLOCK_Q": 16, "BLOCK_P": 4, "BLOCK_D": 32}
LOSS = {
    "CHANNELS": 256,
    "GROUPS": 8,
    "HAS_CHANNEL_SCALE": True,
    "HAS_CHANNEL_SHIFT": True,
    "BLOCK_R": 8,
    "BLOCK_C": 256,
}

compiling = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 leaves nothing to compile"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled anew, and nothing left behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_interpreted() -> None:
    """The tests of interpreted_triton.py pass in a process with TRITON_INTERPRET=1."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "tests/interpreted_triton.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, int | bool], capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert set(types) | set(constants) == set(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    if "constexprs" in inspect.signature(ASTSource).parameters:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    else:  # triton 3.2, of torch 2.6: the same without the constants' names
        signature = {name: kind for name, kind in signature.items() if name in types}
        source = ASTSource(fn=kernel, signature=signature, constants=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def _check_binary(compiled: Any, capability: int) -> None:
    """An ELF file for that architecture, from PTX that spills nothing to local memory."""
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert ".local" not in compiled.asm["ptx"]


@compiling
@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float32, 80), (torch.float32, 90), (torch.bfloat16, 90), (torch.float16, 80)]
)
def test_deformable_attention_compiles(dtype: torch.dtype, capability: int) -> None:
    """To cubin, with value in `dtype` and locations in float32; the forward holds no atomic, the backward does."""
    from kernels import deformable_triton

    pointer = POINTERS[dtype]
    inputs = {"value": pointer, "table": "*i32", "locations": "*fp32", "weights": "*fp32"}
    sizes = {"tokens": "i32", "queries": "i32"}
    forward = _compile(deformable_triton._forward, inputs | {"out": pointer} | sizes, ATTENTION, capability)
    _check_binary(forward, capability)
    assert not ATOMIC.search(forward.asm["ptx"])
    grads = {"grad_out": pointer, "grad_value": "*fp32", "grad_locations": "*fp32", "grad_weights": "*fp32"}
    backward = _compile(deformable_triton._backward, inputs | grads | sizes, ATTENTION, capability)
    _check_binary(backward, capability)
    assert ATOMIC.search(backward.asm["ptx"])


@compiling
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("tokens", "packed", "coded"),
    [("*i8", False, 0), ("*u8", True, 0), ("*u8", False, 8), ("*u8", False, 4), ("*fp16", False, 0)],
)
def test_feature_loss_compiles(tokens: str, packed: bool, coded: int, capability: int) -> None:
    """To cubin, for each way in which tokens are stored; neither direction holds an atomic: the sums have an order."""
    from kernels import feature_loss_triton

    factors = {"weights": "*fp32", "scales": "*fp16", "channel_scale": "*fp32", "channel_shift": "*fp32"}
    factors |= {"codebooks": "*fp32"}
    inputs = factors | {"student": "*bf16", "tokens": tokens, "count": "i32"}
    constants = LOSS | {"PACKED": packed, "CODED": coded}
    forward = inputs | {"rows": "*i64", "sums": "*fp32"}
    backward = inputs | {"grad": "*fp32", "token_of_row": "*i32", "grad_student": "*bf16"}
    for kernel, types in (
        (feature_loss_triton._forward, forward),
        (feature_loss_triton._backward, backward),
    ):
        compiled = _compile(kernel, types, constants, capability)
        _check_binary(compiled, capability)
        assert not ATOMIC.search(compiled.asm["ptx"])


def test_float64_is_refused() -> None:
    """Triton sums in float32: asked for by name for float64 tensors, both facades say so."""
    value = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not take float64"):
        deformable_attention(value, [(1, 1)], torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1), "triton")
    arguments = (torch.zeros(1, 1, dtype=torch.int8), torch.zeros(1).long(), torch.zeros(1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="does not take float64"):
        cached_feature_loss(value[0], *arguments, backend="triton")
