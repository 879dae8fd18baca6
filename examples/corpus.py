"""Real text that every machine has: the Python source of the interpreter's standard library, read in place.

Files are de-duplicated by content and held out by their content's hash (of few files, the last twentieth of each), so
the split is the same wherever the same files are; a printed hash over all of them pins the data. A batch is a pure
function of (seed, step): any rank, any world size and any restart can compute the one it needs.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..dist.errors import UserError

SEPARATOR = 0  # a byte that source text does not contain, between files


@dataclass(frozen=True)
class Corpus:
    """`train` and `held_out` are uint8 arrays; `manifest` is a hash over every file's hash, in order."""

    train: np.ndarray
    held_out: np.ndarray
    files: int
    manifest: str
    source: str

    def batch(self, *, seed: int, step: int, rows: slice, batch: int, length: int) -> torch.Tensor:
        """Rows `rows` of global batch `step`: int64[len(rows), length + 1] of byte values."""
        generator = np.random.Generator(np.random.Philox(key=[seed, step]))
        starts = generator.integers(0, len(self.train) - length, size=batch)[rows]
        windows = self.train[starts[:, None] + np.arange(length + 1)]
        return torch.from_numpy(windows.astype(np.int64))

    def evaluation(self, *, batch: int, length: int, limit_bytes: int) -> list[torch.Tensor]:
        """The first `limit_bytes` of the held-out text as full rows, in order: int64[≤ batch, length + 1] each."""
        rows = min(limit_bytes, len(self.held_out) - 1) // length
        view = np.lib.stride_tricks.sliding_window_view(self.held_out, length + 1)[: rows * length : length]
        return [torch.from_numpy(view[i : i + batch].astype(np.int64)) for i in range(0, rows, batch)]


def load(path: Path | None = None, *, minimum_bytes: int = 100_000) -> Corpus:
    """The standard library's source, or the text files under `path` (a file or a folder)."""
    root = Path(sysconfig.get_paths()["stdlib"]) if path is None else path
    suffix = ".py" if path is None else ""
    try:
        if root.is_file():
            files = [root]
        elif root.is_dir():
            files = sorted(file for file in _below(root) if file.name.endswith(suffix) and file.is_file())
        else:
            raise FileNotFoundError(2, "No such file or directory")
        texts = {hashlib.sha256(text).digest(): text for text in (p.read_bytes() for p in files) if text}
    except OSError as error:
        raise UserError(
            f"cannot read the training data {root} ({error.strerror})",
            expected="a readable file, or a folder of text files",
            remedy="pass another --data, or none for the standard library's source",
        ) from error
    keys = sorted(texts)
    held_out = _join([texts[key] for key in keys if key[0] % 20 == 0])
    train = _join([texts[key] for key in keys if key[0] % 20])
    if len(held_out) * 100 < len(train) or len(train) < len(held_out):  # few files: the last twentieth of each
        cuts = [(texts[key], len(texts[key]) * 19 // 20) for key in keys]
        train, held_out = _join([text[:cut] for text, cut in cuts]), _join([text[cut:] for text, cut in cuts])
    if len(train) < minimum_bytes or len(held_out) < minimum_bytes // 100:
        raise UserError(
            f"{root} holds {len(train)} training and {len(held_out)} held-out bytes in {len(keys)} distinct files",
            expected=f"at least {minimum_bytes} and {minimum_bytes // 100}",
            remedy="pass more text with --data",
        )
    manifest = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
    return Corpus(train, held_out, len(keys), manifest, str(root))


def _below(root: Path) -> Iterator[Path]:
    """What is no folder below `root`; folders of installed packages, which hold thousands of files, are not entered."""
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if _wanted(name)]
        yield from (Path(folder, name) for name in names if _wanted(name))


def _wanted(name: str) -> bool:
    return name not in ("site-packages", "dist-packages", "__pycache__") and name[0] != "."


def _join(texts: list[bytes]) -> np.ndarray:
    return np.frombuffer(bytes([SEPARATOR]).join(texts), dtype=np.uint8)
