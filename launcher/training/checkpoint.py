"""Saving and loading the whole state of a run.

Every rank writes one file of safetensors with what it holds, so nothing is gathered. Weights and optimizer
state in fp32 are written by parameter, in pieces that tell where they lie in it: another number of ranks,
another ZeRO stage or another engine reads the pieces that it needs. 8-bit state is quantised in runs of
neighbours in a tensor of the engine's making, so it is written as it is, and fits only into a tensor made of
the same pieces.
"""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from memlaunch.launcher import manifest
from memlaunch.launcher.manifest import Damaged, FileSum, Manifest
from memlaunch.launcher.rundir import RunDir
from memlaunch.launcher.training import random_state, tensor_file
from memlaunch.launcher.training.engine import Block, Engine, Piece
from memlaunch.launcher.training.errors import JobMismatch
from memlaunch.launcher.training.loop import Position
from memlaunch.launcher.training.together import gather
from memlaunch.launcher.training.world import World

#: The optimizer's counter of its steps: a number for a block, not for an element of it.
COUNTER = "step"
#: Seconds within which every machine sees what another one has just renamed on a network file system.
APPEARS = 60.0


@dataclass(frozen=True)
class _Copy:
    """What a rank writes of one checkpoint, in host memory."""

    position: Position
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    loss_scale: dict[str, float] | None
    stalled: float


@dataclass(frozen=True)
class _Written:
    """What became of a rank's file: its sum, or why there is none."""

    sum: FileSum | None
    problem: str | None
    stalled: float
    seconds: float


class Checkpoints:
    """The checkpoints of a run, in one rank.

    A save copies this rank's state to host memory and writes it in the background. It counts once all ranks
    have written theirs and :meth:`settle` has been called, which every rank must do at the same step; until
    then :attr:`busy` says whether this rank still writes. A save that fails is told by a warning, and
    the run goes on.

    Args:
        keep: how many to keep.
    """

    def __init__(self, folder: RunDir, engine: Engine, world: World, keep: int) -> None:
        self._folder = folder
        self._engine = engine
        self._world = world
        self._keep = keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[_Copy, Future[_Written]] | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._pending is not None and not self._pending[1].done()

    def save(self, position: Position) -> None:
        """Begin to save; every rank must call it. An earlier save is waited for."""
        self.settle()
        begun = time.perf_counter()
        tensors, metadata = _pack(self._engine, self._world)
        copy = _Copy(
            position, tensors, metadata, self._engine.loss_scale(), stalled=time.perf_counter() - begun
        )
        self._pending = (copy, self._thread.submit(self._write, copy))

    def settle(self) -> bool:
        """Wait for the save that was begun and make it count; every rank must call it.

        Returns whether there is none, or it succeeded.
        """
        if self._pending is None:
            return True
        begun = time.perf_counter()
        copy, future = self._pending
        everyone: list[_Written] = gather(future.result(), self._world)
        problem = next((about.problem for about in everyone if about.problem is not None), None)
        if self._world.is_main:
            problem = problem or self._commit(copy, everyone)
            if problem is not None:
                self._abandon(copy.position.step, problem)
            else:
                stalled = max(about.stalled for about in everyone) + time.perf_counter() - begun
                self._tell(copy.position.step, everyone, stalled)
                self._thread.submit(self._prune)
        (failed,) = self._world.max([float(problem is not None)])
        self._pending = None
        return not failed

    def close(self) -> None:
        """Settle the last save, and wait until nothing is left to do; every rank must call it."""
        self.settle()
        self._thread.shutdown()

    def _write(self, copy: _Copy) -> _Written:
        """In the background: this rank's file."""
        begun = time.perf_counter()
        path = self._partial(copy.position.step) / _file_name(self._world.rank)
        written, problem = None, None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            written = tensor_file.write(path, copy.tensors, copy.metadata)
        except OSError as error:
            problem = f"{error.filename or path}: {error.strerror}"
        copy.tensors.clear()
        return _Written(written, problem, copy.stalled, time.perf_counter() - begun)

    def _commit(self, copy: _Copy, everyone: Sequence[_Written]) -> str | None:
        """On the main rank: give the checkpoint its manifest and its name; what went wrong."""
        sums = {_file_name(rank): about.sum for rank, about in enumerate(everyone) if about.sum is not None}
        about = Manifest(
            step=copy.position.step,
            applied=copy.position.applied,
            world_size=self._world.size,
            shapes={name: list(shape) for name, shape in self._engine.shapes().items()},
            trainable=[n for n, p in self._engine.module.named_parameters() if p.requires_grad],
            loss_scale=copy.loss_scale,
            job=json.loads(self._folder.resolved.read_text(encoding="utf-8")),
            versions={name: version(name) for name in ("memlaunch", "torch", "transformers")},
            files=sums,
        )
        try:
            manifest.write(self._partial(copy.position.step), about)
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        return None

    def _tell(self, step: int, everyone: Sequence[_Written], stalled: float) -> None:
        self._folder.append_event(
            "checkpoint",
            step=step,
            bytes=sum(about.sum.bytes for about in everyone if about.sum is not None),
            seconds_stalled=round(stalled, 4),
            seconds_written=round(max(about.seconds for about in everyone), 4),
        )

    def _prune(self) -> None:
        """In the background: remove old checkpoints."""
        try:
            manifest.prune(self._folder.checkpoints, self._keep)
        except OSError as error:
            self._folder.append_event("warning", message=f"an old checkpoint stays: {error}")

    def _abandon(self, step: int, problem: str) -> None:
        manifest.sweep(self._folder.checkpoints)
        self._folder.append_event("warning", message=f"no checkpoint at step {step}: {problem}", step=step)

    def _partial(self, step: int) -> Path:
        return self._folder.checkpoints / f"{manifest.folder_name(step)}{manifest.PARTIAL}"

    def restore(self, seed: int) -> Position:
        """Load the newest whole checkpoint into the engine, with the random states; every rank must call it.

        Where there is none, nothing changes. A damaged one is passed over with a warning, and set aside.

        Args:
            seed: of new random states, where the ranks are not those that saved.

        Raises:
            JobMismatch: it does not fit the model or its layout.
        """
        root = self._folder.checkpoints
        if self._world.is_main:
            manifest.sweep(root)
        while True:
            (step,) = self._world.max([max(manifest.steps(root), default=0) if self._world.is_main else 0])
            if not step:
                return Position()
            folder = root / manifest.folder_name(int(step))
            found, problem = self._read(folder)
            if found is not None:
                self._load(folder, found, seed)
                return Position(found.step, found.applied)
            if self._world.is_main:
                manifest.set_aside(folder)
                told = f"a damaged checkpoint is passed over: {problem}"
                self._folder.append_event("warning", message=told, step=int(step))

    def _read(self, folder: Path) -> tuple[Manifest | None, str | None]:
        """The manifest of a checkpoint whose files are whole, or what is wrong with it; on every rank alike.

        The main rank reads the manifest, and all ranks share the files out among themselves.
        """
        found, problem = None, None
        try:
            found = manifest.read(folder) if self._world.is_main else None
        except Damaged as error:
            problem = str(error)
        found, problem = gather((found, problem), self._world)[0]
        if found is None:
            return None, problem
        patience = time.monotonic() + APPEARS
        while not folder.exists() and time.monotonic() < patience:
            time.sleep(0.1)
        try:
            manifest.check_files(folder, found, sorted(found.files)[self._world.rank :: self._world.size])
        except Damaged as error:
            problem = str(error)
        problem = next((about for about in gather(problem, self._world) if about is not None), None)
        return (found, None) if problem is None else (None, problem)

    @torch.no_grad()
    def _load(self, folder: Path, found: Manifest, seed: int) -> None:
        engine, world = self._engine, self._world
        stored = _Stored.open(folder, sorted(found.files))
        refusal = None
        try:
            _check_shapes(engine, found, folder)
            for block in engine.blocks():
                if block.pieces:  # else it is padding, which is 0 and stays so
                    _fill(block, stored)
        except JobMismatch as error:
            refusal = (error.key, str(error), error.hint)
        # All ranks fail together: the others would wait for this one in the next collective.
        refusals = [about for about in gather(refusal, world) if about is not None]
        if refusals:
            raise JobMismatch(*refusals[0])
        engine.refresh()
        if engine.loss_scale() is not None and found.loss_scale is not None:
            engine.set_loss_scale(found.loss_scale)
        same_ranks = found.world_size == world.size
        file = stored.files[_file_name(world.rank if same_ranks else 0)]
        for name, buffer in _buffers(engine).items():
            buffer.copy_(file.get_tensor(f"buffer/{name}"))
        if same_ranks:
            random = [name for name in file.keys() if name.startswith("random/")]  # noqa: SIM118
            states = {name.removeprefix("random/"): file.get_tensor(name) for name in random}
            random_state.restore(states, file.metadata()["random"], world)
        else:
            random_state.renew(seed + world.rank + 1_000_003 * found.step)


def _file_name(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def _pack(engine: Engine, world: World) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors in host memory, metadata) of this rank's file."""
    tensors: dict[str, Tensor] = {}
    runs: list[dict[str, Any]] = []
    whole: list[dict[str, Any]] = []
    for number, block in enumerate(engine.blocks()):
        # What every rank has is written by one of them, in turn.
        if not block.pieces or (block.replicated and number % world.size != world.rank):
            continue
        state = block.state or {}
        by_element = {"weight": block.weight}
        entry: dict[str, Any] = {"numbers": {n: _number(v) for n, v in state.items() if n == COUNTER}}
        rest = {name: value for name, value in state.items() if name != COUNTER}
        if all(_is_elementwise(value, block.weight) for value in rest.values()):
            by_element |= rest
        else:
            key = f"whole/{len(whole)}"
            whole.append({**entry, "key": key, "names": list(rest), "pieces": _composition(block)})
            tensors |= {f"{key}/{name}": value.detach().to("cpu", copy=True) for name, value in rest.items()}
        for piece in block.pieces:
            runs.append({**entry, "name": piece.name, "start": piece.start, "length": piece.length})
            runs[-1]["states"] = list(by_element)
            for name, value in by_element.items():
                part = value.detach().reshape(-1)[piece.at : piece.at + piece.length]
                tensors[_key(name, piece.name, piece.start)] = part.to("cpu", copy=True)
    for name, buffer in _buffers(engine).items():
        tensors[f"buffer/{name}"] = buffer.detach().to("cpu", copy=True)
    states, rest_of_states = random_state.capture(world)
    tensors |= {f"random/{name}": tensor for name, tensor in states.items()}
    return tensors, {"index": json.dumps({"runs": runs, "whole": whole}), "random": rest_of_states}


def _key(state: str, name: str, start: int) -> str:
    return f"{state}/{name}/{start}"


def _composition(block: Block) -> list[list[Any]]:
    return [[piece.name, piece.start, piece.length, piece.at] for piece in block.pieces]


def _number(value: Any) -> int | float:
    """An int stays one; a tensor becomes a float, by which it is known for a tensor again."""
    return float(value) if isinstance(value, Tensor) else int(value)


def _is_elementwise(value: Any, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point()


def _buffers(engine: Engine) -> dict[str, Tensor]:
    persistent = engine.module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in engine.module.named_buffers() if name in persistent}


@dataclass(frozen=True)
class _Run:
    """A stored piece: which elements of a parameter, in which file, of which states."""

    start: int
    length: int
    file: str
    states: tuple[str, ...]
    numbers: Mapping[str, int | float]


@dataclass
class _Stored:
    """The contents of a checkpoint, found by parameter or by composition."""

    folder: Path
    files: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, list[_Run]] = field(default_factory=lambda: defaultdict(list))
    whole: dict[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, names: Sequence[str]) -> "_Stored":
        stored = cls(folder)
        for file in names:
            opened: Any = safe_open(folder / file, framework="pt")
            stored.files[file] = opened
            index = json.loads(opened.metadata()["index"])
            for run in index["runs"]:
                stored.runs[run["name"]].append(
                    _Run(run["start"], run["length"], file, tuple(run["states"]), run["numbers"])
                )
            for entry in index["whole"]:
                stored.whole[json.dumps(entry["pieces"])] = (file, entry)
        return stored

    def covering(self, piece: Piece) -> list[_Run]:
        """The stored pieces that overlap with ``piece``; together they are all of it."""
        end = piece.start + piece.length
        found = [r for r in self.runs[piece.name] if r.start < end and piece.start < r.start + r.length]
        held = sum(min(end, r.start + r.length) - max(piece.start, r.start) for r in found)
        assert held == piece.length, f"{self.folder} lacks elements of {piece.name}"
        return found

    def read(self, state: str, block: Block) -> Tensor:
        """One state of all elements of ``block``, in its shape and in host memory; padding is 0."""
        flat: Tensor | None = None
        for piece in block.pieces:
            for run in self.covering(piece):
                start = max(piece.start, run.start)
                end = min(piece.start + piece.length, run.start + run.length)
                stored = self.files[run.file].get_slice(_key(state, piece.name, run.start))
                values = stored[start - run.start : end - run.start]
                if flat is None:
                    flat = torch.zeros(block.weight.numel(), dtype=values.dtype)
                at = piece.at + start - piece.start
                flat[at : at + end - start] = values
        assert flat is not None, "a block of padding has nothing to read"
        return flat.reshape(block.weight.shape)


def _fill(block: Block, stored: _Stored) -> None:
    """Fill a block's weights and optimizer state.

    Raises:
        JobMismatch: the state is held in 8 bits, and in a tensor of other pieces than this one.
    """
    device = block.weight.device
    block.weight.copy_(stored.read("weight", block))
    if block.state is None:
        return
    run = stored.covering(block.pieces[0])[0]
    state: dict[str, Any] = {
        name: torch.tensor(value, device=device) if isinstance(value, float) else value
        for name, value in run.numbers.items()
    }
    names = [name for name in run.states if name != "weight"]
    state |= {name: stored.read(name, block).to(device) for name in names}
    if state and not names:
        key = json.dumps(_composition(block))
        if key not in stored.whole:
            raise JobMismatch(
                "strategy.optimizer",
                f"the 8-bit optimizer state in {stored.folder} does not fit these ranks or this ZeRO stage",
                "it is quantised together with its neighbours: resume with the ranks, the engine and the "
                "`strategy.zero` that saved it, or begin anew with `--resume never`",
            )
        file, entry = stored.whole[key]
        for name in entry["names"]:
            state[name] = stored.files[file].get_tensor(f"{entry['key']}/{name}").to(device)
    block.state.clear()
    block.state.update(state)


def _check_shapes(engine: Engine, found: Manifest, folder: Path) -> None:
    """See that the checkpoint has every parameter of the model, and optimizer state of what is trained.

    Raises:
        JobMismatch: it has not.
    """
    for name, shape in engine.shapes().items():
        there = found.shapes.get(name)
        if there != list(shape):
            other = "does not have it" if there is None else f"has one of {' x '.join(map(str, there))}"
            raise JobMismatch(
                "model",
                f"the model has a parameter `{name}` of {' x '.join(map(str, shape))}, and {folder} {other}",
                "resume with the model that was saved",
            )
    trained = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    if new := sorted(set(trained) - set(found.trainable)):
        raise JobMismatch(
            "strategy.freeze",
            f"{folder} has no optimizer state of `{new[0]}`, which was frozen when it was saved",
            "resume with the same `strategy.freeze`",
        )
