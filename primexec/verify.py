"""What is legal in a program. Breaking a law here is a bug of primexec or of an executor, never the user's."""

from __future__ import annotations

import operator

import torch
from torch import fx

from primexec import _torch
from primexec.decisions import decide
from primexec.errors import VerificationError
from primexec.prims import is_prim
from primexec.program import Program, op_name, show_argument

_CONTEXT_LINES = 5


def verify_captured(program: Program) -> None:
    """Check the laws of a captured program.

    Every operator is an OpOverload or a higher-order operator and carries a fake tensor and, where known,
    the user's line; every argument is defined before its use; no real tensor is baked in.

    Raises:
        VerificationError: naming the law, the node, its neighbours and the user's line.
    """
    names = [i.name for i in program.inputs]
    placeholders = [n.name for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    if names != placeholders:
        raise VerificationError(f"the inputs {names} are not the placeholders {placeholders}")
    verify_graph(program.graph_module.graph)


def verify_graph(graph: fx.Graph) -> None:
    """Check the laws of a captured program that each node keeps or breaks by itself."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                raise broken(node, f"uses {used.name} before it is made")
        if node.op == "call_function":
            legal = (_torch.OpOverload, _torch.HigherOrderOperator)
            sizes = isinstance(node.meta.get("val"), _torch.SYMBOLS)  # arithmetic with sizes is plain Python
            python = node.target in (operator.getitem, decide)
            if not (isinstance(node.target, legal) or python or sizes):
                raise broken(node, "is not an operator of PyTorch")
            fx.node.map_aggregate((node.args, node.kwargs), lambda a, node=node: _not_real(node, a))  # type: ignore[misc]
        elif node.op not in ("placeholder", "output", "get_attr"):
            raise broken(node, f"is a {node.op}")
        if node.op == "placeholder" and "val" not in node.meta and "spec" not in node.meta:
            raise broken(node, "carries no metadata")
        seen.add(node)


def verify_prims(program: Program) -> None:
    """Check the laws of a program in prims.

    Those of a captured program; and every operator is in the table of prims, or says in `meta["opaque"]` why it does
    not decompose.

    Raises:
        VerificationError: as `verify_captured`.
    """
    verify_captured(program)
    for node in program.nodes:
        if node.target is not operator.getitem and not is_prim(node.target) and not node.meta.get("opaque"):
            raise broken(node, "is no prim")


def _not_real(node: fx.Node, arg: object) -> None:
    if isinstance(arg, torch.Tensor):
        raise broken(node, "holds a real tensor")


def broken(node: fx.Node, law: str) -> VerificationError:
    """The error for a node that breaks a law: it, ten lines around it, and the user's line."""
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    lines = [f"{node.name} {law}"]
    for i in range(max(0, at - _CONTEXT_LINES), min(len(nodes), at + _CONTEXT_LINES + 1)):
        n = nodes[i]
        arguments = ", ".join(map(show_argument, n.args))
        lines.append(f"{'→' if n is node else ' '} {n.name} = {op_name(n.target)}({arguments})")
    lines.append(f"  {node.meta.get('source', 'no source line')}")
    return VerificationError("\n".join(lines))
