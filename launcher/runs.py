"""Runs that are or were: how they stand, what they say, and how to stop them."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memlaunch.launcher import outcome, slurm_job
from memlaunch.launcher.errors import EXIT_LAUNCH, UserError
from memlaunch.launcher.rundir import RunDir, read_lines

#: Events behind which nothing more comes of a launch, and those that begin one.
_LAST = {"finished": "finished", "failed": "failed", "stopped": "stopped", "preempted": "stopped"}
_FIRST = ("submitted", "resumed", "started")

#: Seconds between two looks at a log that grows.
_TURN = 0.2


def find(path: Path) -> RunDir:
    """The run whose folder is ``path``.

    Raises:
        UserError: it is none.
    """
    run = RunDir(path.resolve())
    if not run.resolved.exists():
        hint = "name the folder that `memlaunch run` printed, such as `runs/reviews/20261121-143005-a1b2`"
        raise UserError(f"`{path}` is not a run folder", hint)
    return run


def newest_first(output: Path) -> list[RunDir]:
    """All runs below ``output``, a folder of run folders by name."""
    runs = [RunDir(path.parent) for path in output.glob("*/*/resolved.json")]
    return sorted(runs, key=lambda run: run.path.name, reverse=True)


def status(run: RunDir, *, ended: bool = False) -> dict[str, Any]:
    """How a run stands; ``ended`` where the process that started it is there, but has seen it end.

    ``state`` is ``finished``, ``failed``, ``stopped``, ``running``, ``starting``, a state of a SLURM job that
    has not ended, such as ``pending``, ``lost`` where the ranks ended without a word, or ``elsewhere`` where
    another machine started them and has said nothing of an end. ``step`` is the last optimizer step that was
    done, ``steps`` all of them, ``seconds`` since the first event to the last.
    """
    events = [event for event, _ in read_lines(run.events)]
    steps = [line for line, _ in read_lines(run.metrics)]
    trained = [line for line in steps if "loss" in line]
    evaluated = [line for line in steps if "eval_loss" in line]
    started = [event for event in events if event["event"] == "started"]
    failure = outcome.culprit([event for event in _last_launch(events) if event["event"] == "failed"])
    state = _state(run, events, ended)
    return {
        "run": str(run.path),
        "state": state,
        "job": slurm_job.of(run),
        "step": trained[-1]["step"] if trained else 0,
        "steps": started[-1].get("steps") if started else None,
        "loss": trained[-1]["loss"] if trained else None,
        **({name: v for name, v in evaluated[-1].items() if name.startswith("eval_")} if evaluated else {}),
        "seconds": round(events[-1]["time"] - events[0]["time"], 3) if events else 0.0,
        "failure": failure if state == "failed" else None,
    }


def _last_launch(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    begun = [number for number, event in enumerate(events) if event["event"] in ("submitted", "resumed")]
    return events[begun[-1] :] if begun else events


def _state(run: RunDir, events: list[dict[str, Any]], ended: bool = False) -> str:
    decisive = [event["event"] for event in events if event["event"] in (*_LAST, *_FIRST)]
    last = decisive[-1] if decisive else None
    job = slurm_job.of(run)
    if job is not None:
        state = slurm_job.state(job)
        if state is not None and state not in slurm_job.ENDED:
            return state.lower()
        if state in slurm_job.TAKEN_AWAY and last != "finished":
            return "stopped"
    elif not ended and run.launcher_process() is not None:
        return "running" if last == "started" else "starting"
    elif last not in _LAST and run.launcher_host() not in (None, os.uname().nodename):
        return "elsewhere"
    return _LAST.get(last or "") or ("stopped" if run.stop.exists() else "lost")


def summary(status: dict[str, Any]) -> str:
    """The figures of :func:`status` in a line."""
    words = [status["run"], status["state"]]
    if status["job"] is not None:
        words.append(f"job {status['job']}")
    if status["steps"] is not None:
        words.append(f"step {status['step']}/{status['steps']}")
    for name in ("loss", "eval_loss", "eval_accuracy"):
        if status.get(name) is not None:
            words.append(f"{name} {status[name]:.4g}")
    if (failure := status["failure"]) is not None:
        words.append(f"rank {failure['rank']} on {failure['host']}: {failure['message']}")
    return "  ".join(words)


def log(run: RunDir, rank: int | None) -> Path:
    """The log of a rank; by default of the one that failed, else of rank 0, else of what started them.

    Raises:
        UserError: there is none.
    """
    if rank is None:
        failure = status(run)["failure"]
        rank = failure["rank"] if failure is not None else 0
        logs = [run.rank_log(rank), *sorted(run.logs.glob("slurm-*.log"), reverse=True), run.launcher_log]
    else:
        logs = [run.rank_log(rank)]
    found = next((path for path in logs if path.exists()), None)
    if found is None:
        have = ", ".join(sorted(path.name for path in run.logs.iterdir())) or "none"
        raise UserError(f"there is no {logs[0].name} in `{run.logs}`", f"the logs are {have}")
    return found


def follow(run: RunDir, path: Path) -> Iterator[str]:
    """The text of a log, and what comes to it until the run ends."""
    with path.open(encoding="utf-8", errors="replace") as file:
        looked = float("-inf")
        ended = False
        while True:
            yield file.read()
            if ended:
                return
            time.sleep(_TURN)
            if time.monotonic() - looked > 10 * _TURN:
                looked = time.monotonic()
                events = [event for event, _ in read_lines(run.events)]
                ended = _state(run, events) in (*_LAST.values(), "lost")


def stop(run: RunDir, *, now: bool = False) -> str:
    """Ask the ranks of a run to stop between two steps, or end them ``now``; what was done, in words.

    Raises:
        UserError: it does not run, or was started on another machine.
    """
    state = status(run)["state"]
    if state in (*_LAST.values(), "lost"):
        raise UserError(f"`{run.path}` does not run: {state}", "`memlaunch status` shows what does")
    job = slurm_job.of(run)
    if job is not None and now:
        slurm_job.end(job)
        return f"cancelled job {job}"
    if job is not None:
        run.ask_to_stop(lambda: slurm_job.ask_to_stop(job))
        return f"asked the ranks of job {job} to stop"
    process = run.launcher_process()
    if process is None:
        raise UserError(
            f"`{run.path}` was started on {run.launcher_host()}",
            "stop it there",
            exit_code=EXIT_LAUNCH,
        )
    os.kill(process, signal.SIGTERM)
    if now:
        os.kill(process, signal.SIGHUP)  # as a second request
        return f"told process {process} to end the ranks"
    return f"asked process {process} to stop the ranks"
