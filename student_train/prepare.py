"""From the configuration to what training needs: data, student, feed. What can be wrong is found out here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.augment import AugmentPolicy, evaluation_policy, policy_of_sizes
from common.cache.plan import level_strides
from common.cache.reader import CacheReader
from common.coco import Annotations, check_images, load_annotations
from common.detr.config import DetectorConfig
from common.detr.detector import DeformableDetr
from common.detr.weights import load_backbone, load_detector
from common.errors import UserError
from common.images import pixel_fingerprint
from common.resampling import match_levels
from common.runtime import Ranks, log
from student_train.config import DataOptions, ModelOptions, TrainConfig
from student_train.feed import CachedViews, Feed, FreshViews
from student_train.model import StudentInTraining
from student_train.students import student_named


@dataclass(frozen=True)
class Data:
    """What to train and to evaluate on. reader: of the store, None without one. policy: of the training samples."""

    train: Annotations
    val: Annotations
    policy: AugmentPolicy
    reader: CacheReader | None

    @property
    def eval_policy(self) -> AugmentPolicy:
        return evaluation_policy(self.policy)


def prepare_data(options: DataOptions) -> Data:
    """Open annotations and store. UserError where they are missing, incomplete or do not belong together."""
    reader = CacheReader(options.cache) if options.cache is not None else None
    train, val = (load_annotations(options.data, split) for split in (options.split, options.val_split))
    if not options.skip_broken:
        check_images(train)
    check_images(val)
    if val.category_ids != train.category_ids:
        raise UserError(
            f"{val.annotation_file}: expected the categories of {train.annotation_file}, found others:"
            " use splits of one data set"
        )
    if reader is None:
        return Data(train, val, policy_of_sizes(options.sizes), None)
    if options.sizes is not None:
        raise UserError("--sizes was given together with --cache, whose samples are augmented already: leave it out")
    check_store(reader, train)
    return Data(train, val, reader.manifest.views.policy, reader)


def check_store(reader: CacheReader, annotations: Annotations) -> None:
    """UserError unless the store is complete and its teacher saw these annotations and these pixels."""
    manifest = reader.manifest
    if not reader.complete:
        raise UserError(
            f"{reader.path}: expected a complete store, found {int(reader.finished_shards.sum())} of"
            f" {manifest.layout.shards} shards: run the same `python -m teacher_dump` command again to complete it"
        )
    if manifest.data.annotations_sha256 != annotations.sha256:
        raise UserError(
            f"{reader.path} was dumped with other annotations (split {manifest.data.split}) than"
            f" {annotations.annotation_file}: name the data it was dumped from with --data and --split, or dump again"
        )
    if manifest.views.pixel_fingerprint != pixel_fingerprint():
        software = ", ".join(f"{name} {version}" for name, version in manifest.software.items())
        raise UserError(
            f"{reader.path}: this installation resamples images differently from the one that dumped it ({software}):"
            " install those versions, or dump again"
        )
    if not manifest.teacher.trained:
        log.warning(f"{reader.path} holds the targets of an UNTRAINED teacher: nothing can be learnt from it")


def student_config(options: ModelOptions, classes: int, pretrained_backbone: bool) -> DetectorConfig:
    """The named student with the sizes that the options override.

    pretrained_backbone: it receives trained weights. Then batch norm and the first stage are frozen, as in the recipe;
    otherwise everything has to be learnt.
    """
    sizes = {
        "width": options.width,
        "queries": options.queries,
        "encoder_layers": options.encoder_layers,
        "decoder_layers": options.decoder_layers,
    }
    chosen = {name: size for name, size in sizes.items() if size is not None}
    config = student_named(options.student)(classes, refine=options.refine, two_stage=options.two_stage, **chosen)
    return replace(config, pretrained_backbone=pretrained_backbone)


def prepare_student(config: TrainConfig, data: Data) -> StudentInTraining:
    """Build the student and load the weights it starts from. UserError where it does not fit the store's teacher."""
    options, classes = config.model, data.train.num_classes
    source = None if options.init is None else load_detector(options.init)[0]
    architecture = student_config(options, classes, pretrained_backbone=options.backbone_weights is not None)
    same_backbone = source is not None and source.config.backbone == architecture.backbone
    if same_backbone and source is not None and options.backbone_weights is None:
        architecture = replace(architecture, pretrained_backbone=source.config.pretrained_backbone)
    detector = DeformableDetr(architecture)
    if source is not None:
        log.info(f"{options.init}: {inherit(detector, source)}")
    if options.backbone_weights is not None:
        load_backbone(detector, options.backbone_weights)
    elif not same_backbone and architecture.backbone != "tiny":
        log.warning(
            f"the {architecture.backbone} starts from RANDOM weights, which takes far more images and epochs to learn:"
            " name torchvision's ImageNet weights with --backbone-weights FILE"
        )
    distillation, reader = config.distillation, data.reader
    if reader is None:
        distillation = replace(distillation, logits_weight=0.0, feature_weight=0.0, assignment_weight=0.0)
        return StudentInTraining(detector, distillation, detector.config.width, None)
    teacher = reader.manifest.teacher
    if distillation.feature_weight:
        for line in match_report(reader, detector.strides):
            log.info(line)
    queries: Tensor | None = reader.constants.get("query_embeddings")
    return StudentInTraining(detector, distillation, teacher.channels, queries)


def match_report(reader: CacheReader, strides: tuple[int, ...]) -> list[str]:
    """Which of the teacher's feature levels the student, with levels of these strides, learns from; none if all are
    its own. UserError if it learns from no level."""
    teacher, sizes = reader.manifest.teacher, reader.table.augmentation[:, 5:7]
    if teacher.input_size is None and teacher.strides == tuple(strides):
        return []
    in_samples = torch.from_numpy(level_strides(teacher, sizes[:, 0], sizes[:, 1]))
    matched = match_levels(in_samples, strides)  # (N, levels): differs with the size of the sample
    lines = []
    for level, stride in enumerate(teacher.strides):
        pixels = float(in_samples[:, level].log().mean().exp())
        partners = [str(strides[index]) for index in sorted({*matched[:, level].tolist()} - {-1})]
        learnt = f"matched with the student's of stride {' or '.join(partners)}" if partners else "left out"
        lines.append(f"the teacher's level of stride {stride}, {pixels:.3g} pixels of a sample on average, is {learnt}")
    if not bool((matched >= 0).any()):
        raise UserError(
            f"feature distillation expects feature levels of like strides, but the teacher's {teacher.strides} are all"
            f" far from the student's {tuple(strides)} in pixels of the sample: use --feature-weight 0"
        )
    return lines


def inherit(detector: DeformableDetr, source: DeformableDetr) -> str:
    """Take over every weight of another detector whose name and shape fit; says how many did."""
    weights, own = source.state_dict(), detector.state_dict()
    fitting = {name: weight for name, weight in weights.items() if name in own and own[name].shape == weight.shape}
    if not fitting:
        raise UserError("no weight of --init fits the student: leave it out, or choose a student of its sizes")
    detector.load_state_dict(fitting, strict=False)
    return f"{len(fitting)} of the student's {len(own)} weights taken over, the others start anew"


def prepare_feed(config: TrainConfig, data: Data, ranks: Ranks, device: torch.device) -> Feed:
    """The samples of the store or, without one, fresh views. Cached targets are read only if a loss needs them."""
    if config.optimisation.batch_size < ranks.world_size:
        raise UserError(
            f"expected --batch-size of {ranks.world_size} or more, an image for each process, found"
            f" {config.optimisation.batch_size}"
        )
    if data.reader is not None:
        source: CachedViews | FreshViews = CachedViews(data.train, data.reader)
    else:
        source = FreshViews(data.train, data.policy, config.optimisation.seed)
    return Feed(
        source,
        data.train,
        data.reader if config.distillation.active else None,
        batch_size=config.optimisation.batch_size,
        seed=config.optimisation.seed,
        ranks=ranks,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        skip_broken=config.data.skip_broken,
        pin=device.type == "cuda",
    )
