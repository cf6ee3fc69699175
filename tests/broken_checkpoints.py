"""Checkpoints that are broken, foreign or made to do harm, and what is to be said of each.

`broken_checkpoints` writes them one at a time; a caller loads each and expects one line, soon, and little memory.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from common.detr import layouts
from common.detr.config import DetectorConfig
from common.detr.detector import DeformableDetr
from common.detr.weights import export_state

CONFIG = DetectorConfig(
    "tiny", 3, width=32, encoder_layers=1, decoder_layers=2, heads=4, queries=5, levels=2, points=2, feedforward=16
)
RESNET = dataclasses.replace(CONFIG, backbone="resnet18")


def broken_checkpoints(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files and folders under `folder`, each with a part of the message that is right for it."""
    yield from _other_files(folder)
    yield from _torch_files(folder)
    yield from _safetensors_files(folder)
    yield from _configurations(folder)
    yield from _folders(folder)


def _other_files(folder: Path) -> Iterator[tuple[Path, str]]:
    contents = {
        "empty.pth": (b"", "an empty file"),
        "zeros.safetensors": (bytes(4096), "nothing but zeros"),
        "three_bytes.pth": (b"\x80\x02.", "a pickle that torch.save did not write"),
        "three_bytes.onnx": (b"abc", "ONNX"),
        "onnx.pth": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(100), "ONNX"),
        "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a Git LFS pointer"),
        "page.safetensors": (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "a web page"),
        "config.pth": (b'{"model_type": "deformable_detr"}', "json"),
        "keras.pth": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        "gzip.pth": (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        "text.pth": (b"no checkpoint", "neither safetensors nor a file of torch.save"),
        "plain_pickle.pkl": (pickle.dumps({"model": 1}, protocol=4), "a pickle that torch.save did not write"),
    }
    for name, (content, message) in contents.items():
        (folder / name).write_bytes(content)
        yield folder / name, message


def _torch_files(folder: Path) -> Iterator[tuple[Path, str]]:
    state = export_state(DeformableDetr(RESNET), layouts.OFFICIAL)
    whole = _saved(state)

    def write(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    yield write("torch_named.safetensors", whole), "rename it so that it ends in .pth"
    yield write("cut.pth", whole[: len(whole) // 2]), "was the copy cut short?"
    yield write("cut_old.pth", _saved(state, old=True)[:20_000]), "found a file of torch.save that cannot be read"
    yield write("old_head_only.pth", _saved(state, old=True)[:15]), "found a file of torch.save that cannot be read"
    yield write("no_tensors.pth", _saved({"epoch": 3})), "found no tensors"
    yield write("a_list.pth", _saved([1, 2])), "found no tensors"
    yield write("names_are_numbers.pth", _saved({3: torch.zeros(2)})), "found no tensors"
    yield write("sparse.pth", _saved({"a": torch.eye(3).to_sparse()})), "which is no plain tensor of numbers"
    yield write("complex.pth", _saved({"a": torch.zeros(3, dtype=torch.complex64)})), "no plain tensor of numbers"
    stretched = torch.zeros(1).expand(1_000_000, 1_000_000)
    yield write("stretched.pth", _saved({"a": stretched})), "holds more numbers than were saved"
    yield write("storage_beyond_its_record.pth", _short_record(_saved({"a": torch.zeros(1000)}))), "found "
    yield write("bomb.pth", _deflated(whole)), "unpacks to more than its own size"
    yield write("other_zip.pth", _zip({"word/document.xml": b"<xml/>"})), "that torch.save did not write"
    yield write("script.pth", _script()), "TorchScript"
    yield write("newline_in_names.pth", _saved({"a\n\x1b[31mb" * 400: torch.zeros(3)})), "another architecture"
    calls = {  # what a pickle may make: each 4 GB or a command
        "bytearray": ("builtins\nbytearray", 4_000_000_000),
        "command": ("os\nsystem", 0),
        "tensor": ("torch\nTensor", 1_000_000_000),
    }
    for name, (function, number) in calls.items():
        content = b"\x80\x02c" + function.encode() + b"\n(\x8a\x08" + struct.pack("<q", number) + b"tR."
        yield write(f"pickle_{name}.pth", _zip({"a/data.pkl": content, "a/version": b"3\n"})), "found "
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    yield write("pickle_deep.pth", _zip({"a/data.pkl": deep, "a/version": b"3\n"})), "found no tensors"
    far = state | {"transformer.decoder.layers.999999999.norm1.weight": torch.zeros(32)}
    yield write("layer_number.pth", _saved(far)), "tensors missing"
    less = state | {"transformer.level_embed": torch.zeros(())}
    yield write("no_dimensions.pth", _saved(less)), "tensors of other dimensions"
    heads = state | {"class_embed.1.weight": torch.zeros(9, 32), "class_embed.1.bias": torch.zeros(9)}
    yield write("heads_differ.pth", _saved(heads)), "of another shape: class_embed.1."


def _safetensors_files(folder: Path) -> Iterator[tuple[Path, str]]:
    whole = save({"a": torch.zeros(1000)})
    huge = {"a": {"dtype": "F32", "shape": [1_000_000, 1_000_000], "data_offsets": [0, 4_000_000_000_000]}}
    overflow = {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}
    many = {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}
    contents = {
        "cut.safetensors": whole[:200],
        "header_cut.safetensors": whole[:30],
        "header_length.safetensors": struct.pack("<Q", 2**60) + whole[8:],
        "huge_shape.safetensors": _safetensors(huge),
        "shape_overflow.safetensors": _safetensors(overflow),
        "many_tensors.safetensors": _safetensors(many),
        "deep_header.safetensors": _safetensors('{"a":' + "[" * 50_000 + "]" * 50_000 + "}"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield folder / name, "more than the" if name.startswith("many") else "safetensors that cannot be read"


def _configurations(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files of this project whose configuration is not that of their tensors, or none at all."""
    state = {name: tensor.contiguous() for name, tensor in DeformableDetr(CONFIG).state_dict().items()}
    right = dataclasses.asdict(CONFIG)
    changes: tuple[tuple[str, Any, str], ...] = (
        ("queries", 1_000_000_000, "found queries=5"),
        ("encoder_layers", 100_000, "found encoder_layers=1"),
        ("decoder_layers", 100_000, "found decoder_layers=2"),
        ("width", 1_048_576, "found width=32"),
        ("feedforward", 2_000_000_000, "found feedforward=16"),
        ("num_classes", 2_000_000_000, "found num_classes=3"),
        ("levels", 1_000_000, "found levels=2"),
        ("points", 10**18, "found sizes beyond any"),
        ("points", 10_000_000, "of another shape"),
        ("tiny_blocks", 1_000_000_000, "found tiny_blocks=2"),
        ("tiny_channels", [10**6] * 5, "of another shape"),
        ("tiny_channels", [10**30] * 5, "sizes beyond any"),
        ("tiny_channels", "12345", "found tiny_channels = "),
        ("backbone", "resnet101", "tensors missing"),
        ("backbone", "timm:hf-hub:someone/something", "backbone of timm's"),
        ("backbone", 3, "found backbone = 3"),
        ("heads", 0, "heads of at least 1"),
        ("heads", 2.5, "found heads = 2.5"),
        ("width", "32", "found width = '32'"),
        ("dropout", float("nan"), "a dropout in 0..1"),
        ("dropout", 7, "a dropout in 0..1"),
        ("refine", "yes", "found refine = 'yes'"),
        ("colour\n\x1b[31m", 1, "found unknown colour\\n"),
    )
    for number, (name, value, message) in enumerate(changes):
        path = folder / f"config_{number}.safetensors"
        metadata = {"format": "detrcache.detector", "config": json.dumps(right | {name: value})}
        save_file(state, path, metadata=metadata)
        yield path, message
    for number, (text, message) in enumerate(
        (
            ("[" * 100_000 + "]" * 100_000, "expected json"),
            ("[1, 2]", "expected a json object, found list"),
            ("{", "expected json"),
            ("{}", "backbone"),
        )
    ):
        path = folder / f"metadata_{number}.safetensors"
        save_file(state, path, metadata={"format": "detrcache.detector", "config": text})
        yield path, message
    for number, text in enumerate(("[" * 100_000, '{"id": 1}', "[1]", '[{"id": 1}]', "no json")):
        path = folder / f"classes_{number}.safetensors"
        metadata = {"format": "detrcache.detector", "config": json.dumps(right), "categories": text}
        save_file(state, path, metadata=metadata)
        yield path, "expected ids and names of its classes"


def _folders(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folders as transformers writes them."""
    exported = export_state(DeformableDetr(RESNET), layouts.TRANSFORMERS)
    state = {name: tensor.contiguous() for name, tensor in exported.items()}
    outside = folder / "outside.safetensors"
    save_file(state, outside)

    def made(name: str, config: str | None, write: Callable[[Path], object]) -> Path:
        (folder / name).mkdir()
        if config is not None:
            (folder / name / "config.json").write_text(config)
        write(folder / name)
        return folder / name

    def weights(path: Path) -> None:
        save_file(state, path / "model.safetensors")

    def index(parts: object) -> Callable[[Path], object]:
        return lambda path: (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))

    plain = json.dumps({"model_type": "deformable_detr"})
    yield made("nothing_in_it", None, lambda path: None), "expected model.safetensors or pytorch_model.bin"
    yield made("deep_config", "[" * 100_000, weights), "config.json: expected json"
    yield made("list_config", "[1]", weights), "expected a json object"
    not_text = made("config_of_bytes", "", weights)
    (not_text / "config.json").write_bytes(b"\xff" * 9)
    yield not_text, "config.json: expected json, found a file that cannot be read"
    yield (
        made("heads", json.dumps({"model_type": "deformable_detr", "encoder_attention_heads": "x"}), weights),
        "found ",
    )
    no_heads = {"encoder_attention_heads": 0, "decoder_attention_heads": 0}
    yield made("no_heads", json.dumps({"model_type": "deformable_detr"} | no_heads), weights), "heads of at least 1"
    labels = json.dumps({"model_type": "deformable_detr", "id2label": [1, 2, 3]})
    yield made("labels", labels, weights), "expected ids and names of its classes"
    yield (
        made("missing_part", plain, index({"a": "model-00001-of-00002.safetensors"})),
        "that its index names, found 1 of 1 missing",
    )
    yield made("part_outside", plain, index({"a": "../outside.safetensors"})), "expected a weight_map to files of this"
    yield made("absolute_part", plain, index({"a": str(outside)})), "expected a weight_map to files of this folder"
    yield made("numbered_parts", plain, index({"a": 3})), "expected a weight_map"
    yield made("no_map", plain, index(None)), "expected a weight_map"
    broken = made("broken_bin", plain, lambda path: (path / "pytorch_model.bin").write_bytes(b"PK\x03\x04abc"))
    yield broken, "was the copy cut short?"
    lfs = made("lfs_in_it", plain, lambda path: (path / "model.safetensors").write_bytes(b"version https://git-lfs.g"))
    yield lfs, "a Git LFS pointer"


def _saved(content: object, old: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def _zip(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _short_record(content: bytes) -> bytes:
    """The pickle asks for 4000 bytes of a record that has four, at the end of the file."""
    members = _members(content)
    (name,) = [name for name in members if name.endswith("/data/0")]
    del members[name]
    return _zip(members | {name: b"abcd"})


def _deflated(content: bytes) -> bytes:
    members = _members(content)
    return _zip({name: bytes(len(value)) if "/data/" in name else value for name, value in members.items()}, 8)


def _script() -> bytes:
    return _zip({"a/data.pkl": b"\x80\x02].", "a/constants.pkl": b"\x80\x02].", "a/version": b"3\n"})


def _safetensors(header: object) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text
