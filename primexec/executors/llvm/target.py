"""The machine that code is generated for: the host's, or a named one that any host can compile for."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm  # type: ignore[import-untyped]

from primexec.executors.llvm.sleef import SUFFIXES, symbols

ELEMENT_BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "i1": 1}
CACHE_BYTES = 1 << 18  # of a second cache of which nothing is known
LAST_CACHE_BYTES = 1 << 23  # of a cache that cores share, of which nothing is known
# Of the last cache for each processor, at most: a virtual machine sees that of a whole socket, 260 MiB beside two
# processors. 64 MiB were written in 8.4 ms through it and in 4.4 around it, and read as fast afterwards.
SHARE_BYTES = 12 << 20
# Features of x86-64 that multiply 16-bit floats. Without them oneDNN says that it has code for bfloat16, which takes
# four times as long as that for float32.
_PRODUCTS = {"bf16": {"+avx512bf16", "+amx-bf16"}, "f16": {"+avx512fp16", "+amx-fp16"}}
_CACHES = "/sys/devices/system/cpu/cpu0/cache/index{}/size"


@dataclass(frozen=True, slots=True)
class Target:
    """What the code generator may use.

    Attributes:
        triple: LLVM's target triple.
        cpu: LLVM's name of the CPU, for scheduling and tuning.
        features: LLVM feature names, each with its sign: `+avx2`, `-avx512f`.
        vector_bytes: width of the vectors that kernels use.
        cache_bytes: size of a core's second cache.
        last_cache_bytes: size of the cache before memory, or what of it is likely to be ours.
        has_sleef: whether SLEEF's vector functions can be called.
    """

    triple: str
    cpu: str
    features: frozenset[str]
    vector_bytes: int
    cache_bytes: int = CACHE_BYTES
    last_cache_bytes: int = LAST_CACHE_BYTES
    has_sleef: bool = False

    def lanes(self, dtype: str) -> int:
        """Elements of one vector: `lanes("f32")` is 8 on AVX2.

        >>> X86_64_AVX2.lanes("f32"), X86_64_AVX2.lanes("f64")
        (8, 4)
        """
        return max(1, self.vector_bytes // ELEMENT_BYTES[dtype])

    @property
    def has_fma(self) -> bool:
        """Whether a fused multiply-add is one instruction."""
        return self.triple.startswith("aarch64") or "+fma" in self.features

    def multiplies(self, dtype: str) -> bool:
        """Whether instructions multiply 16-bit floats; of what is not x86-64 that is left to PyTorch to tell.

        >>> X86_64_AVX512.multiplies("bf16"), AARCH64.multiplies("bf16")
        (False, True)
        """
        return not self.triple.startswith("x86_64") or not self.features.isdisjoint(_PRODUCTS[dtype])

    @property
    def divides_slowly(self) -> bool:
        """Whether a division of a vector takes as long as eight products, which pass through two units."""
        return self.has_fma and not self.has_scaling

    @property
    def blends_slowly(self) -> bool:
        """Whether what comparisons choose takes an instruction of its own."""
        return self.triple.startswith("x86_64") and not self.has_tables

    @property
    def has_scaling(self) -> bool:
        """Whether one instruction multiplies by a power of two, with one rounding, and another takes fractions."""
        return self.triple.startswith("x86_64") and {"+avx512f", "+avx512dq", "+avx512vl"} <= self.features

    @property
    def has_tables(self) -> bool:
        """Whether one instruction looks up sixteen float32 in a vector of as many."""
        return self.triple.startswith("x86_64") and "+avx512f" in self.features

    @property
    def has_word_sums(self) -> bool:
        """Whether one instruction multiplies and adds pairs of 16-bit integers in a vector of sixteen float32."""
        return self.triple.startswith("x86_64") and "+avx512bw" in self.features

    @property
    def feature_string(self) -> str:
        """The features as LLVM's target machine takes them."""
        return ",".join(sorted(self.features))


_LINUX = "unknown-linux-gnu"
_AVX2 = frozenset({"+sse4.2", "+avx", "+avx2", "+fma", "+f16c", "+bmi", "+bmi2", "+lzcnt", "+popcnt"})
_AVX512 = _AVX2 | {"+avx512f", "+avx512bw", "+avx512cd", "+avx512dq", "+avx512vl"}

X86_64 = Target(f"x86_64-{_LINUX}", "x86-64", frozenset(), 16)
X86_64_AVX2 = Target(f"x86_64-{_LINUX}", "x86-64", _AVX2, 32)
X86_64_AVX512 = Target(f"x86_64-{_LINUX}", "x86-64", _AVX512, 64)
AARCH64 = Target(f"aarch64-{_LINUX}", "generic", frozenset({"+neon"}), 16)

NAMED = {"x86-64": X86_64, "x86-64-avx2": X86_64_AVX2, "x86-64-avx512": X86_64_AVX512, "aarch64": AARCH64}


@cache
def host() -> Target:
    """The machine that this process runs on."""
    features = llvm.get_host_cpu_features()
    width = next((bytes_ for name, bytes_ in (("avx512f", 64), ("avx2", 32)) if features.get(name)), 16)
    signed = frozenset(("+" if on else "-") + name for name, on in features.items())
    has_sleef = width in SUFFIXES and bool(symbols())
    share = SHARE_BYTES * (os.cpu_count() or 1)
    caches = _cache_bytes(2, CACHE_BYTES), min(_cache_bytes(3, LAST_CACHE_BYTES), share)
    return Target(llvm.get_process_triple(), llvm.get_host_cpu_name(), signed, width, *caches, has_sleef)


def _cache_bytes(level: int, unknown: int) -> int:
    """A cache's size, as Linux tells it: `1024K`."""
    with suppress(OSError, ValueError):
        return int(Path(_CACHES.format(level)).read_text().removesuffix("K\n")) << 10
    return unknown
