"""Training as one writes it by hand with care: DistributedDataParallel in a script for torchrun.

torchrun --nproc-per-node=2 benchmarks/peers_loop.py SPEC

SPEC is the file that `peers.py` writes: model, data, hyperparameters, and the micro-batches of every rank
as line numbers of the data. Every sample of an optimizer step weighs the same. Rank 0 adds one line a step
to the file `lines` of SPEC.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def padded(rows: list[list[int]], fill: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A micro-batch of token ids and its attention mask, each of shape (samples, longest)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = spec["device"] == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    records = [json.loads(line) for line in Path(spec["data"]).read_text().splitlines()]
    texts = [record["text"] for record in records]
    ids = tokenizer(texts, truncation=True, max_length=spec["max_length"])["input_ids"]
    labels = torch.tensor([record["label"] for record in records])

    torch.manual_seed(spec["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(spec["model"], dtype=torch.float32).to(device)
    model.train()
    torch.manual_seed(spec["seed"] + rank)  # dropout differs between ranks
    replica = (
        DistributedDataParallel(model, [device] if on_gpu else None, gradient_as_bucket_view=True)
        if ranks > 1
        else model
    )
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": spec["weight_decay"]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=spec["learning_rate"], fused=True)
    steps = spec["batches"][rank]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))

    with Path(spec["lines"]).open("a", buffering=1) as lines:
        for number, window in enumerate(steps, start=1):
            counts = torch.tensor(
                [sum(map(len, window)), sum(len(ids[i]) for batch in window for i in batch)],
                dtype=torch.float64,
                device=device,
            )
            dist.all_reduce(counts)
            samples, tokens = counts.tolist()
            total = torch.zeros((), device=device)
            for index, batch in enumerate(window):
                inputs = padded([ids[i] for i in batch], tokenizer.pad_token_id, device)
                last = index == len(window) - 1
                with nullcontext() if last or ranks == 1 else replica.no_sync():
                    logits = replica(**inputs).logits
                    loss = cross_entropy(logits, labels[batch].to(device), reduction="sum")
                    (loss * ranks / samples).backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(parameters, spec["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            dist.all_reduce(total)
            if rank == 0:
                line = {
                    "step": number,
                    "loss": total.item() / samples,
                    "grad_norm": norm.item(),
                    "tokens": int(tokens),
                    "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
                }
                print(json.dumps(line), file=lines)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
