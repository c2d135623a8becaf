"""The job of a run, for a training script of the user's own: a few lines, and the script keeps its loop.

The techniques, the batches and the schedule are those of our own loop, so that the same job makes the same
steps in both. What only that loop can do (weigh each token of a step the same, look whether every technique
took, checkpoints between steps) stays with the script.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memlaunch.launcher import resolve
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.layout import Layout
from memlaunch.launcher.rundir import ENVIRONMENT_VARIABLE, RunDir
from memlaunch.launcher.training.schedule import learning_rate
from memlaunch.launcher.translate import deepspeed
from memlaunch.strategies import TECHNIQUES, precision
from memlaunch.strategies import optimizer as optimizers
from memlaunch.strategies.accumulation import Batch, BatchError, solve_batch
from memlaunch.strategies.bucketing import BucketedSampler, Integers
from memlaunch.strategies.technique import Setup

if TYPE_CHECKING:
    import torch
    import transformers

    from memlaunch.launcher.job import StrategySection, TrainingSection
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.strategies.batching import Mode


class NoJob(UserError):
    """There is no job that this process is a rank of."""

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}"


class MicroBatches:
    """This rank's micro-batches of an epoch, for ``DataLoader(batch_sampler=...)``; as many on every rank.

    Where the last step of an epoch has fewer samples than the ranks have places, a rank would have nothing in
    a micro-step: there it gets the first sample of the data again, as a script has no stand-in of weight 0.

    Attributes:
        batch_sampler: which samples; :class:`memlaunch.strategies.bucketing.BucketedSampler`. By this name
            a ``Trainer`` finds it, to tell it the epoch.
        steps_per_epoch: optimizer steps an epoch, the short last one included.
    """

    def __init__(self, batch_sampler: BucketedSampler) -> None:
        self.batch_sampler = batch_sampler
        self.steps_per_epoch = batch_sampler.steps_per_epoch

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[int]]:
        """What is left of the epoch; of the next one, where nothing is."""
        if self.batch_sampler.state_dict()["step"] == self.steps_per_epoch:  # its end was not looked for
            self.set_epoch(self.batch_sampler.epoch + 1)
        for indices in self.batch_sampler:
            yield indices or [0]

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``, unless it is the current one."""
        self.batch_sampler.set_epoch(epoch)


@dataclass(frozen=True)
class CurrentJob:
    """A job, for one of its ranks.

    Attributes:
        resolved: the job, with every default written out.
        folder: the run folder; None where the script was started by hand.
        rank, world_size: this process among the ranks.
    """

    resolved: "ResolvedJob"
    folder: Path | None
    rank: int
    world_size: int

    @property
    def training(self) -> "TrainingSection":
        """The section ``training`` of the job."""
        return self.resolved.job.training

    @property
    def strategy(self) -> "StrategySection":
        """The section ``strategy`` of the job."""
        return self.resolved.job.strategy

    @property
    def batch(self) -> Batch:
        """The batch sizes: global batch = micro-batch x accumulation x ranks."""
        return self.resolved.batch

    @property
    def deepspeed_config(self) -> dict[str, Any] | None:
        """The config for ``deepspeed.initialize`` or ``TrainingArguments``; None for the torch engine."""
        if self.strategy.engine != "deepspeed":
            return None
        return deepspeed.config(self.resolved, for_script=True)

    def batch_sampler(
        self,
        lengths: Sequence[int] | Integers,
        *,
        bucket_size: int | None = None,
        mode: "Mode" = "bucketed",
        longest_first: bool = True,
    ) -> MicroBatches:
        """This rank's micro-batches, the very ones of our own loop for the same lengths.

        Args:
            lengths: tokens of each sample, shape (samples,).
            bucket_size, mode, longest_first: as for :class:`memlaunch.strategies.bucketing.BucketedSampler`;
                by default those of a job that says nothing about batching.

        Raises:
            ValueError: there are no samples, or ``lengths`` are not lengths.
        """
        return MicroBatches(
            BucketedSampler(
                np.asarray(lengths),
                global_batch_size=self.batch.global_batch_size,
                micro_batch_size=self.batch.micro_batch_size,
                world_size=self.world_size,
                rank=self.rank,
                seed=self.training.seed,
                bucket_size=bucket_size,
                mode=mode,
                longest_first=longest_first,
            )
        )

    def steps(self, samples: int) -> int:
        """Optimizer steps of a training on so many samples."""
        per_epoch = -(-samples // self.batch.global_batch_size)
        return self.training.max_steps or (self.training.epochs or 1) * per_epoch

    def optimizer(self, model: "torch.nn.Module") -> "torch.optim.Optimizer":
        """The job's AdamW, over a model that the job's techniques have been applied to, in place.

        They freeze modules, checkpoint activations and put the forward pass under autocast. Weight decay
        spares biases and norms; the bits of the state are those of the job, module by module.

        Args:
            model: on its device, and not yet in ``DistributedDataParallel`` or a DeepSpeed engine.

        Raises:
            NotApplicable: the model does not have what the job names.
            UserError: the job asks for master weights that only an engine could keep.
        """
        setup = self._setup()
        if setup.engine == "torch" and precision.engine_casts(setup.precision):
            raise UserError(
                "16-bit parameters with fp32 masters need an engine that keeps them",
                'set `"engine": "deepspeed"`, or `strategy.precision.parameters` to `fp32`',
            )
        for technique in TECHNIQUES:
            technique.prepare_model(model, setup)
        return optimizers.build(optimizers.parameter_groups(model, setup), setup)

    def schedule(
        self, optimizer: "torch.optim.Optimizer", samples: int
    ) -> "torch.optim.lr_scheduler.LambdaLR":
        """The job's learning rate, to be stepped behind each optimizer step of a training on ``samples``."""
        from torch.optim.lr_scheduler import LambdaLR

        training, steps = self.training, self.steps(samples)
        warmup = training.warmup_steps or round((training.warmup_ratio or 0) * steps)
        factor = functools.partial(
            learning_rate, total=steps, peak=1.0, schedule=training.schedule, warmup=warmup
        )
        return LambdaLR(optimizer, factor)

    def optimizers(
        self, model: "torch.nn.Module", samples: int
    ) -> "tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]":
        """:meth:`optimizer` and :meth:`schedule`."""
        optimizer = self.optimizer(model)
        return optimizer, self.schedule(optimizer, samples)

    def equip(self, trainer: "transformers.Trainer", lengths: Sequence[int] | Integers) -> None:
        """Have a Hugging Face ``Trainer`` take the job's batches, optimizer and schedule.

        Its own argument ``optimizers`` would not do: under DeepSpeed a Trainer drops that optimizer without a
        word and makes one of its own.

        Args:
            lengths: tokens of each sample of its training data.
        """
        from torch.utils.data import DataLoader

        assert trainer.model is not None, "a Trainer has one from its start"
        assert trainer.train_dataset is not None, "it is to train"
        samples: Any = trainer.train_dataset
        optimizer, schedule = self.optimizers(trainer.model, len(lengths))
        batches = self.batch_sampler(lengths)

        def loader() -> DataLoader[Any]:
            return DataLoader(samples, batch_sampler=batches, collate_fn=trainer.data_collator)

        def taken(name: str, value: Any) -> Any:
            def create(*given: Any, **named: Any) -> Any:
                setattr(trainer, name, value)  # which it clears before it trains
                return value

            return create

        changes = {
            "create_optimizer": taken("optimizer", optimizer),
            "create_scheduler": taken("lr_scheduler", schedule),
            "get_train_dataloader": loader,
        }
        for name, value in changes.items():
            setattr(trainer, name, value)

    def training_arguments(self) -> dict[str, Any]:
        """What the job says of the arguments of Hugging Face's ``TrainingArguments``.

        Raises:
            UserError: the job asks for a loss scale that a ``Trainer`` has no part for.
        """
        training, dtype = self.training, self.strategy.precision.dtype
        cast = precision.engine_casts(self.strategy.precision)
        by_deepspeed = self.strategy.engine == "deepspeed"
        if dtype == "fp16" and by_deepspeed != cast:
            raise UserError(
                "a Trainer scales the loss of fp16 only with fp32 parameters without DeepSpeed, "
                "and with 16-bit parameters under it",
                "use bf16, or set `strategy.precision.parameters` to "
                + ("`same`" if by_deepspeed else "`fp32`"),
            )
        first, second = training.betas
        return {
            "per_device_train_batch_size": self.batch.micro_batch_size,
            "per_device_eval_batch_size": training.eval_micro_batch_size or self.batch.micro_batch_size,
            "gradient_accumulation_steps": self.batch.gradient_accumulation_steps,
            "num_train_epochs": training.epochs or 1,
            "max_steps": training.max_steps or -1,
            "learning_rate": training.learning_rate,
            "weight_decay": training.weight_decay,
            "adam_beta1": first,
            "adam_beta2": second,
            "adam_epsilon": training.eps,
            "max_grad_norm": training.max_grad_norm or 0.0,
            "seed": training.seed,
            "use_cpu": self._setup().device == "cpu",
            # Elsewhere autocast is around the model's forward pass already; under DeepSpeed the Trainer would
            # take `bf16` for 16-bit parameters.
            "bf16": dtype == "bf16" and cast,
            "fp16": dtype == "fp16",
            "deepspeed": self.deepspeed_config,
        }

    def _setup(self) -> Setup:
        import torch

        asked = self.resolved.job.cluster.device
        return self.resolved.setup(
            "cuda" if asked != "cpu" and (asked == "cuda" or torch.cuda.is_available()) else "cpu"
        )


def job(path: str | os.PathLike[str] | None = None) -> CurrentJob:
    """As :func:`memlaunch.launcher.current_job`."""
    folder = os.environ.get(ENVIRONMENT_VARIABLE)
    if path is None and folder is None:
        raise NoJob(
            "this process is not a rank of a memlaunch run",
            "start the script with `memlaunch run job.json`; by hand, name its job: "
            '`current_job("job.json")`',
        )
    if path is None:
        at, resolved = Path(str(folder)), resolve.load_run(RunDir(Path(str(folder))))
    else:
        at = Path(path)
        resolved = resolve.load_run(RunDir(at)) if at.is_dir() else resolve.load(at)
    if resolved.job.data.batching.max_tokens is not None:
        raise UserError("`data.batching.max_tokens` is for our own loop", "give a `micro_batch_size`")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return CurrentJob(_on(resolved, world_size), at if at.is_dir() else None, rank, world_size)


def _on(resolved: "ResolvedJob", world_size: int) -> "ResolvedJob":
    """The job on as many ranks as there are, with the same global batch."""
    if world_size == resolved.world_size:
        return resolved
    try:
        batch = solve_batch(world_size, resolved.batch.global_batch_size, resolved.batch.micro_batch_size)
    except BatchError as error:
        raise UserError(
            f"the job has {resolved.world_size} ranks, and {world_size} run: {error}", error.hint
        ) from None
    return replace(resolved, batch=batch, layout=Layout(1, world_size))
