"""``"auto"`` in a job file: what the planner puts in its place before a run, and what comes of a plan."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memlaunch.launcher.plan import choice, gpus, machine
from memlaunch.launcher.rundir import RunDir, read_lines

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews"
MEMLAUNCH = [sys.executable, "-m", "memlaunch.launcher.cli"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the traces of all tests are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def job(tmp_path: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """A tiny random model on 60 real sentences, on two ranks of a CPU."""
    lines = (REVIEWS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:60]), encoding="utf-8")
    return {
        "model": {
            "architecture": "bert",
            "config": {
                "vocab_size": 30522,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
            },
            "tokenizer": str(tokenizer_folder),
        },
        "data": {"train": "train.jsonl", "max_length": 24},
        "training": {"global_batch_size": 8, "micro_batch_size": "auto", "max_steps": 3},
        "strategy": {"engine": "torch", "activation_checkpointing": "auto"},
        "cluster": {"gpus_per_node": 2, "device": "cpu", "threads_per_rank": 1},
    }


class Command:
    """The command ``memlaunch`` on a job file in a folder."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.path = folder / "job.json"
        self._environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        self._environment.pop("SLURM_JOB_ID", None)

    def __call__(self, verb: str, job: Any, *more: object) -> subprocess.CompletedProcess[str]:
        if not isinstance(job, Path):
            self.path.write_text(json.dumps(job, indent=2))
            job = self.path
        words = [*MEMLAUNCH, verb, str(job), *map(str, more)]
        return subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=900, env=self._environment
        )


@pytest.fixture
def memlaunch(tmp_path: Path, cache: Path) -> Command:
    return Command(tmp_path, cache)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def losses(folder: RunDir) -> list[float]:
    return [line["loss"] for line, _ in read_lines(folder.metrics)]


# What a run does with it


def test_auto_is_filled_in_and_trained_and_never_planned_again(
    memlaunch: Command, job: dict[str, Any], tmp_path: Path
) -> None:
    done = memlaunch("run", job)
    assert done.returncode == 0, done.stderr
    folder = RunDir(Path(done.stdout.strip()))
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("planned: ")]
    assert "training.micro_batch_size = 4 (it is all of a rank's share of the global batch)" in told
    assert "strategy.activation_checkpointing.mode = none (the simplest, and nothing that fits" in told

    resolved, plan = read(folder.resolved), read(folder.plan)
    assert '"auto"' not in folder.resolved.read_text()
    sizes = {key: resolved["training"][key] for key in ("micro_batch_size", "gradient_accumulation_steps")}
    assert sizes == {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
    assert plan["fits"] is True
    assert plan["gpu"] == "CPU"
    assert plan["world_size"] == 2
    assert 0 < plan["peak_allocated_bytes"] <= plan["peak_reserved_bytes"] < plan["gpu_memory_bytes"]
    assert sum(plan["breakdown"].values()) >= plan["peak_allocated_bytes"]
    assert plan["host_memory_bytes"] > plan["peak_reserved_bytes"]
    assert plan["step_seconds"] > 0
    assert {entry["key"]: entry["value"] for entry in plan["chosen"]} == {
        "strategy.activation_checkpointing.mode": "none",
        "training.gradient_accumulation_steps": 1,
        "training.micro_batch_size": 4,
    }
    assert all(entry["why"] for entry in plan["chosen"])
    assert {one["changes"]["training.micro_batch_size"] for one in plan["candidates"]} >= {1, 2, 4}
    assert "peak memory of a rank: " in done.stderr
    assert "predicted, none measured, a CPU cannot tell" in done.stderr
    page = folder.report.read_text()
    assert "predicted" in page
    assert "it is all of a rank&#39;s share of the global batch" in page

    again = memlaunch("run", folder.resolved, "--dry-run")
    assert (again.returncode, again.stderr) == (0, ""), "nothing is left to plan"
    assert "plan.json" not in again.stdout


def test_a_run_that_goes_on_keeps_what_was_chosen_for_it(
    memlaunch: Command, job: dict[str, Any], tmp_path: Path
) -> None:
    job["output"] = {"checkpoint_every_steps": 2}
    first = memlaunch("run", job, "--set", "training.micro_batch_size=2")
    assert first.returncode == 0, first.stderr
    further = memlaunch("run", job, "--resume", "auto", "--set", "training.max_steps=5")
    assert further.returncode == 0, further.stderr
    folder = RunDir(Path(further.stdout.strip()))
    assert folder.path == Path(first.stdout.strip())
    assert "planned: " not in further.stderr
    assert read(folder.resolved)["training"]["micro_batch_size"] == 2
    assert read(folder.plan)["chosen"], "of the first launch"
    assert len(losses(folder)) == 5


def test_what_is_translated_runs_by_hand_without_planning_again(
    memlaunch: Command, job: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "translated"
    assert memlaunch("translate", job, "--out", out).returncode == 0
    assert read(out / "resolved.json")["training"]["micro_batch_size"] == 4
    dry = memlaunch("run", job, "--dry-run")
    for name in ("plan.json", "resolved.json", "command.sh"):
        assert f"==> {name} <==\n{(out / name).read_text()}" in dry.stdout
    by_hand = subprocess.run(["bash", out / "command.sh"], capture_output=True, text=True, check=False)
    assert by_hand.returncode == 0, by_hand.stderr
    (run,) = (tmp_path / "runs" / "job").iterdir()
    assert read(RunDir(run).plan) == read(out / "plan.json")
    assert len(losses(RunDir(run))) == 3


# What does not fit


def test_the_error_names_the_smallest_changes_that_would_fit() -> None:
    ways = [
        {"changes": {"training.micro_batch_size": 4}, "memory_bytes": 12 << 30},
        {"changes": {"strategy.engine": "deepspeed", "strategy.zero.stage": 2}, "memory_bytes": 9 << 30},
    ]
    plan = {
        "gpu": "T4-16GB",
        "peak_reserved_bytes": 20 << 30,
        "usable_memory_bytes": 14 << 30,
        "usable_host_memory_bytes": None,
        "breakdown": {"CUDA context": 1 << 30, "activations": 19 << 30},
        "changes_that_fit": ways,
    }
    refusal = choice.does_not_fit(plan)
    assert refusal.exit_code == 3
    assert refusal.render() == (
        "error: the job does not fit: it needs 21.0 GiB of the 14.0 GiB that may be used of each T4-16GB\n"
        "hint: this would fit: --set training.micro_batch_size=4 (12.0 GiB); "
        "--set strategy.engine=deepspeed --set strategy.zero.stage=2 (9.0 GiB); "
        "`--force` runs it all the same"
    )
    hopeless = choice.does_not_fit({**plan, "changes_that_fit": []})
    assert hopeless.hint is not None
    assert hopeless.hint.startswith("no other strategy would fit on these ranks; `--force`")


@pytest.mark.long
def test_a_job_that_cannot_fit_is_not_started(
    memlaunch: Command, job: dict[str, Any], tmp_path: Path
) -> None:
    job["training"] = {"global_batch_size": 2**19, "micro_batch_size": 2**18}
    job["strategy"]["activation_checkpointing"] = "none"
    job["cluster"] = {"gpus_per_node": 2, "gpu": "T4-16GB", "threads_per_rank": 1}
    done = memlaunch("run", job, "--plan")
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert "error: the job does not fit: it needs " in done.stderr
    assert "of the 14.0 GiB that may be used of each T4-16GB\n" in done.stderr
    assert "hint: this would fit: --set training.micro_batch_size=" in done.stderr
    assert not (tmp_path / "runs").exists()

    forced = memlaunch("run", job, "--plan", "--force", "--dry-run")
    assert forced.returncode == 0, forced.stderr
    assert "planned: does not fit: " in forced.stderr
    assert '"fits": false' in forced.stdout
    assert memlaunch("plan", job).returncode == 3
    assert memlaunch("run", job, "--dry-run").returncode == 0, "nothing in it is auto, and nobody asked"


# What it is planned for


def slurm(job: dict[str, Any], **more: Any) -> dict[str, Any]:
    cluster = {"launcher": "slurm", "nodes": 2, "gpus_per_node": 4, "device": "cuda", **more}
    return {**job, "training": {"global_batch_size": 64, "micro_batch_size": "auto"}, "cluster": cluster}


def test_a_login_node_plans_for_the_gpu_that_is_named(
    memlaunch: Command, job: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "translated"
    done = memlaunch("translate", slurm(job, gpu="a100-80gb"), "--out", out)
    assert done.returncode == 0, done.stderr
    assert "of each A100-80GB" in done.stderr
    plan = read(out / "plan.json")
    assert (plan["gpu"], plan["world_size"]) == ("A100-80GB", 8)
    assert read(out / "resolved.json")["training"]["micro_batch_size"] == 8
    assert "#SBATCH --gpus-per-node=4\n" in (out / "job.sbatch").read_text()


def test_a_login_node_that_does_not_know_the_gpu_asks_for_its_name(
    memlaunch: Command, job: dict[str, Any]
) -> None:
    for verb in ("run", "submit"):
        done = memlaunch(verb, slurm(job))
        assert done.returncode == 2
        assert "error: nothing says which GPU the job is to be planned for" in done.stderr
        assert "hint: set `cluster.gpu` to its name" in done.stderr


def test_a_named_gpu_is_never_a_cpu(memlaunch: Command, job: dict[str, Any]) -> None:
    done = memlaunch("run", {**job, "training": {}, "strategy": {}, "cluster": {"gpu": "H100"}}, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert '"device": "cuda"' in done.stdout


def test_a_gpu_that_the_catalogue_does_not_know_has_the_memory_that_the_driver_tells() -> None:
    unknown = machine.described("NVIDIA X9000", 50 << 30, 9.0)
    assert (unknown.name, unknown.memory_bytes, unknown.device) == ("NVIDIA X9000", 50 << 30, "cuda")
    assert unknown.flops in [gpu.flops for gpu in gpus.catalogue().values() if gpu.capability == 9.0]
    known = machine.described("NVIDIA H100 80GB HBM3", 85_520_809_984, 9.0)
    assert known == gpus.find("H100-80GB")
    slice_of_one = machine.described("NVIDIA A100-SXM4-80GB", 20 << 30, 8.0)
    assert (slice_of_one.name, slice_of_one.memory_bytes) == ("A100-80GB", 20 << 30)


@pytest.mark.parametrize(("mem", "size"), [("512", 512 << 20), ("64G", 64 << 30), ("2t", 2 << 40)])
def test_memory_as_slurm_writes_it(mem: str, size: int) -> None:
    assert machine.slurm_bytes(mem) == size


# What may say it


@pytest.mark.parametrize(
    ("strategy", "stands_in"),
    [
        ({"engine": "auto"}, ("torch", 0)),
        ({"engine": "auto", "zero": {"stage": 1}}, ("deepspeed", 1)),
        ({"engine": "auto", "deepspeed": {"steps_per_print": 5}}, ("deepspeed", 0)),
        ({"engine": "deepspeed", "zero": {"stage": "auto", "offload_optimizer": "cpu"}}, ("deepspeed", 1)),
        (
            {"engine": "deepspeed", "zero": {"stage": "auto", "offload_parameters": "cpu"}},
            ("deepspeed", 3),
        ),
    ],
)
def test_what_stands_in_its_place_goes_with_the_rest(
    job: dict[str, Any], tmp_path: Path, strategy: dict[str, Any], stands_in: tuple[str, int]
) -> None:
    from memlaunch.launcher import resolve

    path = tmp_path / "job.json"
    path.write_text(json.dumps({**job, "strategy": strategy}))
    resolved = resolve.load(path)
    chosen = resolved.job.strategy
    assert (chosen.engine, chosen.zero.stage) == stands_in
    assert resolved.open >= {"training.micro_batch_size", "training.gradient_accumulation_steps"}
    assert "for the planner to choose" in resolved.summary()


def test_a_job_with_auto_is_checked_without_torch(job: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    program = (
        "import sys; from memlaunch.launcher import cli; "
        f"code = cli.main(['validate', '--json', {str(path)!r}]); "
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "0 False False\n"
    assert json.loads(done.stdout)["auto"] == [
        "strategy.activation_checkpointing.mode",
        "training.gradient_accumulation_steps",
        "training.micro_batch_size",
    ]


# A probe


def test_a_probe_takes_smaller_micro_batches_until_no_rank_is_out_of_memory(
    memlaunch: Command, job: dict[str, Any], tmp_path: Path
) -> None:
    """Each rank may have 4 GB of addresses; 59,999 samples need twice that. The only smaller divisor is 1."""
    job["training"] = {"global_batch_size": 2 * 59_999, "micro_batch_size": 59_999}
    job["strategy"]["activation_checkpointing"] = "none"
    job["cluster"]["setup"] = ["ulimit -v 4000000"]
    done = memlaunch("plan", job, "--probe", "--json")
    assert done.returncode == 0, done.stderr
    probe = json.loads(done.stdout)["probe"]
    first, second = probe["attempts"]
    assert (first["micro_batch_size"], first["gradient_accumulation_steps"]) == (59_999, 1)
    assert not first["fits"]
    assert first["measured"] is None
    assert first["predicted"]["peak_allocated_bytes"] > 4 << 30
    assert "can't allocate memory" in first["failure"]
    assert (second["micro_batch_size"], second["gradient_accumulation_steps"]) == (1, 59_999)
    assert second["fits"]
    assert second["failure"] is None
    assert 200 << 20 < second["measured"]["peak_process_bytes"] < 4_000_000 << 10
    assert second["measured"]["peak_allocated_bytes"] is None, "a CPU cannot tell"
    assert second["predicted"]["memory_bytes"] > second["predicted"]["peak_allocated_bytes"]
    sizes = probe["micro_batch_size"], probe["gradient_accumulation_steps"]
    assert (probe["fits"], sizes) == (True, (1, 59_999))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.json", "train.jsonl"], "nothing is kept"


def test_a_probe_runs_on_the_machines_of_the_job(memlaunch: Command, job: dict[str, Any]) -> None:
    done = memlaunch("plan", job, "--probe", "--gpu", "H100")
    assert done.returncode == 2
    assert "error: a probe runs on the machines of the job" in done.stderr
