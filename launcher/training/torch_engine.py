"""Plain PyTorch: DistributedDataParallel, and nothing around the model on one rank."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memlaunch.launcher.training.engine import Block, Piece, Step
from memlaunch.launcher.training.world import World
from memlaunch.strategies import optimizer, precision
from memlaunch.strategies.technique import Facts, Setup


class TorchEngine:
    """DDP over a module, with a loss scale where the job needs one."""

    def __init__(self, module: nn.Module, setup: Setup, world: World) -> None:
        self.module = module
        self._setup = setup
        groups = optimizer.parameter_groups(module, setup)
        self._masters: precision.MasterWeights | None = None
        module.to(world.device)
        if precision.engine_casts(setup.precision):
            self._masters = precision.MasterWeights(groups)
            dtype = precision.torch_dtype(setup.precision.dtype)
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)
            groups = self._masters.master_groups
        self._optimizer = optimizer.build(groups, setup)
        self._scale = (
            precision.LossScale.of(setup.precision) if precision.scales_loss(setup.precision) else None
        )
        self._replica = module if world.size == 1 else _data_parallel(module, world)

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self._replica, DistributedDataParallel):
            return nullcontext()
        return self._replica.no_sync()

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return self._replica(**inputs)

    def backward(self, loss: Tensor) -> None:
        (loss * self._scale.scale if self._scale else loss).backward()

    def step(self, learning_rate: float) -> Step:
        if self._masters:
            self._masters.take_gradients()
        scale = self._scale.scale if self._scale else None
        gradients = [p.grad for g in self._optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = precision.unscale_and_clip(gradients, scale or 1.0, self._setup.max_grad_norm)
        overflow = not math.isfinite(norm)
        if not overflow:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            if self._masters:
                self._masters.give_weights()
        if self._scale:
            self._scale.update(overflow)
        self._optimizer.zero_grad(set_to_none=True)
        self.module.zero_grad(set_to_none=True)
        return Step(norm if math.isfinite(norm) else None, scale, skipped=overflow)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        masters = self._masters.master_of() if self._masters else {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            yield name, masters.get(parameter, parameter).detach().cpu()

    def facts(self) -> Facts:
        named = dict(self.module.named_parameters())
        return Facts(
            gradient_accumulation_steps=self._setup.gradient_accumulation_steps,
            zero_stage=0,
            max_grad_norm=self._setup.max_grad_norm,
            dynamic_loss_scale=self._scale.dynamic if self._scale else None,
            loss_scale=self._scale.scale if self._scale else None,
            offload_optimizer="none",
            offload_parameters="none",
            trainable={name: parameter.requires_grad for name, parameter in named.items()},
            parameter_dtypes={name: dtype_name(parameter.dtype) for name, parameter in named.items()},
            states=tuple(
                state
                for group in self._optimizer.param_groups
                for parameter in group["params"]
                for state in state_facts(group["optim_bits"], self._optimizer.state.get(parameter, {}))
            ),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.module.named_parameters()}

    def blocks(self) -> Iterator[Block]:
        masters = self._masters.master_of() if self._masters else {}
        yield from replicated_blocks(self.module, self._optimizer, masters)

    def refresh(self) -> None:
        if self._masters:
            self._masters.give_weights()

    def rehearse(self, run: Callable[[], None]) -> None:
        # Behind its first backward pass DDP puts the gradients into other buckets, in the order in which they
        # came. A sum over more than two ranks is rounded differently in another place of a bucket.
        if isinstance(self._replica, DistributedDataParallel):
            run()
            self.module.zero_grad(set_to_none=True)

    def loss_scale(self) -> dict[str, float] | None:
        return self._scale.state() if self._scale and self._scale.dynamic else None

    def set_loss_scale(self, state: Mapping[str, float]) -> None:
        assert self._scale is not None
        self._scale.set_state(state)


def replicated_blocks(
    module: nn.Module, optimizer: torch.optim.Optimizer, masters: Mapping[Tensor, Tensor]
) -> Iterator[Block]:
    """A block for each parameter, of an engine in which every rank holds them all."""
    for name, parameter in module.named_parameters():
        weight = masters.get(parameter, parameter)
        state = optimizer.state[weight] if parameter.requires_grad else None
        yield Block((Piece(name, 0, weight.numel(), 0),), weight.detach(), state, replicated=True)


def _data_parallel(module: nn.Module, world: World) -> DistributedDataParallel:
    return DistributedDataParallel(
        module,
        device_ids=[world.device] if world.kind == "cuda" else None,
        gradient_as_bucket_view=True,  # the gradients live in the communication buckets, not beside them
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` -> ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def state_facts(bits: int, state: dict[str, Any]) -> Iterator[tuple[int, int, str]]:
    """(bits asked, elements, dtype) of the two moments of one parameter's optimizer state."""
    for name in ("exp_avg", "exp_avg_sq", "state1", "state2"):
        if isinstance(moment := state.get(name), Tensor):
            yield bits, moment.numel(), dtype_name(moment.dtype)
