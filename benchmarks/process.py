"""Run one measurement in a fresh interpreter; it answers with one line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def fresh(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m module arguments` answers, with empty compiler caches."""
    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TORCHINDUCTOR_CACHE_DIR": caches,
        }
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def answer(**values: Any) -> None:
    print(json.dumps(values))
