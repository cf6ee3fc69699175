"""How other projects name the same weights, and the way there and back: pure mappings of state dicts.

A layout is one column of the tables below; `to_layout` and `from_layout` read the same rows in opposite directions.
What no table can say stands in functions: foreign layouts keep a pair of heads for every decoder layer even where all
layers share one, count the two-stage variant's proposal heads as one layer more, and have habits of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.detr import mobilenet_names
from common.detr.config import MOBILENETS, DetectorConfig

State = dict[str, Tensor]

# Beginnings of names; {} is an index, and what follows is kept. @ is the layout's root of the transformer's modules,
# $ that of the heads, = the same as in the column before. Of two rows that fit, the one without {} counts.
#
# this project             official           transformers                  MMDetection 3            MMDetection 2
MODULES = """
backbone.body.              backbone.0.body.   @backbone.conv_encoder.model. backbone.                =
neck.levels.{}.conv.        input_proj.{}.0.   @input_proj.{}.0.             neck.convs.{}.conv.      =
neck.levels.{}.norm.        input_proj.{}.1.   @input_proj.{}.1.             neck.convs.{}.gn.        =
neck.levels.3.conv.         input_proj.3.0.    @input_proj.3.0.              neck.extra_convs.0.conv. =
neck.levels.3.norm.         input_proj.3.1.    @input_proj.3.1.              neck.extra_convs.0.gn.   =
neck.levels.4.conv.         input_proj.4.0.    @input_proj.4.0.              neck.extra_convs.1.conv. =
neck.levels.4.norm.         input_proj.4.1.    @input_proj.4.1.              neck.extra_convs.1.gn.   =
level_embedding             @level_embed       @level_embed                  @level_embed             @level_embeds
query_embedding.            query_embed.       @query_position_embeddings.   query_embedding.         $query_embedding.
reference_points.           @reference_points. @reference_points.            reference_points_fc.     @reference_points.
decoder.class_heads.{}.     class_embed.{}.    class_embed.{}.               $cls_branches.{}.        =
decoder.box_heads.{}.0.     bbox_embed.{}.layers.0. =                        $reg_branches.{}.0.      =
decoder.box_heads.{}.2.     bbox_embed.{}.layers.1. =                        $reg_branches.{}.2.      =
decoder.box_heads.{}.4.     bbox_embed.{}.layers.2. =                        $reg_branches.{}.4.      =
proposer.memory_projection. @enc_output.       @enc_output.                  memory_trans_fc.         @enc_output.
proposer.memory_norm.       @enc_output_norm.  @enc_output_norm.             memory_trans_norm.       @enc_output_norm.
proposer.query_projection.  @pos_trans.        @pos_trans.                   pos_trans_fc.            @pos_trans.
proposer.query_norm.        @pos_trans_norm.   @pos_trans_norm.              pos_trans_norm.          @pos_trans_norm.
"""
ENCODER_LAYER = """
attention.                  self_attn.         self_attn.                    self_attn.               attentions.0.
attention_norm.             norm1.             self_attn_layer_norm.         norms.0.                 =
feedforward.linear1.        linear1.           fc1.                          ffn.layers.0.0.          ffns.0.layers.0.0.
feedforward.linear2.        linear2.           fc2.                          ffn.layers.1.            ffns.0.layers.1.
feedforward_norm.           norm2.             final_layer_norm.             norms.1.                 =
"""
DECODER_LAYER = """
self_attention.             self_attn.         self_attn.                    self_attn.attn.          attentions.0.attn.
self_attention_norm.        norm2.             self_attn_layer_norm.         norms.0.                 =
cross_attention.            cross_attn.        encoder_attn.                 cross_attn.              attentions.1.
cross_attention_norm.       norm1.             encoder_attn_layer_norm.      norms.1.                 =
feedforward.linear1.        linear1.           fc1.                          ffn.layers.0.0.          ffns.0.layers.0.0.
feedforward.linear2.        linear2.           fc2.                          ffn.layers.1.            ffns.0.layers.1.
feedforward_norm.           norm3.             final_layer_norm.             norms.2.                 =
"""


@dataclass(frozen=True)
class Layout:
    """One way to name a detector's weights; this project's own has no rules.

    rules: (this project's beginning, the layout's beginning), {} for an index, in order of precedence. respell: turns
    what else such files may hold into the table's names. complete: adds what such files hold besides.
    """

    name: str
    rules: tuple[tuple[str, str], ...]
    respell: Callable[[State], State]
    complete: Callable[[State, DetectorConfig], State]

    @property
    def markers(self) -> tuple[str, str]:
        """Two names that every file of this layout has."""
        if not self.rules:
            return MARKERS
        first, second = rename(MARKERS[0], self.rules), rename(MARKERS[1], self.rules)
        assert first is not None
        assert second is not None
        return first, second


MARKERS = ("level_embedding", "encoder.layers.0.attention.sampling_offsets.weight")


def to_layout(state: Mapping[str, Tensor], config: DetectorConfig, layout: Layout) -> State:
    """This project's state dict -> the layout's. Tensors are not copied, and some appear under several names."""
    if not layout.rules:
        return dict(state)
    renamed = {}
    for name, tensor in spread_heads(state, config).items():
        theirs = rename(name, layout.rules)
        if theirs is None:
            raise KeyError(f"{name} has no place in the {layout.name} layout")
        renamed[theirs] = tensor
    return layout.complete(renamed, config)


def from_layout(state: Mapping[str, Tensor], layout: Layout) -> tuple[State, list[str]]:
    """The layout's state dict -> this project's, a foreign one's heads still spread; and the names that fit nowhere."""
    if not layout.rules:
        return dict(state), []
    converted, unknown = {}, []
    backwards = tuple((theirs, ours) for ours, theirs in layout.rules)
    for name, tensor in layout.respell(dict(state)).items():
        if ours := rename(name, backwards):
            converted[ours] = tensor
        else:
            unknown.append(name)
    return converted, unknown


def spread_heads(state: Mapping[str, Tensor], config: DetectorConfig) -> State:
    """Give every decoder layer its own name of a shared head, and call the proposal heads those of layer L."""
    spread = {}
    for name, tensor in state.items():
        if shared := re.fullmatch(r"decoder\.(class|box)_heads\.0\.(.+)", name):
            kind, rest = shared.groups()
            for layer in range(1 if config.refine else config.decoder_layers):
                spread[f"decoder.{kind}_heads.{layer}.{rest}"] = tensor
        elif proposal := re.fullmatch(r"proposer\.(class|box)_head\.(.+)", name):
            kind, rest = proposal.groups()
            spread[f"decoder.{kind}_heads.{config.decoder_layers}.{rest}"] = tensor
        else:
            spread[name] = tensor
    return spread


def gather_heads(state: Mapping[str, Tensor], config: DetectorConfig) -> State:
    """The inverse of `spread_heads`."""
    gathered = {}
    for name, tensor in state.items():
        if head := re.fullmatch(r"decoder\.(class|box)_heads\.(\d+)\.(.+)", name):
            kind, layer, rest = head.groups()
            if config.two_stage and int(layer) == config.decoder_layers:
                gathered[f"proposer.{kind}_head.{rest}"] = tensor
            elif config.refine or layer == "0":
                gathered[name] = tensor
        else:
            gathered[name] = tensor
    return gathered


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """`name` with its beginning replaced as the first fitting rule says; None if none fits."""
    for source, target in rules:
        pattern = re.escape(source).replace(r"\{\}", r"(\d+)")
        match = re.match(pattern if source.endswith(".") else pattern + "$", name)
        if match:
            return target.format(*match.groups()) + name[match.end() :]
    return None


def _rules(column: int, root: str, heads: str) -> tuple[tuple[str, str], ...]:
    """The rules of one column (1 is the first foreign one), rows without an index before those with one."""
    rules = []
    for table, prefix in ((MODULES, ""), (ENCODER_LAYER, "encoder.layers.{}."), (DECODER_LAYER, "decoder.layers.{}.")):
        for row in table.strip().splitlines():
            cells = row.split()
            theirs = next(cell for cell in reversed(cells[: column + 1]) if cell != "=")
            theirs = theirs.replace("@", root).replace("$", heads)
            rules.append((prefix + cells[0], root + prefix + theirs if prefix else theirs))
    return tuple(sorted(rules, key=lambda rule: rule[0].count("{}")))


def _respell_official(state: State) -> State:
    """The decoder holds the heads a second time where it refines boxes or proposes them."""
    return {re.sub(r"^transformer\.decoder\.(bbox|class)_embed\.", r"\1_embed.", k): v for k, v in state.items()}


def _complete_official(state: State, config: DetectorConfig) -> State:
    return _without_counters(state | _second_heads(state, config, "transformer.decoder."))


def _without_counters(state: State) -> State:
    """Batch norm is frozen there and counts nothing."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}


def _second_heads(state: State, config: DetectorConfig, decoder: str) -> State:
    kinds = (("bbox_embed.", config.refine), ("class_embed.", config.two_stage))
    return {decoder + k: v for kind, held in kinds if held for k, v in state.items() if k.startswith(kind)}


# transformers 5 renames on reading and writing; in memory, and with its own ResNet, the names are these.
_TRANSFORMERS_SPELLINGS = [
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"^(model\.(?:en|de)coder\.layers\.\d+)\.mlp\.fc", r"\1.fc"),
    (r"^model\.decoder\.(bbox|class)_embed\.", r"\1_embed."),
    (r"\.model\.embedder\.embedder\.convolution\.", ".model.conv1."),
    (r"\.model\.embedder\.embedder\.normalization\.", ".model.bn1."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    *[(rf"\.layer\.{n}\.convolution\.", f".conv{n + 1}.") for n in range(3)],
    *[(rf"\.layer\.{n}\.normalization\.", f".bn{n + 1}.") for n in range(3)],
    *[(rf"\.encoder\.stages\.{n}\.layers\.", f".layer{n + 1}.") for n in range(4)],
]


def _respell_transformers(state: State) -> State:
    respelled = {}
    for name, tensor in state.items():
        for pattern, replacement in _TRANSFORMERS_SPELLINGS:
            name = re.sub(pattern, replacement, name)
        respelled[name] = tensor
    for name in [name for name in respelled if re.search(r"\.self_attn\.q_proj\.(weight|bias)$", name)]:
        parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(part in respelled for part in parts):
            joined = torch.cat([respelled.pop(part) for part in parts])
            respelled[name.replace("q_proj.", "in_proj_")] = joined
    return respelled


def _complete_transformers(state: State, config: DetectorConfig) -> State:
    completed = {}
    for name, tensor in state.items():
        if ".self_attn.in_proj_" in name:
            for part, projection in zip("qkv", tensor.chunk(3), strict=True):
                completed[name.replace("in_proj_", f"{part}_proj.")] = projection
        else:
            completed[name] = tensor
    return _without_counters(completed | _second_heads(completed, config, "model.decoder."))


def _respell_mmdet(state: State) -> State:
    """Convolutions before a norm have no bias there. MobileNetV2 ends in a convolution for its classifier."""
    if "backbone.layer1.0.depthwise_conv.conv.weight" in state:
        state = mobilenet_names.from_mmdet(state, "backbone.")
        if not any(name.startswith("neck.convs.") and tensor.shape[1:2] == (1280,) for name, tensor in state.items()):
            state = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.18.")}
    weights = [name for name in state if re.match(r"neck\..*\.conv\.weight$", name)]
    return {name.replace("weight", "bias"): state[name].new_zeros(len(state[name])) for name in weights} | state


def _complete_mmdet(state: State, config: DetectorConfig) -> State:
    """Its batch norm counts; its neck has a bias only where `bias=True`, so leave out what is zero.

    Its MobileNetV2 always holds the last convolution; where no level of the detector looks at it, zeros stand for it.
    """
    if config.backbone in MOBILENETS:
        state = mobilenet_names.to_mmdet(state, "backbone.")
    if config.backbone == "mobilenet_v2":
        norm = {f"backbone.conv2.bn.{name}": torch.zeros(1280) for name in ("weight", "bias", "running_mean")}
        state |= norm | {"backbone.conv2.bn.running_var": torch.ones(1280)}
        state["backbone.conv2.conv.weight"] = torch.zeros(1280, 320, 1, 1)
    kept = {k: v for k, v in state.items() if not (re.match(r"neck\..*\.conv\.bias$", k) and not v.any())}
    means = [name for name in state if name.endswith(".running_mean")]
    counts = {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in means}
    return counts | kept


OFFICIAL = Layout("official Deformable DETR", _rules(1, "transformer.", ""), _respell_official, _complete_official)
TRANSFORMERS = Layout("transformers", _rules(2, "model.", ""), _respell_transformers, _complete_transformers)
MMDET3 = Layout("MMDetection 3", _rules(3, "", "bbox_head."), _respell_mmdet, _complete_mmdet)
MMDET2 = Layout("MMDetection 2", _rules(4, "bbox_head.transformer.", "bbox_head."), _respell_mmdet, _complete_mmdet)
OWN = Layout("DETRCache", (), lambda state: state, lambda state, config: state)
# In this order: an official or transformers checkpoint also looks like an MMDetection 3 one behind a prefix.
LAYOUTS = (OWN, OFFICIAL, TRANSFORMERS, MMDET2, MMDET3)
