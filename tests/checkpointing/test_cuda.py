"""Lazy copies from a CUDA device: exact under load, with little host memory, and never torn unnoticed."""

import pytest
import torch

from undertow.checkpointing import Checkpointer, sample
from undertow.checkpointing.folder import read_manifest
from undertow.checkpointing.reader import Reader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 2**20


def make(fused=False):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(1024, 1024) for _ in range(24)]
    model = torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(1024)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    return model, optimizer


def train(model, optimizer):
    x = torch.randn(4096, 1024, device="cuda")
    optimizer.zero_grad()
    (model(x) - x).pow(2).mean().backward()
    optimizer.step()


def tensors(model, optimizer):
    names = {id(p): n for n, p in model.named_parameters()}
    found = {f"model.{n}": v for n, v in model.state_dict().items()}
    for p, state in optimizer.state.items():
        found |= {f"optimizer.state.{names[id(p)]}.{k}": v for k, v in state.items()}
    return {k: v.detach().cpu().clone() for k, v in found.items()}


def stored(folder, step):
    path = folder.final(step)
    manifest = read_manifest(path)
    reader = Reader(path, manifest)
    return {key: reader.shard(key, record.shards[0]) for key, record in manifest.tensors.items()}


@pytest.mark.parametrize("arena", [None, 48 * MIB])
@pytest.mark.parametrize("fused", [False, True])
def test_saves_under_load_are_exact(tmp_path, arena, fused):
    model, optimizer = make(fused)
    train(model, optimizer)
    copies = {}
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, every=2, keep=None, arena_bytes=arena) as ckpt:
        for step in range(7):
            if step % 2 == 0:
                copies[step] = tensors(model, optimizer)
            ckpt.step(step)
            train(model, optimizer)
        assert all(report.ok for report in ckpt.wait()), ckpt.reports
        for step, expected in copies.items():
            found = stored(ckpt.folder, step)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(found[key], value), (step, key)


@pytest.mark.parametrize(("arena", "parked"), [(None, 1), (64 * MIB, 160 * MIB), (48 * MIB, 2**40), (None, 2**40)])
@pytest.mark.parametrize("host", [False, True])
def test_parked_saves_under_load_are_exact(tmp_path, arena, parked, host):
    """Of 288 MiB: no chunk fits, a part, or all; to disk, through little host memory too, or to host memory."""
    model, optimizer = make()
    train(model, optimizer)
    ways = {"host_every": 2} if host else {"every": 2, "keep": None}
    options = {"arena_bytes": arena, "device_bytes": parked} | ways
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, **options) as ckpt:
        copies = {}
        for step in range(7):
            if step % 2 == 0:
                copies[step] = tensors(model, optimizer)
            ckpt.step(step)
            train(model, optimizer)
        assert (ckpt._budget.park._memory is not None) == (parked > 1)
        assert all(report.ok for report in ckpt.wait()), ckpt.reports
        folder = ckpt.host.folder if host else ckpt.folder
        assert folder.committed()[-1] == 6
        for step in folder.committed():
            found = stored(folder, step)
            assert all(torch.equal(found[key], value) for key, value in copies[step].items()), step


def test_what_is_parked_may_be_written_behind_the_fence(tmp_path):
    """All of the state, while the training stream is busy, and little host memory to leave for."""
    model, optimizer = make()
    train(model, optimizer)
    options = {"arena_bytes": 32 * MIB, "device_bytes": 2**40, "keep": None}
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, **options) as ckpt:
        for step in range(4):
            expected = tensors(model, optimizer)
            torch.cuda._sleep(20_000_000)
            ckpt.save(step)
            ckpt.fence()
            for parameter in model.parameters():
                parameter.data.mul_(-2)
            assert ckpt.wait()[-1].ok, ckpt.reports
            found = stored(ckpt.folder, step)
            assert all(torch.equal(found[key], value) for key, value in expected.items()), step


def test_host_tier_every_step_is_exact_and_restores(tmp_path):
    model, optimizer = make()
    train(model, optimizer)
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, every=4, host_every=1) as ckpt:
        for step in range(10):
            expected = tensors(model, optimizer)
            ckpt.step(step)
            train(model, optimizer)
        assert all(report.ok for report in ckpt.wait()), ckpt.reports
        assert ckpt.host.skipped == 0
        found = stored(ckpt.host.folder, 9)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert ckpt.restore() == 9
        assert all(torch.equal(a, expected[key]) for key, a in tensors(model, optimizer).items())


@pytest.mark.parametrize("arena", [None, 64 * MIB])
def test_optimizers_that_step_inside_backward_wait_for_their_own_part(tmp_path, arena):
    model, _ = make()
    optimizers = {name: torch.optim.AdamW([p], lr=1e-3) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():

        def update(parameter, optimizer=optimizers[name]):
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)

    def backward():
        x = torch.randn(4096, 1024, device="cuda")
        (model(x) - x).pow(2).mean().backward()

    def now():
        found = {f"model.{n}": v for n, v in model.state_dict().items()}
        for name, optimizer in optimizers.items():
            found |= {f"{name}.state.{name}.{k}": v for k, v in next(iter(optimizer.state.values())).items()}
        return {k: v.detach().cpu().clone() for k, v in found.items()}

    backward()
    copies = {}
    options = {"every": 2, "keep": None, "arena_bytes": arena}
    with Checkpointer(tmp_path, model=model, **options, **optimizers) as ckpt:
        for step in range(7):
            if step % 2 == 0:
                copies[step] = now()
            ckpt.step(step)
            assert step % 2 or len(ckpt._live._watched) > 4
            backward()
        assert all(report.ok for report in ckpt.wait()), ckpt.reports
        for step, expected in copies.items():
            found = stored(ckpt.folder, step)
            for key, value in expected.items():
                assert torch.equal(found[key], value), (step, key)


@pytest.mark.parametrize("parked", [0, 96 * MIB])
def test_an_unfenced_writer_is_found(tmp_path, parked):
    model, optimizer = make()
    train(model, optimizer)
    options = {"arena_bytes": 32 * MIB, "device_bytes": parked}
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, **options) as ckpt:
        ckpt.save(1)
        for parameter in model.parameters():
            parameter.data.mul_(2)  # neither an optimizer nor fenced
        train(model, optimizer)
        report = ckpt.wait()[-1]
        assert not report.ok and "while it was being copied" in report.reason
        ckpt.save(2)
        assert ckpt.wait()[-1].ok
        assert ckpt.folder.committed() == [2]


def test_resume_is_bit_identical(tmp_path):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model, optimizer = make()
        with Checkpointer(tmp_path, model=model, optimizer=optimizer, every=3, keep=None) as ckpt:
            for step in range(6):
                ckpt.step(step)
                train(model, optimizer)
            expected = tensors(model, optimizer)
            assert ckpt.restore(step=3) == 3
            for _ in range(3, 6):
                train(model, optimizer)
            for key, value in tensors(model, optimizer).items():
                assert torch.equal(value, expected[key]), key
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("captured", [False, True])
def test_capturable_optimizers_and_a_step_captured_in_a_graph(tmp_path, captured):
    """Their step counter is on the device. A graph's replay runs no hook: `fence()` goes before it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(4)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    x = torch.randn(64, 512, device="cuda")

    def train():
        optimizer.zero_grad(set_to_none=False)
        (model(x) - x).pow(2).mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch's guide warms up
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    advance = train
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            train()
        advance = graph.replay
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, keep=None, arena_bytes=4 * MIB) as ckpt:
        copies = {}
        for step in range(4):
            copies[step] = tensors(model, optimizer)
            ckpt.save(step)
            if captured:
                ckpt.fence()
            advance()
        assert all(report.ok for report in ckpt.wait()), ckpt.reports
        for step, expected in copies.items():
            found = stored(ckpt.folder, step)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items()), step
        after = tensors(model, optimizer)
        assert ckpt.restore(step=2) == 2  # in place: the graph's addresses stay valid
        assert all(state["step"].is_cuda for state in optimizer.state.values())
        for _ in range(2):
            advance()
        again = tensors(model, optimizer)
        assert all(torch.equal(again[key], value) for key, value in after.items())


def test_a_replay_without_a_fence_is_found(tmp_path):
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, arena_bytes=4 * MIB) as ckpt:
        ckpt.save(1)
        graph.replay()
        report = ckpt.wait()[-1]
        assert not report.ok and "while it was being copied" in report.reason


def test_samples_of_all_tensors_are_gathered_by_address(monkeypatch):
    """One kernel reads at the addresses of tensors in several allocations, and sees a change of any of them."""
    tensors = [torch.randn(size, device="cuda") for size in (10_006, 3 * MIB, 998)]
    tensors += [torch.randn(2 * MIB, device="cuda", dtype=torch.bfloat16) for _ in range(40)]
    used: list[int] = []
    real = sample.by_address
    monkeypatch.setattr(sample, "by_address", lambda probes: used.append(len(probes)) or real(probes))
    sampler = sample.Sampler(tensors)
    assert used == [len(tensors)]
    (gather, first, _), *rest = sampler._groups
    assert not rest and first.numel() == len(tensors) * 3 * 64
    assert "cat" not in gather.__qualname__
    for tensor in tensors:
        sampler.before()
        assert not any(map(bool, sampler.changed()))
        tensor.data[-8:] += 1  # the last word of all may be left out: three samples lie evenly
        assert any(map(bool, sampler.changed()))
