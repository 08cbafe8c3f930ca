"""What is legal in a program. Breaking a law here is a bug of primexec or of an executor, never the user's."""

from __future__ import annotations

import operator

import torch
from torch import fx

from primexec import _torch
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
    seen: set[fx.Node] = set()
    names = [i.name for i in program.inputs]
    placeholders = [n.name for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    if names != placeholders:
        raise VerificationError(f"the inputs {names} are not the placeholders {placeholders}")
    for node in program.graph_module.graph.nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                raise _broken(program, node, f"uses {used.name} before it is made")
        if node.op == "call_function":
            legal = (_torch.OpOverload, _torch.HigherOrderOperator)
            sizes = isinstance(node.meta.get("val"), _torch.SYMBOLS)  # arithmetic with sizes is plain Python
            if not isinstance(node.target, legal) and node.target is not operator.getitem and not sizes:
                raise _broken(program, node, "is not an operator of PyTorch")
            fx.node.map_aggregate((node.args, node.kwargs), lambda a, node=node: _not_real(program, node, a))  # type: ignore[misc]
        elif node.op not in ("placeholder", "output", "get_attr"):
            raise _broken(program, node, f"is a {node.op}")
        if node.op == "placeholder" and "val" not in node.meta and "spec" not in node.meta:
            raise _broken(program, node, "carries no metadata")
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
            raise _broken(program, node, "is no prim")


def _not_real(program: Program, node: fx.Node, arg: object) -> None:
    if isinstance(arg, torch.Tensor):
        raise _broken(program, node, "holds a real tensor")


def _broken(program: Program, node: fx.Node, law: str) -> VerificationError:
    nodes = list(program.graph_module.graph.nodes)
    at = nodes.index(node)
    lines = [f"{node.name} {law}"]
    for i in range(max(0, at - _CONTEXT_LINES), min(len(nodes), at + _CONTEXT_LINES + 1)):
        n = nodes[i]
        arguments = ", ".join(map(show_argument, n.args))
        lines.append(f"{'→' if n is node else ' '} {n.name} = {op_name(n.target)}({arguments})")
    lines.append(f"  {node.meta.get('source', 'no source line')}")
    return VerificationError("\n".join(lines))
