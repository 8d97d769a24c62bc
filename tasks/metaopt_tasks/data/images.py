"""Images without a download: patches of the pictures that scikit-image and scikit-learn ship, faces, and drawn shapes.

Every picture is cut into a grid of square cells, twice as wide as a patch. A cell belongs to train, valid or test, and
patches lie inside their cell, so patches of different splits never share a pixel.
"""

from __future__ import annotations

import math
from functools import cache
from io import BytesIO
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.task import Split
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.draws import normal, uniform
from metaopt_tasks.data.load import TRAIN_SHARE, VALID_SHARE, moved, package_folder, split_rows, standardized

TEXTURES = ("brick.png", "grass.png", "gravel.png", "coins.png", "camera.png", "clock_motion.png")
HELD_OUT_TEXTURES = ("cell.png", "text.png", "ihc.png", "hubble_deep_field.jpg", "retina.jpg")
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "china.jpg", "flower.jpg")
SHAPES = ("disc", "ring", "square", "triangle", "cross", "stripes")

_PATCHES = {8: 1500, 16: 1500, 32: 600}  # by size: of each picture, in all splits together
_DRAWINGS = 600  # of each shape
_GRID = 4  # a pixel of a drawing is the mean of 4 x 4 points
_SCIKIT_LEARN = ("china.jpg", "flower.jpg")


def textures(device: Any = "cpu", size: int = 8) -> dict[str, Split]:
    """Grey patches of six pictures: ``input`` [9000, 1, size, size] and ``label``, which picture, in `TEXTURES`.

    Args:
        device: where the data live.
        size: 8 (of pictures at half resolution) or 16.
    """
    return moved(_patches(TEXTURES, size, "L", 2 if size == 8 else 1), device)


def held_out_textures(device: Any = "cpu") -> dict[str, Split]:
    """Grey patches of five other pictures, `HELD_OUT_TEXTURES`, which no training sees: ``input`` [3000, 1, 32, 32]."""
    return moved(_patches(HELD_OUT_TEXTURES, 32, "L", 1), device)


def photos(device: Any = "cpu", size: int = 16) -> dict[str, Split]:
    """Colour patches of six photographs: ``input`` [N, 3, size, size] and ``label``, which photograph, in `PHOTOS`.

    There are 9,000, and 3,600 of size 32.

    Args:
        device: where the data live.
        size: 8 (of photographs at half resolution), 16 or 32.
    """
    return moved(_patches(PHOTOS, size, "RGB", 2 if size == 8 else 1), device)


def faces(device: Any = "cpu") -> dict[str, Split]:
    """100 faces (``label`` 1) and 100 pieces of background (0), from Labeled Faces in the Wild: ``input`` [200, 1, 25, 25]."""
    return moved(_faces(), device)


def shapes(device: Any = "cpu", size: int = 8, seed: int = 0) -> dict[str, Split]:
    """Drawn `SHAPES` at random places, sizes, angles and contrasts, with noise: ``input`` [3600, 1, size, size].

    Args:
        device: where the data live.
        size: of the images.
        seed: of everything random.
    """
    return moved(_shapes(size, seed), device)


def picture(name: str, mode: str = "L") -> Tensor:
    """A shipped picture as float64 [C, H, W] in [0, 1].

    Args:
        name: a file of scikit-image's ``data`` folder, or of scikit-learn's ``datasets/images``.
        mode: ``L`` (grey, one channel) or ``RGB``.
    """
    from PIL import Image  # comes with scikit-image

    opened = Image.open(BytesIO(_shipped(name))).convert(mode)
    pixels = torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8)
    return pixels.reshape(opened.height, opened.width, -1).permute(2, 0, 1).double() / 255


def _shipped(name: str) -> bytes:
    # not skimage.data's own functions, which may download
    package, folder = ("sklearn", "datasets/images") if name in _SCIKIT_LEARN else ("skimage", "data")
    return (package_folder(package) / folder / name).read_bytes()


@cache
def _patches(names: tuple[str, ...], size: int, mode: str, reduce: int) -> dict[str, Split]:
    """Patches [N, C, size, size] of pictures that were averaged over ``reduce`` x ``reduce`` pixels."""
    require_choice("size", size, _PATCHES)
    generator = Generator().manual_seed(size)
    shares = {"train": TRAIN_SHARE, "valid": VALID_SHARE, "test": 1 - TRAIN_SHARE - VALID_SHARE}
    parts: dict[str, list[Tensor]] = {split: [] for split in shares}
    labels: dict[str, list[Tensor]] = {split: [] for split in shares}
    for label, name in enumerate(names):
        image = F.avg_pool2d(picture(name, mode), reduce)
        windows = image.unfold(1, size, 1).unfold(2, size, 1)  # [C, rows, columns, size, size], a view
        cells = torch.cartesian_prod(*(torch.arange(length // (2 * size)) * 2 * size for length in image.shape[1:]))
        for split, group in split_rows({"corner": cells}, seed=label).items():
            count = round(shares[split] * _PATCHES[size])
            corners = group.tensors["corner"][torch.arange(count) % len(group)]
            row, column = (corners + torch.randint(size + 1, (count, 2), generator=generator)).T
            parts[split].append(windows[:, row, column].transpose(0, 1))
            labels[split].append(torch.full((count,), label))
    data = {split: Split({"input": torch.cat(parts[split]), "label": torch.cat(labels[split])}) for split in shares}
    return standardized(data, "input")


@cache
def _faces() -> dict[str, Split]:
    import numpy as np

    images = torch.from_numpy(np.load(BytesIO(_shipped("lfw_subset.npy")), allow_pickle=False)).double()
    label = (torch.arange(len(images)) < 100).long()
    return standardized(split_rows({"input": images[:, None], "label": label}, label), "input")


@cache
def _shapes(size: int, seed: int) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)
    images = torch.cat([_drawings(shape, size, generator) for shape in SHAPES])
    label = torch.arange(len(SHAPES)).repeat_interleave(_DRAWINGS)
    return standardized(split_rows({"input": images, "label": label}, label), "input")


def _drawings(shape: str, size: int, generator: Generator) -> Tensor:
    """Images [_DRAWINGS, 1, size, size], float64."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * uniform(generator, _DRAWINGS, 1, 1)

    x0, y0, radius, angle = between(-0.3, 0.3), between(-0.3, 0.3), between(0.45, 0.75), between(0, 2 * math.pi)
    ticks = (torch.arange(_GRID * size, dtype=torch.float64) + 0.5) * (2 / (_GRID * size)) - 1
    x, y = (ticks[None, None, :] - x0) / radius, (ticks[None, :, None] - y0) / radius
    u, v = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    covered = F.avg_pool2d(_inside(shape, u, v).double()[:, None], _GRID)
    noise = normal(generator, *covered.shape)
    return between(0.5, 1.0)[..., None] * covered + 0.1 * noise


def _inside(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """Whether points (u, v) are in the shape, whose radius is about 1."""
    across = torch.maximum(u.abs(), v.abs())
    radius = torch.hypot(u, v)
    match shape:
        case "disc":
            return radius < 0.9
        case "ring":
            return (radius < 1) & (radius > 0.55)
        case "square":
            return across < 0.85
        case "triangle":
            return (v > -0.5) & (math.sqrt(3) * u.abs() + v < 1)
        case "cross":
            return (across < 1) & (torch.minimum(u.abs(), v.abs()) < 0.25)
        case _:  # stripes, all over the image
            return (u * 1.2) % 1 < 0.5
