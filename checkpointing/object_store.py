"""A place in an object store, by URL: the few operations that the bucket tier needs, through the library `obstore`.

obstore (bindings of the Rust crate object_store) signs, retries, streams and cuts uploads into parts for S3, GCS and
Azure; nothing of that is ours. Here are its calls as `OSError`s that say what happened, where, and never a credential:
what a server sends back is cut down to its code and message. Credentials and endpoints come from the environment that
obstore reads (AWS_…, GOOGLE_…, AZURE_…), and are neither stored nor printed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from ..dist.errors import MissingPackage, UserError

URL = re.compile(r"^(s3a?|gs|az|adl|azure|abfss?|https?|file|memory)://?(?=.)")
PARTS = 9000  # of one upload: S3 takes 10,000, each of 5 MiB or more
DENIED = (301, 400, 401, 403)  # the first two come for a wrong region
_first_user = 0  # the process that used the library first: its threads do not live on in a fork


def is_url(text: object) -> bool:
    """Whether `text` names a place in an object store rather than a folder."""
    return bool(URL.match(str(text)))


def as_url(text: object) -> str:
    """A URL that has been a `Path`, which writes 's3:/bucket', is one again."""
    scheme, rest = str(text).split(":", 1)
    return f"{scheme}://{'/' if scheme == 'file' else ''}{rest.lstrip('/')}"


class ObjectStore:
    """The keys under `url`. A request that fails is tried again for `retry_s`, by the library's rules."""

    def __init__(self, url: str, *, retry_s: float = 60.0) -> None:
        try:
            from obstore.store import from_url
        except ImportError:
            raise MissingPackage("obstore", extra="object-store", needed_for=f"a bucket ({url})") from None
        self.url = url.rstrip("/")
        options: dict[str, Any] = {}
        if url.startswith(("file:", "memory:")):
            options = {"mkdir": True, "automatic_cleanup": True} if url.startswith("file:") else {}
        else:
            options["retry_config"] = {"retry_timeout": timedelta(seconds=retry_s)}
        try:
            self._store: Any = from_url(self.url, **options)
        except Exception as error:  # whatever the library finds wrong with it
            raise UserError(
                f"the bucket {url} cannot be opened ({plain(error)})", expected="a URL such as s3://bucket/prefix"
            ) from None

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """What the library raises inside, as an `OSError` that names the object."""
        global _first_user
        _first_user = _first_user or os.getpid()
        if _first_user != os.getpid():
            raise UserError(
                f"{self.url} is used in a fork of a process that has used object stores, where it would hang",
                remedy="start that process with spawn (torchrun does), or fork before the first use",
            )
        try:
            yield
        except Exception as error:
            if not _of_library(error):
                raise
            raise _as_os_error(error, f"{self.url}/{key}") from None

    def put(self, key: str, data: bytes) -> None:
        """Write a small object; whole or not at all."""
        with self._told(key):
            self._store.put(key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> None:
        """The same where there is none yet: `FileExistsError` for one with other content, as far as the store knows
        conditional puts. One that is there with this very content is an earlier try's, whose answer was lost."""
        from obstore.exceptions import NotSupportedError

        try:
            with self._told(key):
                try:
                    self._store.put(key, data, mode="create", use_multipart=False)
                except (NotSupportedError, NotImplementedError):
                    self._store.put(key, data, use_multipart=False)
        except FileExistsError:
            if self.get(key) != data:
                raise

    def upload(self, key: str, pieces: Iterable[bytes], nbytes: int, *, part_bytes: int, uploads: int) -> None:
        """Write a large object of `nbytes` as its pieces come, `uploads` parts at a time: at most `uploads` + 1 parts
        are held in memory. Whole or not at all; the parts of one that fails are removed by the library."""
        part_bytes = max(part_bytes, -(-nbytes // PARTS))
        with self._told(key):
            if nbytes <= part_bytes:  # one request instead of three
                self._store.put(key, b"".join(pieces), use_multipart=False)
            else:
                self._store.put(key, iter(pieces), chunk_size=part_bytes, max_concurrency=uploads)

    def get(self, key: str) -> bytes:
        with self._told(key):
            return bytes(self._store.get(key).bytes())

    def get_range(self, key: str, start: int, nbytes: int) -> memoryview:
        """`nbytes` from `start` on; fewer where the object ends before."""
        with self._told(key):
            return memoryview(self._store.get_range(key, start=start, length=nbytes))

    def exists(self, key: str) -> bool:
        try:
            with self._told(key):
                self._store.head(key)
        except FileNotFoundError:
            return False
        return True

    def folders(self) -> list[str]:
        """The first parts of all keys that have a '/'."""
        with self._told(""):
            found = self._store.list_with_delimiter()
        return sorted(str(name).rstrip("/") for name in found["common_prefixes"])

    def list(self, folder: str) -> dict[str, tuple[int, float]]:
        """name → (bytes, seconds since 1970 of its writing) of the objects in `folder`."""
        with self._told(folder):
            found = self._store.list(f"{folder}/").collect()
        return {one["path"].split("/", 1)[1]: (one["size"], one["last_modified"].timestamp()) for one in found}

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are gone already count as removed."""
        for first in range(0, len(keys), 1000):
            with self._told(keys[first]):
                try:
                    self._store.delete(list(keys[first : first + 1000]))
                except FileNotFoundError:  # only stores without deletion in bulk say so
                    for key in keys[first : first + 1000]:
                        self._delete_one(key)

    def _delete_one(self, key: str) -> None:
        try:
            self._store.delete(key)
        except FileNotFoundError:
            return


def plain(error: BaseException) -> str:
    """What the library says in one line, without the answer's body but its code and message, without queries and user
    names in addresses: some of these would show keys."""
    text = str(error).split("\n\nDebug source")[0]
    code, message = re.search(r"<Code>(.*?)</Code>", text, re.S), re.search(r"<Message>(.*?)</Message>", text, re.S)
    text = re.sub(r"(status code: \d+[A-Za-z ]*):.*", r"\1", text, flags=re.S)
    text = re.sub(r"//[^/@\s]+@", "//…@", re.sub(r"\?[^\s)]*", "", text))
    told = ": ".join(part.group(1).split("\n")[0] for part in (code, message) if part is not None)
    return " ".join(text.split()) + (f" ({told})" if told else "")


def _of_library(error: BaseException) -> bool:
    """obstore raises its own classes, and Python's for what Python has a class for."""
    return type(error).__module__.startswith("obstore") or (
        isinstance(error, (OSError, RuntimeError))
        and getattr(error, "errno", None) is None
        and "Debug source" in str(error)
    )


def _as_os_error(error: BaseException, where: str) -> OSError:
    """With the class and number that the callers act upon: missing, denied, there already; else 'timed out', which is
    no damage of what is stored."""
    text = plain(error)
    found = re.search(r"status code: (\d+)", text)
    status, name = int(found.group(1)) if found else 0, type(error).__name__
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(errno.ENOENT, text, where)
    if isinstance(error, PermissionError) or name in ("PermissionDeniedError", "UnauthenticatedError"):
        return PermissionError(errno.EACCES, text, where)
    if status in DENIED:
        return PermissionError(errno.EACCES, text, where)
    if isinstance(error, FileExistsError) or name in ("AlreadyExistsError", "PreconditionError"):
        return FileExistsError(errno.EEXIST, text, where)
    return TimeoutError(errno.ETIMEDOUT, text, where)
