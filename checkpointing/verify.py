"""Is this checkpoint whole? Lengths first, then every chunk's checksum, by as many ranks as there are.

Files are read in the chunks in which they were hashed, and dropped from the page cache never: what is verified is
about to be loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .manifest import BadCheckpoint, Manifest, checksum


def check_lengths(path: Path, manifest: Manifest) -> None:
    """Every file is there, a regular file, and as long as the manifest says."""
    for name, record in manifest.files.items():
        try:
            status = os.lstat(path / name)
        except OSError as error:
            raise BadCheckpoint(f"{path / name} is missing ({error.strerror})") from error
        if not os.path.isfile(path / name) or os.path.islink(path / name):
            raise BadCheckpoint(f"{path / name} is not a regular file")
        if status.st_size != record.nbytes:
            raise BadCheckpoint(f"{path / name} has {status.st_size} bytes; its manifest says {record.nbytes}")


def check_content(
    path: Path,
    manifest: Manifest,
    *,
    part: int = 0,
    parts: int = 1,
    threads: int = 2,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Verify the checksums of every `parts`-th chunk beginning with `part`; `on_bytes` is told of progress."""
    chunks = [(name, index) for name, record in sorted(manifest.files.items()) for index in range(len(record.chunks))]
    with ThreadPoolExecutor(threads, thread_name_prefix="undertow-verify") as pool:
        for nbytes in pool.map(lambda job: _check_chunk(path, manifest, *job), chunks[part::parts]):
            on_bytes(nbytes)


def _check_chunk(path: Path, manifest: Manifest, name: str, index: int) -> int:
    begin = index * manifest.chunk_bytes
    try:
        with open(path / name, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), manifest.chunk_bytes, begin)
    except OSError as error:
        raise BadCheckpoint(f"{path / name} cannot be read ({error.strerror})") from error
    if checksum(data) != manifest.files[name].chunks[index]:
        raise BadCheckpoint(f"{path / name} is damaged in bytes [{begin}, {begin + len(data)})")
    return len(data)
