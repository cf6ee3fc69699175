"""Classes by name: which a detector tells apart, as its checkpoint says, and which of its outputs are the data's."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError


@dataclass(frozen=True)
class Categories:
    """The category id and the name of each class index 0..K-1: of annotations, or of a detector's outputs."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def named(self) -> bool:
        """Whether the names say more than the ids."""
        return any(name != str(i) for i, name in zip(self.ids, self.names, strict=True))

    def __str__(self) -> str:
        """The first names, and how many there are."""
        shown = ", ".join(self.names[:3])
        return shown if len(self.names) <= 3 else f"{shown} ... ({len(self.names)})"

    def to_metadata(self) -> dict[str, str]:
        """For `save_detector`: the categories section of a COCO json."""
        section = [{"id": i, "name": name} for i, name in zip(self.ids, self.names, strict=True)]
        return {"categories": json.dumps(section)}


def from_metadata(metadata: Mapping[str, str]) -> Categories | None:
    """The inverse of `to_metadata`; None where nothing is said of classes."""
    if "categories" not in metadata:
        return None
    section = json.loads(metadata["categories"])
    return Categories(tuple(item["id"] for item in section), tuple(item["name"] for item in section))


def from_transformers(config: Mapping[str, Any]) -> Categories | None:
    """Of a transformers config.json: `id2label`, and what our export adds to it, the data's category ids.

    None where the labels are placeholders. Without our addition an output's index stands for the category id.
    """
    labels = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    if not labels or sorted(labels) != list(range(len(labels))):
        return None
    names = tuple(labels[index] for index in range(len(labels)))
    if all(re.fullmatch(r"LABEL_\d+|class \d+", name) for name in names):  # transformers', and our export's
        return None
    ids = tuple(config.get("category_ids") or range(len(names)))
    return Categories(ids, names) if len(ids) == len(names) else None


def from_mmdet(meta: Mapping[str, Any]) -> Categories | None:
    """Of the `meta` in a checkpoint of MMDetection: `dataset_meta` of version 3, or `CLASSES` of version 2.

    An output's index stands for the category id, which is not in such a file.
    """
    of_data = meta.get("dataset_meta")
    found = [of_data.get("classes"), of_data.get("CLASSES")] if isinstance(of_data, Mapping) else []
    names = next((n for n in (*found, meta.get("CLASSES")) if n), ())
    names = (names,) if isinstance(names, str) else names  # a single class, its comma forgotten
    if not isinstance(names, Sequence) or not names:
        return None
    return Categories(tuple(range(len(names))), tuple(str(name) for name in names))


@dataclass(frozen=True)
class Outputs:
    """columns: the output of a detector for each class of the data. notes: a sentence where something was mapped."""

    columns: tuple[int, ...]
    notes: tuple[str, ...] = ()


def match_outputs(known: Categories | None, outputs: int, data: Categories) -> Outputs:
    """Which of a detector's class outputs answers for each class of the data.

    By name, wherever both have names: letter case, spaces, hyphens and underscores may differ, and of classes that
    share a name the n-th is the n-th. Where some names are missing, by number as without names, if all names that are
    found are where the number has them. known: of its `outputs` outputs, None where its checkpoint does not name them.
    UserError where the names contradict each other, or the number fits neither convention.
    """
    if known is None or not known.named or not data.named or len(known.names) != outputs:
        columns = output_columns(data.ids, outputs)
        if outputs != len(columns):
            return Outputs(columns, (f"{len(columns)} of its {outputs} class outputs are kept, by category id",))
        same = known is None or known == data
        return Outputs(columns, () if same else ("its classes are taken for the data's in their order",))
    found = match_names(known.names, data.names)
    columns = tuple(column for column in found if column is not None)
    if len(columns) == len(found):
        return Outputs(columns, _notes(known, data, columns))
    lost = [name for name, column in zip(data.names, found, strict=True) if column is None]
    try:
        columns = output_columns(data.ids, outputs)
        agree = [column == counted for column, counted in zip(found, columns, strict=True) if column is not None]
    except UserError:
        agree = []
    if not (agree and all(agree)):
        raise UserError(
            f"expected a detector of the data's classes, {data}, found one of {known}, none of them called"
            f" {lost[0]!r}: classes go by name; give both the same names"
        )
    pairs = ", ".join(f"{data.names[k]!r} is its {known.names[columns[k]]!r}" for k, c in enumerate(found) if c is None)
    return Outputs(columns, (f"classes of other names are taken by their place: {pairs}",))


def match_names(names: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """Where each wanted name is among names, None where it is not: as it is written or, if that is nowhere, but for
    letter case, spaces, hyphens and underscores."""
    found: list[int | None] = [None] * len(wanted)
    for spelling in (str, _plain):
        open_names = [index for index in range(len(names)) if index not in found]
        open_wanted = [index for index in range(len(wanted)) if found[index] is None]
        places = dict(zip(_numbered([spelling(names[i]) for i in open_names]), open_names, strict=True))
        for index, key in zip(open_wanted, _numbered([spelling(wanted[i]) for i in open_wanted]), strict=True):
            found[index] = places.get(key)
    return found


def output_columns(category_ids: Sequence[int], outputs: int) -> tuple[int, ...]:
    """As `match_outputs` where there are no names: `logits[..., output_columns(...)]` has K columns.

    Two conventions are in use for the same data: one output per class (80 for COCO: MMDetection, and this project), and
    the category id itself as index (91 for COCO: the official DETR and Deformable DETR, transformers). Raises
    UserError for any other number of outputs.
    """
    if outputs == len(category_ids):
        return tuple(range(outputs))
    if outputs == max(category_ids) + 1:
        return tuple(category_ids)
    raise UserError(
        f"expected a model of {len(category_ids)} class outputs (one per category) or {max(category_ids) + 1} (one per "
        f"category id), found {outputs}: use a checkpoint trained on the same categories"
    )


def _notes(known: Categories, data: Categories, columns: tuple[int, ...]) -> tuple[str, ...]:
    """What to say of a mapping by name: what was moved or left out, or else what is spelled otherwise."""
    kept, of = len(columns), len(known.names)
    moved = next((k for k, column in enumerate(columns) if k != column), None)
    spelled = next((k for k, column in enumerate(columns) if data.names[k] != known.names[column]), None)
    if moved is not None:
        where = f"{data.names[moved]!r} of the data is output {columns[moved]}"
        return (f"classes go by name, which is another order: {kept} of its {of} outputs are kept, {where}",)
    if kept != of:
        return (f"classes go by name: the first {kept} of its {of} outputs are kept",)
    if spelled is not None:
        other = f"{data.names[spelled]!r} is its {known.names[columns[spelled]]!r}"
        return (f"classes go by name, which are spelled otherwise: {other}",)
    return ()


def _numbered(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Each name, with how many of the same came before it."""
    before: Counter[str] = Counter()
    for name in names:
        yield name, before[name]
        before[name] += 1


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_\-\s]+", " ", name).split()).casefold()
