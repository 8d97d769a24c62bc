"""The data sources: what every one of them promises, and what each is."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt import registry
from metaopt_tasks.data import images, mnist1d, synthetic
from metaopt_tasks.data.load import load

SHAPES = {
    "digits": (1, 8, 8),
    "iris": (4,),
    "wine": (13,),
    "breast_cancer": (30,),
    "diabetes": (10,),
    "textures8": (1, 8, 8),
    "textures16": (1, 16, 16),
    "textures32": (1, 32, 32),
    "photos8": (3, 8, 8),
    "photos16": (3, 16, 16),
    "photos32": (3, 32, 32),
    "faces": (1, 25, 25),
    "shapes8": (1, 8, 8),
    "shapes16": (1, 16, 16),
    "mnist1d": (1, 40),
    "mixtures": (8,),
    "mixtures_2d": (2,),
    "mixtures_16d": (16,),
    "mixtures_64d": (64,),
    "spirals": (2,),
    "rings": (2,),
    "teacher": (16,),
    "teacher_2d": (2,),
    "teacher_4d": (4,),
    "teacher_8d": (8,),
    "teacher_32d": (32,),
    "teacher_64d": (64,),
}
REGRESSION = [name for name in SHAPES if name.startswith("teacher") or name == "diabetes"]


@pytest.mark.parametrize("name", SHAPES)
def test_a_source_is_standardised_labelled_licensed_and_the_same_each_time(name: str) -> None:
    data = load(name)
    train = data["train"].tensors
    assert train["input"].shape[1:] == SHAPES[name] and train["input"].dtype == torch.float32
    assert float(train["input"].mean()) == pytest.approx(0, abs=1e-4)
    assert float(train["input"].std()) == pytest.approx(1, abs=0.01)
    assert set(data) == {"train", "valid", "test"} and len(data["train"]) > len(data["test"]) > 0
    if name in REGRESSION:
        assert train["target"].dtype == torch.float32 and train["target"].dim() == 2
        torch.testing.assert_close(train["target"].std(0), torch.ones(train["target"].shape[1]), atol=1e-3, rtol=0)
    else:
        seen = [split.tensors["label"].unique().tolist() for split in data.values()]
        assert seen[0] == seen[1] == seen[2] == list(range(len(seen[0]))), "each split has each class"
    spec = registry.get("data_source", name)
    assert spec.facts["license"]


MAKERS = [
    (images._patches, (images.TEXTURES, 16, "L", 1)),
    (images._shapes, (8, 0)),
    (mnist1d._mnist1d, (42,)),
    (synthetic._mixtures, (8, 5, 2, 3.0, 3000, 0)),
    (synthetic._curves, ("spirals", 3, 0.1, 3000, 0)),
    (synthetic._teacher, (16, 8, 1, 0.1, 4000, 0)),
]


@pytest.mark.parametrize(("make", "arguments"), MAKERS)
def test_data_are_determined_by_their_seed_and_leave_the_global_random_state_alone(make: Any, arguments: Any) -> None:
    one = make(*arguments)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = make.__wrapped__(*arguments)  # not from the cache
    assert torch.equal(torch.get_rng_state(), before)
    for name, split in one.items():
        torch.testing.assert_close(again[name].tensors, split.tensors, rtol=0, atol=0)


def test_digits_splits_are_disjoint_complete_and_stratified() -> None:
    from sklearn.datasets import load_digits

    splits = load("digits")
    assert {name: len(split) for name, split in splits.items()} == {"train": 1258, "valid": 270, "test": 269}
    pixels = torch.cat([split.tensors["input"] for split in splits.values()])
    original = torch.tensor(load_digits().images)
    assert len(pixels.unique(dim=0)) == len(original.unique(dim=0)) == len(pixels) == 1797
    for split in splits.values():
        shares = split.tensors["label"].bincount(minlength=10) / len(split)
        assert float((shares - 0.1).abs().max()) < 0.01


# Pictures


@pytest.mark.parametrize("name", ["coins.png", "ihc.png", "china.jpg"])
def test_pictures_are_read_as_their_packages_read_them(name: str) -> None:
    if name == "china.jpg":
        from sklearn.datasets import load_sample_image

        expected = torch.tensor(load_sample_image(name)).permute(2, 0, 1)
    else:
        from skimage import io

        path = images.package_folder("skimage") / "data" / name
        expected = torch.tensor(io.imread(str(path)))
        expected = expected[None] if expected.dim() == 2 else expected.permute(2, 0, 1)
    read = images.picture(name, "L" if len(expected) == 1 else "RGB")
    torch.testing.assert_close(read * 255, expected.double())


@pytest.mark.parametrize(
    ("names", "size"), [(images.TEXTURES, 16), (images.HELD_OUT_TEXTURES, 32), (images.PHOTOS, 32)]
)
def test_patches_are_pieces_of_their_picture_and_splits_share_no_pixel(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], size: int
) -> None:
    layout = {name: images.picture(name).shape for name in names}

    def numbered(name: str, mode: str) -> Tensor:
        """A picture whose pixels tell picture and place."""
        channels, height, width = layout[name]
        start = names.index(name) * 10**7
        place = torch.arange(height * width, dtype=torch.float64).reshape(height, width)
        return (start + place).expand(channels, height, width)

    monkeypatch.setattr(images, "picture", numbered)
    monkeypatch.setattr(images, "standardized", lambda data, key: data)
    data = images._patches.__wrapped__(names, size, "L", 1)
    pixels = {}
    for split, examples in data.items():
        patch, label = examples.tensors["input"], examples.tensors["label"]
        assert torch.equal((patch // 10**7).long().amax((1, 2, 3)), label)
        assert torch.equal((patch // 10**7).long().amin((1, 2, 3)), label)
        assert bool((patch[..., 1:] - patch[..., :-1] == 1).all()), (
            "neighbours in a patch are neighbours in the picture"
        )
        pixels[split] = set(patch.long().unique().tolist())
    assert not pixels["train"] & pixels["valid"]
    assert not pixels["train"] & pixels["test"]
    assert not pixels["valid"] & pixels["test"]


def test_held_out_pictures_are_no_training_pictures() -> None:
    assert not set(images.TEXTURES) & (set(images.HELD_OUT_TEXTURES) | set(images.PHOTOS))


def test_faces_are_the_first_hundred_images_of_scikit_image() -> None:
    from skimage.data import lfw_subset

    original = torch.tensor(lfw_subset()).flatten(1)
    data = load("faces")
    inputs = torch.cat([split.tensors["input"] for split in data.values()]).flatten(1).double()
    label = torch.cat([split.tensors["label"] for split in data.values()])
    correlation = torch.corrcoef(torch.cat([inputs, original]))[:200, 200:]
    row = correlation.argmax(1)  # standardising keeps the correlation of an image with itself 1
    assert torch.equal((row < 100).long(), label) and len(row.unique()) == 200


def test_a_missing_scikit_image_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> Any:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(images, "package_folder", missing)
    images._faces.cache_clear()
    with pytest.raises(registry.RegistryError, match=r"pip install 'torch-metaopt\[images\]'"):
        load("faces")


def test_drawn_shapes_cover_their_areas() -> None:
    ticks = torch.linspace(-1.2, 1.2, 481, dtype=torch.float64)
    v, u = torch.meshgrid(ticks, ticks, indexing="ij")
    areas = {name: float(images._inside(name, u, v).double().sum()) * 0.005**2 for name in images.SHAPES}
    assert areas["disc"] == pytest.approx(math.pi * 0.81, rel=0.01)
    assert areas["ring"] == pytest.approx(math.pi * (1 - 0.55**2), rel=0.01)
    assert areas["square"] == pytest.approx(1.7**2, rel=0.01)
    assert areas["triangle"] == pytest.approx(0.75 * math.sqrt(3), rel=0.01), "equilateral in the unit circle"
    assert areas["cross"] == pytest.approx(2 * 2 * 0.5 - 0.25, rel=0.01)


# MNIST-1D


def test_mnist1d_has_the_papers_templates_and_difficulty() -> None:
    """Greydanus and Kobak 2020, table 1: logistic regression has a test accuracy of 32 %."""
    from sklearn.linear_model import LogisticRegression

    curves = mnist1d.templates()
    assert curves.shape == (10, 12) and not curves[:, 0].any()
    torch.testing.assert_close(curves.std(1, correction=0) * 6, torch.ones(10, dtype=torch.float64))
    data = load("mnist1d")
    assert [len(split) for split in data.values()] == [4000, 500, 500]
    x, y = data["train"].tensors["input"][:, 0].numpy(), data["train"].tensors["label"].numpy()
    test_x, test_y = data["test"].tensors["input"][:, 0].numpy(), data["test"].tensors["label"].numpy()
    accuracy = LogisticRegression(max_iter=1000).fit(x, y).score(test_x, test_y)
    assert accuracy == pytest.approx(0.32, abs=0.06)


def test_mnist1d_interpolates_as_numpy() -> None:
    import numpy as np

    values = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    place = 6 * torch.rand(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    place[:, -1] = 6
    expected = [np.interp(p, np.arange(7), v) for p, v in zip(place.numpy(), values.numpy(), strict=True)]
    torch.testing.assert_close(mnist1d._interpolate(values, place), torch.tensor(np.array(expected)))


# Made-up data


def test_rings_and_spirals_cannot_be_told_apart_by_lines_but_by_neighbours() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    for name in ("rings", "spirals"):
        data = load(name)
        x, y = (data["train"].tensors[key].numpy() for key in ("input", "label"))
        test_x, test_y = (data["test"].tensors[key].numpy() for key in ("input", "label"))
        assert LogisticRegression().fit(x, y).score(test_x, test_y) < 0.5
        assert KNeighborsClassifier().fit(x, y).score(test_x, test_y) > 0.9


def test_mixtures_have_their_means_apart_by_the_separation() -> None:
    near, far = (synthetic.mixtures(dims=4, classes=2, components=1, separation=s, size=2000) for s in (0.0, 20.0))

    def gap(data: Any) -> float:
        x, y = data["train"].tensors["input"], data["train"].tensors["label"]
        return float((x[y == 0].mean(0) - x[y == 1].mean(0)).norm())

    assert gap(near) < 0.3 < 3 < gap(far)  # both features standardised, so at most 2 a feature


def test_a_teachers_noise_is_the_share_that_no_model_explains() -> None:
    clean, noisy = (synthetic.teacher(dims=3, noise=noise, seed=4) for noise in (0.0, 0.5))
    torch.testing.assert_close(clean["train"].tensors["input"], noisy["train"].tensors["input"])
    both = torch.stack([data["train"].tensors["target"][:, 0] for data in (clean, noisy)])
    assert float(torch.corrcoef(both)[0, 1] ** 2) == pytest.approx(1 / (1 + 0.5**2), abs=0.02)


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"multiple of classes times components, 10, got 3001"):
        synthetic.mixtures(size=3001)
    with pytest.raises(ValueError, match=r"multiple of the 3 classes, got 100"):
        synthetic.spirals(size=100)
    with pytest.raises(ValueError, match=r"size must be one of 8, 16, 32, got 12"):
        images.textures(size=12)
