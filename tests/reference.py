"""The mathematics of a job, written a second time: a plain PyTorch loop of one process over whole batches.

It shares with memlaunch only the answer to "which samples form step k"; everything else, from tokens to
weights, is its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers


def train(
    folder: Path,
    data: Path,
    batches: Sequence[Sequence[int]],
    *,
    auto: Any = transformers.AutoModelForSequenceClassification,
    max_length: int,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train the model in ``folder`` on ``batches`` of line numbers (from 0) of ``data``.

    Returns the loss of each step and the change of each parameter.
    """
    torch.set_num_threads(1)  # more would fight with the other processes of a test for its cores
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = auto.from_pretrained(folder)
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=learning_rate,
        foreach=False,
    )
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / len(batches))
        loss = _loss(model, tokenizer, [records[index] for index in batch], max_length)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = dict(model.named_parameters())
    return losses, {name: after[name].detach() - start for name, start in before.items()}


def _loss(model: Any, tokenizer: Any, records: list[dict[str, Any]], max_length: int) -> torch.Tensor:
    texts = [record["text"] for record in records]
    if "label" in records[0]:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        labels = torch.tensor([record["label"] for record in records])
        return torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
    # Every token but the first of its sample is predicted; all of them weigh the same.
    losses = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:max_length]
        row = torch.tensor([ids])
        losses.append(
            torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="none")
        )
    return torch.cat(losses).mean()
