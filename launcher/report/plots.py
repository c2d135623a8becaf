"""Histories as pictures: SVG that stands in a page, takes the page's colours, and holds no text of a run."""

import io
import logging
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memlaunch.launcher.report.history import History, part_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Points of a curve; more cannot be seen.
POINTS = 600
GIB = 1 << 30

#: Colours that matplotlib is given, and the variables of the page that take their place.
_COLOURS = {
    **{f"#f0f0{number:02x}": f"var(--c{number})" for number in range(10)},
    "#f1f100": "var(--ink)",
    "#f1f101": "var(--faint)",
    "#f1f102": "var(--bad)",
    "#f1f103": "var(--good)",
}
SERIES = tuple(list(_COLOURS)[:10])
_INK, _FAINT, _BAD, _GOOD = list(_COLOURS)[10:]

_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.formatter.limits": (-4, 6),
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "font.size": 8,
    "lines.linewidth": 1.4,
}


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        title: what is shown, with its unit.
        svg: the picture, as an element of a page.
        key: (colour, words) of what is not a run.
    """

    title: str
    svg: str
    key: Sequence[tuple[str, str]] = ()


def of(histories: Sequence[History]) -> list[Plot]:
    """All pictures of the runs for which they measured something."""
    with _style():
        plots = [draw(histories) for draw in (_loss, *_evaluations(histories), *_REST)]
    return [plot for plot in plots if plot is not None]


def timeline(history: History) -> Plot | None:
    """Attempts, checkpoints and ends of a run, over the time since its first event."""
    attempts = history.attempts()
    if not attempts:
        return None
    with _style():
        long = attempts[-1].until > 180
        unit = 60.0 if long else 1.0
        figure, axes = _axes("minutes" if long else "seconds", height=1.0, width=11.4)
        for attempt in attempts:
            colour = {"finished": _GOOD, "stopped": SERIES[1], "preempted": SERIES[1], None: SERIES[0]}.get(
                attempt.end, _BAD
            )
            span = (attempt.begin / unit, max(attempt.until - attempt.begin, 0.1) / unit)
            axes.broken_barh([span], (0.2, 0.6), color=colour, alpha=0.55, linewidth=0)
        saved = [history.at(event) / unit for event in history.events if event["event"] == "checkpoint"]
        again = [history.at(event) / unit for event in history.events if event["event"] == "restarted"]
        axes.plot(saved, [0.5] * len(saved), "|", color=_INK, markersize=14)
        axes.plot(again, [0.5] * len(again), "v", color=_BAD, markersize=6)
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    key = [(_COLOURS[_INK], "checkpoint")] if saved else []
    ends = {attempt.end for attempt in attempts}
    if ends & {"stopped", "preempted"}:
        key.append((_COLOURS[SERIES[1]], "until it was stopped"))
    if ends - {None, "finished", "stopped", "preempted"}:
        key.append((_COLOURS[_BAD], "until it failed"))
    if "finished" in ends:
        key.append((_COLOURS[_GOOD], "until it finished"))
    if None in ends:
        key.append((_COLOURS[SERIES[0]], "without an end that was told"))
    return Plot("time line", _svg(figure, "timeline"), key)


def _style() -> AbstractContextManager[None]:
    """Our style, whatever the user has set for pictures of their own."""
    import matplotlib as mpl

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its caches
    style: Any = {**mpl.rcParamsDefault, **_RC}
    return mpl.rc_context(style)


def _loss(histories: Sequence[History]) -> Plot | None:
    drawn = _curves(histories, "loss", smooth=True, evaluation="eval_loss")
    evaluated = any(history.series("eval_loss")[0] for history in histories)
    key = [(_COLOURS[_INK], "dots: evaluation")] if evaluated else []
    if any(event["event"] == "resumed" for history in histories for event in history.events):
        key.append((_COLOURS[_INK], "dotted line: went on from a checkpoint"))
    return None if drawn is None else Plot("loss", _svg(drawn, "loss"), key)


def _evaluations(histories: Sequence[History]) -> list[Callable[[Sequence[History]], Plot | None]]:
    """A picture for each figure of the evaluations, but the loss."""
    keys = dict.fromkeys(
        key
        for history in histories
        for line in history.evaluations
        for key in line
        if re.fullmatch(r"eval_[a-z0-9_]+", key) and key != "eval_loss"
    )
    return [
        _curve(key, f"evaluation: {key.removeprefix('eval_').replace('_', ' ')}", dots=True) for key in keys
    ]


def _curve(
    key: str,
    title: str,
    *,
    scale: float = 1.0,
    smooth: bool = False,
    logarithm: int | None = None,
    from_zero: bool = False,
    skipped: bool = False,
    dots: bool = False,
) -> Callable[[Sequence[History]], Plot | None]:
    """What draws one key of the metrics, and the steps that were skipped."""

    def draw(histories: Sequence[History]) -> Plot | None:
        figure = _curves(histories, key, scale=scale, smooth=smooth, dots=dots)
        if figure is None:
            return None
        axes = figure.axes[0]
        if logarithm is not None:
            values = [v for history in histories for v in history.series(key)[1] if v > 0]
            if values and (logarithm == 2 or max(values) > 50 * min(values)):
                axes.set_yscale("log", base=logarithm)
                _plain_ticks(axes)
        elif from_zero:
            axes.set_ylim(bottom=0)
        any_skipped = False
        for colour, history in zip(SERIES * len(histories), histories, strict=False):
            marks = [line["step"] for line in history.steps if skipped and line.get("skipped")]
            any_skipped |= bool(marks)
            axes.plot(
                marks,
                [0.03] * len(marks),
                "|",
                transform=axes.get_xaxis_transform(),
                color=_BAD if len(histories) == 1 else colour,
                markersize=9,
                markeredgewidth=1.6,
            )
        words = (
            (_COLOURS[_BAD], "skipped step") if len(histories) == 1 else (_COLOURS[_INK], "marks: skipped")
        )
        return Plot(title, _svg(figure, key), [words] if any_skipped else [])

    return draw


def _share(histories: Sequence[History]) -> Plot | None:
    """Padding, and what ranks wait for each other."""
    figure, axes = _axes("step")
    drawn, waits = False, False
    for colour, history in zip(SERIES * len(histories), histories, strict=False):
        lines = [line for line in history.steps if line.get("padded_tokens")]
        steps = [line["step"] for line in lines]
        if steps:
            drawn = True
            axes.plot(*_thin(steps, [100 * history.share(line) for line in lines]), color=colour)
        steps, idle = history.series("idle_share")
        if steps and history.started.get("world_size", 1) > 1:
            waits = True
            axes.plot(*_thin(steps, [100 * share for share in idle]), color=colour, linestyle=(0, (2, 1.5)))
    axes.set_ylim(bottom=0)
    if not drawn:
        return None
    title = "padding and idle share, % of tokens" if waits else "padding, % of tokens"
    return Plot(title, _svg(figure, "share"), [(_COLOURS[_INK], "dashed: idle")] if waits else [])


def _memory(histories: Sequence[History]) -> Plot | None:
    figure = _curves(histories, "peak_memory_bytes", scale=1 / GIB)
    if figure is None:
        return None
    axes = figure.axes[0]
    predicted = False
    for colour, history in zip(SERIES * len(histories), histories, strict=False):
        if size := history.plan.get("peak_allocated_bytes"):
            predicted = True
            axes.axhline(size / GIB, color=colour, linestyle=(0, (4, 2)), linewidth=1)
    axes.set_ylim(bottom=0)
    key = [(_COLOURS[_INK], "dashed: predicted")] if predicted else []
    return Plot("peak of allocated memory, GiB of the fullest rank", _svg(figure, "memory"), key)


def _parts(histories: Sequence[History]) -> Plot | None:
    """The time of a step: by part for one run, where the parts were measured, else as a whole."""
    lines = [line for line in histories[0].steps[1:] if line.get("step_seconds")]
    names = part_names(lines)
    if len(histories) > 1 or not names:
        draw = _curve("step_seconds", "time of a step, ms", scale=1000, smooth=True, from_zero=True)
        return draw(histories)
    figure, axes = _axes("step")
    steps = [line["step"] for line in lines]
    columns = [_thin(steps, [1000 * (line.get(name) or 0.0) for line in lines], 120) for name in names]
    axes.stackplot(
        columns[0][0],
        [values for _, values in columns],
        colors=SERIES[: len(names)],
        alpha=0.75,
        linewidth=0,
    )
    axes.set_ylim(bottom=0)
    key = [
        (_COLOURS[colour], name.removesuffix("_seconds"))
        for colour, name in zip(SERIES, names, strict=False)
        if re.fullmatch(r"\w+", name)
    ]
    return Plot("time of a step by part, ms", _svg(figure, "parts"), key)


_REST = (
    _curve("learning_rate", "learning rate", from_zero=True),
    _curve("grad_norm", "gradient norm, before clipping", smooth=True, logarithm=10, skipped=True),
    _curve("loss_scale", "loss scale", logarithm=2, skipped=True),
    _curve("tokens_per_second", "real tokens a second", smooth=True, from_zero=True),
    _parts,
    _share,
    _memory,
)


def _curves(
    histories: Sequence[History],
    key: str,
    *,
    scale: float = 1.0,
    smooth: bool = False,
    evaluation: str | None = None,
    dots: bool = False,
) -> "Figure | None":
    """One curve a run, or None where no run has measured ``key``.

    Args:
        smooth: the curve is a mean of neighbours, over a pale one of what was measured.
        evaluation: a key whose values are drawn as dots.
        dots: mark each value.
    """
    figure, axes = _axes("step")
    drawn = False
    for colour, history in zip(SERIES * len(histories), histories, strict=False):
        steps, values = history.series(key)
        if any(map(math.isfinite, values)):
            drawn = True
            scaled = [scale * value for value in values]
            if smooth and len(values) > 20:
                axes.plot(*_thin(steps, scaled), color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(*_thin(steps, _smooth(scaled)), color=colour)
            else:
                # A single value is no line.
                marked = dots or len(values) == 1
                axes.plot(*_thin(steps, scaled), color=colour, marker="o" if marked else "", markersize=3.5)
        if evaluation is not None:
            steps, values = history.series(evaluation)
            if any(map(math.isfinite, values)):
                drawn = True
                axes.plot(
                    steps, values, "o-", color=colour, markeredgecolor=_INK, linewidth=0.8, markersize=4.5
                )
    _mark_attempts(axes, histories)
    return figure if drawn else None


def _mark_attempts(axes: "Axes", histories: Sequence[History]) -> None:
    """Dotted lines behind the steps from which a run went on."""
    for history in histories:
        for event in history.events:
            if event["event"] == "resumed":
                axes.axvline(event["step"] + 0.5, color=_INK, linestyle=":", linewidth=0.8, alpha=0.7)


def _axes(label: str, *, height: float = 2.3, width: float = 5.6) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(label)
    _plain_ticks(axes)
    axes.margins(x=0.02)
    if label == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _plain_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import NullFormatter

    axes.yaxis.set_major_formatter(lambda value, place: f"{value:,.6g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(figure: "Figure", salt: str) -> str:
    """The figure as an element of a page; names in it that refer to each other are this picture's own."""
    import matplotlib as mpl

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    return re.sub(r"#f[01]f[01]0[0-9a-f]", lambda found: _COLOURS.get(found[0], found[0]), text)


def _thin(
    steps: Sequence[int], values: Sequence[float], points: int = POINTS
) -> tuple[Sequence[float], Sequence[float]]:
    """A curve of at most so many points, each the mean of its neighbours; NaN where all are."""
    import numpy as np

    if len(steps) <= points:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), points)
    x, y = np.asarray(steps, float), np.asarray(values, float)
    finite = np.isfinite(y)
    means = [float(y[part][finite[part]].mean()) if finite[part].any() else math.nan for part in parts]
    return [float(x[part].mean()) for part in parts], means


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over a fortieth of the curve around each value, and over less towards the ends."""
    import numpy as np

    y = np.asarray(values, float)
    finite = np.isfinite(y)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(finite, y, 0.0), finite))
    at = np.arange(len(y))
    reach = np.minimum(np.minimum(at, len(y) - 1 - at), max(2, len(y) // 80))
    low, high = at - reach, at + reach + 1
    number = counts[high] - counts[low]
    return [
        float(total / n) if n else math.nan for total, n in zip(sums[high] - sums[low], number, strict=True)
    ]
