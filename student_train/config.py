"""What a user can choose. The docstrings under the fields are the help that `python -m student_train --help` prints."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from common.detr.presets import preset_named
from common.errors import UserError
from common.pixel_rule import Exif
from common.ranges import MAX_SEED, MAX_SIDE_PX, AtLeast, AtMost, check_ranges
from student_train.recipe import configured, read_recipe, recipe_of

OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalStore = Annotated[str | None, tyro.conf.arg(metavar="STORE", help_behavior_hint="")]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalInts = Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT ...", help_behavior_hint="")]
OptionalSides = Annotated[OptionalInts, AtLeast(1), AtMost(MAX_SIDE_PX)]
OptionalSize = Annotated[
    tuple[int, int] | None, AtLeast(1), tyro.conf.arg(metavar="HEIGHT WIDTH", help_behavior_hint="")
]
OptionalSubset = Annotated[int | float | None, tyro.conf.arg(metavar="N|FRACTION", help_behavior_hint="")]
AtLeastOne = Annotated[int, AtLeast(1)]
NotNegative = Annotated[int, AtLeast(0)]
NotNegativeFloat = Annotated[float, AtLeast(0)]
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
OptionalExif = Annotated[Exif | None, tyro.conf.arg(metavar="{auto,apply,ignore}", help_behavior_hint="")]
Config = TypeVar("Config")

_PART = r"\w(?:[\w.:+=,@ -]*[\w.:+=,@-])?"
RUN_NAME = re.compile(rf"{_PART}(?:/{_PART})*")  # a folder, or one in another
MARKERS = (tyro.conf.OmitArgPrefixes,)
RUN, METRICS = "run.json", "metrics.jsonl"  # in a run's folder: how it was started; a line a step and evaluation
RECIPE_BATCH_SIZE = 32  # for which the learning rate is meant


@dataclass(frozen=True)
class DataOptions:
    cache: OptionalStore = None
    """Store written by teacher_dump, a folder or a bucket's URL. Without one, training is plain, on fresh views."""
    teachers: OptionalName = None
    """Of a store of several (docs/teachers.md): average, random, best, or one by its name. (default: average)"""
    local_cache: OptionalPath = None
    """Folder for copies of what is fetched from a bucket."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """Damaged records: stop, or train on other samples instead and list them."""
    data: Path = Path("data/coco")
    """Folder in COCO's layout: annotations/instances_SPLIT.json and SPLIT/*.jpg."""
    split: str = "train2017"
    """Split to train on; with a cache, the one that was cached."""
    image_folder: OptionalPath = None
    """Folder of the images of both splits. (default: DATA/SPLIT)"""
    subset: OptionalSubset = None
    """So many images, or that fraction, always the same. (default: all, with a cache those of its finished shards)"""
    val_split: str = "val2017"
    """Split to evaluate on."""
    sizes: OptionalSides = None
    """Without a cache: short sides in pixels to draw from, instead of 480, 512, ... 800; no crops then."""
    exif: OptionalExif = None
    """EXIF's orientation; auto: where the annotated size allows it. (default: auto; with a cache, its own)"""
    skip_broken: bool = False
    """Train on other samples in the place of images that cannot be decoded, and list them."""
    workers: AtLeastOne = 4
    """Threads that decode and augment images."""
    prefetch: AtLeastOne = 3
    """Steps prepared ahead."""


@dataclass(frozen=True)
class ModelOptions:
    student: Annotated[str, tyro.conf.arg(metavar="NAME")] = "r50"
    """Deformable DETR with this backbone: r50, r18, r34, r101, mobilenet_v2, mobilenet_v2_1280
    (DETRDistill's), or timm:NAME. tiny is for drawn scenes, tiny_teacher its teacher."""
    backbone_weights: OptionalPath = None
    """torchvision's (or timm's) ImageNet weights of the backbone, a .pth or .safetensors file."""
    init: OptionalPath = None
    """Checkpoint to start from, e.g. the teacher's: every weight whose name and shape fit is taken over."""
    width: Annotated[OptionalInt, AtLeast(1), AtMost(65536)] = None
    """Channels of encoder and decoder. (default: 256; tiny: 64)"""
    queries: Annotated[OptionalInt, AtLeast(1), AtMost(65536)] = None
    """Object queries. (default: 300; tiny: 40)"""
    encoder_layers: Annotated[OptionalInt, AtLeast(1), AtMost(65536)] = None
    """Layers of the encoder. (default: 6; tiny: 1)"""
    decoder_layers: Annotated[OptionalInt, AtLeast(1), AtMost(65536)] = None
    """Layers of the decoder. (default: 6; tiny: 3)"""
    refine: bool = True
    """Iterative bounding box refinement."""
    two_stage: bool = False
    """Queries from the encoder's best proposals."""


@dataclass(frozen=True)
class LossWeights:
    """What each distillation loss is multiplied by; one of weight 0 is not computed."""

    logits: float
    features: float
    assignment: float
    contrastive: float
    fgd: float


Mode = Literal["paper", "released"]
MODE_WEIGHTS: dict[Mode, LossWeights] = {
    "paper": LossWeights(logits=1, features=20, assignment=1, contrastive=0, fgd=0),
    "released": LossWeights(logits=1, features=1, assignment=1, contrastive=0.2, fgd=0),
}
BALANCED_WEIGHTS: dict[Mode, LossWeights] = {  # with --balance, as ratios of gradients: docs/losses.md
    "paper": LossWeights(logits=1, features=10, assignment=1, contrastive=0, fgd=0),
    "released": LossWeights(logits=1, features=10, assignment=1, contrastive=0.2, fgd=0),
}


@dataclass(frozen=True)
class DistillationOptions:
    mode: Mode = "paper"
    """What the article describes, or what its authors' code computes (docs/losses.md)."""
    logits_weight: Annotated[OptionalFloat, AtLeast(0)] = None
    """Hungarian-matching logits distillation. (default: 1)"""
    feature_weight: Annotated[OptionalFloat, AtLeast(0)] = None
    """Target-aware feature distillation. (default: paper 20, released 1; with --balance 10)"""
    assignment_weight: Annotated[OptionalFloat, AtLeast(0)] = None
    """Query-prior assignment distillation. (default: 1)"""
    contrastive_weight: Annotated[OptionalFloat, AtLeast(0)] = None
    """Contrastive loss between matched queries. (default: paper 0, released 0.2)"""
    fgd_weight: Annotated[OptionalFloat, AtLeast(0)] = None
    """FGD, focal and global distillation of the neck's features. (default: 0)"""
    balance: bool = False
    """Scale each distillation loss by itself, again and again, so that its gradient is its weight times as long as
    that of the detection losses: weights are ratios then, the same for any data and student."""
    live_teacher: OptionalPath = None
    """For comparison only: run this teacher beside the student instead of reading its targets from the cache."""

    @property
    def weights(self) -> LossWeights:
        """The weights as given, the mode's where they were not."""
        usual = (BALANCED_WEIGHTS if self.balance else MODE_WEIGHTS)[self.mode]
        given = {
            "logits": self.logits_weight,
            "features": self.feature_weight,
            "assignment": self.assignment_weight,
            "contrastive": self.contrastive_weight,
            "fgd": self.fgd_weight,
        }
        return replace(usual, **{name: weight for name, weight in given.items() if weight is not None})

    @property
    def needs_memory(self) -> bool:
        """Whether a loss compares encoder outputs."""
        return self.mode == "paper" and self.weights.features > 0

    @property
    def needs_neck(self) -> bool:
        """Whether a loss compares encoder inputs."""
        return self.weights.fgd > 0 or (self.mode == "released" and self.weights.features > 0)

    def without_losses(self) -> DistillationOptions:
        """All weights 0: plain training."""
        return DistillationOptions(self.mode, 0.0, 0.0, 0.0, 0.0, 0.0)

    @property
    def active(self) -> bool:
        """Whether any loss needs the teacher's targets. With all weights 0, training is the plain baseline."""
        return any(vars(self.weights).values())


@dataclass(frozen=True)
class OptimisationOptions:
    epochs: AtLeastOne = 50
    """Passes over the training images."""
    max_steps: Annotated[OptionalInt, AtLeast(1)] = None
    """Stop after this many steps, even within an epoch."""
    batch_size: AtLeastOne = 4
    """Images of one step, over all processes. The recipe's is 32. At full size an image takes about 3 GB."""
    lr: NotNegativeFloat = 2e-4
    """Learning rate of AdamW; the recipe's, for 32 images a step."""
    scale_lr: bool = False
    """Multiply the learning rate by batch size / 32."""
    backbone_lr_factor: Annotated[OptionalFloat, AtLeast(0)] = None
    """Factor on the backbone's learning rate. (default: 0.1 with ImageNet weights, 1 without)"""
    weight_decay: NotNegativeFloat = 1e-4
    """Weight decay of AdamW."""
    clip: NotNegativeFloat = 0.1
    """Largest norm of the gradient; longer ones are scaled down to it. 0 leaves them as they are."""
    schedule: Literal["step", "cosine"] = "step"
    """step: a tenth of the learning rate from epoch --lr-drop on. cosine: down to 0 at the end."""
    lr_drop: NotNegative = 40
    """Epochs before the learning rate drops."""
    warmup_steps: NotNegative = 0
    """Steps over which the learning rate rises from 0."""
    ema: OptionalFloat = None
    """Evaluate and save the moving average of the weights, of this decay, e.g. 0.9997."""
    seed: Annotated[int, AtLeast(0), AtMost(MAX_SEED)] = 0
    """Of the initial weights, the order of the samples and, without a cache, the views."""

    @property
    def scaled_lr(self) -> float:
        """The learning rate that is used."""
        return self.lr * self.batch_size / RECIPE_BATCH_SIZE if self.scale_lr else self.lr


@dataclass(frozen=True)
class SpeedOptions:
    accumulate: AtLeastOne = 1
    """Parts that the images of a step go through the student in, one after another: less memory, the same gradient."""
    checkpoint_encoder: bool = False
    """Compute the encoder twice instead of keeping all of it for the backward pass."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Automatic mixed precision."""
    compile: bool = False
    """torch.compile feed-forward layers and, on a GPU, the backbone: minutes at first."""
    similar_sizes: bool = True
    """Images of similar size share a step, which saves padding."""


@dataclass(frozen=True)
class OutputOptions:
    out: Path = Path("runs")
    """Folder of all runs."""
    name: OptionalName = None
    """Name of this run's folder. (default: student, date and time)"""
    resume: bool = False
    """Go on with the run of this name. (After Ctrl-C, SIGTERM and SIGHUP it has saved itself:
    --config runs/NAME/run.json --resume.)"""
    checkpoint_every: NotNegative = 1000
    """Steps between checkpoints; there is one after each epoch, too. 0: only those."""
    keep: AtLeastOne = 2
    """Newest checkpoints to keep, beside the best student."""
    log_every: NotNegative = 50
    """Steps between lines of the log; 0 for none."""
    eval_every: NotNegative = 1
    """Epochs between evaluations; 0 evaluates at the end only."""
    track: Annotated[Literal["wandb", "mlflow"] | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Also report to Weights & Biases or MLflow, whose package has to be installed."""
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
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    recipe: Annotated[Path | None, tyro.conf.arg(name="config", metavar="FILE", help_behavior_hint="")] = None
    """Read these options from a TOML file, or from run.json of an earlier run; flags go before it."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if (ema := self.optimisation.ema) is not None and not 0 < ema < 1:
            raise UserError(f"expected --ema between 0 and 1, such as 0.9997, found {ema}")
        if (name := self.output.name) is not None and not RUN_NAME.fullmatch(name):
            raise UserError(
                "expected --name of letters, digits and . : _ - + = , @ or spaces, which begins with a letter, a digit"
                f" or _ and stays below --out, found {name!r}"
            )
        preset_named(self.model.student, "--student ")


@dataclass(frozen=True)
class EvaluateConfig:
    """Average precision of a checkpoint on a split."""

    checkpoint: Path
    """Detector to evaluate: a run's best.safetensors, or any file that --teacher accepts."""
    data: Path = Path("data/coco")
    """Folder in COCO's layout: annotations/instances_SPLIT.json and SPLIT/*.jpg."""
    split: str = "val2017"
    """Split to evaluate on."""
    image_folder: OptionalPath = None
    """Folder of the images, which no file name leaves. (default: DATA/SPLIT)"""
    sizes: OptionalSides = None
    """The short sides that training drew from: images are evaluated at the largest. (default: as its file says)"""
    exif: Exif = "auto"
    """EXIF's orientation; auto: where the annotated size allows it."""
    batch_size: AtLeastOne = 4
    """Images of one forward pass."""
    workers: AtLeastOne = 4
    """Threads that decode images."""
    detections: OptionalPath = None
    """Also write the detections to this json file, in COCO's results format."""
    record: OptionalPath = None
    """Also note the result in this folder, as a run that `compare` shows beside others."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class SweepConfig:
    """Many runs from one list: a TOML file of [[run]] tables, each with a name and any options of a training by the
    names of their flags, and [defaults] for all. Finished runs are skipped, interrupted ones go on."""

    file: tyro.conf.Positional[Path]
    """The list of runs."""
    parallel: AtLeastOne = 1
    """Runs at a time, each on a GPU of its own while there are enough, with its output in log.txt in its folder."""
    dry_run: bool = False
    """Only say what would be done."""


@dataclass(frozen=True)
class CompareConfig:
    """A table of runs and a picture of their curves."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, e.g. runs/*."""
    out: Path = Path("compare.png")
    """Where to draw AP and loss over steps."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("expected the folders of some runs, such as runs/*, found none")


@dataclass(frozen=True)
class PictureConfig:
    """A picture of what detectors find: some images of a split, one row of them for each checkpoint."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Detectors, e.g. runs/*/best.safetensors."""
    data: Path = Path("data/coco")
    """Folder in COCO's layout: annotations/instances_SPLIT.json and SPLIT/*.jpg."""
    split: str = "val2017"
    """Split to take the images from."""
    image_folder: OptionalPath = None
    """Folder of the images, which no file name leaves. (default: DATA/SPLIT)"""
    sizes: OptionalSides = None
    """The short sides that training drew from: images are shown at the largest. (default: as their files say)"""
    exif: Exif = "auto"
    """EXIF's orientation; auto: where the annotated size allows it."""
    images: AtLeastOne = 6
    """How many of the split's images, from the first on."""
    min_score: float = 0.3
    """Lowest score of a detection that is drawn; where none of an image reaches it, its three surest are."""
    out: Path = Path("detections.png")
    """Where to draw."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise UserError("expected some checkpoints, such as runs/*/best.safetensors, found none")


@dataclass(frozen=True)
class ExportConfig:
    """A detector as files of another program."""

    checkpoint: Path
    """Detector to export: a run's best.safetensors, or any file that --teacher accepts."""
    to: Literal["transformers", "mmdet", "mmdet2", "official", "onnx"]
    """transformers: a folder for from_pretrained. mmdet: MMDetection 3. mmdet2: MMDetection 2, and DETRDistill's code.
    official: Deformable DETR's own code. onnx: one file with pre- and post-processing."""
    out: Path
    """Where to write."""
    data: OptionalPath = None
    """Folder in COCO's layout whose categories the checkpoint learnt, where it does not say itself."""
    split: str = "val2017"
    """Split of --data whose annotations to read."""
    sizes: OptionalSides = None
    """The short sides that training drew from: the export is told to resize to the largest. (default: as its file
    says)"""
    image_size: OptionalSize = None
    """onnx: take one image of this padded size, instead of any number of any size."""


def parse(config: type[Config], arguments: list[str], prog: str) -> Config:
    """Read the command line. A mistake in it ends the process with status 2 and the nearest option's name."""
    options = tyro.cli(config, args=arguments, prog=prog, config=MARKERS)
    check_ranges(options)
    return options


def parse_train(arguments: list[str]) -> TrainConfig:
    """Read the command line of a training and, before it, the recipe that it names. UserError for a mistake in that."""
    defaults, recipe = TrainConfig(), recipe_of(arguments)
    if recipe is not None:
        values = read_recipe(recipe, resume="--resume" in arguments)
        defaults = configured(defaults, values, str(recipe))
    prog = "python -m student_train"
    return tyro.cli(TrainConfig, args=arguments, prog=prog, default=defaults, config=MARKERS)
