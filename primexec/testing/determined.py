"""What of an operator's results its meaning determines, where it leaves a choice: signs of vectors, which of equals.

Each function takes the arguments and the results (floating ones in float64) and returns what is to be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Results = Sequence[Tensor]
Determined = Callable[[tuple[Any, ...], Results], Results]


def nothing(args: tuple[Any, ...], results: Results) -> Results:
    """Memory that nobody wrote."""
    return ()


def places(args: tuple[Any, ...], results: Results) -> Results:
    """Values, and what stands at the indices, of which several may hold equal elements."""
    source, (values, index) = args[0], results
    if source.dim() == 0:
        return values, index
    dim = args[-1] if not isinstance(args[-1], bool) else args[-2]
    full = index if index.dim() == source.dim() else index.unsqueeze(dim)
    if full.numel() and not bool(((full >= 0) & (full < source.shape[dim])).all()):
        return values, index
    return values, source.gather(dim, full).reshape(index.shape)


def singular(args: tuple[Any, ...], results: Results) -> Results:
    """Singular values, the product, and that the vectors are orthonormal."""
    u, s, vh = results
    if s.numel() == 0 or u.numel() == 0:
        return (s,)
    k = s.shape[-1]
    product = (u[..., :k] * s.unsqueeze(-2).to(u.dtype)) @ vh[..., :k, :]
    return s, product, u.mH @ u, vh @ vh.mH


def hermitian_eigen(args: tuple[Any, ...], results: Results) -> Results:
    """Eigenvalues, the product, and that the vectors are orthonormal."""
    values, vectors = results
    if vectors.numel() == 0:
        return (values,)
    return values, (vectors * values.unsqueeze(-2).to(vectors.dtype)) @ vectors.mH, vectors.mH @ vectors


def eigen(args: tuple[Any, ...], results: Results) -> Results:
    """Eigenvalues in an order, the matrix that values and vectors make, and the lengths of the vectors."""
    values, vectors = results
    if values.numel() == 0:
        return (values,)
    order = torch.argsort(values.real * 4 + values.imag, dim=-1)
    made = torch.linalg.solve(vectors, vectors * values.unsqueeze(-2), left=False)
    return values.gather(-1, order), made, torch.linalg.vector_norm(vectors, dim=-2)


def factors(args: tuple[Any, ...], results: Results) -> Results:
    """Q R, that Q is orthonormal and R triangular; without Q what R says of the matrix."""
    q, r = results
    below = r.tril(-1)
    return (r.mH @ r, below) if q.numel() == 0 else (q @ r, q.mH @ q, below)


def orthogonal(args: tuple[Any, ...], results: Results) -> Results:
    """The product of the Householder vectors' matrix with R."""
    vectors, tau = results
    if vectors.numel() == 0:
        return results
    k = min(vectors.shape[-2:])
    q = torch.linalg.householder_product(vectors[..., :k], tau)
    return q @ vectors.triu()[..., :k, :], q.mH @ q


def ldl(args: tuple[Any, ...], results: Results) -> Results:
    """The inverse of the matrix that the factors make, and info."""
    factored, pivots, info = results
    eye = torch.eye(factored.shape[-1], dtype=factored.dtype).expand(factored.shape)
    return torch.linalg.ldl_solve(factored, pivots, eye), info
