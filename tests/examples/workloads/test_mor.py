"""Mixture-of-Recursions: its two forms agree, streaming changes nothing, evaluation does not look ahead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from undertow.checkpointing.folder import read_manifest
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
        chosen = built.choose(lambda head: head(x)[..., 0], alive, recursion, torch.zeros(3, 2, 24), causal=False)
        assert (chosen.sum(1) == count).all() and (chosen <= alive).all()
        alive = chosen
    assert CONFIG.work() == 2 * 24 + 24 + 16 + 8


def test_of_tokens_that_are_alike_the_earlier_are_chosen_whatever_rounding_says():
    built, alive = model("learned", False), torch.ones(2, 24)
    scores = 0.3 + 1e-7 * torch.arange(24.0).expand(2, 24)  # what a run of spaces has, and noise for the later ones
    scores = scores.clone()
    scores[1, 20] = 0.4  # one that is really wanted
    chosen = built.choose(lambda head: scores, alive, 1, torch.zeros(3, 2, 24), causal=False)
    assert chosen[0].nonzero().flatten().tolist() == [*range(16)]
    assert chosen[1].nonzero().flatten().tolist() == [*range(15), 20]


def short(folder: Path, switches: Switches, variant: str = "learned router", **options) -> Outcome:
    config = WORKLOAD.config(
        "ci", variant, steps=6, batch=2, length=24, width=32, checkpoint_every=3, eval_bytes=1000, warmup=2
    )
    return run(WORKLOAD, variant, "ci", config, Place(detect(), folder, folder / "shared", switches), **options)


@pytest.mark.parametrize("chunk", [5, 8, 24])
def test_streaming_changes_nothing_but_rounding(chunk, tmp_path):
    """float32 sums in chunks: rounding of 1e-7 a step, which six updates of a small model amplify to less than 1e-4.
    A lost contribution of one recursion to the shared block would show from the second step on."""
    plain = short(tmp_path / "plain", PLAIN)
    streamed = short(tmp_path / "streamed", Switches(checkpoint="off", stream=True, stream_chunk=chunk))
    assert streamed.losses == pytest.approx(plain.losses, rel=1e-4)
    assert streamed.evidence["stream"] == {"chunks": 6 * 5 * -(-24 // chunk), "passes": 6}  # five layers, all streamed


def test_a_checkpoint_holds_the_shared_block_once(tmp_path):
    """Under its name in each of the recursions, at one place of one file."""
    short(tmp_path / "run", Switches(checkpoint="lazy"))
    tensors = read_manifest(tmp_path / "run" / "checkpoints" / "step-000000006").tensors
    names = [name for name in tensors if name.startswith("model.stream_layers.1.block.")]
    assert len(names) == 9
    for name in names:
        places = [tensors[name.replace("layers.1", f"layers.{layer}")].shards for layer in (1, 2, 3)]
        assert places[0] == places[1] == places[2]
        assert places[0] != tensors[name.replace("layers.1.block", "layers.4")].shards


def overlapped(rank: int, world: int, folder: str, overlap: str, variant: str, stop_at: int | None) -> Outcome:
    torch.set_num_threads(1)
    return short(Path(folder), Switches(checkpoint="lazy", overlap=overlap), variant, stop_at=stop_at)


@pytest.mark.slow
@pytest.mark.parametrize("world, overlap, variant", [(2, "on", "learned router"), (2, "auto", "random router")])
def test_overlapped_products_change_nothing_but_rounding(world, overlap, variant, tmp_path, ranks):
    """As in test_equivalence, sums in another order. A row is chosen by its score's rank among 24, whose neighbours
    are 1e-3 apart; a tie within rounding would choose another token and show as a jump."""
    plain = short(tmp_path / "plain", PLAIN, variant)
    first, *others = ranks(world, overlapped, str(tmp_path / "on"), overlap, variant, None)
    assert first.losses == pytest.approx(plain.losses, rel=2e-4)
    assert first.metrics == pytest.approx(plain.metrics, rel=1e-3)
    for other in others:
        assert other.losses == first.losses and other.weights == first.weights and other.metrics == first.metrics
    counts = first.evidence["overlap"]
    updates, evaluations = 6 * 5 * 8, 2 * 2 * 5 * 4  # blocks × products; windows of 32 rows, causal and not
    assert counts["products"] == updates + evaluations and counts["bytes"] > 0
    pieces = counts["messages"] / counts["products"] / (world - 1)
    assert pieces == 4 if overlap == "on" else 1 <= pieces <= 4


@pytest.mark.slow
def test_a_checkpoint_of_overlapped_ranks_goes_on_without_them(tmp_path, ranks):
    """Weights and moments are saved by name and global shape, so the plain model on one rank takes them over."""
    whole = short(tmp_path / "whole", PLAIN)
    ranks(2, overlapped, str(tmp_path / "run"), "on", "learned router", 3)
    rest = short(tmp_path / "run", Switches(checkpoint="lazy"), resume=True)
    assert rest.updates >= 3 and rest.losses == pytest.approx(whole.losses[-rest.updates :], rel=2e-4)
