"""docs/tasks.md, from the lock file and the committed results: ``python benchmarks/page.py`` writes it, a test compares it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from metaopt import registry
from metaopt_tasks.suites import BASELINE, SUITES, lock

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tasks.md"
RESULTS = ROOT / "benchmarks" / "results"

_HEAD = """\
# The task suite

{tasks} named training problems over {families} families. All run offline, from data that come with the installed
packages or are made here; K copies train at once on one device; each is a `metaopt.task.Task`, and every family
samples further members. This page is written by `python benchmarks/page.py` from the lock file and from committed
runs.

```
metaopt list tasks                       # and families: architecture, suite, parameters, licence of the data; --json for more
metaopt race adamw lion --tasks suite:valid
metaopt meta-train small_fc_lopt --task textures8_mlp --out runs/lopt
metaopt baseline --tasks suite:fast --out runs/adamw.jsonl
```

```python
import torch
from metaopt import registry

task = registry.create("task", "digits_vit")  # a named member; arguments change it: batch_size=32, device="cuda", ...
family = registry.create("task", "conv")  # a family
member = family.sample(torch.Generator().manual_seed(0))
data = registry.create("data_source", "textures16")  # {{"train": Split, "valid": Split, "test": Split}}
mine = registry.create("task", "mlp_classifier", ranges={{"data": ["my_file.py:my_data"], "hidden": [[64], [64, 64]]}})
```

A data source of your own is a function, given as `file.py:function` wherever a task takes `data` (and as a value of
`--set-task data=...`):

```python
# my_file.py
from metaopt_tasks.data.adapters import from_dataset


def my_data():
    return from_dataset(MyTorchDataset())  # cut into train, valid and test 70 : 15 : 15
```

## Suites

| suite | tasks | content hash | for |
|---|---|---|---|
{suites}

`test` shares no data source, no definition and no horizon with the others (a test checks it), and meta-training
refuses its tasks. A race records the hash of what it ran on. The text corpora are CPython's own and differ between
Python versions; the hash tells.

## Scores

`task.normalize(loss)` is finite for any input: 0 is the best possible, 1 a model that knows nothing, 1.5 the worst
that counts. Against the archive of tuned AdamW's test-loss curves ({curves} tasks, `metaopt baseline`: 7 learning
rates, 2 refinements, 2 seeds on the valid split; then 3 fresh seeds for twice the horizon) a loss also reads as the
number of steps that tuned AdamW needs for it (VeLO's measure, at most twice the horizon) and as a score: 0 untrained,
1 tuned AdamW at the horizon, between -1 and 2. In {edges} tasks AdamW's best learning rate was at an end of what was
tried. Tasks of the suite `large` have no curve yet: they are for a GPU.

## Families

Parameters and time per training step (loss, gradient, AdamW; one copy, one core; smallest and largest member).

| family | what | members | parameters | ms per step |
|---|---|---|---|---|
{families_table}

"""


def render() -> str:
    """The page's text."""
    specs = {name: spec for name, spec in registry.specs("task").items() if spec.facts.get("suite")}
    by_family: dict[str, list[Any]] = defaultdict(list)
    for spec in specs.values():
        by_family[spec.facts["family"]].append(spec)
    uses = {
        "fast": "meta-training in minutes: MLPs on 8x8 images",
        "train": "meta-training and search",
        "valid": "choosing between what was trained",
        "test": "judging, once",
        "large": "a GPU",
    }
    counts = {suite: sum(spec.facts["suite"] == suite for spec in specs.values()) for suite in SUITES}
    curves = [json.loads(line) for line in BASELINE.read_text().splitlines()]
    page = _HEAD.format(
        tasks=len(specs), families=len(by_family), curves=len(curves), edges=sum(curve["edge"] for curve in curves),
        suites="\n".join(f"| `{s}` | {counts[s]} | `{lock()['suites'][s]}` | {uses[s]} |" for s in SUITES),
        families_table="\n".join(_family(name, members) for name, members in sorted(by_family.items())),
    )  # fmt: skip
    return page + _data() + _learning() + _speed()


def _family(name: str, members: list[Any]) -> str:
    def spread(fact: str, form: str) -> str:
        values = sorted(spec.facts[fact] for spec in members)
        low, high = f"{values[0]:{form}}", f"{values[-1]:{form}}"
        return low if low == high else f"{low} to {high}"

    summary = registry.get("task", name).summary
    return f"| `{name}` | {summary} | {len(members)} | {spread('parameters', ',')} | {spread('ms_per_step', '.3g')} |"


def _data() -> str:
    rows = [
        f"| `{name}` | {spec.summary} | {spec.facts.get('license', '')} | {f'`{spec.extra}`' if spec.extra else ''} |"
        for name, spec in registry.specs("data_source").items()
        if name not in ("torchvision", "huggingface")
    ]
    return (
        "## Data\n\nAll on the device, drawn by index. Any `torch.utils.data.Dataset` "
        "(`metaopt_tasks.data.adapters.from_dataset`), torchvision\nand Hugging Face `datasets` (sources `torchvision` and "
        "`huggingface`) can be used where they are installed.\n\n"
        "| source | what | licence | extra |\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
    )


def _learning() -> str:
    found = json.loads((RESULTS / "learning.json").read_text())
    rows = []
    for row in found["rows"]:
        reached = _spread([100 * a for a in row["accuracy"]], ".1f") + " % correct" if "accuracy" in row else ""
        if "unigram_loss" in row:
            reached = f"loss of token frequencies alone: {row['unigram_loss']:.3f}"
        rows.append(
            f"| `{row['task']}` | {row['steps']} | {row['lr']:.2g} | {_spread(row['test_loss'], '.3f')} | {reached} |"
        )
    return (
        "## They can be learned\n\nAdamW with its learning rate tuned on the valid split, "
        f"{len(found['rows'][0]['test_loss'])} fresh seeds, test split: mean (lowest to highest).\n"
        f"{_source(found, 'learning')}\n\n"
        "| task | steps | lr | test loss | |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
    )


def _speed() -> str:
    found = json.loads((RESULTS / "tasks.json").read_text())
    copies = found["rows"][0]["steps_per_second"]["auto"]
    columns = [(b, k) for b in ("auto", "compile") for k in copies]
    head = " | ".join(f"{backend} K={k}" for backend, k in columns)
    rows = []
    for row in found["rows"]:
        speeds = row["steps_per_second"]
        cells = " | ".join(_ratio(speeds.get(b, {}).get(k), row["looped"]) for b, k in columns)
        rows.append(f"| {row['family']} | `{row['task']}` | {row['looped']:,.0f} | {cells} |")
    peers = found["digits_mlp_adam"].items()
    jax = "; ".join(f"K={k}: {row['metaopt']:,.0f} against {row['jax']:,.0f}" for k, row in peers)
    return (
        "## How fast\n\nInner steps per CPU-second on one core with AdamW, the smallest or usual member of each family.\n"
        "*Looped* is a plain torch loop over single runs with `torch.optim.AdamW(fused=True)`; the other columns are all "
        "copies\ntogether, as ratios to it.\n"
        f"{_source(found, 'tasks')}\n\n"
        f"| family | task | looped | {head} |\n|---|---|---|{'---|' * len(columns)}\n" + "\n".join(rows) + "\n"
        + (f"\nThe digits MLP with Adam, compiled, against `jax.vmap` of `lax.scan` in the same run: {jax}.\n" if jax else "")
    )  # fmt: skip


def _ratio(speed: Any, looped: float) -> str:
    if speed is None:
        return ""
    return f"{speed / looped:.1f}" if isinstance(speed, (int, float)) else "no"


def _spread(values: list[float], form: str) -> str:
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _source(found: dict[str, Any], name: str) -> str:
    machine = found["machine"]
    return f"`benchmarks/results/{name}.json`, {machine['date']}, {machine['device']}, torch {machine['torch'].split('+')[0]}."


if __name__ == "__main__":
    PAGE.write_text(render())
