"""All live ranks of one attempt agree on a fresh key prefix in a store that may hold a dead attempt's keys.

torchrun keeps one store across restarts, and gloo writes its addresses there under fixed names, so that a restarted
rank may read the address of a dead one and hang (pytorch issue 135712; 8 of 20 restarts failed and 2 hung on torch
2.13). TORCHELASTIC_RESTART_COUNT does not help, because it may differ between nodes. So rank 0 publishes a new random
*epoch*; every other rank answers under that epoch with its own random *nonce*; rank 0, once it has all answers, repeats
the nonces. A rank that met a dead rank 0's leftovers finds no copy of its own nonce in them and reads the epoch again.
Nothing else need be trusted: the launcher ends all processes of an attempt before it starts the next.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable

import torch.distributed as dist

from .errors import PeerLost

_FIRST_NAP_S, _LONGEST_NAP_S = 0.002, 0.25
_MOST_NAMED = 16  # missing ranks in an error message


def agree(store: dist.Store, rank: int, world_size: int, *, timeout_s: float) -> dist.PrefixStore:
    """Return `store` under a prefix that exactly the live ranks of this attempt share; all ranks call it.

    `PeerLost` names the ranks that did not come within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    nonce = secrets.token_hex(8)
    if rank == 0:
        _lead(store, nonce, world_size, deadline, timeout_s)
        return dist.PrefixStore(f"undertow/{nonce}", store)
    return dist.PrefixStore(f"undertow/{_follow(store, rank, nonce, deadline, timeout_s)}", store)


def _lead(store: dist.Store, epoch: str, world_size: int, deadline: float, timeout_s: float) -> None:
    store.set("undertow/epoch", epoch)
    keys = [_answer_key(epoch, rank) for rank in range(1, world_size)]
    if keys and not _until(lambda: store.check(keys), deadline):
        missing = [rank for rank, key in enumerate(keys, start=1) if not store.check([key])]
        named = ", ".join(map(str, missing[:_MOST_NAMED])) + (", …" if len(missing) > _MOST_NAMED else "")
        raise PeerLost(
            f"{len(missing)} of {world_size} ranks did not arrive within {timeout_s:g} s: rank {named}; "
            "look at the output of those ranks, and whether their hosts reach this one"
        )
    nonces = ["", *(store.get(key).decode() for key in keys)]
    store.set(f"undertow/{epoch}/all", json.dumps(nonces))


def _follow(store: dist.Store, rank: int, nonce: str, deadline: float, timeout_s: float) -> str:
    epoch = ""

    def accepted() -> bool:
        nonlocal epoch
        if not store.check(["undertow/epoch"]):
            return False
        newest = store.get("undertow/epoch").decode()
        if newest != epoch:
            epoch = newest
            store.set(_answer_key(epoch, rank), nonce)
        if not store.check([f"undertow/{epoch}/all"]):
            return False
        nonces = json.loads(store.get(f"undertow/{epoch}/all"))
        return rank < len(nonces) and nonces[rank] == nonce

    if not _until(accepted, deadline):
        raise PeerLost(
            f"rank {rank} was not admitted by rank 0 within {timeout_s:g} s; look at the output of rank 0 and of ranks "
            "that it calls missing"
        )
    return epoch


def _until(condition: Callable[[], bool], deadline: float) -> bool:
    nap_s = _FIRST_NAP_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(nap_s)
        nap_s = min(1.5 * nap_s, _LONGEST_NAP_S)
    return True


def _answer_key(epoch: str, rank: int) -> str:
    return f"undertow/{epoch}/answer/{rank}"
