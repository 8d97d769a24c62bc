"""Joint-embedding losses equal their papers' formulas; views are keyed; the judged loss does not depend on the chunk."""

import math

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt_tasks.contrastive import Contrastive, barlow_twins, contrastive, info_nce, vicreg


def embeddings(size: int = 12, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(0)
    one = torch.randn(size, dim, generator=generator, dtype=torch.float64)
    return one, one + 0.5 * torch.randn(size, dim, generator=generator, dtype=torch.float64)


def test_info_nce_is_the_cross_entropy_of_the_similarity_table() -> None:
    one, two = embeddings()
    table = F.cosine_similarity(one[:, None], two[None], dim=-1) / 0.3
    rows = torch.arange(12)
    expected = (F.cross_entropy(table, rows) + F.cross_entropy(table.T, rows)) / 2
    torch.testing.assert_close(info_nce(one, two, 0.3, negatives=11), expected)


def test_info_nce_means_the_same_in_a_larger_batch() -> None:
    one, two = embeddings(4096, 8)
    small = torch.stack([info_nce(a, b, 0.5, 15) for a, b in zip(one.split(16), two.split(16), strict=True)])
    error = 4 * float(small.std()) / math.sqrt(len(small))
    assert float(info_nce(one, two, 0.5, 15)) == pytest.approx(float(small.mean()), abs=error)


@pytest.mark.parametrize("size", [4, 12, 40])
def test_info_nce_of_one_point_is_guessing(size: int) -> None:
    same = torch.ones(size, 3)
    assert float(info_nce(same, same, 0.2, negatives=11)) == pytest.approx(math.log(12), rel=1e-5)


def test_vicreg_is_its_papers_sum() -> None:
    one, two = embeddings()
    expected = 25 * ((one - two) ** 2).mean()
    for z in (one, two):
        covariance = torch.cov(z.T)
        off = covariance - covariance.diag().diag()
        expected = expected + 25 * (1 - (z.var(0) + 1e-4).sqrt()).clamp(0).mean() + (off**2).sum() / 5
    torch.testing.assert_close(vicreg(one, two), expected)


def test_barlow_twins_is_its_papers_sum() -> None:
    one, two = embeddings()
    table = torch.corrcoef(torch.cat([one, two], 1).T)[:5, 5:]
    off = table - table.diag().diag()
    expected = (((1 - table.diag()) ** 2).sum() + (off**2).sum() / 4) / 5
    torch.testing.assert_close(barlow_twins(one, two), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("criterion", ["infonce", "vicreg", "barlow"])
def test_an_embedding_that_ignores_its_input_normalizes_to_one(criterion: str) -> None:
    task = contrastive(criterion=criterion)
    silent = {name: torch.zeros_like(p) for name, p in task.init(Generator().manual_seed(0)).items()}
    silent["head.bias"] += 1
    batch = task.valid.take(torch.arange(64)) | {"random": torch.tensor(1)}
    assert float(task.normalize(task.loss(silent, batch))) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("criterion", ["infonce", "vicreg", "barlow"])
def test_a_chunk_of_one_example_has_a_finite_loss(criterion: str) -> None:
    task = contrastive(criterion=criterion)
    batch = task.valid.take(torch.tensor([0])) | {"random": torch.tensor(1)}
    assert bool(torch.isfinite(task.loss(task.init(Generator().manual_seed(0)), batch)))


def test_barlow_twins_of_copies_of_one_coordinate_cost_one() -> None:
    same = torch.randn(64, 1, generator=Generator().manual_seed(0)).expand(64, 7)
    assert float(barlow_twins(same, same)) == pytest.approx(1, abs=1e-3)


def series(shift: int) -> Contrastive:
    return contrastive(data="mnist1d", channels=(4,), shift=shift, noise=0.0, mask=0.0)


def test_a_shifted_view_is_its_input_turned_by_at_most_that_much() -> None:
    task, x = series(shift=2), torch.arange(40.0).expand(200, 1, 40)
    views = task.view(x, torch.tensor(3), stream=1)
    moved = views[:, 0, 0].long()  # number at place 0 tells the turn
    for row, start in zip(views[:, 0], moved, strict=True):
        assert torch.equal(row, x[0, 0].roll(-int(start)))
    assert set(((moved + 2) % 40).tolist()) == {0, 1, 2, 3, 4}


def test_noise_and_mask_have_their_size() -> None:
    task = contrastive(noise=0.5, mask=0.25)
    view = task.view(torch.full((400, 1, 8, 8), 3.0), torch.tensor(3), stream=0)
    kept = view[view != 0]
    assert len(kept) / view.numel() == pytest.approx(0.75, abs=0.01)
    assert float(kept.mean()) == pytest.approx(3, abs=0.02) and float(kept.std()) == pytest.approx(0.5, abs=0.02)


def test_views_follow_key_and_stream() -> None:
    task = contrastive()
    x = task.train.tensors["input"][:4]
    view = task.view(x, torch.tensor(1), 0)
    assert torch.equal(view, task.view(x, torch.tensor(1), 0))
    assert not torch.equal(view, task.view(x, torch.tensor(1), 1))
    assert not torch.equal(view, task.view(x, torch.tensor(2), 0))


def test_bad_arguments_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="criterion must be one of infonce, vicreg, barlow"):
        contrastive(criterion="triplet")
    with pytest.raises(ValueError, match="channels and shift need images or series"):
        contrastive(data="wine", shift=1)
    with pytest.raises(ValueError, match=r"mask must be in \[0, 1\)"):
        contrastive(mask=1.0)
