"""Detectors from checkpoint files, whoever wrote them, and back."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import categories
from common.categories import Categories, Outputs, match_outputs
from common.detr.backbone import build_backbone
from common.detr.checkpoint_files import FORMAT, Checkpoint, read_checkpoint
from common.detr.config import BACKBONES, DetectorConfig
from common.detr.detector import DeformableDetr
from common.detr.layouts import LAYOUTS, OWN, Layout, State, from_layout, gather_heads, to_layout
from common.detr.timm_backbone import PREFIX, build_timm
from common.errors import UserError
from common.files import save_tensors


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's tensors.

    layout: whose names it uses. config: of the detector built. unused: names of tensors that found no place. notes:
    what was decided on the way, one sentence each. categories: of each class, where the checkpoint says so. (Tensors
    that are missing or have the wrong shape are an error.)
    """

    source: str
    layout: str
    config: DetectorConfig
    unused: tuple[str, ...]
    notes: tuple[str, ...]
    categories: Categories | None = None

    def outputs_for(self, data: Categories) -> Outputs:
        """Which of the detector's outputs are the data's classes. UserError where they are other classes."""
        return _match(self.source, self.categories, self.config.num_classes, data)

    def lines(self) -> list[str]:
        """The report for people."""
        c = self.config
        variant = "two-stage" if c.two_stage else "with box refinement" if c.refine else "plain"
        size = f"{c.backbone}, {c.num_classes} classes, {c.queries} queries, {c.decoder_layers} layers, {variant}"
        lines = [f"{self.source}: Deformable DETR in the {self.layout} layout: {size}", *self.notes]
        if self.unused:
            lines.append(f"{len(self.unused)} tensors of the file are not used: {_some(self.unused)}")
        return lines


def load_detector(
    path: str | Path, num_classes: int | None = None, data: Categories | None = None
) -> tuple[DeformableDetr, LoadReport]:
    """A detector with the weights of a checkpoint of any known layout, on the CPU, in eval mode.

    path: .pth or .pt (read with `weights_only=True`), .safetensors, or a folder as transformers writes it. num_classes:
    how many classes it must tell apart. data: the data's classes; the detector then has these alone, in this order
    (`common.categories.match_outputs`).

    The architecture is inferred from names and shapes, or read from the configuration in the file or beside it. Raises
    UserError, one line, if the file cannot be read, is of another architecture, has another number of classes, or
    weights that are not finite.
    """
    checkpoint = read_checkpoint(Path(path))
    layout, prefix = _layout_of(checkpoint)
    inside = {k.removeprefix(prefix): v for k, v in checkpoint.state.items() if k.startswith(prefix)}
    try:
        state, unused = from_layout(inside, layout)
    except (RuntimeError, TypeError) as error:  # parts of other shapes, which are put together or counted
        raise UserError(f"{path}: expected a Deformable DETR in the {layout.name} layout, found {error}") from None
    unused += [name for name in checkpoint.state if not name.startswith(prefix)]
    notes = [f"the weights under {prefix!r} are taken"] if prefix else []

    if layout is OWN:
        config = _own_config(state, checkpoint)
    else:
        state = _untie(state)
        config = _infer_config(state, checkpoint)
        state = gather_heads(state, config)
    _check_shapes(config, state, layout, str(path))
    known = _categories(checkpoint, config.num_classes)
    if data is not None:
        outputs = _match(str(path), known, config.num_classes, data)
        state = select_classes(state, config.num_classes, outputs.columns)
        known = known and Categories(data.ids, tuple(known.names[column] for column in outputs.columns))
        notes += outputs.notes
        config = dataclasses.replace(config, num_classes=len(data.ids))
    if num_classes is not None and config.num_classes != num_classes:
        raise UserError(
            f"{path}: expected {num_classes} classes as in the data, found a checkpoint of {config.num_classes}; "
            f"use one trained on the same categories"
        )

    model = DeformableDetr(config).eval()
    own = model.state_dict()
    model.load_state_dict({name: state[name].float() for name in own if name in state}, strict=False)
    broken = [name for name, value in own.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{path}: expected finite weights, found NaN or infinity in {len(broken)} tensors, the first is"
            f" {broken[0]}: take an earlier checkpoint"
        )
    unused += [name for name in state if name not in own]
    leftover = tuple(name for name in unused if not _counts(name))
    return model, LoadReport(str(path), layout.name, config, leftover, tuple(notes), known)


def save_detector(path: str | Path, model: DeformableDetr, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights and configuration to one safetensors file, which `load_detector` reads; `metadata` goes along."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    config = json.dumps(dataclasses.asdict(model.config))
    save_tensors(path, state, {**(metadata or {}), "format": FORMAT, "config": config})


def export_state(model: DeformableDetr, layout: Layout) -> State:
    """The model's weights under the names of another project (`layouts.OFFICIAL`, `TRANSFORMERS`, `MMDET3`, `MMDET2`).

    Tensors are copies. MMDetection's files have no bias before the neck's group norms: where training has moved it
    from zero, it is exported, and needs `bias=True` in that project's neck.
    """
    exported = to_layout(model.state_dict(), model.config, layout)
    return {name: tensor.detach().cpu().clone() for name, tensor in exported.items()}


def load_backbone(model: DeformableDetr, path: str | Path) -> list[str]:
    """Fill the backbone with ImageNet weights from a file in torchvision's layout, or timm's for a backbone of timm's;
    returns the names left unused."""
    body = model.backbone.body.state_dict()
    given = _backbone_weights(Path(path), model.config)
    wrong = [n for n in body if not _counts(n) and (n not in given or given[n].shape != body[n].shape)]
    if wrong:
        whose = "timm's" if model.config.backbone.startswith(PREFIX) else "torchvision's"
        raise UserError(
            f"{path}: expected {whose} weights of {model.config.backbone}, found {len(wrong)} of {len(body)} "
            f"tensors missing or of another shape ({_some(wrong)}); name the file of this backbone"
        )
    model.backbone.body.load_state_dict({name: given[name] for name in body if name in given}, strict=False)
    return [name for name in given if name not in body and not _counts(name)]


def _backbone_weights(path: Path, config: DetectorConfig) -> State:
    checkpoint = read_checkpoint(path)
    if not config.backbone.startswith(PREFIX):
        return {name.removeprefix("features."): tensor for name, tensor in checkpoint.state.items()}
    try:  # timm itself knows how the file's names become those of a feature extractor
        return build_timm(config.backbone.removeprefix(PREFIX), pretrained=False, weights=path).body.state_dict()
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"{path}: expected timm's weights of {config.backbone}, found others"
            f" ({str(error).splitlines()[-1].strip()[:100]}); name the file of this backbone"
        ) from None


def _layout_of(checkpoint: Checkpoint) -> tuple[Layout, str]:
    """The first layout whose markers are there, and the prefix (such as `student.` or `module.`) before them."""
    for layout in LAYOUTS:
        first, second = layout.markers
        found = [name.removesuffix(first) for name in checkpoint.state if name.endswith(first)]
        prefixes = [p for p in found if p + second in checkpoint.state and (not p or p.endswith("."))]
        if prefixes:
            return layout, min(prefixes, key=lambda p: (p != "", "student" not in p, len(p)))
    names = _some(list(checkpoint.state))
    raise UserError(
        f"{checkpoint.path}: expected a Deformable DETR (official, MMDetection, transformers or this project's), found "
        f"another architecture with tensors such as {names}; use a checkpoint of Deformable DETR"
    )


def _match(source: str, known: Categories | None, outputs: int, data: Categories) -> Outputs:
    try:
        return match_outputs(known, outputs, data)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _categories(checkpoint: Checkpoint, num_classes: int) -> Categories | None:
    try:
        known = categories.from_metadata(checkpoint.metadata)
        if known is None and checkpoint.config is not None and "model_type" in checkpoint.config:
            known = categories.from_transformers(checkpoint.config)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{checkpoint.path}: expected ids and names of its classes, found others ({type(error).__name__}: {error})"
        ) from None
    return known if known is not None and len(known.ids) == num_classes else None


def _own_config(state: State, checkpoint: Checkpoint) -> DetectorConfig:
    """The configuration in the file, where it is that of the tensors beside it."""
    if checkpoint.config is None:
        raise UserError(f"{checkpoint.path}: expected the detector's configuration in the file, found weights alone")
    try:
        config = DetectorConfig.from_dict(checkpoint.config)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None
    sizes = _sizes(state, checkpoint)
    if config.backbone == "tiny":
        sizes["tiny_blocks"] = _count(state, "backbone.body.layer1.")
    for name, shown in sizes.items():
        if getattr(config, name) != shown:
            raise UserError(
                f"{checkpoint.path}: expected tensors as the file's configuration says, {name}={getattr(config, name)};"
                f" found {name}={shown}: take another copy"
            )
    return config


def _sizes(state: State, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the shapes of a detector's weights say of its configuration."""
    two_stage = "proposer.memory_projection.weight" in state
    try:
        levels, width = state["level_embedding"].shape
        len(state["encoder.layers.0.attention.sampling_offsets.weight"])  # which a detector's points follow from
        sizes = {
            "levels": levels,
            "width": width,
            "num_classes": len(state["decoder.class_heads.0.bias"]),
            "encoder_layers": _count(state, "encoder.layers."),
            "decoder_layers": _count(state, "decoder.layers."),
            "feedforward": len(state["encoder.layers.0.feedforward.linear1.bias"]),
            "two_stage": two_stage,
        }
        return sizes | ({} if two_stage else {"queries": len(state["query_embedding.weight"])})
    except KeyError as error:
        raise UserError(f"{checkpoint.path}: expected a Deformable DETR, found none of its {error}") from None
    except (TypeError, ValueError):
        raise UserError(f"{checkpoint.path}: expected a Deformable DETR, found tensors of other dimensions") from None


def _untie(state: State) -> State:
    """transformers stores a head that all layers share once: give each layer its copy, as the other layouts do."""
    untied = dict(state)
    for kind in ("class", "box"):
        first = {k: v for k, v in state.items() if k.startswith(f"decoder.{kind}_heads.0.")}
        if not any(k.startswith(f"decoder.{kind}_heads.1.") for k in state):
            for layer in range(1, _count(state, "decoder.layers.")):
                untied |= {k.replace("heads.0.", f"heads.{layer}."): v for k, v in first.items()}
    return untied


def _infer_config(state: State, checkpoint: Checkpoint) -> DetectorConfig:
    """The configuration that a foreign checkpoint's shapes imply; what they cannot tell is transformers' config.json's
    to say, or else what all published checkpoints have: 8 heads, 300 proposals, single-scale features from C5."""
    known, sizes = _transformers_config(checkpoint), _sizes(state, checkpoint)
    heads = known.get("heads", 8)
    offsets = len(state["encoder.layers.0.attention.sampling_offsets.weight"])
    inferred = {
        "backbone": _backbone_of(state, checkpoint),
        "heads": heads,
        "points": max(1, offsets // max(1, heads * sizes["levels"] * 2)),
        "refine": sizes["two_stage"] or not _heads_are_shared(state, sizes["decoder_layers"]),
    }
    try:
        return DetectorConfig.from_dict(inferred | known | sizes)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None


def _transformers_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a transformers config.json says that tensors do not. UserError for options this model does not have."""
    config = checkpoint.config
    if config is None or "model_type" not in config:
        return {}
    fixed = {"model_type": "deformable_detr", "dilation": False, "position_embedding_type": "sine"}
    alike = [("encoder_attention_heads", "decoder_attention_heads"), ("encoder_n_points", "decoder_n_points")]
    other = [f"{k}={config[k]}" for k, v in fixed.items() if config.get(k, v) != v]
    other += [f"{a}={config.get(a)} with {b}={config.get(b)}" for a, b in alike if config.get(a) != config.get(b)]
    if config.get("activation_function", "relu") != "relu":
        other.append(f"activation_function={config['activation_function']}")
    if other:
        raise UserError(f"{checkpoint.path}: expected a Deformable DETR as published, found {', '.join(other)}")
    names = {
        "heads": "encoder_attention_heads",
        "queries": "two_stage_num_proposals",
        "dropout": "dropout",
        "refine": "with_box_refine",
    }
    known = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    if not isinstance(known.get("heads", 8), int):
        raise UserError(f"{checkpoint.path}: expected a number of attention heads, found {known['heads']!r}")
    return known


def _heads_are_shared(state: State, layers: int) -> bool:
    """Whether all layers hold the same heads: so do checkpoints without refinement, which share them."""
    return all(
        torch.equal(tensor, state.get(re.sub(r"heads\.\d+\.", f"heads.{layer}.", name), tensor[:0]))
        for name, tensor in state.items()
        if re.match(r"decoder\.(class|box)_heads\.0\.", name)
        for layer in range(1, layers)
    )


def _backbone_of(state: State, checkpoint: Checkpoint) -> str:
    """The backbone that has exactly these names and shapes: one of ours, or of timm's that a config.json names."""
    given = {k.removeprefix("backbone.body."): v.shape for k, v in state.items() if k.startswith("backbone.body.")}
    given = {name: shape for name, shape in given.items() if not _counts(name)}
    described = (checkpoint.config or {}).get("backbone_config")
    named = described.get("backbone") if isinstance(described, Mapping) else None
    for backbone in (*BACKBONES, *([f"{PREFIX}{named}"] if isinstance(named, str) else [])):
        with torch.device("meta"):
            body = build_backbone(backbone).body.state_dict()
        if given == {name: tensor.shape for name, tensor in body.items() if not _counts(name)}:
            return backbone
    raise UserError(
        f"{checkpoint.path}: expected one of the backbones {', '.join(BACKBONES)}, found {len(given)} tensors such as "
        f"{_some(list(given))} that are none of them"
    )


def select_classes(state: State, outputs: int, columns: Sequence[int]) -> State:
    """Keep these of every class head's outputs. The proposals are ranked by their output 0, whatever class that is."""
    selected = dict(state)
    for name, tensor in state.items():
        if tensor.shape[:1] != (outputs,):
            continue
        if name.startswith("decoder.class_heads."):
            selected[name] = tensor[list(columns)]
        elif name.startswith("proposer.class_head."):
            selected[name] = tensor[[0, *columns[1:]]]
    return selected


def _check_shapes(config: DetectorConfig, state: State, layout: Layout, path: str) -> None:
    """UserError, in the file's names, if some weights of such a detector are missing or misshapen. Allocates nothing:
    a configuration may ask for any size."""
    try:
        with torch.device("meta"):
            own = DeformableDetr(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: expected a detector's configuration, found sizes beyond any ({reason})") from None
    missing = {name: tensor for name, tensor in own.items() if name not in state and not _counts(name)}
    wrong = {name: tensor for name, tensor in own.items() if name in state and state[name].shape != tensor.shape}
    for problem, tensors in (("missing", missing), ("of another shape", wrong)):
        if tensors:
            theirs = list(to_layout(tensors, config, layout))
            raise UserError(
                f"{path}: expected a Deformable DETR in the {layout.name} layout, found {len(theirs)} tensors "
                f"{problem}: {_some(theirs)}; use a checkpoint of this architecture"
            )


def _count(state: State, beginning: str) -> int:
    """How many different indices follow `beginning`: as many as the largest plus one, where none is missing."""
    found = (re.match(re.escape(beginning) + r"(\d+)\.", name) for name in state)
    return len({match.group(1) for match in found if match})


def _counts(name: str) -> bool:
    """Batch norm's step counters, which nothing here depends on."""
    return name.endswith("num_batches_tracked")


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(name if len(name) <= 200 else f"{name[:200]}..." for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
