"""The state as it is now, by key, and the plan to save it, made anew only when the state's shape has changed.

A save every step can afford neither to list the state nor to plan, so both are kept: `Watch` says whether anything was
replaced, and what is not a tensor of a module or an optimizer is read anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .coordinate import Coordinator
from .copies import copier_for
from .plan import SavePlan, make_plan, signature
from .sample import Sampler
from .staging import Staging
from .state import AppState, Leaf, local_tensor
from .watch import Watch


class LiveState:
    """`state` on this rank. `plan`, `copier` and `staging` are there after the first `values`."""

    plan: SavePlan
    addresses: np.ndarray  # of the lazy tensors, in plan order

    def __init__(self, state: AppState, coordinator: Coordinator, *, chunk_bytes: int, timeout_s: float) -> None:
        self.state, self._coordinator = state, coordinator
        self._chunk_bytes, self._timeout_s = chunk_bytes, timeout_s
        self._plan_key: tuple | None = None
        self._fresh_key: tuple = ()
        self._names: dict[int, str] = {}
        self._watch: Watch | None = None
        self._plans = 0
        self._sources: list[torch.Tensor] = []
        self._sampler: Sampler | None = None
        self._eager: list[torch.Tensor] = []
        self._renewed: list[tuple[int, str]] = []

    def values(self, before_planning: Callable[[], None], after_planning: Callable[[], None]) -> Mapping[str, Any]:
        """Every value to save by key, tensors as this rank's part. Collective when the shape has changed; then the two
        functions are called, before the old plan goes and when the new one is there."""
        if self._watch is not None and self._watch.unchanged():
            fresh = self.state.fresh_leaves(self._names)
            if signature(fresh) == self._fresh_key:
                found = {**self._watch.fixed, **{leaf.key: local(leaf.value) for leaf in fresh}}
                for place, key in self._renewed:
                    self._eager[place] = found[key]
                return found
        leaves = self.state.leaves()
        key = signature(leaves)
        if key != self._plan_key:
            before_planning()
            self._replan(leaves)
            after_planning()
            self._plan_key = key
        self._names = self.state.parameter_names()
        self._watch = Watch(self.state, leaves)
        self._fresh_key = signature(self.state.fresh_leaves(self._names))
        found = {leaf.key: local(leaf.value) for leaf in leaves}
        self._take(found)
        return found

    def _take(self, values: Mapping[str, Any]) -> None:
        """Note the tensors in plan order, and which of the eager ones every save must read anew."""
        assert self._watch is not None
        self._eager = [values[index.fqn] for index in self.plan.eager]
        self._renewed = [
            (place, index.fqn) for place, index in enumerate(self.plan.eager) if index.fqn not in self._watch.fixed
        ]
        sources = [values[index.fqn] for index in self.plan.lazy]
        self.addresses = np.fromiter(map(torch.Tensor.data_ptr, sources), np.int64, len(sources))
        if not self._sources or self.addresses.tolist() != [t.data_ptr() for t in self._sources]:
            self._sampler = Sampler(sources) if sources else None
        self._sources = sources

    def _replan(self, leaves: Sequence[Leaf]) -> None:
        self._plans += 1
        name = f"plan/{self._plans}"
        self.plan = make_plan(leaves, self._coordinator, name, timeout_s=self._timeout_s, chunk_bytes=self._chunk_bytes)
        self.copier = copier_for([local_tensor(leaf.value) for leaf in leaves if isinstance(leaf.value, torch.Tensor)])
        self.staging = Staging(self.plan, self.copier.device)
        self._sources = []
        self._sampler = None

    @property
    def pinned(self) -> bool:
        return self.copier.device.type == "cuda"

    @property
    def eager(self) -> list[torch.Tensor]:
        """The eager tensors in plan order, as of the last `values`."""
        return self._eager

    @property
    def sources(self) -> tuple[list[torch.Tensor], Sampler | None]:
        """The lazy tensors in plan order, and the sampler that watches them; None where there is none."""
        return self._sources, self._sampler


def local(value: Any) -> Any:
    """A tensor as this rank's part; anything else as it is."""
    return local_tensor(value) if isinstance(value, torch.Tensor) else value
