"""Reading a json file of long lists a piece at a time: of COCO's half a gigabyte, a few megabytes are in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

PIECE_BYTES = 2**21
BLOCK = 1024  # objects that are handed over at once

Objects = list[dict[str, Any]]

_decode = json.JSONDecoder().raw_decode  # of the standard library: written in C, and knows where a value ends
_not_space = re.compile(r"[^ \t\n\r]")


class UnexpectedKind(ValueError):
    """Sound json, but not what is read here."""


def read_lists(
    read: Callable[[int], bytes], names: Collection[str], unread: str | None = None
) -> Iterator[tuple[str, Objects]]:
    """The objects in the lists of these names of the one object that a json file is, in blocks of up to BLOCK of them,
    each with the name of its list. An empty list is an empty block.

    read: gives the next bytes of the file. unread: name of lists of numbers, nested ones too, that come as empty lists:
    not to look at the numbers saves most of the time. What other names hold is read over. ValueError where the file is
    no json; UnexpectedKind, with the name, where one of these names has something else, and without one where the file
    is no object.
    """
    text = _Text(read, unread)
    for name in text.object():
        if name in names:
            yield from ((name, block) for block in _blocks(text, name))
        else:
            text.value()
    if text.peek():
        raise text.error("extra data")


def _blocks(text: _Text, name: str) -> Iterator[Objects]:
    if text.peek() != "[":
        text.value()
        raise UnexpectedKind(name)
    block: Objects = []
    empty = True
    for item in text.list():
        if not isinstance(item, dict):
            raise UnexpectedKind(name)
        block.append(item)
        if len(block) == BLOCK:
            yield block
            block, empty = [], False
    if block or empty:
        yield block


class _Text:
    """A window that moves along the text of a file, as far as it is needed."""

    def __init__(self, read: Callable[[int], bytes], unread: str | None = None) -> None:
        # Within a string the quotation marks would stand behind backslashes.
        name = None if unread is None else f'"{re.escape(unread)}"'
        self._unread = None if name is None else re.compile(name + r"\s*:\s*\[[][0-9.,eE+\-\s]*\](?=\s*(?:\}|,\s*\"))")
        self._empty = f"{name}:[]"
        self._read, self._decoder = read, codecs.getincrementaldecoder("utf-8-sig")()
        self._window, self._at, self._before, self._ended = "", 0, 0, False

    def peek(self) -> str:
        """The next character that is no space; none at the end."""
        character = self._window[self._at : self._at + 1]
        if character > " ":  # mostly
            return character
        while (found := _not_space.search(self._window, self._at)) is None:
            if self._ended:
                self._at = len(self._window)
                return ""
            self._at = len(self._window)
            self._move()
        self._at = found.start()
        return self._window[self._at]

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = _decode(self._window, self._at)
                if end < len(self._window) or self._ended:  # else it may be a number of which more digits follow
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self.error(error.msg, error.pos) from None
            except RecursionError:
                raise self.error("lists or objects nested too deeply") from None
            self._move()

    def list(self) -> Iterator[Any]:
        """The values of the list that begins here."""
        self._take("[")
        if self.peek() != "]":
            yield self.value()
            while self.peek() == ",":
                self._at += 1
                yield self.value()
        self._take("]")

    def object(self) -> Iterator[str]:
        """The names in the object that begins here, each when its value is next."""
        if self.peek() not in ("{", ""):
            self.value()
            raise UnexpectedKind
        self._take("{")
        if self.peek() != "}":
            yield self._name()
            while self.peek() == ",":
                self._at += 1
                yield self._name()
        self._take("}")

    def error(self, what: str, position: int | None = None) -> ValueError:
        return ValueError(f"{what} at character {self._before + (self._at if position is None else position)}")

    def _name(self) -> str:
        if self.peek() != '"':
            raise self.error("expecting a name in double quotes")
        name: str = self.value()
        self._take(":")
        return name

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise self.error(f"expecting {character!r}")
        self._at += 1

    def _move(self) -> None:
        """Leave behind what has been read, and read on: twice as far where not even one value fitted."""
        piece = self._read(max(PIECE_BYTES, len(self._window) - self._at))
        self._before += self._at
        self._window, self._at = self._window[self._at :] + self._decoder.decode(piece, final=not piece), 0
        if self._unread is not None:  # as many characters as there were, for the position in messages
            self._window = self._unread.sub(lambda found: self._empty.ljust(len(found[0])), self._window)
        self._ended = not piece
