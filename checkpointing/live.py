"""The state as it is now, by key, and the plan to save it, made anew only when the state's shape has changed.

A save every step can afford neither to list the state nor to plan, so both are kept: `Watch` says whether anything was
replaced, and what is not a tensor of a module or an optimizer is read anew each time.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from ..dist.errors import PeerLost
from .attempt import ANEW, one_save
from .coordinate import Coordinator
from .copies import copier_for
from .plan import SavePlan, forget_words, make_plan, signature
from .sample import Sampler
from .save import SaveReport
from .seal import Seal
from .spread import own_part
from .staging import Staging
from .state import AppState, Leaf, local_tensor, refuse_odd
from .watch import Watch
from .whereabouts import Versions

PARTS = 8  # of the lazy tensors at most, fenced one after the other as optimizers and their groups come to them


class LiveState:
    """`state` on this rank. `plan`, `copier` and `staging` are there after the first `values`."""

    plan: SavePlan
    addresses: np.ndarray  # of the lazy tensors, in plan order

    def __init__(self, state: AppState, coordinator: Coordinator, *, chunk_bytes: int, timeout_s: float) -> None:
        self.state, self._coordinator = state, coordinator
        self._chunk_bytes, self._timeout_s = chunk_bytes, timeout_s
        self._plan_key: tuple | None = None
        self._planned_key: tuple = ()  # of the last plan that all ranks had
        self.planned_now = False  # whether the last `values` made the plan
        self._anew_for = -1  # the step whose save was the last to ask for a plan of all
        self._tried: list[str] = []  # the plans whose words are in the store
        self._fresh_key: tuple = ()
        self._names: dict[int, str] = {}
        self._watch: Watch | None = None
        self._sources: list[torch.Tensor] = []
        self._watched: list[Watched] = []
        self._ends: dict[int, list[int]] = {}
        self._eager: list[torch.Tensor] = []
        self._renewed: list[tuple[int, str]] = []

    def values(self, name: str, before_planning: Callable[[], None]) -> Mapping[str, Any]:
        """Every value to save by key, tensors as this rank's part. Collective when the shape has changed, in meetings
        under `name`; then `before_planning` is called before the old plan goes. `PeerLost` on all ranks when one is
        late, has no memory, or has a state of the shape it had: the next call plans again. Whatever a user's
        `state_dict()` raises comes through."""
        self.planned_now = False
        if self._watch is not None and self._watch.unchanged():
            fresh = self.state.fresh_leaves(self._names)
            if signature(fresh) == self._fresh_key:
                found = ChainMap({leaf.key: local(leaf.value) for leaf in fresh}, self._watch.fixed)
                for place, key in self._renewed:
                    self._eager[place] = found[key]
                return found
        self._watch = None  # until all that it stands for is known
        self._names = self.state.parameter_names()
        held, fresh = self.state.held_leaves(self._names), self.state.fresh_leaves(self._names)
        leaves = [*held, *fresh]
        refuse_odd(leaves)
        key = signature(leaves)
        if key != self._plan_key:
            before_planning()
            self._plan_key = None  # until all ranks have the new plan
            try:
                self._replan(name, leaves)
            except PeerLost as error:
                raise PeerLost(f"{error}{news(self._planned_key, key, self._coordinator.rank)}") from error
            self._plan_key = self._planned_key = key
            self.planned_now = True
        self._fresh_key = signature(fresh)
        found = {leaf.key: local(leaf.value) for leaf in leaves}
        watch = Watch(self.state, leaves)
        with one_save(self._coordinator.rank):
            self._take(found, watch)
        self._watch = watch
        return found

    def _take(self, values: Mapping[str, Any], watch: Watch) -> None:
        """Note the tensors in plan order, and which of the eager ones every save must read anew."""
        self._eager = [values[index.fqn] for index in self.plan.eager]
        self._renewed = [
            (place, index.fqn) for place, index in enumerate(self.plan.eager) if index.fqn not in watch.fixed
        ]
        self.staging.settle(self._eager, {place for place, _ in self._renewed})
        sources = [values[index.fqn] for index in self.plan.lazy]
        self.addresses = np.fromiter(map(torch.Tensor.data_ptr, sources), np.int64, len(sources))
        if not self._sources or self.addresses.tolist() != [t.data_ptr() for t in self._sources]:
            image = self.plan.image
            self._ends = ends(self.addresses.tolist(), image.last_chunk, self.state.optimizers.values())
            borders = chain.from_iterable(self._ends.values())
            self._watched = watch_parts(sources, image.last_chunk, borders, image.chunks - 1)
        self._sources = sources

    def _replan(self, name: str, leaves: Sequence[Leaf]) -> None:
        talk, timeout_s = self._coordinator, self._timeout_s
        self._tried.append(f"{name}/plan")
        with one_save(talk.rank):
            copier = copier_for([local_tensor(leaf.value) for leaf in leaves if isinstance(leaf.value, torch.Tensor)])
        plan = make_plan(leaves, talk, f"{name}/plan", timeout_s=timeout_s, chunk_bytes=self._chunk_bytes)
        staging = talk.together(f"{name}/staging", partial(Staging, plan, copier.device), timeout_s=timeout_s)
        self.plan, self.copier, self.staging = plan, copier, staging
        self._sources = []
        while len(self._tried) > 1:  # as large as the plans: a state that often grows would fill the store
            forget_words(self._tried.pop(0), talk)

    def heard(self, report: SaveReport, _: int) -> None:
        """Of a save that has ended: whether another rank waits for a plan of all. Each tier says so, some of them when
        there is one already."""
        if ANEW in report.reason and report.step != self._anew_for:
            self._plan_key, self._watch, self._anew_for = None, None, report.step

    @property
    def planned(self) -> bool:
        """Whether all ranks have a plan, of the state at the last save."""
        return self._plan_key is not None

    @property
    def way(self) -> str:
        """How the next save will see whether a tensor has been replaced."""
        return "listed anew at the next save" if self._watch is None else self._watch.way

    @property
    def pinned(self) -> bool:
        return self.copier.device.type == "cuda"

    @property
    def eager(self) -> list[torch.Tensor]:
        """The eager tensors in plan order, as of the last `values`."""
        return self._eager

    @property
    def sources(self) -> list[torch.Tensor]:
        """The lazy tensors in plan order."""
        return self._sources

    def seals(self) -> list[Seal]:
        """What watches the lazy tensors from now on, part by part."""
        return [Seal(*part) for part in self._watched]

    def end_of(self, optimizer: torch.optim.Optimizer, group: int | None = None) -> int | None:
        """The last chunk that must have left before `optimizer` writes, or before it writes its `group`-th group;
        None: all of them."""
        known = self._ends.get(id(optimizer), [])
        end = max(known[slice(group, None if group is None else group + 1)], default=None)
        return next((part.chunk for part in self._watched[:-1] if end is not None and end <= part.chunk), None)


def news(before: tuple, now: tuple, rank: int) -> str:
    """What a plan's key says of the state on `rank` that the one `before` did not; '' where there was none."""
    if not before:
        return ""
    old, new = set(before[1:]), set(now[1:])
    rows = [row for row in (*now[1:], *before[1:]) if (row in old) != (row in new)]
    names = list(dict.fromkeys(".".join(map(str, row[0])) for row in rows))
    if not names:
        return ""
    some = ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    return f"; on rank {rank} {some} came, went or has another shape (what differs by rank belongs in per_rank)"


class Watched(NamedTuple):
    """Tensors that are sampled together: those that end in chunks up to `chunk`, and after the part before."""

    chunk: int
    tensors: list[torch.Tensor]
    sampler: Sampler
    versions: Versions | None


def ends(
    addresses: Sequence[int], last_chunk: Sequence[int], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[int, list[int]]:
    """id(optimizer) → per parameter group, the last chunk of what it writes. Tensors that no group owns (an EMA) come
    first in the image and count for each, because whoever writes them may follow any of their steps."""
    chunk_of = dict(zip(addresses, last_chunk))
    found: dict[int, list[int]] = {}
    free = set(chunk_of)
    for optimizer in optimizers:
        state, found[id(optimizer)] = own_part(optimizer).state, []
        for group in optimizer.param_groups:
            held = [value for p in group["params"] for value in (p, *state.get(p, {}).values())]
            places = {local_tensor(value).data_ptr() for value in held if isinstance(value, torch.Tensor)}
            mine = places & chunk_of.keys()
            found[id(optimizer)].append(max((chunk_of[address] for address in mine), default=0))
            free -= mine
    least = max((chunk_of[address] for address in free), default=0)
    return {key: [max(end, least) for end in groups] for key, groups in found.items()}


def watch_parts(
    tensors: Sequence[torch.Tensor], last_chunk: Sequence[int], wanted: Iterable[int], last: int
) -> list[Watched]:
    """The tensors in at most `PARTS` parts, each ending where a group does; the last one ends at chunk `last`."""
    borders, step = [], max(1, (last + 1) // PARTS)
    for end in sorted(set(wanted) - {last}):
        if end - (borders[-1] if borders else -1) >= step:
            borders.append(end)
    parts, begin = [], -1
    for end in (*borders, last):
        held = [tensor for tensor, chunk in zip(tensors, last_chunk) if begin < chunk <= end]
        if held:
            parts.append(Watched(end, held, Sampler(held), Versions.of(held)))
            begin = end
    return parts


def local(value: Any) -> Any:
    """A tensor as this rank's part; anything else as it is."""
    return local_tensor(value) if isinstance(value, torch.Tensor) else value
