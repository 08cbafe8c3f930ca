"""Where nodes run: from the executor of each node to few regions, in an order that keeps every dependency.

Consecutive nodes of one executor would make many small regions. Instead each node joins the first region of its
executor that runs after all it depends on. What costs nothing to make again, that is views and tensors made of no other
tensor, has no region of its own: each region makes what it uses.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Reversible, Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from primexec import effects
from primexec.cut import is_dear, is_pointwise
from primexec.decisions import decide
from primexec.prims import lookup

MOST_AGAIN = 16  # operators that a region computes again rather than read their result


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
    """Whether a node costs nothing to make again: a view, several of one tensor, or a tensor made of no other."""
    source: Any = node.args[0] if node.target is operator.getitem else node
    if effects.has_effect(source):
        return False
    several = [n for n in effects.results_of(source) if n is not source]
    if not several:
        return effects.is_view(node) or (node is source and not node.all_input_nodes)
    return source.all_input_nodes == [source.args[0]] and all(map(effects.aliases_input, several))


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
        self.written = {self.memory(w) for n in self.nodes for w in effects.writes(n)}
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
        again = self._made_again()
        made = [Group(executor) for executor in self.executors]
        for node in self.nodes:
            if node in self.region:
                made[self.region[node]].own.append(node)
        number = {n: i for i, n in enumerate(self.nodes)}
        for i, group in enumerate(made):
            found = with_what_is_made_again(group.own, self.free, again.get(i, set()))
            group.nodes = sorted(found, key=number.__getitem__)
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
        """What is made early must be kept long: nodes go to their first user, where that keeps no more memory.

        What depends on the program's inputs alone keeps none.
        """
        movable = [n for n in self.nodes if self._may_sink(n)]
        loose: dict[fx.Node, None] = {}
        for node in movable:
            if self.homes[node] != self.anywhere and all(n in loose for n in self._sources(node)):
                loose.update(dict.fromkeys((node, *effects.results_of(node))))
        ends = self._ends(loose)
        last = {n: max((self.region[u] for u in self._users(n)), default=0) for n in self.region}
        for node in reversed(movable):
            results = effects.results_of(node)
            users = {u for n in results for u in self._users(n)} - ends
            if not users or not self.returned.isdisjoint(results):
                continue
            region = min(self.region[u] for u in users)
            while region > self.region[node] and self.executors[region] != self.homes[node]:
                region -= 1
            sources = self._sources(node)
            held = sum(effects.nbytes(n) for n in sources if last[n] < region)
            if node in loose or held <= sum(map(effects.nbytes, results)):
                self.region.update(dict.fromkeys((node, *results), region))
                last.update({n: max(last[n], region) for n in sources})
        for node in loose:
            if node in ends:
                self.region[node] = max(self.region[node], *(self.region[n] for n in self._sources(node)))

    def _may_sink(self, node: fx.Node) -> bool:
        if node not in self.region or node.target is operator.getitem:
            return False
        if self.homes[node] == self.anywhere and any(self.region[n] == self.region[node] for n in self._sources(node)):
            return False  # the operators of one call of the API are replayed as that call where they stay together
        return not effects.has_effect(node) and not any(self.memory(n) in self.written for n in node.all_input_nodes)

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
        return {n for n in self._operands(node) if n in self.region}

    def _users(self, node: fx.Node) -> set[fx.Node]:
        """The nodes with a region that are computed from a node."""
        found: set[fx.Node] = set()
        for n in node.users:
            found |= self._users(n) if n in self.free else {n} if n in self.region else set()
        return found

    def _made_again(self) -> dict[int, set[fx.Node]]:
        """For each region what it computes again rather than read: pointwise, of nothing but what it reads anyway."""
        later: dict[fx.Node, set[int]] = {}  # of what may be, the other regions that use it
        for node in self.region:
            regions = {self.region[u] for u in self._users(node)} - {self.region[node]}
            alike = all(self.executors[r] == self.homes[node] != self.anywhere for r in regions)
            if regions and alike and node not in self.returned and self._is_plain(node):
                later[node] = regions
        read: dict[int, set[fx.Node]] = {}
        for node, region in self.region.items():
            read.setdefault(region, set()).update(n for n in self._operands(node) if n not in later)
        again: dict[int, set[fx.Node]] = {}
        for node, regions in later.items():
            parts = {r: self._parts(node, read[r]) for r in regions}
            for r, found in parts.items():
                if all(parts.values()):
                    again.setdefault(r, set()).update(found)
                else:
                    read[r].add(node)
        return again

    def _parts(self, node: fx.Node, read: Set[fx.Node]) -> set[fx.Node]:
        """The node and those it is computed from, up to what is read anyway; none where that is too much."""
        found, waiting = {node}, [node]
        while waiting:
            for n in self._operands(waiting.pop()):
                if n in read or n in found:
                    continue
                if n.op != "call_function" or len(found) == MOST_AGAIN or not self._is_plain(n):
                    return set()
                found.add(n)
                waiting.append(n)
        return found

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether the node is pointwise, and neither it nor its operands are written to."""
        row = lookup(node.target)
        pointwise = is_pointwise(node) or (row is not None and row.family == "pointwise" and not is_dear(row.op))
        memory = {self.memory(n) for n in (node, *node.all_input_nodes)}
        return pointwise and memory.isdisjoint(self.written)

    def _operands(self, node: fx.Node) -> set[fx.Node]:
        """The inputs, and nodes with a region, that a node is computed from."""
        found: set[fx.Node] = set()
        for n in node.all_input_nodes:
            found |= self._operands(n) if n in self.free else {n}
        return found


def with_what_is_made_again(own: Iterable[fx.Node], *again: Set[fx.Node]) -> set[fx.Node]:
    """Nodes of a region, and what they use of those that may be made again."""
    found = set(own)
    waiting = list(found)
    while waiting:
        more = [n for n in waiting.pop().all_input_nodes if n not in found and any(n in nodes for nodes in again)]
        found.update(more)
        waiting += more
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
