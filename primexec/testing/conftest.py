"""The tests of `pytest --pyargs primexec.testing` are there where an executor is named."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the tests out where no executor is named, as when this project's own tests run."""
    named = config.getoption("--executor", default=None)
    return True if collection_path.name == "test_executor.py" and not named else None
