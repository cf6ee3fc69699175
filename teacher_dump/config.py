"""What a user of phase one can choose. The docstrings under the fields are the help that `--help` prints."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from common.cache.schema import CodecInfo, LogitsCodec, Rounding, TeacherAmp, TokenCodec
from common.errors import UserError
from common.inputs import is_missing
from common.pixel_rule import Exif
from common.ranges import MAX_SEED, MAX_SIDE_PX, AtLeast, AtMost, check_ranges

OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalSubset = Annotated[int | float | None, tyro.conf.arg(metavar="N|FRACTION", help_behavior_hint="")]
OptionalSize = Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="HEIGHT WIDTH", help_behavior_hint="")]
OptionalInts = Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT ...", help_behavior_hint="")]
AtLeastOne = Annotated[int, AtLeast(1)]
NotNegative = Annotated[int, AtLeast(0)]
RANDOM, TRANSFORMERS = "random:", "hf:"  # before a teacher's name, where it is no checkpoint
MAX_VIEWS = 10_000  # of an image: no training has more epochs
# A folder, or a bucket's URL, whose slashes pathlib would fold.
Place = Annotated[str | Path, tyro.conf.arg(metavar="PATH")]
StorePlace = Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
NewStorePlace = Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
OptionalSides = Annotated[OptionalInts, AtLeast(1), AtMost(MAX_SIDE_PX)]
PresetName = Literal["compact", "half", "full"]
Config = TypeVar("Config")

PRESETS: dict[PresetName, CodecInfo] = {
    "compact": CodecInfo("pq8", 1.0, queries=False, logits="uint8"),
    "half": CodecInfo("fp16", 1.0),
    "full": CodecInfo("fp32", 1.0, neck=True),
}


@dataclass(frozen=True)
class DataOptions:
    """The images and how they are augmented."""

    data: Path = Path("data/coco")
    """Folder with annotations/instances_SPLIT.json and the splits' images, in COCO's layout."""
    split: str = "train2017"
    """Split to dump."""
    image_folder: OptionalPath = None
    """Folder of the images, which no file name leaves. (default: DATA/SPLIT)"""
    subset: OptionalSubset = None
    """Only so many of its images, or that fraction of them: the same ones in every store. (default: all)"""
    views: Annotated[int, AtLeast(1), AtMost(MAX_VIEWS)] = 1
    """Augmentations of every image. Epoch e of a student sees view e modulo this."""
    seed: Annotated[int, AtLeast(0), AtMost(MAX_SEED)] = 0
    """Seed of the augmentations and of the token sampling."""
    sizes: OptionalSides = None
    """Short sides in pixels to draw from, instead of Deformable DETR's 480, 512, ... 800; no crops then."""
    augment: bool = True
    """Mirror, crop and resize at random. --no-augment shows whole images at their largest size, as evaluation does."""
    exif: Annotated[Exif | None, tyro.conf.arg(metavar="{auto,apply,ignore}", help_behavior_hint="")] = None
    """EXIF's orientation; auto: where the annotated size allows it. (default: auto; to complete a store, its own)"""
    skip_broken: bool = False
    """Leave out images that cannot be decoded and list them at the end, instead of stopping at the first."""
    workers: AtLeastOne = 4
    """Threads that decode and replay images."""


@dataclass(frozen=True)
class TeacherOptions:
    """The model that runs once."""

    teacher: Annotated[str | tuple[str, ...], tyro.conf.arg(metavar="TEACHER ...")] = "teacher.pth"
    """Checkpoint file (official Deformable DETR, MMDetection, DETRDistill, transformers, or a student of this project),
    hf:DIRECTORY for a detector of the DETR family from Hugging Face transformers (docs/teachers.md), or random:r101
    (r50, r18, ...) for a trial with untrained weights. Of several, or of one given as NAME=TEACHER, each gets a store
    of its own within the store, OUT/NAME; those that are there already stay."""
    teacher_size: Annotated[OptionalSize, AtLeast(1), AtMost(MAX_SIDE_PX)] = None
    """Pixels that an hf: teacher resizes every sample to, instead of what its preprocessor_config.json says."""
    batch_size: AtLeastOne = 4
    """Samples that the teacher sees at once."""
    amp: Literal["off", "tf32", "bf16"] = "off"
    """Run the teacher faster and less exactly (docs/fidelity.md): tf32 on a GPU, bf16 also on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    @property
    def precision(self) -> TeacherAmp | None:
        """As the store's manifest has it."""
        return None if self.amp == "off" else self.amp

    @property
    def teachers(self) -> tuple[str, ...]:
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher


@dataclass(frozen=True)
class StoreOptions:
    """What is stored and where."""

    out: Place = "store.zarr"
    """The store to write. An unfinished one of the same configuration is completed."""
    preset: PresetName = "compact"
    """What the following are unless they are given. compact: pq8, all tokens, uint8 logits, no queries: a twelfth of
    half's bytes (docs/fidelity.md). half: fp16, everything but the neck. full: fp32, the neck's features too, lossless
    and for every loss."""
    tokens: Annotated[
        TokenCodec | None, tyro.conf.arg(metavar="{fp32,fp16,int8,int4,pq4,pq8}", help_behavior_hint="")
    ] = None
    """How token features are stored: fp32 is lossless, int8 takes half of fp16's bytes, int4 little over a quarter, pq4
    an eighth and pq8 a sixteenth: bytes of product quantisation, one for 4 or 8 numbers."""
    rounding: Rounding = "nearest"
    """Of int8 and int4: nearest has the smaller error, stochastic none on average."""
    keep_tokens: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = None
    """Fraction of each sample's tokens to keep, drawn by their weight without bias; 1 keeps all."""
    neck: bool = False
    """Store the encoder's input too, all tokens of it: for --mode released and for FGD (docs/losses.md)."""
    queries: Annotated[bool | None, tyro.conf.arg(metavar="BOOL", help_behavior_hint="")] = None
    """True or False: store the decoder's output vectors, which only the contrastive loss of --mode released reads."""
    logits: Annotated[LogitsCodec | None, tyro.conf.arg(metavar="{float,uint8}", help_behavior_hint="")] = None
    """How logits are stored: float as float32 with fp32 tokens, else as float16; uint8 takes half of that and changes
    no score by more than .0031."""

    @property
    def codec(self) -> CodecInfo:
        preset = PRESETS[self.preset]
        tokens = preset.tokens if self.tokens is None else self.tokens
        return CodecInfo(
            tokens,
            preset.keep_tokens if self.keep_tokens is None else self.keep_tokens,
            preset.neck or self.neck,
            rounding_of(tokens, self.rounding),
            preset.queries if self.queries is None else self.queries,
            preset.logits if self.logits is None else self.logits,
        )


def split_name(teacher: str) -> tuple[str, str]:
    """`NAME=TEACHER` in two; the name is empty where there is none."""
    named = re.fullmatch(r"([A-Za-z0-9._-]+)=(.+)", teacher)
    return (named[1], named[2]) if named else ("", teacher)


def check_teacher(name: str) -> None:
    """UserError where a teacher is to be read from a checkpoint that is not there."""
    if not name.startswith((RANDOM, TRANSFORMERS)) and is_missing(Path(name)):
        raise UserError(
            f"expected a teacher's checkpoint, found no file {name}; name one with --teacher, train one with"
            " `python -m student_train --student r101`, or try the pipeline with --teacher random:r101"
        )


def rounding_of(tokens: TokenCodec, wanted: Rounding) -> Rounding:
    """Only int8 and int4 are rounded in more than one way; of the others equal stores have equal manifests.

    UserError for product quantisation, which has no two centroids to choose between on average.
    """
    if tokens in ("pq4", "pq8") and wanted == "stochastic":
        raise UserError(f"expected --rounding nearest with {tokens}, found stochastic; use int4 for that")
    return wanted if tokens in ("int8", "int4") else "nearest"


@dataclass(frozen=True)
class DumpConfig:
    """Run the teacher once over every augmented sample and write what students need to a Zarr store.

    Stopped at any moment, it goes on where it was when run again. Other commands, each with its own --help: plan
    (bytes, hours, before anything is run), verify, repair, inspect, transcode (a smaller store from a larger one) and
    prune: python -m teacher_dump COMMAND ...
    """

    data: DataOptions = field(default_factory=DataOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    store: StoreOptions = field(default_factory=StoreOptions)


@dataclass(frozen=True)
class PlanConfig:
    """Say what a dump with these options will write and cost, from annotations and parameters alone."""

    data: DataOptions = field(default_factory=DataOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    store: StoreOptions = field(default_factory=StoreOptions)
    measure: NotNegative = 0
    """Batches to run through the teacher on this machine, to say how long it will take. 0 runs nothing."""
    student_epochs: AtLeastOne = 50
    """Epochs of one student, for comparing with a teacher that runs live beside each student."""


@dataclass(frozen=True)
class SourceOptions:
    """Where the teacher and the images are that an existing store was made from."""

    teacher: str = "teacher.pth"
    """The teacher that wrote the store, as it was named then."""
    data: Path = Path("data/coco")
    """Folder of the data that was dumped."""
    image_folder: OptionalPath = None
    """Folder of the images, which no file name leaves. (default: DATA/SPLIT)"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: AtLeastOne = 4
    """Threads that decode and replay images."""


@dataclass(frozen=True)
class VerifyConfig:
    """Read a whole store and name everything in it that is damaged or missing. Exit status 1 if anything is."""

    store: StorePlace
    """The store to read."""
    against_teacher: NotNegative = 0
    """Also run this many samples through the teacher again and compare; needs --teacher and --data."""
    source: SourceOptions = field(default_factory=SourceOptions)
    threads: AtLeastOne = 4
    """Threads that read and check."""


@dataclass(frozen=True)
class RepairConfig:
    """Verify a store, and write the shards again that are damaged or missing, with the teacher that made the others."""

    store: StorePlace
    """The store to mend."""
    source: SourceOptions = field(default_factory=SourceOptions)
    skip_broken: bool = False
    """Go on where images cannot be decoded, as the dump's option of that name."""
    threads: AtLeastOne = 4
    """Threads that read and check."""


@dataclass(frozen=True)
class InspectConfig:
    """Print what is in a store; with --image-id, draw what it holds of one image."""

    store: StorePlace
    """The store to describe."""
    image_id: OptionalInt = None
    """Draw this image: ground truth, the teacher's predictions, the weight map and the kept tokens."""
    view: NotNegative = 0
    """Which of its views."""
    data: OptionalPath = None
    """Folder of the data that was dumped, for the image's pixels and boxes. Without --image-id: how much more
    the weight map gives to tokens inside of boxes. (default: data/coco with --image-id)"""
    image_folder: OptionalPath = None
    """Folder of the images, which no file name leaves. (default: DATA/SPLIT)"""
    out: OptionalPath = None
    """Where to write the drawing. (default: image-ID-view-VIEW.png)"""


@dataclass(frozen=True)
class TranscodeConfig:
    """Write a smaller store from a larger one, without the teacher: the same as a dump with these settings."""

    store: StorePlace
    """The complete store to read. With fp32 and all tokens, the result equals a dump's to the bit."""
    out: NewStorePlace
    """The store to write. An unfinished one of the same configuration is completed."""
    tokens: Annotated[TokenCodec | None, tyro.conf.arg(help_behavior_hint="")] = None
    """How token features are stored. (default: as in the store that is read)"""
    logits: Annotated[LogitsCodec | None, tyro.conf.arg(help_behavior_hint="")] = None
    """How logits are stored. (default: as in the store that is read)"""
    keep_tokens: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = None
    """Fraction of each sample's tokens to keep. (default: as in the store that is read)"""
    rounding: Rounding = "nearest"
    """Of tokens that become int8 or int4: nearest has the smaller error, stochastic none on average."""
    neck: bool = True
    """Keep the neck's features if the store has them and all tokens are kept; --no-neck leaves them out."""
    queries: bool = True
    """Keep the queries if the store has them; --no-queries leaves them out."""
    views: Annotated[OptionalInt, AtLeast(1)] = None
    """Keep only this many views, from the first. (default: all)"""


@dataclass(frozen=True)
class PruneConfig:
    """Make a store with less in it that shares the files of another (hard links): it takes no time and no space.

    Nothing is removed: delete the old store yourself to free what the new one does not share.
    """

    store: StorePlace
    """The store to take from."""
    out: NewStorePlace
    """The store to make."""
    views: Annotated[OptionalInt, AtLeast(1)] = None
    """Keep only this many views, from the first. (default: all)"""
    neck: bool = True
    """Keep the neck's features if the store has them; --no-neck leaves them out."""
    queries: bool = True
    """Keep the queries if the store has them; --no-queries leaves them out."""


def parse(config: type[Config], arguments: list[str], prog: str) -> Config:
    """Read the command line. A mistake in it ends the process with status 2 and the nearest option's name."""
    options = tyro.cli(config, args=arguments, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    check_ranges(options)
    return options
