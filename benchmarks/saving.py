"""What checkpoints cost: ``python benchmarks/saving.py [EVERY]``.

Trains the example with a checkpoint every EVERY (20) optimizer steps, and prints from its events how long
training stood still for them, and how long they took to write beside it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from memlaunch.launcher.rundir import RunDir, read_lines

JOB = Path(__file__).parents[1] / "examples" / "reviews" / "job.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("every", metavar="EVERY", nargs="?", type=int, default=20, help="optimizer steps")
    every = parser.parse_args().every
    argv = [
        sys.executable,
        "-m",
        "memlaunch.launcher.cli",
        "run",
        str(JOB),
        "--set=training.micro_batch_size=16",
    ]
    done = subprocess.run(
        [*argv, f"--set=output.checkpoint_every_steps={every}"], stdout=subprocess.PIPE, text=True, check=True
    )
    run = RunDir(Path(done.stdout.strip()))
    events = [event for event, _ in read_lines(run.events)]
    saved = [event for event in events if event["event"] == "checkpoint"]
    began = next(event["time"] for event in events if event["event"] == "started")
    total = events[-1]["time"] - began
    stalled = sum(event["seconds_stalled"] for event in saved)
    written = sum(event["seconds_written"] for event in saved)
    size = saved[-1]["bytes"] / 2**20
    print(f"{len(saved)} checkpoints of {size:.0f} MiB in {total:.1f} s, from the first step to the end")
    print(f"training stood still for {stalled:.2f} s, {100 * stalled / total:.2f} % of it")
    print(f"writing took {written:.2f} s, beside it")


if __name__ == "__main__":
    main()
