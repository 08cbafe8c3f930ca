"""What the commands that measure share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path


def check_names(parser: argparse.ArgumentParser, given: Iterable[str], known: Iterable[str], kind: str) -> None:
    """Leave with an error where a name is none of those known."""
    if unknown := set(given) - set(known):
        parser.error(f"no such {kind}: {', '.join(sorted(unknown))}")


def report(text: str, page: Path | None) -> None:
    """Print a section, and add it to a page if there is one."""
    print(text)
    if page is not None:
        with page.open("a") as file:
            file.write("\n" + text)
