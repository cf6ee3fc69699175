"""The seal of a shard file: 32 bytes that say whose it is, between its pages and its index.

A page's checksum does not say which sample the page belongs to, nor an index which shard: both would match in another
shard's place, or another store's. To Zarr, which finds pages by the index at the end of the file, the seal is a gap.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Collection
from typing import NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt

from common.cache.plan import SampleTable
from common.cache.schema import SEAL_BYTES, Field, Manifest
from common.cache.storage import Bytes, Storage
from common.cache.validate import manifest_checksum

SEALED = "sealed"  # group attribute: true where every shard file must have its seal
MAGIC = b"SEAL"
_LAYOUT = struct.Struct("<4s6I")  # and its crc32c


class Owner(NamedTuple):
    """Whose the files of a shard are. All are crc32c but `shard`, its number.

    store: of the manifest without what a store may lose and keep its shard files. samples: of the shard's rows of the
    sample table. skipped: of its marks of blank records.
    """

    store: int
    shard: int
    samples: int
    skipped: int


class Seal(NamedTuple):
    """What a shard file says of itself. field: crc32c of the field's name. pages: crc32c of the pages' checksums."""

    owner: Owner
    field: int
    pages: int

    def to_bytes(self) -> Bytes:
        content = _LAYOUT.pack(MAGIC, *self.owner, self.field, self.pages)
        return np.frombuffer(content + struct.pack("<I", google_crc32c.value(content)), dtype=np.uint8)

    @staticmethod
    def from_bytes(data: bytes) -> Seal | None:
        """None where there is no seal. ValueError if it is damaged."""
        if len(data) != SEAL_BYTES or not data.startswith(MAGIC):
            return None
        content = data[: _LAYOUT.size]
        if google_crc32c.value(content) != struct.unpack("<I", data[_LAYOUT.size :])[0]:
            raise ValueError("the checksum of its seal does not match")
        _, *owner, field, pages = _LAYOUT.unpack(content)
        return Seal(Owner(*owner), field, pages)


def owners(manifest: Manifest, table: SampleTable, skipped: Collection[int]) -> Callable[[int], Owner]:
    """Whose the files of each shard are, by its number. skipped: the store's rows whose records are blank."""
    layout, store = manifest.layout, _store_sum(manifest)
    columns = [getattr(table, name) for name in SampleTable.__dataclass_fields__]
    marks = np.zeros(layout.shards * layout.shard_samples, dtype=np.uint8)
    marks[np.fromiter(skipped, dtype=np.intp)] = 1

    def owner(shard: int) -> Owner:
        rows = slice(shard * layout.shard_samples, (shard + 1) * layout.shard_samples)
        samples = google_crc32c.value(b"".join(column[rows].tobytes() for column in columns))
        return Owner(store, shard, samples, google_crc32c.value(marks[rows].tobytes()))

    return owner


def field_sum(field: Field) -> int:
    return int(google_crc32c.value(field.name.encode()))


def pages_sum(sums: npt.NDArray[np.uint32]) -> int:
    """sums: the checksums of a file's pages, in their order."""
    return int(google_crc32c.value(sums.astype("<u4").tobytes()))


def is_sealed(storage: Storage) -> bool:
    """Whether every shard file of a store must have a seal: older ones were written without."""
    return json.loads(storage.read("zarr.json"))["attributes"].get(SEALED) is True


def _store_sum(manifest: Manifest) -> int:
    """Of what decides the bytes of a shard file: prune leaves views, the neck and the queries out of a store and shares
    the files of the rest."""
    value = manifest.to_json()
    for part, key in (("views", "views"), ("layout", "samples"), ("codec", "neck"), ("codec", "queries")):
        del value[part][key]
    return manifest_checksum(value)
