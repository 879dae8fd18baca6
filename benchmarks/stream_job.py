"""A sharded Hugging Face decoder on this rank, and the ways of taking one step of it: for `stream_ranks`.

The model is cut by FSDP2, layer by layer. Either every rank has a sequence of its own, or (`spread`) all ranks share
one, with ring attention between them. Rivals are transformers' gradient checkpointing, with our chunked loss, without
and with its offload; and torch's context parallel in place of our ring, on heads repeated as its ring needs them. Every
way is a context that sets the model up and puts it back, so that all of them take turns on the same weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from undertow.parallel import enable_context_parallel
from undertow.parallel.stream import causal_loss, disable, enable, rows_of
from undertow.parallel.stream.planner import plan

PLAIN, OFFLOAD, WITHIN, FREE = "hf+ce", "hf+ce+offload", "ours, in the budget", "ours"
TORCH = "torch context_parallel, hf+ce"
IGNORE = -100
Step = Callable[[Tensor], None]


def decoder(shape: dict[str, Any], device: torch.device) -> Any:
    """The same random weights on every rank; bfloat16 on GPUs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape, max_position_embeddings=1 << 21, use_cache=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).train()


class Job:
    """`model`, sharded. `limit_bytes`: what the arm `WITHIN` is given of the device, weights included."""

    def __init__(self, model: Any, device: torch.device, *, spread: bool, limit_bytes: int) -> None:
        self.model, self.device, self.spread = model, device, spread
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        layers = list(model.model.layers)
        for layer in layers:
            fully_shard(layer, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)
        self.resident = self._resident(layers)
        self.budget = limit_bytes - self.resident
        self._engines: dict[str, Any] = {}
        self._handle: Any = None

    def _resident(self, layers: list[nn.Module]) -> int:
        """Bytes of this rank's weights and gradients, and of what FSDP2 holds whole at a time: the root's weights,
        gradients and its send buffer; two layers' weights, one's gradients, and the send buffers of two."""
        mine = sum(p.to_local().nbytes for p in self.model.parameters())
        each = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
        root = sum(p.nbytes for p in self.model.parameters()) - sum(each)
        return 2 * mine + 3 * root + 5 * max(each)

    def names(self) -> list[str]:
        return [PLAIN, OFFLOAD, TORCH, WITHIN] if self.spread else [PLAIN, OFFLOAD, WITHIN, FREE]

    def unavailable(self, name: str) -> str:
        if self.device.type == "cuda":
            return ""
        whys = {OFFLOAD: "transformers' offload pins memory", TORCH: "its ring has no CPU form"}
        return whys.get(name, "")

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def tokens(self, length: int, seed: int) -> Tensor:
        """[1, length]: this rank's sequence, or the one that all ranks share."""
        seed = seed if self.spread else seed + dist.get_rank()
        ids = torch.randint(0, self.model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
        return ids.to(self.device)

    @contextlib.contextmanager
    def armed(self, name: str) -> Iterator[Step]:
        """A step of the arm: forward and backward of the tokens."""
        with contextlib.ExitStack() as stack:
            if name == TORCH:
                yield stack.enter_context(self._torch_ring())
                return
            if self.spread:
                self._handle = enable_context_parallel(self.model)
                stack.callback(self._handle.disable)
            setup = self._streamed(name) if name in (WITHIN, FREE) else self._checkpointed(name == OFFLOAD)
            stack.enter_context(setup)
            yield lambda ids: self.model(input_ids=ids, labels=ids).loss.backward()

    @contextlib.contextmanager
    def plain(self) -> Iterator[Step]:
        """Nothing saved, nothing chunked: the order of rounding that arms are compared with."""
        with contextlib.ExitStack() as stack:
            if self.spread:
                stack.callback(enable_context_parallel(self.model).disable)
            yield lambda ids: self.model(input_ids=ids, labels=ids).loss.backward()

    @contextlib.contextmanager
    def _streamed(self, name: str) -> Iterator[None]:
        """The engine is kept from step to step, and its pinned memory with it."""
        if name not in self._engines:
            self._engines[name] = enable(
                self.model,
                budget_bytes=max(0, self.budget) if name == WITHIN else None,
                attend=self._attend if self.spread else None,
                ranks=self._handle.context if self.spread else None,
            )
            disable(self.model)
        engine = self._engines[name]
        engine.enable()
        try:
            yield
            refused = [reason for reason in engine.report().values() if reason != "streamed"]
            if refused:
                raise RuntimeError(f"not streamed: {refused[0]}")
        finally:
            engine.disable()

    def planned(self, limit_bytes: float) -> int:
        """The longest sequence that the planner promises within `limit_bytes` of a device and the host's free memory.

        Measured peaks have no slope to go by: a plan fills the budget that it is given.
        """
        weight = next(self.model.parameters())
        shape = self._engines[WITHIN].adapter.shape(
            torch.empty(1, 1, self.model.config.hidden_size, dtype=weight.dtype)
        )
        world, cuda = dist.get_world_size(), self.device.type == "cuda"
        host = int(0.8 * psutil.virtual_memory().available) // world if cuda else 0

        def fits(rows: int) -> bool:
            made = plan(
                shape,
                1,
                rows,
                budget_bytes=int(limit_bytes) - self.resident,
                host_bytes=host,
                every=1,
                kernel=cuda,
                ranks=world if self.spread else 0,
            )
            return made.device_bytes <= limit_bytes - self.resident and made.host_bytes <= host

        rows = 128
        if not fits(rows):
            return 0
        while fits(2 * rows) and rows < 1 << 26:
            rows *= 2
        for eighth in range(7, 0, -1):
            if fits(rows + rows * eighth // 8):
                rows += rows * eighth // 8
                break
        return rows * (world if self.spread else 1)

    def _attend(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        *,
        positions: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        return self._handle.context.attend(q_BHTD, k_BGTD, v_BGTD, scale=scale, window=window)

    @contextlib.contextmanager
    def _checkpointed(self, offload: bool) -> Iterator[None]:
        model = self.model
        options = {"offload": True} if offload else {}
        model.gradient_checkpointing_enable({"use_reentrant": False}, **options)
        model.forward = partial(_chunked, model)  # within the root's FSDP hooks, which gather the head
        try:
            yield
        finally:
            del model.forward
            model.gradient_checkpointing_disable()

    @contextlib.contextmanager
    def _torch_ring(self) -> Iterator[Step]:
        from torch.distributed.tensor.experimental import context_parallel
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name, config = "benchmark_repeated_heads", self.model.config
        ALL_ATTENTION_FUNCTIONS.register(name, _repeated_heads)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, lambda *_, **__: None)
        before, config._attn_implementation_internal = config._attn_implementation_internal, name

        def step(ids: Tensor) -> None:
            whole = ids.shape[1]
            labels = nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORE)
            positions = torch.arange(whole, device=ids.device)[None].clone()
            buffers = [ids.clone(), labels, positions]  # cut in place
            with context_parallel(self.mesh, buffers=buffers, buffer_seq_dims=[1] * 3):
                mine = {"input_ids": buffers[0], "shift_labels": buffers[1], "position_ids": buffers[2]}
                share = self.model(**mine, labels=buffers[1], num_items_in_batch=whole - 1).loss
                (share * dist.get_world_size()).backward()  # FSDP2 takes the mean over ranks

        try:
            with self._checkpointed(False):
                yield step
        finally:
            config._attn_implementation_internal = before


def _chunked(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Any:
    """A causal LM's forward without full logits: the decoder as it is, our rows for the head."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    hidden = model.model(input_ids=input_ids, **kwargs).last_hidden_state
    loss = causal_loss(rows_of(hidden, model.lm_head), shift_labels, num_items_in_batch)
    return CausalLMOutputWithPast(loss=loss)  # type: ignore[arg-type]


def _repeated_heads(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, 1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None
