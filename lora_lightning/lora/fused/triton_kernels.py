r"""Triton kernel of the gradients of low-rank factors; imported where a CUDA device asks for it.

Of two matrices of N rows, P (N, C) the narrower and Q (N, D), with factors F (r, C) and G (r, D),
it computes

.. math:: (Q G^T)^T P \quad \text{and} \quad (P F^T)^T Q,

which are the gradients of A and B where P and Q are x and the gradient of y, in either order. A
program works on some rows: it reads P for P Fᵀ, then Q for Q Gᵀ and its own product, then P again,
which is in the cache still. What the programs find is summed by a second kernel, always in the same
order, so that the result is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns of a program's tiles, its warps and its stages, found on an H100.
ROWS, COLUMNS, WARPS, STAGES = 64, 128, 4, 3


@triton.jit
def partial_products(
    P,
    Q,
    F,
    G,
    out,  # (programs, r, C + D), float32
    rows,
    p_row,
    q_row,
    f_rank,
    f_column,
    g_rank,
    g_column,
    C: tl.constexpr,
    D: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    N_TILE: tl.constexpr,
    C_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program's part of both products; R is the rank or more, as a power of two."""
    program = tl.program_id(0)
    n = program * N_TILE + tl.arange(0, N_TILE)
    r = tl.arange(0, R)
    inside = (n < rows)[:, None]
    n_wide = n.to(tl.int64)[:, None]
    out += program.to(tl.int64) * (RANK * (C + D))

    low_P = tl.zeros((N_TILE, R), tl.float32)
    for start in range(0, C, C_TILE):
        c = start + tl.arange(0, C_TILE)
        p = tl.load(P + n_wide * p_row + c[None, :], inside & (c < C)[None, :], 0.0)
        ranks = (c < C)[:, None] & (r < RANK)[None, :]
        f = tl.load(F + c[:, None] * f_column + r[None, :] * f_rank, ranks, 0.0)
        low_P = tl.dot(p, f.to(p.dtype), low_P, input_precision=PRECISION)
    narrow_P = tl.trans(low_P.to(P.dtype.element_ty))

    low_Q = tl.zeros((N_TILE, R), tl.float32)
    for start in range(0, D, C_TILE):
        c = start + tl.arange(0, C_TILE)
        q = tl.load(Q + n_wide * q_row + c[None, :], inside & (c < D)[None, :], 0.0)
        ranks = (c < D)[:, None] & (r < RANK)[None, :]
        f = tl.load(G + c[:, None] * g_column + r[None, :] * g_rank, ranks, 0.0)
        low_Q = tl.dot(q, f.to(q.dtype), low_Q, input_precision=PRECISION)
        found = tl.dot(narrow_P, q, input_precision=PRECISION)
        kept = (r < RANK)[:, None] & (c < D)[None, :]
        tl.store(out + r[:, None] * (C + D) + (C + c)[None, :], found, kept)
    narrow_Q = tl.trans(low_Q.to(P.dtype.element_ty))

    for start in range(0, C, C_TILE):
        c = start + tl.arange(0, C_TILE)
        p = tl.load(P + n_wide * p_row + c[None, :], inside & (c < C)[None, :], 0.0)
        found = tl.dot(narrow_Q, p, input_precision=PRECISION)
        kept = (r < RANK)[:, None] & (c < C)[None, :]
        tl.store(out + r[:, None] * (C + D) + c[None, :], found, kept)


@triton.jit
def sum_of_parts(
    parts,  # (programs, r, C + D)
    of_P,
    of_Q,
    scaling,
    programs,
    p_rank,
    p_column,
    q_rank,
    q_column,
    C: tl.constexpr,
    D: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The sum over programs, scaled, and divided into the two results."""
    k = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = k < RANK * (C + D)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, programs, AT_ONCE):
        at = start + tl.arange(0, AT_ONCE)
        where = at.to(tl.int64)[:, None] * (RANK * (C + D)) + k[None, :]
        part = tl.load(parts + where, (at < programs)[:, None] & inside[None, :], 0.0)
        total += tl.sum(part, 0)
    total *= scaling
    rank, column = k // (C + D), k % (C + D)
    tl.store(of_P + rank * p_rank + column * p_column, total, inside & (column < C))
    column -= C
    tl.store(of_Q + rank * q_rank + column * q_column, total, inside & (column >= 0))


def thin_gradients(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    wrap: Any = lambda kernel: kernel,
    tiles: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """s·(g B)ᵀ x (r, I) and s·gᵀ (x Aᵀ) (O, r), of rows g (N, O) and x (N, I).

    Args:
        g: The gradient of the output.
        x: The input.
        A: (r, I).
        B: (O, r).
        scaling: s.
        wrap: Of the kernels, within a graph `torch.library.wrap_triton`.
        tiles: Rows and columns of a tile, warps and stages, other than this module's.
    """
    columns = COLUMNS if len(A) <= 16 else COLUMNS // 2
    n_tile, c_tile, warps, stages = tiles or (ROWS, columns, WARPS, STAGES)
    rows, rank = x.shape[0], len(A)  # `len` would be a number in a graph of any batch
    g, x = (t if t.stride(1) == 1 else t.contiguous() for t in (g, x))
    grad_A, grad_B = torch.empty_like(A), torch.empty_like(B)
    # Strides along r and along the columns, rather than transposed views.
    across = [(x, A, A.stride(), grad_A, grad_A.stride())]
    across.append((g, B, B.stride()[::-1], grad_B, grad_B.stride()[::-1]))
    narrow, wide = across if x.shape[1] <= g.shape[1] else across[::-1]
    P, F, of_F, grad_F, of_grad_F = narrow
    Q, G, of_G, grad_G, of_grad_G = wide
    sizes = {"C": P.shape[1], "D": Q.shape[1], "RANK": rank}
    number = rank * (P.shape[1] + Q.shape[1])
    programs = (rows + n_tile - 1) // n_tile
    parts = torch.empty(programs, number, dtype=torch.float32, device=x.device)
    wrap(partial_products)[(programs,)](
        P, Q, F, G, parts, rows, P.stride(0), Q.stride(0), *of_F, *of_G, **sizes,
        R=max(16, triton.next_power_of_2(rank)), N_TILE=n_tile, C_TILE=c_tile, PRECISION="ieee",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    wrap(sum_of_parts)[(triton.cdiv(number, 64),)](
        parts, grad_F, grad_G, scaling, programs, *of_grad_F, *of_grad_G, **sizes,
        TILE=64, AT_ONCE=32, num_warps=4,
    )  # fmt: skip
    return grad_A, grad_B
