"""What an attention schedule is for, from the definition: every row is the sum over all needs that hold it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..actions import Slice
from ..terms import Content, applied, combined, cut, op_text
from .attention_block import Block
from .attention_shape import OF_QUERIES, RESULTS, Shape
from .running import Running

Named = Mapping[tuple[int, str], Content]  # by team and input


def result_contents(
    shape: Shape,
    blocks: Sequence[Block],
    content: Named,
    running: Mapping[tuple[int, str], Running],
    size: int,
    *,
    backward: bool,
) -> dict[tuple[int, str], list[tuple[Slice, Content]]]:
    """For each team and result (by name): its rows, piece by piece, and what each piece must hold.

    `blocks`: the needs, each in one block. `content`: what the inputs of each team are; `running`: the results, whose
    pieces are their segments. `ValueError` when the blocks are not the needs.
    """
    wanted = Counter((i, j, n) for (i, j), needs in shape.needs.items() for n in needs if i == j or n.area)
    if Counter((block.i, *part) for block in blocks for part in block.parts) != wanted:
        raise ValueError("a need is in no block, or in two")
    done: dict[tuple[int, str], list[tuple[Slice, Content]]] = {}
    for group in RESULTS[backward]:
        queries = group[0] in OF_QUERIES
        for team in range(size):
            result = running[team, group[0]]
            mine = _shares(blocks, team, queries, backward)
            for segment in result.segments:
                parts: list[list[Content]] = [[] for _ in group]
                for block, first, low, high in mine:
                    if not (low <= segment.start and segment.stop <= high):
                        continue
                    call = op_text(block.op(backward), sorted(block.params.items())), _args(content, block, backward)
                    for at, into in enumerate(parts):
                        rows = segment.stop - segment.start
                        into.append(applied(*call, rows, output=first + at, start=segment.start - low))
                for name, terms in zip(group, parts):
                    where = Slice(name, segment.start, segment.stop)
                    done.setdefault((team, name), []).append((where, combined(result.op, terms)))
    return done


def _shares(blocks: Sequence[Block], team: int, queries: bool, backward: bool) -> list[tuple[Block, int, int, int]]:
    """(block, which of its results, first row, end) of what the team's queries, or keys, get."""
    found = []
    for block in blocks:
        if queries:
            found += [(block, 0, block.q0, block.q1)] if block.i == team else []
            continue
        first = 1 if block.q0 < block.q1 else 0  # dq comes before
        for j, need in block.parts:
            found += [(block, first, need.k0, need.k1)] if j == team else []
            first += 2
    return found


def _args(content: Named, block: Block, backward: bool) -> list[Content]:
    return [
        cut(content[block.i if name in OF_QUERIES else j, name], *rows) for name, (j, _), rows in block.reads(backward)
    ]
