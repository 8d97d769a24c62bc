"""Learning curves of a race: one panel per task, median over seeds with the interquartile band."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from metaopt.evaluate.race import Entry, RaceResult

# Okabe and Ito's colour-blind-safe palette, without yellow (too faint on white); line styles tell further rounds apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_LOG_RATIO = 8.0  # a positive loss that falls by more than this is drawn on a log axis
_SMOOTH = 25  # curves are running means over 1/25 of a run


def figure_png(result: RaceResult) -> bytes:
    """The picture as PNG.

    A run that diverged counts as infinitely bad from that step on: the median curve stops, with a cross, where more
    than half of the seeds have diverged; the dots are losses on the valid split.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(result.tasks))
    rows = math.ceil(len(result.tasks) / columns)
    names = result.ranking
    legend_columns = min(len(names) + 1, 2 * columns)
    legend_height = 0.27 * math.ceil((len(names) + 1) / legend_columns) + 0.15
    size = (max(5.2, 4.2 * columns), 3.3 * rows + legend_height)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    styles = {
        name: {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _STYLES[i // len(_COLOURS) % len(_STYLES)]}
        for i, name in enumerate(sorted(names))
    }
    for panel, task in zip(axes, result.tasks, strict=False):
        _draw(panel, [(result.entries[name][task], styles[name]) for name in reversed(names)])
        panel.set_title(task, fontsize=10, loc="left")
    for panel in axes[len(result.tasks) :]:
        panel.set_visible(False)
    handles = [_line(label=name, linewidth=1.8, **styles[name]) for name in names]
    handles.append(_line(label="valid loss", color="0.35", linestyle="none", marker="o", markersize=3.5))
    if any(result.diverged(name) for name in names):
        handles.append(_line(label="most seeds diverged", color="0.35", linestyle="none", marker="X", markersize=6))
    figure.legend(handles=handles, loc="outside upper left", ncols=legend_columns, frameon=False, fontsize=8.5)
    target = io.BytesIO()
    canvas.print_png(target, metadata={"Software": "metaopt"})
    return target.getvalue()


def _draw(panel: Any, lines: list[tuple[Entry, dict[str, Any]]]) -> None:
    drawn = []
    for entry, style in lines:
        train = np.asarray(entry.train, dtype=np.float64)
        steps = np.arange(1, train.shape[1] + 1)
        low, middle, high = _quartiles(_running_mean(train))
        panel.plot(steps, _gaps(middle), linewidth=1.6, **style)
        panel.fill_between(steps, low, high, where=np.isfinite(high), color=style["color"], alpha=0.16, linewidth=0)
        dots = _gaps(_quartiles(np.asarray(entry.valid, dtype=np.float64))[1])
        panel.plot(entry.checkpoints, dots, linestyle="none", marker="o", markersize=3, color=style["color"],
                   markeredgecolor="white", markeredgewidth=0.4)  # fmt: skip
        alive = np.flatnonzero(np.isfinite(middle))
        if len(alive) < len(steps):
            at = alive[-1] if len(alive) else 0
            drawn.append((steps[at], middle[at], style["color"]))
    _scale(panel, [entry for entry, _ in lines])
    low, high = panel.get_ylim()
    for step, loss, colour in drawn:
        panel.plot([step], [np.clip(np.nan_to_num(loss, posinf=high), low, high)], marker="X", markersize=8,
                   color=colour, markeredgecolor="white", clip_on=False, zorder=5)  # fmt: skip
    panel.set_xlabel("step", fontsize=9)
    window = _window(len(lines[0][0].train[0]))
    panel.set_ylabel("training loss" + (f" (mean of {window} steps)" if window > 1 else ""), fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(True, which="major", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)


def _scale(panel: Any, entries: list[Entry]) -> None:
    """A log axis where losses are positive and fall far; blow-ups above twice the initial loss are cut off."""
    curves = [_quartiles(_running_mean(np.asarray(entry.train, dtype=np.float64))) for entry in entries]
    finite = np.concatenate([curve[np.isfinite(curve)] for quartiles in curves for curve in quartiles])
    starts = [entry.valid[i][0] for entry in entries for i in range(len(entry.valid))]
    top = max((value for value in starts if math.isfinite(value)), default=1.0)
    if not len(finite):
        return
    bottom, median = float(finite.min()), float(np.median(finite))
    if bottom > 0 and top / bottom > _LOG_RATIO:
        panel.set_yscale("log")
        panel.set_ylim(max(bottom / 1.3, top * 1e-15), max(top, median) * 2)
    else:
        span = max(top - bottom, abs(top) * 1e-3, 1e-12)
        panel.set_ylim(bottom - 0.05 * span, max(top, median) + 0.15 * span)


def _quartiles(curves: np.ndarray) -> np.ndarray:
    """Quartiles over seeds [3, steps]; NaN ranks as +inf, and no values are interpolated (inf - inf)."""
    ranked = np.where(np.isfinite(curves), curves, np.inf)
    return np.quantile(ranked, [0.25, 0.5, 0.75], axis=0, method="inverted_cdf")


def _running_mean(curves: np.ndarray) -> np.ndarray:
    """Mean of the last steps, along each row; NaN from where the row has it."""
    window = _window(curves.shape[1])
    padded = np.pad(curves, ((0, 0), (window - 1, 0)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, window, axis=1).mean(axis=-1)


def _window(steps: int) -> int:
    return max(1, steps // _SMOOTH)


def _gaps(curve: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(curve), curve, np.nan)


def _line(**properties: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **properties)
