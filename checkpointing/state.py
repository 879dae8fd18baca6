"""What a training program's state is, and which of it may be copied late.

Parameters and optimizer state are *lazy*: between two optimizer steps nothing may write them, so their bytes can leave
while forward and backward run. Everything else (buffers, which BatchNorm writes in forward; RNG; scalars; whatever the
user adds) is *eager*: it is copied before `save` returns. Names follow torch's `get_state_dict`, so that a checkpoint
can be read by `torch.distributed.checkpoint` into the usual dictionaries.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from ..dist.errors import UserError
from .spread import own_part, refuse_unknown

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Fresh:
    """A value that nobody else holds, so that it may be pickled later than it was taken."""

    value: Any


@dataclass(frozen=True)
class Leaf:
    """One value of the state. `lazy` is the optimizer's rank of touching it (smaller is earlier; -1: no optimizer
    does), or None for eager."""

    path: Path
    value: Any
    lazy: int | None = None

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes that DDP, torch.compile and checkpoint wrappers add."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class AppState:
    """The named objects of one program: modules, optimizers and anything with `state_dict` and `load_state_dict`.

    `shared` objects are the same on every rank (modules and optimizers may be sharded as DTensors); those in
    `per_rank` differ (data loader positions) and are stored once per rank.
    """

    def __init__(self, shared: Mapping[str, Any], per_rank: Mapping[str, Any], *, rank: int, rng: bool) -> None:
        for name, thing in (*shared.items(), *per_rank.items()):
            if not callable(getattr(thing, "state_dict", None)):
                raise UserError(
                    f"'{name}' has no state_dict(); it is of type {type(thing).__name__}",
                    expected="a module, an optimizer or an object with state_dict() and load_state_dict()",
                    remedy=f"wrap '{name}' in an object that has both",
                )
        refuse_unknown(shared)
        self.modules = {name: thing for name, thing in shared.items() if isinstance(thing, nn.Module)}
        self.optimizers = {name: thing for name, thing in shared.items() if isinstance(thing, torch.optim.Optimizer)}
        taken = {*self.modules, *self.optimizers}
        self.others = {name: thing for name, thing in shared.items() if name not in taken}
        self.per_rank = dict(per_rank)
        self.rank, self.rng = rank, rng
        self.stepped: dict[torch.optim.Optimizer, None] = {}  # in the order of their first steps
        self._listed: dict[tuple[str, int], tuple[list[int], Mapping[int, str], Fresh]] = {}
        self._named = self.modules  # whose parameters have names

    def without(self, labels: Collection[str]) -> AppState:
        """The same less the named shared objects, for a partial restore; optimizers still find their parameters."""
        kept = copy.copy(self)
        kept.optimizers = {label: thing for label, thing in self.optimizers.items() if label not in labels}
        kept.others = {label: thing for label, thing in self.others.items() if label not in labels}
        kept.modules = {label: thing for label, thing in self.modules.items() if label not in labels}
        kept._named = self.modules
        return kept

    def parameter_names(self) -> dict[int, str]:
        """id(parameter) → its plain name in the first module that holds it."""
        names: dict[int, str] = {}
        for module in self._named.values():
            for name, parameter in module.named_parameters():
                names.setdefault(id(parameter), plain_name(name))
        return names

    def leaves(self) -> list[Leaf]:
        """Every value now; lazy tensors carry their place in the optimizer's order."""
        names = self.parameter_names()
        return [*self.held_leaves(names), *self.fresh_leaves(names)]

    def held_leaves(self, names: Mapping[int, str]) -> list[Leaf]:
        """The tensors of modules and optimizers, and what else modules keep beside them."""
        order = self._touch_order()
        found: list[Leaf] = []
        for label, module in self.modules.items():
            found.extend(_module_leaves(label, module, order))
        for label, optimizer in self.optimizers.items():
            found.extend(_optimizer_leaves(label, optimizer, names, order))
        return found

    def fresh_leaves(self, names: Mapping[int, str]) -> list[Leaf]:
        """The rest of `leaves`, which is not a tensor of a module or an optimizer, and must be read at every save."""
        found: list[Leaf] = []
        for label, optimizer in self.optimizers.items():
            for index, group in enumerate(optimizer.param_groups):
                for key, value in group.items():
                    value = self._names_of(label, index, value, names) if key == "params" else value
                    found.append(Leaf((label, "param_groups", index, key), value))
        for label, thing in self.others.items():
            found.extend(_object_leaves((label,), thing.state_dict()))
        rank = f"rank-{self.rank:05d}"
        for label, thing in self.per_rank.items():
            found.append(Leaf((label, rank), thing.state_dict()))
        if self.rng:
            found.append(Leaf(("rng", rank), Generators()))
        return found

    def _names_of(self, label: str, index: int, group: list[torch.Tensor], names: Mapping[int, str]) -> Fresh:
        """The names of the parameters of a group: the same object as long as neither changes."""
        ids = list(map(id, group))
        known = self._listed.get((label, index))
        if known is None or known[0] != ids or known[1] is not names:
            known = self._listed[label, index] = ids, names, Fresh([names[each] for each in ids])
        return known[2]

    def _stepping(self) -> list[torch.optim.Optimizer]:
        """The optimizers in the order of their steps, as far as it has been seen. Before that: more than two step
        inside backward, most likely, so the last one of them first."""
        seen = [optimizer for optimizer in self.stepped if optimizer in self.optimizers.values()]
        rest = [optimizer for optimizer in self.optimizers.values() if optimizer not in seen]
        return seen + (rest[::-1] if len(self.optimizers) > 2 else rest)

    def _touch_order(self) -> dict[int, int]:
        order: dict[int, int] = {}
        for optimizer in self._stepping():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    order.setdefault(id(parameter), len(order))
        return order


def refuse_odd(leaves: Sequence[Leaf]) -> None:
    """`UserError` with the name of a tensor that is not plain memory: nothing here could copy or hash its bytes."""
    for leaf in leaves:
        value, kind = leaf.value, ""
        if not isinstance(value, torch.Tensor):
            continue
        if value.device.type == "meta":
            kind = "on the meta device"
        elif value.layout != torch.strided or value.is_quantized:
            kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        if kind:
            raise UserError(
                f"'{leaf.key}' is {kind}",
                expected="dense tensors that have memory",
                remedy="materialise or convert it, or register the buffer with persistent=False",
            )


def _module_leaves(label: str, module: nn.Module, order: Mapping[int, int]) -> Iterator[Leaf]:
    # parameters by identity: a state_dict hands out detached aliases
    parameters = {plain_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    for name, value in module.state_dict().items():
        name = plain_name(name)
        parameter = parameters.get(name)
        if is_lazy(value):  # state_dict hands these out as they are
            raise UserError(
                f"{label}.{name} belongs to a lazy module and has no shape yet",
                remedy="call the model once with a batch before the first restore() or step()",
            )
        if parameter is None:
            yield Leaf((label, name), value)
        else:
            yield Leaf((label, name), parameter.detach(), order.get(id(parameter), -1))


def _optimizer_leaves(
    label: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str], order: Mapping[int, int]
) -> Iterator[Leaf]:
    state = own_part(optimizer).state
    for group in optimizer.param_groups:
        unnamed = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if unnamed:
            raise UserError(
                f"optimizer '{label}' holds {len(unnamed)} parameter(s) of no module given (shapes {unnamed[:3]})",
                expected="every parameter of an optimizer to belong to a module that is checkpointed too",
                remedy="pass those modules to Checkpointer as well",
            )
        for parameter in group["params"]:
            for key, value in state.get(parameter, {}).items():
                late = isinstance(value, torch.Tensor) and value.ndim > 0
                yield Leaf((label, "state", names[id(parameter)], key), value, order[id(parameter)] if late else None)


def _object_leaves(path: tuple[str], value: Any) -> Iterator[Leaf]:
    """A nested state is split only where it holds tensors; a plain one is stored whole, so its inside may change."""
    flat, mapping = flatten_state_dict({path[0]: value}) if isinstance(value, Mapping) else ({}, {})
    if any(isinstance(item, torch.Tensor) for item in flat.values()):
        for key, item in flat.items():
            yield Leaf(tuple(mapping[key]), item)
    else:
        yield Leaf(path, value)


class Generators:
    """The generators of torch (CPU and the current CUDA device), Python and NumPy as they are now, as these libraries
    tell it: the training thread takes no more, and what is stored of it is made later. Nobody else holds it."""

    def __init__(self) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numpy: Any = np.random.get_state(legacy=True)
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._cuda = torch.cuda.get_rng_state() if used else None

    @property
    def value(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        version, internal, gauss = self._python
        kind, keys, position, has_gauss, cached = self._numpy
        state: dict[str, Any] = {
            "torch": self._torch,
            "python": (version, torch.from_numpy(np.array(internal, dtype=np.int64)), gauss),
            "numpy": (
                kind,
                torch.from_numpy(np.asarray(keys).astype(np.int64)),
                int(position),
                int(has_gauss),
                float(cached),
            ),
        }
        return state if self._cuda is None else state | {"cuda": self._cuda}

    def same(self, other: Generators) -> bool:
        """Whether nobody has drawn between the two, bit for bit."""
        words, others = (
            [each._python[:2], repr(each._python[2]), each._numpy[0], repr(each._numpy[2:]), each._cuda is None]
            for each in (self, other)
        )
        return (
            words == others
            and np.array_equal(self._numpy[1], other._numpy[1])
            and torch.equal(self._torch, other._torch)
            and (self._cuda is None or other._cuda is None or torch.equal(self._cuda, other._cuda))
        )


def rng_state() -> dict[str, Any]:
    """What is stored of the random generators."""
    return Generators().value


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(map(int, internal)), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def local_tensor(value: torch.Tensor) -> torch.Tensor:
    """The bytes this rank holds: a DTensor's local shard, otherwise the tensor itself."""
    return value.to_local() if isinstance(value, DTensor) else value
