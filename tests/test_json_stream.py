"""Reading lists of a json file in pieces, against json.loads of the whole."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from common import json_stream
from common.json_stream import UnexpectedKind, read_lists

CONTENT = {
    "info": {"year": 2017, "notes": ['[{"', "\\", 'quoted "segmentation": [[1, 2]], "x'], "version": 12.5},
    "images": [
        {"id": i, "name": f"Öl {i} – 漢字 😀", "nested": {"list": [[], {}, None, True, -1e-3]}} for i in range(5)
    ],
    "number": 1234567,
    "annotations": [
        {"id": 1, "segmentation": [[1.5, 2, 3e4], [-4, 5.25]], "bbox": [1, 2, 3, 4]},
        {"id": 2, "bbox": [1.25, 2, 3, 4], "segmentation": []},
        {"segmentation": {"counts": [1, 2, 3], "size": [4, 5]}, "id": 3},
        {"id": 4, "segmentation": [[7, 8]], "note": 'says "segmentation": [9], "here'},
    ],
    "empty": [],
    "licences": ["one", 2, [3]],
}
NAMES = ("images", "annotations", "empty")


def read(text: str | bytes, unread: str | None = None) -> dict[str, list[Any]]:
    data = text if isinstance(text, bytes) else text.encode()
    found: dict[str, list[Any]] = {}
    for name, block in read_lists(io.BytesIO(data).read, NAMES, unread):
        found.setdefault(name, []).extend(block)
    return found


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("escaped", [False, True])
def test_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch, indent: int | None, escaped: bool) -> None:
    """Cut at every place, within numbers, strings, escapes and characters of several bytes: what json.loads gives;
    without what is not to be read, lists of numbers of that name are empty and all else is the same."""
    text = json.dumps(CONTENT, indent=indent, ensure_ascii=escaped)
    whole = json.loads(text)
    less = json.loads(text)
    for row in (0, 3):
        less["annotations"][row]["segmentation"] = []
    monkeypatch.setattr(json_stream, "BLOCK", 2)
    for piece_bytes in (*range(1, 60), 200, 10_000):
        monkeypatch.setattr(json_stream, "PIECE_BYTES", piece_bytes)
        assert read(text) == {name: whole[name] for name in NAMES}
    for piece_bytes in (40, 200, 10_000):  # small pieces may cut a list of which the rest then is read
        monkeypatch.setattr(json_stream, "PIECE_BYTES", piece_bytes)
        found = read(text, "segmentation")
        if piece_bytes == 10_000:
            assert found == {name: less[name] for name in NAMES}
        for ours, with_all in zip(found["annotations"], whole["annotations"], strict=True):
            assert ours["segmentation"] in ([], with_all["segmentation"])
            assert {**ours, "segmentation": 0} == {**with_all, "segmentation": 0}


@pytest.mark.parametrize("piece_bytes", [1, 7, 10_000])
def test_every_cut_and_many_mistakes_are_noticed(monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    """A file that ends at any place before its end, and texts that json.loads refuses too, are ValueErrors; the
    position in the message is that of json.loads."""
    monkeypatch.setattr(json_stream, "PIECE_BYTES", piece_bytes)
    text = json.dumps(CONTENT)
    for end in range(0, len(text), 1 if piece_bytes > 7 else 37):
        with pytest.raises(ValueError, match=r"at character \d+"):
            read(text[:end])
    for wrong in (
        '{"images": [{}, ]}',
        '{"images": [{} {}]}',
        '{"a": 1,}',
        '{"a" 1}',
        '{"a": 1} x',
        "{1: 2}",
        "nul",
        "",
    ):
        with pytest.raises(ValueError, match=r"at character \d+") as ours:
            read(wrong)
        with pytest.raises(json.JSONDecodeError) as theirs:
            json.loads(wrong)
        assert int(str(ours.value).split()[-1]) - theirs.value.pos in (0, 1), wrong
    for wrong_bytes in (b'{"images": ["\xff"]}', b'{"\xc3'):
        with pytest.raises(UnicodeDecodeError):
            read(wrong_bytes)


@pytest.mark.parametrize(("text", "name"), [('{"images": {}}', "images"), ('{"empty": [1]}', "empty"), ("[]", "")])
def test_other_kinds(text: str, name: str) -> None:
    """A list of other things, or no list, where objects are wanted, names it; no object at all names nothing."""
    with pytest.raises(UnexpectedKind) as error:
        read(text)
    assert str(error.value) == name


def test_memory_is_that_of_a_piece() -> None:
    """Of 20 MB, no more than a few pieces are ever held: by tracemalloc, below 6 pieces of 2 MB."""
    import tracemalloc

    item = b'{"id": 1, "text": "' + b"x" * 1000 + b'"}, '
    data = io.BytesIO(b'{"images": [' + item * 20_000 + b"{}]}")
    tracemalloc.start()
    try:
        count = sum(len(block) for _, block in read_lists(data.read, NAMES))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_001
    assert peak < 6 * json_stream.PIECE_BYTES
