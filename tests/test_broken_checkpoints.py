"""Checkpoint files as hostile input, and files under another kind's name."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.detr import layouts
from common.detr.detector import DeformableDetr
from common.detr.weights import export_state, load_detector, save_detector
from common.errors import UserError
from student_train.export import transformers_config
from tests.broken_checkpoints import CONFIG, RESNET, broken_checkpoints


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_each_is_one_line(tmp_path: Path) -> None:
    """Every broken checkpoint is a UserError of one printable line that says what it is; the process never grows by
    more than 1 GB over the lot."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = 0
    for path, message in broken_checkpoints(tmp_path):
        with pytest.raises(UserError) as caught:
            load_detector(path)
        assert message in str(caught.value), path.name
        assert str(caught.value).isprintable(), path.name
        assert len(str(caught.value)) < 2100, path.name
        tried += 1
    assert tried > 80
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    """safetensors called .pth, a file of torch.save called .bin, and transformers' weights in two parts: the same
    weights (exact)."""
    model = DeformableDetr(CONFIG).eval()
    save_detector(tmp_path / "own.pth", model)
    loaded, _ = load_detector(tmp_path / "own.pth")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())

    model = DeformableDetr(dataclasses.replace(RESNET, heads=8)).eval()
    state = {name: tensor.contiguous() for name, tensor in export_state(model, layouts.TRANSFORMERS).items()}
    torch.save({"model": export_state(model, layouts.OFFICIAL)}, tmp_path / "official.bin")
    names = sorted(state)
    parts = {"a.safetensors": names[:50], "b.safetensors": names[50:]}
    (tmp_path / "parts").mkdir()
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, tmp_path / "parts" / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "parts" / "config.json").write_text(json.dumps(transformers_config(model.config, None)))
    for path in (tmp_path / "official.bin", tmp_path / "parts"):
        found = load_detector(path)[0].state_dict()
        assert all(torch.equal(found[k], v) for k, v in model.state_dict().items() if not k.endswith("_tracked")), path
