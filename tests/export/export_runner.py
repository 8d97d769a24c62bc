"""Runs exported optimizers in an interpreter that cannot import metaopt; ``python export_runner.py JOB RESULT``.

The test runs `trajectory` on the platform as well: one text, so that both see the same problem.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
import sys
from pathlib import Path

import torch

STEPS = 50
SHAPES = {"layers.0.weight": (5, 4), "layers.0.bias": (5,), "conv": (4, 3, 2, 2), "head.weight": (3, 5), "scale": ()}
LATE = "conv"  # has no gradient in the first steps


def start(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def loss_at(params: dict[str, torch.nn.Parameter], step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    loss = torch.zeros((), dtype=torch.float64)
    for name, param in params.items():
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        if name != LATE or step >= 3:
            loss = loss + (torch.tanh(param.double() * (1 + noise)) ** 2 + 0.1 * param.double() * noise).sum()
    return loss


def groups(params, factor):
    """Two groups, the second with another learning rate."""
    named = list(params.items())
    return [{"params": named[:2]}, {"params": named[2:], "lr": factor}]


def trajectory(make, dtype, second_lr, interrupt=None, steps=STEPS):
    """Parameters after every step; ``make(groups)`` gives the optimizer.

    ``interrupt(optimizer, groups, pickled)`` replaces it at two points, at the second one through a pickle.
    """
    params = start(dtype)
    saved, pickled = 2 * steps // 5, 7 * steps // 10
    optimizer = make(groups(params, second_lr))
    seen = []
    for step in range(steps):

        def closure(step=step, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_at(params, step)
            loss.backward()
            return loss

        optimizer.step(closure)
        seen.append({name: param.detach().clone() for name, param in params.items()})
        if interrupt is not None and step in (saved, pickled):
            optimizer = interrupt(optimizer, groups(params, second_lr), step == pickled)
    return seen


class NoMetaopt:
    """Makes every import of the platform fail."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("metaopt"):
            raise ImportError(f"{name} must not be imported by an exported file")
        return None


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check(job):
    """Everything that one file must do without metaopt."""
    module = load(job["path"])
    cls = getattr(module, job["name"])
    extra = job["arguments"]

    def make(given):
        return cls(given, **extra)

    def interrupt(optimizer, given, pickled):
        if pickled:
            return _unpickled(optimizer)
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        fresh = make(given)
        fresh.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
        return fresh

    def _unpickled(optimizer):
        copied = pickle.loads(pickle.dumps(optimizer))
        for old, new in zip(optimizer.param_groups, copied.param_groups, strict=True):
            for p, q in zip(old["params"], new["params"], strict=True):
                if q in copied.state:
                    copied.state[p] = copied.state.pop(q)
            new["params"] = old["params"]
        return copied

    dtypes, steps = job.get("dtypes", (torch.float64, torch.float32)), job.get("steps", STEPS)
    result = {str(dtype): trajectory(make, dtype, job["second_lr"], steps=steps) for dtype in dtypes}
    result["interrupted"] = trajectory(make, torch.float64, job["second_lr"], interrupt, steps)
    result["bf16"] = trajectory(make, torch.bfloat16, job["second_lr"], steps=5)
    params = start(torch.bfloat16)
    optimizer = make(groups(params, job["second_lr"]))
    optimizer.step(lambda: [loss := loss_at(params, 5), loss.backward()][0])
    fresh = make(groups(params, job["second_lr"]))
    fresh.load_state_dict(optimizer.state_dict())
    result["bf16_state"] = {
        str(value.dtype) for state in fresh.state.values() for value in state.values() if torch.is_tensor(value)
    }
    result["refusals"] = {}
    for name, bad in job["bad"].items():
        try:
            make([{"params": list(params.values()), name: bad}])
        except ValueError as error:
            result["refusals"][name] = str(error)
    return result


if __name__ == "__main__":
    sys.meta_path.insert(0, NoMetaopt())
    torch.set_num_threads(1)
    jobs = torch.load(sys.argv[1], weights_only=False)
    torch.save({job["id"]: check(job) for job in jobs}, sys.argv[2])
    assert not any(name.startswith("metaopt") for name in sys.modules)
