"""Where nodes run: from the executor of each node to few regions, in an order that keeps every dependency.

Consecutive nodes of one executor would make many small regions. Instead each node joins the first region of its
executor that runs after all it depends on. What costs nothing to make again, that is views and tensors made of no other
tensor, has no region of its own: each region makes what it uses.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Reversible
from dataclasses import dataclass, field

from torch import fx

from primexec import effects
from primexec.decisions import decide


@dataclass
class Group:
    """Nodes of one region in the program's order.

    Attributes:
        own: those that run here only; `nodes` holds what is made again for them, too.
    """

    executor: str
    own: list[fx.Node] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)


def is_free(node: fx.Node) -> bool:
    """Whether a node costs nothing to make again: a view, or a tensor made of no other tensor."""
    if node.target is operator.getitem or effects.has_effect(node):
        return False
    return effects.is_view(node) or not node.all_input_nodes


def place(
    graph: fx.Graph, homes: Mapping[fx.Node, str], movable: Callable[[fx.Node], bool], anywhere: str = "aten"
) -> list[Group]:
    """Groups of nodes, in an order in which they can run.

    Args:
        homes: the executor of each node.
        movable: whether a node costs nothing, so that it may be made again, by `anywhere` too.
        anywhere: the executor that can make what costs nothing, whoever claimed it.
    """
    return _Placer(graph, homes, movable, anywhere).groups()


class _Placer:
    def __init__(
        self, graph: fx.Graph, homes: Mapping[fx.Node, str], movable: Callable[[fx.Node], bool], anywhere: str
    ) -> None:
        self.homes = homes
        self.memory = effects.memory_of(graph)
        self.nodes = [n for n in graph.nodes if n.op == "call_function"]
        self.anywhere = anywhere
        self.returned = set(graph.output_node().all_input_nodes)
        self.free = self._free(movable)
        self.executors: list[str] = []  # of each region
        self.region: dict[fx.Node, int] = {}

    def _free(self, movable: Callable[[fx.Node], bool]) -> set[fx.Node]:
        """Nodes without a region of their own: each of their users runs where they can run."""
        found: set[fx.Node] = set()
        needed: dict[fx.Node, set[str]] = {}
        for node in reversed(self.nodes):
            users = [needed[u] if u in found else {self.homes[u]} for u in node.users if u in self.homes]
            needed[node] = set().union(*users)
            fits = needed[node] <= {self.homes[node], self.anywhere}
            if fits and node.users and node not in self.returned and movable(node):
                found.add(node)
        return found

    def groups(self) -> list[Group]:
        self._place_early()
        self._sink()
        made = [Group(executor) for executor in self.executors]
        for node in self.nodes:
            if node in self.region:
                made[self.region[node]].own.append(node)
        number = {n: i for i, n in enumerate(self.nodes)}
        for group in made:
            group.nodes = sorted(self._with_free(group), key=number.__getitem__)
        return _joined([g for g in made if g.own])

    def _place_early(self) -> None:
        """Each node in the first region that its operands, and effects before it, allow."""
        touched: dict[int, int] = {}  # by storage, the last region that reads or writes it
        written: dict[int, int] = {}
        last_effect = decided = 0
        for node in self.nodes:
            if node in self.free:
                continue
            if node.target is operator.getitem and node.args[0] in self.region:
                self.region[node] = self.region[node.args[0]]
                continue
            storages = [s for n in (*node.all_input_nodes, *effects.results_of(node)) if (s := self.memory(n))]
            after = [decided, *(self.region[n] for n in self._sources(node))]
            after += [written[s] for s in storages if s in written]
            changed = [s for w in effects.writes(node) if (s := self.memory(w))]
            after += [touched[s] for s in changed if s in touched]
            ordered = effects.has_effect(node)
            if ordered:
                after.append(last_effect)
            number = self.region[node] = self._first(max(after, default=0), self.homes[node])
            if ordered:
                last_effect = number
            if node.target is decide:  # what lies behind a branch may raise where another one is taken
                decided = number
            for s in storages:
                touched[s] = max(touched.get(s, 0), number)
            written.update(dict.fromkeys(changed, number))

    def _first(self, earliest: int, home: str) -> int:
        for number in range(earliest, len(self.executors)):
            if self.executors[number] == home:
                return number
        self.executors.append(home)
        return len(self.executors) - 1

    def _sink(self) -> None:
        """What depends on the program's inputs alone goes to its first user: what is made early must be kept long."""
        written = {self.memory(w) for n in self.nodes for w in effects.writes(n)}
        loose: dict[fx.Node, None] = {}
        for node in self.nodes:
            if (
                node in self.region
                and self.homes[node] != self.anywhere
                and effects.results_of(node) == [node]
                and node.target is not operator.getitem
                and all(n in loose for n in self._sources(node))
                and not any(self.memory(n) in written for n in node.all_input_nodes)
            ):
                loose[node] = None
        ends = self._ends(loose)
        for node in reversed(loose):
            if node not in self.returned and (users := self._users(node) - ends):
                last = min(self.region[u] for u in users)
                while last > self.region[node] and self.executors[last] != self.homes[node]:
                    last -= 1
                self.region[node] = last
        for node in loose:
            if node in ends:
                self.region[node] = max(self.region[node], *(self.region[n] for n in self._sources(node)))

    def _ends(self, loose: Reversible[fx.Node]) -> set[fx.Node]:
        """Results, and what nothing but results is made of: they run where what they are made of runs."""
        ends: set[fx.Node] = set()
        for node in reversed(loose):
            users, sources = self._users(node), self._sources(node)
            alike = all(self.homes[n] == self.homes[node] for n in sources)
            if sources and alike and users <= ends and (users or node in self.returned):
                ends.add(node)
        return ends

    def _sources(self, node: fx.Node) -> set[fx.Node]:
        """The nodes with a region that a node is computed from."""
        found: set[fx.Node] = set()
        for n in node.all_input_nodes:
            if n in self.free:
                found |= self._sources(n)
            elif n in self.region:
                found.add(n)
        return found

    def _users(self, node: fx.Node) -> set[fx.Node]:
        """The nodes with a region that are computed from a node."""
        found: set[fx.Node] = set()
        for n in node.users:
            found |= self._users(n) if n in self.free else {n} if n in self.region else set()
        return found

    def _with_free(self, group: Group) -> set[fx.Node]:
        found = set(group.own)
        waiting = list(group.own)
        while waiting:
            for n in waiting.pop().all_input_nodes:
                if n in self.free and n not in found:
                    found.add(n)
                    waiting.append(n)
        return found


def _joined(groups: list[Group]) -> list[Group]:
    """Neighbours of one executor as one group."""
    joined: list[Group] = []
    for group in groups:
        if joined and joined[-1].executor == group.executor:
            both = joined[-1]
            both.own += group.own
            both.nodes = list(dict.fromkeys((*both.nodes, *group.nodes)))
        else:
            joined.append(group)
    return joined
