"""Non-negative factorisations against scikit-learn and their own laws."""

from __future__ import annotations

import pytest
import torch
from sklearn import decomposition

from lora_lightning.errors import DecompositionError
from lora_lightning.linalg.nonnegative import nmf, semi_nmf

D = torch.float64


def parts(rows: int = 60, columns: int = 24, rank: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(rows, rank, generator=generator, dtype=D)
    h = torch.rand(rank, columns, generator=generator, dtype=D)
    return (w * (w > 0.4)) @ (h * (h > 0.5))


@pytest.mark.parametrize("loss", ["frobenius", "kullback-leibler"])
def test_factors_are_not_negative_and_the_loss_falls(loss):
    x = parts()
    found = nmf(x, 3, loss=loss, tolerance=1e-7, max_iterations=2000)
    assert found.W.shape == (60, 3)
    assert found.H.shape == (3, 24)
    assert (found.W >= 0).all()
    assert (found.H >= 0).all()
    assert all(b <= a + 1e-12 for a, b in zip(found.losses, found.losses[1:], strict=False))
    error = torch.linalg.matrix_norm(x - found.W @ found.H) / torch.linalg.matrix_norm(x)
    assert float(error) < 0.03


@pytest.mark.parametrize("loss", ["frobenius", "kullback-leibler"])
def test_the_loss_reaches_scikit_learns(loss):
    x = parts() + 0.05 * torch.rand(60, 24, generator=torch.Generator().manual_seed(9), dtype=D)
    other = decomposition.NMF(
        3, init="random", solver="mu", beta_loss=loss, max_iter=1000, tol=0, random_state=0
    )
    other.fit(x.numpy())
    found = nmf(x, 3, loss=loss, max_iterations=1000, tolerance=0.0)
    # scikit-learn gives the square root of twice the loss.
    assert (2 * found.losses[-1]) ** 0.5 == pytest.approx(other.reconstruction_err_, rel=0.02)


def test_iterations_are_counted_and_limited():
    short = nmf(parts(), 3, max_iterations=7, tolerance=0.0)
    assert short.iterations == 7
    assert not short.converged
    assert nmf(parts(), 3, max_iterations=5000).converged


def test_the_seed_decides():
    a, b, c = (nmf(parts(), 3, seed=s, max_iterations=20) for s in (1, 1, 2))
    assert torch.equal(a.H, b.H)
    assert not torch.equal(a.H, c.H)


def test_signed_rows_have_signed_parts_and_weights_that_are_not_negative():
    generator = torch.Generator().manual_seed(3)
    w = torch.rand(80, 3, generator=generator, dtype=D)
    h = torch.randn(3, 20, generator=generator, dtype=D)
    x = w @ h
    found = semi_nmf(x, 3, tolerance=1e-9, max_iterations=3000)
    assert (found.W >= 0).all()
    assert (found.H < 0).any()
    assert all(b <= a + 1e-9 for a, b in zip(found.losses, found.losses[1:], strict=False))
    error = torch.linalg.matrix_norm(x - found.W @ found.H) / torch.linalg.matrix_norm(x)
    assert float(error) < 0.05


@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("factorise", [nmf, semi_nmf])
def test_constant_rows(factorise, value):
    x = torch.full((8, 5), value, dtype=D)
    found = factorise(x, 2)
    torch.testing.assert_close(found.W @ found.H, x, atol=1e-2, rtol=1e-2)
    assert found.W.isfinite().all()


@pytest.mark.parametrize(
    ("matrix", "rank", "said"),
    [
        (torch.zeros(0, 3), 1, "shape"),
        (torch.ones(3, 3), 4, "ranks 1 to 3"),
        (torch.tensor([[1.0, float("nan")]]), 1, "NaN"),
    ],
)
@pytest.mark.parametrize("factorise", [nmf, semi_nmf])
def test_bad_input_says_what_is_wrong(factorise, matrix, rank, said):
    with pytest.raises(DecompositionError, match=said):
        factorise(matrix, rank)


def test_signed_rows_are_sent_to_the_other_one():
    with pytest.raises(DecompositionError, match="use semi_nmf"):
        nmf(-torch.eye(3), 2)
    with pytest.raises(DecompositionError, match="frobenius"):
        nmf(torch.eye(3), 2, loss="l1")
