"""What one optimizer step computes, moves and sends, counted operator by operator."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from memlaunch.launcher.plan.trace.recorder import on_meta

#: c10d operators -> the collective, by which a communication model knows them.
_COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
}


class Costs:
    """What happened while it was counting.

    Attributes:
        flops: dtype -> floating-point operations of matrix products, convolutions and attention (2 for a
            multiply and an add), by torch's formulas.
        bytes_moved: read and written by all the other operators.
        kernels: operators that are no views.
        collectives: kind -> [calls, bytes]; the bytes are those of the whole tensor: what an all-reduce or
            a reduce takes, what an all-gather makes, what a reduce-scatter starts from.
    """

    def __init__(self) -> None:
        self.flops: Counter[str] = Counter()
        self.bytes_moved = 0
        self.kernels = 0
        self.collectives: dict[str, list[int]] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func.namespace == "c10d":
            self._collective(func, args)
            return
        if func.namespace == "prim" or func._schema.name in _FREE:
            return
        if func.namespace == "aten" and func.is_view:
            return
        self.kernels += 1
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            dtype = str(first.dtype).removeprefix("torch.")
            self.flops[dtype] += int(formula(*args, **kwargs, out_val=out))
        else:
            self.bytes_moved += _bytes((args, kwargs)) + _bytes(out)

    def _collective(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._schema.name.removeprefix("c10d::")
        kind = _COLLECTIVES.get(name)
        if kind is None:
            return
        # An all-gather's first argument is what it makes; a reduce-scatter's second what it starts from.
        whole = args[1] if kind == "reduce_scatter" else args[0]
        entry = self.collectives.setdefault(kind, [0, 0])
        entry[0] += 1
        entry[1] += _bytes(whole)

    def to_dict(self) -> dict[str, Any]:
        """For an answer in JSON."""
        return {
            "flops": dict(self.flops),
            "bytes_moved": self.bytes_moved,
            "kernels": self.kernels,
            "collectives": {
                kind: {"calls": n, "bytes": size} for kind, (n, size) in self.collectives.items()
            },
        }


#: Operators that look like work and are none on a device; nor are those of `prim`, which ask for properties.
_FREE = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "_unsafe_view",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
    )
)


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if _counts(leaf))


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not on_meta(leaf)
