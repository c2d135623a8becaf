"""A checkpoint is whole or it is not there, and it holds all that training goes on from."""

import hashlib
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from memlaunch.launcher import manifest, rundir
from memlaunch.launcher.manifest import Damaged
from memlaunch.launcher.rundir import RunDir
from memlaunch.launcher.training import tensor_file
from memlaunch.launcher.training.checkpoint import Checkpoints
from memlaunch.launcher.training.errors import JobMismatch
from memlaunch.launcher.training.loop import Position
from memlaunch.launcher.training.world import World
from tests import engines, ranks
from tests.engines import Strategy

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
EIGHT_BIT = {"bits": 8, "overrides": [{"modules": "*embeddings*", "bits": 32}]}


def run_folder(path: Path) -> RunDir:
    path.mkdir(parents=True, exist_ok=True)
    folder = RunDir(path)
    folder.resolved.write_text("{}")
    return folder


def start(strategy: Strategy, world: World, dropout: float = 0.1) -> Any:
    from tests import setups

    sizes = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = setups.bert(**sizes, intermediate_size=128, hidden_dropout_prob=dropout)
    engine = engines.start(engines.setup_of(strategy, world), world, model)
    engine.module.train()
    return engine


def save(folder: RunDir, engine: Any, world: World, position: Position, keep: int = 2) -> bool:
    checkpoints = Checkpoints(folder, engine, world, keep)
    checkpoints.save(position)
    succeeded = checkpoints.settle()
    checkpoints.close()
    return succeeded


def events(folder: RunDir, kind: str) -> list[dict[str, Any]]:
    return [event for event, _ in rundir.read_lines(folder.events) if event["event"] == kind]


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy("torch", 0),
        Strategy("torch", 0, precision={"dtype": "bf16", "parameters": "same"}),
        Strategy("torch", 0, precision={"dtype": "fp16", "initial_scale": 2.0**40, "hysteresis": 3}),
        Strategy("torch", 0, optimizer=EIGHT_BIT, freeze=("encoder.layer[:2]",)),
    ],
    ids=["fp32", "bf16 parameters", "fp16", "8-bit, partly frozen"],
)
def test_another_process_goes_on_where_the_checkpoint_was_taken(strategy: Strategy, tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    first = start(strategy, ALONE)
    for number in range(3):
        engines.step(first, number, ALONE)
    assert save(folder, first, ALONE, Position(3, 2))
    drawn, came_to = draw(), go_on(first)
    second = start(strategy, ALONE)
    assert Checkpoints(folder, second, ALONE, keep=2).restore(seed=0) == Position(3, 2)
    assert draw() == drawn
    again = go_on(second)
    assert again[0] == came_to[0], "losses, gradient norms, loss scale"
    assert again[1] == came_to[1], "types of the optimizer's state"
    assert all(torch.equal(again[2][name], came_to[2][name]) for name in again[2])


def draw() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(0, 1), np.random.randn()]


def go_on(engine: Any) -> tuple[Any, ...]:
    """Two more steps: what is recorded of them, the types of the optimizer's state, the weights."""
    lines = [engines.step(engine, number, ALONE) for number in (3, 4)]
    states = [
        {name: getattr(value, "dtype", type(value)) for name, value in block.state.items()}
        for block in engine.blocks()
        if block.state is not None
    ]
    return (lines, engine.loss_scale()), states, engines.weights(engine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 2."""
    folder = run_folder(tmp_path_factory.mktemp("whole"))
    engine = start(Strategy("torch", 0), ALONE)
    engines.step(engine, 0, ALONE)
    assert save(folder, engine, ALONE, Position(2, 2))
    return folder.checkpoints / "step-00000002"


def test_it_holds_safetensors_and_a_manifest_of_their_sums_and_nothing_else(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == ["manifest.json", "rank-0000.safetensors"]
    found = manifest.read(whole)
    manifest.check_files(whole, found)
    assert (found.step, found.applied, found.world_size) == (2, 2, 1)


@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_or_a_lost_end_of_any_file_is_found_and_the_file_is_named(
    whole: Path, data: st.DataObject
) -> None:
    damaged = whole.with_name("damaged")
    shutil.copytree(whole, damaged)
    try:
        path = data.draw(st.sampled_from(sorted(damaged.iterdir())))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(content)
        else:
            path.write_bytes(content[:at])
        with pytest.raises(Damaged, match=path.name):
            manifest.check_files(damaged, manifest.read(damaged))
    finally:
        shutil.rmtree(damaged)


@pytest.mark.parametrize("name", ["manifest.json", "rank-0000.safetensors"])
def test_a_missing_file_is_named(whole: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(Damaged, match=f"{name} is missing"):
        manifest.read(tmp_path / "copy")


def test_a_damaged_one_is_passed_over_with_a_warning_and_does_not_come_back(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    engine = start(Strategy("torch", 0), ALONE)
    for step in (1, 2, 3):
        engines.step(engine, step, ALONE)
        save(folder, engine, ALONE, Position(step, step), keep=5)
    torn = folder.checkpoints / "step-00000003" / "rank-0000.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    (folder.checkpoints / "step-00000009.partial").mkdir()
    for _ in range(2):
        restored = Checkpoints(folder, start(Strategy("torch", 0), ALONE), ALONE, keep=5).restore(seed=0)
        assert restored == Position(2, 2)
    (warning,) = events(folder, "warning")
    assert str(torn) in warning["message"]
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["step-00000001", "step-00000002", "step-00000003.damaged"], (
        "and the unfinished one is gone"
    )


def test_where_there_is_none_nothing_changes(tmp_path: Path) -> None:
    engine = start(Strategy("torch", 0), ALONE)
    before = engines.weights(engine)
    assert Checkpoints(run_folder(tmp_path), engine, ALONE, keep=1).restore(seed=0) == Position()
    after = engines.weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_newest_are_kept_and_a_later_save_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    engine = start(Strategy("torch", 0), ALONE)
    for step in (1, 2, 3, 3):
        engines.step(engine, step, ALONE)
        assert save(folder, engine, ALONE, Position(step, step), keep=2)
    assert manifest.steps(folder.checkpoints) == [3, 2]
    told = events(folder, "checkpoint")
    assert [event["step"] for event in told] == [1, 2, 3, 3]
    assert all(event["seconds_stalled"] >= 0 and event["bytes"] > 100_000 for event in told)


def full_disk(world: World, path: Path) -> list[Any]:
    """In a rank: saves of which the second finds no room on rank 1; then another engine that loads."""
    folder = run_folder(path)
    engine = start(Strategy("torch", 0), world, dropout=0.0)
    checkpoints = Checkpoints(folder, engine, world, keep=5)
    outcomes: list[Any] = []
    for step in (1, 2, 3):
        engines.step(engine, step, world)
        if world.rank == 1:
            limit = 10_000 if step == 2 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        checkpoints.save(Position(step, step))
        outcomes.append(checkpoints.settle())
        if step == 2:
            outcomes.append(sorted(p.name for p in folder.checkpoints.iterdir()) if world.is_main else None)
            other = Checkpoints(folder, start(Strategy("torch", 0), world), world, keep=5)
            outcomes.append(other.restore(seed=0))
    checkpoints.close()
    return outcomes


def test_a_full_disk_costs_a_checkpoint_and_neither_the_run_nor_the_checkpoint_before(tmp_path: Path) -> None:
    main, other = ranks.run(2, full_disk, tmp_path)
    assert main == [True, False, ["step-00000001"], Position(1, 1), True]
    assert other == [True, False, None, Position(1, 1), True]
    (warning,) = events(RunDir(tmp_path), "warning")
    assert "no checkpoint at step 2" in warning["message"]
    assert "rank-0001.safetensors" in warning["message"]


def refusal(world: World, path: Path, strategy: Strategy) -> tuple[str, str, str] | None:
    """In a rank: what a checkpoint says to another engine or model."""
    try:
        Checkpoints(RunDir(path), start(strategy, world), world, keep=1).restore(seed=0)
    except JobMismatch as error:
        return error.key, str(error), error.hint
    return None


def moved_8_bit_state(world: World, path: Path, before: Strategy, after: list[Strategy]) -> list[Any]:
    """In a rank: what a checkpoint of 8-bit state says to other layouts."""
    engine = start(before, world)
    engines.step(engine, 0, world)
    assert save(run_folder(path), engine, world, Position(1, 1))
    return [refusal(world, path, strategy) for strategy in after]


def test_eight_bit_state_moves_only_where_it_lies_among_the_same_neighbours(tmp_path: Path) -> None:
    torch_ddp, *zero = (
        Strategy("torch" if stage == 0 else "deepspeed", stage, optimizer=EIGHT_BIT) for stage in range(4)
    )
    fsdp = [Strategy("torch", stage, optimizer=EIGHT_BIT) for stage in (2, 3)]
    told = ranks.run(2, moved_8_bit_state, tmp_path / "zero", zero[0], [zero[1], zero[2], fsdp[1], torch_ddp])
    alone = refusal(ALONE, tmp_path / "zero", torch_ddp)
    moved = ranks.run(2, moved_8_bit_state, tmp_path / "fsdp", fsdp[0], [fsdp[1], torch_ddp])
    for to_the_same_parts, *refused in [*told, (None, alone), *moved]:
        assert to_the_same_parts is None
        for key, message, hint in refused:
            assert key == "strategy.optimizer"
            assert "8-bit optimizer state" in message
            assert "--resume never" in hint


def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_the_parameter(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    frozen = Strategy("torch", 0, freeze=("encoder.layer[0]",))
    save(folder, start(frozen, ALONE), ALONE, Position(1, 1))
    unfrozen = refusal(ALONE, tmp_path, Strategy("torch", 0))
    assert unfrozen is not None
    assert unfrozen[0] == "strategy.freeze"
    assert "`bert.encoder.layer.0.attention.output.LayerNorm.bias`" in unfrozen[1]
    wider = engines.start(engines.setup_of(frozen, ALONE), ALONE, engines.setups.bert())
    with pytest.raises(
        JobMismatch, match=r"`bert\.embeddings\.word_embeddings\.weight` of 200 x 32.*500 x 64"
    ):
        Checkpoints(folder, wider, ALONE, keep=1).restore(seed=0)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]


@given(
    shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6),
    note=st.text(),
)
def test_what_is_written_is_what_the_safetensors_library_reads(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[torch.dtype, list[int]]], note: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "tensors.safetensors"
    tensors = {
        f"a/{number}": (torch.rand(shape) * 100).to(dtype) for number, (dtype, shape) in enumerate(shapes)
    }
    written = tensor_file.write(path, tensors, {"note": note})
    assert written.bytes == path.stat().st_size
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["note"] == note
        assert {name: file.get_tensor(name).dtype for name in file.keys()} == {  # noqa: SIM118
            name: tensor.dtype for name, tensor in tensors.items()
        }
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
