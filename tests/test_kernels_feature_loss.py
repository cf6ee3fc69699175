"""The feature loss on cached tokens: the reference against its formula written out, the others against the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import cached_feature_loss, feature_loss
from kernels.feature_loss_reference import decode_tokens
from tests.feature_loss_cases import CASES, inputs

ROOT = Path(__file__).resolve().parents[1]
CODES = torch.zeros(14, 3, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_formula(name: str, backend: str) -> None:
    """Loss and gradient (times 3, through the chain rule) against loops over tokens and channels in Python floats: 1e-5
    of the largest element, one rounding step for a bf16 or fp16 gradient; rows without a token get exactly zero."""
    case = inputs(name)
    loss, grad = case.written_out()
    found = cached_feature_loss(*case.arguments(), backend=backend)
    (found_grad,) = torch.autograd.grad(3 * found, case.student)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert found_grad.dtype == case.student.dtype
    tolerance = 1e-5 if found_grad.dtype == torch.float32 else torch.finfo(found_grad.dtype).eps
    assert (found_grad.double() - 3 * grad).abs().max() <= tolerance * 3 * grad.abs().max()
    assert torch.equal(found_grad == 0, (3 * grad).to(found_grad.dtype) == 0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["int4", "codes for 4"])
def test_gradients_are_finite_differences(kind: str, backend: str) -> None:
    """torch.autograd.gradcheck in float64 with its usual tolerances."""
    case = inputs(kind)
    student = case.student.detach().double().requires_grad_()
    _, *others = case.arguments()
    assert torch.autograd.gradcheck(lambda x: cached_feature_loss(x, *others, backend=backend), student)


def test_every_half_decodes() -> None:
    """All 65536 halves as tokens against a student of zeros: the gradient is -2 times each, infinities and NaN too."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).view(256, 256)
    student = torch.zeros(1, 256, 256, requires_grad=True)
    arguments = (halves, torch.arange(256), torch.ones(256), torch.tensor([0, 256]))
    (grad,) = torch.autograd.grad(cached_feature_loss(student, *arguments, backend="cpu"), student)
    torch.testing.assert_close(grad[0], -2 * halves.float(), rtol=0, atol=0, equal_nan=True)


def test_bf16_gradient_rounds_to_nearest() -> None:
    """Gradients of a bf16 student equal float32's, rounded by torch, bit for bit; 4096 random rows."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 4096, 8, generator=generator).bfloat16()
    tokens = torch.randn(4096, 8, generator=generator).half()
    arguments = (tokens, torch.arange(4096), torch.rand(4096, generator=generator), torch.tensor([0, 4096]))
    grads = []
    for x in (student.clone().requires_grad_(), student.float().requires_grad_()):
        grads += torch.autograd.grad(cached_feature_loss(x, *arguments, backend="cpu"), x)
    assert torch.equal(grads[0], grads[1].bfloat16())


def test_int4_layout() -> None:
    """0xF8 is -8 in the even channel (low nibble) and -1 in the odd one (high nibble); 0x70 is 0 and 7."""
    decoded = decode_tokens(torch.tensor([[0xF8, 0x70]], dtype=torch.uint8), None, None, None, torch.float32)
    assert decoded.tolist() == [[-8.0, -1.0, 0.0, 7.0]]


def test_layout_of_codes() -> None:
    """Codes 255 and 3 of codebooks that count their floats: the last centroid of one, the fourth of the other."""
    codebooks = torch.arange(2 * 256 * 3, dtype=torch.float32).view(2, 256, 3)
    tokens = torch.tensor([[255, 3]], dtype=torch.uint8)
    decoded = decode_tokens(tokens, None, None, None, torch.float32, codebooks)
    assert decoded.tolist() == [[765.0, 766.0, 767.0, 777.0, 778.0, 779.0]]


@pytest.mark.parametrize("width", [1, 2, 4, 6, 8, 12, 16])
def test_every_code_decodes(width: int) -> None:
    """All 256 codes in all of three codebooks, of widths that the CPU kernel copies in different ways, against a
    student of zeros: the gradient is -2 times the decoded tokens, bit for bit, in float32 and in float64."""
    codebooks = torch.randn(3, 256, width, generator=torch.Generator().manual_seed(0))
    tokens = torch.stack([torch.arange(256).roll(shift) for shift in (0, 1, 77)], dim=1).to(torch.uint8)
    arguments = (tokens, torch.arange(256), torch.ones(256), torch.tensor([0, 256]))
    for dtype in (torch.float32, torch.float64):
        student = torch.zeros(1, 256, 3 * width, dtype=dtype, requires_grad=True)
        loss = cached_feature_loss(student, *arguments, codebooks=codebooks, backend="cpu")
        (grad,) = torch.autograd.grad(loss, student)
        for m in range(3):
            expected = -2 * codebooks[m].to(dtype)[tokens[:, m].long()]
            assert torch.equal(grad[0, :, m * width : (m + 1) * width], expected)


def test_same_bits_for_any_number_of_threads() -> None:
    """Loss and gradient on 1, 2, 3 and 7 threads are equal bit for bit; enough tokens for several partial sums."""
    case = inputs("int8, groups", length=400, counts=(300, 0, 123))
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        loss = cached_feature_loss(*case.arguments(), backend="cpu")
        results.append((loss, *torch.autograd.grad(loss, case.student)))
    for result in results[1:]:
        assert all(torch.equal(found, expected) for found, expected in zip(result, results[0], strict=True))


@pytest.mark.parametrize("name", ["int8, groups", "codes for 4", "float16"])
def test_going_back_twice(name: str) -> None:
    """A second backward pass through one graph gives three times the first's gradient where the loss's own is three
    times as large, within a rounding step, and leaves the first as it was; without a gradient the loss has the same
    bits."""
    case = inputs(name, length=400, counts=(300, 0, 123))
    loss = cached_feature_loss(*case.arguments(), backend="cpu")
    (first,) = torch.autograd.grad(loss, case.student, retain_graph=True)
    before = first.clone()
    (second,) = torch.autograd.grad(loss, case.student, torch.tensor(3.0))
    torch.testing.assert_close(second, 3 * first, rtol=1e-6, atol=0)
    assert torch.equal(first, before)
    with torch.no_grad():
        assert torch.equal(cached_feature_loss(*case.arguments(), backend="cpu"), loss)


def test_second_derivatives_are_refused() -> None:
    """The gradient's own gradient is not computed, so that asking for it is an error."""
    case = inputs("int8")
    loss = cached_feature_loss(*case.arguments(), backend="cpu")
    (grad,) = torch.autograd.grad(loss, case.student, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_no_tokens_at_all() -> None:
    """A batch that kept nothing has loss zero and a gradient of zeros."""
    case = inputs("int8", counts=(0, 0))
    loss = cached_feature_loss(*case.arguments())
    (grad,) = torch.autograd.grad(loss, case.student)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(case.student))


_PEAK = """
import torch
from kernels import cached_feature_loss

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def run(tokens, backend):
    kept = tokens // 4
    student = torch.randn(2, tokens, 256, requires_grad=True)
    positions = torch.cat([torch.randperm(tokens)[:kept] for _ in range(2)])
    teacher = torch.randint(-127, 128, (2 * kept, 256), dtype=torch.int8)
    arguments = (positions, torch.rand(2 * kept), torch.tensor([0, kept, 2 * kept]), torch.rand(2 * kept, 1))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts at what is resident now
    before = status("VmRSS")
    cached_feature_loss(student, teacher, *arguments, torch.rand(256), torch.rand(256), backend=backend).backward()
    return (status("VmHWM") - before) / (student.grad.numel() * 4)

run(100, "cpu"), run(100, "reference")
print(run(20000, "cpu"), run(20000, "reference"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_peak_memory_is_that_of_the_gradient() -> None:
    """Forward and backward of 2 x 20,000 tokens, a quarter kept: the process grows by at most 1.1 times the gradient
    (41 MB). The reference, which decodes the tokens, is the check that this way of measuring sees more than that."""
    done = subprocess.run([sys.executable, "-c", _PEAK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, reference = (float(word) for word in done.stdout.split())
    assert 0.9 < ours <= 1.1
    assert reference > 1.4


@pytest.mark.parametrize("name", ["int8, groups", "codes for 4"])
def test_torch_library_registration(name: str) -> None:
    """torch.library.opcheck: schema, fake implementation, autograd registration, dynamic shapes."""
    case = inputs(name)
    rows = case.positions + torch.arange(3).repeat_interleave(case.offsets.diff()) * case.student.shape[1]
    factors = (case.weights, case.scales, case.channel_scale, case.channel_shift, case.codebooks)
    others = (case.tokens, rows, *factors, "cpu")
    torch.library.opcheck(feature_loss._forward, (case.student, *others))
    torch.library.opcheck(feature_loss._backward, (torch.tensor(2.0), case.student.detach(), *others))


@pytest.mark.parametrize("name", ["int4", "codes for 4"])
def test_compile_without_graph_breaks(name: str) -> None:
    """torch.compile(fullgraph=True) traces through the facade; loss and gradient bit for bit."""
    case = inputs(name)
    compiled = torch.compile(cached_feature_loss, fullgraph=True, backend="aot_eager")
    losses = [function(*case.arguments()) for function in (cached_feature_loss, compiled)]
    grads = [torch.autograd.grad(loss, case.student)[0] for loss in losses]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(9, 12)}, r"student must be floating and \(B, T, C\)"),
        ({"tokens": torch.zeros(14, 12, dtype=torch.int32)}, "tokens must be float32, float16, int8 or uint8"),
        ({"tokens": torch.zeros(14, 12, dtype=torch.uint8)}, r"tokens must be \(14, 6\)"),
        (
            {"student": torch.zeros(3, 9, 13), "tokens": torch.zeros(14, 6, dtype=torch.uint8)},
            "even number of channels",
        ),
        ({"codebooks": torch.zeros(3, 256, 4)}, "their tokens uint8, got torch.float32 and torch.int8"),
        ({"codebooks": torch.zeros(3, 256, 4).half(), "tokens": CODES}, "codebooks must be float32"),
        ({"codebooks": torch.zeros(3, 256, 5), "tokens": CODES}, r"M \* d = 12 channels, got \(3, 256, 5\)"),
        ({"codebooks": torch.zeros(3, 128, 4), "tokens": CODES}, r"codebooks must be \(M, 256, d\)"),
        ({"codebooks": torch.zeros(3, 1024), "tokens": CODES}, r"got \(3, 1024\)"),
        ({"codebooks": torch.zeros(6, 256, 2), "tokens": CODES}, r"tokens must be \(14, 6\)"),
        ({"positions": torch.zeros(14)}, "positions must be int64"),
        ({"positions": torch.full((14,), 9)}, "positions must lie in 0..8"),
        ({"offsets": torch.tensor([0, 14])}, r"offsets must be \(4,\)"),
        ({"offsets": torch.tensor([0, 5, 5, 13])}, "offsets must rise from 0 to 14"),
        ({"scales": torch.zeros(14, 5)}, "G a divisor of 12"),
        ({"channel_shift": torch.zeros(11)}, r"channel_shift must be \(12,\)"),
    ],
)
def test_bad_input_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    """Each wrong shape, dtype or index gives ValueError with what was expected and found."""
    case = dataclasses.replace(inputs("int8, groups"), **change)
    with pytest.raises(ValueError, match=message):
        cached_feature_loss(*case.arguments())
