"""Where a store lives: a local folder, or a prefix of a bucket (`s3://bucket/store.zarr`).

Both hold files under keys such as `tokens/c.7.0`, and both show a file whole or not at all: a folder renames it into
place when it is on the disk, a bucket is given it by one put, which object stores make visible when it is complete.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from common.cache import crc32c
from common.cache.schema import CHECKSUM_BYTES
from common.errors import UserError
from common.inputs import BUCKET
from common.runtime import log

TEMPORARY = ".partial"
RETRY_S = 180.0  # how long a bucket may be out of reach before a command gives up
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
WAITING_S = 30.0  # for an answer, before asking again
TRY_AGAIN = (408, 429)  # the answers "timeout" and "too many requests" of HTTP
UNSATISFIABLE_RANGE = 416
ARRIVALS = 3  # damaged ones of the same bytes, after which these are taken to be damaged where they lie

Bytes = npt.NDArray[np.uint8]
Result = TypeVar("Result")


class OutOfReach(UserError):
    """A bucket did not answer for as long as RETRY_S."""


class NewFile(Protocol):
    """A file in the making, of which nothing is seen until `publish`."""

    def write(self, buffers: Sequence[Bytes]) -> None: ...
    def finish(self) -> None:
        """No more is written: bring it to the disk. What can fail for want of room has happened then."""

    def publish(self) -> None:
        """Show it in its place, whole."""

    def settle(self) -> None:
        """Return when a power cut cannot undo `publish` any more."""

    def discard(self) -> None:
        """Leave nothing behind; also after `publish`, then without effect."""


def publish_all(files: Sequence[NewFile]) -> None:
    """Finish, show and settle files, each step for all of them at the same time.

    A file system writes its journal once for those that wait together: measured on ext4, the seven files of a shard and
    the entries in their folders take a third to a fifth of the time of doing one after another.
    """
    with ThreadPoolExecutor(len(files), "publish") as pool:
        for step in ("finish", "publish", "settle"):
            for done in [pool.submit(getattr(file, step)) for file in files]:
                done.result()


@dataclass(frozen=True)
class Folder:
    """A store in the file system."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def read(self, key: str) -> bytes:
        """The bytes of a file. FileNotFoundError."""
        return (self.root / key).read_bytes()

    def view(self, key: str) -> Bytes:
        """The bytes of a file that is not empty, mapped: what is not looked at takes no memory. FileNotFoundError."""
        with (self.root / key).open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)

    def names(self, folder: str) -> list[str]:
        """Names of what is right below a folder, in no order; none where there is no such folder."""
        try:
            with os.scandir(self.root / folder) as entries:
                return [entry.name for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def folders(self, folder: str) -> list[str]:
        """Names of the folders right below a folder."""
        return [name for name in self.names(folder) if (self.root / folder / name).is_dir()]

    def new_file(self, key: str) -> NewFile:
        return _NewLocalFile(self.root / key)

    def remove(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def create(self, build: Callable[[Path], None]) -> None:
        """Let `build` fill an empty folder, and put the store in its place all at once. OSError where there is one."""
        building = self.root.with_name(f"{self.root.name}{TEMPORARY}-{os.getpid()}")
        shutil.rmtree(building, ignore_errors=True)
        building.parent.mkdir(parents=True, exist_ok=True)
        build(building)
        building.rename(self.root)

    def remove_partial(self) -> None:
        """Remove what a killed process left in the making."""
        for partial in self.root.rglob(f"*{TEMPORARY}-*"):
            partial.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        existing = next(parent for parent in (self.root, *self.root.absolute().parents) if parent.exists())
        return shutil.disk_usage(existing).free


class _NewLocalFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = path.with_name(f"{path.name}{TEMPORARY}-{os.getpid()}")
        self._file = self.partial.open("wb", buffering=0)

    def write(self, buffers: Sequence[Bytes]) -> None:
        limit = os.sysconf("SC_IOV_MAX")
        for start in range(0, len(buffers), limit):
            part = buffers[start : start + limit]
            left = sum(len(buffer) for buffer in part) - os.writev(self._file.fileno(), part)
            if left:  # a disk that fills up writes less than asked before it fails
                raise OSError(f"{self.partial}: {left} bytes could not be written; is the disk full?")

    def finish(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self) -> None:
        self.partial.rename(self._path)

    def settle(self) -> None:
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Bucket:
    """A store under a prefix of an object store.

    Calls that find the network broken are repeated for RETRY_S seconds, with growing pauses; then OutOfReach. Where the
    bucket refuses, UserError.
    """

    url: str
    client: Any
    """obstore's client of the prefix."""

    def __str__(self) -> str:
        return self.url

    def exists(self, key: str) -> bool:
        try:
            self._call(lambda obstore: obstore.head(self.client, key))
        except FileNotFoundError:
            return False
        return True

    def read(self, key: str) -> bytes:
        """The bytes of an object. FileNotFoundError.

        Where the object's tag is the MD5 of other bytes, they are asked for again, until the same come twice: then the
        tag is something else, as it is with some kinds of encryption.
        """
        content, tag = self._get(key)
        while re.fullmatch("[0-9a-f]{32}", tag) and hashlib.md5(content, usedforsecurity=False).hexdigest() != tag:
            before = content
            content, tag = self._get(key)
            if content == before:
                break
        return content

    def view(self, key: str) -> Bytes:
        return np.frombuffer(self.read(key), dtype=np.uint8)

    def read_tail(self, key: str, size: int) -> Bytes:
        """The last `size` bytes of an object, or fewer where it is smaller. FileNotFoundError."""
        options = {"range": {"suffix": size}}
        return self._call(
            lambda obstore: np.frombuffer(obstore.get(self.client, key, options=options).bytes(), dtype=np.uint8)
        )

    def read_range(self, key: str, start: int, size: int) -> Bytes:
        """`size` bytes from `start`, or fewer where the object ends before. FileNotFoundError."""
        return self._call(
            lambda obstore: np.frombuffer(obstore.get_range(self.client, key, start=start, length=size), dtype=np.uint8)
        )

    def download(self, key: str, path: Path, check: Callable[[Path], None]) -> None:
        """Copy an object to a local file, which appears when it is whole and `check`, given another path to it, raises
        nothing. FileNotFoundError."""

        def copy(obstore: Any) -> None:
            file = _NewLocalFile(path)
            try:
                for chunk in obstore.get(self.client, key).stream(min_chunk_size=2**22):
                    file.write([np.frombuffer(chunk, dtype=np.uint8)])
                file.finish()
                check(file.partial)
                file.publish()
                file.settle()
            finally:
                file.discard()

        self._call(copy)

    def names(self, folder: str) -> list[str]:
        return [entry["path"].rsplit("/", 1)[-1] for entry in self._list(folder)["objects"]]

    def folders(self, folder: str) -> list[str]:
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in self._list(folder)["common_prefixes"]]

    def new_file(self, key: str) -> NewFile:
        return _NewObject(self, key)

    def put(self, key: str, content: Any, *, overwrite: bool = True) -> bool:
        """Put a whole object. Without `overwrite`, False where there is one already, which then stays as it is."""
        mode = "overwrite" if overwrite else "create"
        try:
            self._call(lambda obstore: obstore.put(self.client, key, content, mode=mode))
        except FileExistsError:
            return False
        return True

    def remove(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._call(lambda obstore: obstore.delete(self.client, key))

    def create(self, build: Callable[[Path], None]) -> None:
        """Let `build` fill a folder and put its files, the group's zarr.json last: it makes the store visible.

        No object is replaced: equal ones are of another process that creates the same store, or of an attempt that was
        killed. FileExistsError where there is another store, UserError where there is the beginning of one.
        """
        with tempfile.TemporaryDirectory() as folder:
            building = Path(folder) / "store.zarr"
            build(building)
            files = [path for path in building.rglob("*") if path.is_file()]
            for path in sorted(files, key=building.joinpath("zarr.json").__eq__):
                key, content = path.relative_to(building).as_posix(), path.read_bytes()
                if self.put(key, content, overwrite=False) or self.read(key) == content:
                    continue
                if self.exists("zarr.json"):
                    raise FileExistsError(f"{self.url}: another process has just created another store there")
                raise UserError(
                    f"{self.url}: another process is creating a store of another configuration there, or was stopped"
                    f" while it did ({key} differs): name another --out, or remove what is there"
                )

    def remove_partial(self) -> None:
        """Nothing to do: an object that was not put whole does not exist."""

    def free_bytes(self) -> int | None:
        return None

    def _get(self, key: str) -> tuple[bytes, str]:
        """An object's bytes and its tag."""

        def get(obstore: Any) -> tuple[bytes, str]:
            answer = obstore.get(self.client, key)
            return bytes(answer.bytes()), (answer.meta["e_tag"] or "").strip('"')

        return self._call(get)

    def _list(self, folder: str) -> Any:
        return self._call(lambda obstore: obstore.list_with_delimiter(self.client, f"{folder}/" if folder else None))

    def _call(self, ask: Callable[[Any], Result]) -> Result:
        obstore = _import_obstore()
        give_up_s, pause_s = time.monotonic() + RETRY_S, FIRST_PAUSE_S
        while True:
            try:
                return ask(obstore)
            except obstore.exceptions.AlreadyExistsError:
                raise FileExistsError(f"{self.url} has this object already") from None
            except FileNotFoundError:  # which obstore raises for missing objects
                raise FileNotFoundError(f"{self.url} has no such object") from None
            except (obstore.exceptions.BaseError, TimeoutError, ConnectionError) as error:
                if (status := _status(error)) == UNSATISFIABLE_RANGE:
                    raise EOFError("the object ends too early") from None
                if status is not None and status not in TRY_AGAIN:
                    raise UserError(
                        f"{self.url}: the object store refused the request ({_reason(error)}); check the name of the"
                        " bucket, and that AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY may read and write it"
                    ) from None
                if time.monotonic() + pause_s > give_up_s:
                    raise OutOfReach(
                        f"{self.url}: the object store was out of reach for {RETRY_S:.0f} s ({_reason(error)}); check"
                        " the network and AWS_ENDPOINT_URL, then run the same command again: it goes on where it"
                        " stopped"
                    ) from None
                log.warning(f"{self.url}: {_reason(error)}; trying again in {pause_s:.1f} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


class _NewObject:
    """An object in the making, held in memory."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket, self._key, self._content = bucket, key, io.BytesIO()

    def write(self, buffers: Sequence[Bytes]) -> None:
        self._content.writelines(buffers)

    def finish(self) -> None:
        pass

    def publish(self) -> None:
        self._bucket.put(self._key, self._content.getbuffer())
        self.discard()

    def settle(self) -> None:
        pass

    def discard(self) -> None:
        self._content = io.BytesIO()


Storage = Folder | Bucket
Location = str | Path | Storage


def locate(location: Location) -> Storage:
    """The storage that a user names by a path or a URL. UserError for a URL that cannot be one of a store."""
    if isinstance(location, Folder | Bucket):
        return location
    url = BUCKET.match(str(location))
    return _open_bucket(f"{url[1]}://{url[2].rstrip('/')}") if url else Folder(Path(location))


@lru_cache
def _open_bucket(url: str) -> Bucket:
    obstore = _import_obstore()
    from datetime import timedelta

    # Repeating is left to Bucket._call, which also repeats what breaks off halfway, and says so.
    try:
        client = obstore.store.from_url(
            url,
            client_options={"timeout": timedelta(seconds=WAITING_S), "allow_http": True},
            retry_config={"max_retries": 0},
        )
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise UserError(
            f"{url}: expected a URL such as s3://bucket/store.zarr, found one that {_reason(error)}"
        ) from None
    return Bucket(url, client)


def read_checked(storage: Storage, key: str) -> Bytes:
    """What stands before the crc32c at the end of a file. OSError if it is missing, ValueError if it is damaged."""
    return ask_again(lambda: checked(storage.view(key)))


def ask_again(ask: Callable[[], Result]) -> Result:
    """What `ask` returns. It raises ValueError or EOFError where what it fetched is damaged: that may have happened on
    the way."""
    for _ in range(ARRIVALS - 1):
        with suppress(ValueError, EOFError):
            return ask()
    return ask()


def checked(data: Bytes) -> Bytes:
    """What stands before the crc32c at the end of `data`. ValueError if the two do not match."""
    content, stored = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if len(stored) < CHECKSUM_BYTES or crc32c.value(content) != int.from_bytes(stored.tobytes(), "little"):
        raise ValueError("its checksum does not match")
    return content


def _import_obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise UserError("a store in a bucket needs obstore; `pip install detrcache[s3]` brings it") from None
    return obstore


def _status(error: BaseException) -> int | None:
    """The 4xx status that the object store answered with; None where it did not answer, or with trouble of its own."""
    answer = re.search(r"status code: (4\d\d)", str(error))
    return int(answer[1]) if answer else None


def _reason(error: BaseException) -> str:
    """What an error of obstore says, on one line: the server's own message, or the last cause named."""
    text = str(error).split("Debug source:")[0]
    answer = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    return " ".join((answer[1] if answer else text.split(" - ")[-1]).split())[:200]
