"""What is saved is what was trained: masters for what was trained, the very input for what was frozen."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from memlaunch.launcher import resolve, rundir, translate
from tests import ranks

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews" / "train.jsonl"

FREEZE = ["embeddings", "encoder.layer[0]"]

STRATEGIES: list[dict[str, Any]] = [
    {"engine": "torch"},
    {"engine": "torch", "precision": {"dtype": "bf16", "parameters": "same"}},
    {"engine": "torch", "zero": {"stage": 2}},
    {"engine": "torch", "zero": {"stage": 3}, "precision": {"dtype": "bf16", "parameters": "same"}},
    {"engine": "torch", "zero": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}},
    {"engine": "deepspeed", "zero": {"stage": 0}},
    {"engine": "deepspeed", "zero": {"stage": 1}, "precision": {"dtype": "bf16", "parameters": "same"}},
    {"engine": "deepspeed", "zero": {"stage": 2}},
    {"engine": "deepspeed", "zero": {"stage": 3}},
    {"engine": "deepspeed", "zero": {"stage": 3}, "precision": {"dtype": "bf16", "parameters": "same"}},
    {
        "engine": "deepspeed",
        "zero": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
        "optimizer": "adamw",
    },
]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A base model without a head, as sentence encoders are published, with mixed dtypes."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(3)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.startswith("embeddings.") and weights[name].dtype == torch.float32:
            weights[name] = weights[name].half()
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def save_all(world: Any, folders: list[Path]) -> list[dict[str, Any]]:
    """In a rank: train the runs in ``folders``; the trainable masters that each engine ended with."""
    from memlaunch.launcher.training import export, session

    masters: list[dict[str, Any]] = []
    real_save = export.save

    def watching(engine: Any, model: Any, *rest: Any) -> None:
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        gathered = {name: tensor.clone() for name, tensor in engine.weights()}
        masters.append({name: gathered[name].numpy() for name in trainable})
        real_save(engine, model, *rest)

    export.save = watching
    for folder in folders:
        run = rundir.RunDir(folder)
        session.run(resolve.load(run.resolved), run, world)
    return masters


def test_the_model_holds_the_masters_and_the_frozen_input(base_model: Path, tmp_path: Path) -> None:
    folders = []
    for number, strategy in enumerate(STRATEGIES):
        path = tmp_path / f"job-{number}.json"
        path.write_text(
            json.dumps(
                {
                    "model": {"path": str(base_model), "task": "sequence-classification"},
                    "data": {"train": str(REVIEWS), "max_length": 16},
                    "training": {"micro_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3},
                    "strategy": {**strategy, "freeze": FREEZE},
                    "cluster": {"gpus_per_node": 2, "device": "cpu", "threads_per_rank": 1},
                    "output": {"dir": str(tmp_path)},
                }
            )
        )
        resolved = resolve.load(path)
        run = rundir.create(tmp_path, f"{number}")
        run.place(translate.files(resolved))
        folders.append(run.path)
    masters = ranks.run(2, save_all, folders)[0]
    original = {
        f"bert.{name}": tensor for name, tensor in load_file(base_model / "model.safetensors").items()
    }
    for strategy, folder, trained in zip(STRATEGIES, folders, masters, strict=True):
        saved = load_file(folder / "model" / "model.safetensors")
        moved = 0
        for name, tensor in saved.items():
            if name in trained:
                assert tensor.dtype == torch.float32, f"{strategy}: {name}"
                assert torch.equal(tensor, torch.from_numpy(trained[name])), f"{strategy}: {name}"
                moved += name in original and not torch.equal(tensor, original[name])
            else:
                assert name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))
                assert tensor.dtype == original[name].dtype, f"{strategy}: {name}"
                assert torch.equal(tensor, original[name]), f"{strategy}: {name}"
        assert moved > 10, f"{strategy}: training moved hardly anything"
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
        assert loaded.config.num_labels == 2
        assert loaded.dtype == torch.float32, f"{strategy}: in the type that it was saved in"
        assert loaded.config.use_cache
        transformers.AutoTokenizer.from_pretrained(folder / "model")
