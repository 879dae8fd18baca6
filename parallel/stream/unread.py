"""Products that a layer's recomputation may leave out, because no gradient reads their values.

Backward of a chunk runs the layer forward once more for the values that autograd saves. The output itself is not one of
them: where the last projection is only added to something that nobody else reads (`x + down(…)`, and both branches of a
parallel layer), its product is wasted, 27 % of a Llama layer's forward. Which products those are is read off the graph
of a chunk that computed everything; later chunks and steps put zeros in their place, and each of their graphs is
checked again before it is used. Layers with hooks inside, whose owners would see the zeros, or with compiled parts are
left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

PASSING = {"AddBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}  # save no values


def zeros(x: Tensor, weight: Tensor) -> Tensor:
    """In place of `F.linear(x, weight)`."""
    return x.new_zeros(*x.shape[:-1], weight.shape[0])


def may_leave_out(layer: nn.Module) -> bool:
    """Whether nobody inside the layer could notice."""
    for module in layer.modules():
        hooks = module is not layer and (module._forward_hooks or module._forward_pre_hooks)
        if hooks or getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            return False
    return True


def unread(y: Tensor, others: Sequence[Tensor]) -> set[int]:
    """Ids of the weights whose products reach y through sums only, and nothing else; `others`: further outputs."""
    roots = [t.grad_fn for t in (y, *others) if t.grad_fn is not None]
    readers, seen, stack = Counter(roots), set(roots), list(roots)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            readers[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    found, stack = set[int](), [y.grad_fn] if y.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if node is None or readers[node] != 1:
            continue
        weight = getattr(node, "weight_id", None)
        if weight is not None:
            found.add(weight)
        elif node.name() in PASSING:
            stack += [below for below, _ in node.next_functions]
    return found
