"""Checkpoint files -> named tensors, without running any code they carry.

A file is read as what its first bytes say, not its name. Tensors are views of the mapped file, so that nothing is
taken into memory before it is used, and none can be larger than the file.
"""

from __future__ import annotations

import json
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # as torch's own reader of pickles
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from common.categories import from_mmdet
from common.errors import UserError
from common.inputs import check_checkpoint

FORMAT = "detrcache.detector"
MOST_TENSORS = 100_000  # published detectors have hundreds to a few thousand
MOST_JSON_BYTES = 10_000_000

_TORCH_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's own number; later files are zip archives
# How files begin that are often found under a checkpoint's name, what they are, and what to do.
_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer in its place; `git lfs pull` fetches the file itself"),
    (b"<", "a web page; download the file itself, not the page that shows it"),
    (b"{", "json; name the file that holds the weights"),
    (b"\x89HDF", "HDF5, as Keras writes it; convert it to safetensors"),
    (b"\x1f\x8b", "gzip; unpack it first"),
    (b"GGUF", "GGUF; convert it to safetensors"),
)


@dataclass(frozen=True)
class Checkpoint:
    """state: tensors by name. config: the configuration that came along, in the file's metadata or a config.json.
    metadata: what else a file of this project says of itself, or MMDetection's of its classes."""

    path: Path
    state: dict[str, Tensor]
    config: Mapping[str, Any] | None
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read safetensors, a file of torch.save, or a folder with config.json and weights as transformers writes it.

    Raises UserError if there is no such file, it is broken, or it holds no tensors.
    """
    check_checkpoint(path)
    files = weight_files(path) if path.is_dir() else [path]
    state: dict[str, Tensor] = {}
    for file in files:
        tensors, config, metadata = _read_file(file)
        state |= tensors
    if config is None and (path.is_dir() or path.name == "model.safetensors"):
        beside = files[0].with_name("config.json")
        config = read_json(beside) if beside.is_file() else None
    return Checkpoint(path, state, config, metadata)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder of transformers': one, or those that an index names.

    Raises UserError if there are none, or the index names files that are missing or elsewhere.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            parts = read_json(index).get("weight_map")
            names = set(parts.values()) if isinstance(parts, dict) and _are_strings(parts.values()) else set()
            if not names or any(Path(part).name != part for part in names):
                raise UserError(f"{index}: expected a weight_map to files of this folder, found another; copy it again")
            if missing := [part for part in sorted(names) if not (folder / part).is_file()]:
                raise UserError(
                    f"{folder}: expected the files of weights that its index names, found {len(missing)} of"
                    f" {len(names)} missing, the first is {missing[0]}; copy the folder again"
                )
            return [folder / part for part in sorted(names)]
    raise UserError(f"{folder}: expected model.safetensors or pytorch_model.bin in this folder, found neither")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a json file. Raises UserError if it cannot be read or is something else."""
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise UserError(f"{path}: expected json of at most {MOST_JSON_BYTES / 1e6:.0f} MB, found more")
        return parse_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected json, found a file that cannot be read ({error})") from None


def parse_json(text: str, source: str) -> dict[str, Any]:
    """The object that `text` spells. Raises UserError, which begins with `source`, if it is something else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: expected json, found: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected a json object, found {type(content).__name__}")
    return content


def _read_file(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None, Mapping[str, str]]:
    with path.open("rb") as file:
        head = file.read(512)
    config: Any = None
    metadata: Mapping[str, str] = {}
    try:
        if head[8:9] == b"{":
            state, config, metadata = _read_safetensors(path)
        elif head.startswith((b"PK\x03\x04", _TORCH_BEFORE_1_6)):
            content = _read_torch(path, head)
            state = _state_dict(content)
            config, meta = (content.get(key) if isinstance(content, Mapping) else None for key in ("config", "meta"))
            known = from_mmdet(meta) if isinstance(meta, Mapping) else None
            metadata = {} if known is None else known.to_metadata()
        else:
            raise UserError(_other_kind(path, head))
    except UserError as error:
        raise UserError(f"{path}: expected a checkpoint, found {error}") from None
    except Exception as error:  # whatever readers raise on a file that was made to confuse them
        kind = "safetensors" if head[8:9] == b"{" else "a file of torch.save"
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        if reason.startswith("Weights only load failed"):
            reason = "its pickle asks for more than tensors, numbers and containers"
        raise UserError(
            f"{path}: expected a checkpoint, found {kind} that cannot be read ({reason}); copy or download it again"
        ) from None
    if problem := _problem(state):
        raise UserError(f"{path}: expected a state dict, plain or under 'model' or 'state_dict', found {problem}")
    return state, config if isinstance(config, Mapping) else None, metadata


def _other_kind(path: Path, head: bytes) -> str:
    for beginning, kind in _OTHERS:
        if head.lstrip().startswith(beginning):
            return kind
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] in b"\x12\x3a\x42"):
        return "ONNX, which is no longer trained weights alone; name the checkpoint that it was exported from"
    if not head.strip(b"\0"):
        return f"{'nothing but zeros' if head else 'an empty file'}; copy or download it again"
    if head.startswith(b"\x80"):
        return "a pickle that torch.save did not write; load it where it was made and save its state dict"
    return "neither safetensors nor a file of torch.save; copy or download it again"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None, Mapping[str, str]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        names = file.keys()
        if len(names) > MOST_TENSORS:
            raise UserError(f"{len(names)} tensors, more than the {MOST_TENSORS} that any detector has")
        state = {name: file.get_tensor(name) for name in names}
    if metadata.get("format") != FORMAT:
        return state, None, {}
    return state, parse_json(metadata.get("config", ""), "its configuration"), metadata


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


def _read_torch(path: Path, head: bytes) -> Any:
    zipped = head.startswith(b"PK")
    names = _globals_in_zip(path) if zipped else _globals_before_1_6(path)
    if path.suffix == ".safetensors":  # torch.load goes by the name
        raise UserError("a file of torch.save; rename it so that it ends in .pth")
    if "builtins.bytearray" in names:  # torch takes it for harmless, but it makes bytes of any number
        raise UserError("a pickle that makes arrays of bytes; load it where it was made and save its state dict")
    with torch.serialization.safe_globals([(_Ignored, name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _globals_in_zip(path: Path) -> set[str]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError("the beginning of a file of torch.save; was the copy cut short?") from None
    with archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError("a zip archive that unpacks to more than its own size, which torch.save never writes")
        content = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if not content:
            raise UserError("a zip archive that torch.save did not write (no data.pkl in it)")
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise UserError("TorchScript, which is a program; save the state dict of the model instead")
        with archive.open(content[0]) as file:
            return _globals(file)


def _globals_before_1_6(path: Path) -> set[str]:
    """Those files are five pickles, one after another, and then the bytes of the tensors."""
    with path.open("rb") as file:
        return set().union(*(_globals(file) for _ in range(5)))


def _globals(file: Any) -> set[str]:
    """The dotted names of what a pickle imports, in Python 3's spelling."""
    found = set()
    for code, text, _ in pickletools.genops(file):
        if code.name == "GLOBAL":
            module, _, name = str(text).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            found.add(f"{module}.{name}")
    return found


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The state dict in a checkpoint: itself, or what it holds as `model` (official) or `state_dict` (MMDetection)."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    items = content.items() if isinstance(content, Mapping) else ()
    return {name: tensor for name, tensor in items if isinstance(name, str) and isinstance(tensor, Tensor)}


def _problem(state: Mapping[str, Tensor]) -> str | None:
    """What is wrong with these tensors, whatever they are for."""
    if not state:
        return "no tensors"
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            return f"{name}, which is no plain tensor of numbers"
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            return f"{name}, whose shape {tuple(tensor.shape)} holds more numbers than were saved"
    return None


def _are_strings(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)
