"""Meta-training: theta <- outer rule(meta-gradient), window after window, with checkpoints that resume bit for bit."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metaopt import registry, tree
from metaopt.files import write_atomic
from metaopt.learned import LearnedRule, Theta
from metaopt.meta.estimator import GradientEstimator
from metaopt.meta.inner import TrainingRuns
from metaopt.resolve import THETA_FILE, save_theta
from metaopt.suite import refuse_held_out, refuse_held_out_data
from metaopt.task import Task, TaskFamily
from metaopt.torch_optimizer import optimizer

CHECKPOINT_FILE, CONFIG_FILE, METRICS_FILE = "checkpoint.pt", "config.json", "metrics.jsonl"


@dataclass(frozen=True)
class MetaTrainConfig:
    """Everything that determines a meta-training run; saved beside its results.

    Attributes:
        learned, learned_options: the learned optimizer (registered name) and its options.
        task, task_options: the inner problem.
        estimator, estimator_options: the meta-gradient.
        horizon: inner steps of an episode; None = the task's own.
        outer_steps: updates of theta.
        outer_rule, outer_lr: the rule that updates theta, and its peak learning rate.
        warmup: outer steps of linear warm-up; then a cosine down to ``final_lr_ratio`` of the peak.
        clip_norm: the meta-gradient is scaled down to this norm; 0 = never.
        seed: determines everything else.
        device, backend: where and how the inner runs go.
        checkpoint_every: outer steps between checkpoints.
    """

    learned: str = "small_fc_lopt"
    learned_options: dict[str, Any] = field(default_factory=dict)
    task: str = "digits_mlp"
    task_options: dict[str, Any] = field(default_factory=dict)
    estimator: str = "pes"
    estimator_options: dict[str, Any] = field(default_factory=dict)
    horizon: int | None = None
    outer_steps: int = 1000
    outer_rule: str = "adam"
    outer_lr: float = 1e-3
    warmup: int = 20
    final_lr_ratio: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, low in (("outer_steps", 1), ("warmup", 0), ("checkpoint_every", 1), ("clip_norm", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.outer_lr > 0:
            raise ValueError(f"outer_lr must be above 0, got {self.outer_lr}; a usual value is 1e-3")
        if self.task.startswith("suite:"):
            raise ValueError(f"meta-training takes one task or one family, got {self.task!r}; see metaopt list tasks")
        refuse_held_out([self.task], "meta-training")
        refuse_held_out_data([self.task_options.get("data")], "meta-training")
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {self.horizon}; it counts inner steps")

    def lr_at(self, step: int) -> float:
        """The outer learning rate of one step: linear warm-up, then cosine."""
        if step < self.warmup:
            return self.outer_lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.outer_steps - self.warmup, 1)
        low = self.final_lr_ratio
        return self.outer_lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class MetaTrainResult:
    """The trained rule, and where its files are."""

    learned: LearnedRule
    theta: Theta
    directory: Path
    metrics: list[dict[str, Any]]

    @property
    def progress(self) -> tuple[float, float]:
        """Mean meta-loss over the first tenth of the outer steps, and over the last."""
        losses = [line["meta_loss"] for line in self.metrics]
        tenth = max(len(losses) // 10, 1)
        return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def meta_train(config: MetaTrainConfig, directory: Path | str, *, progress: bool = True) -> MetaTrainResult:
    """Meta-train, or go on with what ``directory`` holds.

    Writes ``config.json``, ``metrics.jsonl`` (one line per outer step), ``checkpoint.pt`` and ``theta.safetensors``.
    A run that was killed continues from its last checkpoint and ends with the same bits as an unbroken one; Ctrl-C
    writes a checkpoint first.

    Raises:
        ValueError: ``directory`` holds a run with another config (names the difference), or an unknown name.
        KeyboardInterrupt: after the checkpoint of an interrupted run was written.
    """
    directory = Path(directory)
    run = _Run(config)  # first: a config that cannot run shall not claim the directory
    _claim(directory, config)
    metrics: list[dict[str, Any]] = []
    if (directory / CHECKPOINT_FILE).exists():
        run.load(directory / CHECKPOINT_FILE)
        metrics = _read_metrics(directory / METRICS_FILE, before=run.step)
    write_atomic(directory / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in metrics))
    done = run.step
    say = Console(stderr=True, quiet=not progress, soft_wrap=True).print
    if done:
        finished = done >= config.outer_steps
        say(f"{directory} holds the finished run" if finished else f"resuming {directory} at outer step {done}")
    try:
        with _progress_bar(config, run.step, progress) as advance, (directory / METRICS_FILE).open("a") as log:
            while run.step < config.outer_steps:
                line = run.advance()
                metrics.append(line)
                log.write(json.dumps(line) + "\n")
                log.flush()
                advance(line)
                if run.step % config.checkpoint_every == 0:
                    run.save(directory / CHECKPOINT_FILE)
                    done = run.step
    finally:
        if done < run.step:
            run.save(directory / CHECKPOINT_FILE)
        if run.step < config.outer_steps:
            say(f"stopped after outer step {run.step}, which is saved; the same command goes on from there")
    save_theta(directory / THETA_FILE, config.learned, run.learned, run.theta)
    return MetaTrainResult(run.learned, run.theta, directory, metrics)


class _Run:
    """The state of a meta-training run between two outer steps."""

    def __init__(self, config: MetaTrainConfig) -> None:
        self.config = config
        self.learned: LearnedRule = registry.create("learned_optimizer", config.learned, **config.learned_options)
        self.estimator: GradientEstimator = registry.create("estimator", config.estimator, **config.estimator_options)
        task = registry.create("task", config.task, device=config.device, **config.task_options)
        if isinstance(task, TaskFamily):
            task = task.sample(torch.Generator().manual_seed(config.seed))
        assert isinstance(task, Task)
        self.inner = TrainingRuns(task, self.learned, config.horizon or task.horizon, config.backend)
        start = self.learned.init_theta(torch.Generator().manual_seed(config.seed))
        self.parameters = {name: torch.nn.Parameter(value.to(config.device)) for name, value in start.items()}
        self.outer = optimizer(config.outer_rule, list(self.parameters.items()), lr=config.outer_lr)
        self.carry = self.estimator.start(self.inner, self.theta, config.seed)
        self.step = 0

    @property
    def theta(self) -> Theta:
        return {name: p.detach() for name, p in self.parameters.items()}

    def advance(self) -> dict[str, Any]:
        """One outer step; returns its metrics."""
        began = time.perf_counter()
        gradient, carry, metrics = self.estimator.estimate(self.inner, self.theta, self.carry)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient.values()]))
        usable = bool(torch.isfinite(norm))
        lr = self.config.lr_at(self.step)
        if usable:
            scale = min(1.0, self.config.clip_norm / max(float(norm), 1e-30)) if self.config.clip_norm else 1.0
            for name, p in self.parameters.items():
                p.grad = gradient[name].to(p) * scale
            for group in self.outer.param_groups:
                group["lr"] = lr
            self.outer.step()
        # a Ctrl-C before this line repeats the whole step on resume, one after it none of it
        self.carry, self.step = carry, self.step + 1
        return {
            "step": self.step,
            **metrics,
            "gradient_norm": float(norm) if usable else None,
            "lr": lr,
            "seconds": round(time.perf_counter() - began, 4),
        }

    def save(self, path: Path) -> None:
        saved = {"step": self.step, "theta": self.theta, "outer": self.outer.state_dict(), "carry": self.carry}
        content = io.BytesIO()  # a file's own name would become part of its bytes
        torch.save(saved, content)
        write_atomic(path, content.getvalue())

    def load(self, path: Path) -> None:
        saved = torch.load(path, map_location=self.config.device, weights_only=True)
        with torch.no_grad():
            for name, value in saved["theta"].items():
                self.parameters[name].copy_(value)
        self.outer.load_state_dict(saved["outer"])
        # every tensor to where a fresh carry has it: clocks stay on the CPU
        self.step = saved["step"]
        self.carry = tree.map_tree(lambda value, fresh: value.to(fresh.device), saved["carry"], self.carry)


def _claim(directory: Path, config: MetaTrainConfig) -> None:
    """Write the config, or check it against the run that is already there."""
    wanted = dataclasses.asdict(config)
    path = directory / CONFIG_FILE
    if path.exists():
        there = json.loads(path.read_text())
        for name, value in json.loads(json.dumps(wanted)).items():
            if name != "checkpoint_every" and there.get(name) != value:
                raise ValueError(
                    f"{directory} holds a run with {name}={there.get(name)!r}, not {value!r}; "
                    f"give the same settings to resume it, or choose another directory"
                )
    write_atomic(path, json.dumps(wanted, indent=2) + "\n")


def _read_metrics(path: Path, before: int) -> list[dict[str, Any]]:
    """The lines of steps that the checkpoint knows; later ones will be made again, and a torn last line is dropped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if line["step"] <= before:
            lines.append(line)
    return lines


@contextmanager
def _progress_bar(config: MetaTrainConfig, done: int, show: bool) -> Iterator[Any]:
    columns = (
        TextColumn("meta-training"), BarColumn(), MofNCompleteColumn(), TextColumn("meta-loss {task.fields[loss]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        handle = bar.add_task("", total=config.outer_steps, completed=done, loss="-")
        smooth: float | None = None

        def advance(line: dict[str, Any]) -> None:
            nonlocal smooth
            smooth = line["meta_loss"] if smooth is None else 0.95 * smooth + 0.05 * line["meta_loss"]
            bar.update(handle, advance=1, loss=f"{smooth:.4f}")

        yield advance
