"""Where a save goes: host memory, the checkpoint folder, a mirror of it and a bucket, each with its own committer.

A save is copied off the device once, into the memory that `route` names; the tiers share those bytes. Restoring looks
into the folders in the order of `folders`, nearest first. A further kind of tier needs a `Folder`, a `TierFile` and a
line in `route`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..dist.errors import PeerLost, UserError
from ..dist.log import get_logger
from ..dist.trace import Trace
from ..dist.units import format_bytes
from .arena import Memory
from .attempt import CLAIMS, MEETINGS, Attempt
from .bucket import WAITING, Bucket, BucketFile
from .bucket_folder import BucketFolder
from .committer import Committer, Part
from .coordinate import Coordinator
from .copies import HostCopier
from .files import FileOps
from .flush import ShardFile
from .folder import Folder
from .generation import HostFile
from .host_tier import HostTier
from .mirror import Mirror, MirrorFile
from .partner import Partner
from .partner_tier import PartnerTier
from .pipeline import Pipeline
from .pruning import Home
from .recycle import Pool, choose
from .retention import Retention
from .save import Save, SaveReport
from .snapshot import OnChunks, Snapshot
from .turns import Claim

log = get_logger(__name__)


class Tiers:
    """The tiers of one `Checkpointer`. Create on all ranks; rank 0 takes the folders, and its verdict is everyone's."""

    def __init__(
        self,
        root: Path,
        coordinator: Coordinator,
        *,
        keep: int | Retention | None,
        mirror: Mirror | None,
        bucket: Bucket | None,
        partner: Partner | None,
        host_generations: int,
        ops: FileOps,
        timeout_s: float,
        trace: Trace,
        recycle: bool | None = None,
    ) -> None:
        self.coordinator, self._timeout_s, self._trace = coordinator, timeout_s, trace
        self.folder = Folder(root, ops)
        self._removal = None if keep is None else choose(root, recycle)
        if self._removal is not None and self._removal.on:
            self.folder.pool = Pool(self.folder.scratch(0, f"{coordinator.token}-0"), ops, coordinator.world)
        self.host: HostTier | PartnerTier | None = None
        if host_generations and partner is not None:
            ways = {"timeout_s": timeout_s, "trace": trace}
            self.host = PartnerTier(root, coordinator, partner, generations=host_generations, **ways)
        elif host_generations:
            self.host = HostTier(root, coordinator, generations=host_generations)
        self._mirror, self._bucket, self._attempts, self._highest = mirror, bucket, 0, -1
        self._sent = {"mirror": -1, "bucket": -1}  # the last step that went there
        self._mirror_folder = Folder(Path(mirror.root), ops) if mirror else None
        self._bucket_folder = BucketFolder(bucket.open(), root, coordinator.token) if bucket else None
        self._take()
        self._committers = {"disk": self._committer("disk", self.folder, keep)}
        if self.host is not None:
            self._committers[self.host.tier] = self._committer(self.host.tier, self.host.folder, None)
        if self._mirror_folder is not None and mirror is not None:
            self._committers["mirror"] = self._committer("mirror", self._mirror_folder, mirror.keep)
        if self._bucket_folder is not None and bucket is not None:
            self._committers["bucket"] = self._committer("bucket", self._bucket_folder, bucket.keep)

    @property
    def committers(self) -> Sequence[Committer]:
        return tuple(self._committers.values())

    @property
    def folders(self) -> list[Home]:
        """Where to look for a checkpoint, nearest first; what partners hold is not in a folder."""
        host = self.host.folder if isinstance(self.host, HostTier) else None
        found = (host, self.folder, self._mirror_folder, self._bucket_folder)
        return [folder for folder in found if folder is not None]

    def _committer(self, tier: str, folder: Home, keep: int | Retention | None) -> Committer:
        return Committer(tier, folder, self.coordinator, keep=keep, timeout_s=self._timeout_s, trace=self._trace)

    def _take(self) -> None:
        problem = ""
        if isinstance(self.host, PartnerTier):
            self.host.crew.introduce()
        if self.coordinator.rank == 0:
            try:
                self.folder.take()
                if self._mirror_folder is not None:
                    self._mirror_folder.take()
                if self._bucket_folder is not None:
                    self._bucket_folder.take()
                if self.host is not None:
                    self.host.take()
            except UserError as error:
                self._release_folders()
                problem = str(error)
            self.coordinator.say("open", problem)
        else:
            problem = self.coordinator.hear("open", 0, deadline_s=time.monotonic() + self._timeout_s)
        if problem:
            if isinstance(self.host, PartnerTier):
                self.host.close(remove=False)
            self.coordinator.part()
            raise UserError(problem)
        if isinstance(self.host, PartnerTier):
            self.host.join()

    def attempt(self, step: int, *, disk: bool, host: bool, metrics: Mapping[str, float] | None = None) -> Attempt:
        """The next try to save, now. All ranks ask for each alike, and whatever becomes of it: that is how they number
        and mirror the same ones."""
        self._attempts += 1
        asked = {"disk": disk}
        for tier, copy in (("mirror", self._mirror), ("bucket", self._bucket)):
            sent = self._sent[tier]  # a later one where training was rolled back: what follows is another branch
            asked[tier] = copy is not None and disk and (step == sent or step // copy.every != sent // copy.every)
            if asked[tier]:
                self._sent[tier] = step
        if self.host is not None:
            asked = {self.host.tier: host} | asked
        tiers = tuple(tier for tier, wanted in asked.items() if wanted)
        rising, self._highest = step > self._highest, max(step, self._highest)
        return Attempt(self._attempts, step, tiers, time.monotonic(), metrics or {}, rising)

    def heard(self, report: SaveReport, _: int) -> None:
        """Of a save that has ended."""
        if isinstance(self.host, PartnerTier):
            self.host.heard(report)

    def refuse(self, attempt: Attempt, claimed: Claim | None, reason: str) -> None:
        """This rank gives `attempt` up: the others are told wherever they wait for it now, or will."""
        if self.host is not None and claimed is not None:
            self.host.release(claimed[0])
        with suppress(PeerLost, RuntimeError, dist.DistError):  # rank 0 is gone: nobody is left to tell
            for name in map(attempt.at, MEETINGS):
                self.coordinator.decide(f"{name}/verdict", reason)
            for name in map(attempt.at, CLAIMS):
                self.coordinator.decide(name, reason)
            for tier in attempt.tiers:
                committer = self._committers[tier]
                scratch = committer.folder.scratch(attempt.step, self._token(tier, attempt))
                committer.refuse(attempt.number, attempt.step, reason, scratch)

    def route(
        self,
        save: Save,
        claimed: Claim | None,
        arena: Callable[[], Memory],
        pipe: Pipeline,
        copier: HostCopier,
    ) -> tuple[Memory, list[tuple[Committer, Part]], OnChunks]:
        """Through which memory a save goes, its part for each tier, and what to do with filled chunks."""
        name, parts, takers = save.plan.shard_name, [], []
        memory = arena() if self.host is None or claimed is None else self.host.generation(claimed[0])
        if self.host is not None and claimed is not None:
            after = partial(self.host.done, claimed[0], save.step, "host")
            if isinstance(self.host, PartnerTier):
                copy = self.host.file(claimed, save, copier)
                takers.append(copy.take)
                part = Part(save, copy, disposable=False, after=after, follows=True)
            else:
                kept = HostFile(claimed[1] / name, self.host.generation(claimed[0]), copier)
                takers.append(lambda snapshot, first, slots, mark: kept.note(mark))
                ahead = partial(self.host.turns.choose_ahead, claimed[0], save.step, save.attempt.number)
                ways = {"after": after, "ahead": ahead, "told": self.host.turns.told}
                part = Part(save, kept, disposable=False, follows=True, **ways)
            parts.append((self._committers[self.host.tier], part))
        if "disk" in save.attempt.tiers:
            path, far = self.folder.scratch(save.step, self._token("disk", save.attempt)) / name, None
            if self._mirror_folder is not None and "mirror" in save.attempt.tiers:
                far = self._mirror_folder.scratch(save.step, self._token("mirror", save.attempt)) / name
            sent = self._bucket_folder is not None and "bucket" in save.attempt.tiers
            followers = (far is not None) + sent
            file = ShardFile(self.folder.ops, path, save.plan.image, followers=followers, pool=self.folder.pool)
            takers.append(partial(pipe.flush, file, memory, copier))
            parts.append((self._committers["disk"], Part(save, file, after=self._after_disk(save, claimed))))
            if far is not None:
                copy = MirrorFile(self.folder.ops, far, file, lambda: save.snapshot.error)
                parts.append((self._committers["mirror"], Part(save, copy, follows=True)))
            if sent:
                parts.append((self._committers["bucket"], Part(save, self._bucket_file(save, file), follows=True)))

        def on_chunks(snapshot: Snapshot, first: int, slots: Sequence[int], mark: Any) -> None:
            for take in takers:
                take(snapshot, first, slots, mark)

        return memory, parts, on_chunks

    def _token(self, tier: str, attempt: Attempt) -> str:
        """Distinguishes what this job writes from what others have, and one try from another: in a bucket all of them,
        elsewhere those of a step that may be on its way already."""
        one_try = tier == "bucket" or not attempt.rising
        return f"{self.coordinator.token}-{attempt.number:x}" if one_try else self.coordinator.token

    def _bucket_file(self, save: Save, file: ShardFile) -> BucketFile:
        assert self._bucket is not None and self._bucket_folder is not None
        path = self._bucket_folder.scratch(save.step, self._token("bucket", save.attempt)) / save.plan.shard_name
        late = ""
        if self._committers["bucket"].waiting >= WAITING:
            late = f"rank {self.coordinator.rank} still uploads earlier saves: the store is slower than saves come"
        store = self._bucket_folder.store
        ways = {"trace": self._trace, "refused": late}
        return BucketFile(store, self._bucket, path, file, lambda: save.snapshot.error, **ways)

    def _after_disk(self, save: Save, claimed: Claim | None) -> Callable[[bool], None]:
        def after(ok: bool) -> None:
            if self.host is not None and claimed is not None:
                self.host.done(claimed[0], save.step, "flush", ok)
            elif self.host is not None and ok:  # a restore looks into memory first
                self.host.forget(save.step)

        return after

    def explain(self, every: int | None, host_every: int | None, arena_bytes: int) -> str:
        """The tiers in words, one line each."""

        def rhythm(steps: int | None) -> str:
            return "as often as measured" if steps is None else f"every {steps} steps" if steps else "when asked"

        if isinstance(self.host, PartnerTier):
            lines = [self.host.explain(rhythm(host_every))]
        else:
            lines = [] if self.host is None else [f"  host    {rhythm(host_every)} → {self.host.folder.root}"]
        lines.append(
            f"  disk    {rhythm(every)} → {self.folder.root}, through {format_bytes(arena_bytes)} of host memory"
        )
        if self._removal is not None:
            lines.append(f"          {self._removal}")
        if self._mirror is not None and self._mirror_folder is not None:
            lines.append(f"  mirror  one of every {self._mirror.every} steps' → {self._mirror_folder.root}")
        if self._bucket is not None:
            lines.append(f"  bucket  one of every {self._bucket.every} steps' → {self._bucket.url}")
        return "\n".join(lines)

    def restored(self, step: int) -> None:
        """Training goes on from `step`: what comes after goes to the mirror and the bucket again. On all ranks."""
        self._sent = {tier: min(last, step) for tier, last in self._sent.items()}

    def roll_back(self, step: int) -> None:
        """After an explicit restore: newer checkpoints are set aside, or a restart would jump back into them."""
        if isinstance(self.host, PartnerTier):
            self.host.forget_after(step)
        if self.coordinator.rank:
            return
        for folder in filter(None, (self.folder, self._mirror_folder, self._bucket_folder)):
            for later in [found for found in folder.committed() if found > step]:
                log.info("set aside the newer checkpoint %d as %s", later, folder.set_aside(later, "left"))
        if isinstance(self.host, HostTier):
            self.host.forget_after(step)

    def close(self) -> None:
        """Give memory and folders back. Host memory is freed when a checkpoint on disk is as new; otherwise it stays
        for a later restore."""
        try:
            if self.host is not None:
                disk, memory = self.folder.committed(), self.host.folder.committed()
                self.host.close(remove=not memory or (bool(disk) and disk[-1] >= memory[-1]))
        finally:
            self._release_folders()

    def _release_folders(self) -> None:
        self.folder.release()
        if self._mirror_folder is not None:
            self._mirror_folder.release()
        if self._bucket_folder is not None:
            self._bucket_folder.release()
