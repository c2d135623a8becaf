"""Real ranks for a test: a module-level function, run in processes that meet over gloo."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Longer than any test takes; a rank that hangs must not hang the suite.
LIMIT_SECONDS = 900


def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(world, *args)`` returns in each of ``size`` ranks.

    Raises:
        AssertionError: a rank raised; its traceback is the message.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [Path(folder, str(rank)) for rank in range(size)]
        processes = [
            context.Process(target=_rank, args=(function, rank, size, port, args, outcome))
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
    function: Callable[..., Any], rank: int, size: int, port: int, args: tuple[Any, ...], outcome: Path
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        TOKENIZERS_PARALLELISM="false",
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
