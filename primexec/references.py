"""Who refers to a tensor of a trace after it is over."""

from __future__ import annotations

import gc
import os
import sys
import types
from typing import Any

_HERE = os.path.dirname(__file__) + os.sep
_MAX_HOLDERS = 12  # more steps than that lead to something that stays


def outlives(values: list[Any], own: list[Any], fn: object) -> bool:
    """Whether something besides `own` and the autograd graph, such as fn, refers to one of the values.

    Follows what refers to them upwards. Contexts of custom functions, hooks and checkpoints end in C++, where
    nothing refers to them; a list of the user's leads to fn, to a module or to a running function.
    """
    roots, seen = {id(fn)}, {id(v) for v in (*own, own, values)}
    frame: Any = sys._getframe()
    while frame is not None:  # running frames are not among the referrers that gc knows
        if not frame.f_code.co_filename.startswith(_HERE):
            roots.update(id(v) for v in frame.f_locals.values())
        seen.add(id(frame))
        frame = frame.f_back
    level = values
    for _ in range(_MAX_HOLDERS):
        referrers = gc.get_referrers(*level)
        seen |= {id(level), id(referrers)}
        level = [h for h in referrers if id(h) not in seen]
        if any(id(h) in roots or isinstance(h, (types.ModuleType, types.FrameType, type)) for h in level):
            return True
        if not level:
            return False
        seen.update(map(id, level))
    return True
