"""Real ranks for a test: a module-level function, run in processes that meet over gloo."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

#: Longer than any test takes; a rank that hangs must not hang the suite.
LIMIT_SECONDS = 900

#: Of every rank.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}


def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(world, *args)`` returns in each of ``size`` ranks.

    Raises:
        AssertionError: a rank raised; its traceback is the message.
    """
    context = _ready_to_fork()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [Path(folder, str(rank)) for rank in range(size)]
        processes = [
            context.Process(
                target=_rank, args=(function, rank, size, port, args, outcome, dict(os.environ), Path.cwd())
            )
            for rank, outcome in enumerate(outcomes)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes)
        finally:
            for process in processes:
                process.kill()
        results = [pickle.loads(outcome.read_bytes()) for outcome in outcomes if outcome.exists()]
    failures = [text for succeeded, text in results if not succeeded]
    assert not failures, "\n".join(failures)
    assert len(results) == size, "a rank died without a word"
    return [value for _, value in results]


@cache
def _ready_to_fork() -> Any:
    """A context whose processes begin with everything imported: half of a short test would be imports.

    None of those libraries starts a thread or opens a group of ranks when it is imported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "transformers", "memlaunch.launcher.training.session"])
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ |= ENVIRONMENT  # read by OpenMP and DeepSpeed when they are imported
    forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return context


def _wait(processes: list[Any]) -> None:
    """Until all have ended well, or one has failed."""
    from multiprocessing.connection import wait

    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running), timeout=LIMIT_SECONDS) or list(running):
            process = running.pop(sentinel)
            process.join(timeout=0)
            if process.exitcode != 0:
                return


def _rank(
    function: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    args: tuple[Any, ...],
    outcome: Path,
    environment: dict[str, str],
    folder: Path,
) -> None:
    os.chdir(folder)  # the server that this process was forked from has those of its own start
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **ENVIRONMENT,
    )
    log = os.open(f"{outcome}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        import torch

        from memlaunch.launcher.training import world

        torch.set_num_threads(1)
        result = (True, function(world.join("cpu"), *args))
        world.leave()
    except BaseException:
        result = (False, f"rank {rank} of {size}:\n{traceback.format_exc()}")
    outcome.write_bytes(pickle.dumps(result))
    if not result[0]:
        os._exit(1)  # the other ranks may be waiting in a collective
