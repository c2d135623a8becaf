"""Activation checkpointing: less is kept, nothing is computed in vain, and the gradients are the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from memlaunch.strategies.checkpointing import repeated_blocks
from memlaunch.strategies.technique import Conflict, NotApplicable
from tests import setups

IDS = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(1))
TINY = {"vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}


class Residual(nn.Module):
    """A block of a CNN, batch norm and dropout included."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.relu(self.norm(self.convolution(x))))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(*(Residual(8) for _ in range(4)))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return scores


def bert(**changes: Any) -> nn.Module:
    return setups.bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, **changes)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4, **TINY))


def llama() -> nn.Module:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_key_value_heads=2, **TINY))


def t5() -> nn.Module:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    config = transformers.T5Config(**shape, **TINY, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def loss_of(model: nn.Module) -> Tensor:
    if isinstance(model, Cnn):
        return model(torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(1))).square().mean()
    classifies = isinstance(model, transformers.BertForSequenceClassification)
    labels = torch.tensor([0, 1]) if classifies else IDS
    loss: Tensor = model(input_ids=IDS, labels=labels).loss
    return loss


def step(build: Callable[[], nn.Module], **choices: Any) -> tuple[nn.Module, float, float]:
    """The model after a forward and backward pass, the loss, and the GFLOP of its products."""
    torch.manual_seed(3)
    model = setups.prepare(build(), **choices)
    torch.manual_seed(5)  # the same dropout
    with FlopCounterMode(display=False) as counter:
        loss = loss_of(model)
        loss.backward()
    return model, loss.item(), counter.get_total_flops() / 1e9


def assert_same_gradients(model: nn.Module, other: nn.Module) -> None:
    others = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (others[name].grad is None), name
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, others[name].grad), name


MODELS = [bert, gpt2, llama, t5, Cnn]
MODES = ["full", "selective", {"mode": "full", "every": 2}, {"mode": "selective", "every": 3}]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_are_bit_equal_to_those_without_it(build: Any, mode: Any, dtype: str) -> None:
    """Dropout draws the same numbers again; under autocast the blocks run again under autocast."""
    plain, plain_loss, _ = step(build, precision=dtype)
    model, loss, _ = step(build, precision=dtype, activation_checkpointing=mode)
    assert loss == plain_loss
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_full_computes_again_what_selective_has_kept(build: Any) -> None:
    """The counted operations are exactly those that `selective` keeps."""
    flops = {mode: step(build, activation_checkpointing=mode)[2] for mode in ("none", "full", "selective")}
    assert flops["selective"] == flops["none"] < flops["full"]


def bytes_kept(model: nn.Module) -> int:
    """Bytes that autograd keeps from the forward pass for the backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model)
    assert loss.requires_grad
    return sum(kept.values())


def test_full_keeps_the_inputs_of_the_blocks_only() -> None:
    plain = bytes_kept(setups.prepare(bert()))
    full = bytes_kept(setups.prepare(bert(), activation_checkpointing="full"))
    every = bytes_kept(setups.prepare(bert(), activation_checkpointing={"mode": "full", "every": 2}))
    assert full < 0.25 * plain
    assert every == pytest.approx((plain + full) / 2, rel=0.02)


def passes(model: nn.Module) -> list[int]:
    """How often each block is computed in a forward and backward pass."""
    counts: dict[int, int] = {}
    blocks = repeated_blocks(model)
    for index, block in enumerate(blocks):
        inside = next(iter(block.children()))
        inside.register_forward_hook(lambda *_, index=index: counts.update({index: counts.get(index, 0) + 1}))
    loss_of(model).backward()
    return [counts[index] for index in range(len(blocks))]


@pytest.mark.parametrize(
    ("freeze", "every", "expected"),
    [
        ((), 1, [2, 2, 2, 2]),
        ((), 2, [2, 1, 2, 1]),
        ((), 3, [2, 1, 1, 2]),
        (("embeddings", "encoder.layer[:2]"), 1, [1, 1, 2, 2]),
        (("embeddings", "encoder.layer[:3]"), 2, [1, 1, 1, 1]),
        (("encoder.layer[:2]",), 1, [2, 2, 2, 2]),
        (("embeddings", "encoder.layer[0,2]"), 1, [1, 2, 2, 2]),
    ],
)
def test_every_nth_block_runs_twice_unless_nothing_before_it_is_trained(
    freeze: tuple[str, ...], every: int, expected: list[int]
) -> None:
    """A frozen block behind trained ones must pass gradients on, so it counts as any other."""
    mode = {"mode": "full", "every": every}
    assert passes(setups.prepare(bert(), freeze=freeze, activation_checkpointing=mode)) == expected


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_a_frozen_prefix_runs_without_autograd(mode: str) -> None:
    freeze = ("embeddings", "encoder.layer[:2]")
    model = setups.prepare(bert(), freeze=freeze, activation_checkpointing=mode)
    outputs: list[Tensor] = []
    for block in repeated_blocks(model):
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
    loss_of(model)
    assert [output.grad_fn is not None for output in outputs] == [False, False, True, True]


def test_evaluation_runs_no_block_twice() -> None:
    model = setups.prepare(bert(), activation_checkpointing="full")
    with torch.no_grad():
        assert loss_of(model).grad_fn is None
    with torch.inference_mode():
        loss_of(model)


def test_batch_norm_counts_a_batch_once() -> None:
    plain, _, _ = step(Cnn)
    model, _, _ = step(Cnn, activation_checkpointing="full")
    expected = dict(plain.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        assert norm.momentum == 0.1
        assert norm.num_batches_tracked is not None
        assert norm.num_batches_tracked.item() == 1


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_cache_for_generation_is_not_filled_twice(mode: str) -> None:
    def with_cache() -> nn.Module:
        model = gpt2()
        model.config.use_cache = True
        return model

    plain, _, _ = step(gpt2)
    model, _, _ = step(with_cache, activation_checkpointing=mode)
    assert_same_gradients(model, plain)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_frozen_layers_save_two_fifths_of_what_hugging_face_computes(attention: str) -> None:
    """BERT of 12 layers x 256, 8 x 128 tokens, the embeddings and 8 of 12 layers frozen.

    Hugging Face's own checkpointing asks the embeddings for gradients, so every frozen layer is computed
    twice and backward too.
    """

    def build() -> nn.Module:
        return setups.bert(
            vocab_size=30522,
            hidden_size=256,
            num_hidden_layers=12,
            intermediate_size=1024,
            attn_implementation=attention,
        )

    ids = torch.randint(0, 30522, (8, 128), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 2

    def gflop(model: nn.Module) -> float:
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=labels).loss.backward()
        return counter.get_total_flops() / 1e9

    freeze = ("embeddings", "encoder.layer[:8]")
    plain, ours, theirs = (
        setups.prepare(build(), freeze=freeze, activation_checkpointing=mode)
        for mode in ("none", "full", "none")
    )
    theirs.gradient_checkpointing_enable()
    without, mine, reference = gflop(plain), gflop(ours), gflop(theirs)
    print(
        f"{attention}: {mine:.1f} GFLOP, Hugging Face {reference:.1f}, ratio {mine / reference:.3f}; "
        f"without checkpointing {without:.1f}"
    )
    assert mine <= 0.60 * reference
    assert_same_gradients(ours, plain)


def test_blocks_are_found_in_encoders_and_decoders_and_cnns() -> None:
    def kinds(model: nn.Module) -> list[str]:
        return [type(block).__name__ for block in repeated_blocks(model)]

    assert kinds(bert()) == ["BertLayer"] * 4
    assert kinds(gpt2()) == ["GPT2Block"] * 4
    assert kinds(llama()) == ["LlamaDecoderLayer"] * 4
    assert kinds(t5()) == ["T5Block"] * 5
    assert kinds(Cnn()) == ["Residual"] * 4


def test_a_list_of_single_layers_is_no_list_of_blocks() -> None:
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
    assert repeated_blocks(nn.ModuleList([Residual(2)])) == []


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(NotApplicable, match="`Linear` has no repeated blocks") as refusal:
        setups.prepare(nn.Linear(2, 2), activation_checkpointing="full")
    assert refusal.value.key == "strategy.activation_checkpointing"


def test_every_without_a_mode_is_a_contradiction() -> None:
    from memlaunch.strategies import checkpointing

    def conflicts(section: Any) -> list[Conflict]:
        return list(checkpointing.TECHNIQUE.conflicts(setups.setup(activation_checkpointing=section)))

    assert [c.key for c in conflicts({"every": 2})] == ["strategy.activation_checkpointing.every"]
    assert conflicts({"mode": "full", "every": 2}) == []


def checkpointed(model: nn.Module) -> list[str]:
    """The names of the modules whose forward pass is another one than their class has."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_blocks_are_those_that_are_named() -> None:
    named = {"mode": "full", "blocks": ["encoder.layer[1:3]", "encoder.layer[2].attention", "pooler"]}
    model = setups.prepare(setups.bert(), activation_checkpointing=named)
    assert checkpointed(model) == ["bert.encoder.layer.1", "bert.encoder.layer.2", "bert.pooler"]
    every = setups.prepare(setups.bert(), activation_checkpointing={**named, "every": 2})
    assert checkpointed(every) == ["bert.encoder.layer.1", "bert.pooler"]
    with pytest.raises(NotApplicable, match=r"`encoder\.layers` matches no module"):
        setups.prepare(setups.bert(), activation_checkpointing={"mode": "full", "blocks": ["encoder.layers"]})
