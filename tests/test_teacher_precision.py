"""Teachers in lower precision, `--amp`: what a store notes of it, and what changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.cache.reader import CacheReader
from common.cache.schema import TeacherAmp, TeacherInfo
from common.teacher import Teacher, TeacherOutput
from teacher_dump.precision import in_precision
from teacher_dump.transformers_families import FAMILIES
from teacher_dump.transformers_teacher import Preprocessing, as_teacher
from tests.dump_cases import command, contents, draw_scenes, dump
from tests.tiny_transformers import build

AMPS: tuple[TeacherAmp | None, ...] = (None, "bf16")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scenes(tmp_path_factory.mktemp("precision") / "scenes", 6)


def test_a_store_notes_it(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store of a teacher in bf16: its manifest says so, it is verified and repaired in bf16 (the same bytes), and not
    completed in float32. Tokens against float32's: other ones, by less than 5% (bfloat16 has 8 bits)."""
    exact, mixed = tmp_path / "exact.zarr", tmp_path / "mixed.zarr"
    lossless = ("--tokens", "fp32")
    assert dump(data, exact, *lossless) == 0
    assert dump(data, mixed, *lossless, "--amp", "bf16") == 0
    notes = [json.loads((store / "zarr.json").read_text())["attributes"]["detrcache"] for store in (exact, mixed)]
    assert [note["teacher"].get("amp", "absent") for note in notes] == ["absent", "bf16"]
    source = ("--teacher", "random:tiny", "--data", data)
    assert command("verify", mixed, "--against-teacher", 2, *source) == 0
    before = contents(mixed)
    (mixed / next(name for name in before if name.startswith("quality/c."))).unlink()
    capsys.readouterr()
    assert dump(data, mixed, *lossless) == 2
    assert "teacher.amp: None against 'bf16'" in capsys.readouterr().err
    assert command("repair", mixed, *source) == 0
    assert contents(mixed) == before
    readers = [CacheReader(store) for store in (exact, mixed)]
    one, other = (reader.read(reader.rows()).tokens for reader in readers)
    assert 1e-5 < float((other - one).norm() / one.norm()) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_transformers(family: str) -> None:
    """Each runs in bf16, and answers in float32: tokens within 5% of float32's."""
    pytest.importorskip("transformers")
    side = 64 if family == "rf_detr" else 128
    columns, preprocessing = range(4), Preprocessing((side, side), (0.0,) * 3, (1.0,) * 3)
    teacher = as_teacher(build(family, 4), FAMILIES[family], preprocessing, columns, family, "")
    image = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact, mixed = (in_precision(teacher, amp, torch.device("cpu")).run([image]).memory[0] for amp in AMPS)
    assert mixed.dtype == torch.float32
    assert 1e-5 < float((mixed - exact).norm() / exact.norm()) < 0.05


def test_tf32_without_a_gpu(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dump(data, tmp_path / "s.zarr", "--amp", "tf32", "--device", "cpu") == 2
    assert "--amp tf32 expects a GPU, found cpu" in capsys.readouterr().err
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("amp", [None, "tf32"])
def test_products_on_a_gpu(amp: TeacherAmp | None) -> None:
    """While a teacher runs, both of torch's switches for TF32 are as asked; after it, as they were."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before, seen = [backend.allow_tf32 for backend in backends], []

    def run(images: object) -> TeacherOutput:
        seen.extend(backend.allow_tf32 for backend in backends)
        nothing: Tensor = torch.zeros(0)
        return TeacherOutput([], nothing, nothing, nothing)

    teacher = Teacher(TeacherInfo("", "", True, 1, 1, 1, (8,)), {}, run, lambda height, width: [])
    in_precision(teacher, amp, torch.device("cuda")).run([])
    assert seen == [amp == "tf32"] * 2
    assert [backend.allow_tf32 for backend in backends] == before
