"""Adapters are trained in the place of the model, on every engine, and saved in it and beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from memlaunch.launcher import manifest, resolve, rundir, translate
from memlaunch.launcher.rundir import RunDir
from memlaunch.strategies import TECHNIQUES, lora
from memlaunch.strategies.bucketing import BucketedSampler
from memlaunch.strategies.lora import LoraSettings
from memlaunch.strategies.technique import Facts, NotApplicable
from tests import ranks, setups

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews" / "train.jsonl"

GLOBAL_BATCH = 8
SAMPLES = 21
STEPS = 4
MAX_LENGTH = 16
LEARNING_RATE = 1e-2
LORA = {"rank": 4, "alpha": 8, "modules": ["*.query", "encoder.layer[1].intermediate"]}

#: In fp32 with 32-bit state, so that all of them learn the same.
ALIKE: list[dict[str, Any]] = [
    {"engine": "torch", "activation_checkpointing": "full"},
    {"engine": "torch", "zero": {"stage": 3}},
    {"engine": "deepspeed", "zero": {"stage": 1}},
    {"engine": "deepspeed", "zero": {"stage": 2}, "activation_checkpointing": "selective"},
    {"engine": "deepspeed", "zero": {"stage": 3}, "activation_checkpointing": "full"},
]
EIGHT_BIT = {"name": "adamw", "bits": 8, "overrides": [{"modules": "classifier", "bits": 32}]}
OTHERS: list[dict[str, Any]] = [
    {"engine": "torch", "optimizer": EIGHT_BIT, "precision": {"dtype": "bf16", "parameters": "same"}},
    {"engine": "deepspeed", "zero": {"stage": 2}, "optimizer": EIGHT_BIT},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A classifier of two layers, wide enough that an adapter has tensors with 8-bit state."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    setups.bert(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, intermediate_size=1024
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("".join(REVIEWS.read_text(encoding="utf-8").splitlines(keepends=True)[:SAMPLES]))
    return file


def place(base: Path, data: Path, folder: Path, strategy: dict[str, Any]) -> RunDir:
    path = folder / "job.json"
    path.write_text(
        json.dumps(
            {
                "name": "adapted",
                "model": {"path": str(base)},
                "data": {"train": str(data), "max_length": MAX_LENGTH, "batching": "random"},
                "training": {
                    "global_batch_size": GLOBAL_BATCH,
                    "micro_batch_size": 2,
                    "max_steps": STEPS,
                    "learning_rate": LEARNING_RATE,
                },
                "strategy": {"lora": LORA, **strategy},
                "cluster": {"gpus_per_node": 2, "device": "cpu", "threads_per_rank": 1},
                "output": {"dir": str(folder), "checkpoint_every_steps": 2},
            }
        )
    )
    run = rundir.create(folder / "runs", "adapted")
    run.place(translate.files(resolve.load(path)))
    return run


def train_all(world: Any, folders: list[Path]) -> None:
    """In a rank: the runs in ``folders``, one after the other."""
    from memlaunch.launcher.training import session

    for folder in folders:
        run = RunDir(folder)
        session.run(resolve.load(run.resolved), run, world)


def metrics(run: RunDir) -> list[dict[str, Any]]:
    """Less what the clock says."""
    clock = ("_seconds", "tokens_per_second")
    return [
        {k: v for k, v in line.items() if not k.endswith(clock)} for line, _ in rundir.read_lines(run.metrics)
    ]


def plain_loop(base: Path, data: Path) -> list[float]:
    """The losses of peft's own model in one process, over whole global batches."""
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    cut: dict[str, Any] = {"truncation": True, "max_length": MAX_LENGTH}
    lengths = [len(tokenizer(record["text"], **cut)["input_ids"]) for record in records]
    torch.manual_seed(42)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*\.query|bert\.encoder\.layer\.1\.intermediate\.dense",
        task_type="SEQ_CLS",
    )
    model: Any = peft.get_peft_model(plain, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], foreach=False
    )
    sampler = BucketedSampler(
        np.array(lengths),
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=GLOBAL_BATCH,
        world_size=1,
        rank=0,
        seed=42,
        mode="random",
    )
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / STEPS)
        batch = [records[index] for index in sampler.step_samples(*divmod(step, sampler.steps_per_epoch))]
        inputs = tokenizer([record["text"] for record in batch], padding=True, return_tensors="pt", **cut)
        labels = torch.tensor([record["label"] for record in batch])
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def runs(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """A run for each strategy."""
    folder = tmp_path_factory.mktemp("runs")
    placed = [place(base, data, folder, strategy) for strategy in (*ALIKE, *OTHERS)]
    ranks.run(2, train_all, [run.path for run in placed])
    return placed


def test_an_adapter_learns_as_in_a_plain_loop_with_peft(runs: list[RunDir], base: Path, data: Path) -> None:
    losses = plain_loop(base, data)
    for strategy, run in zip(ALIKE, runs, strict=False):
        assert [line["loss"] for line in metrics(run)] == pytest.approx(losses, rel=1e-5), strategy
    for strategy, run in zip(OTHERS, runs[len(ALIKE) :], strict=True):
        assert [line["loss"] for line in metrics(run)] == pytest.approx(losses, rel=0.1), strategy


def test_the_model_is_saved_with_its_adapter_added_and_the_adapter_alone(
    runs: list[RunDir], base: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    inputs = tokenizer(["a quiet, funny film"], return_tensors="pt")
    original = load_file(base / "model.safetensors")
    auto = transformers.AutoModelForSequenceClassification
    for run in runs:
        saved = load_file(run.model / "model.safetensors")
        assert saved.keys() == original.keys()
        moved = {name for name in saved if not torch.equal(saved[name], original[name])}
        assert moved == {
            *(f"bert.encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1)),
            "bert.encoder.layer.1.intermediate.dense.weight",
            "classifier.weight",
            "classifier.bias",
        }
        merged = auto.from_pretrained(run.model, dtype=torch.float32).eval()
        beside: Any = peft.PeftModel.from_pretrained(auto.from_pretrained(base), run.model / "adapter")
        with torch.no_grad():
            torch.testing.assert_close(
                merged(**inputs).logits, beside.eval()(**inputs).logits, rtol=1e-4, atol=1e-5
            )


def test_a_resumed_run_is_the_run(runs: list[RunDir]) -> None:
    whole = [runs[0], runs[4], runs[-1]]
    cut = []
    for run in whole:
        copy = RunDir(run.path.with_name(f"{run.path.name}-cut"))
        shutil.copytree(run.path, copy.path)
        shutil.rmtree(copy.model)
        shutil.rmtree(copy.checkpoints / manifest.folder_name(STEPS))
        cut.append(copy)
    ranks.run(2, train_all, [run.path for run in cut])
    for run, resumed in zip(whole, cut, strict=True):
        assert metrics(run) == metrics(resumed)
        one, other = (load_file(r.model / "model.safetensors") for r in (run, resumed))
        assert all(torch.equal(one[name], other[name]) for name in one)


def gpt(tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied)
    return transformers.GPT2LMHeadModel(config)


def test_merging_gives_what_the_adapters_gave_in_layers_stored_the_other_way_round() -> None:
    model = setups.prepare(gpt(), lora=LoraSettings(modules=["h[:1]", "*.mlp"], rank=2)).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    ids = torch.arange(10)[None]
    weights = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    plain = gpt()
    missing, unexpected = plain.load_state_dict(lora.merged(lora.layers(model), weights), strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora" in name or "mlp" in name]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_usual_layers_are_those_of_peft() -> None:
    model = setups.prepare(setups.bert(), lora=LoraSettings())
    names = trainable(model)
    assert {name for name in names if ".lora_" not in name} == {"classifier.weight", "classifier.bias"}
    kinds = {name.split(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    assert kinds == {"query", "value"}


def test_what_is_frozen_or_tied_gets_no_adapter() -> None:
    model = setups.prepare(
        setups.bert(), lora=LoraSettings(modules=["*.attention.*"]), freeze=("encoder.layer[:2]",)
    )
    adapted = [name for name in trainable(model) if ".lora_" in name]
    assert adapted
    assert not [name for name in adapted if ".layer.0." in name or ".layer.1." in name]
    everywhere = setups.prepare(gpt(), lora=LoraSettings(modules=["*"]))
    assert not [name for name in trainable(everywhere) if "lm_head" in name or "wte" in name]
    apart = setups.prepare(gpt(tied=False), lora=LoraSettings(modules=["*"]))
    assert [name for name in trainable(apart) if "lm_head" in name]


@pytest.mark.parametrize(
    ("settings", "freeze", "words"),
    [
        ({"modules": ["*.querys"]}, (), r"`\*\.querys` matches no module"),
        ({"modules": ["embeddings"]}, (), "no linear layer gets an adapter"),
        ({"modules": ["encoder.layer[0]"]}, ("encoder.layer[0]",), "no linear layer gets an adapter"),
        ({"train": ["head"]}, (), "`head` matches no module"),
    ],
)
def test_patterns_that_choose_nothing_are_told(
    settings: dict[str, Any], freeze: tuple[str, ...], words: str
) -> None:
    with pytest.raises(NotApplicable, match=words):
        setups.prepare(setups.bert(), lora=LoraSettings(**settings), freeze=freeze)


def test_a_model_that_peft_does_not_know_needs_patterns() -> None:
    with pytest.raises(NotApplicable, match="peft does not know which layers of `Sequential`"):
        setups.prepare(torch.nn.Sequential(torch.nn.Linear(2, 2)), lora=LoraSettings())
    model = setups.prepare(torch.nn.Sequential(torch.nn.Linear(2, 2)), lora=LoraSettings(modules=["0"]))
    assert trainable(model) == {"0.lora_A.default.weight", "0.lora_B.default.weight"}


def facts(trained: dict[str, bool]) -> Facts:
    return Facts(
        gradient_accumulation_steps=1,
        zero_stage=0,
        max_grad_norm=None,
        dynamic_loss_scale=None,
        loss_scale=None,
        offload_optimizer="none",
        offload_parameters="none",
        trainable=trained,
        parameter_dtypes={},
        states=(),
    )


@pytest.mark.parametrize(
    ("trained", "told"),
    [
        ({"a.base_layer.weight": False, "a.lora_A.default.weight": True}, []),
        ({"a.weight": True}, ["there is no adapter, the job asks for LoRA"]),
        ({"a.lora_A.default.weight": False}, ["the adapter `a.lora_A.default.weight` is not trained"]),
        (
            {"a.base_layer.weight": True, "a.lora_A.default.weight": True},
            ["`a.base_layer.weight` is trained, and has an adapter for that"],
        ),
    ],
)
def test_the_check_after_the_first_step(trained: dict[str, bool], told: list[str]) -> None:
    assert list(lora.TECHNIQUE.verify(setups.setup(lora=LoraSettings()), facts(trained))) == told


def test_peft_that_is_missing_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = [
        conflict
        for technique in TECHNIQUES
        for conflict in technique.conflicts(setups.setup(lora=LoraSettings()))
    ]
    assert [conflict.key for conflict in told] == ["strategy.lora"]
    assert "pip install memlaunch[lora]" in told[0].hint
