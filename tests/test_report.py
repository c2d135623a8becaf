"""The report: what a page shows of runs whole and broken; that it stands alone; how a browser takes it."""

import contextlib
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlaunch.launcher import report, resolve, rundir, translate
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.report import history, plots
from memlaunch.launcher.rundir import RunDir
from memlaunch.launcher.training import loop

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews"
MEMLAUNCH = [sys.executable, "-m", "memlaunch.launcher.cli"]
SECRET = "hunter2-is-no-password"
HOSTILE = (
    "</title></style><script>document.title='owned'</script><img src=x onerror=alert(1)> $x_1$ {{ 7 * 7 }}"
)
GIB = 1 << 30

Make = Callable[..., RunDir]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a run folder: a resolved job, and what has been written about it."""

    def folder(*sets: str, steps: int = 0, written: Any = None) -> RunDir:
        chosen = "training.micro_batch_size=16"
        resolved = resolve.load(
            REVIEWS / "job.json", [f"output.dir={tmp_path}", f"cluster.env.TOKEN={SECRET}", chosen, *sets]
        )
        run = rundir.create(tmp_path, resolved.job.name)
        run.place(translate.files(resolved))
        run.job.write_text(json.dumps(written or json.loads((REVIEWS / "job.json").read_text())))
        if steps:
            run.append_event(
                "started", model="BertForSequenceClassification", parameters=22713986, trainable=19165058,
                world_size=2, device="CPU", steps=steps, steps_per_epoch=149, torch="2", transformers="5",
            )  # fmt: skip
            for number in range(1, steps + 1):
                run.append_metrics(step(number))
        return run

    return folder


def step(number: int, **changes: Any) -> dict[str, Any]:
    values = {
        "step": number, "epoch": number / 149, "learning_rate": 1e-3, "loss": 1 / number, "grad_norm": 0.5,
        "loss_scale": None, "skipped": False, "samples": 64, "tokens": 900, "padded_tokens": 1000,
        "idle_share": 0.04, "peak_memory_bytes": None, "step_seconds": 0.5, "tokens_per_second": 1800.0,
    }  # fmt: skip
    return {**values, **changes}


def text(run: RunDir, *others: RunDir) -> str:
    return report.page([history.read(one.path) for one in (run, *others)])


class Page(HTMLParser):
    """The elements of a page, and the words between them."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words += data

    def titles(self) -> list[str]:
        return re.findall(r"^[A-Za-z].*$", self.words, re.MULTILINE)


def pictures(source: str) -> int:
    return sum(tag == "svg" for tag, _ in Page(source).elements)


# What a page shows


def test_the_page_of_a_run_has_its_figures_its_curves_and_its_job(make: Make) -> None:
    run = make(steps=60)
    run.append_metrics({"step": 60, "epoch": 0.4, "eval_loss": 0.375, "eval_accuracy": 0.8127})
    run.append_event("finished", steps=60)
    page = Page(text(run))
    for words in (
        "BertForSequenceClassification, 22,713,986 parameters, 19,165,058 trainable; 2 ranks on CPU",
        "DeepSpeed ZeRO-2, fp32, 8-bit AdamW, full checkpointing",
        "finished", "0.8127", "0.375", "1,800", "10 %", "4 %", "500 ms",
        "strategy.optimizer.bits", "training.global_batch_size",
    ):  # fmt: skip
        assert words in page.words, words
    titles = page.titles()
    for title in ("loss", "learning rate", "evaluation: accuracy", "padding and idle share, % of tokens"):
        assert any(found.startswith(title) for found in titles), title
    assert "loss scale" not in titles, "there was none"
    assert "peak of allocated memory" not in page.words, "a CPU cannot tell"


def test_skipped_steps_are_marked_and_counted(make: Make) -> None:
    run = make(steps=0)
    for number in range(1, 31):
        over = number % 10 == 0
        grad_norm = None if over else 1.0
        run.append_metrics(step(number, loss_scale=2.0**number, skipped=over, grad_norm=grad_norm))
    page = text(run)
    assert Page(page).words.count("skipped step") == 2, "at the gradient norm and at the loss scale"
    assert history.read(run.path).figures()["skipped"] == 3


def test_the_time_of_a_step_is_split_as_far_as_it_was_measured(make: Make) -> None:
    run = make(steps=3)
    assert history.read(run.path).parts() == {}
    assert "where the time goes" not in text(run)
    run.metrics.unlink()
    for number in range(1, 12):
        slow = 10.0 if number == 1 else 0.5
        run.append_metrics(step(number, data_seconds=0.1, forward_seconds=0.2, step_seconds=slow))
    run.append_event("checkpoint", step=5, bytes=1, seconds_stalled=1.1, seconds_written=2.0)
    parts = history.read(run.path).parts()
    assert parts == pytest.approx({"data": 0.1, "forward": 0.2, "other": 0.2, "checkpoint": 0.1})
    page = Page(text(run))
    assert "where the time goes" in page.words
    assert "optimizer" not in page.titles(), "nobody measured it"


def test_predicted_memory_stands_beside_what_was_measured(make: Make) -> None:
    run = make(steps=0)
    for number in range(1, 4):
        run.append_metrics(step(number, peak_memory_bytes=3 * GIB))
    run.plan.write_text(
        json.dumps(
            {
                "gpu": "H100-80GB",
                "gpu_memory_bytes": 80 * GIB,
                "peak_allocated_bytes": 2.5 * GIB,
                "peak_reserved_bytes": 4 * GIB,
                "breakdown": {"parameters": GIB, "optimizer_states": 1.5 * GIB},
                "chosen": [],
            }
        )
    )
    words = " ".join(Page(text(run)).words.split())
    assert "dashed: predicted" in words
    assert "optimizer states1.50 GiB60 %" in words
    assert "predicted: 2.50 GiB allocated, 4.00 GiB reserved; measured: 3.00 GiB allocated" in words


def test_what_was_auto_is_told_with_its_reason(make: Make) -> None:
    written = json.loads((REVIEWS / "job.json").read_text())
    written["training"]["micro_batch_size"] = "auto"
    run = make(written=written)
    why = "16 samples would need 90 GiB"
    chosen = [{"key": "training.micro_batch_size", "value": 8, "why": why}]
    run.plan.write_text(json.dumps({"chosen": chosen}))
    found = {setting.key: setting for setting in history.read(run.path).settings()}
    assert (found["training.micro_batch_size"].origin, found["training.micro_batch_size"].why) == (
        "auto",
        why,
    )
    assert found["strategy.engine"].origin == "job file"
    assert found["strategy.activation_checkpointing.mode"].origin == "job file", "a string stands for it"
    assert found["training.seed"].origin == ""
    assert why in Page(text(run)).words


def test_values_of_environment_variables_are_on_no_page(make: Make) -> None:
    run, other = make(), make("cluster.env.TOKEN=another-that-is-none")
    page = text(run, other)
    assert "cluster.env.TOKEN" in page, "that they differ is told"
    assert SECRET not in page
    assert "another-that-is-none" not in page


def test_the_time_line_has_every_attempt(make: Make) -> None:
    run = make()
    written = [
        ("started", {"world_size": 2}), ("checkpoint", {"step": 5, "seconds_stalled": 0.1}),
        ("failed", {"rank": 1, "host": "a", "exit_code": 5, "message": "gone", "hint": ""}),
        ("restarted", {"step": 7, "left": 0, "because": "gone"}), ("resumed", {"step": 5}),
        ("started", {"world_size": 2}), ("finished", {}),
    ]  # fmt: skip
    lines = [{"event": name, "time": 100.0 + 60 * at, **more} for at, (name, more) in enumerate(written)]
    run.events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = history.read(run.path)
    assert read.attempts() == [history.Attempt(0, 120, "failed"), history.Attempt(300, 360, "finished")]
    line = plots.timeline(read)
    assert line is not None
    assert [words for _, words in line.key] == ["checkpoint", "until it failed", "until it finished"]


# Several runs


def test_several_runs_are_compared_on_one_page(make: Make, tmp_path: Path) -> None:
    runs = [make(f"training.learning_rate={rate}", steps=30) for rate in (1e-4, 2e-4, 3e-4)]
    page = text(*runs)
    words = Page(page).words
    assert "3 runs" in words
    for run in runs:
        assert words.count(run.path.name) >= 4, "in the table, over the differences, the key and its own part"
    read = [history.read(run.path) for run in runs]
    assert history.differences(read) == [("training.learning_rate", ["0.0001", "0.0002", "0.0003"])]
    loss = plots.of(read)[0]
    assert [f"var(--c{number})" in loss.svg for number in range(4)] == [True, True, True, False]


def test_the_command_prints_where_the_page_is(make: Make, tmp_path: Path) -> None:
    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        argv = [*MEMLAUNCH, "report", *map(str, arguments)]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    run, other = make(steps=3), make(steps=4)
    done = command(run.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run.report}\n", "")
    assert run.report.read_text().startswith("<!doctype html>")
    out = tmp_path / "compared.html"
    assert command(run.path, other.path, "--out", out).stdout == f"{out}\n"
    assert "2 runs" in out.read_text()
    done = command(run.path, other.path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "name a file with `--out`" in done.stderr
    done = command(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not a run folder" in done.stderr


def test_a_place_that_cannot_be_written_to_is_told(make: Make, tmp_path: Path) -> None:
    run = make(steps=3)
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        report.write([run.path], tmp_path / "nowhere" / "page.html")


# Runs that are not whole


def test_a_run_that_has_just_begun_has_a_page(make: Make) -> None:
    words = Page(text(make())).words
    assert "The ranks have not begun to train." in words
    assert "No step has been made yet." in words


def test_a_run_that_failed_shows_who_how_and_the_last_words(make: Make) -> None:
    run = make(steps=5)
    hint = "lower `training.micro_batch_size`"
    run.append_event("failed", rank=1, host="worker-2", exit_code=3, message="out of memory", hint=hint)
    run.rank_log(1).write_text("".join(f"line {number}\n" for number in range(100)))
    words = Page(text(run)).words
    for told in ("Rank 1 on worker-2 failed", "out of memory", hint, "line 99", "failed"):
        assert told in words
    assert "line 9\n" not in words


def test_broken_lines_are_passed_over(make: Make) -> None:
    run = make(steps=8)
    for path in (run.metrics, run.events):
        with path.open("ab") as file:
            file.write(b'\0\0\0\0\0\n\xff\xfe\n{"step": 9, "lo\n{"step": 10, "loss": 0.')
    run.plan.write_text('{"chosen": [')
    run.job.write_text("")
    read = history.read(run.path)
    assert [line["step"] for line in read.steps] == list(range(1, 9))
    assert "8" in Page(text(run)).words


def test_a_run_without_a_number_that_is_finite_has_a_page(make: Make) -> None:
    run = make()
    for number in range(1, 40):
        run.append_metrics(step(number, loss=math.nan, grad_norm=math.inf, tokens=0, padded_tokens=0))
    assert pictures(text(run)) >= 2


def test_a_script_has_a_page_without_curves(make: Make, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    job = {
        "name": "mine",
        "script": str(script),
        "cluster": {"device": "cpu"},
        "output": {"dir": str(tmp_path)},
    }
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    run = rundir.create(tmp_path, "mine")
    run.place(translate.files(resolve.load(path)))
    run.append_event("started", script=str(script), world_size=2)
    run.append_event("finished")
    words = Page(text(run)).words
    assert f"the script {script}, 2 ranks" in words
    assert "writes no metrics here" in words


# A page stands alone


def hostile(make: Make) -> RunDir:
    """A run in which every text that others may have written would change a page that trusted it."""
    run = make(steps=30)
    resolved = json.loads(run.resolved.read_text())
    resolved["name"] = HOSTILE
    resolved["model"]["config"] = {HOSTILE: HOSTILE}
    resolved["strategy"]["freeze"] = [HOSTILE]
    run.resolved.write_text(json.dumps(resolved))
    run.append_metrics(step(31, **{f"{HOSTILE}_seconds": 0.1, "data_seconds": 0.1}))
    run.append_metrics({"step": 31, "epoch": 1, "eval_loss": 1.0, f"eval_{HOSTILE}": 2.0})
    run.append_event(HOSTILE, **{HOSTILE: HOSTILE})
    run.append_event("checkpoint", step=30, seconds_stalled=0.1)
    why = {"chosen": [{"key": "training.seed", "value": HOSTILE, "why": HOSTILE}]}
    run.plan.write_text(json.dumps({"gpu": HOSTILE, "breakdown": {HOSTILE: 3, "b": 1}, **why}))
    said = {"rank": 0, "host": HOSTILE, "message": HOSTILE, "hint": HOSTILE, "key": HOSTILE}
    run.append_event("failed", exit_code=5, **said)
    run.rank_log(0).write_text(f"{HOSTILE}</pre>\n" * 3)
    return run


def test_no_text_of_a_run_becomes_a_part_of_the_page(make: Make) -> None:
    run = hostile(make)
    for source in (text(run), text(run, make(steps=3))):
        page = Page(source)
        tags = {tag for tag, _ in page.elements}
        assert not tags & {"script", "img", "iframe", "object", "embed", "form", "base"}
        assert HOSTILE in page.words
        assert "49" not in page.titles(), "a template inside a name is text"
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(HOSTILE not in plot.svg for plot in plots.of([history.read(run.path)]))


def test_the_page_refers_to_nothing_outside_itself(make: Make) -> None:
    source = text(make(steps=60))
    page = Page(source)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, name, value)
    assert "http" not in source.replace("http-equiv", ""), "not even as the name of a format"
    assert "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    policies = [a.get("content") for tag, a in page.elements if "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


# Curves

numbers = st.floats(-1e6, 1e6) | st.just(math.nan)


@given(st.lists(numbers, min_size=1, max_size=300), st.integers(2, 50))
def test_a_thinner_curve_keeps_to_the_values_and_their_order(values: list[float], points: int) -> None:
    steps, thin = plots._thin(list(range(len(values))), values, points)
    assert len(steps) == len(thin) == min(points, len(values))
    assert list(steps) == sorted(steps)
    finite = [value for value in values if math.isfinite(value)]
    kept = [value for value in thin if math.isfinite(value)]
    assert bool(kept) == bool(finite)
    assert all(min(finite) - 1e-6 <= value <= max(finite) + 1e-6 for value in kept)


@given(st.lists(numbers, min_size=1, max_size=300))
def test_a_smooth_curve_is_a_mean_of_neighbours(values: list[float]) -> None:
    smooth = plots._smooth(values)
    reach = max(2, len(values) // 80)
    for at, value in enumerate(smooth):
        near = min(reach, at, len(values) - 1 - at)
        around = [v for v in values[at - near : at + near + 1] if math.isfinite(v)]
        if around:
            assert value == pytest.approx(sum(around) / len(around), rel=1e-6, abs=1e-3)
        else:
            assert math.isnan(value)


# A real run, in a real browser


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> RunDir:
    """A run of a tiny model on two ranks, whose report is the one that the run itself has left."""
    folder = tmp_path_factory.mktemp("real")
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    job = {
        "model": {"architecture": "bert", "config": config, "tokenizer": str(tokenizer_folder)},
        "data": {
            "train": str(REVIEWS / "train.jsonl"),
            "eval": str(REVIEWS / "eval.jsonl"),
            "max_length": 24,
        },
        "training": {
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 40,
            "eval_every_steps": 10,
            "eval_micro_batch_size": 64,
        },
        "cluster": {"gpus_per_node": 2, "device": "cpu", "threads_per_rank": 1},
        "output": {"checkpoint_every_steps": 10},
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    done = subprocess.run([*MEMLAUNCH, "run", path], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return RunDir(Path(done.stdout.strip()))


def test_a_run_leaves_its_report(real_run: RunDir) -> None:
    words = Page(real_run.report.read_text()).words
    assert "finished" in words
    assert "40" in words
    parts = history.read(real_run.path).parts()
    assert set(parts) == {
        "data", "communication", "forward", "backward", "optimizer", "other", "checkpoint",
    }  # fmt: skip
    assert [part for part in parts if part not in words] == []


def test_the_parts_of_a_step_are_within_its_time(real_run: RunDir) -> None:
    lines = [line for line, _ in rundir.read_lines(real_run.metrics) if "loss" in line]
    for line in lines:
        parts = {key: v for key, v in line.items() if key.endswith("_seconds") and key != "step_seconds"}
        assert len(parts) == 5
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) <= line["step_seconds"] + 1e-5
        assert 0 <= line["idle_share"] < 1


def test_the_idle_share_is_what_the_slowest_of_each_micro_step_makes_the_others_wait() -> None:
    first, second = [10.0, 20.0], [30.0, 10.0]  # of a rank each
    assert loop._idle_share([*first, *second], ranks=2) == pytest.approx(1 - 70 / (2 * (30 + 20)))
    assert loop._idle_share([5.0, 7.0], ranks=1) == 0
    assert loop._idle_share([0.0, 0.0], ranks=2) == 0


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium")
    if found is None:
        assert not os.environ.get("MEMLAUNCH_REQUIRE_BROWSER"), "there is no chromium"
        pytest.skip("there is no chromium: apt-get install chromium")
    return found


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(address of ``folder`` on this machine, the paths that have been asked for)."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *about: Any) -> None:
            super().__init__(*about, directory=str(folder))

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *about: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def browse(chromium: str, address: str, scratch: Path, *options: str) -> tuple[str, list[str]]:
    """(what it prints, what its console says) of a page that is loaded."""
    scratch.mkdir(exist_ok=True)
    argv = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={scratch / 'profile'}", "--enable-logging=stderr", *options, address,
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120, cwd=scratch)
    return done.stdout, [
        line for line in done.stderr.splitlines() if ":CONSOLE:" in line or "CONSOLE(" in line
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_the_page_and_loads_nothing_else(
    real_run: RunDir, chromium: str, tmp_path: Path, theme: str
) -> None:
    from PIL import Image

    picture = tmp_path / "page.png"
    with served(real_run.path) as (address, asked):
        scheme = f"--blink-settings=preferredColorScheme={int(theme == 'light')}"
        options = ["--window-size=1280,2400", f"--screenshot={picture}", scheme]
        _, console = browse(chromium, f"{address}/report.html", tmp_path / "browser", *options)
    assert console == []
    assert asked == ["/report.html"]
    with Image.open(picture) as shown:
        assert shown.size == (1280, 2400)
        seen = shown.convert("RGB").getcolors(1 << 24)
    assert seen is not None
    colours = {colour: count for count, colour in seen}
    (page,) = (c for c, count in colours.items() if count == max(colours.values()))
    assert (sum(page) > 600) == (theme == "light"), "the page is as light as the reader wants it"
    curve = {"light": (47, 111, 219), "dark": (110, 162, 255)}[theme]
    assert colours.get(curve, 0) > 500, "curves are drawn in the colour of the first run"


def test_a_browser_runs_nothing_that_a_name_holds(make: Make, chromium: str, tmp_path: Path) -> None:
    run = hostile(make)
    report.write([run.path])
    with served(run.path) as (address, asked):
        dom, console = browse(chromium, f"{address}/report.html", tmp_path / "browser", "--dump-dom")
    assert console == []
    assert asked == ["/report.html"]
    assert "owned" not in re.findall(r"<title>(.*?)</title>", dom, re.DOTALL)[0].replace("'owned'", "")
    assert not re.search(r"<(script|img)\b", dom)


def test_the_browser_would_tell_of_an_error_and_of_what_it_loads(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("<!doctype html><link rel=icon href=data:,><img src=x.png><script>throw 'ouch'</script>")
    with served(tmp_path) as (address, asked):
        dom, console = browse(chromium, f"{address}/report.html", tmp_path / "browser", "--dump-dom")
    assert "<script>" in dom
    assert asked == ["/report.html", "/x.png"]
    assert any("ouch" in line for line in console)
