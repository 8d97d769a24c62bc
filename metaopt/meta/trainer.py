"""Meta-training: theta <- outer rule(mean of the tasks' meta-gradients), step after step, with bit-exact checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Generator
from torch.nn.utils import get_total_norm

from metaopt import registry, tree
from metaopt.files import write_atomic
from metaopt.interruptions import interruptions
from metaopt.learned import LearnedRule, Theta, digest
from metaopt.meta.checkpoint import load_checkpoint, save_checkpoint
from metaopt.meta.config import MetaTrainConfig
from metaopt.meta.curriculum import Curriculum, draw
from metaopt.meta.estimator import GradientEstimator
from metaopt.meta.evaluation import Evaluation
from metaopt.meta.run_log import METRICS_FILE, Line, RunLog, require_tensorboard
from metaopt.meta.shard import ALONE, Shard
from metaopt.meta.tasks import MetaTask, labels
from metaopt.resolve import THETA_FILE, load_theta, resolve_rule, save_theta
from metaopt.rule import Context, infer_info

__all__ = ["CHECKPOINT_FILE", "CONFIG_FILE", "METRICS_FILE", "MetaTrainConfig", "MetaTrainResult", "meta_train"]

CHECKPOINT_FILE, CONFIG_FILE, LAST_THETA_FILE = "checkpoint.pt", "config.json", "last_theta.safetensors"


@dataclass
class MetaTrainResult:
    """The trained rule, and where its files are.

    Attributes:
        learned, theta: what the run gives: the best theta where it was evaluated, else the last one (its mean, with EMA).
        directory: of the run.
        metrics: one line per outer step.
        best: score and outer step of the best evaluation, if there was one.
    """

    learned: LearnedRule
    theta: Theta
    directory: Path
    metrics: list[Line]
    best: tuple[float, int] | None = None

    @property
    def progress(self) -> tuple[float, float]:
        """Mean meta-loss over the first tenth of the outer steps, and over the last."""
        losses = [math.nan if line["meta_loss"] is None else line["meta_loss"] for line in self.metrics]
        tenth = max(len(losses) // 10, 1)
        first, last = torch.tensor(losses[:tenth]), torch.tensor(losses[-tenth:])
        return float(first.nanmean()), float(last.nanmean())

    @property
    def diverged(self) -> dict[str, int]:
        """Copies left out because they diverged, by task."""
        total: dict[str, int] = {}
        for line in self.metrics:
            for label, count in line["diverged"].items():
                total[label] = total.get(label, 0) + count
        return total

    @property
    def skipped(self) -> int:
        """Outer steps that changed nothing, because no copy of any task was left."""
        return sum(line["skipped"] for line in self.metrics)


def meta_train(
    config: MetaTrainConfig,
    directory: Path | str,
    *,
    progress: bool = True,
    tensorboard: bool = False,
    shard: Shard = ALONE,
    on_evaluation: Callable[[int, float], None] | None = None,
) -> MetaTrainResult:
    """Meta-train, or go on with what ``directory`` holds.

    Writes ``config.json``, ``metrics.jsonl`` (one line per outer step), ``checkpoint.pt`` and ``theta.safetensors``; and
    where that is the best or the mean one, the last theta as ``last_theta.safetensors``. A run that was killed continues
    from its last checkpoint and ends with the same bits as an unbroken one; Ctrl-C writes a checkpoint first.

    Args:
        config: what to do.
        directory: of the run; only the process of rank 0 looks at it.
        progress: whether to show a live view.
        tensorboard: whether to write TensorBoard events too, into ``directory/tensorboard``.
        shard: this process's share of the copies.
        on_evaluation: is told the outer step and the score after each evaluation; what it raises ends the run.

    Raises:
        ValueError: ``directory`` holds a run with another config (names the difference), or an unknown name.
        KeyboardInterrupt: after the checkpoint of an interrupted run was written.
    """
    directory, leads = Path(directory), shard.rank == 0
    path = directory / CONFIG_FILE
    if tensorboard:
        require_tensorboard(shard)
    there = shard.broadcast(json.loads(path.read_text()) if leads and path.exists() else {})
    _require_same_config(there, config, directory)
    run = _Run(config, shard, load_checkpoint(directory / CHECKPOINT_FILE, shard))
    with ExitStack() as stack:
        log = None
        if leads:
            log = stack.enter_context(RunLog(directory, config.outer_steps, run.step, progress, tensorboard))
        _train(run, directory, log, on_evaluation)
    if leads:
        save_theta(directory / THETA_FILE, config.learned, run.learned, run.result)
        if run.best is not None or config.ema_decay:
            save_theta(directory / LAST_THETA_FILE, config.learned, run.learned, run.theta)
    best = None if run.best is None else (run.best["score"], run.best["step"])
    return MetaTrainResult(run.learned, run.result, directory, log.lines if log else [], best)


def _train(run: _Run, directory: Path, log: RunLog | None, on_evaluation: Callable[[int, float], None] | None) -> None:
    """Outer steps until the run is finished or interrupted."""
    say = log.say if log else lambda text: None
    done = run.step
    if done:
        say(f"{directory} holds the finished run" if run.is_finished else f"resuming {directory} at outer step {done}")
    with interruptions() as interrupted:
        while not run.is_finished:
            line = run.advance()
            if log is not None:
                if run.step == done + 1:  # what cannot make a step shall not claim the directory
                    write_atomic(directory / CONFIG_FILE, _as_json(run.config))
                log.update(line)
            # all processes stop at the same step
            stops = float(run.shard.sum(torch.tensor(float(bool(interrupted))))) > 0
            if stops or run.is_finished or run.step % run.config.checkpoint_every == 0:
                run.require_same_theta()
                save_checkpoint(directory / CHECKPOINT_FILE, run.content(), run.shard)
            if on_evaluation is not None and "evaluation" in line:
                on_evaluation(run.step, line["evaluation"]["score"])
            if stops and not run.is_finished:
                say(f"stopped after outer step {run.step}, which is saved; the same command goes on from there")
                raise KeyboardInterrupt


class _Run:
    """The state of a meta-training run between two outer steps.

    Attributes:
        trained: the part of theta that is trained: what the estimators see.
        frozen: the rest of it.
        average: the exponential moving average of ``trained``; empty without.
        outer, outer_state: the rule that moves ``trained``.
        tasks: with the carries of their estimators.
        regret, taken: of each task: see `Curriculum`, and the outer step that took it last; 0 for never.
        best: ``score``, ``step`` and ``theta`` of the best evaluation, and ``since``, the evaluations after it.
        step: outer steps made.
    """

    def __init__(self, config: MetaTrainConfig, shard: Shard, saved: dict[str, Any] | None) -> None:
        self.config, self.shard = config, shard
        self.learned: LearnedRule = registry.create("learned_optimizer", config.learned, **config.learned_options)
        self.estimator = _estimator(config)
        self.curriculum: Curriculum = registry.create("curriculum", config.curriculum, **config.curriculum_options)
        if saved is None:  # of one process: files and random numbers of another machine may differ
            theta = shard.broadcast(_initial_theta(config, self.learned) if shard.rank == 0 else None)
        else:
            theta = saved["theta"]
        theta = {name: value.to(config.device) for name, value in theta.items()}
        trained = _unfrozen(theta, config.freeze)
        self._names = tuple(theta)
        self.trained: Theta = {name: theta[name] for name in trained}
        self.frozen = {name: value for name, value in theta.items() if name not in trained}
        self.average = {name: theta[name].clone() for name in trained} if config.ema_decay else {}
        self.outer = resolve_rule(config.outer_rule, lr=config.outer_lr, **config.outer_options)
        if "closure" in self.outer.requirements():
            raise ValueError(
                f"outer_rule {config.outer_rule!r} evaluates the meta-loss again, which has noise; take another"
            )
        self._info = infer_info(self.trained)
        self.outer_state = self.outer.init(self.trained, self._info)
        named = enumerate(zip(config.task_choices, labels(config.task_choices), strict=True))
        self.tasks = [MetaTask(choice, label, i, config, self.learned, self.frozen) for i, (choice, label) in named]
        for task in self.tasks:
            self._baseline(task)  # refuses a task without one
        self.regret = torch.full((len(self.tasks),), torch.inf, dtype=torch.float64)
        self.taken = torch.zeros(len(self.tasks), dtype=torch.int64)
        self.evaluation = Evaluation(
            config.evaluation_choices, config.evaluate_seeds, config.seed, config.device, config.backend
        )
        self.best: dict[str, Any] | None = None
        self.step = 0
        if saved is not None:
            self._restore(saved)

    @property
    def theta(self) -> Theta:
        """All of theta as it is now."""
        return self._whole(self.trained)

    @property
    def averaged(self) -> Theta:
        """What is evaluated: the moving average of theta, or theta."""
        return self._whole(self.average) if self.average else self.theta

    @property
    def result(self) -> Theta:
        """The best theta if there is one, else the latest."""
        return self.averaged if self.best is None else self.best["theta"]

    @property
    def is_finished(self) -> bool:
        """Whether all outer steps are made, or the last evaluations brought nothing."""
        patience = self.config.patience
        stale = self.best is not None and 0 < patience <= self.best["since"]
        return stale or self.step >= self.config.outer_steps

    def advance(self) -> Line:
        """One outer step; returns its metrics."""
        began = time.perf_counter()
        estimates = {i: self.tasks[i].estimate(self.estimator, self.trained, self.shard) for i in self._choose()}
        metrics = {self.tasks[i]: metrics for i, (_, metrics) in estimates.items()}
        losses = {task.label: one["meta_loss"] for task, one in metrics.items()}
        meta_loss, lr = _mean(losses.values()), self.config.lr_at(self.step)
        # of a task whose copies have all diverged the estimate is zero
        usable = {i: gradient for i, (gradient, _) in estimates.items() if 0 < _norm(gradient) < math.inf}
        gradients = list(usable.values())
        norm = self._update(gradients, lr, meta_loss) if gradients else None
        self.step += 1
        for i in estimates:
            self.regret[i] = losses[self.tasks[i].label] - self._baseline(self.tasks[i])
            self.taken[i] = self.step
        known = self.regret[self.regret.isfinite()]
        self.regret.nan_to_num_(nan=float(known.max()) if len(known) else math.inf, posinf=math.inf)
        steps, seconds = sum(one["inner_steps"] for one in metrics.values()), time.perf_counter() - began
        line = {
            "step": self.step,
            "meta_loss": meta_loss,
            "losses": {label: _mean([loss]) for label, loss in losses.items()},
            "families": _by_family(losses, {task.label: task.family for task in metrics}),
            "diverged": {task.label: int(one["diverged"]) for task, one in metrics.items()},
            "worst": {task.label: int(one["worst"]) for task, one in metrics.items()},
            "left_out": [self.tasks[i].label for i in estimates if i not in usable],
            "skipped": not gradients,
            "gradient_norm": norm,
            "lr": lr,
            "inner_steps": int(steps),
            "seconds": round(seconds, 4),
        }
        every = self.config.evaluate_every
        if every and (self.step % every == 0 or self.step == self.config.outer_steps):
            line["evaluation"] = self._evaluate()
        return line

    def require_same_theta(self) -> None:
        """Collective.

        Raises:
            RuntimeError: the processes hold different thetas.
        """
        own = digest(self.theta)
        differs = own != self.shard.broadcast(own)
        if float(self.shard.sum(torch.tensor(float(differs)))):
            raise RuntimeError(
                f"the processes hold different thetas after outer step {self.step}, which is not saved; start the same "
                f"command again to go on from the last checkpoint, with one version of torch on one kind of processor"
            )

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "step": self.step,
            "theta": self.theta,
            "average": self.average,
            "outer": self.outer_state,
            "tasks": {task.label: task.state() for task in self.tasks},
            "regret": self.regret,
            "taken": self.taken,
            "best": self.best,
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        self.step, self.regret, self.taken = saved["step"], saved["regret"], saved["taken"]
        self.average = {name: value.to(self.config.device) for name, value in saved["average"].items()}
        self.best = saved["best"]
        self.outer_state = tree.map_tree(lambda value: value.to(self.config.device), saved["outer"])
        for task in self.tasks:
            task.restore(saved["tasks"][task.label], self.estimator, self.trained, self.shard)

    def _choose(self) -> list[int]:
        weights = self.curriculum.weights(self.regret, self.step + 1 - self.taken)
        chosen = draw(weights, self.config.tasks_per_step or len(self.tasks), self.config.seed, self.step)
        return list(self.shard.broadcast(chosen))

    def _update(self, gradients: Sequence[Theta], lr: float, meta_loss: float | None) -> float:
        """Theta moves by the mean of the tasks' gradients; returns its norm before clipping."""
        grads = {
            name: torch.stack([gradient[name] for gradient in gradients]).mean(0).to(value)
            for name, value in self.trained.items()
        }
        norm = _norm(grads)
        if 0 < self.config.clip_norm < norm:
            grads = {name: grad * (self.config.clip_norm / norm) for name, grad in grads.items()}
        loss = None if meta_loss is None else torch.tensor(meta_loss, device=self.config.device)
        ctx = Context(self._info, loss=loss, horizon=self.config.outer_steps)
        with torch.no_grad():
            self.trained, self.outer_state = self.outer.update(
                grads, self.outer_state, self.trained, {**self.outer.hp, "lr": lr}, ctx
            )
        for name, mean in self.average.items():
            mean.lerp_(self.trained[name], 1 - self.config.ema_decay)
        return norm

    def _evaluate(self) -> dict[str, Any]:
        theta = self.averaged
        scores = self.evaluation.scores(self.learned.bind(theta), self.shard)
        score = sum(scores.values()) / len(scores)
        if self.best is None or score > self.best["score"]:
            self.best = {"score": score, "step": self.step, "theta": tree.map_tree(torch.clone, theta), "since": 0}
        else:
            self.best["since"] += 1
        return {"score": score, "tasks": scores, "families": _by_family(scores, self.evaluation.families)}

    def _whole(self, trained: Theta) -> Theta:
        return {name: self.frozen[name] if name in self.frozen else trained[name] for name in self._names}

    def _baseline(self, task: MetaTask) -> float:
        """What the loss of the task's last window is compared with: tuned AdamW's, or 0 where nobody looks at regrets."""
        if not self.curriculum.needs_regret:
            return 0.0
        baseline = task.baseline(getattr(self.estimator, "objective", "mean"))
        if baseline is None:
            raise ValueError(
                f"curriculum {self.config.curriculum!r} compares with tuned AdamW, of which there is no archived curve on "
                f"{task.label} as it is set; take named tasks (metaopt list tasks), or curriculum 'uniform'"
            )
        return baseline


def _estimator(config: MetaTrainConfig) -> GradientEstimator:
    made = registry.create("estimator", config.estimator, **config.estimator_options)
    if not isinstance(made, GradientEstimator):
        raise ValueError(
            f"{config.estimator} gives a {type(made).__name__}, not a GradientEstimator; see metaopt list estimators, or "
            "subclass metaopt.meta.estimator.GradientEstimator"
        )
    return made


def _initial_theta(config: MetaTrainConfig, learned: LearnedRule) -> Theta:
    theta = learned.init_theta(Generator().manual_seed(config.seed))
    if config.init_theta is None:
        return theta
    given = load_theta(config.init_theta).theta
    for name, value in given.items():
        wanted = tuple(theta[name].shape) if name in theta else None
        if wanted != tuple(value.shape):
            raise ValueError(
                f"{config.init_theta} holds {name!r} of shape {tuple(value.shape)}, but that of {config.learned} is {wanted}; "
                f"give the learned optimizer and the options that it was trained with"
            )
    return theta | given


def _unfrozen(theta: Theta, patterns: Sequence[str]) -> list[str]:
    """Names of theta that match none of the patterns."""
    names = ", ".join(theta)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in theta):
            raise ValueError(f"freeze names {pattern!r}, but theta has only {names}")
    trained = [name for name in theta if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not trained:
        raise ValueError(f"freeze leaves nothing of theta to train; it has {names}")
    return trained


def _norm(gradient: Theta) -> float:
    return float(get_total_norm(list(gradient.values())))


def _mean(values: Iterable[float]) -> float | None:
    """Of those that are finite; None where none is (JSON has no NaN)."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _by_family(values: Mapping[str, float], families: Mapping[str, str]) -> dict[str, float | None]:
    """The mean over each family, of values and families by label."""
    names = sorted({families[label] for label in values})
    return {name: _mean(value for label, value in values.items() if families[label] == name) for name in names}


def _as_json(config: MetaTrainConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _require_same_config(there: dict[str, Any], config: MetaTrainConfig, directory: Path) -> None:
    """Raise ``ValueError`` where another run is there already; without any, ``there`` is empty."""
    for name, value in json.loads(_as_json(config)).items() if there else ():
        if name != "checkpoint_every" and there.get(name) != value:
            raise ValueError(
                f"{directory} holds a run with {name}={there.get(name)!r}, not {value!r}; "
                f"give the same settings to resume it, or choose another directory"
            )
