"""A model, data and loss of the user's own, as the loop takes them."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_map_only
from torch.utils.data import default_collate

from memlaunch.launcher import entry as entries
from memlaunch.launcher.entry import Entry, Samples
from memlaunch.launcher.paths import BadPath
from memlaunch.launcher.training import random_state
from memlaunch.launcher.training.batches import MicroBatch
from memlaunch.launcher.training.errors import JobMismatch
from memlaunch.launcher.training.tasks import Task

if TYPE_CHECKING:
    import numpy as np

    from memlaunch.launcher.job import ModelSection

KEY = "model.entry"


def build(model: "ModelSection", seed: int) -> Entry:
    """Call the function of ``model.entry``; every random number in it follows from ``seed``.

    Raises:
        JobMismatch: it cannot be found or called, or does not return an :class:`Entry`.
    """
    assert model.entry is not None
    try:
        place = entries.locate(model.entry, Path.cwd())
    except BadPath as error:
        raise JobMismatch(KEY, str(error), error.hint) from error
    function = _import(place)
    try:
        inspect.signature(function).bind(**model.config)
    except TypeError as error:
        hint = "`model.config` holds the arguments of the function"
        raise JobMismatch("model.config", f"`{place.function}`: {error}", hint) from error
    random_state.renew(seed)
    try:
        built = function(**model.config)
    except Exception as error:
        told = f"`{place.function}` failed: {type(error).__name__}: {error}"
        raise JobMismatch(KEY, told, "its traceback is in the log") from error
    _check(built, place)
    return built


def _import(place: entries.Place) -> Callable[..., Entry]:
    # At the end: modules beside the job file must not stand in the way of installed ones.
    if str(place.folder) not in sys.path:
        sys.path.append(str(place.folder))
    try:
        module = importlib.import_module(place.module)
    except Exception as error:
        told = f"`{place.module}` fails: {type(error).__name__}: {error}"
        raise JobMismatch(KEY, told, "its traceback is in the log") from error
    found = Path(module.__file__ or "")
    if found.resolve() != place.file.resolve():
        hint = "start the run from another folder, or give your file another name"
        raise JobMismatch(KEY, f"Python found {found} in the place of {place.file}", hint)
    function: Callable[..., Entry] = getattr(module, place.function)
    return function


def _check(built: Any, place: entries.Place) -> None:
    """See that ``built`` is an entry that can be trained.

    Raises:
        JobMismatch: it is not.
    """
    problem = None
    if not isinstance(built, Entry):
        problem = f"returns {_a(built)}, not a `memlaunch.launcher.Entry`"
    elif not isinstance(built.model, nn.Module):
        problem = f"returns {_a(built.model)} as the model, not a torch module"
    elif not len(built.train):
        problem = "returns no samples to train on"
    elif built.eval is not None and not len(built.eval):
        problem = "returns no samples to evaluate on; leave `eval` out"
    elif built.lengths is not None and len(built.lengths) != len(built.train):
        problem = f"returns {len(built.lengths)} lengths for {len(built.train)} samples"
    if problem is not None:
        raise JobMismatch(KEY, f"`{place.function}` {problem}", f"mend it in {place.file}")


def _a(value: Any) -> str:
    return "nothing" if value is None else f"a `{type(value).__name__}`"


@dataclass(frozen=True)
class Targets:
    """What the loss of an entry takes, and the count that the micro-batch is dealt with; 0 for a stand-in."""

    value: Any
    count: int


def _rebuilt(values: Iterable[Any], count: Any) -> Targets:
    (value,) = values
    return Targets(value, count)


register_pytree_node(Targets, lambda targets: ([targets.value], targets.count), _rebuilt)


def task_of(entry: Entry) -> Task:
    """The task that an entry's own loss and metrics are."""

    def loss_sum(outputs: Any, targets: Targets) -> Tensor:
        returned: Any = entry.loss(outputs, targets.value)
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], Tensor)):
            hint = "return the loss summed over the micro-batch, a tensor, and how many it is the sum over"
            raise JobMismatch(KEY, f"the loss returned {_a(returned)}, not (sum, count)", hint)
        total: Tensor = returned[0]
        count = int(returned[1])
        if total.dim():
            hint = 'sum it up: `reduction="sum"`'
            raise JobMismatch(KEY, f"the loss returned a sum of shape {tuple(total.shape)}", hint)
        if not targets.count:
            return total * 0  # of a stand-in: nothing counts
        if count != targets.count:
            told = f"the loss counted {count} in a micro-batch that has {targets.count}"
            hint = "the samples count, unless the entry has a `count`: a function of the targets"
            raise JobMismatch(KEY, told, hint)
        return total

    def tallies(outputs: Any, targets: Targets) -> Mapping[str, float | Tensor]:
        return entry.metrics(outputs, targets.value) if entry.metrics is not None else {}

    return Task(
        predictions=lambda outputs: _cast(outputs, torch.float32),
        loss_sum=loss_sum,
        tallies=tallies,
        figures=lambda loss, sums: {"eval_loss": loss, **{f"eval_{name}": s for name, s in sums.items()}},
    )


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """16-bit tensors in fp32, or those in fp32 in 16 bits."""
    wide = dtype == torch.float32
    sources = (torch.float16, torch.bfloat16) if wide else (torch.float32,)
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype in sources else t, values)


class CollateEntry:
    """Sample indices to a :class:`MicroBatch` of an entry's own samples.

    Args:
        lengths: of the samples; None where they have none, and count as one token each.
        dtype: what the model holds its parameters in, and takes its inputs in.
    """

    def __init__(
        self, entry: Entry, samples: Samples, lengths: "np.ndarray[Any, Any] | None", dtype: torch.dtype
    ) -> None:
        self._collate = entry.collate or default_collate
        self._count = entry.count
        self._samples = samples
        self._lengths = lengths
        self._dtype = dtype
        self._arguments = list(inspect.signature(entry.model.forward).parameters)

    def __call__(self, indices: Sequence[int]) -> MicroBatch:
        """The micro-batch of ``indices``; of none, a stand-in: real samples of which nothing counts."""
        # Two where there are two: a batch norm needs them.
        chosen = list(indices) or list(range(min(2, len(self._samples))))
        made = self._collate([self._samples[index] for index in chosen])
        if not isinstance(made, tuple | list) or len(made) != 2:
            hint = "`collate` returns (inputs, targets), or samples are such pairs"
            raise JobMismatch(KEY, f"a micro-batch is {_a(made)}, not (inputs, targets)", hint)
        inputs, targets = made
        named = self._named(inputs)
        if self._dtype != torch.float32:
            named = _cast(named, self._dtype)
        if not indices:
            return MicroBatch(named, Targets(targets, 0), 0, 0, 0, 0)
        count = len(chosen) if self._count is None else int(self._count(targets))
        lengths = [1] * len(chosen) if self._lengths is None else self._lengths[chosen].tolist()
        padded = max(lengths) * len(chosen)
        return MicroBatch(named, Targets(targets, count), count, len(chosen), sum(lengths), padded)

    def _named(self, inputs: Any) -> dict[str, Tensor]:
        """The inputs by the names of the model's arguments."""
        if isinstance(inputs, Mapping):
            return dict(inputs)
        positional = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        if len(positional) > len(self._arguments):
            hint = "`collate` may return a mapping of argument names to tensors"
            told = f"a micro-batch has {len(positional)} inputs, the model takes {len(self._arguments)}"
            raise JobMismatch(KEY, told, hint)
        return dict(zip(self._arguments, positional, strict=False))
