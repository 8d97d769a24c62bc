"""Text that every Python carries: what the windows cover, and that they are that text."""

import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metaopt import registry
from metaopt.task import Split
from metaopt_tasks.data.text import SOURCE_FILES, TextWindows, pydoc_text, python_source, text_version, vocabulary


def whole_text(splits: dict[str, Split]) -> Tensor:
    return torch.cat([split.tensors["tokens"] for split in splits.values()])


def documentation() -> str:
    from pydoc_data.topics import topics

    return "".join(topics[key] for key in sorted(topics))


def source_code() -> str:
    library = Path(sysconfig.get_path("stdlib"))
    return "".join((library / file).read_text("utf-8") for file in SOURCE_FILES)


@pytest.mark.parametrize(("source", "text"), [("pydoc_text", documentation), ("python_chars", source_code)])
def test_splits_are_contiguous_and_decode_to_the_text(source: str, text: object) -> None:
    assert callable(text)
    original = text()
    chars = vocabulary({"python_chars": "python_source"}.get(source, source))
    assert len(chars) == len(set(chars)) == 64
    decoded = "".join(chars[token] for token in whole_text(registry.create("data_source", source, context=16)).tolist())
    assert len(decoded) == len(original)
    assert all(a == b for a, b in zip(decoded, original, strict=True) if a != chars[0])
    assert decoded.count(chars[0]) < 0.02 * len(original)


@pytest.mark.parametrize(("splits", "text"), [("pydoc_bytes", documentation), ("python_source", source_code)])
def test_bytes_are_the_text_in_utf8(splits: str, text: object) -> None:
    assert callable(text)
    tokens = whole_text(registry.create("data_source", splits))
    assert bytes(tokens.to(torch.uint8).numpy().tobytes()) == text().encode("utf-8")


def test_the_source_code_is_of_the_size_that_the_documentation_says() -> None:
    splits = python_source()
    assert 1_500_000 < len(whole_text(splits)) < 2_500_000
    shares = [len(split.tensors["tokens"]) / len(whole_text(splits)) for split in splits.values()]
    assert shares == pytest.approx([0.90, 0.05, 0.05], abs=1e-4)
    assert text_version().startswith("python-3.")


def test_windows_cover_every_position_once_in_evaluation_and_overlap_in_training() -> None:
    text = torch.arange(100)
    overlapping, disjoint = TextWindows({"tokens": text}, 8), TextWindows({"tokens": text}, 8, stride=8)
    assert len(overlapping) == 92
    assert overlapping.take(torch.tensor([91]))["tokens"][0].tolist() == list(range(91, 100))
    assert disjoint.take(torch.arange(len(disjoint)))["tokens"][:, 1:].flatten().tolist() == list(range(1, 97))
    assert disjoint.take(torch.zeros(2, 3, dtype=torch.int64))["tokens"].shape == (2, 3, 9)
    assert overlapping.to("meta").context == 8, "a moved split is still made of windows"


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="less than the split's 5 tokens, got 8"):
        TextWindows({"tokens": torch.arange(5)}, 8)
    with pytest.raises(ValueError, match="level must be one of chars, bytes, got 'words'"):
        pydoc_text(level="words")
