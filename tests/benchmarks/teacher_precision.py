"""What a teacher in bfloat16 changes of what is stored: `python -m tests.benchmarks.teacher_precision`.

Its answers under the CPU's autocast against its own in float32, on whole images, next to what codecs change of the same
tokens. Channel statistics and codebooks come from a third of the images, figures from the others.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from common.augment import draw, evaluation_policy, policy_of_sizes
from common.cache.codec import Decoding, decode_logits, decode_tokens, encode_logits, encode_tokens, measure_channels
from common.cache.product import train_codebooks
from common.cache.schema import TokenCodec
from common.coco import load_annotations
from common.images import load_entry
from common.replay import apply_image
from teacher_dump.teachers import load_teacher
from tests.benchmarks.fidelity import CALIBRATION_SHARE, DOCS, Setting, settings

CODECS: tuple[TokenCodec, ...] = ("fp16", "int8", "int4", "pq4", "pq8")
IMAGES = 24


def relative(found: Tensor, exact: Tensor) -> float:
    """L2 of the error over that of the values about each channel's mean."""
    return float((found - exact).norm() / (exact - exact.mean(0)).norm())


def measure(setting: Setting) -> dict[str, float]:
    """Each figure by its name."""
    annotations = load_annotations(setting.data.data, setting.data.split)
    policy = evaluation_policy(policy_of_sizes(setting.data.sizes))
    cpu = torch.device("cpu")
    exact, mixed = (
        load_teacher(setting.teacher, annotations, cpu, setting.teacher_size, amp=amp) for amp in (None, "bf16")
    )
    pairs = []
    for entry in annotations.entries[:IMAGES]:
        view = draw(0, entry.image_id, 0, entry.width, entry.height, policy)
        image = apply_image(load_entry(annotations, entry), view)
        with torch.inference_mode():
            pairs.append((exact.run([image]), mixed.run([image])))
    calibrating = torch.cat([one.memory[0] for one, _ in pairs[::CALIBRATION_SHARE]]).numpy()
    others = [pair for index, pair in enumerate(pairs) if index % CALIBRATION_SHARE]
    tokens, tokens_mixed = (torch.cat([pair[which].memory[0] for pair in others]) for which in (0, 1))
    logits, logits_mixed = (torch.cat([pair[which].logits for pair in others]) for which in (0, 1))
    boxes, boxes_mixed = (torch.cat([pair[which].boxes_cxcywh for pair in others]) for which in (0, 1))
    found = {"tokens, bf16 teacher": relative(tokens_mixed, tokens)}
    for codec in CODECS:
        weights = torch.ones(len(calibrating)).numpy()
        decoding: Decoding | None = None
        if codec.startswith("int"):
            decoding = measure_channels(calibrating)
        elif codec.startswith("pq"):
            decoding = train_codebooks(calibrating, weights, int(codec[2:]))
        decoded = decode_tokens(dict(encode_tokens(tokens.numpy(), codec, decoding)), decoding)
        found[f"tokens, {codec}"] = relative(torch.from_numpy(decoded), tokens)
    coded = decode_logits(torch.from_numpy(encode_logits(logits.numpy())))
    for name, other in (("bf16 teacher", logits_mixed), ("uint8", coded)):
        difference = (other.sigmoid() - logits.sigmoid()).abs()
        found[f"scores, {name}: mean"] = difference.mean().item()
        found[f"scores, {name}: largest"] = difference.max().item()
    moved = (boxes_mixed - boxes).abs()
    found["boxes, bf16 teacher: mean"], found["boxes, bf16 teacher: largest"] = moved.mean().item(), moved.max().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    shared_usually = DOCS.parents[1] / "shared" / "data"
    parser.add_argument("--shared", type=Path, default=shared_usually, help="folder of deimv2_atto")
    shared = parser.parse_args().shared
    with tempfile.TemporaryDirectory(prefix="teacher-precision-") as folder:
        for setting in settings(Path(folder), shared)[1:]:  # the first has the second's teacher
            for name, value in measure(setting).items():
                print(f"{setting.name.split(',')[0]:12}  {name:30} {value:.2g}", flush=True)


if __name__ == "__main__":
    main()
