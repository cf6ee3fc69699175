"""Which classes a detector tells apart, as its checkpoint carries it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Categories:
    """The category id and the name of each class index 0..K-1, as in the annotations that a detector learnt from."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def to_metadata(self) -> dict[str, str]:
        """For `save_detector`: the categories section of a COCO json."""
        section = [{"id": i, "name": name} for i, name in zip(self.ids, self.names, strict=True)]
        return {"categories": json.dumps(section)}

    def select(self, columns: Sequence[int]) -> Categories:
        """The classes that remain where only these outputs are kept."""
        return Categories(tuple(self.ids[c] for c in columns), tuple(self.names[c] for c in columns))


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
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return None
    ids = tuple(config.get("category_ids") or range(len(names)))
    return Categories(ids, names) if len(ids) == len(names) else None
