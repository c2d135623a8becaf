"""The example of the README learns what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

EXAMPLE = Path(__file__).parents[1] / "examples" / "reviews"


@pytest.mark.long
def test_the_example_reaches_an_accuracy_of_070_and_saves_a_model_that_loads(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "memlaunch.launcher.cli", "run", str(EXAMPLE / "job.json")]
    done = subprocess.run(
        [*command, "--set", f"output.dir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.strip())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line["step_seconds"] for line in lines if "loss" in line)
    print(f"accuracy {lines[-1]['eval_accuracy']:.4f}, {seconds:.0f} s of training")
    assert lines[-1]["eval_accuracy"] > 0.70
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.config.num_labels == 2


def test_the_example_for_gpus_is_the_same_job_in_fp16_on_eight() -> None:
    job, gpu = (json.loads((EXAMPLE / name).read_text()) for name in ("job.json", "job-gpu.json"))
    assert gpu["strategy"].pop("precision") == {"dtype": "fp16", "loss_scale": "dynamic"}
    job["strategy"].pop("precision")
    assert gpu["strategy"] == job["strategy"]
    assert gpu["training"] == {**job["training"], "global_batch_size": 256}
    assert gpu["cluster"] == {"gpus_per_node": 8, "device": "cuda"}
    command = [sys.executable, "-m", "memlaunch.launcher.cli", "validate", str(EXAMPLE / "job-gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
