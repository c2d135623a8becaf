"""A window of micro-batches: one gradient synchronisation, one schedule step, every token once."""

from typing import Any

import torch
import torch.distributed as dist

from memlaunch.launcher.training import loop
from tests import engines, ranks
from tests.engines import Strategy


def synchronisations(world: Any) -> list[int]:
    """In a rank: how often DDP has reduced gradients, after each micro-step of four windows of three."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    engine: Any = engines.start(engines.setup_of(Strategy("torch", 0), world), world)
    assert isinstance(engine._replica, DistributedDataParallel)
    reduced = 0

    def counting(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal reduced
        reduced += bucket.is_last()
        return allreduce_hook(group, bucket)

    engine._replica.register_comm_hook(None, counting)
    seen = []
    for number in range(4):
        for index in range(3):
            (batch,) = engines.window(3 * number + index, world, micro_batches=1)
            with engine.micro_step(last=index == 2):
                logits = engine.forward(batch.inputs).logits
                engine.backward(engines.TASK.loss_sum(logits, batch.labels))
            seen.append(reduced)
        engine.step(1e-3)
    return seen


def test_gradients_are_synchronised_once_a_window() -> None:
    for seen in ranks.run(2, synchronisations):
        # The second window has one more, which moves them to where DDP wants them from then on.
        assert seen == [0, 0, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5]


def where_gradients_lie(world: Any) -> list[tuple[set[int], int]]:
    """In a rank: the storages of all gradients, and their bytes, behind each micro-step of four windows."""
    engine: Any = engines.start(engines.setup_of(Strategy("torch", 0), world), world)
    seen = []
    for number in range(4):
        for index, batch in enumerate(engines.window(number, world)):
            with engine.micro_step(last=index == 1):
                logits = engine.forward(batch.inputs).logits
                engine.backward(engines.TASK.loss_sum(logits, batch.labels))
            storages = [parameter.grad.untyped_storage() for parameter in engine.module.parameters()]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
            seen.append((set(sizes), sum(sizes.values())))
        engine.step(1e-3)
    return seen


def test_micro_batches_add_up_in_the_buckets_that_are_sent_and_not_beside_them() -> None:
    parameters = sum(parameter.nbytes for parameter in engines.bert().parameters())
    for seen in ranks.run(2, where_gradients_lie):
        (first, _), (sent, _), *later = seen
        assert not first & sent, "the first window cannot know yet where they will be"
        buckets, size = later[-1]
        assert size == parameters
        assert all(found == (buckets, size) for found in later)


def resumed_like_whole(world: Any) -> list[int]:
    """In a rank: the numbers of steps after which a run can be cut without a bit of its weights changing."""
    setup = engines.setup_of(Strategy("torch", 0), world)
    whole = engines.start(setup, world)
    cut = {}
    for number in range(5):
        if number:
            cut[number] = engines.start(setup, world)
            for kept, block in zip(whole.blocks(), cut[number].blocks(), strict=True):
                block.weight.data.copy_(kept.weight)
                assert kept.state is not None
                assert block.state is not None
                block.state.update({name: tensor.clone() for name, tensor in kept.state.items()})
            for _ in range(min(number, 2)):
                loop._rehearse(cut[number], engines.TASK, lambda: engines.window(9, world)[0], world)
        for engine in (whole, *cut.values()):
            engines.step(engine, number, world)
    end = engines.weights(whole)
    return [
        number
        for number, engine in cut.items()
        if all(torch.equal(end[name], tensor) for name, tensor in engines.weights(engine).items())
    ]


def test_gradients_of_a_resumed_run_lie_and_are_rounded_as_those_of_a_whole_one() -> None:
    # Three ranks: dividing by three and multiplying by a third differ in the last bit.
    for same in ranks.run(3, resumed_like_whole):
        assert same == [1, 2, 3, 4]


class Windows:
    """Eight optimizer steps of two micro-batches, named by step and place."""

    steps_per_epoch = 8

    def step(self, epoch: int, k: int) -> list[list[int]]:
        return [[k, 0], [k, 1]]


def lines_with_an_overflow(world: Any, strategy: Strategy) -> list[dict[str, Any]]:
    """In a rank: the metrics of a run whose third step overflows."""
    engines.claim_fp16()
    engine = engines.start(engines.setup_of(strategy, world), world)
    current = 0

    def collate(names: Any) -> Any:
        nonlocal current
        current = names[0]
        return engines.window(names[0], world)[names[1]]

    def watch(module: Any, inputs: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * (float("inf") if current == 2 else 1.0))

    engine.module.get_submodule("classifier").register_forward_hook(watch)
    recorded: list[dict[str, Any]] = []
    plan = loop.Plan(
        steps=5,
        learning_rate=lambda applied: 1e-3 / (1 + applied),
        eval_every=None,
        record=recorded.append,
        after_first_step=lambda: None,
    )
    loop.train(engine, engines.TASK, Windows(), collate, plan, world, evaluate=None)
    return recorded


def test_a_skipped_step_counts_as_a_window_and_leaves_the_schedule_where_it_was() -> None:
    precision = {"dtype": "fp16", "initial_scale": 256.0, "hysteresis": 1}
    for strategy in (
        Strategy("torch", 0, precision=precision),
        Strategy("deepspeed", 2, precision=precision),
    ):
        lines, others = ranks.run(2, lines_with_an_overflow, strategy)
        assert others == [], "the main rank records"
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
        assert [line["skipped"] for line in lines] == [False, False, True, False, False]
        applied = [1e-3, 1e-3 / 2, 1e-3 / 3, 1e-3 / 3, 1e-3 / 4]
        assert [line["learning_rate"] for line in lines] == applied
        assert [line["loss_scale"] for line in lines] == [256.0, 256.0, 256.0, 128.0, 128.0]
