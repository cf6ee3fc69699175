"""The detector's parts: groups of queries, backbones, initial weights, learning rates, configurations."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from common.detr.config import DetectorConfig
from common.detr.detector import Decoded, DeformableDetr, QueryGroup
from common.detr.recipe import parameter_groups
from common.detr.weights import load_backbone
from common.errors import UserError
from tests import detr_oracle

SMALL = DetectorConfig(
    "tiny", 5, width=32, encoder_layers=2, decoder_layers=3, heads=4, queries=7, levels=4, feedforward=48, dropout=0.0
)
VARIANTS = {
    "plain": dataclasses.replace(SMALL, refine=False),
    "refine": SMALL,
    "two-stage": dataclasses.replace(SMALL, two_stage=True),
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> DeformableDetr:
    """A small detector with random weights everywhere, so that nothing is hidden by a zero."""
    detector = DeformableDetr(VARIANTS[request.param]).eval()
    detr_oracle.randomise(detector)
    return detector


def test_groups_equal_separate_passes(model):
    """Own and foreign queries in one pass against one pass each: queries, logits, boxes of all layers within 1e-6.

    The foreign group has as many queries again and larger ones, so that attention between groups would show.
    """
    encoded = model.encode(*detr_oracle.padded_batch())
    generator = torch.Generator().manual_seed(3)
    foreign = QueryGroup(torch.randn(9, 64, generator=generator) * 3, torch.rand(2, 9, 2, generator=generator))
    boxes = QueryGroup(torch.randn(2, 4, 64, generator=generator), torch.rand(2, 4, 4, generator=generator))
    with torch.no_grad():
        together = model.decode_groups(encoded, [None, foreign, boxes])
        apart = [model.decode_groups(encoded, [group])[0] for group in (None, foreign, boxes)]
        own = model.decode(encoded)
    for a, b in zip([*together, together[0]], [*apart, own], strict=True):
        _assert_close(a, b)
    assert together[1].queries.shape == (2, 3, 9, 32)
    assert (together[0].proposals is not None) == model.config.two_stage
    assert together[1].proposals is None


def test_a_models_own_embeddings_as_a_foreign_group():
    """`decode(encoded, model.query_embeddings)` is `decode(encoded)`, within 1e-6."""
    for config in (VARIANTS["plain"], VARIANTS["refine"]):
        model = DeformableDetr(config).eval()
        detr_oracle.randomise(model)
        encoded = model.encode(*detr_oracle.padded_batch())
        _assert_close(model.decode(encoded, model.query_embeddings), model.decode(encoded))


def test_forward_is_encode_then_decode(model):
    """Shapes of everything that `forward` returns, and equality with the two halves (exact)."""
    images, mask = detr_oracle.padded_batch()
    with torch.no_grad():
        output, encoded = model(images, mask), model.encode(images, mask)
        decoded = model.decode(encoded)
    tokens = 16 * 20 + 8 * 10 + 4 * 5 + 2 * 3
    assert output.level_shapes == [(16, 20), (8, 10), (4, 5), (2, 3)]
    assert output.memory.shape == output.neck.shape == (2, tokens, 32)
    assert output.token_mask.shape == (2, tokens)
    assert output.queries.shape == (2, 3, 7, 32)
    assert output.logits.shape == (2, 3, 7, 5)
    assert output.boxes_cxcywh.shape == (2, 3, 7, 4)
    assert torch.equal(output.memory, encoded.memory)
    assert torch.equal(output.logits, decoded.logits)
    assert torch.equal(output.boxes_cxcywh, decoded.boxes_cxcywh)
    assert (model.query_embeddings is None) == model.config.two_stage
    assert model.strides == (8, 16, 32, 64)


def test_mixed_precision_keeps_places_exact(model):
    """Under bfloat16 autocast logits and boxes are still float32, and boxes have far more than bfloat16's 256 places.

    Compared with float32: boxes within 0.05 (a wrong path would differ by the image), yet fewer than 5% of the
    coordinates are representable in bfloat16.
    """
    batch = detr_oracle.padded_batch()
    with torch.no_grad():
        exact = model(*batch)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(*batch)
    assert mixed.logits.dtype == mixed.boxes_cxcywh.dtype == torch.float32
    assert (mixed.boxes_cxcywh.bfloat16().float() == mixed.boxes_cxcywh).float().mean() < 0.05
    if not model.config.two_stage:  # there, rounding also changes which proposals are the best
        assert (mixed.boxes_cxcywh - exact.boxes_cxcywh).abs().max() < 0.05


@pytest.mark.parametrize("mixed", [False, True])
def test_an_encoder_computed_twice(mixed):
    """Losses and gradients with a checkpointed encoder equal those without, dropout included, bit for bit, also under
    autocast; what is kept for the backward pass is less than half as many bytes."""
    model = DeformableDetr(dataclasses.replace(SMALL, dropout=0.1, encoder_layers=6, decoder_layers=1))
    images, mask = detr_oracle.padded_batch()
    found = []
    for checkpointed in (False, True):
        model.encoder.checkpointed = checkpointed
        kept = {}
        model.zero_grad()
        torch.manual_seed(0)

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            with torch.no_grad():
                encoded = model.encode(images, mask)
            places = torch.zeros_like(encoded.neck)
            inputs = (encoded.neck, places, encoded.token_mask, encoded.level_shapes, encoded.valid_ratios)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                memory = model.encoder(*inputs)
        loss = memory.float().square().sum()
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((loss.detach(), gradients, sum(kept.values())))
    (loss, gradients, whole), (same_loss, same_gradients, less) = found
    assert torch.equal(loss, same_loss)
    assert len(gradients) == len(same_gradients)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same_gradients, strict=True))
    assert less < whole / 2


def test_padding_pixels_do_not_matter(model):
    """What stands in the padding of an image never reaches the tokens of a sample whose maps it does not touch.

    The backbone sees padded pixels, as in the official code; from the neck on they are masked. So replacing the
    neck's padded tokens changes neither memory (where valid) nor predictions: exact equality.
    """
    images, mask = detr_oracle.padded_batch()
    with torch.no_grad():
        encoded = model.encode(images, mask)
        noise = torch.where(encoded.token_mask[..., None], torch.randn_like(encoded.memory), encoded.memory)
        changed = model.decode(dataclasses.replace(encoded, memory=noise))
    _assert_close(changed, model.decode(encoded), tolerance=0.0)


def test_embeddings_of_another_width():
    encoded = DeformableDetr(SMALL).encode(*detr_oracle.padded_batch())
    with pytest.raises(ValueError, match=r"expected query embeddings of 2 x 32 channels; found 10"):
        DeformableDetr(SMALL).decode(encoded, torch.zeros(3, 10))


def test_two_stage_needs_enough_tokens_and_references():
    model = DeformableDetr(dataclasses.replace(SMALL, two_stage=True, queries=50)).eval()
    with pytest.raises(UserError, match="expected at least queries=50 tokens"):
        model(torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool))
    encoded = model.encode(*detr_oracle.padded_batch())
    with pytest.raises(ValueError, match="expected reference points"):
        model.decode(encoded, torch.zeros(3, 64))


def test_every_trainable_parameter_learns(model):
    """A loss over all outputs gives every parameter with requires_grad a gradient that is finite and not zero."""
    model.train()
    output = model(*detr_oracle.padded_batch())
    loss = output.logits.square().mean() + output.boxes_cxcywh.mean()
    if output.proposals is not None:
        loss = loss + output.proposals[0].square().mean() + output.proposals[1].mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_backbone_equals_torchvision(name, tmp_path):
    """C3..C5 of a backbone filled from a torchvision file against torchvision's own network in eval mode.

    Within 1e-5 of each map's largest value. The file holds random weights and random batch statistics. Mobilenet's
    stages end in blocks 6, 13 and 17.
    """
    network = getattr(torchvision.models, name)().eval()
    detr_oracle.randomise(network)
    torch.save(network.state_dict(), tmp_path / "imagenet.pth")
    model = DeformableDetr(DetectorConfig(name, 3, width=32, encoder_layers=1, decoder_layers=1, queries=4)).eval()
    unused = load_backbone(model, tmp_path / "imagenet.pth")
    assert all(name.startswith(("fc.", "classifier.", "features.18.", "18.")) for name in unused)
    nodes = ["features.6", "features.13", "features.17"] if name == "mobilenet_v2" else ["layer2", "layer3", "layer4"]
    images, _ = detr_oracle.padded_batch()
    with torch.no_grad():
        expected = create_feature_extractor(network, nodes)(images)
        found = model.backbone(images)
    assert [x.shape[1] for x in found] == list(model.backbone.channels)
    for node, features in zip(nodes, found, strict=True):
        scale = expected[node].abs().max()
        assert (features - expected[node]).abs().max() <= 1e-5 * scale


def test_backbone_file_of_another_network(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    model = DeformableDetr(DetectorConfig("resnet34", 3, width=32, encoder_layers=1, decoder_layers=1, queries=4))
    with pytest.raises(UserError, match=r"r18.pth: expected torchvision's weights of resnet34") as caught:
        load_backbone(model, tmp_path / "r18.pth")
    assert "\n" not in str(caught.value)


def test_what_is_frozen():
    """Pretrained: batch norm has no parameters, stem and first stage do not train, all else does. Otherwise all do."""
    for name, frozen in (("resnet18", ("conv1.", "layer1.")), ("mobilenet_v2", ("0.", "1.", "2.", "3."))):
        small = DetectorConfig(name, 3, width=32, encoder_layers=1, decoder_layers=1, queries=4)
        body = DeformableDetr(small).backbone.body
        for parameter_name, parameter in body.named_parameters():
            assert parameter.requires_grad != parameter_name.startswith(frozen), parameter_name
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in body.modules())
        scratch = DeformableDetr(dataclasses.replace(small, pretrained_backbone=False))
        assert all(parameter.requires_grad for parameter in scratch.parameters())
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in scratch.backbone.modules())


def test_initial_predictions():
    """As the paper's code starts: every class has probability about 0.01; boxes sit on their reference points.

    Facts checked: class biases are -log(99); the box heads' last layers are zero but for -2 at width and height of the
    first (all layers share it without refinement, two-stage has none); attention looks evenly into 8 directions.
    """
    for name, config in VARIANTS.items():
        model = DeformableDetr(config)
        for head in model.decoder.class_heads:
            assert torch.allclose(head.bias.sigmoid(), torch.tensor(0.01))
        for index, head in enumerate(model.decoder.box_heads):
            expected = [0.0, 0.0, -2.0, -2.0] if index == 0 and name != "two-stage" else [0.0] * 4
            assert head[-1].bias.tolist() == expected
            assert not head[-1].weight.any()
    model = DeformableDetr(dataclasses.replace(SMALL, heads=8, points=2, levels=1))
    offsets = model.encoder.layers[0].attention.sampling_offsets.bias.view(8, 2, 2)
    expected = torch.tensor([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]).float()
    assert torch.allclose(offsets[:, 0], expected, atol=1e-6)
    assert torch.allclose(offsets[:, 1], 2 * expected, atol=1e-6)


def test_parameter_groups():
    """Every trainable parameter once; offsets, reference points and a pretrained backbone at a tenth of the rate."""
    model = DeformableDetr(DetectorConfig("resnet18", 3, width=32, encoder_layers=1, decoder_layers=1, queries=4))
    groups = {group["name"]: group for group in parameter_groups(model, lr=2e-4)}
    names = {parameter: name for name, parameter in model.named_parameters()}
    members = {group: {names[p] for p in groups[group]["params"]} for group in groups}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set.union(*members.values()) == trainable
    assert sum(len(group) for group in members.values()) == len(trainable)
    assert members["backbone"] == {name for name in trainable if name.startswith("backbone.")}
    assert members["offsets"] == {
        *(f"reference_points.{p}" for p in ("weight", "bias")),
        *(f"encoder.layers.0.attention.sampling_offsets.{p}" for p in ("weight", "bias")),
        *(f"decoder.layers.0.cross_attention.sampling_offsets.{p}" for p in ("weight", "bias")),
    }
    assert groups["transformer"]["lr"] == 2e-4
    assert groups["backbone"]["lr"] == groups["offsets"]["lr"] == pytest.approx(2e-5)
    assert {g["name"]: g["lr"] for g in parameter_groups(DeformableDetr(SMALL), 1e-3)}["backbone"] == 1e-3


def test_configuration_survives_json():
    for config in (*VARIANTS.values(), DetectorConfig("resnet50", 80)):
        assert DetectorConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "vgg"}, "expected a backbone among resnet18, .*; found 'vgg'"),
        ({"width": 30}, "expected a width that 4 and heads=4 divide; found width=30"),
        ({"queries": 0}, "expected queries of at least 1; found 0"),
        ({"refine": False, "two_stage": True}, "expected refine=True where two_stage=True"),
        ({"tiny_channels": (8, 16)}, "expected 5 tiny_channels"),
        ({"colour": 1}, "found unknown colour"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(UserError, match=message):
        DetectorConfig.from_dict(dataclasses.asdict(SMALL) | change)


def _assert_close(a: Decoded, b: Decoded, tolerance: float = 1e-6) -> None:
    for field in ("queries", "logits", "boxes_cxcywh"):
        difference = (getattr(a, field) - getattr(b, field)).abs().max().item()
        assert difference <= tolerance, f"{field} differs by {difference:.1e}"
