"""Random generators of the process: a capture must leave them as they were."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from primexec.bytecode import INSTALLED_RANDOM, RANDOM, SEEDS
from primexec.errors import CaptureError
from primexec.reads import Reads


class RandomState:
    """The states of the three generators that code may draw from by name."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._numpy: Any = numpy.random if numpy is not None else None
        self._torch_state = torch.get_rng_state()
        self._random_state = random.getstate()
        self._numpy_state: Any = self._numpy.get_state() if self._numpy is not None else None

    def changes(self, reads: Reads) -> CaptureError | None:
        """Put back what the traced code changed, and say so.

        Other threads may draw numbers meanwhile: only code that names something random is held to account.
        """
        source = reads.suspects.get(RANDOM) or reads.suspects.get(SEEDS)
        if source is None and INSTALLED_RANDOM not in reads.suspects and not reads.draws:
            return None
        changed = []
        if source is not None and not torch.equal(torch.get_rng_state(), self._torch_state):
            torch.set_rng_state(self._torch_state)
            changed.append("the state of torch's random generator")
        if random.getstate() != self._random_state:
            random.setstate(self._random_state)
            changed.append("the state of Python's random module")
        if self._numpy is not None and _differ(self._numpy.get_state(), self._numpy_state):
            self._numpy.set_state(self._numpy_state)
            changed.append("the state of NumPy's random generator")
        if not changed:
            return None
        return CaptureError(
            f"the function changed {' and '.join(changed)} while it was traced; a program would do so only once",
            hint="draw numbers and set seeds outside the traced function, or pass a torch.Generator",
            source=source or reads.suspects.get(INSTALLED_RANDOM),
        )


def _differ(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[2:] != b[2:] or a[1].tobytes() != b[1].tobytes()
