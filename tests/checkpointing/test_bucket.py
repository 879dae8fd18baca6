"""Checkpoints in an object store, against a real S3 server: commit, restore, damage, crashes, refusals."""

from __future__ import annotations

import errno
import gc
import io
import os
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same
from s3_server import BUCKET, KEY_ID, S3, SECRET, running
from test_ranks import build, full_state, tensors, update

from undertow.checkpointing import Bucket, Checkpointer, Retention, bucket, bucket_reader, open_checkpoint, plan
from undertow.checkpointing.bucket_folder import BucketFolder
from undertow.checkpointing.cli import main
from undertow.checkpointing.object_store import ObjectStore, plain
from undertow.dist.errors import MissingPackage, UserError

FORK = get_context("fork")
WIDE = 800  # three tensors of 2.4 MiB: more than one part


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with running() as found:
        yield found


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty place, for this test alone."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    yield f"s3://{BUCKET}/{re.sub(r'[^a-z0-9]', '-', request.node.name)}"
    server.stand(False)
    server.permit(True)


def place(url: str, root: Path | None = None) -> BucketFolder:
    return BucketFolder(ObjectStore(url, retry_s=0), root)


def step_and_wait(ckpt: Checkpointer, job: Job, steps: range) -> None:
    for step in steps:
        ckpt.step(step)
        job.advance(step)
        ckpt.wait()


def outcome(ckpt: Checkpointer) -> list[tuple[int, bool]]:
    return [(report.step, report.ok) for report in ckpt.reports if report.tier == "bucket"]


# -- save, commit, restore -------------------------------------------------------------------------------------------


def save_and_lose_the_disk(rank: int, world: int, root: str, url: str) -> dict[str, Any]:
    path, store = Path(root), ObjectStore(url)
    job, states = Job(width=WIDE), {}
    options: dict[str, Any] = {"every": 1, "bucket": Bucket(url, every=2, keep=2, part_bytes=5 * 2**20)}
    with job.checkpointer(path, **options) as ckpt:
        for step in range(6):
            states[step] = job.state()
            step_and_wait(ckpt, job, range(step, step + 1))
        saved, text = outcome(ckpt), ckpt.explain()
        assert {r.nbytes for r in ckpt.reports if r.tier == "bucket"} <= {r.nbytes for r in ckpt.reports}
    home = place(url)
    here, there = path / "step-000000004", home.final(4).as_posix()
    names = sorted(file.name for file in here.iterdir() if file.name != "COMMIT.json")
    equal = {name: (here / name).read_bytes() == store.get(f"{there}/{name}") for name in names}
    shutil.rmtree(path)
    other = Job(seed=1, width=WIDE)
    with other.checkpointer(path, **options) as ckpt:
        step = ckpt.restore()
        assert [list(origin) for origin in ckpt.origins] == [[f"{store.url}/{there}"]] * world
        left = [name for name in os.listdir(path) if not name.startswith((".lock", "RESTARTS"))]
        back = same(other.state(), states[4])
        step_and_wait(ckpt, other, range(6, 7))
        again = outcome(ckpt)
    return {
        "saved": saved,
        "text": text,
        "equal": equal,
        "steps": home.committed(),
        "step": step,
        "left": left,
        "back": back,
        "again": again,
        "latest": store.get("LATEST").decode().strip() == there,
        "jobs": [name[:6] for name in store.list("jobs")],
    }


def test_every_kth_checkpoint_goes_there_and_comes_back_bit_for_bit(ranks, tmp_path, s3, server):
    (found,) = ranks(1, save_and_lose_the_disk, str(tmp_path / "c"), s3)
    assert found["saved"] == [(0, True), (2, True), (4, True)]
    assert f"bucket  one of every 2 steps' → {s3}" in found["text"]
    assert len(found["equal"]) == 4 and all(found["equal"].values()), found["equal"]
    assert (found["step"], found["back"], found["left"]) == (4, True, [])
    assert found["again"] == [(6, True)]
    assert found["steps"] == [4, 6]  # keep=2, and what was removed is gone with all its objects
    keys = server.ask("GET", f"{BUCKET}?list-type=2&prefix={s3.split('/')[-1]}/").decode()
    assert {int(step) for step in re.findall(r"<Key>[^<]*step-(\d+)\.", keys)} == {4, 6}
    assert found["jobs"] == ["000002"] and server.unfinished() == 0


def several_ranks(rank: int, world: int, root: str, url: str, layout: str) -> tuple[Any, dict[str, Any], int]:
    """Restore from the bucket alone, update, save there; what the state was then, and how many bytes came."""
    plan.SMALL_BYTES = 4096
    net, optimizer = build(layout, world, seed=world)
    options: dict[str, Any] = {"bucket": Bucket(url), "chunk_bytes": 4096, "timeout_s": 240}
    with Checkpointer(root, model=net, optimizer=optimizer, **options) as ckpt:
        step = ckpt.restore()
        spool = ckpt._tiers._bucket_folder._spool
        came = 0 if spool is None else spool.downloaded_bytes
        update(net, optimizer, step or 0)
        ckpt.save((step or 0) + 1)
        update(net, optimizer, 99)  # must not show
        ckpt.wait()
        assert not ckpt.failures, ckpt.reports
        ckpt.restore((step or 0) + 1)
        return step, {key: value.numpy() for key, value in full_state(net, optimizer).items()}, came


@pytest.mark.slow
def test_other_ranks_restore_what_several_have_saved(ranks, tmp_path, s3):
    """2 → 3 → 1 ranks, each with an empty disk; a plain run on one rank is the answer, as for local folders."""
    torch.manual_seed(0)
    net, optimizer = build("plain", 1, seed=2)
    for index, (layout, world) in enumerate([("fsdp", 2), ("fsdp", 3), ("plain", 1)]):
        found = ranks(world, several_ranks, str(tmp_path / str(index)), s3, layout)
        update(net, optimizer, index)
        expected = full_state(net, optimizer)
        for step, state, _ in found:
            assert step == (index or None) and same(tensors(state), expected), (layout, world)
        whole = max(came for *_, came in found) if world == 1 else 0
    three = [came for *_, came in ranks(3, several_ranks, str(tmp_path / "three"), s3, "fsdp")]
    assert whole and max(three) < 0.9 * whole, (three, whole)  # a rank fetches its share to verify and what it needs


# -- damage ----------------------------------------------------------------------------------------------------------


def damaged(rank: int, world: int, root: str, url: str, kind: str) -> list[Any]:
    job, store = Job(), ObjectStore(url)
    with job.checkpointer(Path(root) / "a", every=1, bucket=Bucket(url)) as ckpt:
        before = job.state()
        step_and_wait(ckpt, job, range(2))
    newest = place(url).final(1).as_posix()
    name = {"flipped": "__0_0.distcp", "short": "__0_1.distcp", "gone": ".metadata"}.get(kind, f"{kind}.json")
    data = bytearray(store.get(f"{newest}/{name}"))
    data[len(data) // 2] ^= 1
    if kind == "gone":
        store.delete([f"{newest}/{name}"])
    else:
        store.put(f"{newest}/{name}", bytes(data[:-1] if kind == "short" else data))
    other = Job(seed=1)
    with other.checkpointer(Path(root) / "b", every=1, bucket=Bucket(url)) as ckpt:
        step = ckpt.restore()
        aside = f"{newest}/COMMIT.bad.json"
        return [step, same(other.state(), before), place(url).committed(), store.exists(aside)]


@pytest.mark.parametrize("kind", ["flipped", "short", "gone", "manifest", "COMMIT"])
def test_a_damaged_object_is_refused_and_the_older_checkpoint_used(ranks, tmp_path, s3, kind):
    assert ranks(1, damaged, str(tmp_path), s3, kind) == [[0, True, [0], True]]


def changed_on_the_way(rank: int, world: int, root: str, url: str) -> list[Any]:
    real = os.pread

    def flipped(handle: int, count: int, offset: int) -> bytes:
        data = bytearray(real(handle, count, offset))
        data[len(data) // 2] ^= 1
        return bytes(data)

    job = Job()
    with job.checkpointer(Path(root), every=1, bucket=Bucket(url)) as ckpt:
        os.pread = flipped
        step_and_wait(ckpt, job, range(1))
        os.pread = real
        return [outcome(ckpt), "has changed on the disk" in ckpt.reports[-1].reason, place(url).committed()]


def test_damage_on_the_disk_is_not_uploaded(ranks, tmp_path, s3):
    assert ranks(1, changed_on_the_way, str(tmp_path), s3) == [[[(0, False)], True, []]]


def no_room_here(rank: int, world: int, root: str, url: str) -> list[Any]:
    job, real = Job(), bucket_reader._write
    with job.checkpointer(Path(root) / "a", every=1, bucket=Bucket(url)) as ckpt:
        before = job.state()
        step_and_wait(ckpt, job, range(1))

    def full(handle: int, data: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    other = Job(seed=1)
    untouched = other.state()
    with other.checkpointer(Path(root) / "b", bucket=Bucket(url)) as ckpt:
        bucket_reader._write = full
        with pytest.raises(UserError, match="room there for what it downloads"):
            ckpt.restore()
        same_as_before = same(other.state(), untouched)
        bucket_reader._write = real
        return [same_as_before, ckpt.restore(), same(other.state(), before)]


def test_a_full_disk_at_a_restore_is_no_damage(ranks, tmp_path, s3):
    """The checkpoint is not set aside for it, and nothing has been loaded."""
    assert ranks(1, no_room_here, str(tmp_path), s3) == [[True, 0, True]]


# -- crashes ---------------------------------------------------------------------------------------------------------


def die_in(stage: str, root: Path, url: str, pipe: Any) -> None:
    """Commit step 0, then say when the save of step 1 has come to `stage`, and wait there for the end."""

    def stop(*_: Any, **__: Any) -> Any:
        pipe.send("now")
        threading.Event().wait()

    job = Job(width=WIDE)
    with job.checkpointer(root, every=1, bucket=Bucket(url, part_bytes=5 * 2**20, uploads=1)) as ckpt:
        step_and_wait(ckpt, job, range(1))
        if stage == "upload":
            real = bucket.checksum
            parts: list[int] = []

            def after_some(data: bytes) -> str:
                parts.append(len(data))
                return stop() if sum(parts) > 12 * 2**20 else real(data)

            bucket.checksum = after_some
        else:
            ObjectStore.create = stop  # type: ignore[method-assign]
        ckpt.step(1)
        ckpt.wait()


def after_the_crash(rank: int, world: int, root: str, url: str) -> list[Any]:
    store, job, expected = ObjectStore(url), Job(seed=1, width=WIDE), Job(width=WIDE)
    with job.checkpointer(Path(root) / "new", every=1, bucket=Bucket(url)) as ckpt:
        step = ckpt.restore()
        back = same(job.state(), expected.state())
        tries = [name for name in store.folders() if name.startswith("step-")]
        job.advance(0)
        step_and_wait(ckpt, job, range(1, 2))
        return [step, back, len(tries), outcome(ckpt), place(url).committed()]


@pytest.mark.parametrize("stage", ["upload", "commit"])
def test_a_kill_leaves_the_older_checkpoint_the_newest(ranks, tmp_path, s3, stage):
    """Also removed by the next job: what the try had written. An upload that was under way is the store's to drop."""
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=die_in, args=(stage, tmp_path / "old", s3, theirs))
    child.start()
    theirs.close()
    assert ours.recv() == "now"
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert ranks(1, after_the_crash, str(tmp_path), s3) == [[0, True, 1, [(1, True)], [0, 1]]]


def every_prefix(rank: int, world: int, root: str) -> list[Any]:
    """Save with retention, roll back, save again, recording what changes the store; then, for every prefix of that,
    make a store in which just these things have happened, restore from it alone, and look what came."""
    path, done, lock = Path(root), [], threading.Lock()
    real = {name: getattr(ObjectStore, name) for name in ("put", "create", "upload", "delete")}

    def recorded(name: str) -> Any:
        def act(self: ObjectStore, what: Any, *args: Any, **options: Any) -> None:
            with lock:  # one order, as the store sees it
                real[name](self, what, *args, **options)
                keys = what if name == "delete" else [what]
                done.extend((key, None if name == "delete" else self.get(key)) for key in keys)

        return act

    for name in real:
        setattr(ObjectStore, name, recorded(name))
    job, states = Job(), {}
    with job.checkpointer(path / "disk", bucket=Bucket(f"file://{path}/far", keep=3), keep=None) as ckpt:
        for step in (0, 1, 2, 3, 1, 2):
            if step == 1 and 3 in states:
                assert ckpt.restore(1) == 1  # 2 and 3 are set aside
                job.advance(77)
                continue
            states.setdefault(step, []).append(job.state())
            ckpt.save(step)
            assert all(report.ok for report in ckpt.wait())
            job.advance(step)
    for name, act in real.items():
        setattr(ObjectStore, name, act)
    wrong, steps = [], []
    committed = [key for key, data in done if key.endswith("/COMMIT.json") and data is not None]
    rolled_back = [key for key in committed if key.startswith(("step-000000002.", "step-000000003."))][:2]
    for length in range(len(done) + 1):
        objects: dict[str, bytes] = {}
        for key, data in done[:length]:
            objects.pop(key, None) if data is None else objects.__setitem__(key, data)
        far = path / f"far-{length}"
        for key, data in objects.items():
            (far / key).parent.mkdir(parents=True, exist_ok=True)
            (far / key).write_bytes(data)
        commits = [key for key in objects if key.endswith("/COMMIT.json")]
        newest = max((int(key.split("-")[1].split(".")[0]) for key in commits), default=None)
        other = Job(seed=1)
        with other.checkpointer(path / f"disk-{length}", bucket=Bucket(f"file://{far}")) as ckpt:
            step = ckpt.restore()
        right = step == newest and (step is None or any(same(other.state(), state) for state in states[step]))
        for key in rolled_back:  # set aside is not removed
            right &= (key, None) not in done[:length] or (far / key).with_name("manifest.json").exists()
        wrong += [] if right else [(length, done[length - 1][0], step, newest)]
        steps += [] if steps[-1:] == [step] else [step]
    return [wrong, steps, len(done) > 30]


def test_whatever_has_happened_to_the_store_the_newest_commit_is_restored(ranks, tmp_path):
    """The order of the puts and deletes is all that keeps checkpoints valid, so every place to crash in it is tried."""
    assert ranks(1, every_prefix, str(tmp_path)) == [[[], [None, 0, 1, 2, 3, 1, 2], True]]


# -- stores that refuse, are away, or are slow -----------------------------------------------------------------------


def refused_for_a_while(rank: int, world: int, root: str, url: str, server: S3) -> list[Any]:
    job = Job()
    with job.checkpointer(Path(root), every=1, bucket=Bucket(url, retry_s=0)) as ckpt:
        step_and_wait(ckpt, job, range(1))
        server.permit(False)
        step_and_wait(ckpt, job, range(1, 2))
        server.permit(True)
        step_and_wait(ckpt, job, range(2, 3))
        disk = [report.ok for report in ckpt.reports if report.tier == "disk"]
        reasons = [report.reason for report in ckpt.reports if not report.ok]
        return [outcome(ckpt), disk, ckpt.failures, reasons, place(url).committed()]


def test_a_store_that_refuses_costs_that_save_of_that_tier(ranks, tmp_path, s3, server):
    ((saved, disk, failures, reasons, there),) = ranks(1, refused_for_a_while, str(tmp_path), s3, server)
    assert saved == [(0, True), (1, False), (2, True)] and disk == [True] * 3 and failures == 1
    assert there == [0, 2]
    assert "403" in reasons[0] and "InvalidAccessKeyId" in reasons[0], reasons
    assert KEY_ID not in reasons[0] and SECRET not in reasons[0]


def refused_at_once(rank: int, world: int, root: str, url: str) -> str:
    job = Job()
    with pytest.raises(UserError, match="cannot use the bucket") as caught:
        job.checkpointer(Path(root), every=1, bucket=Bucket(url))
    with job.checkpointer(Path(root), every=1) as ckpt:  # its folder was given back
        step_and_wait(ckpt, job, range(1))
    return str(caught.value)


@pytest.mark.parametrize("why", ["missing", "denied"])
def test_a_wrong_bucket_is_refused_before_training(ranks, tmp_path, s3, server, why):
    server.permit(why != "denied")
    url = s3 if why == "denied" else "s3://nobody-has-made-this/x"
    for text in ranks(2, refused_at_once, str(tmp_path), url):
        assert url in text and ("NoSuchBucket" if why == "missing" else "403") in text
        assert KEY_ID not in text and SECRET not in text


def away(rank: int, world: int, root: str, url: str, server: S3) -> list[Any]:
    job, other = Job(), Job(seed=1)
    path = Path(root)
    bucket = Bucket(url, retry_s=0)
    with job.checkpointer(path, every=1, bucket=bucket) as ckpt:
        with pytest.raises(UserError, match="cannot tell which checkpoints there are"):
            ckpt.restore()  # there may be one: beginning anew would be wrong
        states = [job.state()]
        step_and_wait(ckpt, job, range(1))
        found = outcome(ckpt)
    with other.checkpointer(path, every=1, bucket=bucket) as ckpt:
        step = ckpt.restore()  # from the disk
        good = same(other.state(), states[0])
    server.stand(False)
    os.environ.pop("AWS_TIMEOUT", None)
    os.environ["AWS_ENDPOINT"] = server.address
    with other.checkpointer(path, every=1, bucket=bucket) as ckpt:
        step_and_wait(ckpt, other, range(1, 2))
        return [found, step, good, outcome(ckpt)]


@pytest.mark.parametrize("how", ["gone", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_store_that_is_away_costs_no_training(ranks, tmp_path, s3, server, monkeypatch, how):
    with socket.socket() as nobody:  # bound and not listening: connections are refused
        nobody.bind(("127.0.0.1", 0))
        if how == "gone":
            monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        else:
            monkeypatch.setenv("AWS_TIMEOUT", "1s")
            server.stand(True)
        assert ranks(1, away, str(tmp_path), s3, server) == [[[(0, False)], 0, True, [(1, True)]]]


def one_rank_cannot_upload(rank: int, world: int, root: str, url: str) -> list[Any]:
    real = ObjectStore.upload
    job = Job()
    with job.checkpointer(Path(root), every=1, bucket=Bucket(url)) as ckpt:
        for step in range(3):
            broken = step == 1 and rank == 1

            def upload(*args: Any, broken: bool = broken, **options: Any) -> None:
                if broken:
                    raise TimeoutError("no way out")
                real(*args, **options)

            ObjectStore.upload = upload  # type: ignore[method-assign]
            step_and_wait(ckpt, job, range(step, step + 1))
        disk = [report.ok for report in ckpt.reports if report.tier == "disk"]
        return [outcome(ckpt), disk, ["no way out" in r.reason for r in ckpt.reports if not r.ok]]


def test_a_rank_that_cannot_upload_costs_the_save_on_all_ranks(ranks, tmp_path, s3, server):
    expected = [[(0, True), (1, False), (2, True)], [True] * 3, [True]]
    assert ranks(2, one_rank_cannot_upload, str(tmp_path), s3) == [expected] * 2
    keys = server.ask("GET", f"{BUCKET}?list-type=2&prefix={s3.split('/')[-1]}/").decode()
    assert {int(step) for step in re.findall(r"<Key>[^<]*step-(\d+)\.", keys)} == {0, 2}  # and nothing of step 1


def the_best_cannot_be_read(rank: int, world: int, root: str, url: str) -> list[Any]:
    real, silent = ObjectStore.get, threading.Event()

    def get(self: ObjectStore, key: str) -> bytes:
        if silent.is_set() and key.endswith("manifest.json"):
            raise TimeoutError(110, "no answer", key)
        return real(self, key)

    ObjectStore.get = get  # type: ignore[method-assign]
    job, policy, seen = Job(), Retention(last=1, best=1, metric="loss"), []
    for loss in (1.0, 2.0, 3.0):  # jobs: each learns the metrics of those before from the manifests
        with job.checkpointer(Path(root), bucket=Bucket(url, keep=policy)) as ckpt:
            ckpt.save(len(seen), metrics={"loss": loss})
            assert all(report.ok for report in ckpt.wait())
        seen.append(place(url).committed())
        silent.set() if loss == 1.0 else silent.clear()
    return seen


def test_retention_removes_nothing_while_it_cannot_see_which_are_best(ranks, tmp_path, s3):
    assert ranks(1, the_best_cannot_be_read, str(tmp_path), s3) == [[[0], [0, 1], [0, 2]]]


def slow(rank: int, world: int, root: str, url: str) -> list[Any]:
    let_go, real = threading.Event(), ObjectStore.upload

    def held(*args: Any, **options: Any) -> None:
        assert let_go.wait(240)
        real(*args, **options)

    ObjectStore.upload = held  # type: ignore[method-assign]
    job = Job()
    with job.checkpointer(Path(root), every=1, bucket=Bucket(url)) as ckpt:
        for step in range(4):
            ckpt.step(step)
            job.advance(step)
            ckpt._pipeline.drain(far=False)  # the disk is not kept waiting
        let_go.set()
        ckpt.wait()
        reasons = {report.reason.split(": ")[-1] for report in ckpt.reports if not report.ok}
        return [outcome(ckpt), reasons, [report.ok for report in ckpt.reports if report.tier == "disk"]]


def test_saves_to_a_slow_store_do_not_pile_up(ranks, tmp_path, s3):
    reason = "the store is slower than saves come"
    saved = [(0, True), (1, True), (2, False), (3, False)]
    assert ranks(1, slow, str(tmp_path), s3) == [[saved, {reason}, [True] * 4]]


# -- whose turn it is ------------------------------------------------------------------------------------------------


def branches(rank: int, world: int, root: str, url: str) -> list[Any]:
    job, store = Job(), ObjectStore(url)
    policy = Retention(last=1, best=1, metric="loss")
    with job.checkpointer(Path(root) / "a", bucket=Bucket(url, keep=policy), keep=None) as ckpt:
        for step, loss in enumerate([3.0, 1.0, 2.0]):
            ckpt.save(step, metrics={"loss": loss})
            ckpt.wait()
            job.advance(step)
        kept = place(url).committed()
        assert ckpt.restore(1) == 1  # back from step 2, which is set aside and saved anew
        rolled = place(url).committed()
        ckpt.save(2)
        ckpt.wait()
        twice = [name for name in store.folders() if name.startswith("step-000000002.")]
        with Job().checkpointer(Path(root) / "b", bucket=Bucket(url)) as later:  # on another machine, say
            ckpt.save(3)
            ckpt.wait()
            later.save(4)
            later.wait()
            ends = [[(r.step, r.ok) for r in c.reports if r.tier == "bucket"][-1] for c in (ckpt, later)]
            reason = ckpt.reports[-1].reason
    both = place(url).committed()
    with Job().checkpointer(Path(root) / "c", bucket=Bucket(url)) as anew:  # it restores nothing, and begins elsewhere
        anew.save(1)
        anew.wait()
    ones = [name for name in store.folders() if name.startswith("step-000000001.")]
    return [kept, rolled, len(twice), ends, "has taken" in reason, both, place(url).committed(), len(ones)]


def test_rollback_retention_and_a_job_that_was_replaced(ranks, tmp_path, s3):
    expected = [[1, 2], [1], 2, [(3, False), (4, True)], True, [1, 2, 4], [1], 1]
    assert ranks(1, branches, str(tmp_path), s3) == [expected]


def two_commits_of_one_step(rank: int, world: int, root: str, url: str) -> list[Any]:
    """As a crash between a commit and the removal of the older one leaves them."""
    store, jobs = ObjectStore(url), []
    for number in range(2):
        jobs.append(Job(seed=number))
        with jobs[-1].checkpointer(Path(root) / str(number), bucket=Bucket(f"{url}/{number}")) as ckpt:
            ckpt.save(5)
    for number in range(2):
        far = ObjectStore(f"{url}/{number}")
        (name,) = [name for name in far.folders() if name.startswith("step-")]
        for key in far.list(name):
            data = far.get(f"{name}/{key}")
            if key == "COMMIT.json" and number:
                data = data.replace(b'"job": 1', b'"job": 2')
            store.put(f"both/{name}/{key}", data)
    other = Job(seed=2)
    with other.checkpointer(Path(root) / "new", bucket=Bucket(f"{url}/both")) as ckpt:
        return [ckpt.restore(), same(other.state(), jobs[1].state())]


def test_of_two_commits_of_one_step_the_later_jobs_is_taken(ranks, tmp_path, s3):
    assert ranks(1, two_commits_of_one_step, str(tmp_path), s3) == [[5, True]]


# -- looking in from outside -----------------------------------------------------------------------------------------


def look_from_outside(rank: int, world: int, root: str, url: str) -> dict[str, Any]:
    path, job, store = Path(root), Job(), ObjectStore(url)
    with job.checkpointer(path / "a", every=1, keep=None, bucket=Bucket(url)) as ckpt:
        step_and_wait(ckpt, job, range(3))

    def ckpt_says(*argv: str) -> tuple[int, str]:
        said = io.StringIO()
        with redirect_stdout(said):
            try:
                code = main(list(argv))
            except UserError as error:
                return error.exit_code, str(error)
        return code, said.getvalue()

    found: dict[str, Any] = {"list": ckpt_says("list", url), "verify": ckpt_says("verify", url, "--all")}
    before = open_checkpoint(path / "a", step=1)
    far = open_checkpoint(url, step=1)
    one = next(key for key in far if key.endswith("0.weight"))
    assert torch.equal(far[one], before[one])
    handles = len(os.listdir("/proc/self/fd"))
    another = open_checkpoint(url)
    assert len(another) and len(os.listdir("/proc/self/fd")) > handles
    del another
    gc.collect()
    found["closed"] = len(os.listdir("/proc/self/fd")) <= handles
    found["fetched"] = far._reader.spool.downloaded_bytes, sum(r.nbytes for r in far.manifest.files.values())
    found["names"] = list(far) == list(before)
    found["mean"] = ckpt_says("inspect", url, "--tensor", one) == ckpt_says("inspect", str(path / "a"), "--tensor", one)
    found["diff"] = ckpt_says("diff", url, str(path / "a"), "--step-a", "1", "--step-b", "1")
    found["differ"] = ckpt_says("diff", url, url, "--step-a", "1")[0]
    for source, out in ((url, "far"), (str(path / "a"), "near")):
        ckpt_says("export", source, "--out", str(path / out), "--module", "model")
    found["export"] = [(path / out / "model.safetensors").read_bytes() for out in ("far", "near")]
    found["fetch"] = ckpt_says("fetch", url, "--out", str(path / "b"), "--step", "1")
    here, there = path / "a" / "step-000000001", path / "b" / "step-000000001"
    found["same files"] = {
        file.name: file.read_bytes() == (there / file.name).read_bytes()
        for file in here.iterdir()
        if file.name != "COMMIT.json"  # it has its own time
    }
    other = Job(seed=1)
    with other.checkpointer(path / "b") as ckpt:
        found["restored"] = ckpt.restore()
    found["again"] = ckpt_says("fetch", url, "--out", str(path / "b"), "--step", "0")
    key = f"{place_of(url, 0)}/__0_0.distcp"
    store.put(key, store.get(key)[:-1] + b"x")
    found["damaged"] = ckpt_says("verify", url, "--step", "0")
    found["no export"] = ckpt_says("export", url, "--out", str(path / "no"), "--step", "0", "--module", "model")
    found["dry"] = ckpt_says("prune", url, "--keep", "last=1")[0], place(url).committed()
    found["prune"] = ckpt_says("prune", url, "--keep", "last=1", "--no-dry-run")[0], place(url).committed()
    found["nothing"] = ckpt_says("verify", f"{url}/elsewhere")
    return found


def place_of(url: str, step: int) -> str:
    return place(url).final(step).as_posix()


def test_the_command_line_and_open_checkpoint_read_it(ranks, tmp_path, s3):
    (found,) = ranks(1, look_from_outside, str(tmp_path), s3)
    assert found["list"][0] == 0 and found["list"][1].count("whole") == 4  # and the title
    assert found["verify"][0] == 0 and found["verify"][1].count(": whole") == 3
    some, whole = found["fetched"]
    assert 0 < some < 0.5 * whole and found["names"] and found["mean"]
    assert found["closed"]
    assert found["diff"][0] == 0 and "are equal" in found["diff"][1] and found["differ"] == 1
    assert found["export"][0] == found["export"][1]
    assert found["fetch"][0] == 0 and found["restored"] == 1
    assert len(found["same files"]) == 4 and all(found["same files"].values())
    assert found["again"][0] == 2 and "holds step 1" in found["again"][1]
    assert found["damaged"][0] == 1 and "DAMAGED" in found["damaged"][1]
    assert found["no export"][0] == 2 and "is damaged" in found["no export"][1]
    assert found["dry"] == (0, [0, 1, 2]) and found["prune"] == (0, [2])
    assert found["nothing"][0] == 2 and "holds no checkpoint" in found["nothing"][1]


def the_guides_program(rank: int, world: int, root: str, program: str) -> list[Any]:
    os.chdir(root)
    names: dict[str, Any] = {"torch": torch, "model": torch.nn.Linear(512, 512)}
    names["optimizer"] = torch.optim.AdamW(names["model"].parameters())
    exec(compile(program, "guide", "exec"), names)
    shutil.rmtree("runs")
    exec(compile(program, "guide", "exec"), names)
    assert torch.isfinite(open_checkpoint("s3://runs/guide")["model.weight"]).all()
    return [names["start"], place("s3://runs/guide").committed()]


def test_the_program_of_the_guide_runs(ranks, tmp_path, s3):
    guide = Path(__file__).parents[2] / "docs" / "checkpointing.md"
    (program,) = re.findall(r"```py\n(.*?)```", guide.read_text(), re.S)
    # a job that begins sends its first checkpoint, whatever the last one has sent
    assert ranks(1, the_guides_program, str(tmp_path), program) == [[10, [0, 10, 15]]]


# -- what users type -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "runs/a"},
        {"url": "s3://me:hunter2@b/x"},
        {"url": "az://c/x?sig=hunter2"},
        {"url": "abfss://c:hunter2@a/x"},
        {"every": 0},
        {"keep": 0},
        {"part_bytes": 1},
        {"uploads": 0},
    ],
)
def test_a_wrong_option_is_named_and_no_key_is_shown(wrong):
    with pytest.raises(UserError) as caught:
        Bucket(**{"url": "s3://b/x", **wrong})
    assert "expected" in str(caught.value) and "hunter2" not in str(caught.value)


def test_azures_own_form_of_a_url_is_taken():
    assert Bucket("abfss://container@account.dfs.core.windows.net/runs").every == 1


def test_an_answer_of_a_server_is_cut_down_to_code_and_message():
    text = (
        "Error performing PUT https://u:p@h/b/k?sig=abc in 2ms - Server returned non-2xx status code: 403 Forbidden: "
        "<Error><Code>SignatureDoesNotMatch</Code><Message>It differs.</Message><AWSAccessKeyId>AKI</AWSAccessKeyId>"
        "<StringToSign>AWS4 AKI</StringToSign></Error>\n\nDebug source: AKI sig=abc"
    )
    assert plain(Exception(text)) == (
        "Error performing PUT https://…@h/b/k in 2ms - Server returned non-2xx status code: 403 Forbidden "
        "(SignatureDoesNotMatch: It differs.)"
    )


def test_the_library_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(MissingPackage, match=r"undertow\[object-store\]"):
        ObjectStore("s3://b/x")
