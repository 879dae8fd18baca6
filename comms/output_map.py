"""Where the pieces of a product go, in T3's words (Pati et al., ASPLOS 2024, section 4.3).

`dma_map` marks a piece whose copy is prepared before the product starts and fires when `trigger` updates have been
counted; `remote_map` lets the product store straight into the peer's memory, which only engines with peer memory can
do, and the others turn into a store by DMA with the same result; what has no rule stays. The map is data: an engine
reads it, and makes triggers of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..dist.errors import UserError
from .chunk_plan import ChunkPlan, Piece


@dataclass(frozen=True)
class Rule:
    """Piece → rank `dst`. `op`: 'store' (the receiver keeps partials apart) or 'update' (it adds on arrival)."""

    piece: Piece
    dst: int
    op: str
    trigger: int
    remote: bool = False


@dataclass(frozen=True)
class OutputMap:
    """Rules in the order in which they are expected to fire."""

    rules: tuple[Rule, ...] = ()

    def dma_map(self, piece: Piece, dst: int, op: str = "update", trigger: int = 1) -> OutputMap:
        """Copy the piece to `dst` once `trigger` updates of it have been counted."""
        return self._with(Rule(piece, dst, op, trigger))

    def remote_map(self, piece: Piece, dst: int) -> OutputMap:
        """Store the piece in `dst`'s memory while it is made."""
        return self._with(Rule(piece, dst, "update", 1, remote=True))

    def by_dma(self) -> OutputMap:
        """The same result for engines without peer memory."""
        return OutputMap(tuple(replace(rule, remote=False) for rule in self.rules))

    def _with(self, rule: Rule) -> OutputMap:
        if rule.op not in ("store", "update") or rule.trigger < 1:
            raise UserError(
                f"op {rule.op!r} with trigger {rule.trigger}", expected="'store' or 'update', and at least 1"
            )
        if any(rule.piece == old.piece and rule.dst == old.dst for old in self.rules):
            raise UserError(f"{rule.piece} goes to rank {rule.dst} twice", expected="one rule for a piece and a rank")
        return OutputMap((*self.rules, rule))

    @classmethod
    def reduce_scatter(cls, plan: ChunkPlan) -> OutputMap:
        """Direct reduce-scatter: every foreign piece to its owner, who adds the partials in rank order."""
        return cls(tuple(Rule(p, p.owner, "store", plan.tiles(p)) for p in plan.scatter_order if p.owner != plan.rank))

    @classmethod
    def all_gather(cls, plan: ChunkPlan) -> OutputMap:
        """The own pieces to everyone, each as soon as it is there."""
        own = plan.chunk(plan.rank)
        return cls(tuple(Rule(piece, peer, "store", 1) for peer in plan.receivers for piece in own))

    @classmethod
    def spread(cls, plan: ChunkPlan) -> OutputMap:
        """The own pieces to everyone, the first piece first: for sums that become ready one after the other."""
        own = plan.chunk(plan.rank)
        return cls(tuple(Rule(piece, peer, "store", 1) for piece in own for peer in plan.receivers))
