"""Data that users bring: any map-style data set, torchvision's, Hugging Face's."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator
from torch.utils.data import Dataset, TensorDataset

from metaopt import registry
from metaopt_tasks.data.adapters import from_dataset
from metaopt_tasks.data.load import load


def table(size: int = 200, classes: int = 4) -> TensorDataset:
    inputs = torch.arange(size, dtype=torch.float32)[:, None] * torch.tensor([1.0, 100.0])
    return TensorDataset(inputs, torch.arange(size) % classes)


class Pictures(Dataset):
    """Examples as Hugging Face's data sets give them."""

    def __init__(self, size: int = 40) -> None:
        draw = torch.randint(256, (size, 6, 5, 3), generator=Generator().manual_seed(0), dtype=torch.uint8)
        self.pixels = draw.numpy()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": Image.fromarray(self.pixels[i]), "label": i % 2}


def test_one_data_set_is_cut_class_by_class_into_disjoint_parts() -> None:
    data = from_dataset(table(), standardize=False)
    assert {name: len(split) for name, split in data.items()} == {"train": 140, "valid": 28, "test": 32}
    first = torch.cat([split.tensors["input"][:, 0] for split in data.values()])
    assert sorted(first.tolist()) == list(range(200))
    for split in data.values():
        rows = split.tensors["input"][:, 0].long()
        assert torch.equal(split.tensors["label"], rows % 4), "each input keeps its label"
        assert split.tensors["label"].bincount().unique().numel() == 1


def test_given_splits_stay_and_a_missing_one_is_cut_from_train() -> None:
    data = from_dataset({"train": table(200), "test": table(20)}, standardize=False)
    assert len(data["test"]) == 20
    assert len(data["train"]) + len(data["valid"]) == 200 and len(data["valid"]) == 28
    together = torch.cat([data["train"].tensors["input"], data["valid"].tensors["input"]])[:, 0]
    assert sorted(together.tolist()) == list(range(200))
    all_given = from_dataset({"train": table(20), "valid": table(8), "test": table(4)})
    assert [len(split) for split in all_given.values()] == [20, 8, 4]


def test_tables_are_standardised_by_feature_and_pictures_as_a_whole() -> None:
    inputs = from_dataset(table())["train"].tensors["input"]
    torch.testing.assert_close(inputs.std(0), torch.ones(2))
    pictures = from_dataset(Pictures(), input="image", target="label")["train"].tensors["input"]
    assert pictures.shape == (28, 3, 6, 5) and float(pictures.std()) == pytest.approx(1)


def test_pil_numpy_and_tensor_images_agree() -> None:
    pixels = Pictures().pixels
    kinds = [
        [(Image.fromarray(p), 0) for p in pixels],
        [(p, np.int64(0)) for p in pixels],
        [(torch.from_numpy(p).permute(2, 0, 1), 0) for p in pixels],
    ]
    read = [from_dataset(list(kind), standardize=False)["train"].tensors["input"] for kind in kinds]
    torch.testing.assert_close(read[0], read[1], rtol=0, atol=0)
    torch.testing.assert_close(read[0], read[2], rtol=0, atol=0)
    assert float(read[0].max()) == 1


def test_floats_are_regression_targets() -> None:
    rows = [([float(i), 2.0], 0.5 * i) for i in range(20)]
    data = from_dataset(rows, limit=10)
    assert data["train"].tensors["target"].shape == (7, 1)
    assert sum(len(split) for split in data.values()) == 10


def test_a_task_trains_on_a_data_set_from_a_users_file(tmp_path: Any) -> None:
    file = tmp_path / "letters.py"
    file.write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\nfrom metaopt_tasks.data.adapters import from_dataset\n"
        "def letters(device='cpu'):\n"
        "    rows = TensorDataset(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3)\n"
        "    return from_dataset(rows, device=device)\n"
    )
    task = registry.create("task", "digits_mlp", data=f"{file}:letters")
    assert task.classes == 3 and task.init(Generator().manual_seed(0))["fc1.weight"].shape == (32, 3)


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"train and perhaps valid and test, got \['test', 'training'\]"):
        from_dataset({"training": table(), "test": table()})
    with pytest.raises(ValueError, match="at least one example, got none"):
        from_dataset({"train": table(), "test": []})
    with pytest.raises(ValueError, match=r"single whole numbers, got shape \(2,\)"):
        from_dataset([(torch.zeros(3), torch.tensor([1, 2]))] * 5)


# torchvision and Hugging Face, by stand-ins


def test_torchvision_data_sets_by_name_without_download_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(root: str, train: bool, download: bool) -> list[tuple[Any, int]]:
        asked.append((root, train, download))
        pictures = Pictures(40 if train else 10)
        return [(pictures[i]["image"], pictures[i]["label"]) for i in range(len(pictures))]

    package, datasets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    datasets.CIFAR10, package.datasets = fake, datasets  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    data = load("torchvision", dataset="CIFAR10", root="here")
    assert asked == [("here", True, False), ("here", False, False)]
    assert len(data["test"]) == 10 and data["train"].tensors["input"].shape[1:] == (3, 6, 5)
    with pytest.raises(ValueError, match=r"class of torchvision\.datasets, such as CIFAR10, got 'Nothing'"):
        load("torchvision", dataset="Nothing")


def test_hugging_face_data_sets_by_name_or_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    loaded = {"train": Pictures(40), "validation": Pictures(12), "unsupervised": Pictures(4), "test": Pictures(8)}

    def load_dataset(name: str, **arguments: Any) -> Any:
        asked.append((name, arguments))
        return loaded

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    by_name = load("huggingface", dataset="pictures", revision="1")
    assert asked == [("pictures", {"revision": "1"})]
    by_object = load("huggingface", dataset=loaded)
    for name, size in (("train", 40), ("valid", 12), ("test", 8)):
        assert len(by_name[name]) == size
        torch.testing.assert_close(by_name[name].tensors, by_object[name].tensors, rtol=0, atol=0)
    assert len(load("huggingface", dataset=Pictures(20))["train"]) == 14


@pytest.mark.parametrize("name", ["torchvision", "huggingface"])
def test_a_missing_package_names_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchvision", "torchvision.datasets", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)  # import then says that there is none
    with pytest.raises(registry.RegistryError, match=rf"pip install 'torch-metaopt\[{name}\]'"):
        load(name, dataset="CIFAR10")
