"""The key of a call: a generated function that checks everything a trace read, and why a call missed.

One function an entry: it takes the call's arguments, returns MISS where anything differs, and else runs the
program. Values that are Python constants stand in its code; tensors go through one check in C++ (0.4 µs for
three); Python state is compared by the versions of the dicts that hold it, and by value only where one of
these changed.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from primexec import _torch, _torch_autograd, draws, numbers, statics
from primexec._torch import pytree
from primexec.again import changed_before_checks, changes_nothing_outside, raised_by_a_check, raised_by_an_operator
from primexec.bytecode import IDENTITY
from primexec.captured import Captured, Way
from primexec.contents import Contents
from primexec.decided_first import Apart, arranged
from primexec.decisions import Before, DecidedOtherwiseError, Undo
from primexec.descriptions import Key
from primexec.errors import PrimexecError
from primexec.gradients import GradientOf, read_place
from primexec.identities import Found, Given, Shared
from primexec.instances import Part, children_of, is_object, parts
from primexec.program import Static
from primexec.reads import Reads
from primexec.record import ASK, Frozen, PythonState
from primexec.runtime import Executable

MISS = object()
_SENTINEL = torch.empty(0)  # its dispatch keys stand for the thread's modes where a call has no tensors


@dataclass(eq=False, slots=True)
class Entry:
    """A compiled program in a cache.

    Attributes:
        call: takes `args, kwargs`; MISS, or what the function returns. With a true third argument it only checks.
        key: what the program was traced for, in words.
    """

    call: Callable[..., Any]
    captured: Captured
    executable: Executable
    key: Key


def make_entry(
    captured: Captured,
    executable: Executable,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    description: dict[str, str],
) -> Entry:
    """The entry for a call that was just captured under the present global state."""
    call = _Writer(captured, executable).write(args, kwargs)
    return Entry(call, captured, executable, Key.of(captured, description))


class _Writer:
    """Writes the function of one entry."""

    def __init__(self, captured: Captured, executable: Executable) -> None:
        self.captured = captured
        self.executable = executable
        self.lines: list[str] = []
        self.namespace: dict[str, Any] = {"MISS": MISS, "Tensor": Tensor}
        self.leaves: list[tuple[str, Any]] = []  # variable, value at the time of the trace
        self.nodes = [""]  # variables of the nodes of the call, in the order of `StandIns.nodes`
        self.parts: list[tuple[str, Any]] = []  # the same of what may be changed, in the order of `instances.parts`
        self.grad_off = False
        self.varying: dict[str, str] = {}  # variable of a number → variable of the input that is made of it
        self.variables: dict[str, str] = {}  # name of an input → variable

    def write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        known = parts((args, kwargs))
        self.parts = [("", part) for part, _ in known]
        self.places = {id(part): i for i, (part, _) in enumerate(known)}
        self._structure("args", args, 0)
        self._structure("kwargs", kwargs, 0)
        self._parts([inside for _, inside in known])
        self._arrays()
        self._statics()
        self._modes()
        self._python_state()
        inputs = self._inputs()
        self._run(inputs)
        text = "def call(args, kwargs, dry=False):\n" + "".join(f"  {line}\n" for line in self.lines)
        exec(compile(text, "<primexec guards>", "exec"), self.namespace)
        return self.namespace.pop("call")  # type: ignore[no-any-return]  # no cycle through its globals

    def _constant(self, value: Any, name: str = "c") -> str:
        name = f"{name}{len(self.namespace)}"
        self.namespace[name] = value
        return name

    def _miss_if(self, *conditions: str) -> None:
        for condition in conditions:
            self.lines.append(f"if {condition}: return MISS")

    # Arguments -----------------------------------------------------------------------------------------

    def _structure(self, variable: str, value: Any, depth: int) -> None:
        """Check a container's type and size, and bind variables to its leaves."""
        kind = type(value)
        if _torch.is_leaf(value):
            self.leaves.append((variable, value))
            return
        if children_of(value) is not None:
            self.nodes.append(variable)
        if id(value) in self.places:
            self.parts[self.places[id(value)]] = variable, value
        if kind in (tuple, list, dict):
            if depth:
                self._miss_if(f"type({variable}) is not {kind.__name__}")
            self._miss_if(f"len({variable}) != {len(value)}" if value else variable)
            if kind is dict:
                keys = self._constant(tuple(value)) if value else ""
                if value:
                    self._miss_if(f"tuple({variable}) != {keys}")
                    self._kinds_of_keys(variable, value, depth)
                children = [(f"{variable}[{keys}[{i}]]", v) for i, v in enumerate(value.values())]
            else:
                children = [(f"{variable}[{i}]", v) for i, v in enumerate(value)]
        elif kind in pytree.SUPPORTED_NODES:
            flatten = pytree.SUPPORTED_NODES[kind].flatten_fn
            parts, context = flatten(value)
            found = f"p{len(self.lines)}"
            self._miss_if(f"type({variable}) is not {self._constant(kind)}")
            self.lines.append(f"{found}, context = {self._constant(flatten)}({variable})")
            self._miss_if(f"len({found}) != {len(parts)} or context != {self._constant(context)}")
            if isinstance(value, dict):
                self._kinds_of_keys(variable, value, depth)
            children = [(f"{found}[{i}]", v) for i, v in enumerate(parts)]
        elif pytree.is_namedtuple_instance(value):
            self._miss_if(f"type({variable}) is not {self._constant(kind)}")
            children = [(f"{variable}[{i}]", v) for i, v in enumerate(value)]
        elif is_object(value):
            names, held = self._constant(tuple(vars(value))), f"d{len(self.lines)}"
            self._miss_if(f"type({variable}) is not {self._constant(kind)}")
            self.lines.append(f"{held} = {variable}.__dict__")
            self._miss_if(f"tuple({held}) != {names}")
            children = [(f"{held}[{name!r}]", v) for name, v in vars(value).items()]
        else:
            self.leaves.append((variable, value))
            return
        for expression, child in children:
            name = f"a{len(self.lines)}"
            self.lines.append(f"{name} = {expression}")
            self._structure(name, child, depth + 1)

    def _kinds_of_keys(self, variable: str, value: dict[Any, Any], depth: int) -> None:
        """1, 1.0 and True are equal, and so are a str and a member of an enumeration that is one."""
        if depth and value:
            self._miss_if(f"list(map(type, {variable})) != {self._constant(list(map(type, value)))}")

    def _parts(self, inside: list[bool]) -> None:
        """Objects, what is in them, and what is changed, stand in one place each, which the function does not reach."""
        changed = {s.held.number for s in self.captured.stores if isinstance(s.held, Part)}
        alone = [v for (v, _), kept in zip(self.parts, inside, strict=True) if kept or changed]
        if not alone:
            return
        objects = ", ".join(f"id({variable})" for variable, part in self.parts if is_object(part))
        self._miss_if(f"len({{{', '.join(f'id({v})' for v in alone)}}}) != {len(alone)}")
        if objects:
            self._miss_if(f"not {self._constant(self.captured.reached)}.isdisjoint(({objects},))")
        contents = [variable for i, (variable, part) in enumerate(self.parts) if i in changed and not is_object(part)]
        if contents:  # equal ones may have come to places that are compared by value
            reached = self._constant(self.captured.reads.reached)
            self._miss_if(f"not {reached}().keys().isdisjoint(({', '.join(f'id({v})' for v in contents)},))")

    def _arrays(self) -> None:
        """From here on the tensors in their memory stand in place of NumPy arrays."""
        tensors = [(i, v, x, t) for i, (v, x) in enumerate(self.leaves) if (t := statics.of_array(x)) is not x]
        for i, variable, array, tensor in tensors:
            self._miss_if(f"type({variable}) is not {self._constant(type(array))}")
            self.lines.append(f"t{variable} = {self._constant(statics.of_array)}({variable})")
            self._miss_if(f"type(t{variable}) is not Tensor")
            self.leaves[i] = f"t{variable}", tensor
        self._identities([(variable, array) for _, variable, array, _ in tensors])

    def _statics(self) -> None:
        for i, (variable, value) in enumerate(self.leaves):
            if isinstance(value, Tensor):
                continue
            if i in self.captured.varying:
                self._number(variable, value)
                continue
            if value is None or type(value) is bool:
                self._miss_if(f"{variable} is not {value}")
            elif type(value) in (int, str) or (type(value) is float and value != 0 and math.isfinite(value)):
                self._miss_if(f"type({variable}) is not {type(value).__name__} or {variable} != {value!r}")
            elif isinstance(value, torch.Generator):
                device = self._constant(value.device)
                self._miss_if(f"type({variable}) is not {self._constant(type(value))} or {variable}.device != {device}")
            elif isinstance(value, (torch.dtype, torch.layout)):
                self._miss_if(f"{variable} is not {self._constant(value)}")
            elif isinstance(value, torch.device):
                self._miss_if(f"type({variable}) is not {self._constant(torch.device)}")
                self._miss_if(f"{variable} != {self._constant(value)}")
            else:
                frozen = self._constant(statics.freeze_argument(value))
                self._miss_if(f"{self._constant(statics.freeze_argument)}({variable}) != {frozen}")
        self._identities([(v, x) for v, x in self.leaves if isinstance(x, (Tensor, torch.Generator))])

    def _number(self, variable: str, value: Any) -> None:
        """A number that is an input, whatever its value."""
        largest = statics.LARGEST[type(value)]
        self._miss_if(f"type({variable}) is not {type(value).__name__} or not -{largest} <= {variable} <= {largest}")
        self.varying[variable] = f"n{len(self.lines)}"

    def _identities(self, inputs: list[tuple[str, Any]]) -> None:
        """Arguments that were one object must be one again, and no others."""
        first: dict[int, str] = {}
        for variable, value in inputs:
            if id(value) in first:
                self._miss_if(f"{variable} is not {first[id(value)]}")
            else:
                first[id(value)] = variable
        names = list(first.values())
        if len(names) <= 4:
            self._miss_if(*(f"{a} is {b}" for i, a in enumerate(names) for b in names[:i]))
        else:
            self._miss_if(f"len({{{', '.join(f'id({n})' for n in names)}}}) != {len(names)}")

    # State ---------------------------------------------------------------------------------------------

    def _modes(self) -> None:
        depth = _torch.function_mode_depth()
        self._miss_if(f"not {self._constant(_torch.global_state_check())}()")
        self._miss_if(f"{self._constant(_torch.function_mode_depth)}() != {depth}")
        if depth:
            device = self._constant(_torch.default_device())
            self._miss_if(f"{self._constant(_torch.default_device)}() != {device}")
        forward_ad = self._constant(_torch.private("torch.autograd.forward_ad"))
        self._miss_if(f"{forward_ad}._current_level >= 0")
        if self.captured.uses_sdpa:
            switches = self._constant(_torch.sdpa_switches())
            self._miss_if(f"{self._constant(_torch.sdpa_switches)}() != {switches}")

    def _python_state(self) -> None:
        reads = self.captured.reads
        known = [n for n in reads.namespaces.values() if n.values or n.keys is not None]
        empty = [n.held for n in known if n.is_empty()]  # a fifth of the price of a version: hooks, children, buffers
        known = [n for n in known if not n.is_empty()]
        contents = Contents(reads.containers)
        if known:
            state = PythonState(known, contents)
            same = [
                *self._versions(state, "versions", [n.held for n in known if n.of is None], None),
                *self._versions(state, "owned", [n.of for n in known if n.of is not None], "__dict__"),
            ]
            self._miss_if(f"not ({' and '.join(same)}) and not {self._constant(state.revalidate)}()")
        if empty:
            self._miss_if(f"any({self._constant(empty)})")
        for name, kept in reads.exchangeable.items():
            self._kept(ASK[name], *kept)
        for cell in reads.cells:
            get = self._constant(cell.get)
            if statics.has_contents(cell.original):
                self._miss_if(f"{get}() is not {self._constant(cell.original)} and {self._constant(cell)}.changed()")
            elif isinstance(cell.value, statics.Identity):
                self._miss_if(f"{get}() is not {self._constant(cell.value.value)}")
            else:
                self._miss_if(f"{self._constant(statics.freeze)}({get}()) != {self._constant(cell.value)}")
        if reads.containers or any(n.originals for n in known):
            held = self._constant(contents)
            self._miss_if(f"not ({held}.empty or {held}.same())")

    def _versions(self, state: PythonState, name: str, places: list[Any], attribute: str | None) -> list[str]:
        """Compare the versions of dicts, or of the dicts that are an attribute of objects now."""
        if not places:
            return []
        version, held, then = (self._constant(v) for v in (_torch.dict_version(), places, state))
        if len(places) == 1:
            return [f"{version}({held}[0]{f'.{attribute}' if attribute else ''}) == {then}.{name}[0]"]
        each = f"map({self._constant(operator.attrgetter(attribute))}, {held})" if attribute else held
        return [f"list(map({version}, {each})) == {then}.{name}"]

    def _kept(self, ask: Callable[[Any], Any], objects: list[Any], values: list[Any]) -> None:
        """Compare what can be exchanged in place."""
        if len(objects) == 1:
            self._miss_if(f"{self._constant(ask)}({self._constant(objects[0])}) is not {self._constant(values[0])}")
        elif objects:
            ask_, all_, then = (self._constant(v) for v in (ask, objects, values))
            self._miss_if(f"list(map({ask_}, {all_})) != {then}")

    # Inputs and the run --------------------------------------------------------------------------------

    def _inputs(self) -> list[str]:
        captured = self.captured
        arguments, states, constants = iter(captured.arguments), iter(captured.states), iter(captured.program.constants)
        values = dict(self.leaves)  # variable → value at the time of the trace
        known: dict[str, Any] = {}  # the same by the name of the input
        reading: list[str] = []
        for i in captured.program.inputs:
            if i.kind == "argument":
                variable = self.leaves[next(arguments)][0]
            elif i.kind == "constant":
                variable = self._constant(next(constants))
            else:
                first, *others = next(states)
                variable = f"s{len(values)}"
                values[variable] = read_place(first, known)
                reading.append(f"{variable} = {self._place(first)}")
                reading += [f"if {self._place(p)} is not {variable}: return MISS" for p in others]
            self.variables[i.name], known[i.name] = variable, values.get(variable)
        for position, tied in captured.tied:
            reading += [f"if {self._place(p)} is not {self.leaves[position][0]}: return MISS" for p in tied]
        reading += [f"if {self.variables[i]}.grad is not None: return MISS" for i in captured.without_gradient]
        if reading:
            self.lines += ["try:", *(f"  {line}" for line in reading), "except (KeyError, IndexError): return MISS"]
        for variable in self.variables.values():
            if type(value := values.get(variable)) in statics.LARGEST and variable not in self.varying:
                self._number(variable, value)
        if captured.conditions:
            failed = [f"not ({c.in_code(self._constant, self.variables)})" for c in captured.conditions]
            self.lines += ["try:", *(f"  if {c}: return MISS" for c in failed)]
            self.lines += [f"except {self._constant((ArithmeticError, PrimexecError))}: return MISS"]
        if captured.program.frozen:
            kept = [(self.variables[name], values[self.variables[name]]) for name in captured.program.frozen]
            unchanged = self._constant(Frozen([value for _, value in kept]))
            self._miss_if(f"not {unchanged}({', '.join(variable for variable, _ in kept)})")
        inputs = [self.varying.get(variable, variable) for variable in self.variables.values()]
        tensors = {v: x for v, x in values.items() if isinstance(x, Tensor)}
        once = {id(x): (v, x) for v, x in tensors.items()}  # the check refuses one tensor twice
        check = self._constant(_torch.tensor_guards([*(x for _, x in once.values()), _SENTINEL]))
        self._miss_if(f"not {check}({', '.join([*(v for v, _ in once.values()), self._constant(_SENTINEL)])})")
        for variable, value in values.items():
            if isinstance(value, torch.Generator):
                self._miss_if(f"{variable}.device != {self._constant(value.device)}")
        if captured.reads.reflective:  # getattr(x, "tag", None) sees what Python code has hung on a tensor
            held = {v: (self._constant(tuple(t.__dict__)) if t.__dict__ else "()") for v, t in tensors.items()}
            self._miss_if(*(f"{v}.__dict__" if k == "()" else f"tuple({v}.__dict__) != {k}" for v, k in held.items()))
        if IDENTITY in captured.reads.suspects:
            pattern = functools.partial(_same_objects, captured.reads)
            leaves = [v for v, t in self.leaves if isinstance(t, Tensor)]
            same = pattern(*(t for _, t in self.leaves if isinstance(t, Tensor)))
            self._miss_if(f"{self._constant(pattern)}({', '.join(leaves)}) != {self._constant(same)}")
        if captured.runs_backward:
            hooks = self._constant(_torch_autograd.has_gradient_hooks)
            self._miss_if(*(f"{hooks}({v})" for v, t in tensors.items() if t.requires_grad))
        if captured.apart:
            names = arranged(captured.apart, [n for n, v in self.variables.items() if v in tensors])
            apart = self._constant(Apart(len(captured.apart)))
            self._miss_if(f"not {apart}({', '.join(self.variables[n] for n in names)})")
        if captured.uses_layout:
            layout = self._constant(_torch.layout_of)
            self._miss_if(*(f"{layout}({v}) != {_torch.layout_of(t)}" for v, t in tensors.items()))
        self.grad_off = (
            captured.joint is None and torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
        )
        return inputs

    def _place(self, place: tuple[Any, Any, str]) -> str:
        container, key, _ = place
        if isinstance(container, GradientOf):
            return f"{self.variables[container.input]}.grad"
        if not statics.is_container(container):
            return f"{self._constant(container)}()"
        shown = f"{key!r}" if type(key) in (int, str) else self._constant(key)
        if type(container).__getitem__ is not statics.builtin_base(container).__getitem__:
            return f"{self._constant(statics.get_item)}({self._constant(container)}, {shown})"
        return f"{self._constant(container)}[{shown}]"

    def _run(self, inputs: list[str]) -> None:
        self.lines.append("if dry: return True")
        as_input = self._constant(numbers.as_input) if self.varying else ""
        self.lines += [f"{name} = {as_input}({variable})" for variable, name in self.varying.items()]
        program = self.captured.program
        run = f"out = {self._constant(self.executable.run)}({', '.join(inputs)})"
        autocast = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
        before: list[str] = []
        after: list[str] = []
        if self.grad_off and self.captured.runs_backward:
            # Some kernels keep more for a backward pass under grad mode (an LSTM its workspace), so it stays on.
            run = f"with {self._constant(_torch_autograd.below_autograd())}(): {run}"
        elif self.grad_off:
            set_grad = self._constant(_torch.set_grad_enabled)
            before.append(f"{set_grad}(False)")
            after.append(f"{set_grad}(True)")
        for device in autocast:  # the casts stand in the program
            set_autocast = self._constant(torch.set_autocast_enabled)
            before.append(f"{set_autocast}({device!r}, False)")
            after.append(f"{set_autocast}({device!r}, True)")
        running = [*before, "try:", f"  {run}", "finally:", *(f"  {line}" for line in after)] if before else [run]
        if changes_nothing_outside(program):  # then eager's exception, or what its handler does, can still be had
            running = self._run_again(running, raised_by_an_operator, Undo())
        elif (undo := changed_before_checks(program, bool(self.captured.stores))) is not None:
            running = self._run_again(running, raised_by_a_check, undo)
        if self.captured.decisions:
            running = self._left_where_decided_otherwise(running)
        self.lines += running
        stores = self.captured.stores
        ways = {i: store.held for i, store in enumerate(stores) if isinstance(store.held, Way)}
        self.lines += [f"w{i} = {self._constant(way.find)}()" for i, way in ways.items()]
        for i, store in enumerate(stores):
            value = self._result(store.tree, iter(store.leaves))
            if isinstance(store.held, Part):
                variable, part = self.parts[store.held.number]
                place = variable if isinstance(part, (list, dict)) else f"{variable}.__dict__"
                if isinstance(part, dict) and isinstance(store.key, slice):
                    self.lines += [f"new = {value}", f"{place}.clear()", f"{place}.update(new)"]
                    continue
                key = ":" if isinstance(part, list) else self._constant(store.key)
                self.lines.append(f"{place}[{key}] = {value}")
            elif isinstance(store.held, str):
                self.lines.append(f"{self.variables[store.held]}.{store.key} = {value}")
            elif isinstance(store.held, Way):
                set_item, key = self._constant(statics.set_item), self._constant(store.key)
                self.lines.append(f"{set_item}(w{i}, {key}, {value})")
            elif isinstance(store.held, dict):
                held, key = self._constant(store.held), self._constant(store.key)
                own = type(store.held).__setitem__ is not dict.__setitem__
                set_item = f"{self._constant(statics.set_item)}({held}, {key}, {value})"
                self.lines.append(set_item if own else f"{held}[{key}] = {value}")
            else:
                self.lines.append(f"{self._constant(store.held)}({value})")
        self.lines.append(f"return {self._result(program.output_tree, iter(program.output_leaves))}")

    def _run_again(self, running: list[str], genuine: Callable[[Exception], bool], undo: Undo) -> list[str]:
        """The lines that run the program; where it raises, what it changed is put back, and the function runs."""
        before = self._before("then", undo)
        return [
            *before, "try:", *(f"  {line}" for line in running),
            "except Exception as error:", f"  if not {self._constant(genuine)}(error): raise", "  out = None",
            "if out is None:", *["  then.put_back()"] * bool(before),
            f"  return {self._constant(self.captured.reads.fn)}(*args, **kwargs)",
        ]  # fmt: skip

    def _before(self, variable: str, undo: Undo) -> list[str]:
        """The line that keeps what a program changes, if it changes anything."""
        tensors = [self.variables[name] for name in undo.written]
        generators = [self.variables[name] for name in undo.generators]
        generators += [self._constant(torch.default_generator)] if undo.draws else []
        generators += map(self._constant, draws.generators() if undo.outside else [])
        line = f"{variable} = {self._constant(Before)}([{', '.join(tensors)}], [{', '.join(generators)}])"
        return [line] if undo else []

    def _left_where_decided_otherwise(self, running: list[str]) -> list[str]:
        """The lines that run the program; where it is left, what it changed is put back."""
        lines = [
            "try:",
            *(f"  {line}" for line in running),
            f"except {self._constant(DecidedOtherwiseError)} as error:",
        ]
        if before := self._before("before", self.captured.undo):
            lines = [*before, *lines, "  before.put_back()"]
        return [*lines, f"  raise error.of({self._constant(self.captured.decisions)})"]

    def _result(self, tree: Any, leaves: Any) -> str:
        """An expression that builds what the function returns."""
        if tree.is_leaf():
            leaf = next(leaves)
            if not isinstance(leaf, Static):
                return f"out[{leaf}]"
            if isinstance(leaf.value, Given):
                return self.nodes[leaf.value.number]
            if isinstance(leaf.value, Found):
                return self._constant(leaf.value.value)
            if isinstance(leaf.value, Part):
                return self.parts[leaf.value.number][0]
            return repr(leaf.value) if leaf.value is None else self._constant(leaf.value)
        children = [self._result(child, leaves) for child in tree.children()]
        if tree.type is Shared:
            return f"({''.join(f'shared{tree.context} := {child}' for child in children) or f'shared{tree.context}'})"
        if tree.type is tuple:
            return f"({', '.join(children)}{',' * (len(children) == 1)})"
        if tree.type is list:
            return f"[{', '.join(children)}]"
        if tree.type is dict:
            return (
                "{" + ", ".join(f"{self._constant(k)}: {v}" for k, v in zip(tree.context, children, strict=True)) + "}"
            )
        unflatten = self._constant(pytree.SUPPORTED_NODES[tree.type].unflatten_fn)
        return f"{unflatten}([{', '.join(children)}], {self._constant(tree.context)})"


def _same_objects(reads: Reads, *arguments: Tensor) -> list[int] | None:
    """Which of the arguments and the tensors that the code reached are one object."""
    first: dict[int, int] = {}
    try:
        reached = [read_place((held, key, label), {}) for held, key, label, _ in reads.tensors()]
    except (KeyError, IndexError):
        return None
    return [first.setdefault(_torch.identity(t), len(first)) for t in (*arguments, *reached)]
