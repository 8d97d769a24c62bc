"""What a meta-training run tells about itself while it runs: a line of JSON per outer step, TensorBoard, a live view."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from metaopt.files import write_atomic
from metaopt.meta.shard import Shard

Line = dict[str, Any]
"""Metrics of one outer step; ``docs/meta-training.md`` lists them."""

METRICS_FILE = "metrics.jsonl"

_SMOOTHING = 0.95
_ROWS = 12


class RunLog:
    """Where the lines of a run go: ``metrics.jsonl``, and if wanted TensorBoard and the terminal.

    Args:
        directory: of the run.
        steps: outer steps of the whole run.
        done: those that the checkpoint knows; lines of later ones will be made again, and are dropped.
        show: whether there is a live view.
        tensorboard: whether there are TensorBoard events, in ``directory/tensorboard``.

    Attributes:
        lines: of all steps so far.
    """

    def __init__(self, directory: Path, steps: int, done: int, show: bool, tensorboard: bool) -> None:
        path = directory / METRICS_FILE
        self.lines = _read(path, done)
        self._board = TensorBoard(directory / "tensorboard", done) if tensorboard else None
        self._view = LiveView(steps, self.lines, show)
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = path.open("a")

    def __enter__(self) -> RunLog:
        self._view.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._view.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def update(self, line: Line) -> None:
        """One more outer step."""
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.update(line)
        self._view.update(line)

    def say(self, text: str) -> None:
        """A line on the terminal that stays."""
        self._view.say(text)


def _read(path: Path, done: int) -> list[Line]:
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # torn by a kill
            break
        if line["step"] <= done:
            lines.append(line)
    return lines


def require_tensorboard(shard: Shard) -> None:
    """Raise ``ValueError`` on every process if that of rank 0, which writes, has no TensorBoard; collective."""
    if shard.broadcast(find_spec("tensorboard") is None):
        raise ValueError("TensorBoard needs the extra 'tensorboard': pip install 'torch-metaopt[tensorboard]'")


class TensorBoard:
    """The numbers of each line as TensorBoard scalars, nested names with a slash."""

    def __init__(self, directory: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=done + 1)

    def update(self, line: Line) -> None:
        """Write one line."""
        for name, value in _flat(line | {"inner_steps_per_second": line["inner_steps"] / max(line["seconds"], 1e-4)}):
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what is not yet written."""
        self._writer.close()


class LiveView:
    """Meta-loss, speed, divergence, best evaluation and time left; of each family its loss and last score; on stderr.

    Args:
        steps: outer steps of the whole run.
        lines: of the steps that are done.
        show: False shows nothing.
    """

    def __init__(self, steps: int, lines: Sequence[Line], show: bool) -> None:
        self._console = Console(stderr=True, quiet=not show, soft_wrap=True)
        columns = (
            TextColumn("meta-training"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console)
        self._handle = self._bar.add_task("", total=steps, completed=len(lines))
        self._meta_loss: float | None = None
        self._losses: dict[str, float] = {}
        self._scores: dict[str, float] = {}
        self._diverged = 0
        self._best: tuple[float, int] | None = None
        self._speed: float | None = None
        for line in lines:
            self._take(line)
        self._live = Live(self._view(), console=self._console, auto_refresh=False)
        self._show = show

    def start(self) -> None:
        """Take the terminal."""
        if self._show:
            self._live.start()

    def stop(self) -> None:
        """Give it back."""
        if self._show:
            self._live.stop()
            if not self._console.is_terminal:  # rich ends the view without a line break there
                self._console.print()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text)

    def update(self, line: Line) -> None:
        """Show one more line."""
        self._take(line)
        self._bar.advance(self._handle)
        if self._show:
            self._live.update(self._view(), refresh=self._console.is_terminal)

    def _take(self, line: Line) -> None:
        if line["meta_loss"] is not None:
            self._meta_loss = _smoothed(self._meta_loss, line["meta_loss"])
        for family, loss in line["families"].items():
            if loss is not None:
                self._losses[family] = _smoothed(self._losses.get(family), loss)
        self._diverged += sum(line["diverged"].values())
        if line["seconds"]:
            self._speed = _smoothed(self._speed, line["inner_steps"] / line["seconds"])
        evaluation = line.get("evaluation", {})
        self._scores = evaluation.get("families", self._scores)
        score = evaluation.get("score")
        if score is not None and (self._best is None or score > self._best[0]):
            self._best = (score, line["step"])

    def _view(self) -> Group:
        said = ["meta-loss -" if self._meta_loss is None else f"meta-loss {self._meta_loss:.4f}"]
        if self._speed is not None:
            said.append(f"{self._speed:,.0f} inner steps/s")
        if self._diverged:
            said.append(f"{self._diverged} copies diverged")
        if self._best is not None:
            said.append(f"best score {self._best[0]:.3f} at {self._best[1]}")
        table = Table("family", "loss", "last score", box=None, padding=(0, 2, 0, 0))
        families = sorted({*self._losses, *self._scores})
        for name in families[:_ROWS]:
            loss, score = self._losses.get(name), self._scores.get(name)
            table.add_row(name, "" if loss is None else f"{loss:.4f}", "" if score is None else f"{score:.3f}")
        if len(families) > _ROWS:
            table.add_row(f"and {len(families) - _ROWS} more")
        return Group(self._bar, Text(", ".join(said)), table if families else Text())


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else _SMOOTHING * old + (1 - _SMOOTHING) * new


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found.append((f"{prefix}{name}", float(value)))
    return found
