"""Our package `kernels` beside PyPI's of that name, which transformers imports when it finds one.

Each case runs in a process of its own, on a path that is set up as pip or a checkout would. PyPI's package is played by
one with its name, its metadata and its names in `__init__`, of a version that transformers accepts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra: pip install 'detrcache[transformers]'")

from transformers.utils.import_utils import KERNELS_MIN_VERSION

REPOSITORY = Path(__file__).resolve().parents[1]

TRANSFORMERS_RUNS = """
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
import torch
backbone = ResNetConfig(embedding_size=4, hidden_sizes=[4] * 4, depths=[1] * 4, layer_type="basic",
                        out_features=["stage4"])
small = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, d_model=8)
model = DetrForObjectDetection(DetrConfig(backbone_config=backbone, num_queries=3, **small)).eval()
print("boxes", tuple(model(torch.zeros(1, 3, 64, 64)).pred_boxes.shape))
"""
OURS_RUN = """
import kernels, torch
print("matched", kernels.hungarian(torch.tensor([[[[0., 1.], [1., 0.]]]])).flatten().tolist())
"""


@pytest.fixture
def pypi_kernels(tmp_path: Path) -> Path:
    """A folder of site-packages' kind that holds PyPI's `kernels`."""
    folder = tmp_path / "site"
    (folder / "kernels").mkdir(parents=True)
    names = (
        "CUDAProperties Device KernelizeFallback LayerRepository LocalLayerRepository Mode ROCMProperties get_kernel"
        " kernelize register_kernel_mapping replace_kernel_forward_from_hub use_kernel_forward_from_hub"
        " use_kernel_mapping use_kernelized_func"
    )
    lines = [f'__version__ = "{KERNELS_MIN_VERSION}"']
    lines += [f"def {name}(*_, **__): return lambda anything: anything" for name in names.split()]
    (folder / "kernels" / "__init__.py").write_text("\n".join(lines))
    (folder / "kernels" / "layer.py").write_text("")
    metadata = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (metadata / "RECORD").write_text("kernels/__init__.py,,\nkernels/layer.py,,\n")
    return folder


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, check=False
    )


def test_transformers_runs_with_ours_on_the_path() -> None:
    """transformers alone, ours importable: it takes ours for no hub kernels, and a DETR runs; then ours does."""
    done = run(TRANSFORMERS_RUNS + OURS_RUN, REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["boxes (1, 3, 4)", "matched [0, 1]"]


def test_the_other_package_is_one_that_transformers_uses(pypi_kernels: Path) -> None:
    """The stand-in is what the tests below need: without ours on the path, transformers finds and imports it."""
    code = "from transformers.utils.import_utils import is_kernels_available as there; print(there())"
    done = run(f"{code}; from transformers import DetrForObjectDetection; import kernels", pypi_kernels)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_our_teachers_run_with_both_installed(pypi_kernels: Path) -> None:
    """Ours first, PyPI's behind: transformers as phase one imports it runs, and so does ours."""
    guard = "from teacher_dump.transformers_teacher import import_transformers\nimport_transformers()\n"
    done = run(guard + TRANSFORMERS_RUNS + OURS_RUN, REPOSITORY, pypi_kernels)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["boxes (1, 3, 4)", "matched [0, 1]"]


def test_transformers_by_itself_says_what_to_do_with_both_installed(pypi_kernels: Path) -> None:
    """Ours first, PyPI's behind, transformers imported without phase one's care: it fails on a name that ours lacks, in
    one line of ours that says how to go on; and going on that way works."""
    done = run(TRANSFORMERS_RUNS, REPOSITORY, pypi_kernels)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "import_transformers" in last
    assert "pip uninstall kernels" in last


@pytest.mark.parametrize("module", ["teacher_dump.__main__", "student_train.__main__", "common.errors"])
def test_the_other_package_in_our_place_is_named(pypi_kernels: Path, module: str) -> None:
    """PyPI's first on the path (pip overwrote ours, or it stands before a checkout): the last line says so and what to
    do."""
    done = run(f"import {module}", pypi_kernels, REPOSITORY)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "PyPI's kernels" in last
    assert "pip uninstall kernels" in last


def test_overwritten_in_one_folder_is_named(pypi_kernels: Path) -> None:
    """Both installed by pip into the same site-packages, PyPI's last: our modules lie beside the other's `__init__`."""
    for package in ("common", "kernels", "teacher_dump", "student_train"):
        (pypi_kernels / package).mkdir(exist_ok=True)
        for file in (REPOSITORY / package).glob("*.py"):
            target = pypi_kernels / package / file.name
            if not target.exists():
                target.symlink_to(file)
    for package in ("detr", "cache"):
        (pypi_kernels / "common" / package).symlink_to(REPOSITORY / "common" / package)
    done = run("import teacher_dump.__main__", pypi_kernels)
    assert done.returncode == 1
    assert "pip uninstall kernels" in done.stderr.strip().splitlines()[-1]
