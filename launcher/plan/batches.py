"""The batches of a job over its own data, in figures; for a process that may load what a rank loads."""

import functools
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.strategies.batching import Mode


def figures(resolved: "ResolvedJob") -> dict[str, Any]:
    """``data``: samples, tokens, longest, truncated; ``ways``: batching mode -> figures of its first epoch.

    The figures are those of :class:`memlaunch.strategies.bucketing.BatchFigures`, for the job's own mode and
    for ``random`` at the same batch sizes.

    Raises:
        JobMismatch: the data cannot be read, or a sample is longer than a micro-batch may be.
    """
    from memlaunch.launcher.plan import BASELINE
    from memlaunch.launcher.training import tokens
    from memlaunch.launcher.training.data import load, sampler
    from memlaunch.strategies.bucketing import summarise
    from memlaunch.strategies.padding import padded_lengths

    if resolved.job.model.entry is not None:
        return _own_figures(resolved)
    data = load(resolved)
    width = functools.partial(padded_lengths, settings=resolved.job.data.padding, max_length=data.widest)
    ways: dict[str, Any] = {}
    modes: list[Mode] = [resolved.job.data.batching.mode, BASELINE]
    for mode in dict.fromkeys(modes):
        dealt = sampler(resolved, data, resolved.world_size, rank=0, mode=mode)
        ways[mode] = asdict(summarise(dealt, width=width, tokens=int(data.train.lengths.sum(dtype="int64"))))
    return {"data": {**tokens.summary(data.train), "max_length": data.max_length}, "ways": ways}


def _own_figures(resolved: "ResolvedJob") -> dict[str, Any]:
    """Those of an entry's samples; each counts as one token where they have no lengths."""
    import numpy as np

    from memlaunch.launcher.plan import BASELINE
    from memlaunch.launcher.training import entries
    from memlaunch.launcher.training.data import deal
    from memlaunch.strategies.bucketing import summarise

    entry = entries.build(resolved.job.model, resolved.job.training.seed)
    lengths = np.ones(len(entry.train), np.int32) if entry.lengths is None else np.array(entry.lengths)
    total, longest = int(lengths.sum()), int(lengths.max())
    modes: list[Mode] = [BASELINE] if entry.lengths is None else [resolved.job.data.batching.mode, BASELINE]
    ways = {}
    for mode in dict.fromkeys(modes):
        dealt = deal(resolved, lengths, resolved.world_size, 0, mode)
        ways[mode] = asdict(summarise(dealt, width=lambda longest: longest, tokens=total))
    about = {"source": resolved.job.model.entry, "samples": len(lengths), "tokens": total}
    return {"data": {**about, "longest": longest, "truncated": 0, "max_length": longest}, "ways": ways}
