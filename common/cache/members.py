"""A store of several teachers: a Zarr group of member stores, one for each teacher, over the same samples.

A member is a store like any other, at `STORE/NAME`: whatever reads one store reads a member by that path.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence

import numpy as np

from common.cache.schema import ATTRIBUTE
from common.cache.storage import TEMPORARY, Location, locate, publish_all
from common.errors import UserError

GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
RESERVED = ("average", "random", "best")  # what a student may be told to do with the members


def member_names(store: Location) -> tuple[str, ...]:
    """The teachers of a store of several, in alphabetical order; none where it is a store of one, or nothing yet."""
    storage = locate(store)
    if not storage.exists("zarr.json") or is_one_store(storage.read("zarr.json")):
        return ()
    names = [name for name in storage.folders("") if TEMPORARY not in name and storage.exists(f"{name}/zarr.json")]
    return tuple(sorted(name for name in names if is_one_store(storage.read(f"{name}/zarr.json"))))


def is_one_store(metadata: bytes) -> bool:
    """Whether a group's zarr.json is that of a store of one teacher, or so damaged that only its reader can tell."""
    try:
        return ATTRIBUTE in json.loads(metadata)["attributes"]
    except (ValueError, KeyError, TypeError):
        return True


def member_path(store: Location, name: str) -> str:
    """Where a member is."""
    return f"{locate(store)}/{name}"


def create_group(store: Location) -> None:
    """Make the group of several members, if it is not there. UserError where a store of one teacher is."""
    storage = locate(store)
    if not storage.exists("zarr.json"):
        file = storage.new_file("zarr.json")
        try:
            file.write([np.frombuffer(json.dumps(GROUP, indent=2).encode(), dtype=np.uint8)])
            publish_all([file])
        finally:
            file.discard()
    elif is_one_store(storage.read("zarr.json")):
        raise UserError(
            f"expected {storage} to be new or a store of several teachers, found a store of one: name another --out, or"
            f" move the store to OTHER/NAME and add to it with --out OTHER"
        )


def check_member_name(name: str) -> str:
    """The name itself. UserError unless it can be a folder's and means nothing else."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or TEMPORARY in name or name in RESERVED:
        raise UserError(
            f"expected a teacher's name of letters, digits, '.', '_' and '-', and none of {', '.join(RESERVED)}, found"
            f" {name!r}: choose one with --teacher NAME=TEACHER"
        )
    return name


def nearest(name: str, names: Sequence[str]) -> str:
    """The one of `names` that is spelt most like a mistaken name."""
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
