"""Where the time of an optimizer step goes."""

import time
from collections import defaultdict

import torch

from memlaunch.launcher.training.world import World


class Clock:
    """Splits the time since its making into parts: each mark ends one.

    On a GPU the marks go into the stream of the kernels, and are read once all of them are done, so that
    nothing waits for them. What a rank waits for the others belongs to the part in which it waits.
    """

    def __init__(self, world: World | None = None) -> None:
        self._on_gpu = world is not None and world.kind == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.mark("")

    def mark(self, part: str) -> None:
        """Give what has passed since the last mark to ``part``."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Part -> seconds; waits for the GPU to come to the last mark."""
        passed: dict[str, float] = defaultdict(float)
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(after, float):
                assert isinstance(before, float)
                passed[part] += after - before
            else:
                assert not isinstance(before, float)
                passed[part] += before.elapsed_time(after) / 1000
        return dict(passed)
