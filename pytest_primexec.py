"""The options of `pytest --pyargs primexec.testing`.

Outside of the package, for pytest imports this whenever it starts: it must not import torch.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the conformance suite."""
    group = parser.getgroup("primexec", "conformance of an executor of primexec")
    group.addoption("--executor", metavar="NAME", help="the executor to hold to what it declares")
    group.addoption("--expected", metavar="FILE", help="TOML file of the failures that the executor expects")
    group.addoption("--random-programs", metavar="N", type=int, default=200, help="how many random programs to run")
