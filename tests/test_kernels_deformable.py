"""Deformable attention: the reference against transformers and finite differences, the others against the reference."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import backends, deformable, deformable_attention
from tests.deformable_cases import SHAPES, Shape, inputs, relative_error

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _run(shape: Shape, tensors: tuple[Tensor, Tensor, Tensor], backend: str) -> list[Tensor]:
    """Output and the three gradients, for a fixed gradient of the output."""
    value, locations, weights = tensors
    output = deformable_attention(value, shape.levels, locations, weights, backend)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output.dtype)
    return [output, *torch.autograd.grad(output, tensors, grad)]


@pytest.mark.parametrize("name", SHAPES)
def test_reference_agrees_with_transformers(name: str) -> None:
    """Output and gradients of the reference equal those of transformers' own module in float64, to 1e-12."""
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    shape = SHAPES[name]
    tensors = inputs(shape, torch.float64)
    if 0 in (shape.batch, shape.queries):
        assert _run(shape, tensors, "reference")[0].shape == (shape.batch, shape.queries, shape.heads * shape.width)
        return
    theirs = modeling.MultiScaleDeformableAttention()(
        tensors[0], None, [*shape.levels], None, tensors[1], tensors[2], im2col_step=64
    )
    ours, *grads = _run(shape, tensors, "reference")
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for found, expected in zip((ours, *grads), (theirs, *torch.autograd.grad(theirs, tensors, grad)), strict=True):
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_are_finite_differences(backend: str) -> None:
    """torch.autograd.gradcheck in float64 with its usual tolerances, outside locations included."""
    shape = Shape(2, 3, 2, 3, ((3, 4), (2, 1)), 2)
    assert torch.autograd.gradcheck(
        lambda *tensors: deformable_attention(tensors[0], shape.levels, *tensors[1:], backend),
        inputs(shape, torch.float64),
    )


@pytest.mark.parametrize("name", SHAPES)
def test_cpu_agrees_with_reference(name: str) -> None:
    """float32 output and gradients against the float64 reference: 1e-5 of the largest element."""
    shape = SHAPES[name]
    doubles = inputs(shape, torch.float64)
    singles = tuple(tensor.detach().float().requires_grad_() for tensor in doubles)
    for found, expected in zip(_run(shape, singles, "cpu"), _run(shape, doubles, "reference"), strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpu_takes_mixed_dtypes(dtype: torch.dtype) -> None:
    """Values in half precision with float32 locations, as under autocast: the sums are float32, so only the rounding of
    the result differs from the reference on the same numbers. Gradients come in the dtype of what they belong to."""
    shape = SHAPES["usual"]
    value, locations, weights = inputs(shape)
    tensors = (value.detach().to(dtype).requires_grad_(), locations, weights)
    for found, expected in zip(_run(shape, tensors, "cpu"), _run(shape, tensors, "reference"), strict=True):
        assert found.dtype == expected.dtype
        assert relative_error(found, expected) < (1e-5 if found.dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["usual", "odd width"])
def test_same_bits_for_any_number_of_threads(name: str) -> None:
    """Output and gradients on 1, 2, 3 and 7 threads are equal bit for bit."""
    shape = SHAPES[name]
    tensors = inputs(shape)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(_run(shape, tensors, "cpu"))
    for result in results[1:]:
        assert all(torch.equal(found, expected) for found, expected in zip(result, results[0], strict=True))


def test_gradient_that_is_expanded_or_strided() -> None:
    """A sum's gradient is one number seen everywhere, a transposed output's is strided: both as with a copy of it."""
    shape = SHAPES["usual"]
    tensors = inputs(shape)
    output = deformable_attention(tensors[0], shape.levels, *tensors[1:], "cpu")
    for grad in (torch.ones(()).expand(output.shape), torch.randn(output.mT.shape).mT):
        found = torch.autograd.grad(output, tensors, grad, retain_graph=True)
        expected = torch.autograd.grad(output, tensors, grad.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_strided_inputs() -> None:
    """Views whose elements do not lie side by side give what their copies give, bit for bit."""
    shape = SHAPES["usual"]
    value, locations, weights = (tensor.detach() for tensor in inputs(shape))
    strided = (
        value.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
        locations.flip(-1).contiguous().flip(-1).mT.contiguous().mT,
        torch.stack((weights, weights), -1)[..., 0],
    )
    found = deformable_attention(strided[0], shape.levels, *strided[1:], "cpu")
    assert torch.equal(found, deformable_attention(value, shape.levels, locations, weights, "cpu"))


def test_not_a_number_and_infinity_as_locations() -> None:
    """A location that is no number contributes zero, as with grid_sample, and touches nothing beside it."""
    shape = SHAPES["usual"]
    value, locations, weights = (tensor.detach() for tensor in inputs(shape))
    bad = locations.clone()
    bad[:, ::2, :, 1, 2] = torch.tensor([float("nan"), float("inf")])
    outside = locations.clone()
    outside[:, ::2, :, 1, 2] = -9.0
    found = deformable_attention(value, shape.levels, bad, weights, "cpu")
    assert torch.equal(found, deformable_attention(value, shape.levels, outside, weights, "cpu"))


def test_many_python_threads_at_once() -> None:
    """Eight threads calling together get what one call gets: no shared scratch, no threading layer that aborts."""
    shape = SHAPES["usual"]
    tensors = tuple(tensor.detach() for tensor in inputs(shape))
    torch.set_num_threads(2)

    def call(_: int) -> Tensor:
        return deformable_attention(tensors[0], shape.levels, *tensors[1:], "cpu")

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(32)))
    assert all(torch.equal(result, call(0)) for result in results)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_child_has_threads_of_its_own() -> None:
    """After the parent used its threads, a forked child (a DataLoader worker) computes the same instead of hanging.

    The child calls nothing else: torch's own OpenMP loops do hang there with more than one thread.
    """
    shape = SHAPES["usual"]
    value, locations, weights = (tensor.detach() for tensor in inputs(shape))
    torch.set_num_threads(2)

    def call() -> list[float]:
        output: list[float] = deformable_attention(value, shape.levels, locations, weights, "cpu").flatten().tolist()
        return output

    expected = call()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(call() == expected))
    child.start()
    child.join(timeout=30)
    try:
        assert child.exitcode == 0
        assert queue.get()
    finally:
        child.kill()


def test_works_where_nothing_can_be_cached(tmp_path: Path) -> None:
    """A package directory and a home that cannot be written to: compiled anew, same result, no error."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    for source in (ROOT / "kernels").glob("*.py"):
        (package / source.name).write_text(source.read_text())
    (package / "__pycache__").write_text("a file where the directory should be")
    (tmp_path / "home").write_text("a file where the directory should be")
    code = (
        "import torch; from kernels import deformable_attention as attend; import kernels;"
        "print(kernels.__file__, attend(torch.ones(1, 6, 1, 4), [(2, 3)], torch.full((1, 1, 1, 1, 1, 2), .5), "
        "torch.full((1, 1, 1, 1, 1), 3.)).tolist())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG", "NUMBA"))}
    environment |= {
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(tmp_path / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{package / '__init__.py'} [[[3.0, 3.0, 3.0, 3.0]]]"


def test_torch_library_registration() -> None:
    """torch.library.opcheck: schema, fake implementation, autograd registration, dynamic shapes."""
    shape = SHAPES["odd width"]
    value, locations, weights = inputs(shape)
    sizes = [side for level in shape.levels for side in level]
    torch.library.opcheck(deformable._forward, (value, sizes, locations, weights, "cpu"))
    grad = torch.randn(shape.batch, shape.queries, shape.heads * shape.width)
    detached = (value.detach(), sizes, locations.detach(), weights.detach())
    torch.library.opcheck(deformable._backward, (grad, *detached, "cpu"))


def test_compile_without_graph_breaks() -> None:
    """torch.compile(fullgraph=True) traces through the facade, "auto" included; output and gradients bit for bit."""
    shape = SHAPES["usual"]
    tensors = inputs(shape)

    def layer(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, list(shape.levels), locations, weights).sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    eager, traced = layer(*tensors), compiled(*tensors)
    assert torch.equal(eager, traced)
    expected = torch.autograd.grad(eager.sum(), tensors)
    for found, grad in zip(torch.autograd.grad(traced.sum(), tensors), expected, strict=True):
        assert torch.equal(found, grad)


class _Layer(torch.nn.Module):
    def __init__(self, levels: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.levels = list(levels)

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, self.levels, locations, weights)


def test_export_keeps_the_operator() -> None:
    """torch.export with a dynamic batch holds one call of the operator, and runs on another batch size."""
    shape = SHAPES["usual"]
    tensors = tuple(tensor.detach() for tensor in inputs(shape))
    dynamic = ({0: torch.export.Dim.DYNAMIC},) * 3
    program = torch.export.export(_Layer(shape.levels), tensors, dynamic_shapes=dynamic)
    calls = [node for node in program.graph.nodes if node.target is torch.ops.detrcache.deformable_attention.default]
    assert len(calls) == 1
    one = tuple(tensor[:1] for tensor in tensors)
    assert torch.equal(program.module()(*one), deformable_attention(one[0], list(shape.levels), *one[1:]))


def test_the_log_says_once_which_version_runs(caplog: pytest.LogCaptureFixture) -> None:
    """Three calls, one line."""
    backends._announce.cache_clear()
    shape = SHAPES["odd width"]
    value, locations, weights = inputs(shape)
    with caplog.at_level(logging.INFO, logger="kernels"):
        for _ in range(3):
            deformable_attention(value, shape.levels, locations, weights)
    assert [record.message for record in caplog.records] == ["deformable attention on cpu: cpu version"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(2, 25, 3, 7)}, "hold 26 tokens, but value has 25"),
        ({"value": torch.zeros(26, 3, 7)}, r"value must be \(B, T, H, D\)"),
        ({"level_shapes": [(26, 1), (0, 3)]}, "level_shapes must be"),
        ({"sampling_locations": torch.zeros(2, 5, 3, 2, 3, 3)}, r"sampling_locations must be \(2, Q, 3, 2, P, 2\)"),
        ({"sampling_locations": torch.zeros(2, 5, 3, 2, 0, 2)}, "at least one point"),
        ({"attention_weights": torch.zeros(2, 5, 3, 6)}, r"attention_weights must be \(2, 5, 3, 2, 3\)"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], message: str) -> None:
    """Each wrong shape gives ValueError with what was expected and found."""
    shape = SHAPES["odd width"]
    value, locations, weights = inputs(shape)
    arguments: dict[str, object] = {
        "value": value,
        "level_shapes": list(shape.levels),
        "sampling_locations": locations,
        "attention_weights": weights,
    }
    with pytest.raises(ValueError, match=message):
        deformable_attention(**(arguments | change))  # type: ignore[arg-type]
