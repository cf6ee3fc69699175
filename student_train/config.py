"""What a user can choose. The docstrings under the fields are the help that `python -m student_train --help` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from common.errors import UserError
from student_train.students import student_named

OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalInts = Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT ...", help_behavior_hint="")]
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Config = TypeVar("Config")


@dataclass(frozen=True)
class DataOptions:
    cache: OptionalPath = None
    """Store written by teacher_dump. Without one the student is trained plainly, on views drawn afresh each epoch."""
    data: Path = Path("data/coco")
    """Folder in COCO's layout: annotations/instances_SPLIT.json and SPLIT/*.jpg."""
    split: str = "train2017"
    """Split to train on; with a cache, the one that was cached."""
    val_split: str = "val2017"
    """Split to evaluate on."""
    sizes: OptionalInts = None
    """Short sides in pixels to draw from, instead of Deformable DETR's 480, 512, ... 800; no crops then. A cache
    brings its own augmentation."""
    skip_broken: bool = False
    """Go on without images that cannot be decoded, and list them."""
    workers: int = 4
    """Threads that decode images and replay their augmentation."""
    prefetch: int = 3
    """Batches prepared ahead of the step."""


@dataclass(frozen=True)
class ModelOptions:
    student: Annotated[str, tyro.conf.arg(metavar="NAME")] = "r50"
    """Deformable DETR with this backbone: r50, r18, r34, r101, mobilenet_v2, or timm:NAME for one of timm's. tiny is
    for drawn scenes, tiny_teacher its teacher."""
    backbone_weights: OptionalPath = None
    """torchvision's (or timm's) ImageNet weights of the backbone, a .pth or .safetensors file."""
    init: OptionalPath = None
    """Checkpoint to start from, e.g. the teacher's: every weight whose name and shape fit is taken over."""
    width: OptionalInt = None
    """Channels of encoder and decoder. (default: 256; tiny: 64)"""
    queries: OptionalInt = None
    """Object queries. (default: 300; tiny: 40)"""
    encoder_layers: OptionalInt = None
    """Layers of the encoder. (default: 6; tiny: 1)"""
    decoder_layers: OptionalInt = None
    """Layers of the decoder. (default: 6; tiny: 3)"""
    refine: bool = True
    """Iterative bounding box refinement."""
    two_stage: bool = False
    """Queries from the encoder's best proposals."""


@dataclass(frozen=True)
class DistillationOptions:
    mode: Literal["paper", "released"] = "paper"
    """What the article describes, or what its authors' code computes (docs/losses.md)."""
    logits_weight: float = 1.0
    """Hungarian-matching logits distillation."""
    feature_weight: float = 20.0
    """Target-aware feature distillation."""
    assignment_weight: float = 1.0
    """Query-prior assignment distillation."""

    @property
    def active(self) -> bool:
        """Whether any loss needs the cached targets. With all weights 0, training is the plain baseline."""
        return any((self.logits_weight, self.feature_weight, self.assignment_weight))


@dataclass(frozen=True)
class OptimisationOptions:
    epochs: int = 50
    """Passes over the training images."""
    max_steps: OptionalInt = None
    """Stop after this many steps, even within an epoch."""
    batch_size: int = 4
    """Images of one step, over all processes. The recipe's is 32. At full size an image takes about 3 GB."""
    lr: float = 2e-4
    """Learning rate of AdamW; the recipe's, for 32 images a step."""
    backbone_lr_factor: OptionalFloat = None
    """Factor on the backbone's learning rate. (default: 0.1 with ImageNet weights, 1 without)"""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    clip: float = 0.1
    """Largest norm of the gradient; longer ones are scaled down to it. 0 leaves them as they are."""
    schedule: Literal["step", "cosine"] = "step"
    """step: a tenth of the learning rate from epoch --lr-drop on. cosine: down to 0 at the end."""
    lr_drop: int = 40
    """Epochs before the learning rate drops."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    seed: int = 0
    """Of the initial weights, the order of the samples and, without a cache, the views."""


@dataclass(frozen=True)
class OutputOptions:
    out: Path = Path("runs")
    """Folder of all runs."""
    name: OptionalName = None
    """Name of this run's folder. (default: student, date and time)"""
    resume: bool = False
    """Go on with the run of this name from its last checkpoint."""
    eval_every: int = 1
    """Epochs between evaluations; 0 evaluates at the end only."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a student, from a teacher's cache or plainly. (`python -m student_train evaluate --help`: its AP.)"""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def __post_init__(self) -> None:
        data, distillation, optimisation = self.data, self.distillation, self.optimisation
        for value, flag, least in (
            (data.workers, "--workers", 1),
            (data.prefetch, "--prefetch", 1),
            (optimisation.epochs, "--epochs", 1),
            (1 if optimisation.max_steps is None else optimisation.max_steps, "--max-steps", 1),
            (optimisation.batch_size, "--batch-size", 1),
            (optimisation.warmup_steps, "--warmup-steps", 0),
            (optimisation.lr, "--lr", 0),
            (optimisation.clip, "--clip", 0),
            (distillation.logits_weight, "--logits-weight", 0),
            (distillation.feature_weight, "--feature-weight", 0),
            (distillation.assignment_weight, "--assignment-weight", 0),
            (self.output.eval_every, "--eval-every", 0),
        ):
            if not value >= least:
                raise UserError(f"expected {flag} of {least} or more, found {value}")
        student_named(self.model.student)


@dataclass(frozen=True)
class EvaluateConfig:
    """Average precision of a checkpoint on a split."""

    checkpoint: Path
    """Detector to evaluate: a run's best.safetensors, or any file that --teacher accepts."""
    data: Path = Path("data/coco")
    """Folder in COCO's layout: annotations/instances_SPLIT.json and SPLIT/*.jpg."""
    split: str = "val2017"
    """Split to evaluate on."""
    sizes: OptionalInts = None
    """The short sides that training drew from: images are evaluated at the largest. (default: 800)"""
    batch_size: int = 4
    """Images of one forward pass."""
    workers: int = 4
    """Threads that decode images."""
    detections: OptionalPath = None
    """Also write the detections to this json file, in COCO's results format."""
    record: OptionalPath = None
    """Also note the result in this folder, as a run that `compare` shows beside others."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class CompareConfig:
    """A table of runs and a picture of their curves."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, e.g. runs/*."""
    out: Path = Path("compare.png")
    """Where to draw AP and loss over steps."""


@dataclass(frozen=True)
class PictureConfig:
    """A picture of what detectors find: some images of a split, one row of them for each checkpoint."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Detectors, e.g. runs/*/best.safetensors."""
    data: Path = Path("data/coco")
    """Folder in COCO's layout: annotations/instances_SPLIT.json and SPLIT/*.jpg."""
    split: str = "val2017"
    """Split to take the images from."""
    sizes: OptionalInts = None
    """The short sides that training drew from: images are shown to the detectors at the largest. (default: 800)"""
    images: int = 6
    """How many of the split's images, from the first on."""
    min_score: float = 0.3
    """Lowest score of a detection that is drawn."""
    out: Path = Path("detections.png")
    """Where to draw."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class ExportConfig:
    """A detector as files of another program."""

    checkpoint: Path
    """Detector to export: a run's best.safetensors, or any file that --teacher accepts."""
    to: Literal["transformers", "mmdet", "official", "onnx"]
    """transformers: a folder for from_pretrained. mmdet: MMDetection 3. official: Deformable DETR's own code. onnx: one
    file with pre- and post-processing."""
    out: Path
    """Where to write."""
    data: OptionalPath = None
    """Folder in COCO's layout whose categories the checkpoint learnt, where it does not say itself."""
    split: str = "val2017"
    """Split of --data whose annotations to read."""
    sizes: OptionalInts = None
    """The short sides that training drew from: the export is told to resize to the largest. (default: 800)"""
    image_size: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="HEIGHT WIDTH", help_behavior_hint="")] = None
    """onnx: take one image of this padded size, instead of any number of any size."""


def parse(config: type[Config], arguments: list[str], prog: str) -> Config:
    """Read the command line. A mistake in it ends the process with status 2 and the nearest option's name."""
    return tyro.cli(config, args=arguments, prog=prog, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
