"""The report: one page of HTML that shows what became of a run, or of several side by side.

The page stands alone. It loads nothing, runs no script, and its text is escaped, whatever names it shows.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from memlaunch.launcher.errors import UserError
from memlaunch.launcher.report import history as histories
from memlaunch.launcher.report.history import History

if TYPE_CHECKING:
    from markupsafe import Markup

    from memlaunch.launcher.report.plots import Plot

#: Colours of curves on a page; runs beyond them begin again.
COLOURS = 10

#: Key of :meth:`History.figures` -> how a table calls it; evaluations come in between.
_FIGURES = {
    "state": "state",
    "progress": "steps",
    "skipped": "skipped",
    "loss": "last loss",
    "tokens_per_second": "tokens/s",
    "step_seconds": "a step",
    "padding": "padding",
    "idle": "idle",
    "peak_memory_bytes": "peak memory",
    "predicted_memory_bytes": "predicted",
    "seconds": "wall time",
}


def write(runs: Sequence[Path], out: Path | None = None, *, ended: bool = False) -> Path:
    """Write the report on ``runs`` and return where it is: ``out``, by default in the folder of the one run.

    Args:
        ended: whether they have, although this process is the one that started them.

    Raises:
        UserError: one of them is no run folder, or there is no place for the page.
    """
    read = [histories.read(path, ended=ended) for path in runs]
    if out is None and len(read) > 1:
        raise UserError("several runs share no folder for the report", "name a file with `--out`")
    path = read[0].folder.report if out is None else out
    partial = path.with_name(f"{path.name}.partial")
    text = page(read)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"`{path}` cannot be written: {error.strerror}", "name a file with `--out`") from None
    return path


def page(runs: Sequence[History]) -> str:
    """The page on ``runs``, of which there is at least one."""
    import jinja2

    from memlaunch.launcher.report import plots

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": _bytes, "seconds": _seconds, "share": _share, "short": _short}
    environment.filters |= {"moment": _moment, "picture": _picture}
    return environment.get_template("page.html.j2").render(
        runs=runs,
        colours=[f"var(--c{number % COLOURS})" for number in range(len(runs))],
        plots=plots.of(runs),
        timelines=[plots.timeline(run) for run in runs],
        columns=_columns(runs),
        rows=[_row(run) for run in runs],
        differences=histories.differences(runs) if len(runs) > 1 else [],
    )


def _columns(runs: Sequence[History]) -> dict[str, str]:
    """Key -> name of the figures that at least one run has; of skipped steps where there are some."""
    rows = [_row(run) for run in runs]
    evaluated = dict.fromkeys(key for row in rows for key in row if key.startswith("eval_"))
    names: dict[str, str] = {}
    for key, name in _FIGURES.items():
        names[key] = name
        if key == "loss":
            names |= {key: key.replace("_", " ").replace("eval", "eval.") for key in evaluated}
    return {
        key: name for key, name in names.items() if any(row.get(key) not in (None, "", "0") for row in rows)
    }


def _row(run: History) -> dict[str, str | None]:
    """The figures of a run as text; None for what was not measured."""
    figures = run.figures()
    row: dict[str, str | None] = {"state": str(run.status["state"])}
    step, steps = figures.pop("step"), figures.pop("steps")
    row["progress"] = f"{step:,}" if steps in (None, step) else f"{step:,} / {steps:,}"
    for key, value in figures.items():
        if value is None:
            row[key] = None
        elif key.endswith("_bytes"):
            row[key] = _bytes(value)
        elif key in ("step_seconds", "seconds"):
            row[key] = _seconds(value)
        elif key in ("padding", "idle"):
            row[key] = _share(value)
        else:
            row[key] = _short(value)
    return row


def _picture(plot: "Plot") -> "Markup":
    from markupsafe import Markup

    return Markup(plot.svg)  # noqa: S704  it is ours, and holds no text of a run


def _bytes(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.3g} min" if minutes < 120 else f"{minutes / 60:.3g} h"


def _share(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _short(value: object) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
