"""Fourier transforms over dims; normalization 0: none, 1: by 1/sqrt(n), 2: by 1/n."""

from primexec.prims.base import COMPLEX, DOUBLES, Prim

ROWS = (
    Prim(
        "aten._fft_c2c.default",
        "fft",
        "The transform with exponent sign -1 (forward) or 1.",
        "a, dims → a's shape",
        COMPLEX,
        "the argument's dtype",
    ),
    Prim(
        "aten._fft_r2c.default",
        "fft",
        "The forward transform of real numbers; onesided: the last of dims holds n // 2 + 1 coefficients.",
        "a, dims → a's shape, shortened in the last of dims if onesided",
        DOUBLES,
        "the complex dtype of the real one",
    ),
    Prim(
        "aten._fft_c2r.default",
        "fft",
        "The backward transform of a onesided spectrum to last_dim_size real numbers.",
        "a, dims → last_dim_size in the last of dims",
        COMPLEX,
        "the real dtype of the complex one",
    ),
)
