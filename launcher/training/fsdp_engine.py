"""FSDP2: parameters, gradients and optimizer state sharded over the ranks by PyTorch itself.

Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (VLDB 2023), in its second form,
``fully_shard``. Each rank has a run of the rows of every parameter. A block's parameters are gathered before
it runs; at ZeRO stage 3 they are given back behind it and gathered again for its backward pass, at stage 2
they stay until then. The optimizer works on this rank's shards as on any tensors, so that its kernels, 8-bit
ones too, never see a distributed tensor.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from memlaunch.launcher.training.engine import Block, Piece, Step
from memlaunch.launcher.training.torch_engine import Update, dtype_name
from memlaunch.launcher.training.world import World
from memlaunch.strategies import optimizer, precision
from memlaunch.strategies.checkpointing import repeated_blocks
from memlaunch.strategies.technique import Facts, NotApplicable, Setup


class FsdpEngine:
    """``fully_shard`` over each block of a module and over what is around them.

    Raises:
        NotApplicable: the model has a parameter that cannot be sharded.
    """

    def __init__(self, module: nn.Module, setup: Setup, world: World) -> None:
        self.module = module
        self._setup = setup
        self._world = world
        _shard(module, setup, world)
        self._root = cast("FSDPModule", module)
        self._parameters = dict(module.named_parameters())
        self._names = list(module.named_parameters(remove_duplicate=False))
        self._shards = {parameter: _shard_of(parameter) for parameter in self._parameters.values()}
        groups = optimizer.parameter_groups(module, setup)
        for group in groups:  # a small tensor has no rows for the last ranks
            shards = [self._shards[parameter] for parameter in group["params"]]
            group["params"] = [shard for shard in shards if shard.numel()]
        self._update = Update(groups, setup, over_ranks=lambda number: world.sum([number])[0])
        self._optimizer = self._update.optimizer
        self._seen = _Seen(module)

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        if self._setup.zero.stage == 2:  # gathered and reduced once a step
            self._root.set_requires_gradient_sync(last)
            self._root.set_reshard_after_backward(last)
        return nullcontext()

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        outputs = self.module(**inputs)
        self._seen.behind_forward()
        return outputs

    def backward(self, loss: Tensor) -> None:
        self._update.scaled(loss).backward()

    def step(self, learning_rate: float) -> Step:
        for parameter, shard in self._shards.items():
            if parameter.grad is not None and shard.numel():
                assert isinstance(parameter.grad, DTensor)
                shard.grad = parameter.grad.to_local()
            parameter.grad = None
        return self._update.step(learning_rate)

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._names:
            # Offloaded shards meet on the device, whose ranks have the faster way to each other.
            on_device = parameter.to(self._world.device)
            assert isinstance(on_device, DTensor)
            yield name, on_device.full_tensor().cpu()

    def facts(self) -> Facts:
        on_host = all(shard.device.type == "cpu" for shard in self._shards.values())
        # On a CPU everything is there, and nothing tells but the policy.
        offloads = on_host and (self._world.kind == "cuda" or _offload_policy(self._setup) is not None)
        stage = self._seen.stage()
        return Facts(
            gradient_accumulation_steps=self._setup.gradient_accumulation_steps,
            zero_stage=stage,
            max_grad_norm=self._setup.max_grad_norm,
            dynamic_loss_scale=self._update.scale.dynamic if self._update.scale else None,
            loss_scale=self._update.scale.scale if self._update.scale else None,
            offload_optimizer="cpu" if offloads else "none",
            offload_parameters="cpu" if offloads and stage == 3 else "none",
            trainable={name: parameter.requires_grad for name, parameter in self._parameters.items()},
            parameter_dtypes={name: dtype_name(dtype) for name, dtype in self._seen.dtypes.items()},
            states=tuple(self._update.states()),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def blocks(self) -> Iterator[Block]:
        for name, parameter in self._parameters.items():
            shard = self._shards[parameter]
            state = self._optimizer.state[shard] if parameter.requires_grad else None
            start = _rows(parameter.shape[0], self._world) * parameter.shape[1:].numel() * self._world.rank
            pieces = (Piece(name, start, shard.numel(), 0),) if shard.numel() else ()
            yield Block(pieces, shard.detach(), state, replicated=self._world.size == 1)

    def refresh(self) -> None:
        for part in _parts(self.module):
            part.reshard()

    def rehearse(self, run: Callable[[], None]) -> None:
        return None  # what is sent together is fixed by the blocks, from the first pass on

    def loss_scale(self) -> dict[str, float] | None:
        return self._update.loss_scale()

    def set_loss_scale(self, state: Mapping[str, float]) -> None:
        self._update.set_loss_scale(state)


class _Seen:
    """What the first forward pass shows of how a module is sharded.

    Attributes:
        dtypes: parameter name -> type that the module computes with.
    """

    def __init__(self, module: nn.Module) -> None:
        self.dtypes: dict[str, torch.dtype] = {}
        self._module = module
        self._gathered_behind_forward: set[str] | None = None
        for prefix, part in module.named_modules():
            if isinstance(part, FSDPModule):
                self._look_at(part, f"{prefix}." if prefix else "")

    def _look_at(self, part: FSDPModule, prefix: str) -> None:
        module = cast("nn.Module", part)

        def look(*_: Any) -> None:
            gathered = [(n, p) for n, p in module.named_parameters() if not isinstance(p, DTensor)]
            self.dtypes |= {prefix + name: parameter.dtype for name, parameter in gathered}
            handle.remove()

        handle = module.register_forward_pre_hook(look)

    def behind_forward(self) -> None:
        """To be called behind every forward pass."""
        if self._gathered_behind_forward is None:
            self._gathered_behind_forward = set(self.dtypes) - _sharded(self._module)

    def stage(self) -> int:
        """The ZeRO stage, told between two steps: 0 where something is whole then, 3 where something is given
        back in the middle of one.
        """
        if _sharded(self._module) != {name for name, _ in self._module.named_parameters()}:
            return 0
        return 2 if self._gathered_behind_forward == set(self.dtypes) else 3


def _sharded(module: nn.Module) -> set[str]:
    """The names of the parameters that are sharded now."""
    return {
        name
        for name, parameter in module.named_parameters()
        if isinstance(parameter, DTensor) and all(placement.is_shard() for placement in parameter.placements)
    }


def _shard(module: nn.Module, setup: Setup, world: World) -> None:
    """Shard ``module`` in place, block by block, so that no device ever holds the whole of it."""
    for name, parameter in module.named_parameters():
        if not parameter.dim():
            raise NotApplicable(
                "strategy.zero.stage",
                f"`{name}` is a single number, which FSDP2 cannot shard",
                'set `"engine": "deepspeed"`',
            )
    blocks = _blocks_apart(module)
    options: dict[str, Any] = {"mesh": init_device_mesh(world.kind, (world.size,))}
    if precision.engine_casts(setup.precision):
        # The shards are the fp32 masters, cast on their way to the other ranks. What is frozen needs none.
        dtype = precision.torch_dtype(setup.precision.dtype)
        for parameter in module.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
    if (policy := _offload_policy(setup)) is not None:
        options["offload_policy"] = policy
    gives_back = setup.zero.stage == 3
    for block in blocks:
        fully_shard(block, reshard_after_forward=gives_back, **options)
    # What is around the blocks is needed until the end of the forward pass, and again from the start of the
    # backward pass on. Left to itself, torch keeps it in between.
    fully_shard(module, reshard_after_forward=None if gives_back and blocks else gives_back, **options)
    if world.kind == "cpu":
        for part in _parts(module):
            part.set_force_sum_reduction_for_comms(True)  # not in every version does gloo average a scatter


def _blocks_apart(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks that share no parameter with anything else."""
    users: dict[Tensor, int] = {}
    blocks = repeated_blocks(module)
    for block in blocks:
        for parameter in block.parameters():
            users[parameter] = users.get(parameter, 0) + 1
    inside = {m for block in blocks for m in block.modules()}
    for other in module.modules():
        if other not in inside:
            for parameter in other.parameters(recurse=False):
                users[parameter] = users.get(parameter, 0) + 1
    return [block for block in blocks if all(users[parameter] == 1 for parameter in block.parameters())]


def _offload_policy(setup: Setup) -> OffloadPolicy | None:
    if setup.zero.offload_optimizer == "none":
        return None
    return CPUOffloadPolicy(pin_memory=setup.device == "cuda")


def _parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@torch.no_grad()
def _shard_of(parameter: Tensor) -> nn.Parameter:
    """This rank's rows of a parameter, as a tensor of their own in the same memory."""
    assert isinstance(parameter, DTensor)
    return nn.Parameter(parameter.to_local(), parameter.requires_grad)


def _rows(rows: int, world: World) -> int:
    """Of a parameter in every rank but the last ones, which have fewer or none."""
    return math.ceil(rows / world.size)
