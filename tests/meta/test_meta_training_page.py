"""docs/meta-training.md says what there is."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import metaopt
from metaopt.meta.config import MetaTrainConfig, make_config

PAGE = (Path(metaopt.__file__).parents[1] / "docs" / "meta-training.md").read_text()


def test_the_table_has_every_setting_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", PAGE, re.MULTILINE)
    plain = {"tasks": ["digits_mlp"], "freeze": [], "evaluate_on": []}
    found = dataclasses.asdict(MetaTrainConfig())
    assert dict(rows) == {name: repr(plain.get(name, value)).replace("'", '"') for name, value in found.items()}


def test_the_recipe_is_a_config() -> None:
    (recipe,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    config = make_config(tomllib.loads(recipe))
    assert len(config.tasks) == 2
