"""`--teacher hf:DIRECTORY`: an object detector of the DETR family from Hugging Face `transformers`, as a teacher.

The geometry is that of the student's sample, the preprocessing the teacher's own: its normalisation, and, for families
that work at one size, its resizing (docs/teachers.md). Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.cache.schema import TeacherInfo
from common.categories import from_transformers, match_outputs
from common.coco import Annotations
from common.detr.checkpoint_files import read_checkpoint, read_json, weight_files
from common.errors import UserError
from common.geometry import level_shapes, token_positions_in_batch
from common.images import IMAGENET_MEAN, IMAGENET_STD, collate
from common.records import LevelShapes, Targets
from common.runtime import log
from common.teacher import Teacher, TeacherOutput, sha256_of
from teacher_dump.config import TRANSFORMERS
from teacher_dump.transformers_families import FAMILIES, Decoded, Family, Model, correct_deimv2, prepare_fine

PROBE_SIZE = (256, 256)  # any multiple of the coarsest stride: shows a teacher of free size its strides
PREPROCESSOR = "preprocessor_config.json"

# Weights that a teacher does not use, or that a checkpoint may lack for a known reason.
_OPTIONAL = re.compile(
    r"num_batches_tracked$|num_points_scale$|denoising_class_embed\.|decoder\.up$|decoder\.reg_scale$"
    r"|lqe_layers\.|enc_output\."
)


@dataclass(frozen=True)
class Preprocessing:
    """From a sample's uint8 pixels to what the teacher sees.

    size: (height, width) in pixels that samples are resized to without keeping their aspect, which leaves relative
    boxes as they are; None leaves the sample's own pixels. mean, std: of pixels in 0..1.
    """

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bicubic: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (3, h, w) -> float32 (3, h, w), or of `size`."""
        if self.size is not None:
            # Pillow's resampling: antialiased, and the same on every processor, like that of the samples themselves.
            mode = Image.Resampling.BICUBIC if self.bicubic else Image.Resampling.BILINEAR
            pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize(self.size[::-1], mode)
            image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image.float() / 255 - mean) / std

    def __str__(self) -> str:
        size = "the sample's own pixels" if self.size is None else f"samples resized to {self.size[1]} x {self.size[0]}"
        plain = set(self.mean) == {0.0} and set(self.std) == {1.0}
        return f"{size}, divided by 255" + ("" if plain else f", mean {self.mean} and deviation {self.std} taken out")


def load_transformers_teacher(
    name: str, annotations: Annotations, device: torch.device, size: tuple[int, int] | None = None
) -> Teacher:
    """The teacher `hf:DIRECTORY` or `hf:OWNER/MODEL`, the latter from the hub's cache on this machine.

    size: (height, width) to resize samples to, for teachers that say none or another. UserError if the extra is not
    installed, the model is not there, not of a known family, incomplete, or its classes are not the data set's.
    """
    folder = find_model(name.removeprefix(TRANSFORMERS))
    called = Path(name.removeprefix(TRANSFORMERS)).name  # a snapshot's folder is called after a commit
    model, missing = load_model(folder)
    family = _with_defaults(FAMILIES[model.config.model_type], model.config)
    if model.config.model_type == "deimv2" and correct_deimv2(model, missing):
        log.info("this DEIMv2 was trained by its authors' code: transformers' three deviations from it are corrected")
    if model.config.model_type in ("d_fine", "deimv2"):
        prepare_fine(model, missing)
    preprocessing = read_preprocessing(folder, family, size)
    config = model.config.to_dict()
    outputs = match_outputs(from_transformers(config), len(config["id2label"]), annotations.categories)
    for line in (f"{called}: {model.config.model_type}; {preprocessing}", *outputs.notes):
        log.info(line)
    return as_teacher(model.to(device), family, preprocessing, outputs.columns, called, _fingerprint(folder))


def as_teacher(
    model: Model, family: Family, preprocessing: Preprocessing, columns: Sequence[int], name: str, weights_sha256: str
) -> Teacher:
    """A model of `transformers` as a teacher. Its levels, layers, queries and widths are read off a trial run."""
    device = next(model.parameters()).device
    picked = torch.tensor(list(columns), device=device)

    @torch.inference_mode()
    def decode(pixels: Tensor, mask: Tensor) -> Decoded:
        decoded = family.decode(model, pixels.to(device), mask.to(device))
        logits = sigmoid_logits(decoded.logits) if family.scores == "softmax" else decoded.logits
        return replace(decoded, logits=logits[..., picked])

    height, width = preprocessing.size or PROBE_SIZE
    probe = decode(torch.zeros(1, 3, height, width), torch.ones(1, height, width))
    strides = tuple(round(height / rows) for rows, _ in probe.level_shapes)
    if level_shapes(height, width, strides) != probe.level_shapes:
        raise UserError(
            f"expected a teacher whose feature levels have whole strides, found grids of {probe.level_shapes} for"
            f" {width} x {height} pixels; choose another size with --teacher-size"
        )
    info = TeacherInfo(
        name=name,
        weights_sha256=weights_sha256,
        trained=True,
        layers=probe.queries.shape[1],
        queries=probe.queries.shape[2],
        channels=probe.memory.shape[2],
        strides=strides,
        input_size=preprocessing.size,
        scores=family.scores,
    )

    def grid(height: int, width: int) -> LevelShapes:
        return level_shapes(*(preprocessing.size or (height, width)), strides)

    def run(images: Sequence[Tensor]) -> TeacherOutput:
        nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        prepared = [preprocessing(image.cpu()) for image in images]
        if preprocessing.size is None:
            batch = collate([(image, nothing) for image in prepared])
            decoded = decode(batch.images, (~batch.padding_mask).float())
        else:
            decoded = decode(torch.stack(prepared), torch.ones(len(prepared), *preprocessing.size))
        positions = [
            token_positions_in_batch(grid(*image.shape[-2:]), decoded.level_shapes).to(device) for image in images
        ]
        return TeacherOutput(
            memory=[memory[position] for memory, position in zip(decoded.memory, positions, strict=True)],
            queries=decoded.queries,
            logits=decoded.logits,
            boxes_cxcywh=decoded.boxes_cxcywh,
        )

    embeddings = family.static_queries(model)
    constants = {} if embeddings is None else {"query_embeddings": embeddings.detach().float().cpu().numpy()}
    return Teacher(info, constants, run, grid)


def sigmoid_logits(logits: Tensor) -> Tensor:
    """Logits (..., K) whose sigmoid is the softmax of logits (..., K + 1), the last of which means no object.

    logit(p_k) = log p_k - log(1 - p_k), in float64, so that probabilities up to 1 - 1e-13 come back; then in +-30.
    """
    log_p = logits.double().log_softmax(dim=-1)[..., :-1]
    return (log_p - torch.log(-torch.expm1(log_p))).clamp(-30, 30).to(logits.dtype)


def read_preprocessing(folder: Path, family: Family, size: tuple[int, int] | None = None) -> Preprocessing:
    """What preprocessor_config.json asks for, the family's usual values where it says nothing."""
    path = folder / PREPROCESSOR
    settings = read_json(path) if path.is_file() else {}
    try:
        found = _preprocessing(settings, family, size)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path}: expected an image processor's settings, found others ({error})") from None
    finite = all(map(math.isfinite, (*found.mean, *found.std)))
    if len(found.mean) != 3 or len(found.std) != 3 or not finite or min(found.std) <= 0:
        raise UserError(
            f"{path}: expected three means and three positive deviations, found {found.mean} and {found.std}"
        )
    if found.size is not None and not all(32 <= side <= 4096 for side in found.size):
        raise UserError(
            f"{path}: expected sides of 32 to 4096 pixels for the teacher's input, found {found.size}: name others with"
            " --teacher-size"
        )
    return found


def _preprocessing(settings: Mapping[str, Any], family: Family, size: tuple[int, int] | None) -> Preprocessing:
    mean, std = family.mean, family.std
    if settings:
        plain = not settings.get("do_normalize", family.mean != (0.0, 0.0, 0.0))
        mean = (0.0,) * 3 if plain else tuple(settings.get("image_mean") or IMAGENET_MEAN)
        std = (1.0,) * 3 if plain else tuple(settings.get("image_std") or IMAGENET_STD)
        scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
        mean, std = (tuple(value / (255 * scale) for value in values) for values in (mean, std))  # of pixels in 0..1
    wanted = settings.get("size") if settings.get("do_resize", True) else None
    if size is None and isinstance(wanted, dict) and {"height", "width"} <= wanted.keys():
        size = int(wanted["height"]), int(wanted["width"])
    if size is None and not family.own_size:
        size = family.default_size
    return Preprocessing(size, mean, std, bicubic=settings.get("resample") == 3)


def find_model(name: str) -> Path:
    """The folder of a model: the directory of that name, or a snapshot in the hub's cache."""
    folder = Path(name)
    if not folder.is_dir():
        import_transformers()
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            raise UserError(
                f"expected --teacher hf:DIRECTORY or a model in the hub's cache, found no folder {name} and no cached"
                f" model of that name; nothing is downloaded here: `hf download {name}` does"
            ) from None
    if not (folder / "config.json").is_file():
        raise UserError(f"expected a model as `save_pretrained` writes it, found no config.json in {folder}")
    return folder


def load_model(folder: Path) -> tuple[Model, list[str]]:
    """The model in evaluation mode, without gradients, and the names of the weights that the checkpoint lacks."""
    transformers = import_transformers()
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"expected a teacher of one of the families {', '.join(FAMILIES)}, found {model_type!r} in"
            f" {folder / 'config.json'}"
        )
    with _quiet(transformers):
        try:
            _check_size(folder, config, transformers)
            model, report = transformers.AutoModelForObjectDetection.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
            )
        except UserError:
            raise
        except Exception as error:  # a configuration can make its model's code fail in any way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{folder} cannot be loaded as a {model_type} model: {reason}") from None
    missing = sorted(report["missing_keys"])
    last = f".{model.config.decoder_layers - 1}."
    essential = [name for name in missing if not (_OPTIONAL.search(name) or _earlier_head(name, last))]
    essential += [str(name) for name in report["mismatched_keys"]]
    if essential:
        raise UserError(
            f"expected all weights of {model_type} in {folder}, but {len(essential)} are missing or misshapen, the"
            f" first is {essential[0]}: it is no trained detector of this configuration"
        )
    return model.eval().requires_grad_(False), missing


def _check_size(folder: Path, config: Mapping[str, Any], transformers: Any) -> None:
    """UserError where the configuration asks for a much larger model than the weights are of, before it is built."""
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        state |= read_checkpoint(file).state
    for name, number in _numbers(config):
        if re.search("layers|depths|blocks|levels", name) and number > len(state):
            raise UserError(
                f"{folder / 'config.json'}: expected a model of the {len(state)} tensors beside it, found {name} of"
                f" {number}: copy the folder again"
            )
    with torch.device("meta"):
        described = transformers.AutoModelForObjectDetection.from_config(
            transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        )
    asked, found = (sum(t.numel() for t in tensors.values()) for tensors in (described.state_dict(), state))
    if asked > 2 * found + 1_000_000:  # heads may be shared, or left out
        raise UserError(
            f"{folder / 'config.json'}: expected a model of the {found} numbers in the weights beside it, found one of"
            f" {asked}: copy the folder again"
        )


def _numbers(values: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number in json, with the name that it or its list goes by."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _numbers(value, key)
    elif isinstance(values, list):
        for value in values:
            yield from _numbers(value, name)
    elif isinstance(values, int) and not isinstance(values, bool):
        yield name, values


def import_transformers() -> Any:
    """The package `transformers`, which must not take our package `kernels` for PyPI's of that name.

    transformers 5.23 looks for an importable `kernels`, reads the version of the *distribution* of that name, and
    imports PyPI's API from it. With both installed it would find ours, under the other's version, and fail. So it is
    shown none while it looks, which it does once; it then runs without the kernels of Hugging Face's hub, which no
    teacher needs.
    """
    hidden = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import transformers
        from transformers.utils import import_utils

        import_utils.is_kernels_available()  # remembers its answer
        from transformers import AutoModelForObjectDetection  # noqa: F401 - imports what looks for kernels
        from transformers.integrations import hub_kernels  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--teacher hf: needs the extra `transformers` ({error}): pip install 'detrcache[transformers]'"
        ) from None
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' bars and its report of missing weights, which is ours to judge."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _with_defaults(family: Family, config: Any) -> Family:
    """DEIMv2's larger models have a DINOv3 backbone, which wants normalised pixels."""
    if config.model_type == "deimv2" and getattr(config.backbone_config, "model_type", "") == "dinov3_vit":
        return replace(family, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return family


def _earlier_head(name: str, last: str) -> bool:
    """A prediction head of a layer before the last: published checkpoints often come without."""
    return ("class_embed." in name or "bbox_embed." in name) and last not in name


def _fingerprint(folder: Path) -> str:
    """Hash of everything that decides what the teacher says: weights, configuration and preprocessing."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    files = [path for path in (folder / "config.json", folder / PREPROCESSOR, *weights) if path.is_file()]
    return hashlib.sha256("\n".join(f"{path.name} {sha256_of(path)}" for path in files).encode()).hexdigest()
