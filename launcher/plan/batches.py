"""The batches of a job over its own data, in figures; a resolved job comes in, one JSON object goes out.

Run as ``python -m memlaunch.launcher.plan.batches``, in a process that may load what a rank loads.
"""

import functools
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
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

    data = load(resolved)
    width = functools.partial(padded_lengths, settings=resolved.job.data.padding, max_length=data.max_length)
    ways: dict[str, Any] = {}
    modes: list[Mode] = [resolved.job.data.batching.mode, BASELINE]
    for mode in dict.fromkeys(modes):
        dealt = sampler(resolved, data, resolved.world_size, rank=0, mode=mode)
        ways[mode] = asdict(summarise(dealt, width=width, tokens=int(data.train.lengths.sum(dtype="int64"))))
    return {"data": {**tokens.summary(data.train), "max_length": data.max_length}, "ways": ways}


def main() -> None:
    """Read a resolved job from stdin, write its figures, or what is wrong with it, to stdout."""
    from memlaunch.launcher import resolve
    from memlaunch.launcher.training.errors import JobMismatch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "resolved.json")
        path.write_text(sys.stdin.read(), encoding="utf-8")
        resolved = resolve.load(path)
    try:
        answer = figures(resolved)
    except JobMismatch as error:
        answer = {"key": error.key, "message": str(error), "hint": error.hint}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
