"""What a search leaves: the winner as a file that races take, a table, and Optuna's plots."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from metaopt.evaluate.report import plain
from metaopt.evaluate.statistics import Estimate
from metaopt.files import write_atomic
from metaopt.resolve import SETTINGS_FORMAT
from metaopt.tune.lockstep import Run
from metaopt.tune.tuning import Problem, Selection, TuneConfig

BEST_FILE, RESULT_FILE, TABLE_FILE = "best.json", "tune.json", "tune.txt"


def save(problem: Problem, study: optuna.Study, selection: Selection, directory: Path) -> list[Path]:
    """Write ``best.json`` (which ``metaopt race`` takes), ``tune.json``, ``tune.txt`` and one PNG per plot."""
    config = problem.config
    best = {
        "format": SETTINGS_FORMAT,
        "optimizer": config.optimizer,
        "wrappers": list(config.wrappers),
        "values": {**config.fixed, **selection.winner.values},
    }
    page = Console(file=io.StringIO(), width=120)
    page.print(table(problem, study, selection))
    result = {
        "study": study.study_name,
        "settings": problem.settings(),
        "counts": counts(study),
        "selection": dataclasses.asdict(selection),
        "importances": importances(study),
    }
    return [
        write_atomic(directory / BEST_FILE, json.dumps(best, indent=1) + "\n"),
        write_atomic(directory / RESULT_FILE, json.dumps(plain(result), indent=1, allow_nan=False) + "\n"),
        write_atomic(directory / TABLE_FILE, page.file.getvalue()),  # type: ignore[attr-defined]
        *(write_atomic(directory / f"{name}.png", png) for name, png in plots(study).items()),
    ]


def counts(study: optuna.Study) -> dict[str, int]:
    """How many trials are in each state, and how many of the pruned ones diverged."""
    trials = study.get_trials(deepcopy=False)
    found = {state.name.lower(): sum(trial.state == state for trial in trials) for state in TrialState}
    return found | {"diverged": sum("diverged_in_unit" in trial.user_attrs for trial in trials)}


def importances(study: optuna.Study) -> dict[str, float]:
    """Share of each searched number in the spread of the loss (PED-ANOVA); empty with too few trials, or equal ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.importance.get_param_importances(study, target=lambda trial: trial.values[0])
    except (ValueError, RuntimeError):
        return {}


def table(problem: Problem, study: optuna.Study, selection: Selection) -> Table:
    """The candidates, best first."""
    tally = counts(study)
    grid = Table(
        title=f"{problem.rule.label()} on {selection.task}: the best trials, trained again from {selection.seeds} fresh seeds",
        caption=(
            f"{tally['complete']} trials complete, {tally['pruned']} pruned ({tally['diverged']} of them diverged); losses "
            f"normalised, on the valid split, with 95 % intervals. Test loss of the winner: {_text(selection.test)}. "
            f"{_verdict(selection)}"
        ),
        caption_justify="left",
        title_justify="left",
    )
    grid.add_column("trial", justify="right")
    grid.add_column("values")
    for column in ("loss in the study", "loss from fresh seeds", "diverged"):
        grid.add_column(column, justify="right")
    for candidate in selection.candidates:
        grid.add_row(
            str(candidate.trial),
            ", ".join(f"{name}={_value(value)}" for name, value in candidate.values.items()),
            f"{candidate.value:.4g}",
            _text(candidate.valid),
            str(candidate.diverged),
        )
    return grid


def _verdict(selection: Selection) -> str:
    if len(selection.candidates) == 1:
        return ""
    if not selection.ties:
        return "The winner's interval is below those of all others."
    return f"The intervals of {selection.ties} others overlap with the winner's."


def _text(value: Estimate) -> str:
    interval = "" if math.isnan(value.low) else f" [{value.low:.4g}, {value.high:.4g}]"
    return f"{value.iqm:.4g}{interval}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plots(study: optuna.Study) -> dict[str, bytes]:
    """Optuna's own plots as PNG, by name; those that the study has too few trials for are left out."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure
    from optuna.visualization import matplotlib as draw

    several = len(study.directions) > 1
    target: dict[str, Any] = {"target": lambda trial: trial.values[0], "target_name": "loss"}
    figures: dict[str, Callable[[], Any]] = {
        "history": lambda: draw.plot_optimization_history(study, **target),
        "slice": lambda: draw.plot_slice(study, **target),
        "parallel": lambda: draw.plot_parallel_coordinate(study, **target),
        "importances": lambda: draw.plot_param_importances(study, **target),
    }
    if several:
        figures["pareto"] = lambda: draw.plot_pareto_front(study)
    else:
        figures["curves"] = lambda: draw.plot_intermediate_values(study)
    found = {}
    backend = pyplot.get_backend()
    pyplot.switch_backend("agg")
    try:
        for name, plot in figures.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the module is marked experimental; layouts of few trials warn too
                try:
                    axes = plot()
                except (ValueError, RuntimeError):
                    continue
                first = axes.flat[0] if hasattr(axes, "flat") else axes
                figure: Figure = first.figure
                legend = first.get_legend() if name == "curves" else None
                if legend is not None:  # a hundred trials have no room there
                    legend.remove()
                target_file = io.BytesIO()
                figure.savefig(target_file, dpi=110, bbox_inches="tight", metadata={"Software": "metaopt"})
                found[name] = target_file.getvalue()
                pyplot.close(figure)
    finally:
        pyplot.switch_backend(backend)
    return found


@contextmanager
def live(study: optuna.Study, config: TuneConfig, progress: bool) -> Iterator[Callable[[Sequence[Run]], None]]:
    """A bar of finished trials; gives what is to be called after every budget unit."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        line = bar.add_task(config.optimizer, total=config.trials)

        def show(runs: Sequence[Run]) -> None:
            if not progress:
                return
            tally = counts(study)
            losses = [trial.values[0] for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
            best = f", best {min(losses):.4g}" if losses else ""
            text = f"{len(runs)} trials under way, {tally['pruned']} pruned{best}"
            bar.update(line, completed=tally["complete"] + tally["pruned"], description=text)

        yield show
