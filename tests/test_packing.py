"""Packed samples do not see each other, and count as they do alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from memlaunch.launcher.training import tokens
from memlaunch.launcher.training.batches import Collate, CollatePacked
from memlaunch.launcher.training.errors import NotApplicable
from memlaunch.launcher.training.model import check_attention
from memlaunch.launcher.training.tasks import TASKS, logits_of
from memlaunch.strategies.padding import PaddingSettings

TASK = TASKS["causal-lm"]
BLOCK = 48


class Samples:
    """Tokens of forty samples of 1 to 40 tokens, in memory."""

    def __init__(self) -> None:
        generator = np.random.default_rng(5)
        self.lengths = generator.integers(1, 41, 40).astype(np.int32)
        self._ids = [generator.integers(0, 100, length).astype(np.int32) for length in self.lengths]

    def sample(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._ids[index]}


def models() -> list[Any]:
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(
        **small, intermediate_size=64, num_hidden_layers=2, num_key_value_heads=1
    )
    gpt2 = transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    neox = transformers.GPTNeoXConfig(
        **small, num_hidden_layers=2, intermediate_size=64, hidden_dropout=0.0, attention_dropout=0.0
    )
    for config in (llama, gpt2, neox):
        config.use_cache = False
    return [
        transformers.LlamaForCausalLM(llama),
        transformers.GPT2LMHeadModel(gpt2),
        transformers.GPTNeoXForCausalLM(neox),
    ]


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("mode", ["dynamic", "fixed"])
def test_the_token_losses_of_packed_samples_sum_to_those_of_the_same_samples_alone(
    model: nn.Module, mode: Any
) -> None:
    samples: Any = Samples()
    from memlaunch.strategies.bucketing import pack

    packing = pack(samples.lengths, BLOCK, seed=1, epoch=0)
    padding = PaddingSettings(mode=mode)
    packed = CollatePacked(samples, padding, BLOCK, pad_token=0)
    alone = Collate(samples, TASK, padding, BLOCK, {"input_ids": 0})
    blocks = [
        packing.samples[start:stop].tolist()
        for start, stop in zip(packing.offsets, packing.offsets[1:], strict=False)
    ]
    assert len(blocks) < 0.6 * len(samples.lengths)
    total = {"packed": 0.0, "alone": 0.0}
    counts = {"packed": 0, "alone": 0}
    with torch.no_grad():
        for name, batches in (
            ("packed", [packed(blocks[start : start + 3]) for start in range(0, len(blocks), 3)]),
            ("alone", [alone([index]) for index in range(len(samples.lengths))]),
        ):
            for batch in batches:
                total[name] += float(TASK.loss_sum(logits_of(model(**batch.inputs)), batch.labels))
                counts[name] += batch.count
                assert batch.count == TASK.count(batch.labels)
    assert counts["packed"] == counts["alone"] == int((samples.lengths - 1).sum())
    assert total["packed"] == pytest.approx(total["alone"], rel=1e-5)


def test_a_stand_in_counts_nothing_and_runs() -> None:
    samples: Any = Samples()
    batch = CollatePacked(samples, PaddingSettings(), BLOCK, pad_token=0)([])
    assert (batch.count, batch.samples, batch.tokens, batch.padded_tokens) == (0, 0, 0, 0)
    model = models()[0]
    loss = TASK.loss_sum(logits_of(model(**batch.inputs)), batch.labels)
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_a_model_that_mixes_packed_samples_is_refused() -> None:
    class Blind(nn.Module):
        """Takes positions and pays no heed to them."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(100, 8)
            self.head = nn.Linear(8, 100)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, input_ids: torch.Tensor, position_ids: Any = None) -> Any:
            mixed = self.embedding(input_ids).cumsum(dim=1)
            return transformers.modeling_outputs.CausalLMOutput(logits=self.head(mixed))

    for model in models():
        check_attention(model, "sdpa", packed=True)
    blind: Any = Blind()
    check_attention(blind, "sdpa", packed=False)
    with pytest.raises(NotApplicable, match="see each other"):
        check_attention(blind, "sdpa", packed=True)


def test_a_model_that_sees_what_it_is_to_predict_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    config.use_cache = False
    with pytest.raises(NotApplicable, match="sees the tokens that it is to predict"):
        check_attention(transformers.BertLMHeadModel(config), "sdpa", packed=False)
    config.is_decoder = True
    check_attention(transformers.BertLMHeadModel(config), "sdpa", packed=False)


def test_a_packing_is_made_once_and_mapped(tmp_path: Path) -> None:
    lengths = np.array([3, 9, 4, 4, 8, 2], dtype=np.int32)
    np.save(tmp_path / "lengths.npy", lengths)
    made = tokens.packing_of(tmp_path, lengths, 12, seed=3, epoch=1)
    again = tokens.packing_of(tmp_path, lengths, 12, seed=3, epoch=1)
    assert sorted(made.samples.tolist()) == list(range(6))
    assert isinstance(again.samples, np.memmap)
    assert json.dumps(made.samples.tolist()) == json.dumps(again.samples.tolist())
