"""What happens between two optimizer steps: checkpoints begin and are settled, all ranks stop together."""

from collections.abc import Sequence

from memlaunch.launcher.manifest import folder_name
from memlaunch.launcher.rundir import RunDir
from memlaunch.launcher.training.checkpoint import Checkpoints
from memlaunch.launcher.training.loop import Position
from memlaunch.launcher.training.stopping import StopRequests


class Between:
    """The ranks' agreement at a step boundary; see :class:`memlaunch.launcher.training.loop.Between`.

    Args:
        every: steps between checkpoints; None for none but at a stop.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        requests: StopRequests,
        folder: RunDir,
        is_main: bool,
        every: int | None,
    ) -> None:
        self._checkpoints = checkpoints
        self._requests = requests
        self._folder = folder
        self._is_main = is_main
        self._every = every

    def votes(self) -> Sequence[float]:
        asked = self._requests.asked()
        by_hand = self._requests.reason in ("SIGINT", self._folder.stop.name)
        return [float(asked), float(asked and not by_hand), float(self._checkpoints.busy)]

    def decide(self, position: Position, votes: Sequence[float]) -> bool:
        asked, preempted, busy = votes
        if asked:
            self._checkpoints.save(position)
            saved = self._checkpoints.settle()
            if self._is_main:
                by_hand = self._folder.stop.exists()  # signals may have come, too
                self._folder.stop.unlink(missing_ok=True)
                self._folder.append_event(
                    "preempted" if preempted and not by_hand else "stopped",
                    step=position.step,
                    reason=self._requests.reason or "another rank",
                    checkpoint=folder_name(position.step) if saved else None,
                )
            return True
        if not busy:
            self._checkpoints.settle()
        if self._every is not None and position.step % self._every == 0:
            self._checkpoints.save(position)
        return False
