"""What an attention schedule is for, from the definition: every row is the sum over all needs that hold it."""

from __future__ import annotations

from collections.abc import Mapping

from ..actions import Slice
from ..terms import Content, applied, combined, cut, op_text
from .attention_shape import INPUTS, OF_QUERIES, RESULTS, Need, Shape, block_params
from .running import Running

Named = Mapping[tuple[int, str], Content]  # by team and input


def result_contents(
    shape: Shape, content: Named, running: Mapping[tuple[int, str], Running], size: int, *, backward: bool
) -> dict[tuple[int, str], list[tuple[Slice, Content]]]:
    """For each team and result (by name): its rows, piece by piece, and what each piece must hold.

    `content`: what the inputs of each team are; `running`: the results, whose pieces are their segments.
    """
    op = "attend_backward" if backward else "attend"
    done: dict[tuple[int, str], list[tuple[Slice, Content]]] = {}
    output = 0
    for group in RESULTS[backward]:
        queries = group[0] in OF_QUERIES
        for team in range(size):
            result = running[team, group[0]]
            mine = [
                (i, j, need)
                for (i, j), needs in shape.needs.items()
                if (i if queries else j) == team
                for need in needs
                if i == j or need.area
            ]
            for segment in result.segments:
                blocks: list[list[Content]] = [[] for _ in group]
                for i, j, need in mine:
                    low, high = (need.q0, need.q1) if queries else (need.k0, need.k1)
                    if not (low <= segment.start and segment.stop <= high):
                        continue
                    first = output if need.q0 < need.q1 else 0
                    call = op_text(op, sorted(block_params(i, j, need).items())), _args(content, i, j, need, backward)
                    for at, into in enumerate(blocks):
                        rows = segment.stop - segment.start
                        into.append(applied(*call, rows, output=first + at, start=segment.start - low))
                for name, parts in zip(group, blocks):
                    where = Slice(name, segment.start, segment.stop)
                    done.setdefault((team, name), []).append((where, combined(result.op, parts)))
        output += len(group)
    return done


def _args(content: Named, i: int, j: int, need: Need, backward: bool) -> list[Content]:
    ends = [
        (content[i, n], need.q0, need.q1) if n in OF_QUERIES else (content[j, n], need.k0, need.k1)
        for n in INPUTS[backward]
    ]
    return [cut(whole, low, high) for whole, low, high in ends if low < high]
