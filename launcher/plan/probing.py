"""What a rank does in a probe: two optimizer steps on the largest micro-batch of the job's own data."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import nn

from memlaunch.launcher.plan.trace.rehearsal import rehearse, shape_of
from memlaunch.launcher.training.engine import Engine
from memlaunch.launcher.training.world import World

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.rundir import RunDir


def run(resolved: "ResolvedJob", folder: "RunDir", world: World) -> None:
    """Rehearse the job in this rank; the main rank writes an event ``probed`` with the peaks of all ranks.

    ``peak_allocated_bytes`` and ``peak_reserved_bytes`` are torch's, null on a CPU, which cannot tell;
    ``peak_process_bytes`` is the most host memory that a process had, libraries included; ``step_seconds``
    is the time of the second step.

    Raises:
        JobMismatch, NotApplicable: the job does not fit the model or the data.
    """
    torch.set_num_threads(resolved.threads_per_rank)
    transformers.logging.set_verbosity_error()
    peaks = Peaks(world)
    rehearse(resolved, shape_of(resolved), world, peaks)
    allocated, reserved, process, seconds = world.max(
        [peaks.allocated, peaks.reserved, process_peak(), peaks.seconds]
    )
    if world.is_main:
        on_gpu = world.kind == "cuda"
        folder.append_event(
            "probed",
            peak_allocated_bytes=int(allocated) if on_gpu else None,
            peak_reserved_bytes=int(reserved) if on_gpu else None,
            peak_process_bytes=int(process),
            step_seconds=round(seconds, 6),
        )
        folder.append_event("finished")


class Peaks:
    """Keeps the highest of the peaks that torch counts, which the loop sets back at every step.

    Attributes:
        allocated, reserved: bytes; 0 on a CPU.
        seconds: of the last optimizer step.
    """

    def __init__(self, world: World) -> None:
        self.allocated = self.reserved = 0
        self.seconds = 0.0
        self._world = world
        self._begun = time.perf_counter()

    def enter(self, phase: str, step: int) -> None:
        self._read()

    def built(self, model: nn.Module) -> None:
        self._read()

    def started(self, engine: Engine) -> None:
        self._read()
        self._begun = time.perf_counter()

    def stepped(self, engine: Engine, step: int) -> None:
        self._read()
        if self._world.kind == "cuda":
            torch.cuda.synchronize(self._world.device)
        now = time.perf_counter()
        self.seconds, self._begun = now - self._begun, now

    def _read(self) -> None:
        if self._world.kind == "cuda":
            self.allocated = max(self.allocated, torch.cuda.max_memory_allocated(self._world.device))
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self._world.device))


def process_peak() -> int:
    """The most bytes of memory that this process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])
