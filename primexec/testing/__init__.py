"""The conformance suite: what an executor declares, it must do.

    pytest --pyargs primexec.testing --executor NAME [--expected FILE]

runs it in pytest, `check_executor` from Python. Needs pytest and hypothesis (`pip install primexec[testing]`).
"""

from primexec.testing.report import ConformanceError, Expected, Finding, Report
from primexec.testing.suite import check_executor
from primexec.testing.tolerance import TOLERANCES, Tolerance

__all__ = ["TOLERANCES", "ConformanceError", "Expected", "Finding", "Report", "Tolerance", "check_executor"]
