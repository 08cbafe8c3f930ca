"""From ATen operators to prims: one node (`expand`), or a whole program (`lower`)."""

from primexec.lowering.expand import Expansion, expand, inline, why_not
from primexec.lowering.program import lower

__all__ = ["Expansion", "expand", "inline", "lower", "why_not"]
