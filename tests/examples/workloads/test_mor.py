"""Mixture-of-Recursions: its two forms agree, streaming changes nothing, evaluation does not look ahead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from undertow.dist.launch import detect
from undertow.examples.workloads.contract import Place
from undertow.examples.workloads.loop import Outcome, run
from undertow.examples.workloads.mor import WORKLOAD, MoR, MoRConfig
from undertow.examples.workloads.switches import PLAIN, Switches

CONFIG = MoRConfig(width=32, length=24, batch=2)
ROUTERS = ("learned", "random", "none")


def model(router: str, masked: bool) -> MoR:
    torch.manual_seed(5)
    return MoR(replace(CONFIG, router=router), masked).double()


def window(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lots = torch.rand(3, rows, 24, generator=generator)
    return torch.randint(0, 256, (rows, 25), generator=generator), lots


@pytest.mark.parametrize("router", ROUTERS)
def test_gathered_and_masked_recursions_are_the_same(router):
    """In float64: a key that is not chosen has weight exp(-1e4) = 0, so only the order of sums differs."""
    rows, lots = window()
    losses, gradients = [], []
    for masked in (False, True):
        built = model(router, masked)
        loss = built(rows[:, :-1], rows[:, 1:], lots)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in built.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("router", ROUTERS)
def test_causal_evaluation_does_not_look_ahead(router):
    built = model(router, False)
    rows, lots = window()
    torch.nn.init.normal_(built.foretell[1].weight)
    other = rows.clone()
    other[:, 15:] = (other[:, 15:] + 7) % 256
    one, two = (built(r[:, :-1], lots=lots, causal=True) for r in (rows, other))
    assert torch.equal(one[:, :15], two[:, :15]) and not torch.equal(one[:, 15:], two[:, 15:])


def test_the_recursions_take_fewer_and_fewer_of_the_same_tokens():
    built = model("learned", False)
    alive = torch.ones(2, 24)
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    for recursion, count in enumerate((24, 16, 8)):
        chosen = built.choose(x, alive, recursion, torch.zeros(3, 2, 24), causal=False)
        assert (chosen.sum(1) == count).all() and (chosen <= alive).all()
        alive = chosen
    assert CONFIG.work() == 2 * 24 + 24 + 16 + 8


def short(folder: Path, switches: Switches) -> Outcome:
    config = WORKLOAD.config("ci", "learned router", steps=6, batch=2, length=24, width=32, checkpoint_every=3)
    return run(WORKLOAD, "learned router", "ci", config, Place(detect(), folder, folder / "shared", switches))


@pytest.mark.parametrize("chunk", [5, 8, 24])
def test_streaming_changes_nothing_but_rounding(chunk, tmp_path):
    """float32 sums in chunks: rounding of 1e-7 a step, which six updates of a small model amplify to less than 1e-4.
    A lost contribution of one recursion to the shared block would show from the second step on."""
    plain = short(tmp_path / "plain", PLAIN)
    streamed = short(tmp_path / "streamed", Switches(checkpoint="off", stream=True, stream_chunk=chunk))
    assert streamed.losses == pytest.approx(plain.losses, rel=1e-4)
    assert streamed.evidence["stream"] == {"chunks": 6 * 5 * -(-24 // chunk), "passes": 6}  # five layers, all streamed
