"""A divergence as a script that fails by itself, with its inputs beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from primexec.divergence import Divergence
from primexec.errors import PrimexecError

# Names that FX's code may use, and how the script gets them; FX lists three more at all times.
_IMPORTS = {
    "torch": "",
    "NoneType": "",
    "fx_pytree": "",
    "pytree": "",
    "device": "from torch import device\n",
    "inf": "from math import inf\n",
    "nan": "from math import nan\n",
}
_SCRIPT = """{comment}
# Exits with 1, and prints the operator and its error, as long as {executor!r} is wrong.

import sys
from pathlib import Path

import torch

import primexec
{imports}

def {name}({parameters}):
{body}

if __name__ == "__main__":
    inputs = torch.load(Path(__file__).with_suffix(".pt"), weights_only=True)
    with torch.no_grad():
        comparison = primexec.compare({name}, *inputs, executors=({executor!r},){more})
    print(comparison)
    sys.exit(1 if comparison.first[{executor!r}] else 0)
"""


def write(divergence: Divergence, path: str | Path, options: Mapping[str, object]) -> Path:
    """Write the script to `path` and its inputs to the same name with the ending `.pt`.

    Raises:
        PrimexecError: where the program cannot be written as Python code.
    """
    path = Path(path).with_suffix(".py")
    graph = divergence.program.graph_module.graph
    code = graph.python_code("self")
    unknown = sorted(set(code.globals) - set(_IMPORTS))
    if unknown or any(n.op == "get_attr" for n in graph.nodes):
        what = ", ".join(unknown) or "control flow"
        raise PrimexecError(f"the program around {divergence.node} cannot be written as a script: it holds {what}")
    match = re.search(r"def forward\(self(?:, )?(.*?)\)(?: -> .*)?:\n(.*)", code.src, re.DOTALL)
    if match is None:
        raise PrimexecError(f"the program around {divergence.node} cannot be written as a script:\n{code.src}")
    parameters, body = match.groups()
    text = _SCRIPT.format(
        comment="\n".join(f"# {line}".rstrip() for line in str(divergence).splitlines()),
        executor=divergence.executor,
        more=f", executor_parameters={dict(options)!r}" if options else "",
        imports="".join(_IMPORTS[name] for name in sorted(code.globals)),
        name=divergence.program.name,
        parameters=parameters,
        body=body.rstrip() + "\n",
    )
    path.write_text(text)
    torch.save(list(divergence.inputs), path.with_suffix(".pt"))
    return path
