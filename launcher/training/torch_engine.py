"""Plain PyTorch: DistributedDataParallel, and nothing around the model on one rank; or FSDP2."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memlaunch.launcher.training.engine import Block, Engine, Piece, Step
from memlaunch.launcher.training.world import World
from memlaunch.strategies import optimizer, precision
from memlaunch.strategies.technique import Facts, Setup


def start(module: nn.Module, setup: Setup, world: World) -> Engine:
    """The torch engine over ``module``: FSDP2 where the job shards, else DDP."""
    if setup.zero.stage:
        from memlaunch.launcher.training.fsdp_engine import FsdpEngine

        return FsdpEngine(module, setup, world)
    return TorchEngine(module, setup, world)


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
        self._update = Update(groups, setup)
        self._optimizer = self._update.optimizer
        self._replica = module if world.size == 1 else _data_parallel(module, world)
        # Whether gradients wait in DDP's buckets from one micro-batch to the next. DDP moves them there when
        # it reduces them, and where they are cleared by zeros they stay; else the first micro-batches of a
        # window make them a second time. 16-bit ones are handed on to the masters, and do not stay.
        self._accumulates = setup.gradient_accumulation_steps > 1 and self._masters is None
        self._reductions = 0

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        if not isinstance(self._replica, DistributedDataParallel):
            return nullcontext()
        # Behind its first reduction DDP makes other buckets, in the order in which the gradients came. One
        # more, early in the second window, moves them there: the mean of sums is the sum of means.
        if last or (self._accumulates and self._reductions == 1):
            self._reductions += 1
            return nullcontext()
        return self._replica.no_sync()

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return self._replica(**inputs)

    def backward(self, loss: Tensor) -> None:
        self._update.scaled(loss).backward()

    def step(self, learning_rate: float) -> Step:
        if self._masters:
            self._masters.take_gradients()
        made = self._update.step(learning_rate, keep_gradients=True)
        if self._masters and not made.skipped:
            self._masters.give_weights()
        self._clear_gradients()
        return made

    def _clear_gradients(self) -> None:
        in_buckets = self._accumulates and self._reductions > 1
        self.module.zero_grad(set_to_none=not in_buckets)
        if self._masters:
            self._optimizer.zero_grad(set_to_none=True)

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
            dynamic_loss_scale=self._update.scale.dynamic if self._update.scale else None,
            loss_scale=self._update.scale.scale if self._update.scale else None,
            offload_optimizer="none",
            offload_parameters="none",
            trainable={name: parameter.requires_grad for name, parameter in named.items()},
            parameter_dtypes={name: dtype_name(parameter.dtype) for name, parameter in named.items()},
            states=tuple(self._update.states()),
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
        # A sum over more than two ranks is rounded differently in another place of a bucket.
        if isinstance(self._replica, DistributedDataParallel):
            run()
            self._clear_gradients()

    def loss_scale(self) -> dict[str, float] | None:
        return self._update.loss_scale()

    def set_loss_scale(self, state: Mapping[str, float]) -> None:
        self._update.set_loss_scale(state)


class Update:
    """The optimizer, and what stands before it: the loss scale and clipping.

    Args:
        over_ranks: sums a number over the ranks, where each has a part of the gradients.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        setup: Setup,
        over_ranks: Callable[[float], float] | None = None,
    ) -> None:
        self.optimizer = optimizer.build(groups, setup)
        self.scale = (
            precision.LossScale.of(setup.precision) if precision.scales_loss(setup.precision) else None
        )
        self._max_norm = setup.max_grad_norm
        self._over_ranks = over_ranks

    def scaled(self, loss: Tensor) -> Tensor:
        """What to compute the gradients of."""
        return loss * self.scale.scale if self.scale else loss

    def step(self, learning_rate: float, keep_gradients: bool = False) -> Step:
        """Clip, update the weights and clear the gradients; as :meth:`Engine.step`.

        ``keep_gradients`` leaves the last to the caller.
        """
        groups = self.optimizer.param_groups
        scale = self.scale.scale if self.scale else None
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = precision.unscale_and_clip(gradients, scale or 1.0, self._max_norm, self._over_ranks)
        overflow = not math.isfinite(norm)
        if not overflow:
            for group in groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        if self.scale:
            self.scale.update(overflow)
        if not keep_gradients:
            self.optimizer.zero_grad(set_to_none=True)
        return Step(None if overflow else norm, scale, skipped=overflow)

    def states(self) -> Iterator[tuple[int, int, str]]:
        """The optimizer's state, as :class:`Facts` has it."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield from state_facts(group["optim_bits"], self.optimizer.state.get(parameter, {}))

    def loss_scale(self) -> dict[str, float] | None:
        """As :meth:`Engine.loss_scale`."""
        return self.scale.state() if self.scale and self.scale.dynamic else None

    def set_loss_scale(self, state: Mapping[str, float]) -> None:
        """As :meth:`Engine.set_loss_scale`."""
        assert self.scale is not None
        self.scale.set_state(state)


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
