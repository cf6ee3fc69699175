"""Records of an existing store, as they were given to its writer."""

from __future__ import annotations

from collections.abc import Sequence

from common.cache.reader import CacheReader
from common.cache.writer import Record


def stored_records(reader: CacheReader, rows: Sequence[int]) -> list[Record]:
    """The stored fields of these samples, still encoded."""
    batch = reader.read(rows)
    bounds = batch.token_offsets.tolist()
    arrays = {field: getattr(batch, field.name).numpy() for field in reader.fields}
    return [
        {
            field.name: array[bounds[index] : bounds[index + 1]] if field.per == "token" else array[index]
            for field, array in arrays.items()
        }
        for index in range(len(rows))
    ]
