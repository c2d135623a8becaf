"""Metrics for experiment trackers: what arrives there, and that no tracker ever stops training.

``make test-trackers`` installs Weights & Biases and MLflow beside the environment, and runs all of these;
without the packages their tests are skipped. Nothing here leaves the machine.
"""

import importlib.util
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from memlaunch.launcher import resolve, rundir, translate
from memlaunch.launcher.rundir import RunDir
from memlaunch.launcher.training import session, trackers
from memlaunch.launcher.training.errors import TrainingFailed
from memlaunch.launcher.training.world import World
from tests import ranks

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews"
ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
STEPS = 6
SECRET = "hunter2" * 6

# The tokens are memory-mapped, and not to be written.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


@pytest.fixture(autouse=True)
def _nothing_leaves_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        assert not os.environ.get("MEMLAUNCH_REQUIRE_TRACKERS"), f"{package} is not installed"
        pytest.skip(f"{package} is not installed: `make test-trackers`")


def place(output: Path, tokenizer: Path, *track: str, size: int = 1, **training: Any) -> RunDir:
    """A new run folder for a tiny job that is tracked."""
    job = {
        "name": "tracked",
        "model": {
            "architecture": "bert",
            "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
            "tokenizer": str(tokenizer),
            "num_labels": 2,
        },
        "data": {"train": str(REVIEWS / "train.jsonl"), "eval": str(REVIEWS / "eval.jsonl"), "max_length": 8},
        "training": {"global_batch_size": 8, "max_steps": STEPS, **training},
        "cluster": {
            "gpus_per_node": size,
            "device": "cpu",
            "threads_per_rank": 1,
            "env": {"PASSWORD": SECRET},
        },
        "output": {"dir": str(output), "track": list(track)},
    }
    (output / "job.json").write_text(json.dumps(job))
    run = rundir.create(output, "tracked")
    run.place(translate.files(resolve.load(output / "job.json")))
    return run


def train(run: RunDir, world: World = ALONE) -> bool:
    return session.run(resolve.load(run.resolved), run, world)


def train_in_a_rank(world: World, path: Path) -> bool:
    return train(RunDir(path), world)


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [line for line, _ in rundir.read_lines(run.metrics)]


def warnings(run: RunDir) -> list[str]:
    events = [event for event, _ in rundir.read_lines(run.events)]
    return [event["message"] for event in events if event["event"] == "warning"]


def expected(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """What a tracker has to have: name -> (step, value)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines(run):
        for name, value in trackers.figures(line).items():
            found.setdefault(name, []).append((line["step"], value))
    assert {"train/loss", "train/learning_rate", "eval/loss", "eval/accuracy"} <= set(found)
    assert [step for step, _ in found["train/loss"]] == list(range(1, STEPS + 1))
    return found


def in_tensorboard(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(point.step, point.value) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def same(found: Mapping[str, list[tuple[int, float]]], run: RunDir) -> None:
    wanted = expected(run)
    assert set(found) == set(wanted)
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        values = [value for _, value in found[name]]
        assert values == pytest.approx([value for _, value in points], rel=1e-6), name


# What arrives


def test_nothing_is_tracked_unless_it_is_asked_for(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = place(tmp_path, tokenizer_folder)
    assert train(run)
    names = {path.name for path in (*run.path.iterdir(), *tmp_path.iterdir())}
    assert not names & {"tensorboard", "wandb", "mlruns"}


def test_tensorboard_has_every_figure_of_the_metrics(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = place(tmp_path, tokenizer_folder, "tensorboard")
    assert train(run)
    same(in_tensorboard(run), run)
    assert warnings(run) == []


def test_the_main_rank_alone_writes(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = place(tmp_path, tokenizer_folder, "tensorboard", size=2)
    assert ranks.run(2, train_in_a_rank, run.path) == [True, True]
    assert len(list(run.tensorboard.iterdir())) == 1
    same(in_tensorboard(run), run)


def test_a_resumed_run_goes_on_in_tensorboard(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = place(tmp_path, tokenizer_folder, "tensorboard", eval_every_steps=2)
    run.stop.touch()
    assert not train(run)
    assert lines(run)[-1]["step"] < STEPS, "it was stopped on its way"
    assert train(run)
    same(in_tensorboard(run), run)


def in_wandb(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """What the file of an offline run holds: records of protobuf in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = (run.path / "wandb").glob("offline-run-*/run-*.wandb")
    found: dict[str, list[tuple[int, float]]] = {}
    for data in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            for name, value in row.items():
                if "/" in name:
                    found.setdefault(name, []).append((row["step"], value))
    return found


def records(data: bytes) -> Iterator[bytes]:
    block, at, parts = 32768, 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_has_every_figure_and_no_secret(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("wandb")
    monkeypatch.setenv("WANDB_API_KEY", SECRET[:40])
    run = place(tmp_path, tokenizer_folder, "wandb")
    assert train(run)
    assert warnings(run) == []
    same(in_wandb(run), run)
    written = [path for path in (run.path / "wandb").rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in written}
    assert any(b"global_batch_size" in data for data in contents.values()), "the job is among it"
    for path, data in contents.items():
        assert SECRET[:40].encode() not in data, path


def in_mlflow(output: Path) -> tuple[Any, Any, Any]:
    """(client, the only run, its metrics) of the folder beside the runs."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=str(output / "mlruns"))
    experiment = client.get_experiment_by_name("tracked")
    (run,) = client.search_runs([experiment.experiment_id])
    history = {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    return client, run, history


def test_mlflow_has_every_figure_and_the_job(tmp_path: Path, tokenizer_folder: Path) -> None:
    need("mlflow")
    output = tmp_path / "a folder"
    output.mkdir()
    run = place(output, tokenizer_folder, "mlflow")
    assert train(run)
    assert warnings(run) == []
    _, found, history = in_mlflow(output)
    same(history, run)
    assert found.info.status == "FINISHED"
    assert found.data.params["training.global_batch_size"] == "8"
    assert found.data.params["cluster.env.PASSWORD"] == "(hidden)"


def test_mlflow_goes_on_with_the_same_run_and_knows_how_it_ended(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    need("mlflow")
    run = place(tmp_path, tokenizer_folder, "mlflow")
    run.stop.touch()
    assert not train(run)
    assert in_mlflow(tmp_path)[1].info.status == "KILLED"
    assert train(run)
    _, found, history = in_mlflow(tmp_path)
    assert found.info.status == "FINISHED"
    same(history, run)


def test_mlflow_sees_a_run_fail(tmp_path: Path, tokenizer_folder: Path) -> None:
    need("mlflow")
    run = place(tmp_path, tokenizer_folder, "mlflow", learning_rate=1e30)
    with pytest.raises(TrainingFailed):
        train(run)
    assert in_mlflow(tmp_path)[1].info.status == "FAILED"


# What never stops training


def test_a_tracker_that_is_not_installed_is_told_once(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow", "mlflow.entities", "mlflow.tracking"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not
    run = place(tmp_path, tokenizer_folder, "wandb", "mlflow", "tensorboard")
    assert train(run)
    assert len(warnings(run)) == 2
    for name in ("wandb", "mlflow"):
        (told,) = (told for told in warnings(run) if name in told)
        assert told.startswith(f"nothing more goes to {name}: ")
        assert told.endswith(f"is not installed where the ranks run: pip install 'memlaunch[{name}]'")
    same(in_tensorboard(run), run)


def test_a_tracker_that_cannot_write_is_told_once(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = place(tmp_path, tokenizer_folder, "tensorboard")
    run.tensorboard.write_text("a file in the place of the folder")
    assert train(run)
    (told,) = warnings(run)
    assert told.startswith("nothing more goes to tensorboard: ")
    assert [line["step"] for line in lines(run)] == [*range(1, STEPS + 1), STEPS]


def test_a_tracker_that_hangs_is_left_behind(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hangs:
        def __init__(self, *about: Any) -> None:
            pass

        def write(self, line: trackers.Line) -> None:
            time.sleep(10_000)

        def close(self, ended: trackers.Ended) -> None:
            raise AssertionError("it never comes to that")

    monkeypatch.setitem(trackers._OPEN, "wandb", Hangs)
    monkeypatch.setitem(trackers.PATIENCE, "finished", 0.2)
    monkeypatch.setattr(trackers, "ROOM", 3)
    run = place(tmp_path, tokenizer_folder, "wandb", "tensorboard")
    assert train(run)
    (told,) = warnings(run)
    assert told == "nothing more goes to wandb: it has not taken over the last 3 lines"
    monkeypatch.setattr(trackers, "ROOM", 100)
    again = place(tmp_path, tokenizer_folder, "wandb", "tensorboard")
    assert train(again)
    (told,) = warnings(again)
    assert told == "nothing more goes to wandb: it did not take over the last lines in time"


def test_a_server_that_never_answers_is_left_behind(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setitem(trackers.PATIENCE, "finished", 1.0)
        run = place(tmp_path, tokenizer_folder, "mlflow")
        assert train(run)
    assert warnings(run) == ["nothing more goes to mlflow: it did not take over the last lines in time"]


def test_a_password_in_an_address_is_not_told(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = place(tmp_path, tokenizer_folder, "mlflow")
    assert train(run)
    (told,) = warnings(run)
    assert told.startswith("nothing more goes to mlflow: ")
    assert SECRET not in run.events.read_text()


def test_a_number_that_is_not_finite_goes_to_no_tracker() -> None:
    line = {"step": 3, "loss": float("nan"), "grad_norm": None, "skipped": True, "tokens": 5}
    assert trackers.figures(line) == {"train/skipped": 1.0, "train/tokens": 5.0}
    assert trackers.figures({"step": 3, "epoch": 1.0, "eval_loss": 2.0}) == {"eval/loss": 2.0}
