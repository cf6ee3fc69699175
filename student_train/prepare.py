"""From the configuration to what training needs: data, student, feed. What can be wrong is found out here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common.augment import AugmentPolicy, evaluation_policy, policy_of_sizes
from common.cache.plan import Integers, level_strides
from common.cache.reader import CacheReader
from common.cache.schema import TeacherInfo
from common.cache.validate import check_crops, damage_explained
from common.categories import Categories
from common.coco import Annotations, check_images, in_order_of, load_annotations
from common.detr.config import DetectorConfig
from common.detr.detector import DeformableDetr
from common.detr.layouts import State
from common.detr.presets import preset_named
from common.detr.weights import LoadReport, load_backbone, load_detector, select_classes
from common.errors import UserError
from common.images import pixel_fingerprint
from common.pixel_rule import PixelRule, rule_of_store
from common.resampling import match_levels
from common.runtime import Ranks, log
from common.subset import take_subset
from common.teacher import detector_info, sha256_of
from student_train.batching import steps_per_epoch
from student_train.config import DataOptions, DistillationOptions, ModelOptions, TrainConfig
from student_train.feed import CachedViews, Feed, FeedOptions, FreshViews
from student_train.live import LiveTeacher
from student_train.model import Bridge, StudentInTraining
from student_train.objective import needed_fields
from student_train.selection import Shards, finished_ranges, in_store, keep_to, say_if_unfinished
from student_train.teachers import CachedTeachers, open_teachers


@dataclass(frozen=True)
class Data:
    """What to train and to evaluate on. teachers: of the store, None without one. policy: of the training samples."""

    train: Annotations
    val: Annotations
    policy: AugmentPolicy
    teachers: CachedTeachers | None

    @property
    def reader(self) -> CacheReader | None:
        """Of the store, or of its first teacher: which samples there are, and how they were augmented."""
        return None if self.teachers is None else self.teachers.readers[0]

    @property
    def eval_policy(self) -> AugmentPolicy:
        return evaluation_policy(self.policy)


def prepare_data(options: DataOptions, settled: Callable[[CacheReader], Shards] = finished_ranges) -> Data:
    """Open annotations and store. UserError where they are missing or do not belong together.

    settled: which of the store's shards to train on.
    """
    teachers = (
        open_teachers(options.cache, options.teachers, options.local_cache) if options.cache is not None else None
    )
    train, val = (
        load_annotations(options.data, split, options.image_folder) for split in (options.split, options.val_split)
    )
    val = in_order_of(val, train)
    if teachers is not None:
        reader = teachers.readers[0]
        if options.sizes is not None:
            raise UserError(
                "--sizes was given together with --cache, whose samples are augmented already: leave it out"
            )
        for of_teacher in teachers.readers:
            check_store(of_teacher, train)
        keep_to(reader, settled(reader))
        say_if_unfinished(reader)
        train = in_store(train, reader)
        rule = rule_of_store(reader.path, reader.manifest.views.exif, options.exif)
    else:
        rule = PixelRule(options.exif or "auto")
    train, val = take_subset(train, options.subset).decoded_by(rule), val.decoded_by(rule)
    check_images(train)
    check_images(val)
    policy = policy_of_sizes(options.sizes) if teachers is None else reader.manifest.views.policy
    return Data(train, val, policy, teachers)


def check_store(reader: CacheReader, annotations: Annotations) -> None:
    """UserError unless the store's teacher saw these annotations and these pixels."""
    manifest = reader.manifest
    if manifest.data.annotations_sha256 != annotations.sha256:
        raise UserError(
            f"{reader.path} was dumped with other annotations (split {manifest.data.split}) than"
            f" {annotations.annotation_file}: name the data it was dumped from with --data and --split, or dump again"
        )
    if manifest.data.category_ids != annotations.category_ids:
        raise UserError(f"{reader.path}: expected the categories of {annotations.annotation_file}, found others")
    with damage_explained(reader.storage):
        check_crops(reader.table, annotations.entries)
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
    preset = preset_named(options.student, "--student ")
    config = preset(classes, refine=options.refine, two_stage=options.two_stage, **chosen)
    return replace(config, pretrained_backbone=pretrained_backbone)


def prepare_student(config: TrainConfig, data: Data) -> StudentInTraining:
    """Build the student and load the weights it starts from. UserError where it does not fit the store's teachers."""
    options, classes = config.model, data.train.num_classes
    source, report = (None, None) if options.init is None else load_detector(options.init)
    architecture = student_config(options, classes, pretrained_backbone=options.backbone_weights is not None)
    same_backbone = source is not None and source.config.backbone == architecture.backbone
    if same_backbone and source is not None and options.backbone_weights is None:
        architecture = replace(architecture, pretrained_backbone=source.config.pretrained_backbone)
    detector = DeformableDetr(architecture)
    if source is not None and report is not None:
        inherit(detector, named_weights(source, report, data.train.categories), str(options.init))
    if options.backbone_weights is not None:
        load_backbone(detector, options.backbone_weights)
    elif not same_backbone and architecture.backbone != "tiny":
        log.warning(
            f"the {architecture.backbone} starts from RANDOM weights, which takes far more images and epochs to learn:"
            " name torchvision's ImageNet weights with --backbone-weights FILE"
        )
    distillation = config.distillation
    live = prepare_live(distillation.live_teacher, data) if distillation.live_teacher and distillation.active else None
    if live is not None:
        sizes = np.ones((1, 2), dtype=np.int32)  # of any size: it takes samples as they are
        queries = None if live.model.query_embeddings is None else live.model.query_embeddings.detach().clone()
        teachers = [(live.info, queries)]
    elif data.teachers is not None:
        readers = data.teachers.readers
        sizes = readers[0].table.augmentation[:, 5:7]
        for reader in readers:
            check_fields(reader, distillation)
        teachers = [(reader.manifest.teacher, reader.constants.get("query_embeddings")) for reader in readers]
    else:
        return StudentInTraining(detector, distillation.without_losses())
    for teacher, _ in teachers if distillation.needs_memory or distillation.needs_neck else ():
        for line in match_report(teacher, sizes, detector.strides):
            log.info(line if len(teachers) == 1 else f"{teacher.name}: {line}")
    bridges = [Bridge(detector, distillation, teacher, queries) for teacher, queries in teachers]
    return StudentInTraining(detector, distillation, bridges, live)


def prepare_live(path: Path, data: Data) -> LiveTeacher:
    """The teacher of that file, to run beside the student. UserError if it is not the one that wrote the store."""
    of_store = [] if data.teachers is None else [reader.manifest.teacher for reader in data.teachers.readers]
    with torch.random.fork_rng(devices=[]):  # the student starts from the same weights with and without it
        model, report = load_detector(path)
    outputs = report.outputs_for(data.train.categories)
    for line in (*report.lines(), *outputs.notes):
        log.info(line)
    info = detector_info(model, str(path), sha256_of(path), trained=True)
    if of_store and info.weights_sha256 not in [teacher.weights_sha256 for teacher in of_store]:
        names = " or ".join(teacher.name for teacher in of_store)
        raise UserError(
            f"--live-teacher {path} is not the teacher {names} that wrote the store: name that one, or"
            " leave --cache out"
        )
    log.warning(f"{path} runs beside the student in every step: for comparison with a cache, which spares that")
    return LiveTeacher(model, info, outputs.columns)


def check_fields(reader: CacheReader, options: DistillationOptions) -> None:
    """UserError where a loss needs what the store does not hold: the neck's features, or the queries."""
    if options.needs_neck and not reader.manifest.codec.neck:
        flag = "--fgd-weight" if options.weights.fgd else "--feature-weight"
        raise UserError(
            f"expected a store with the neck's features, from which --mode {options.mode} with {flag} above 0 learns,"
            f" found {reader.path} without: dump it with --neck or --preset full, or use {flag} 0"
        )
    if options.weights.contrastive and not reader.manifest.codec.queries:
        raise UserError(
            "expected a store with the teacher's queries, from which the contrastive loss learns, found"
            f" {reader.path} without: dump it with --queries True, or use --contrastive-weight 0"
        )


def match_report(teacher: TeacherInfo, sizes: Integers, strides: tuple[int, ...]) -> list[str]:
    """Which of the teacher's feature levels the student, with levels of these strides, learns from; none if all are
    its own. sizes: (N, 2) height and width of samples. UserError if it learns from no level."""
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


def named_weights(source: DeformableDetr, report: LoadReport, data: Categories) -> State:
    """A detector's weights with the data's classes alone, in their order; without class heads where it has others."""
    weights = source.state_dict()
    try:
        outputs = report.outputs_for(data)
    except UserError:
        log.info(f"{report.source}: its classes are not the data's, {data}: its class outputs are not taken over")
        return {n: w for n, w in weights.items() if not n.startswith(("decoder.class_heads.", "proposer.class_head."))}
    for line in outputs.notes:
        log.info(f"{report.source}: {line}")
    return select_classes(weights, source.config.num_classes, outputs.columns)


def inherit(detector: DeformableDetr, weights: State, source: str) -> None:
    """Take over every weight of another detector whose name and shape fit, and log how many did: with a warning that
    names the other parts where these are more than half."""
    own = detector.state_dict()
    fitting = {name: weight for name, weight in weights.items() if name in own and own[name].shape == weight.shape}
    if not fitting:
        raise UserError("no weight of --init fits the student: leave it out, or choose a student of its sizes")
    detector.load_state_dict(fitting, strict=False)
    told = f"{source}: {len(fitting)} of the student's {len(own)} weights taken over"
    if 2 * len(fitting) >= len(own):
        log.info(f"{told}, the others start from scratch")
    else:
        others = ", ".join(dict.fromkeys(_part_of(name) for name in own if name not in fitting))
        log.warning(f"{told}; others start from scratch in {others}: does --init have the student's sizes?")


def _part_of(name: str) -> str:
    """The part of the detector that a weight belongs to: encoder.layers, backbone.body, level_embedding ..."""
    return ".".join(name.split(".")[:2])


def prepare_feed(config: TrainConfig, data: Data, ranks: Ranks, device: torch.device) -> Feed:
    """The samples of the store or, without one, fresh views. Cached targets are read only if a loss needs them."""
    batch_size, options = config.optimisation.batch_size, config.data
    least = ranks.world_size * config.speed.accumulate
    if batch_size < least:
        raise UserError(
            f"expected --batch-size of {least} or more, an image for each process and part, found {batch_size}"
        )
    if data.reader is not None:
        source: CachedViews | FreshViews = CachedViews(data.train, data.reader)
    else:
        source = FreshViews(data.train, data.policy, config.optimisation.seed)
    check_steps(len(source), batch_size, ranks)
    feed_options = FeedOptions(
        batch_size=batch_size,
        seed=config.optimisation.seed,
        accumulate=config.speed.accumulate,
        similar_sizes=config.speed.similar_sizes,
        workers=options.workers,
        prefetch=options.prefetch,
        skip_broken=options.skip_broken,
        skip_corrupt=options.on_corrupt == "skip",
    )
    teachers = data.teachers if config.distillation.active and config.distillation.live_teacher is None else None
    if teachers is not None:
        teachers.prepare(needed_fields(config.distillation), config.optimisation.seed)
    return Feed(source, data.train, teachers, feed_options, ranks, pin=device.type == "cuda")


def check_steps(images: int, batch_size: int, ranks: Ranks) -> None:
    """UserError where an epoch has no step, for want of images; warns where it has no whole one."""
    if steps_per_epoch(images, batch_size, ranks) == 0:
        raise UserError(
            f"expected at least {ranks.world_size} training images, one for each process, found {images}: look at the"
            " split and --subset, or use fewer processes"
        )
    if images < batch_size:
        log.warning(f"--batch-size {batch_size} is more than the {images} training images: each step has all of them")
