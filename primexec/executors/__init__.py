"""Executors: what runs a program. What one needs to write another stands here."""

from primexec.executors.base import PROTOCOL_VERSION, YES, Executor, Region, RegionFunction, Support, no

__all__ = ["PROTOCOL_VERSION", "YES", "Executor", "Region", "RegionFunction", "Support", "no"]
