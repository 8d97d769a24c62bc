"""Search outside, gradient inside: a sampler chooses what is discrete, and for each choice hypergradients find the rest.

Samplers are good at a handful of numbers and choices, hypergradients at thousands of continuous ones (docs/bilevel-problems.md
has a measurement). Trials are independent: none starts from what another found.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from metaopt.tune.outer import Diverged, Line, OuterConfig, solve
from metaopt.tune.problem import BilevelProblem

if TYPE_CHECKING:
    import optuna


def search(
    make: Callable[[optuna.Trial], tuple[BilevelProblem, OuterConfig]],
    study: optuna.Study,
    trials: int,
    directory: Path | str,
) -> Path:
    """Run outer loops whose problems and settings a study samples; minimise the holdout loss of what each keeps.

    Each trial reports its best holdout loss so far after every outer step, so the study's pruner can end it; one that diverges
    is pruned too.

    Args:
        make: asks the trial for what it searches (``trial.suggest_categorical(...)``), and gives the problem, which must have a
            holdout, and the settings of the outer loop.
        study: to be minimised; of any storage, sampler and pruner.
        trials: how many more.
        directory: trial n writes its run to ``trial-n`` in it (see `metaopt.tune.outer.solve`).

    Returns:
        The directory of the best trial's run.

    Raises:
        ValueError: ``trials`` < 1, the study maximises, the problem has no holdout, or no trial was completed.
    """
    import optuna

    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if study.directions != [optuna.study.StudyDirection.MINIMIZE]:
        raise ValueError("the study must minimise one objective, the holdout loss; make it with direction='minimize'")
    directory = Path(directory)

    def objective(trial: optuna.Trial) -> float:
        problem, config = make(trial)
        best = float("inf")

        def report(line: Line) -> None:
            nonlocal best
            if line["holdout"] is None:
                raise ValueError(f"{type(problem).__name__} has no holdout, by which a search could compare its trials")
            best = min(best, line["holdout"])
            trial.report(best, line["step"])
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            result = solve(problem, config, _place(directory, trial.number), on_step=report)
        except Diverged as error:
            raise optuna.TrialPruned(str(error)) from error
        trial.set_user_attr("report", result.report)
        trial.set_user_attr("gap", result.gap)
        assert result.holdout is not None  # refused at the first step
        return result.holdout

    study.optimize(objective, trials)
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if not done:
        raise ValueError("no trial was completed: all were pruned or diverged; search smaller learning rates")
    return _place(directory, study.best_trial.number)


def _place(directory: Path, trial: int) -> Path:
    return directory / f"trial-{trial}"
