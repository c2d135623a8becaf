"""Asks to stop: signals to a rank, and a file in the run folder.

Nothing is done where a signal finds a rank but to take note of it. Between two steps the ranks tell each
other, and stop behind the same step.
"""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from memlaunch.launcher.rundir import RunDir

#: What the system sends where the machine is to be given back, and Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
#: Seconds between looks at the run folder, which may lie on a slow file system.
INTERVAL = 0.5


class StopRequests:
    """Takes note of signals while it is entered, on the main thread; the main rank looks for the file, too.

    Attributes:
        reason: the name of the first signal, or of the file; None while nobody has asked.
    """

    def __init__(self, folder: RunDir, is_main: bool) -> None:
        self.reason: str | None = None
        self._file = folder.stop if is_main else None
        self._looked = float("-inf")
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether somebody has asked this rank to stop."""
        now = time.monotonic()
        if self.reason is None and self._file is not None and now - self._looked >= INTERVAL:
            self._looked = now
            if self._file.exists():
                self.reason = self._file.name
        return self.reason is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
