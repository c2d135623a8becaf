"""Training with the Hugging Face Trainer, for `accelerate launch`, as its documentation shows it.

accelerate launch --num_processes 2 benchmarks/peers_trainer.py SPEC SAMPLING

SPEC is the file that `peers.py` writes; SAMPLING is `random`, the Trainer's default, or `group_by_length`.
Each rank adds one line a step to the file `lines` of SPEC, with its rank at the end of the name.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Lines(TrainerCallback):
    """Writes a line behind every optimizer step; counts the real tokens on their way into the Trainer."""

    def __init__(self, collate: DataCollatorWithPadding, accumulation: int, path: Path) -> None:
        self._collate = collate
        self._accumulation = accumulation
        self._tokens: list[int] = []
        self._file = path.open("a", buffering=1)

    def collate(self, features: list[dict[str, Any]]) -> Any:
        """A micro-batch; the Trainer asks for them in order, and ahead."""
        self._tokens.append(sum(len(feature["input_ids"]) for feature in features))
        return self._collate(features)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        window = slice((state.global_step - 1) * self._accumulation, state.global_step * self._accumulation)
        on_gpu = args.device.type == "cuda"
        line = {
            "step": state.global_step,
            "tokens": sum(self._tokens[window]),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        }
        print(json.dumps(line), file=self._file)


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    sampling = sys.argv[2]
    arguments = TrainingArguments(
        output_dir=f"{spec['folder']}/trainer",
        per_device_train_batch_size=spec["micro_batch_size"],
        gradient_accumulation_steps=spec["gradient_accumulation_steps"],
        num_train_epochs=1,
        learning_rate=spec["learning_rate"],
        weight_decay=spec["weight_decay"],
        max_grad_norm=spec["max_grad_norm"],
        seed=spec["seed"],
        train_sampling_strategy=sampling,
        use_cpu=spec["device"] == "cpu",
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if spec["device"] == "cpu" else "nccl",
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])

    def tokenise(records: dict[str, Any]) -> Any:
        return tokenizer(records["text"], truncation=True, max_length=spec["max_length"])

    with PartialState().local_main_process_first():
        data = load_dataset("json", data_files=spec["data"], split="train")
        data = data.map(tokenise, batched=True, remove_columns="text")
    model = AutoModelForSequenceClassification.from_pretrained(spec["model"], dtype=torch.float32)
    accumulation = arguments.gradient_accumulation_steps
    path = Path(f"{spec['lines']}.{arguments.process_index}")
    lines = Lines(DataCollatorWithPadding(tokenizer), accumulation, path)
    Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=lines.collate, callbacks=[lines]
    ).train()


if __name__ == "__main__":
    main()
