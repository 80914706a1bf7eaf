"""Decompositions against NumPy, SciPy and hand-worked numbers; bad input says what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.errors import DecompositionError
from lora_lightning.linalg.decompose import (
    effective_rank,
    energy_rank,
    explained_variance,
    optimal_hard_threshold,
    pivoted_qr,
    product_svd,
    spectrum,
    truncated_svd,
)
from lora_lightning.linalg.streaming_svd import StreamingSVD

D = torch.float64


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def low_rank(rows: int, columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    return noise(rows, rank, seed=seed) @ noise(rank, columns, seed=seed + 1)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1)])
def test_svd_is_numpys(shape):
    matrix = noise(*shape)
    found = truncated_svd(matrix)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    torch.testing.assert_close(found.S, torch.from_numpy(values))
    torch.testing.assert_close(found.product(), matrix)
    assert (found.U.gather(0, found.U.abs().argmax(0, keepdim=True)) > 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000), st.data())
def test_the_truncation_is_the_nearest_of_its_rank(rows, columns, seed, data):
    matrix = noise(rows, columns, seed=seed)
    rank = data.draw(st.integers(1, min(rows, columns)))
    error = torch.linalg.matrix_norm(matrix - truncated_svd(matrix, rank).product())
    left = np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:]
    assert float(error) == pytest.approx(float(np.sqrt((left**2).sum())), abs=1e-9)


def test_randomised_svd_finds_a_low_rank_and_leaves_the_generator_alone():
    matrix = low_rank(200, 120, 6)
    before = torch.random.get_rng_state()
    found = truncated_svd(matrix, 6, randomised=True)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(found.product(), matrix)
    exact = truncated_svd(matrix, 6)
    torch.testing.assert_close(found.S, exact.S)
    torch.testing.assert_close(found.U, exact.U)  # signs as well
    again = truncated_svd(matrix, 6, randomised=True)
    assert torch.equal(found.Vh, again.Vh)


def test_randomised_svd_of_a_decaying_spectrum():
    u, _ = torch.linalg.qr(noise(150, 100))
    v, _ = torch.linalg.qr(noise(100, 100, seed=1))
    matrix = (u * 0.8 ** torch.arange(100, dtype=D)) @ v.T
    found = truncated_svd(matrix, 8, randomised=True, seed=3)
    torch.testing.assert_close(found.S, 0.8 ** torch.arange(8, dtype=D), rtol=1e-4, atol=0)


@pytest.mark.parametrize("matrix", [torch.zeros(5, 4), torch.ones(5, 4), torch.eye(4)[:, :1]])
def test_singular_matrices_are_no_special_case(matrix):
    found = truncated_svd(matrix)
    torch.testing.assert_close(found.product(), matrix)
    q, r = pivoted_qr(matrix)
    torch.testing.assert_close(q @ r, matrix)


def test_qr_takes_the_largest_columns_first():
    matrix = noise(6, 9)
    matrix[:, 4] *= 10
    q, r = pivoted_qr(matrix)
    torch.testing.assert_close(q @ r, matrix)
    torch.testing.assert_close(q.T @ q, torch.eye(6, dtype=D))
    q1, r1 = pivoted_qr(matrix, 1)
    torch.testing.assert_close(q1 @ r1[:, 4:5], matrix[:, 4:5])
    low = low_rank(8, 10, 3)
    q3, r3 = pivoted_qr(low, 3)
    torch.testing.assert_close(q3 @ r3, low)


@pytest.mark.parametrize(
    ("matrix", "rank", "said"),
    [
        (torch.zeros(0, 3), None, r"shape \(0, 3\)"),
        (torch.zeros(3), None, r"shape \(3,\)"),
        (torch.zeros(3, 3, dtype=torch.long), None, "floating-point"),
        (torch.tensor([[1.0, float("nan")]]), None, "1 values that are NaN"),
        (torch.tensor([[1.0, float("inf")]]), None, "infinite"),
        (torch.zeros(4, 3), 4, "ranks 1 to 3, got 4"),
        (torch.zeros(4, 3), 0, "got 0"),
    ],
)
@pytest.mark.parametrize("decompose", [truncated_svd, pivoted_qr])
def test_bad_input_says_what_is_wrong(decompose, matrix, rank, said):
    with pytest.raises(DecompositionError, match=said):
        decompose(matrix, rank)


def test_half_precision_is_summed_in_float32():
    matrix = noise(5, 4).to(torch.bfloat16)
    assert truncated_svd(matrix).S.dtype == torch.float32


def test_the_spectrum_of_a_product_comes_from_its_factors():
    B, A = noise(20, 3), noise(3, 15, seed=1)
    whole = truncated_svd(B @ A, 3)
    found = product_svd(B, A)
    torch.testing.assert_close(found.S, whole.S)
    torch.testing.assert_close(found.product(), B @ A)
    torch.testing.assert_close(spectrum(B, A, -2.0).double(), 2 * whole.S, rtol=1e-5, atol=1e-5)
    # More factors than the smaller side has directions.
    torch.testing.assert_close(product_svd(B[:2], A).product(), B[:2] @ A)


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_energy_of_known_spectra():
    values = torch.tensor([3.0, 2.0, 1.0])  # 9, 4, 1 of 14
    torch.testing.assert_close(explained_variance(values), torch.tensor([9, 4, 1], dtype=D) / 14)
    assert [energy_rank(values, e) for e in (0.1, 9 / 14, 0.7, 13 / 14, 0.95, 1.0)] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    assert energy_rank(values, 0.5, total=28.0) == 3  # the rest lies in values not given
    assert energy_rank(torch.zeros(3), 0.9) == 0
    with pytest.raises(DecompositionError, match=r"got 1\.5"):
        energy_rank(values, 1.5)


def test_the_hard_threshold_finds_the_signals_rank():
    # ω(1) = 2.86 by the approximation (2.858 in the paper's table).
    assert optimal_hard_threshold(torch.ones(7), (7, 7)) == pytest.approx(2.86)
    matrix = 3 * low_rank(100, 80, 4) + noise(100, 80, seed=5)
    values = truncated_svd(matrix).S
    assert int((values > optimal_hard_threshold(values, (100, 80))).sum()) == 4
    with pytest.raises(DecompositionError, match="needs all 80"):
        optimal_hard_threshold(values[:10], (100, 80))


# ---- a stream ----------------------------------------------------------------------------------


def test_a_stream_of_few_directions_is_exact():
    rows = low_rank(300, 40, 5)
    svd = StreamingSVD(5, spare=3)
    for batch in rows.split(17):
        svd.update(batch)
    exact = truncated_svd(rows, 5)
    torch.testing.assert_close(svd.singular_values, exact.S)
    torch.testing.assert_close(svd.components.abs(), exact.Vh.abs())
    assert svd.rows == 300
    assert float(svd.explained_variance.sum()) == pytest.approx(1.0)


def test_a_stream_of_noise_on_a_signal_is_near():
    u, _ = torch.linalg.qr(noise(2000, 60))
    v, _ = torch.linalg.qr(noise(60, 60, seed=1))
    rows = (u * 100 * 0.7 ** torch.arange(60, dtype=D)) @ v.T
    svd = StreamingSVD(4)
    for batch in rows.split(100):
        svd.update(batch)
    exact = truncated_svd(rows)
    torch.testing.assert_close(svd.singular_values, exact.S[:4], rtol=1e-3, atol=0)
    assert float((svd.components @ exact.Vh[:4].T).square().sum()) > 4 - 1e-3
    part = exact.S[:4] ** 2 / (exact.S**2).sum()
    torch.testing.assert_close(svd.explained_variance, part, rtol=1e-3, atol=0)


def test_it_says_when_the_subspace_has_settled():
    svd = StreamingSVD(2)
    first = torch.eye(6, dtype=D)[:2] * 5
    svd.update(first)
    assert not svd.converged(0.5)  # nothing to compare with
    svd.update(first)
    assert svd.converged(0.999)
    svd.update(torch.eye(6, dtype=D)[3:5] * 50)
    assert not svd.converged(0.5)  # two other directions lead now


def test_a_stream_takes_batches_of_any_size():
    svd = StreamingSVD(3)
    svd.update(noise(1, 4))
    assert svd.components.shape == (1, 4)
    svd.update(noise(50, 4, seed=1))
    torch.testing.assert_close(svd.components @ svd.components.T, torch.eye(3, dtype=D))


def test_a_stream_of_bad_batches():
    with pytest.raises(DecompositionError, match="at least 1"):
        StreamingSVD(0)
    svd = StreamingSVD(2)
    with pytest.raises(DecompositionError, match="no rows"):
        _ = svd.components
    svd.update(noise(3, 4))
    with pytest.raises(DecompositionError, match="rows of 5 numbers after rows of 4"):
        svd.update(noise(3, 5))
    with pytest.raises(DecompositionError, match="NaN"):
        svd.update(torch.full((2, 4), float("nan")))
    assert svd.energy == pytest.approx(float(noise(3, 4).square().sum()))
