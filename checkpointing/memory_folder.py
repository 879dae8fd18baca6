"""Checkpoints in shared memory, in folders that are used again and again: what would be written anew is left there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .files import FileOps
from .folder import Folder
from .manifest import COMMIT, MANIFEST, METADATA, Manifest


class MemoryFolder(Folder):
    """A checkpoint folder whose later checkpoints `HostTier` forgets itself, because ranks have them mapped. A scratch
    folder is used again and again; its `.metadata`, hundreds of kilobytes that hardly ever change, is left there."""

    def __init__(self, root: Path, ops: FileOps) -> None:
        super().__init__(root, ops)
        self._metadata: dict[Path, bytes] = {}  # in which folder which is

    def _has(self, scratch: Path, name: str, text: bytes) -> bool:
        return name == METADATA and self._metadata.pop(scratch, None) is text

    def commit(self, scratch: Path, manifest: Manifest, metadata: bytes) -> Path:
        final = super().commit(scratch, manifest, metadata)
        self._metadata[final] = metadata
        return final

    def reuse(self, old: Path, scratch: Path) -> None:
        """From now on the folder `old` is no checkpoint, and its files are to be written over in `scratch`."""
        self.ops.unlink(old / COMMIT)
        with suppress(FileNotFoundError):  # where the next one is written first, over this one's pages
            self.ops.rename(old / MANIFEST, old / f"{MANIFEST}.part")
        self.ops.rename(old, scratch)
        if (metadata := self._metadata.pop(old, None)) is not None:
            self._metadata[scratch] = metadata

    def _leave_branch(self, step: int) -> None:
        return

    def _hint(self, final: Path) -> None:
        """Nobody looks for one here."""
