"""Factorisations and solvers for batches of matrices; textbook algorithms (Golub and Van Loan, 4th edition).

Vectors are unique up to sign or phase: compare products of factors, not factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from primexec.reference.dtypes import Array
from primexec.reference.registry import decline, reference


def _adjoint(a: Array) -> Array:
    return np.conjugate(np.swapaxes(a, -1, -2))


def _none(a: Array) -> Array:
    """A result that was not asked for."""
    return np.empty((0,), a.dtype)


def _batched(function: Callable[..., tuple[Any, ...]], *arrays: tuple[Array, int]) -> tuple[Array, ...]:
    """A function of single matrices or vectors (arrays with the rank of one) over their batches."""
    batch = arrays[0][0].shape[: arrays[0][0].ndim - arrays[0][1]]
    count = int(np.prod(batch))
    flat = [a.reshape((count, *a.shape[a.ndim - rank :])) for a, rank in arrays]
    # An empty batch takes its shapes from zeros.
    results = [function(*(a[i] for a in flat)) for i in range(count)] or [
        function(*(np.zeros(a.shape[1:], a.dtype) for a in flat))
    ]
    parts = [np.stack([np.asarray(r[k]) for r in results]) for k in range(len(results[0]))]
    return tuple(p[:count].reshape((*batch, *p.shape[1:])) for p in parts)


@reference("aten._linalg_svd.default")
def svd(
    A: Array, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[Array, Array, Array]:
    """U, S, Vh with A = U diag(S) Vh, S falling."""
    if not compute_uv:
        return _none(A), np.linalg.svd(A, compute_uv=False), _none(A)
    u, s, vh = np.linalg.svd(A, full_matrices=full_matrices)
    return u, s, vh


@reference("aten._linalg_eigh.default")
def eigh(A: Array, UPLO: str = "L", compute_v: bool = True) -> tuple[Array, Array]:
    """Eigenvalues in rising order and eigenvectors of a Hermitian matrix, read from one triangle."""
    uplo: Any = UPLO.upper()
    if not compute_v:
        return np.linalg.eigvalsh(A, uplo), _none(A)
    values, vectors = np.linalg.eigh(A, uplo)
    return values, vectors


@reference("aten.linalg_eig.default")
def eig(self: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of a square matrix, complex."""
    dtype = np.result_type(self.dtype, np.complex64)
    values, vectors = np.linalg.eig(self)
    return values.astype(dtype), vectors.astype(dtype)


@reference("aten.linalg_qr.default")
def qr(A: Array, mode: str = "reduced") -> tuple[Array, Array]:
    """Q with orthonormal columns and upper triangular R with A = Q R; mode r: R only."""
    if mode == "r":
        return _none(A), np.asarray(np.linalg.qr(A, "r"))
    q, r = np.linalg.qr(A, "complete" if mode == "complete" else "reduced")
    return q, r


def _cholesky_of(a: Array) -> tuple[Array, Array]:
    n = len(a)
    low = np.zeros_like(a)
    for j in range(n):
        rest = (a[j, j] - np.vdot(low[j, :j], low[j, :j])).real
        if not rest > 0:
            return low, np.array(j + 1, np.int32)
        low[j, j] = np.sqrt(rest)
        low[j + 1 :, j] = (a[j + 1 :, j] - low[j + 1 :, :j] @ np.conjugate(low[j, :j])) / low[j, j]
    return low, np.array(0, np.int32)


@reference("aten.linalg_cholesky_ex.default")
def cholesky(self: Array, *, upper: bool = False, check_errors: bool = False) -> tuple[Array, Array]:
    """Lower triangular L with A = L Lᴴ (upper: its adjoint), and info: the order of the first minor not positive."""
    low, info = _batched(_cholesky_of, (_adjoint(self) if upper else self, 2))
    return (_adjoint(low) if upper else low), info


def _modulus(a: Array) -> Any:
    """The sum of the moduli of the real and imaginary parts, by which LAPACK chooses pivots."""
    return np.abs(a.real) + np.abs(a.imag)


def _lu_of(a: Array, pivot: bool) -> tuple[Array, Array, Array]:
    lu = a.copy()
    rows, columns = lu.shape
    count, info = min(rows, columns), 0
    pivots = np.arange(1, count + 1, dtype=np.int32)
    for j in range(count):
        best = j + int(np.argmax(_modulus(lu[j:, j]))) if pivot else j
        pivots[j] = best + 1
        lu[[j, best]] = lu[[best, j]]
        if lu[j, j] == 0:
            info = info or j + 1
            continue
        lu[j + 1 :, j] /= lu[j, j]
        lu[j + 1 :, j + 1 :] -= np.outer(lu[j + 1 :, j], lu[j, j + 1 :])
    return lu, pivots, np.array(info, np.int32)


@reference("aten.linalg_lu_factor_ex.default")
def lu_factor(A: Array, *, pivot: bool = True, check_errors: bool = False) -> tuple[Array, ...]:
    """L below and U on and above the diagonal of one matrix, pivots (rows swapped, from 1) and info."""
    return _batched(lambda a: _lu_of(a, pivot), (A, 2))


def _permutation_of(pivots: Array, size: int) -> tuple[Array]:
    """P with A = P L U."""
    order = np.arange(size)
    for i, p in enumerate(pivots):
        order[[i, p - 1]] = order[[p - 1, i]]
    return (np.eye(size)[:, order],)


def _unit_lower(lu: Array) -> Any:
    k = min(lu.shape[-2:])
    return np.tril(lu[..., :k], -1) + np.eye(lu.shape[-2], k, dtype=lu.dtype)


@reference("aten.lu_unpack.default")
def lu_unpack(
    LU_data: Array, LU_pivots: Array, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[Array, Array, Array]:
    """The permutation P, L and U of a compact LU factorisation."""
    size, k = LU_data.shape[-2], min(LU_data.shape[-2:])
    p, low, up = _none(LU_data), _none(LU_data), _none(LU_data)
    if unpack_pivots:
        p = _batched(lambda pivots: _permutation_of(pivots, size), (LU_pivots, 1))[0].astype(LU_data.dtype)
    if unpack_data:
        low, up = _unit_lower(LU_data), np.triu(LU_data[..., :k, :])
    return p, low, up


def _substitute(a: Array, b: Array, upper: bool) -> Array:
    """X with A X = B for triangular A, row by row; batches broadcast."""
    n = a.shape[-1]
    x = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), n, b.shape[-1]), b.dtype)
    for i in reversed(range(n)) if upper else range(n):
        known = slice(i + 1, n) if upper else slice(0, i)
        x[..., i, :] = b[..., i, :] - (a[..., i, None, known] @ x[..., known, :])[..., 0, :]
        x[..., i, :] /= a[..., i, i, None]
    return x


@reference("aten.linalg_solve_triangular.default")
def solve_triangular(self: Array, B: Array, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Array:
    """X with A X = B (left) or X A = B for triangular A; unitriangular: a diagonal of ones."""
    a = np.triu(self) if upper else np.tril(self)
    if unitriangular:
        eye = np.eye(a.shape[-1], dtype=a.dtype)
        a = a * (1 - eye) + eye
    if left:
        return _substitute(a, B, upper)
    return np.swapaxes(_substitute(np.swapaxes(a, -1, -2), np.swapaxes(B, -1, -2), not upper), -1, -2)


def _solve_lu(lu: Array, pivots: Array, b: Array) -> Array:
    p, low, up = lu_unpack(lu, pivots)
    return _substitute(up, _substitute(low, np.swapaxes(p, -1, -2) @ b, False), True)


@reference("aten.linalg_lu_solve.default")
def lu_solve(LU: Array, pivots: Array, B: Array, *, left: bool = True, adjoint: bool = False) -> Array:
    """X with A X = B (left) or X A = B, from A's compact LU factorisation; adjoint: with A's adjoint."""
    if not left:  # X A = B is Aᴴ Xᴴ = Bᴴ
        return _adjoint(lu_solve(LU, pivots, _adjoint(B), adjoint=not adjoint))
    if not adjoint:
        return _solve_lu(LU, pivots, B)
    p, low, up = lu_unpack(LU, pivots)
    return np.asarray(p @ _substitute(_adjoint(low), _substitute(_adjoint(up), B, False), True))


@reference("aten.linalg_inv_ex.default")
def inverse(A: Array, *, check_errors: bool = False) -> tuple[Array, Array]:
    """The inverse, and info: 0, or the order of the pivot that is zero."""
    lu, pivots, info = lu_factor(A)
    return _solve_lu(lu, pivots, np.eye(A.shape[-1], dtype=A.dtype)), info


@reference("aten._linalg_solve_ex.default")
def solve(A: Array, B: Array, *, left: bool = True, check_errors: bool = False) -> tuple[Array, Array, Array, Array]:
    """X with A X = B (left) or X A = B, the LU factorisation, pivots and info; B may be a batch of vectors."""
    lu, pivots, info = lu_factor(A)
    vector = B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])
    x = lu_solve(lu, pivots, B[..., None] if vector else B, left=left or vector)
    return (x[..., 0] if vector else x), lu, pivots, info


@reference("aten.geqrf.default")
def geqrf(self: Array) -> tuple[Array, Array]:
    """R and Householder vectors in one matrix, and their factors tau."""
    raw, tau = np.linalg.qr(self, "raw")
    return np.swapaxes(raw, -1, -2), tau


def _reflectors(a: Array, tau: Array) -> Array:
    """The product of (I - tau v vᴴ), m x m, v with 1 on the diagonal and the entries below it."""
    m = len(a)
    q = np.eye(m, dtype=a.dtype)
    for i in reversed(range(len(tau))):
        v = np.concatenate([np.zeros(i, a.dtype), np.ones(1, a.dtype), a[i + 1 :, i]])
        q = q - tau[i] * np.outer(v, np.conjugate(v) @ q)
    return q


@reference("aten.linalg_householder_product.default")
def householder_product(input: Array, tau: Array) -> Array:
    """The first n columns of the product of Householder matrices."""
    n = input.shape[-1]
    return _batched(lambda a, t: (_reflectors(a, t)[:, :n],), (input, 2), (tau, 1))[0]


@reference("aten.ormqr.default")
def ormqr(self: Array, input2: Array, input3: Array, left: bool = True, transpose: bool = False) -> Array:
    """The product of input3 with the matrix Q of Householder vectors, from the left or right, adjoint if asked for."""
    q = _batched(lambda a, t: (_reflectors(a, t),), (self, 2), (input2, 1))[0]
    q = _adjoint(q) if transpose else q
    return np.asarray(q @ input3 if left else input3 @ q)


@reference("aten.linalg_matrix_exp.default")
def matrix_exp(self: Array) -> Array:
    """The matrix exponential by Taylor's series, scaled and squared (Higham, "Functions of Matrices", 2008)."""
    norm = float(np.abs(self).sum(-2).max(initial=0.0))
    squarings = max(0, int(np.ceil(np.log2(norm))) + 1) if np.isfinite(norm) and norm > 0 else 0
    a = self / np.asarray(2.0**squarings, self.real.dtype)
    term = np.broadcast_to(np.eye(a.shape[-1], dtype=a.dtype), a.shape)
    total = term.copy()
    for k in range(1, 19):
        term = term @ a / np.asarray(k, a.dtype)
        total = total + term
    for _ in range(squarings):
        total = total @ total
    return total


decline(
    ("aten.linalg_ldl_factor_ex.default", "aten.linalg_ldl_solve.default"),
    "the pivoting of the LDL factorisation is LAPACK's choice, not part of its meaning",
)
