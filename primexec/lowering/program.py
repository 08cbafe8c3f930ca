"""A whole program in prims."""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import fx

from primexec import _torch, effects
from primexec.lowering.expand import Expansion, expand, inline, why_not
from primexec.passes import run_prims
from primexec.passes.functionalize import Functionalize
from primexec.program import Program, stage


@stage("lower")
def lower(program: Program) -> Program:
    """The program with every operator that has an expansion replaced by it.

    What has none stays as it is, and so do operators whose result is memory that others see, where the expansion
    would make new memory.
    """
    program = Functionalize(copy_back=True)(program)
    source = program.graph_module.graph
    seen = effects.seen_memory(source, inputs=True)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node | None] = {}
    parts: dict[fx.Node, tuple[fx.Node | None, ...]] = {}
    for node in source.nodes:
        expansion = _expansion(node, seen) if node.op == "call_function" else None
        if node.target is operator.getitem and node.args[0] in parts:
            copies[node] = parts[node.args[0]][node.args[1]]
        elif expansion is None:
            copies[node] = copy = graph.node_copy(node, copies.__getitem__)
            if node.op == "call_function":
                copy.meta["opaque"] = why_not(node) or "it returns memory that others see"
        else:
            results = inline(expansion, node, graph, [copies[n] for n in node.all_input_nodes])  # type: ignore[misc]
            if isinstance(node.meta.get("val"), (tuple, list)):
                parts[node] = results
            else:
                copies[node] = results[0]
    module = _torch.graph_module(program.graph_module, graph)
    backward = lower(program.backward) if program.backward is not None else None
    return run_prims(replace(program, graph_module=module, calls=(), backward=backward))


def _expansion(node: fx.Node, seen: set[int | None]) -> Expansion | None:
    expansion = expand(node)
    if expansion is None:
        return None
    results = [u for u in node.users if u.target is operator.getitem]
    shared = [effects.storage_of(r) for r in results or [node] if effects.aliases_input(r)]
    given = {effects.storage_of(n) for n in expansion.graph.find_nodes(op="placeholder")}
    copied = any(r is not None and effects.storage_of(r) not in given for r in expansion.results)
    return None if copied and not seen.isdisjoint(shared) else expansion
