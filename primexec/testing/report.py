"""What the suite found, and the failures that an executor expects."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from primexec.errors import PrimexecError
from primexec.executors.base import Executor


class ConformanceError(PrimexecError):
    """An executor that does not do what it declares."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that an executor does wrong.

    Attributes:
        name: the operator, such as `prims.exp.default`; `programs` for the random programs.
        dtype: such as `float32`; empty where it does not matter.
        check: which rule was broken.
        message: what happened, and for which arguments.
    """

    name: str
    dtype: str
    check: str
    message: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({self.check}): {self.message}"


@dataclass(slots=True)
class Row:
    """What was tried of one operator at one dtype.

    Attributes:
        cases: how many calls the executor declared, and how many of these were compared.
        declined: how many calls it declined, by reason.
        ulps: the largest error found, in units in the last place of the reference.
    """

    cases: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    ulps: float = 0.0


@dataclass(frozen=True, slots=True)
class Expected:
    """Failures that an executor owns up to: (operator, dtype) and the reason.

    The file is TOML, one table for each:

        [[failure]]
        name = "prims.lgamma.default"
        dtype = "float16"   # left out: every dtype
        reason = "the polynomial is for float32"
    """

    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @classmethod
    def of(cls, executor: Executor, file: str | Path | None = None) -> Expected:
        """Those of a file, or else of the file that the executor names."""
        own: str | Path | None = file or getattr(executor, "expected_failures", None)
        return cls.load(own) if own is not None else cls()

    @classmethod
    def load(cls, file: str | Path) -> Expected:
        """Read a file.

        Raises:
            ValueError: where an entry lacks its name or its reason, or stands there twice.
        """
        reasons: dict[tuple[str, str], str] = {}
        for entry in tomllib.loads(Path(file).read_text()).get("failure", []):
            unknown = sorted(entry.keys() - {"name", "dtype", "reason"})
            if unknown or not entry.get("name") or not entry.get("reason"):
                raise ValueError(f"{file}: an expected failure has name, reason and at most dtype, not {entry}")
            key = entry["name"], entry.get("dtype", "")
            if key in reasons:
                raise ValueError(f"{file}: {' '.join(key).strip()} stands there twice")
            reasons[key] = entry["reason"]
        return cls(reasons)

    def only(self, names: Collection[str]) -> Expected:
        """The entries for these operators."""
        return Expected({key: reason for key, reason in self.reasons.items() if key[0] in names})

    def split(self, findings: Iterable[Finding]) -> tuple[list[Finding], set[tuple[str, str]]]:
        """The findings that nobody expected, and the entries that none of them answers to."""
        unmet = set(self.reasons)
        unexpected = []
        for finding in findings:
            keys = {(finding.name, finding.dtype), (finding.name, "")} & self.reasons.keys()
            unmet -= keys
            if not keys:
                unexpected.append(finding)
        return unexpected, unmet


@dataclass(frozen=True)
class Report:
    """What `check_executor` returns; true where the executor conforms.

    Attributes:
        rows: what was tried, by (operator, dtype).
        findings: what is wrong, expected failures included.
        unexpected: what is wrong and was not expected.
        stale: expected failures that passed, or name nothing that was tried, in words.
        programs: how many random programs were run.
    """

    executor: str
    rows: dict[tuple[str, str], Row]
    findings: tuple[Finding, ...]
    unexpected: tuple[Finding, ...]
    stale: tuple[str, ...]
    programs: int

    def __bool__(self) -> bool:
        return not self.unexpected and not self.stale

    @property
    def declared(self) -> list[tuple[str, str]]:
        """The pairs of operator and dtype of which the executor ran at least one call."""
        return [key for key, row in self.rows.items() if row.cases]

    def check(self) -> None:
        """Raise ConformanceError unless the executor conforms."""
        if not self:
            raise ConformanceError("\n".join(self._problems()))

    def _problems(self) -> list[str]:
        return [str(f) for f in self.unexpected] + list(self.stale)

    def __str__(self) -> str:
        cases = sum(r.cases for r in self.rows.values())
        lines = [
            f"{self.executor}: {len(self.declared)} of {len(self.rows)} pairs of operator and dtype declared, "
            f"{cases} calls, {self.programs} programs",
            f"{'operator':<36} {'dtype':<10} {'calls':>6} {'declined':>8} {'max ulp':>9}",
        ]
        for (name, dtype), row in self.rows.items():
            if row.cases:
                ulps = "wrong" if math.isinf(row.ulps) else f"{row.ulps:.3g}"
                lines.append(f"{name:<36} {dtype:<10} {row.cases:>6} {row.declined.total():>8} {ulps:>9}")
        verdict = "conforms" if self else f"does not conform: {len(self._problems())} problems"
        expected = len(self.findings) - len(self.unexpected)
        return "\n".join([*lines, *self._problems(), f"{verdict} ({expected} expected failures)"])
