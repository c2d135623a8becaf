"""What starting a script costs: ``python benchmarks/script_launch.py [--pairs N] [--ranks N] [--seconds S]``.

Runs a script under bare torchrun and as a ``script`` job, in turns, and prints the wall time from the command
to its end, for a script that does nothing and for one that computes for S (20) seconds on every rank. Beside
it stands the CPU time of all processes, which a busy machine disturbs less.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

WORK = """
import sys, time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
end = time.monotonic() + float(sys.argv[1])
factor = torch.eye(64)
while time.monotonic() < end:
    factor = factor @ factor
dist.barrier()
dist.destroy_process_group()
"""
NOTHING = "print('done')\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    asked = parser.parse_args()
    print(f"{os.cpu_count()} cores, {asked.ranks} ranks, {asked.pairs} pairs; medians")
    print(f"{'script':14} {'torchrun':>10} {'memlaunch':>10} {'ratio':>7} {'more':>8} {'CPU of both':>18}")
    with tempfile.TemporaryDirectory() as folder:
        for name, text, arguments in (
            ("nothing", NOTHING, []),
            (f"{asked.seconds:g} s of work", WORK, [str(asked.seconds)]),
        ):
            bare, ours = commands(Path(folder), text, arguments, asked.ranks)
            cost(bare), cost(ours)  # what is read from a disk is in memory from here on
            pairs = [(*cost(bare), *cost(ours)) for _ in range(asked.pairs)]
            first, cpu, second, our_cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, _, b, _ in pairs)
            wall = f"{first:8.2f} s {second:8.2f} s {ratio:7.3f} {second - first:6.2f} s"
            print(f"{name:14} {wall} {cpu:8.2f} s {our_cpu:5.2f} s", flush=True)


def commands(folder: Path, text: str, arguments: Sequence[str], ranks: int) -> tuple[list[str], list[str]]:
    """How to start the script: bare, and as a job."""
    (folder / "script.py").write_text(text)
    job = folder / "job.json"
    cluster = {"gpus_per_node": ranks, "device": "cpu", "threads_per_rank": 1}
    job.write_text(json.dumps({"script": {"path": "script.py", "args": arguments}, "cluster": cluster}))
    programs = Path(sys.executable).parent
    torchrun = [str(programs / "torchrun"), "--standalone", f"--nproc-per-node={ranks}"]
    return (
        [*torchrun, str(folder / "script.py"), *arguments],
        [str(programs / "memlaunch"), "run", str(job)],
    )


def cost(command: Sequence[str]) -> tuple[float, float]:
    """Seconds that a command took, and those of CPU time of all its processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began, used = time.perf_counter(), cpu_seconds()
    subprocess.run(command, env=environment, capture_output=True, check=True)
    return time.perf_counter() - began, cpu_seconds() - used


def cpu_seconds() -> float:
    """CPU time of the processes below this one that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
