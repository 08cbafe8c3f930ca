"""Runs the documentation: every Python block of it, and every row of the table of what raises.

A block is followed by a block marked `text` where what it prints matters ("..." stands for anything), and a
block marked `python raises=CaptureError` must raise that; its text is then the message.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import primexec

ROOT = Path(__file__).parent.parent
SEMANTICS = ROOT / "docs" / "semantics.md"
PAGES = (ROOT / "README.md", ROOT / "docs" / "torch_compile.md", SEMANTICS)

BLOCK = re.compile(
    r"^```python(?: raises=(?P<raises>\w+))?\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<text>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
# | what | `line`<br>`line` | way out |
ROW = re.compile(r"^\| [^|`]+ \| (?P<lines>`[^|]+`) \| [^|]+ \|$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A piece of code from a page, the exception it must raise, and what it must print."""

    page: Path
    line: int
    code: str
    raises: str | None
    text: str | None

    def run(self, namespace: dict[str, Any]) -> None:
        # With as many newlines in front as the page has, messages name the page's own lines.
        source = "\n" * (self.line - 1) + self.code
        code = compile(source, str(self.page), "exec", dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if self.raises is None:
                exec(code, namespace)
            else:
                with pytest.raises(getattr(primexec, self.raises)) as caught:
                    exec(code, namespace)
                print(caught.value)
        if self.text is not None:
            self.compare(printed.getvalue())

    def compare(self, printed: str) -> None:
        checker, options = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if not checker.check_output(self.text or "", printed, options):
            example = doctest.Example(self.code, self.text or "")
            pytest.fail(f"{self.page.name}:{self.line}\n{checker.output_difference(example, printed, options)}")


def blocks(page: Path) -> list[Block]:
    source = page.read_text()
    return [
        Block(page, source.count("\n", 0, m.start("code")) + 1, m["code"], m["raises"], m["text"])
        for m in BLOCK.finditer(source)
    ]


def refusals() -> list[str]:
    """The bodies of the functions in the table of what raises."""
    return ["\n".join(re.findall(r"`([^`]+)`", row["lines"])) for row in ROW.finditer(SEMANTICS.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primexec.config, "_preferred", ())
    module = types.ModuleType("__main__")
    found = blocks(page)
    assert found
    for block in found:
        block.run(module.__dict__)


def test_table_of_what_raises_is_found() -> None:
    assert len(refusals()) >= 10


@pytest.mark.parametrize("body", refusals())
def test_row_raises(body: str, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    blocks(SEMANTICS)[0].run(namespace)
    source = "def f(x):\n" + "".join(f"    {line}\n" for line in body.splitlines())
    file = tmp_path / "row.py"
    file.write_text(source)
    exec(compile(source, str(file), "exec", dont_inherit=True), namespace)
    with pytest.raises(primexec.CaptureError) as caught:
        primexec.make_traced(namespace["f"])(torch.randn(3))
    assert "row.py" in str(caught.value)
    assert any(line in str(caught.value) for line in body.splitlines())
    assert "What to do: " in str(caught.value)
