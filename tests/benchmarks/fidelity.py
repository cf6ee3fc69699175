"""What storing less costs: bytes per sample against gradient error: `python -m tests.benchmarks.fidelity`.

Students learn from exact float32 targets of a trained teacher for a while; then, batch by batch, the gradient of all
their parameters is compared with the one that the same batch gives when its targets were sampled and encoded as a store
would. Writes the table into docs/fidelity.md and the plot beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.augment import policy_of_sizes
from common.cache.codec import Decoding, encode_logits, encode_tokens, measure_channels
from common.cache.product import train_codebooks
from common.cache.reader import CacheReader
from common.cache.sampling import draw_tokens
from common.cache.schema import (
    CodecInfo,
    DataInfo,
    Layout,
    LogitsCodec,
    Manifest,
    Rounding,
    TeacherInfo,
    TokenCodec,
    ViewInfo,
)
from common.coco import load_annotations
from common.images import batch_to, collate
from common.records import Batch, CachedBatch
from common.synthetic import draw_data_set
from student_train.config import DataOptions, DistillationOptions, ModelOptions, OptimisationOptions, TrainConfig
from student_train.feature_loss import align, feature_loss
from student_train.feed import CachedViews, replay
from student_train.model import StudentInTraining, StudentOutput
from student_train.prepare import prepare_data, prepare_student
from student_train.teachers import Lesson
from teacher_dump import config as dumping
from teacher_dump.dump import run_dump
from teacher_dump.encode import CALIBRATION_SAMPLES, calibration_of
from tests.training_cases import losses_of

Floats = npt.NDArray[np.float32]
Constants = dict[int, Decoding]

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
BATCH = 16
CALIBRATION_SHARE = 3  # one image in so many is for channel statistics and codebooks alone
COCO = {"tokens": 12_100, "classes": 80}  # of a sample of Deformable DETR's 11 scales


@dataclass(frozen=True)
class Setting:
    """A teacher, its data and how the student learns. init: whether the student starts from the teacher's weights."""

    name: str
    teacher: str
    data: dumping.DataOptions
    distillation: DistillationOptions
    init: bool
    val_split: str
    teacher_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Stored:
    """How tokens and logits are stored."""

    keep: float
    codec: TokenCodec
    rounding: Rounding = "nearest"
    logits: LogitsCodec = "float"

    @property
    def name(self) -> str:
        stochastic = " stochastic" if self.rounding == "stochastic" else ""
        logits = ", logits uint8" if self.logits == "uint8" else ""
        return f"{self.codec}{stochastic}{logits}"

    def bytes(self, teacher: TeacherInfo, classes: int, tokens: int) -> float:
        """A sample's bytes in all fields but the queries, which none of the losses here reads."""
        codec = CodecInfo(self.codec, self.keep, rounding=self.rounding, queries=False, logits=self.logits)
        token_bytes, sample_bytes = row_bytes(codec, teacher, classes)
        return self.keep * tokens * token_bytes + sample_bytes


def row_bytes(codec: CodecInfo, teacher: TeacherInfo, classes: int) -> tuple[int, int]:
    """Of a token and of a sample without its tokens, in all fields of a store."""
    manifest = Manifest(
        teacher,
        DataInfo("", "", 0, tuple(range(classes)), ()),
        ViewInfo(0, 1, policy_of_sizes(None), ""),
        codec,
        Layout(0, 1, 1, 1),
        batch_size=1,
        software={},
    )
    return manifest.row_bytes("token"), manifest.row_bytes("sample")


def dense_bytes(teacher: TeacherInfo, classes: int, tokens: int) -> float:
    """All fields of a sample in fp16, queries included."""
    token_bytes, sample_bytes = row_bytes(CodecInfo("fp16", 1.0), teacher, classes)
    return tokens * token_bytes + sample_bytes


CHOICES = [
    Stored(1.0, "fp16"),
    Stored(1.0, "fp16", logits="uint8"),
    *(Stored(keep, "int8") for keep in (1.0, 0.5, 0.25)),
    *(Stored(keep, "int4") for keep in (1.0, 0.5, 0.24)),
    *(Stored(keep, "int4", "stochastic") for keep in (1.0, 0.24)),
    *(Stored(keep, "int4", logits="uint8") for keep in (0.32,)),
    *(Stored(keep, "pq4", logits="uint8") for keep in (1.0, 0.6)),
    *(Stored(keep, "pq8", logits="uint8") for keep in (1.0, 0.8, 0.5, 0.25)),
]


def encoded(exact: CachedBatch, how: Stored, found: Constants, ids: Sequence[int], draw: int) -> CachedBatch:
    """The batch as it would come from a store that holds `how`. draw: takes the place of the view in the key."""
    decoding = None if how.codec in ("fp16", "fp32") else found[CodecInfo(how.codec, 1.0).components]
    parts: list[dict[str, npt.NDArray[np.generic]]] = []
    for index, (first, last) in enumerate(itertools.pairwise(exact.token_offsets.tolist())):
        tokens, weights = exact.tokens[first:last].numpy(), exact.token_weights[first:last].numpy()
        kept = max(1, round(how.keep * len(tokens)))
        positions, kept_weights = draw_tokens(weights, kept, (0, ids[index], draw))
        part = dict(encode_tokens(tokens[positions], how.codec, decoding, how.rounding, (0, ids[index], draw, 0)))
        parts.append({**part, "positions": positions, "weights": kept_weights})

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([part[name] for part in parts]))

    constants = {} if decoding is None else vars(decoding)
    return replace(
        exact,
        tokens=joined("tokens"),
        token_scales=joined("token_scales") if "token_scales" in parts[0] else None,
        token_positions=joined("positions"),
        token_weights=joined("weights"),
        token_offsets=torch.tensor([0, *np.cumsum([len(part["weights"]) for part in parts])]),
        **{name: torch.from_numpy(value) for name, value in constants.items() if hasattr(exact, name)},
    )


def calibration_images(reader: CacheReader) -> npt.NDArray[np.int64]:
    """One image in CALIBRATION_SHARE."""
    return np.unique(reader.table.image_id)[::CALIBRATION_SHARE]


def calibration_tokens(reader: CacheReader) -> tuple[Floats, Floats]:
    """Tokens (N, C) of those images and what they count (N,), drawn as a dump draws them."""
    rows = np.flatnonzero(np.isin(reader.table.image_id, calibration_images(reader)))
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), CALIBRATION_SAMPLES)).astype(int)]
    samples = []
    for row in chosen.tolist():
        batch = reader.read([row])
        samples.append(calibration_of((0, row, 0), batch.tokens.numpy(), batch.token_weights.numpy()))
    return np.concatenate([s.tokens for s in samples]), np.concatenate([s.weights for s in samples])


def calibrated(reader: CacheReader) -> Constants:
    """Channel statistics and codebooks, by the components in a byte, from images that no gradient is measured on."""
    tokens, weights = calibration_tokens(reader)
    return {0: measure_channels(tokens)} | {count: train_codebooks(tokens, weights, count) for count in (4, 8)}


def prepare(setting: Setting, store: Path, steps: int) -> tuple[TrainConfig, CacheReader, StudentInTraining]:
    """The exact store, and a student that has learnt from it for so many steps of batches of 16."""
    if not store.exists():
        teacher = dumping.TeacherOptions(setting.teacher, setting.teacher_size, BATCH, "cpu")
        exact = dumping.StoreOptions(store, preset="half", tokens="fp32")
        run_dump(dumping.DumpConfig(setting.data, teacher, exact))
    config = TrainConfig(
        data=DataOptions(
            str(store), data=setting.data.data, split=setting.data.split, val_split=setting.val_split, workers=1
        ),
        model=ModelOptions("tiny", init=Path(setting.teacher) if setting.init else None),
        distillation=setting.distillation,
        optimisation=OptimisationOptions(batch_size=BATCH, lr=1e-3),
    )
    torch.manual_seed(0)
    data = prepare_data(config.data)
    assert data.reader is not None
    student = prepare_student(config, data)
    optimizer = torch.optim.AdamW(student.parameter_groups(1e-3, None), weight_decay=1e-4)
    student.train()
    for number, (batch, cached, _) in enumerate(itertools.islice(batches(setting, data.reader), steps)):
        output = student(batch.images, batch.padding_mask)
        losses = losses_of(output, batch.targets, [Lesson(cached)], setting.distillation)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.1 if not setting.init else 1.0)
        optimizer.step()
        if number % 20 == 0:
            print(f"{setting.name}: step {number}, loss {sum(loss.item() for loss in losses.values()):.3f}", flush=True)
    return config, data.reader, student


def batches(
    setting: Setting, reader: CacheReader, seed: int = 0, *, unseen: bool = False
) -> Iterator[tuple[Batch, CachedBatch, list[int]]]:
    """Shuffled batches without end, with exact targets. unseen: of images that `calibrated` has not looked at."""
    annotations = load_annotations(setting.data.data, setting.data.split)
    source = CachedViews(annotations, reader)
    generator = np.random.default_rng(seed)
    for epoch in itertools.count():
        order = generator.permutation(len(source))
        if unseen:
            seen = np.isin(reader.table.image_id[source.rows(epoch)], calibration_images(reader))
            order = order[~seen[order]]
        for first in range(0, len(order) - BATCH + 1, BATCH):
            samples = [source.sample(epoch, int(index)) for index in order[first : first + BATCH]]
            found = [replay(sample, annotations) for sample in samples]
            batch = batch_to(collate([(one.image, one.targets) for one in found]), torch.device("cpu"))
            yield batch, reader.read([sample.row for sample in samples]), [sample.row for sample in samples]


@dataclass(frozen=True)
class Gradients:
    """Of all parameters of a student, in one vector, for one batch that went through it."""

    student: StudentInTraining
    output: StudentOutput
    batch: Batch
    options: DistillationOptions

    def features(self, cached: CachedBatch) -> Tensor:
        """Of the feature loss alone."""
        output, memory = self.output.output, self.output.pupils[0].memory
        assert memory is not None
        aligned = align(memory, output.level_shapes, output.token_mask, self.output.strides, cached)
        return self._of(self.options.weights.features * feature_loss(aligned, cached))

    def others(self, cached: CachedBatch) -> Tensor:
        """Of all other losses, detection included."""
        losses = losses_of(self.output, self.batch.targets, [Lesson(cached)], self.options)
        return self._of(torch.stack([loss for name, loss in losses.items() if name != "features"]).sum())

    def _of(self, loss: Tensor) -> Tensor:
        parameters = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]).double()


def measure(setting: Setting, folder: Path, steps: int, count: int, draws: int) -> dict[str, dict[str, float]]:
    """Medians over batches and draws for each choice, by name."""
    _, reader, student = prepare(setting, folder, steps)
    constants = calibrated(reader)
    found: dict[Stored, list[tuple[float, ...]]] = {how: [] for how in CHOICES}
    for number, (batch, exact, ids) in enumerate(
        itertools.islice(batches(setting, reader, seed=1, unseen=True), count)
    ):
        gradients = Gradients(student, student(batch.images, batch.padding_mask), batch, setting.distillation)
        dense, rest = gradients.features(exact), gradients.others(exact)
        stored_logits = {
            "float": exact.logits.half(),
            "uint8": torch.from_numpy(encode_logits(exact.logits.numpy())),
        }
        others = {name: gradients.others(replace(exact, logits=logits)) for name, logits in stored_logits.items()}
        change = {name: float((found - rest).norm() / (dense + rest).norm()) for name, found in others.items()}
        print(
            f"{setting.name}: batch {number}, gradient norms: features {dense.norm():.3g},"
            f" all {(dense + rest).norm():.3g}; logits in float16 change {change['float']:.2g} of all, in uint8"
            f" {change['uint8']:.2g}",
            flush=True,
        )
        for how in CHOICES:
            for draw in range(1 if how.keep == 1 and how.rounding == "nearest" else draws):
                estimate = gradients.features(encoded(exact, how, constants, ids, draw))
                found[how].append((*errors(estimate, dense), *errors(estimate + others[how.logits], dense + rest)))
    info, tokens = reader.manifest.teacher, float(reader.table.level_shapes.prod(axis=2).sum(axis=1).mean())
    classes, result = reader.manifest.num_classes, {}
    coco = replace(info, layers=6, queries=300, channels=256)
    for how, values in found.items():
        medians = [statistics.median(column) for column in zip(*values, strict=True)]
        own = how.bytes(info, classes, int(tokens))
        result[f"{how.keep:g} {how.name}"] = {
            "bytes": own,
            "share": own / dense_bytes(info, classes, int(tokens)),
            "coco_share": how.bytes(coco, COCO["classes"], COCO["tokens"])
            / dense_bytes(coco, COCO["classes"], COCO["tokens"]),
            **dict(zip(("feature_l2", "feature_cos", "total_l2", "total_cos"), medians, strict=True)),
        }
    reader.close()
    return result


def errors(estimate: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative L2 and cosine."""
    cosine = torch.dot(estimate, exact) / (estimate.norm() * exact.norm())
    return float((estimate - exact).norm() / exact.norm()), float(cosine)


def settings(folder: Path, shared: Path) -> list[Setting]:
    """The demo's teacher with the demo's and the default weights, and DEIMv2-Atto where it is present."""
    scenes = folder / "scenes"
    if not scenes.exists():
        draw_data_set(scenes, train_images=320, val_images=1, size=128)
    drawn = dumping.DataOptions(scenes, views=2, sizes=(128,), workers=1)
    demo = str(DOCS / "demo" / "teacher.safetensors")
    heavy = DistillationOptions(logits_weight=1, feature_weight=1000, assignment_weight=1)  # as in `make demo`
    found = [
        Setting("demo, feature weight 1000, inherited", demo, drawn, heavy, True, "val2017"),
        Setting("demo, default weights, from scratch", demo, drawn, DistillationOptions(), False, "val2017"),
    ]
    if (shared / "deimv2_atto").is_dir():
        real = dumping.DataOptions(shared / "coco_nano", views=2, sizes=(192,), workers=1)
        no_queries = DistillationOptions(assignment_weight=0)
        teacher = f"hf:{shared / 'deimv2_atto'}"
        found.append(
            Setting(
                "DEIMv2-Atto, default weights, from scratch", teacher, real, no_queries, False, "val2017", (320, 320)
            )
        )
    return found


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """For docs/fidelity.md: one table for each setting."""
    lines = []
    for name, rows in results.items():
        lines += [
            f"**{name}**",
            "",
            "| kept | tokens as | bytes | share | COCO share | features: L2 | cosine | total: L2 | cosine |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for key, row in rows.items():
            keep, how = key.split(" ", 1)
            lines.append(
                f"| {keep} | {how} | {row['bytes']:.0f} | {row['share']:.1%} | {row['coco_share']:.1%} |"
                f" {row['feature_l2']:.3f} | {row['feature_cos']:.4f} |"
                f" {row['total_l2']:.4f} | {row['total_cos']:.5f} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, dict[str, float]]], out: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4.2 * len(results), 3.6), sharey=True, squeeze=False)
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        for codec in dict.fromkeys(key.split(" ", 1)[1] for key in rows):
            points = [row for key, row in rows.items() if key.split(" ", 1)[1] == codec]
            shares = [100 * row["coco_share"] for row in points]
            axis.loglog(shares, [max(1e-7, 1 - row["total_cos"]) for row in points], ".-", label=codec)
        axis.axhline(0.01, color="grey", linewidth=0.8)
        axis.axvline(10, color="grey", linewidth=0.8)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("% of dense fp16, at COCO's shapes")
    axes[0][0].set_ylabel("1 - cosine of the total gradient")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fidelity", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/fidelity"), help="default: %(default)s")
    parser.add_argument(
        "--shared", type=Path, default=DOCS.parents[1] / "shared" / "data", help="folder of deimv2_atto"
    )
    parser.add_argument("--steps", type=int, default=100, help="that students learn first; default: %(default)s")
    parser.add_argument("--batches", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--draws", type=int, default=2, help="of each batch; default: %(default)s")
    parser.add_argument(
        "--only", default="", help="measure the settings with this in their name; for the others, keep what was found"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for setting in settings(arguments.folder, arguments.shared):
        kept = arguments.folder / f"{setting.name}.json"
        if arguments.only in setting.name:
            store = arguments.folder / f"{setting.name.split(',')[0]}.zarr"
            count = arguments.batches if "demo" in setting.name else 2  # of the real images, one from each view
            kept.write_text(json.dumps(measure(setting, store, arguments.steps, count, arguments.draws), indent=1))
        if kept.exists():
            results[setting.name] = json.loads(kept.read_text())
    page = DOCS / "fidelity.md"
    before, after = page.read_text().split(BEGIN)[0], page.read_text().split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{table(results)}\n{END}{after}")
    plot(results, DOCS / "fidelity.png")


if __name__ == "__main__":
    main()
