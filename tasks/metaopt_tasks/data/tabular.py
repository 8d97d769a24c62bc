"""What scikit-learn ships inside its package: handwritten digits and four tables.

Labelled data are cut class by class, 70 % train, 15 % valid, 15 % test, in the order of a fixed hash of their rows.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaopt.task import Split
from metaopt_tasks.data.load import moved, package_folder, split_rows, standardized

_FILES = {"digits": "digits.csv.gz", "iris": "iris.csv", "wine": "wine_data.csv", "breast_cancer": "breast_cancer.csv"}


def digits(device: Any = "cpu") -> dict[str, Split]:
    """1,797 handwritten digits: ``input`` [N, 1, 8, 8] float32 and ``label`` [N] int64; 1258, 270 and 269 of them.

    Pixels are shifted and scaled by the mean and standard deviation of all train pixels. Source: Alpaydin and Kaynak
    1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (its test part), CC BY 4.0.
    """
    return moved(_classification("digits"), device)


def iris(device: Any = "cpu") -> dict[str, Split]:
    """150 flowers of 3 species: ``input`` [N, 4], standardised by feature, and ``label`` [N] (Fisher 1936)."""
    return moved(_classification("iris"), device)


def wine(device: Any = "cpu") -> dict[str, Split]:
    """178 wines of 3 cultivars: ``input`` [N, 13], standardised by feature, and ``label`` [N] (Aeberhard et al. 1992)."""
    return moved(_classification("wine"), device)


def breast_cancer(device: Any = "cpu") -> dict[str, Split]:
    """569 tumours, malignant or benign: ``input`` [N, 30], standardised, and ``label`` [N] (Wolberg et al. 1993)."""
    return moved(_classification("breast_cancer"), device)


def diabetes(device: Any = "cpu") -> dict[str, Split]:
    """442 patients: ``input`` [N, 10] and ``target`` [N, 1], progression in a year, both standardised (Efron et al. 2004)."""
    return moved(_diabetes(), device)


@cache
def _classification(name: str) -> dict[str, Split]:
    images = name == "digits"
    table = np.loadtxt(_folder() / _FILES[name], delimiter=",", skiprows=0 if images else 1)  # the class comes last
    inputs, label = torch.from_numpy(table[:, :-1].copy()), torch.from_numpy(table[:, -1].astype(np.int64))
    data = split_rows({"input": inputs.reshape(-1, 1, 8, 8) if images else inputs, "label": label}, label)
    return standardized(data, "input", per_feature=not images)


@cache
def _diabetes() -> dict[str, Split]:
    rows, target = (
        torch.from_numpy(np.loadtxt(_folder() / f"diabetes_{part}.csv.gz")) for part in ("data_raw", "target")
    )
    data = split_rows({"input": rows, "target": target[:, None]})
    return standardized(standardized(data, "input", per_feature=True), "target", per_feature=True)


def _folder() -> Path:
    return package_folder("sklearn") / "datasets" / "data"
