"""Lets autograd's first gradient of a leaf be the leaf's `.grad`, where a trace had to copy it.

PyTorch takes a gradient that nobody else refers to as it is; a tracer always refers to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from primexec import _torch, effects
from primexec.passes.emission import infer
from primexec.program import Program


@dataclass(frozen=True, slots=True)
class RemoveLastCopies:
    """A copy into a fresh buffer of the same layout, of memory that is not used again, gives way to what it copies."""

    def __call__(self, program: Program) -> Program:
        if program.extras:  # backward programs that are not recorded yet may use any of its values
            return program
        graph = program.graph_module.graph
        called = {n for c in program.calls for n in c.nodes}
        made: set[int | None] = set()  # by operators of the program
        last: dict[int | None, fx.Node] = {}  # memory → the last node that uses it
        for node in graph.nodes:
            if node.op == "call_function" and not effects.aliases_input(node):
                made.add(effects.storage_of(node))
            last.update({effects.storage_of(n): node for n in node.all_input_nodes})
        instead: dict[fx.Node, fx.Node] = {}
        for copy in program.nodes:
            if copy.target is not torch.ops.aten.copy_.default or copy in called or len(copy.all_input_nodes) < 2:
                continue
            buffer, source = copy.all_input_nodes
            memory = effects.storage_of(source)
            if memory in made and last[memory] is copy and _is_fresh(buffer, copy) and _same_layout(buffer, source):
                last[memory] = last[effects.storage_of(buffer)]
                graph.erase_node(copy)
                buffer.replace_all_uses_with(source)
                graph.erase_node(buffer)
                instead[buffer] = source
        _move_views(graph, {effects.storage_of(n) for n in instead})
        return replace(program, calls=tuple(c.renamed(instead) for c in program.calls)) if instead else program


def _move_views(graph: fx.Graph, gone: set[int | None]) -> None:
    """Let the views of buffers that gave way be known as views of the memory that they see now."""
    for node in graph.nodes:
        tensors = [t for t in _torch.pytree.tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor)]
        if node.op == "call_function" and not gone.isdisjoint(map(_torch.storage_key, tensors)):
            infer(node)


def _is_fresh(buffer: fx.Node, copy: fx.Node) -> bool:
    """Whether nothing has used an uninitialised buffer before the copy fills it."""
    made = buffer.target is torch.ops.aten.new_empty_strided.default
    return made and next(iter(buffer.users)) is copy and not copy.users


def _same_layout(buffer: fx.Node, source: fx.Node) -> bool:
    """Whether both are all of their memory, element by element at the same places."""
    a, b = buffer.meta["val"], source.meta["val"]
    return effects.same_layout(buffer, source) and a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
