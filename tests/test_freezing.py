"""Freezing: which parameters keep their values, and what is refused."""

import pytest
import torch
import transformers
from torch import nn

from memlaunch.strategies import freezing
from memlaunch.strategies.technique import Facts, NotApplicable
from tests import setups


def frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def under(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("freeze", "prefixes"),
    [
        ((), ()),
        (("embeddings",), ("bert.embeddings.",)),
        (("encoder.layer[:2]",), ("bert.encoder.layer.0.", "bert.encoder.layer.1.")),
        (("encoder.layer[0,3]",), ("bert.encoder.layer.0.", "bert.encoder.layer.3.")),
        (("embeddings", "encoder.layer[0]"), ("bert.embeddings.", "bert.encoder.layer.0.")),
        (("bert",), ("bert.",)),
        (("*pooler*",), ("bert.pooler.",)),
        (("classifier.bias",), ("classifier.bias",)),
    ],
)
def test_what_the_patterns_name_is_frozen_and_nothing_else(
    freeze: tuple[str, ...], prefixes: tuple[str, ...]
) -> None:
    model = setups.prepare(setups.bert(), freeze=freeze)
    assert frozen(model) == (under(model, *prefixes) if prefixes else set())


def test_a_frozen_parameter_has_no_gradient_and_stays_as_it_is() -> None:
    model = setups.prepare(setups.bert(), freeze=("embeddings", "encoder.layer[:2]"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(input_ids=torch.arange(24).view(2, 12), labels=torch.tensor([0, 1])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, parameter in model.named_parameters():
        still = name.startswith(("bert.embeddings.", "bert.encoder.layer.0.", "bert.encoder.layer.1."))
        assert (parameter.grad is None) == still, name
        assert torch.equal(parameter, before[name]) == still, name


def test_tied_weights_are_frozen_under_either_name() -> None:
    tiny = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**tiny)
    for pattern in ("wte", "lm_head"):
        model = setups.prepare(transformers.GPT2LMHeadModel(config), freeze=(pattern,))
        assert frozen(model) == {"transformer.wte.weight", "lm_head.weight"}


def test_a_module_without_a_base_model_is_frozen_from_its_root() -> None:
    model = setups.prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), freeze=("0",))
    assert frozen(model) == {"0.weight", "0.bias"}


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(NotApplicable, match=r"`encoder.layers\[:2\]` matches no module") as refusal:
        setups.prepare(setups.bert(), freeze=("embeddings", "encoder.layers[:2]"))
    assert refusal.value.key == "strategy.freeze[1]"
    assert "`encoder.layer`" in refusal.value.hint


def test_where_no_name_is_near_the_hint_lists_the_modules_of_the_model() -> None:
    with pytest.raises(NotApplicable) as refusal:
        setups.prepare(setups.bert(), freeze=("zzzzzz",))
    assert refusal.value.hint == "the model's modules are `bert`, `classifier`"


def test_a_layer_beyond_the_last_is_refused() -> None:
    with pytest.raises(NotApplicable, match="matches no module"):
        setups.prepare(setups.bert(num_hidden_layers=4), freeze=("encoder.layer[0,4]",))


@pytest.mark.parametrize("freeze", [("*",), ("bert", "classifier")])
def test_freezing_everything_is_refused(freeze: tuple[str, ...]) -> None:
    with pytest.raises(NotApplicable, match="every parameter"):
        setups.prepare(setups.bert(), freeze=freeze)


def test_freezing_everything_by_way_of_a_tied_weight_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(4, 4)
            self.head = nn.Linear(4, 4, bias=False)
            self.head.weight = self.embeddings.weight

    with pytest.raises(NotApplicable, match="tied ones included"):
        setups.prepare(Tied(), freeze=("embeddings",))


def test_a_frozen_batch_norm_keeps_its_statistics() -> None:
    blocks = [torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1), torch.nn.BatchNorm1d(2)) for _ in range(2)]
    model = setups.prepare(torch.nn.Sequential(*blocks), freeze=("0",)).train()
    model(torch.randn(4, 2, 3))
    frozen, trained = (block[1] for block in blocks)
    assert torch.equal(frozen.running_mean, torch.zeros(2))
    assert frozen.num_batches_tracked == 0
    assert trained.num_batches_tracked == 1


def facts(trainable: dict[str, bool]) -> Facts:
    return Facts(
        gradient_accumulation_steps=1,
        zero_stage=0,
        max_grad_norm=None,
        dynamic_loss_scale=None,
        loss_scale=None,
        offload_optimizer="none",
        offload_parameters="none",
        trainable=trainable,
        parameter_dtypes={},
        states=(),
    )


def complaints(freeze: tuple[str, ...], trainable: dict[str, bool]) -> list[str]:
    return list(freezing.TECHNIQUE.verify(setups.setup(freeze=freeze), facts(trainable)))


def test_the_check_after_the_first_step_names_a_parameter_that_is_trained_all_the_same() -> None:
    trainable = {"bert.embeddings.weight": False, "bert.pooler.weight": True, "classifier.weight": True}
    assert complaints(("embeddings",), trainable) == []
    assert complaints(("pooler",), trainable) == [
        "`bert.pooler.weight` is trained, `pooler` in the job freezes it"
    ]


def test_the_check_knows_a_base_model_by_what_is_frozen_below_it() -> None:
    """Parameter names don't tell which of two modules is the base model."""
    trainable = {"teacher.embeddings.weight": True, "model.embeddings.weight": False, "head.weight": True}
    assert complaints(("embeddings",), trainable) == []


def test_the_check_passes_over_the_second_name_of_a_tied_weight() -> None:
    assert complaints(("lm_head",), {"transformer.wte.weight": False, "transformer.ln.weight": True}) == []
