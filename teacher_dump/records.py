"""Records of an existing store, as they were given to its writer."""

from __future__ import annotations

from collections.abc import Sequence

from common.cache.reader import CacheReader
from common.cache.validate import check_record
from common.cache.writer import Record
from common.errors import UserError


def stored_records(reader: CacheReader, rows: Sequence[int]) -> list[Record]:
    """The stored fields of these samples, still encoded. UserError where a record cannot be a teacher's answer."""
    batch = reader.read(rows)
    bounds = batch.token_offsets.tolist()
    records: list[Record] = []
    for index, row in enumerate(rows):
        of_sample = {"token": slice(*bounds[index : index + 2]), "sample": index}
        record = {field.name: getattr(batch, field.name).numpy()[of_sample[field.per]] for field in reader.fields}
        tokens = int(reader.table.level_shapes[row].prod(axis=1).sum())
        for field in reader.fields if not reader.blank[row] else ():
            try:
                check_record(field, record[field.name], tokens)
            except ValueError as error:
                image_id, view = reader.table.image_id[row], reader.table.view[row]
                raise UserError(
                    f"{reader.path}: the record of image {image_id}, view {view} makes no sense ({error});"
                    f" `python -m teacher_dump repair {reader.path}` mends it"
                ) from None
        records.append(record)
    return records
