"""What users hand over: checkpoints, annotations, images, recipes and command lines, broken in every way."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.broken_checkpoints import broken_checkpoints
from tests.crafted_stores import alter_json
from tests.dump_cases import TEACHER
from tests.redteam.trials import Ended, Trial, run
from tests.training_cases import make_store

ONE_STEP = ("--student", "tiny", "--batch-size", 2, "--max-steps", 1, "--workers", 1, "--device", "cpu")
ONE_STEP += ("--out", "runs")


def break_checkpoints(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """Each broken checkpoint as a teacher, as a student to evaluate and as one to start from: refused in a line. (The
    generator names what the line must say; its own test holds that.)"""
    make_store(folder)
    (folder / "broken").mkdir()
    ways = (
        ("student_train", "evaluate", "--data", "scenes", "--device", "cpu", "--checkpoint"),
        ("teacher_dump", "--data", "scenes", "--device", "cpu", "--out", "out.zarr", "--teacher"),
        ("student_train", "--data", "scenes", *ONE_STEP, "--name", "x", "--init"),
    )
    for number, (path, _) in enumerate(broken_checkpoints(folder / "broken")):
        if number >= count:
            break
        way = ways[(number + seed) % len(ways)]
        ended = run(folder, *way, path)
        yield Trial(f"{path.name}: {' '.join(map(str, way))}", ended.failure or _expect_refusal(ended))


def _expect_refusal(ended: Ended) -> str | None:
    return None if ended.refused else f"exit status {ended.status} instead of a refusal: {ended.output[-500:]}"


def change_annotations(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """A random value of a random place of a json: `plan`, a dump and a plain training work or refuse in a line."""
    make_store(folder)
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        shutil.rmtree(folder / "data", ignore_errors=True)
        shutil.copytree(folder / "scenes", folder / "data")
        split = chance.choice(("train2017", "val2017"))
        told = [
            alter_json(folder / "data/annotations" / f"instances_{split}.json", (), chance)
            for _ in range(chance.choice((1, 1, 3)))
        ]
        yield Trial(f"{split}: {'; '.join(told)}", _use(folder, f"{number}"))


def _use(folder: Path, name: str) -> str | None:
    """What goes wrong with folder/data in a dump and a plain training of one step with its evaluation."""
    shutil.rmtree(folder / "out.zarr", ignore_errors=True)
    data = ("--data", "data", "--sizes", 64)
    dumped = run(folder, "teacher_dump", *data, "--teacher", TEACHER, "--device", "cpu", "--out", "out.zarr")
    trained = run(folder, "student_train", *data, *ONE_STEP, "--name", name)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    if trained.status == 0 and "nan" in trained.output.splitlines()[-1].lower():
        return f"an AP that is no number: {trained.output[-300:]}"
    return dumped.failure or trained.failure


def damage_images(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """One image file cut, flipped, emptied, replaced or gone: a dump and a training with and without --skip-broken work
    or refuse in a line that names a file."""
    make_store(folder)
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        shutil.rmtree(folder / "data", ignore_errors=True)
        shutil.copytree(folder / "scenes", folder / "data")
        path = chance.choice(sorted((folder / "data" / chance.choice(("train2017", "val2017"))).iterdir()))
        what = _damage(path, chance)
        yield Trial(f"{path.parent.name}/{path.name} {what}", _use(folder, f"{number}"))


def _damage(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    what = chance.choice(("cut", "flipped", "emptied", "gone", "a folder", "a page", "another", "a link to itself"))
    path.unlink()
    if what == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif what == "flipped":
        for _ in range(chance.choice((1, 20))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif what == "emptied":
        path.touch()
    elif what == "a folder":
        path.mkdir()
    elif what == "a page":
        path.write_text("<html>not found</html>")
    elif what == "another":
        shutil.copy(chance.choice(sorted(path.parent.iterdir())), path)
    elif what == "a link to itself":
        path.symlink_to(path)
    return what


def change_recipes(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """The record of a run with a random value in a random place, as a recipe: it works or is refused in a line."""
    make_store(folder)
    made = run(folder, "student_train", "--data", "scenes", "--sizes", 64, *ONE_STEP, "--name", "made")
    assert made.status == 0, made.output
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        recipe = folder / "recipe.json"
        shutil.copy(folder / "runs/made/run.json", recipe)
        told = alter_json(recipe, ("config",), chance)
        if any(word in told for word in ("workers", "prefetch", "processes")):
            continue  # as many threads as one asks for
        ended = run(folder, "student_train", "--config", recipe, "--name", f"r{number}", "--max-steps", 1)
        yield Trial(told, ended.failure)


MISTAKES = """
student_train
student_train predict x.png
student_train val
student_train --version
student_train trian --cache store.zarr
student_train --cache
student_train --cache nope.zarr --data scenes
student_train --cache scenes --data scenes
student_train --cache store.zarr
student_train --cache store.zarr --data nope
student_train --cache store.zarr --data scenes --split nope
student_train --cache store.zarr --data scenes --val-split nope
student_train --cache store.zarr --data scenes --student nope
student_train --cache store.zarr --data scenes --student timm:resnet5
student_train --cache store.zarr --data scenes --student tiny --device nope
student_train --cache store.zarr --data scenes --student tiny --device cuda:99
student_train --cache store.zarr --data scenes --student tiny --device mps
student_train --cache store.zarr --data scenes --student tiny --device 0
student_train --cache store.zarr --data scenes --student tiny --device -1
student_train --cache store.zarr --data scenes --student tiny --device meta
student_train --cache store.zarr --data scenes --student tiny --batch-size 0
student_train --cache store.zarr --data scenes --student tiny --batch-size -4
student_train --cache store.zarr --data scenes --student tiny --batch-size four
student_train --cache store.zarr --data scenes --student tiny --batch-size 1000000
student_train --cache store.zarr --data scenes --student tiny --batch-size 4 --accumulate 0
student_train --cache store.zarr --data scenes --student tiny --batch-size 4 --accumulate 3
student_train --cache store.zarr --data scenes --student tiny --batch-size 4 --accumulate 8
student_train --cache store.zarr --data scenes --student tiny --lr -1
student_train --cache store.zarr --data scenes --student tiny --lr nan
student_train --cache store.zarr --data scenes --student tiny --lr inf
student_train --cache store.zarr --data scenes --student tiny --epochs 0
student_train --cache store.zarr --data scenes --student tiny --epochs -1
student_train --cache store.zarr --data scenes --student tiny --epoch 1
student_train --cache store.zarr --data scenes --student tiny --max-steps 0
student_train --cache store.zarr --data scenes --student tiny --max-steps -5
student_train --cache store.zarr --data scenes --student tiny --warmup-steps -5
student_train --cache store.zarr --data scenes --student tiny --schedule linear
student_train --cache store.zarr --data scenes --student tiny --clip -1
student_train --cache store.zarr --data scenes --student tiny --ema 2
student_train --cache store.zarr --data scenes --student tiny --amp fp8
student_train --cache store.zarr --data scenes --student tiny --sizes 64
student_train --cache store.zarr --data scenes --student tiny --mode released
student_train --cache store.zarr --data scenes --student tiny --mode nope
student_train --cache store.zarr --data scenes --student tiny --logits-weight -1
student_train --cache store.zarr --data scenes --student tiny --feature-weight nan
student_train --cache store.zarr --data scenes --student tiny --teachers nope
student_train --cache store.zarr --data scenes --student tiny --init nope.pth
student_train --cache store.zarr --data scenes --student tiny --init scenes
student_train --cache store.zarr --data scenes --student r50 --backbone-weights nope.pth
student_train --cache store.zarr --data scenes --student r50 --backbone-weights recipe.toml
student_train --cache store.zarr --data scenes --student tiny --subset 0
student_train --cache store.zarr --data scenes --student tiny --subset 2.5
student_train --cache store.zarr --data scenes --student tiny --subset -1
student_train --cache store.zarr --data scenes --student tiny --workers 0
student_train --cache store.zarr --data scenes --student tiny --workers -1
student_train --cache store.zarr --data scenes --student tiny --prefetch 0
student_train --cache store.zarr --data scenes --student tiny --name ../evil
student_train --cache store.zarr --data scenes --student tiny --name /tmp/evil
student_train --cache store.zarr --data scenes --student tiny --name .
student_train --cache store.zarr --data scenes --student tiny --out recipe.toml
student_train --cache store.zarr --data scenes --student tiny --out /proc/x
student_train --cache store.zarr --data scenes --student tiny --resume --name nope
student_train --cache store.zarr --data scenes --student tiny --keep 0
student_train --cache store.zarr --data scenes --student tiny --seed -1
student_train --cache store.zarr --data scenes --student tiny --track tensorboard
student_train --cache store.zarr --data scenes --student tiny --track nope
student_train --cache store.zarr --data scenes --student tiny --local-cache recipe.toml
student_train --cache store.zarr --data scenes --student tiny --live-teacher nope.pth
student_train --cache s3://nope/store.zarr/../x --data scenes --student tiny
student_train --cache ftp://nope/store.zarr --data scenes --student tiny
student_train --config nope.toml
student_train --config scenes
student_train --config broken.toml
student_train --config store.zarr/zarr.json
student_train model=r50 data=coco.yaml
student_train --imgsz 640
student_train evaluate
student_train evaluate --checkpoint nope.pth --data scenes
student_train evaluate --checkpoint student.safetensors --data nope
student_train evaluate --checkpoint student.safetensors --data scenes --split nope
student_train evaluate --checkpoint student.safetensors --data scenes --sizes 0
student_train evaluate --checkpoint student.safetensors --data scenes --sizes -5
student_train evaluate --checkpoint student.safetensors --data scenes --batch-size 0
student_train evaluate --checkpoint student.safetensors --data scenes --detections /proc/x.json
student_train evaluate --checkpoint student.safetensors --data scenes --record .
student_train compare
student_train compare nope
student_train compare scenes
student_train compare runs/made --out /proc/x.png
student_train compare runs/made --out x.nope
student_train picture
student_train picture nope.pth --data scenes
student_train picture student.safetensors --data scenes --out /proc/x.png
student_train picture student.safetensors --data scenes --images 0
student_train picture student.safetensors --data scenes --min-score 7
student_train export
student_train export nope.pth out
student_train export --checkpoint student.safetensors --to nope
student_train export --checkpoint student.safetensors --to onnx --out /proc/x
student_train sweep
student_train sweep nope.toml
student_train sweep broken.toml
student_train sweep recipe.toml
student_train sweep evil.toml
teacher_dump
teacher_dump --view 4
teacher_dump nope
teacher_dump --data scenes
teacher_dump --data scenes --teacher nope.pth
teacher_dump --data scenes --teacher random:nope
teacher_dump --data scenes --teacher hf:nope
teacher_dump --data scenes --teacher OWNER/MODEL
teacher_dump --data scenes --teacher recipe.toml
teacher_dump --data scenes --teacher random:tiny random:tiny
teacher_dump --data scenes --teacher a/b=random:tiny
teacher_dump --data scenes --teacher random:tiny --split nope
teacher_dump --data scenes --teacher random:tiny --views 0
teacher_dump --data scenes --teacher random:tiny --views -2
teacher_dump --data scenes --teacher random:tiny --views 99999999999
teacher_dump --data scenes --teacher random:tiny --sizes 0
teacher_dump --data scenes --teacher random:tiny --sizes 99999999
teacher_dump --data scenes --teacher random:tiny --preset nope
teacher_dump --data scenes --teacher random:tiny --tokens int3
teacher_dump --data scenes --teacher random:tiny --keep-tokens 0
teacher_dump --data scenes --teacher random:tiny --keep-tokens 2
teacher_dump --data scenes --teacher random:tiny --neck --keep-tokens .5
teacher_dump --data scenes --teacher random:tiny --batch-size 0
teacher_dump --data scenes --teacher random:tiny --workers 0
teacher_dump --data scenes --teacher random:tiny --subset 0
teacher_dump --data scenes --teacher random:tiny --seed -1
teacher_dump --data scenes --teacher random:tiny --out recipe.toml
teacher_dump --data scenes --teacher random:tiny --out scenes
teacher_dump --data scenes --teacher random:tiny --out /proc/store.zarr
teacher_dump --data scenes --teacher random:tiny --out store.zarr
teacher_dump --data scenes --teacher random:tiny --device cuda:99
teacher_dump --data scenes --teacher random:tiny --teacher-size 0 5
teacher_dump plan --data nope
teacher_dump plan --data scenes --teacher random:tiny --measure -1
teacher_dump verify
teacher_dump verify nope.zarr
teacher_dump verify scenes
teacher_dump verify recipe.toml
teacher_dump verify store.zarr --threads 0
teacher_dump verify store.zarr --against-teacher 2
teacher_dump verify store.zarr --against-teacher -2
teacher_dump repair nope.zarr
teacher_dump repair scenes
teacher_dump inspect nope.zarr
teacher_dump inspect store.zarr --image-id 123456 --data scenes
teacher_dump inspect store.zarr --image-id frame.jpg --data scenes
teacher_dump inspect store.zarr --image-id 1
teacher_dump inspect store.zarr --image-id 1 --view 99 --data scenes
teacher_dump transcode store.zarr
teacher_dump transcode store.zarr store.zarr
teacher_dump transcode store.zarr scenes
teacher_dump transcode nope.zarr out2.zarr
teacher_dump transcode store.zarr out3.zarr --tokens int99
teacher_dump transcode store.zarr out4.zarr --keep-tokens 3
teacher_dump prune store.zarr
teacher_dump prune store.zarr --teacher nope
teacher_dump prune nope.zarr nope2.zarr
"""


def mistake_commands(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """Command lines with a mistake each: refused, at most in a screen of help, or understood; never a traceback."""
    folder = folder / "inside"  # what leaves it is seen
    folder.mkdir()
    make_store(folder)
    made = run(folder, "student_train", "--data", "scenes", "--sizes", 64, *ONE_STEP, "--name", "made")
    assert made.status == 0, made.output
    shutil.copy(folder / "runs/made/last.safetensors", folder / "student.safetensors")
    (folder / "recipe.toml").write_text("[data]\nworkers = 1\n")
    (folder / "broken.toml").write_text("[data\n" + "a = [" * 5000)
    (folder / "evil.toml").write_text('[[runs]]\nname = "../../evil"\n')
    lines = MISTAKES.strip().splitlines()
    random.Random(seed).shuffle(lines)
    for number, line in enumerate(lines[:count]):
        program, *arguments = line.split()
        trains = "--cache store.zarr" in line
        limits = ("--max-steps", 1) if trains and "--max-steps" not in line else ()
        limits += ("--out", f"runs{number}") if trains and "--out" not in line else ()
        ended = run(folder, program, *arguments, *limits)
        yield Trial(line, ended.failure)
    if outside := [path.name for path in folder.parent.iterdir() if path != folder]:
        yield Trial("all of them", f"left outside their folder: {outside[:3]}")
