"""DeepSpeed: ZeRO stages 0 to 3 with offload, driven by ``ds_config.json``."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from memlaunch.launcher.training.engine import Block, Piece, Step
from memlaunch.launcher.training.errors import JobMismatch
from memlaunch.launcher.training.torch_engine import dtype_name, replicated_blocks, state_facts
from memlaunch.launcher.training.world import World
from memlaunch.strategies import optimizer, precision
from memlaunch.strategies.technique import Facts, Setup


class DeepSpeedEngine:
    """A ``deepspeed.DeepSpeedEngine`` that steps once a window."""

    def __init__(self, module: nn.Module, setup: Setup, world: World, config: Mapping[str, Any]) -> None:
        os.environ["DS_ACCELERATOR"] = world.kind
        import deepspeed

        _skip_shared_memory_kernel()
        deepspeed.init_distributed(dist_backend="nccl" if world.kind == "cuda" else "gloo", verbose=False)
        _require_fp16(setup)
        self.module = module
        self._setup = setup
        self._rank = world.rank
        groups = optimizer.parameter_groups(module, setup)
        read = _ReadKeys(config)
        if setup.zero.stage == 3:
            # Shards parameter by parameter, so that no GPU ever holds the whole model. It does not cast.
            for parameter in module.parameters():
                parameter.data = parameter.data.to(_held_dtype(setup))
            deepspeed.zero.Init(module=module, config_dict_or_path=dict(config), dtype=_held_dtype(setup))
            for buffer in module.buffers():
                buffer.data = buffer.data.to(world.device)
        self._base = optimizer.build(groups, setup)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._base, config=read)
        _refuse_unread(read)
        self._replicated: _ReplicatedStep | None = None
        if setup.zero.stage == 0:
            self._replicated = _ReplicatedStep(setup)
            self._engine.torch_autocast_z0_gradscaler = self._replicated
            self._engine.clip_fp32_gradients = _nothing  # would clip again, and throws the norm away
        elif precision.scales_loss(setup.precision) and not precision.engine_casts(setup.precision):
            self._scale_fp32_gradients()

    def _scale_fp32_gradients(self) -> None:
        """Give the fp32 ZeRO optimizer a loss scale, which by itself it has for fp16 parameters only."""
        settings = self._setup.precision
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

        zero = self._engine.optimizer
        if settings.loss_scale == "dynamic":
            zero.loss_scaler = DynamicLossScaler(
                init_scale=settings.initial_scale,
                scale_window=settings.growth_interval,
                min_scale=settings.min_scale,
                delayed_shift=settings.hysteresis,
                consecutive_hysteresis=False,
            )
        else:
            zero.loss_scaler = LossScaler(settings.loss_scale)
        zero.dynamic_loss_scale = zero.loss_scaler.dynamic
        zero.check_grad_overflow = True

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()  # stages 0 and 1 reduce in step(); 2 and 3 shard gradients as they come

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        # The loss is weighted already: dividing it by the accumulation steps would undo that.
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> Step:
        for group in self._base.param_groups:
            group["lr"] = learning_rate
        scale = self._loss_scale()
        try:
            self._engine.step()
        except Exception as error:  # DeepSpeed has no class of its own for it
            if "loss scale already at minimum" not in str(error):
                raise
            smallest = self._setup.precision.min_scale
            raise precision.ScaleAtMinimum.at(smallest) from error
        norm = self._replicated.norm if self._replicated else self._engine.get_global_grad_norm()
        skipped = not self._engine.was_step_applied()
        finite = norm is not None and not skipped and math.isfinite(float(norm))
        return Step(float(norm) if finite else None, scale, skipped)

    def _loss_scale(self) -> float | None:
        if not precision.scales_loss(self._setup.precision):
            return None
        return float(self._scaler().cur_scale)

    def _scaler(self) -> Any:
        """What holds the loss scale: DeepSpeed's scaler, or ours at stage 0."""
        return self._replicated or self._engine.optimizer.loss_scaler

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        sharded = self._setup.zero.stage != 0
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            master = safe_get_full_fp32_param(parameter) if sharded and parameter.requires_grad else None
            if master is not None:
                yield name, master.detach().cpu()
                continue
            with GatheredParameters([parameter], enabled=self._setup.zero.stage == 3):
                yield name, parameter.detach().cpu().clone()

    def facts(self) -> Facts:
        engine = self._engine
        named = dict(self.module.named_parameters())
        return Facts(
            gradient_accumulation_steps=engine.gradient_accumulation_steps(),
            zero_stage=int(engine.zero_optimization_stage()),
            max_grad_norm=engine.gradient_clipping(),
            dynamic_loss_scale=bool(self._scaler().dynamic),
            loss_scale=self._loss_scale(),
            offload_optimizer=_offload_device(engine.zero_offload_optimizer()),
            offload_parameters=_offload_device(engine.zero_offload_param()),
            trainable={name: parameter.requires_grad for name, parameter in named.items()},
            parameter_dtypes={name: dtype_name(parameter.dtype) for name, parameter in named.items()},
            states=tuple(self._states()),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.module.named_parameters()}

    def blocks(self) -> Iterator[Block]:
        if self._setup.zero.stage == 0:
            yield from replicated_blocks(self.module, self._base, {})
            return
        zero = self._engine.optimizer
        names: dict[Any, str] = {parameter: name for name, parameter in self.module.named_parameters()}
        pieces = self._pieces_of_shards if self._setup.zero.stage == 3 else self._pieces_of_partitions
        for number, (_, weight) in enumerate(self._optimized(zero)):
            state = self._base.state[weight]
            yield Block(tuple(pieces(zero, number, names)), weight.detach(), state, replicated=False)
        for parameter, name in names.items():
            if parameter.requires_grad:
                continue
            if self._setup.zero.stage == 3:
                shard = parameter.ds_tensor
                found = _piece_of_shard(name, parameter, shard.numel(), self._rank, at=0)
                yield Block(tuple(found), shard.detach(), None, replicated=False)
            else:
                piece = Piece(name, 0, parameter.numel(), 0)
                yield Block((piece,), parameter.detach(), None, replicated=True)

    def _pieces_of_partitions(self, zero: Any, number: int, names: Mapping[Any, str]) -> Iterator[Piece]:
        """Stages 1 and 2: a rank's part of all parameters of group ``number``, one behind the other."""
        for parameter in zero.bit16_groups[number]:
            if (mapping := parameter._hp_mapping) is not None:
                inside, at = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Piece(names[parameter], inside.start, inside.numel, at.start)

    def _pieces_of_shards(self, zero: Any, number: int, names: Mapping[Any, str]) -> Iterator[Piece]:
        """Stage 3: a rank's part of each parameter of subgroup ``number``."""
        for parameter in zero.fp16_groups[number]:
            _, at, length = zero.grad_position[zero.get_param_id(parameter)]
            yield from _piece_of_shard(names[parameter], parameter, length, self._rank, at)

    def refresh(self) -> None:
        zero = self._engine.optimizer
        if self._setup.zero.stage in (1, 2):
            zero.update_lp_params()
        if self._setup.zero.stage != 3:
            return
        for number, master in enumerate(zero.fp32_partitioned_groups_flat):
            if master.numel():
                zero.fp16_partitioned_groups_flat[number].data.copy_(master.data)
                zero._unflatten_partitioned_parameters(number)
        if zero.persistent_parameters:  # small ones are kept whole beside their shards
            first = zero.persistent_parameters[0]
            first.partition(zero.persistent_parameters)
            first.all_gather(zero.persistent_parameters)

    def rehearse(self, run: Callable[[], None]) -> None:
        return None  # its buckets are filled as the gradients come, from the first pass on

    def loss_scale(self) -> dict[str, float] | None:
        if not precision.scales_loss(self._setup.precision) or not self._scaler().dynamic:
            return None
        if self._replicated:
            return self._replicated.state()
        scaler = self._scaler()
        clean_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"scale": scaler.cur_scale, "credits": scaler.cur_hysteresis, "clean_steps": clean_steps}

    def set_loss_scale(self, state: Mapping[str, float]) -> None:
        if self._replicated:
            self._replicated.set_state(state)
            return
        scaler = self._scaler()
        scaler.cur_scale, scaler.cur_hysteresis = float(state["scale"]), int(state["credits"])
        scaler.cur_iter, scaler.last_overflow_iter = int(state["clean_steps"]), -1

    def _states(self) -> Iterator[tuple[int, int, str]]:
        groups, zero = self._base.param_groups, self._engine.optimizer
        for index, parameter in self._optimized(zero):
            yield from state_facts(groups[index]["optim_bits"], self._base.state.get(parameter, {}))

    def _optimized(self, zero: Any) -> Iterator[tuple[int, Tensor]]:
        """(group, tensor) of everything the wrapped optimizer works on; ZeRO has it work on partitions."""
        if self._setup.zero.stage == 0:
            for index, group in enumerate(self._base.param_groups):
                yield from ((index, parameter) for parameter in group["params"])
        elif self._setup.zero.stage == 3:
            for part, tensor in enumerate(zero.fp32_partitioned_groups_flat):
                yield zero.sub_group_to_group_id[part], tensor
        else:
            yield from enumerate(zero.single_partition_of_fp32_groups)


class _ReplicatedStep:
    """Unscale, clip and step at stage 0, in the place that DeepSpeed has for a ``GradScaler`` there.

    Its own clips without telling the norm, knows no hysteresis, and does not report a skipped step.
    """

    def __init__(self, setup: Setup) -> None:
        scaled = precision.scales_loss(setup.precision)
        self._scale = precision.LossScale.of(setup.precision) if scaled else None
        self._max_norm = setup.max_grad_norm
        self.norm = math.nan

    @property
    def cur_scale(self) -> float:
        return self._scale.scale if self._scale else 1.0

    @property
    def dynamic(self) -> bool:
        return self._scale is not None and self._scale.dynamic

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.cur_scale if self._scale else loss

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        return None  # step() does

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self.norm = precision.unscale_and_clip(gradients, self.cur_scale, self._max_norm)
        overflow = not math.isfinite(self.norm)
        optimizer.overflow = overflow  # type: ignore[attr-defined]  # where DeepSpeed looks for it
        if not overflow:
            optimizer.step()

    def update(self) -> None:
        if self._scale:
            self._scale.update(not math.isfinite(self.norm))

    def state(self) -> dict[str, float]:
        assert self._scale is not None
        return self._scale.state()

    def set_state(self, state: Mapping[str, float]) -> None:
        assert self._scale is not None
        self._scale.set_state(state)


class _ReadKeys(dict[str, Any]):
    """A config that knows which of its top-level keys were read: DeepSpeed passes over unknown ones."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def __copy__(self) -> "_ReadKeys":
        return self  # DeepSpeed reads a copy; what it reads there counts


def _refuse_unread(config: _ReadKeys) -> None:
    unread = sorted(set(config) - config.read)
    if unread:
        raise JobMismatch(
            "strategy.deepspeed",
            f"DeepSpeed does not know {', '.join(f'`{key}`' for key in unread)}",
            "look the spelling up in DeepSpeed's configuration reference",
        )


def _piece_of_shard(name: str, parameter: Any, length: int, rank: int, at: int) -> Iterator[Piece]:
    """Rank ``rank``'s ``length`` elements of a parameter of stage 3, less the padding behind its end."""
    start = rank * length
    if (real := min(length, parameter.ds_numel - start)) > 0:
        yield Piece(name, start, real, at)


def _offload_device(config: Any) -> str:
    device = getattr(config, "device", None)
    return str(getattr(device, "value", device or "none"))


def _held_dtype(setup: Setup) -> torch.dtype:
    settings = setup.precision
    return precision.torch_dtype(settings.dtype if precision.engine_casts(settings) else "fp32")


def _require_fp16(setup: Setup) -> None:
    from deepspeed.accelerator import get_accelerator

    if precision.scales_loss(setup.precision) and not get_accelerator().is_fp16_supported():
        raise JobMismatch(
            "strategy.precision.dtype",
            "DeepSpeed does not train in fp16 on this device",
            'use `fp32` or `bf16`, or `"engine": "torch"`',
        )


def _nothing() -> None:
    return None


def _skip_shared_memory_kernel() -> None:
    """Leave reductions on a CPU to gloo: DeepSpeed would compile a kernel of its own for them first."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
