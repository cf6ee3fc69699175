"""Several teachers in one store: which members a dump writes, and where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from common.cache.members import check_member_name, member_names, member_path
from common.errors import UserError
from teacher_dump.config import RANDOM, TRANSFORMERS, DumpConfig, split_name

WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def one_by_one(config: DumpConfig) -> list[DumpConfig]:
    """A dump of one teacher for each that `config` names, in that order.

    A single teacher without a name of its own has the whole store; others have a member each. UserError for names that
    cannot be told apart, and for a nameless teacher where a store of several is.
    """
    given, out = config.teacher.teachers, config.store.out
    if not given:
        raise UserError("expected --teacher and at least one teacher, found none")
    named = [split_name(teacher) for teacher in given]
    if len(named) == 1 and not named[0][0]:
        if others := member_names(out):
            raise UserError(
                f"{out} is a store of several teachers ({', '.join(others)}): to add one, give it a name, --teacher"
                f" NAME={given[0]}; or name another --out"
            )
        return [config]
    names = [check_member_name(name or _usual_name(teacher)) for name, teacher in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"expected teachers of different names, found several called {twice[0]}: name them, --teacher NAME=TEACHER"
        )
    return [
        replace(
            config,
            teacher=replace(config.teacher, teacher=teacher),
            store=replace(config.store, out=member_path(out, name)),
        )
        for name, (_, teacher) in zip(names, named, strict=True)
    ]


def _usual_name(teacher: str) -> str:
    """`random:r101` -> r101, `hf:OWNER/MODEL` -> MODEL, `runs/r101.pth` -> r101."""
    path = Path(teacher.removeprefix(RANDOM).removeprefix(TRANSFORMERS))
    return path.stem if path.suffix in WEIGHT_FILES else path.name
