"""Checkpoint files -> named tensors, without running any code they carry."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.categories import from_mmdet
from common.errors import UserError

FORMAT = "detrcache.detector"


@dataclass(frozen=True)
class Checkpoint:
    """state: tensors by name. config: the configuration that came along, in the file's metadata or a config.json.
    metadata: what else a file of this project says of itself, or MMDetection's of its classes."""

    path: Path
    state: dict[str, Tensor]
    config: Mapping[str, Any] | None
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read .safetensors, a folder with config.json and weights as transformers writes it, or a file of torch.save.

    Raises UserError if there is no such file, it is broken, or it holds no tensors.
    """
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise UserError(f"{path}: expected model.safetensors or pytorch_model.bin in this folder, found neither")
        state, config, metadata = _read_file(file)
        return Checkpoint(path, state, config or _json_beside(file), metadata)
    if not path.is_file():
        raise UserError(f"expected a checkpoint file, found nothing at {path}; check the path")
    state, config, metadata = _read_file(path)
    if config is None and path.name == "model.safetensors":
        config = _json_beside(path)
    return Checkpoint(path, state, config, metadata)


def _read_file(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None, Mapping[str, str]]:
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        content = _read_torch(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: expected a checkpoint, found a file that cannot be read ({reason[:120]})") from None
    config, meta = (content.get(key) if isinstance(content, Mapping) else None for key in ("config", "meta"))
    known = from_mmdet(meta) if isinstance(meta, Mapping) else None
    metadata = {} if known is None else known.to_metadata()
    return _tensors(content, path), config if isinstance(config, Mapping) else None, metadata


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None, Mapping[str, str]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    if metadata.get("format") != FORMAT:
        return state, None, {}
    return state, json.loads(metadata["config"]), metadata


class _Ignored(dict[Any, Any]):
    """Stands for every object in a pickle that is neither a tensor nor a plain container.

    Checkpoints of other projects carry their command line (argparse.Namespace), logs, numpy numbers. None of this is
    needed, so none of their classes is imported or called: each becomes one of these, which takes anything.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def _read_torch(path: Path) -> Any:
    foreign = ["argparse.Namespace"]  # files older than torch 1.6 cannot be searched for more
    if zipfile.is_zipfile(path):
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_Ignored, name) for name in foreign]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint: itself, or what it holds as `model` (official) or `state_dict` (MMDetection)."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{path}: expected a state dict, plain or under 'model' or 'state_dict', found no tensors")
    return tensors


def _json_beside(file: Path) -> Mapping[str, Any] | None:
    config = file.with_name("config.json")
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config}: expected json, found: {error}") from None
    return content if isinstance(content, dict) else None
