"""Factorisations and solvers for batches of matrices `(*, m, n)`. Signs and phases of vectors are not said."""

from primexec.prims.base import LINALG, Prim

_SQUARE = "(*, n, n) → (*, n, n)"
_SAME = "the argument's dtype"
_INFO = "the argument's dtype; pivots and info are int32"


def _row(op: str, meaning: str, shapes: str, promotion: str = _SAME) -> Prim:
    return Prim(f"aten.{op}.default", "linalg", meaning, shapes, LINALG, promotion)


ROWS = (
    _row(
        "_linalg_svd",
        "U, S, Vh with A = U · diag(S) · Vh, S falling and not negative; without compute_uv U and Vh are empty.",
        "(*, m, n) → (*, m, k), (*, k), (*, k, n), k the smaller of m and n, or full",
        "the argument's dtype; S real",
    ),
    _row(
        "_linalg_eigh",
        "Eigenvalues in rising order and eigenvectors of a Hermitian matrix, read from its UPLO triangle.",
        "(*, n, n) → (*, n), (*, n, n)",
        "the argument's dtype; eigenvalues real",
    ),
    _row(
        "linalg_eig",
        "Eigenvalues and eigenvectors of a square matrix.",
        "(*, n, n) → (*, n), (*, n, n)",
        "the complex dtype of the argument's",
    ),
    _row(
        "linalg_qr",
        "Q with orthonormal columns and upper triangular R with A = Q · R; mode r: R only.",
        "(*, m, n) → (*, m, k), (*, k, n)",
    ),
    _row(
        "linalg_cholesky_ex",
        "Lower triangular L with A = L · Lᴴ (upper: its adjoint), and info: 0, or the order of the first "
        "minor that is not positive.",
        "(*, n, n) → (*, n, n), (*,)",
        _INFO,
    ),
    _row(
        "linalg_lu_factor_ex",
        "L below and U on and above the diagonal of one matrix, pivots (rows swapped, from 1) and info.",
        "(*, m, n) → (*, m, n), (*, k), (*,)",
        _INFO,
    ),
    _row(
        "lu_unpack",
        "The permutation P, L and U of a compact LU factorisation.",
        "(*, m, n), (*, k) → (*, m, m), (*, m, k), (*, k, n)",
    ),
    _row(
        "linalg_lu_solve",
        "X with A · X = B (left) or X · A = B, from A's compact LU factorisation.",
        "(*, n, n), (*, n), (*, n, k) → (*, n, k)",
    ),
    _row(
        "linalg_solve_triangular",
        "X with A · X = B (left) or X · A = B for triangular A; unitriangular: a diagonal of ones.",
        "(*, n, n), (*, n, k) → (*, n, k)",
    ),
    _row(
        "linalg_inv_ex",
        "The inverse, and info: 0, or the order of the pivot that is zero.",
        "(*, n, n) → (*, n, n), (*,)",
        _INFO,
    ),
    _row(
        "_linalg_solve_ex",
        "X with A · X = B, the LU factorisation, pivots and info.",
        "(*, n, n), (*, n, k) or (*, n) → B's shape, (*, n, n), (*, n), (*,)",
        _INFO,
    ),
    _row(
        "linalg_ldl_factor_ex",
        "The compact LDL factorisation of a symmetric or Hermitian matrix, pivots and info.",
        "(*, n, n) → (*, n, n), (*, n), (*,)",
        _INFO,
    ),
    _row(
        "linalg_ldl_solve",
        "X with A · X = B, from A's compact LDL factorisation.",
        "(*, n, n), (*, n), (*, n, k) → (*, n, k)",
    ),
    _row(
        "linalg_householder_product",
        "The first n columns of the product of Householder matrices.",
        "(*, m, n), (*, k) → (*, m, n)",
    ),
    _row("geqrf", "R and Householder vectors in one matrix, and their factors tau.", "(*, m, n) → (*, m, n), (*, k)"),
    _row(
        "ormqr",
        "The product of other with the matrix Q that Householder vectors stand for, from the left or right, adjoint if "
        "asked for.",
        "(*, m, k), (*, k), (*, m, n) → (*, m, n)",
    ),
    _row("linalg_matrix_exp", "The matrix exponential.", _SQUARE),
)
