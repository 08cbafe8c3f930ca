"""Programs made from FX graphs that somebody else traced, such as AOTAutograd's."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, _torch_fake, effects
from primexec.errors import CaptureError, SourceLine
from primexec.origins import is_layer, is_library
from primexec.program import Input, Program, Static, TensorSpec

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')
_NUMBERS = (bool, int, float, type(None))


@dataclass(frozen=True, eq=False)
class Imported:
    """A program, whose inputs of kind `constant` stand last.

    Attributes:
        sizes: positions of the inputs that are numbers, not tensors.
    """

    program: Program
    sizes: tuple[int, ...]


def import_graph(gm: fx.GraphModule, name: str) -> Imported:
    """A program with the nodes of a graph of ATen operators; tensors that the graph holds become inputs of it.

    The graph's nodes carry `meta["val"]`; its output is a flat sequence of nodes and plain values. The graph
    itself stays as it is.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    held: dict[str, fx.Node] = {}
    inputs: list[Input] = []
    constants: list[Tensor] = []
    nodes = list(gm.graph.nodes)
    tensors = [n for n in nodes if n.op == "get_attr" and isinstance(_attribute(gm, n), Tensor)]
    for node in (n for n in nodes if n.op == "placeholder"):
        copies[node] = copy = graph.placeholder(node.name)
        _set_meta(copy, node)
        inputs.append(Input(copy.name, "tangent" if _torch.is_tangent(node.name) else "argument", node.name))
    for node in tensors:
        target = str(node.target)
        if target not in held:
            held[target] = copy = graph.placeholder(node.name)
            _set_meta(copy, node)
            inputs.append(Input(copy.name, "constant", target))
            constants.append(_attribute(gm, node))
        copies[node] = held[target]
    for node in nodes:
        if node not in copies and node.op != "output":
            copies[node] = copy = graph.node_copy(node, copies.__getitem__)
            _set_meta(copy, node)
            copies[node] = effects.written_result(copy) or copy
    results: Any = fx.node.map_arg(gm.graph.output_node().args[0], copies.__getitem__)
    program = _finish(gm, graph, name, inputs, results, tuple(constants))
    sizes = [i for i, n in enumerate(_placeholders(program)) if _is_number(n.meta.get("val"))]
    return Imported(program, tuple(sizes))


def specialise(program: Program, values: Sequence[Any]) -> Program:
    """The program for inputs of these very sizes: numbers among them become part of it, as does all that follows.

    Args:
        values: one a placeholder: tensors, of which only the metadata matters, and numbers.

    Raises:
        CaptureError: where an operator has no rule for fake tensors.
    """
    graph = fx.Graph()
    mode = _torch_fake.fake_mode()
    made: dict[fx.Node, Any] = {}  # what stands for a node in the new graph: a node, or a number
    known: dict[fx.Node, Any] = {}  # its fake tensor or number
    inputs: list[Input] = []
    given = iter(zip(program.inputs, values, strict=True))
    with _torch.modes_off(), torch.no_grad():
        for node in program.graph_module.graph.nodes:
            if node.op == "placeholder":
                described, value = next(given)
                if _is_number(value):
                    made[node] = known[node] = value
                    continue
                known[node] = mode.from_tensor(value) if isinstance(value, Tensor) else value
                inputs.append(described)
            elif node.op == "get_attr":
                known[node] = _attribute(program.graph_module, node)
            elif node.op == "call_function":
                known[node] = _run(node, known, mode)
                if isinstance(known[node], _NUMBERS):
                    made[node] = known[node]
                    continue
            else:
                results = _substitute(node.args[0], made)
                continue
            args, kwargs = _substitute((node.args, node.kwargs), made)
            made[node] = copy = graph.create_node(node.op, node.target, args, dict(kwargs), name=node.name)
            copy.meta = {**node.meta, "val": known[node], "spec": _spec(known[node])}
    leaves = [r.value if isinstance(r, Static) else results[r] for r in program.output_leaves]
    return _finish(program.graph_module, graph, program.name, inputs, leaves, program.constants)


def boxed(
    run: Callable[[list[Any]], Sequence[Any]], program: Program, constants: Sequence[Tensor], dropped: Sequence[int]
) -> Callable[[list[Any]], Sequence[Any]]:
    """run with AOTAutograd's signature: constants are added to its inputs, plain values put between its results.

    Args:
        run: takes the program's inputs in one list and empties it.
        constants: the last inputs of the program.
        dropped: positions in the list of what run does not take.
    """
    namespace: dict[str, Any] = {"run": run, "constants": tuple(constants)}
    lines = ["def boxed(args):", *(f"  del args[{i}]" for i in sorted(dropped, reverse=True))]
    if constants:
        lines.append("  args += constants")
    if program.output_leaves == tuple(range(len(program.output_leaves))):
        lines.append("  return run(args)")
    else:
        parts = [f"out[{r}]" if isinstance(r, int) else f"value{i}" for i, r in enumerate(program.output_leaves)]
        namespace.update((f"value{i}", r.value) for i, r in enumerate(program.output_leaves) if isinstance(r, Static))
        lines += ["  out = run(args)", f"  return [{', '.join(parts)}]"]
    exec(compile("\n".join(lines), "<primexec boxed>", "exec"), namespace)
    function: Any = namespace.pop("boxed")
    function._boxed_call = True
    return function  # type: ignore[no-any-return]


def source_of(trace: str | None) -> SourceLine | None:
    """The innermost line outside of torch in a stack trace that FX keeps as text; else a layer's line in torch."""
    layer = None
    for frame in reversed(list(_FRAME.finditer(trace or ""))):
        line = SourceLine(frame["file"], int(frame["line"]), frame["function"].strip())
        if not is_library(line.file):
            return line
        if layer is None and is_layer(line.file):
            layer = line
    return layer


def _finish(
    root: torch.nn.Module,
    graph: fx.Graph,
    name: str,
    inputs: Sequence[Input],
    results: Sequence[Any],
    constants: tuple[Tensor, ...],
) -> Program:
    nodes = [r for r in results if isinstance(r, fx.Node)]
    positions = iter(range(len(nodes)))
    leaves = tuple(next(positions) if isinstance(r, fx.Node) else Static(r) for r in results)
    graph.output(tuple(nodes))
    module = _torch.graph_module(root, graph, name.title().replace("_", ""))
    return Program(name, module, tuple(inputs), output_tree=None, output_leaves=leaves, constants=constants)


def _placeholders(program: Program) -> Iterator[fx.Node]:
    return (n for n in program.graph_module.graph.nodes if n.op == "placeholder")


def _attribute(root: torch.nn.Module, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(root)


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float, *_torch.SYMBOLS))


def _set_meta(copy: fx.Node, node: fx.Node) -> None:
    copy.meta = dict(node.meta)
    copy.meta["source"] = source_of(node.meta.get("stack_trace"))
    copy.meta["spec"] = _spec(node.meta.get("val"))


def _spec(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_spec(v) for v in value]
    return TensorSpec.of(value) if isinstance(value, Tensor) else str(value)


def _substitute(value: Any, made: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(value, made.__getitem__)


def _run(node: fx.Node, known: dict[fx.Node, Any], mode: Any) -> Any:
    args, kwargs = _substitute((node.args, node.kwargs), known)
    target: Any = node.target
    if node.target is operator.getitem:
        return args[0][args[1]]
    try:
        with mode:
            return target(*args, **kwargs)
    except Exception as error:
        for kind, (reason, hint) in _torch.uncapturable().items():
            if isinstance(error, kind):
                raise CaptureError(
                    reason.format(op=target, error=error), hint=hint, source=node.meta.get("source")
                ) from error
        raise
