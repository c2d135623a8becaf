"""Metrics for experiment trackers, beside those in the run folder: TensorBoard, Weights & Biases, MLflow.

Each tracker works in a thread of the main rank. Whatever happens there, the training goes on: a tracker that
is not installed, fails, or takes too long is left out from then on, and a warning says so once.
"""

import contextlib
import json
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from memlaunch.launcher import disclose
from memlaunch.launcher.rundir import RunDir, read_lines

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob

Line = Mapping[str, Any]
Ended = Literal["finished", "stopped", "failed"]

#: Lines that wait for a tracker which does not keep up.
ROOM = 10_000
#: Seconds that a tracker has for what is left, at the end of a run. A stop may be short of time.
PATIENCE: dict[Ended, float] = {"finished": 60.0, "stopped": 10.0, "failed": 10.0}


class Tracker(Protocol):
    """One run, as a tracker sees it."""

    def write(self, line: Line) -> None:
        """Take over a line of ``metrics.jsonl``."""

    def close(self, ended: Ended) -> None:
        """Hand on what is left, and how the run ended."""


class Trackers:
    """Writes ``metrics.jsonl``, and hands every line to the trackers that the job names.

    A tracker begins with the first line: what ends before it has trained is no experiment.

    Attributes:
        ended: how the run ended, for those who look at a tracker; set before the end of the ``with``.
    """

    def __init__(
        self,
        resolved: "ResolvedJob",
        folder: RunDir,
        is_main: bool,
        patience: Mapping[Ended, float] = PATIENCE,
    ) -> None:
        self.ended: Ended = "failed"
        self._folder = folder
        self._patience = patience
        names = resolved.job.output.track if is_main else []
        self._feeds = [_Feed(name, resolved, folder) for name in names]

    def record(self, line: dict[str, Any]) -> None:
        """Add a line to the metrics of the run."""
        self._folder.append_metrics(line)
        for feed in self._feeds:
            feed.put(line)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + self._patience[self.ended]
        for feed in self._feeds:
            feed.end(self.ended)
        for feed in self._feeds:
            feed.wait(deadline)


class _Feed:
    """A thread that opens one tracker at the first line, and hands it line after line."""

    def __init__(self, name: str, resolved: "ResolvedJob", folder: RunDir) -> None:
        self._name = name
        self._resolved = resolved
        self._folder = folder
        self._lines: queue.Queue[Line | Ended] = queue.Queue(ROOM)
        self._left = False
        self._lock = threading.Lock()
        # As a daemon, so that one that hangs keeps no process alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def put(self, line: Line) -> None:
        if self._left:
            return
        if self._thread.ident is None:
            self._thread.start()
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)
            return
        self._leave(f"it has not taken over the last {ROOM} lines")

    def end(self, ended: Ended) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(ended)

    def wait(self, deadline: float) -> None:
        if self._left or self._thread.ident is None:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._leave("it did not take over the last lines in time")

    def _run(self) -> None:
        try:
            tracker: Tracker | None = None
            while True:
                item = self._lines.get()
                if isinstance(item, str):
                    assert tracker is not None, "the thread begins with a line"
                    tracker.close(item)
                    return
                tracker = tracker or _OPEN[self._name](self._resolved, self._folder, item)
                tracker.write(item)
        except ImportError as error:
            what = error.name or self._name
            self._leave(
                f"`{what}` is not installed where the ranks run: pip install 'memlaunch[{self._name}]'"
            )
        except (Exception, SystemExit) as error:
            self._leave(f"{type(error).__name__}: {error}")

    def _leave(self, why: str) -> None:
        """Warn, once: this side may be tired of a tracker that fails at the same moment."""
        with self._lock:
            before, self._left = self._left, True
        if not before:
            # An address in an error may hold a password.
            why = re.sub(r"//[^/@\s]*@", "//", " ".join(why.split()))
            with contextlib.suppress(OSError):
                self._folder.append_event(
                    "warning", message=f"nothing more goes to {self._name}: {why}", tracker=self._name
                )


def figures(line: Line) -> dict[str, float]:
    """The finite numbers of a line, named as trackers group them: ``train/loss``, ``eval/accuracy``."""
    evaluates = "loss" not in line
    numbers = {
        f"eval/{name.removeprefix('eval_')}" if evaluates else f"train/{name}": float(value)
        for name, value in line.items()
        if isinstance(value, int | float) and name != "step" and name.startswith("eval_") == evaluates
    }
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


class _TensorBoard:
    def __init__(self, resolved: "ResolvedJob", folder: RunDir, first: Line) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier attempt wrote behind the checkpoint is taken back.
        begin = first["step"] + ("loss" not in first)
        purge = begin if folder.tensorboard.exists() else None
        self._writer: Any = SummaryWriter(str(folder.tensorboard), purge_step=purge, flush_secs=10)
        job = json.dumps(disclose.public(json.loads(resolved.to_json())), indent=2)
        self._writer.add_text("job", "\n".join(f"    {row}" for row in job.splitlines()))

    def write(self, line: Line) -> None:
        for name, value in figures(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self, ended: Ended) -> None:
        self._writer.close()


class _Wandb:
    """Its own environment variables, such as ``WANDB_MODE`` and ``WANDB_PROJECT``, hold."""

    def __init__(self, resolved: "ResolvedJob", folder: RunDir, first: Line) -> None:
        import wandb

        name = resolved.job.name
        run = f"{name}-{folder.path.name}"
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _plain(name)[:128],
            id=_plain(run)[-64:],
            name=run,
            dir=str(folder.path),
            config=disclose.public(json.loads(resolved.to_json())),
            resume="allow",
            # The logs are ours; command lines, user names and remotes of git repositories are nobody's.
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_save_requirements=False,
                finish_timeout=PATIENCE["finished"],
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, line: Line) -> None:
        self._run.log({"step": line["step"], **figures(line)})

    def close(self, ended: Ended) -> None:
        self._run.finish(exit_code=int(ended == "failed"))
        self._wandb.teardown()


class _Mlflow:
    """Goes to ``MLFLOW_TRACKING_URI``, by default to the folder ``mlruns`` beside the runs."""

    _STATUS: Mapping[Ended, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, resolved: "ResolvedJob", folder: RunDir, first: Line) -> None:
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a new MLflow wants to be asked
            address = str(Path(resolved.job.output.dir, "mlruns"))
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._metric: Callable[..., Any] = Metric
        self._client: Any = MlflowClient(tracking_uri=address)
        earlier = [
            event["run"]
            for event, _ in read_lines(folder.events)
            if event["event"] == "tracking" and event["tracker"] == "mlflow"
        ]
        for self._id in earlier[-1:]:
            with contextlib.suppress(MlflowException):  # it has been deleted, or is elsewhere
                self._client.update_run(self._id, status="RUNNING")
                return
        experiment = self._experiment(resolved.job.name, MlflowException)
        created = self._client.create_run(experiment, run_name=folder.path.name)
        self._id = created.info.run_id
        folder.append_event("tracking", tracker="mlflow", run=self._id)
        settings = disclose.flat(disclose.public(json.loads(resolved.to_json())))
        params = [Param(_plain(key, " ./")[:250], _text(value)[:6000]) for key, value in settings.items()]
        for start in range(0, len(params), 100):  # the most that it takes at once
            self._client.log_batch(self._id, params=params[start : start + 100])

    def _experiment(self, name: str, exists: type[Exception]) -> str:
        """The experiment of that name; another run may make it at the same time."""
        if (found := self._client.get_experiment_by_name(name)) is None:
            with contextlib.suppress(exists):
                return str(self._client.create_experiment(name))
            found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def write(self, line: Line) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, line["step"]) for name, value in figures(line).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, ended: Ended) -> None:
        self._client.set_terminated(self._id, self._STATUS[ended])


_OPEN: dict[str, Callable[["ResolvedJob", RunDir, Line], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


def _plain(text: str, also: str = "") -> str:
    """``text`` of letters, digits, ``_``, ``-`` and what is in ``also`` alone."""
    return re.sub(rf"[^A-Za-z0-9_\-{re.escape(also)}]", "-", text)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
