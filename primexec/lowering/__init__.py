"""From ATen operators to prims: one node (`expand`), or a whole program (`lower`)."""

from primexec.lowering.expand import Expansion, expand, why_not

__all__ = ["Expansion", "expand", "why_not"]
