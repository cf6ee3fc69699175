"""What each family of DETRs in `transformers` computes beyond its last layer, brought to one form.

A model's own `forward` gives the last decoder layer. Phase one wants every layer, and the memory that the decoder
attends to, in the width of the queries. One function per family runs the model without its heads and applies the heads
layer by layer; its last layer equals the model's own answer (the tests compare them). What a checkpoint lacks (many
are published without the heads of the first layers) is left out: such a teacher has fewer layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.geometry import level_shapes, token_count
from common.images import IMAGENET_MEAN, IMAGENET_STD
from common.records import LevelShapes

Model = Any  # a transformers model; the package is an optional extra, and untyped
BACKBONE_STRIDES = (4, 8, 16, 32)  # where a pyramid can begin


@dataclass(frozen=True)
class Decoded:
    """One forward pass. Shape letters as in `common.records`.

    memory: (B, T, C), what the decoder attends to. level_shapes: of the batch. queries: (B, L, Q, C). logits:
    (B, L, Q, outputs), a last column for no object included where the family has one. boxes_cxcywh: (B, L, Q, 4).
    """

    memory: Tensor
    level_shapes: LevelShapes
    queries: Tensor
    logits: Tensor
    boxes_cxcywh: Tensor


@dataclass(frozen=True)
class Family:
    """How to run the models of one `model_type`.

    decode: (model, pixels (B, 3, H, W), mask (B, H, W) 1 inside the images) -> Decoded. scores: softmax families have a
    last output for no object. own_size: whether padded batches of any size are welcome; the others resize every image
    to default_size, (height, width) in pixels, unless their preprocessor_config.json names another. mean, std: of
    pixels in 0..1, unless that file names others. static_queries: (Q, 2C) position and content part, where all
    images share them.
    """

    decode: Callable[[Model, Tensor, Tensor], Decoded]
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    own_size: bool = False
    default_size: tuple[int, int] | None = (640, 640)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    static_queries: Callable[[Model], Tensor | None] = lambda model: None


def decode_detr(model: Model, pixels: Tensor, mask: Tensor) -> Decoded:
    """DETR (Carion et al., arXiv 2005.12872): one level, heads shared by all layers."""
    output = model.model(pixels, pixel_mask=mask, output_hidden_states=True)
    queries = _normed_layers(model, output)
    return Decoded(
        output.encoder_last_hidden_state,
        pyramid_shapes(pixels, output.encoder_last_hidden_state, levels=1),
        queries,
        model.class_labels_classifier(queries),
        model.bbox_predictor(queries).sigmoid(),
    )


def decode_conditional(model: Model, pixels: Tensor, mask: Tensor) -> Decoded:
    """Conditional DETR (Meng et al., arXiv 2108.06152): boxes are offsets from one reference point per query."""
    output = model.model(pixels, pixel_mask=mask, output_hidden_states=True)
    queries = _normed_layers(model, output)
    boxes = model.bbox_predictor(queries)
    reference = inverse_sigmoid(output.reference_points).transpose(0, 1).unsqueeze(1)  # (B, 1, Q, 2)
    boxes = torch.cat((boxes[..., :2] + reference, boxes[..., 2:]), dim=-1).sigmoid()
    return Decoded(
        output.encoder_last_hidden_state,
        pyramid_shapes(pixels, output.encoder_last_hidden_state, levels=1),
        queries,
        model.class_labels_classifier(queries),
        boxes,
    )


def decode_dab(model: Model, pixels: Tensor, mask: Tensor) -> Decoded:
    """DAB-DETR (Liu et al., arXiv 2201.12329): every layer refines the anchor boxes of the one before."""
    output = model.model(pixels, pixel_mask=mask, output_hidden_states=True, return_dict=True)
    queries = output.intermediate_hidden_states.transpose(0, 1)
    references = output.reference_points.transpose(0, 1)
    return Decoded(
        output.encoder_last_hidden_state,
        pyramid_shapes(pixels, output.encoder_last_hidden_state, levels=1),
        queries,
        model.class_embed(queries),
        (model.bbox_predictor(queries) + inverse_sigmoid(references)).sigmoid(),
    )


def decode_deformable(model: Model, pixels: Tensor, mask: Tensor) -> Decoded:
    """Deformable DETR (Zhu et al., arXiv 2010.04159): a head per layer, boxes relative to the layer's reference."""
    output = model.model(pixels, pixel_mask=mask)
    layers = output.intermediate_hidden_states.unbind(1)
    references = [output.init_reference_points, *output.intermediate_reference_points.unbind(1)[:-1]]
    boxes = []
    for query, reference, head in zip(layers, references, model.bbox_embed, strict=False):
        change, start = head(query), inverse_sigmoid(reference)
        boxes.append(torch.cat((change[..., : start.shape[-1]] + start, change[..., start.shape[-1] :]), dim=-1))
    return Decoded(
        output.encoder_last_hidden_state,
        pyramid_shapes(pixels, output.encoder_last_hidden_state, levels=model.config.num_feature_levels),
        torch.stack(layers, dim=1),
        torch.stack([head(query) for query, head in zip(layers, model.class_embed, strict=False)], dim=1),
        torch.stack(boxes, dim=1).sigmoid(),
    )


def decode_rt_detr(model: Model, pixels: Tensor, mask: Tensor) -> Decoded:
    """RT-DETR (Zhao et al., arXiv 2304.08069) and its second version: every layer's predictions come with the model."""
    output = model.model(pixels, pixel_mask=mask)
    memory, shapes = _decoder_inputs(model, output.encoder_last_hidden_state)
    return Decoded(
        memory,
        shapes,
        output.intermediate_hidden_states,
        output.intermediate_logits,
        output.intermediate_reference_points,
    )


def decode_fine(model: Model, pixels: Tensor, mask: Tensor) -> Decoded:
    """D-FINE (Peng et al., arXiv 2410.13842) and DEIMv2 (Huang et al., arXiv 2509.20787).

    Outside of training the model applies its class head to the layer it answers from, `eval_idx`. `prepare_fine` makes
    the decoder alone apply them all; its first entry is then the first layer's answer before refinement.
    """
    output = model.model(pixels, pixel_mask=mask)
    memory, shapes = _decoder_inputs(model, output.encoder_last_hidden_state)
    layers, last = model.config.decoder_layers, model.model.decoder.eval_idx
    queries = output.intermediate_hidden_states  # (all layers, B, Q, C) or (B, all layers, Q, C)
    if queries.shape[0] == layers and queries.shape[1] == pixels.shape[0]:
        queries = queries.transpose(0, 1)
    chosen = slice(0, last + 1) if model.model.decoder.training else slice(last, last + 1)
    given = output.intermediate_logits.shape[1]
    predicted = slice(1, last + 2) if model.model.decoder.training else slice(given - 1, given)
    return Decoded(
        memory,
        shapes,
        queries[:, chosen],
        output.intermediate_logits[:, predicted],
        output.intermediate_reference_points[:, predicted],
    )


def decode_rf_detr(model: Model, pixels: Tensor, mask: Tensor) -> Decoded:
    """RF-DETR (Robinson et al., arXiv 2511.09554): one level, heads shared, boxes relative to one reference."""
    output = model.model(pixels, pixel_mask=mask)
    features = output.backbone_features  # (B, C, h, w)
    queries = output.intermediate_hidden_states.transpose(0, 1)
    reference = output.intermediate_reference_points[-1].unsqueeze(1)
    logits, boxes_cxcywh = model.predict_class_and_boxes(queries, reference)
    return Decoded(*_flatten([features]), queries, logits, boxes_cxcywh)


def detr_queries(model: Model) -> Tensor:
    """DETR's queries have a position part only; their content starts at zero."""
    position = model.model.query_position_embeddings.weight
    return torch.cat((position, torch.zeros_like(position)), dim=-1)


def dab_queries(model: Model) -> Tensor | None:
    """DAB-DETR's queries are anchor boxes; their position part is what its first layer makes of them."""
    inner = model.model
    if inner.num_patterns:  # content that the anchors share, and as many times more queries
        return None
    encode = import_module(type(model).__module__).encode_sinusoidal_position_embedding
    anchors = inner.query_refpoint_embeddings.weight.sigmoid()
    position = inner.decoder.ref_point_head(encode(anchors, num_pos_feats=model.config.hidden_size // 2))
    return torch.cat((position, torch.zeros_like(position)), dim=-1)


def deformable_queries(model: Model) -> Tensor | None:
    return None if model.config.two_stage else model.model.query_position_embeddings.weight


FAMILIES: dict[str, Family] = {
    "detr": Family(decode_detr, "softmax", True, None, IMAGENET_MEAN, IMAGENET_STD, detr_queries),
    "conditional_detr": Family(decode_conditional, "sigmoid", True, None, IMAGENET_MEAN, IMAGENET_STD, detr_queries),
    "dab-detr": Family(decode_dab, "sigmoid", True, None, IMAGENET_MEAN, IMAGENET_STD, dab_queries),
    "deformable_detr": Family(
        decode_deformable, "sigmoid", True, None, IMAGENET_MEAN, IMAGENET_STD, deformable_queries
    ),
    "rt_detr": Family(decode_rt_detr),
    "rt_detr_v2": Family(decode_rt_detr),
    "d_fine": Family(decode_fine),
    "deimv2": Family(decode_fine),
    "rf_detr": Family(decode_rf_detr, default_size=(560, 560), mean=IMAGENET_MEAN, std=IMAGENET_STD),
}


def prepare_fine(model: Model, missing: Iterable[str]) -> None:
    """Let a D-FINE or DEIMv2 decoder predict in every layer, if the checkpoint has the heads of all.

    Only the decoder's own flag is set, which decides nothing but this; its layers stay in evaluation mode.
    """
    heads = ("class_embed.", "bbox_embed.", "lqe_layers.")
    if not any(head in name for name in missing for head in heads):
        model.model.decoder.training = True


def correct_deimv2(model: Model, missing: Iterable[str]) -> bool:
    """Make a DEIMv2 model compute what its authors' code computes; True if it was theirs.

    transformers 5.23.0 differs from it in three places: all heads have SiLU for activation (`mlp_act`), not ReLU; the
    encoder's output goes to the proposals as it is, without a linear layer and a norm; and the position embedding of
    the queries is computed once, from the first boxes. A checkpoint without that linear layer comes from the authors'
    training; one with it was trained in transformers, whose computation is then the right one. Only this instance
    is changed.
    """
    if not any(name.startswith("model.enc_output.") for name in missing):
        return False
    for module in model.modules():
        if type(module).__name__ == "Deimv2MLP":
            module.act = nn.SiLU()
    model.model.enc_output = nn.Identity()
    decoder = model.model.decoder
    decoder.query_pos_head = _OncePerPass(decoder.query_pos_head)
    decoder.register_forward_pre_hook(lambda *_: decoder.query_pos_head.forget())
    return True


class _OncePerPass(nn.Module):
    """A module that answers every call of a forward pass with its first answer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._answer: Tensor | None = None

    def forget(self) -> None:
        self._answer = None

    def forward(self, *inputs: Tensor) -> Tensor:
        if self._answer is None:
            self._answer = self.module(*inputs)
        return self._answer


def pyramid_shapes(pixels: Tensor, memory: Tensor, levels: int) -> LevelShapes:
    """Grids of flattened tokens (B, T, C): the only pyramid with strides s, 2s, 4s, ... of T tokens."""
    height, width = pixels.shape[-2:]
    for start in BACKBONE_STRIDES:
        shapes = level_shapes(height, width, [start * 2**level for level in range(levels)])
        if token_count(shapes) == memory.shape[1]:
            return shapes
    raise UserError(
        f"expected a teacher with {levels} feature levels of strides s, 2s, 4s, ..., found {memory.shape[1]} tokens for"
        f" {width} x {height} pixels, which fits no s in {BACKBONE_STRIDES}: its backbone is not supported"
    )


def inverse_sigmoid(values: Tensor, eps: float = 1e-5) -> Tensor:
    """Logits of values in 0..1, finite at both ends: transformers clamps quotient and remainder at eps."""
    values = values.clamp(0, 1)
    return torch.log(values.clamp(min=eps) / (1 - values).clamp(min=eps))


def _normed_layers(model: Model, output: Any) -> Tensor:
    """The queries (B, L, Q, C) of DETR and Conditional DETR, each through the decoder's last norm.

    With `auxiliary_loss`, transformers feeds the norm's output to the next layer and norms the last layer's twice; what
    the model was trained with has to stay.
    """
    decoder = model.model.decoder
    if model.config.auxiliary_loss:
        earlier = list(output.intermediate_hidden_states[:-1])
    else:  # the first is the decoder's input, the last is last_hidden_state
        earlier = [decoder.layernorm(state) for state in output.decoder_hidden_states[1:-1]]
    return torch.stack([*earlier, output.last_hidden_state], dim=1)


def _decoder_inputs(model: Model, maps: list[Tensor]) -> tuple[Tensor, LevelShapes]:
    """The encoder's maps as RT-DETR's decoder sees them: projected, with coarser levels made from the last one."""
    projections = model.model.decoder_input_proj
    extra = model.config.num_feature_levels - len(maps)
    return _flatten([project(level) for project, level in zip(projections, [*maps, *maps[-1:] * extra], strict=True)])


def _flatten(maps: list[Tensor]) -> tuple[Tensor, LevelShapes]:
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1), [
        (level.shape[-2], level.shape[-1]) for level in maps
    ]
