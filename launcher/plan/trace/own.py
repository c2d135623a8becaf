"""A model of the user's own, with a micro-batch of its data, for a rehearsal.

Its function runs for real: what it does with its data need not be possible on fake tensors. Where a trace is
on, the parameters, the buffers and the batch are then made once more, so that the trace sees them come.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only

from memlaunch.launcher.plan.trace.shape import Shape
from memlaunch.launcher.training import entries
from memlaunch.launcher.training.batches import MicroBatch
from memlaunch.launcher.training.tasks import Task
from memlaunch.strategies import precision

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob


def shape_of(resolved: "ResolvedJob") -> Shape:
    """The largest micro-batch of the job, of its longest samples.

    Raises:
        JobMismatch: its function fails, or returns no entry.
    """
    entry = entries.build(resolved.job.model, resolved.job.training.seed)
    longest = max(entry.lengths) if entry.lengths is not None else 1
    budget = resolved.job.data.batching.max_tokens
    return Shape(
        samples=resolved.batch.micro_batch_size if budget is None else max(1, budget // longest),
        tokens=longest,
        micro_batches=min(2, resolved.batch.gradient_accumulation_steps),
        fields=(),
        classes=None,
        pad_token=0,
    )


def made(resolved: "ResolvedJob", shape: Shape) -> tuple[nn.Module, Task, Callable[[], MicroBatch]]:
    """The model, its task, and what makes a micro-batch of ``shape.samples`` samples.

    Raises:
        JobMismatch: as :func:`shape_of`.
    """
    traced = _get_current_dispatch_mode() is not None
    settings = resolved.job.strategy.precision
    dtype = precision.torch_dtype(settings.dtype if precision.engine_casts(settings) else "fp32")
    with _disable_current_modes():
        entry = entries.build(resolved.job.model, resolved.job.training.seed)
        lengths = np.asarray(entry.lengths if entry.lengths is not None else [1] * len(entry.train))
        longest = np.argsort(-lengths, kind="stable")
        chosen = np.resize(longest, shape.samples).tolist()
        batch = entries.CollateEntry(entry, entry.train, lengths, dtype)(chosen)
    if not traced:
        return entry.model, entries.task_of(entry), lambda: batch
    _make_again(entry.model)

    def again() -> MicroBatch:
        inputs, labels = tree_map_only(Tensor, _like, (batch.inputs, batch.labels))
        return replace(batch, inputs=inputs, labels=labels)

    return entry.model, entries.task_of(entry), again


def _like(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _make_again(model: nn.Module) -> None:
    """Give the model new parameters and buffers; tied ones stay tied."""
    new: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if id(tensor) not in new:
                    like, learns = _like(tensor), tensor.requires_grad
                    new[id(tensor)] = nn.Parameter(like, learns) if isinstance(tensor, nn.Parameter) else like
                own[name] = new[id(tensor)]
