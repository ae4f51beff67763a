"""Input that makes no sense, and input at the edge: a clear error or a correct answer, and never a hang."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import networkx as nx
import pytest
from ortools.sat.python import cp_model

from solvers import InfeasibleError, Problem, ProblemError, Schedule, minimum_peak, simulate, solve
from solvers.bounds import lower_bounds
from solvers.core.linear import LinearAnswer, LinearProgram
from solvers.free_order import solve as solve_free
from solvers.retention.method import solve as solve_fixed
from tests.work import Name, Work


def digraph(*edges: tuple[object, object], nodes: int = 0, **attributes: object) -> nx.DiGraph:
    """Nodes of one second and four bytes, or of ``attributes``."""
    graph = nx.DiGraph(name="g")
    graph.add_nodes_from(range(nodes))
    graph.add_edges_from(edges)
    for node in graph:
        graph.nodes[node].update({"seconds": 1.0, "bytes": 4, **attributes})
    return graph


def skips(length: int, **attributes: object) -> Problem:
    """A chain in which every op's value is also read by the op half the chain later."""
    edges = [(i, i + 1) for i in range(length - 1)]
    edges += [(i, i + length // 2) for i in range(length - length // 2)]
    return Problem.from_networkx(digraph(*edges, nodes=length, **attributes))


@pytest.mark.parametrize(
    ("edges", "shown"),
    [
        ([("a", "a")], "a -> a"),
        ([("a", "b"), ("b", "a")], "a -> b -> a"),
        ([("start", "a"), ("a", "b"), ("b", "c"), ("c", "a")], "a -> b -> c -> a"),
    ],
)
def test_a_cycle_is_shown_closed(edges: list[tuple[str, str]], shown: str) -> None:
    with pytest.raises(ProblemError, match=f"^g: the graph has a cycle: {shown}$"):
        Problem.from_networkx(digraph(*edges))


def test_an_order_of_a_cyclic_graph_cannot_be_topological() -> None:
    graph = digraph(("a", "b"), ("b", "a"))
    graph.graph["order"] = ["a", "b"]
    with pytest.raises(ProblemError, match=r"reads 'b' before it is made; the order is not topological, or"):
        Problem.from_networkx(graph)


def test_an_undirected_graph_is_refused() -> None:
    with pytest.raises(ProblemError, match=r"^dag: the graph is not directed$"):
        Problem.from_networkx(nx.Graph([("a", "b")]))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("seconds", -1.0, r"seconds=-1\.0, want a finite number >= 0"),
        ("seconds", math.nan, "seconds=nan"),
        ("seconds", math.inf, "seconds=inf"),
        ("seconds", None, "seconds=None"),
        ("recompute_seconds", math.nan, "recompute_seconds=nan"),
        ("bytes", -1, "bytes=-1, want an int >= 0"),
        ("bytes", math.nan, "bytes=nan"),
        ("bytes", 0.5, r"bytes=0\.5"),
        ("workspace_bytes", -1, "workspace_bytes=-1"),
    ],
)
def test_costs_that_make_no_sense(attribute: str, value: object, message: str) -> None:
    graph = digraph(("a", "b"))
    graph.nodes["b"][attribute] = value
    with pytest.raises(ProblemError, match=f"^g: .* 'b' has {message}"):
        Problem.from_networkx(graph)


def test_orders_that_are_not_one() -> None:
    for order in (["a"], ["a", "a"], ["a", "b", "c"], ["a", "c"]):
        graph = digraph(("a", "b"))
        graph.graph["order"] = order
        with pytest.raises(ProblemError, match="must list each of the 2 nodes once"):
            Problem.from_networkx(graph)


def test_zero_costs() -> None:
    problem = skips(8, seconds=0.0)
    top = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    for method in (solve, solve_fixed, solve_free):
        solution = method(problem, top - 4, time_limit_s=5)
        assert (solution.status, solution.seconds) == ("optimal", 0.0)
    weightless = skips(8, bytes=0)
    assert solve(weightless, 1).status == "optimal"
    assert minimum_peak(weightless, time_limit_s=5).peak_bytes == 0


@pytest.mark.parametrize("method", [solve, solve_fixed, solve_free])
def test_values_of_a_pebibyte(method: object) -> None:
    small, large = skips(10), skips(10, bytes=4 * 2**50)
    top = simulate(small, Schedule.keep_all(small)).peak_bytes
    expected = method(small, top - 8, time_limit_s=10)  # type: ignore[operator]
    found = method(large, (top - 8) * 2**50, time_limit_s=10)  # type: ignore[operator]
    assert found.fits
    assert found.seconds == expected.seconds
    assert found.peak_bytes == expected.peak_bytes * 2**50


def test_more_bytes_than_can_be_counted() -> None:
    with pytest.raises(
        ProblemError, match=r"^g: its values take 5368709120000000000 bytes in all, more than"
    ):
        Problem.from_networkx(digraph(nodes=5, bytes=2**30 * 10**9))


@pytest.mark.parametrize("method", [solve, solve_free])
def test_an_op_larger_than_the_budget(method: object) -> None:
    graph = digraph(("a", "b"), ("b", "c"))
    graph.nodes["b"]["bytes"] = 1000
    problem = Problem.from_networkx(graph)
    with pytest.raises(InfeasibleError, match=r"at least 1004 are needed .504 more.; .* op '[bc]'"):
        method(problem, 500)  # type: ignore[operator]


def test_an_empty_graph() -> None:
    problem = Problem.from_networkx(nx.DiGraph())
    for method in (solve, solve_fixed, solve_free):
        solution = method(problem, 1)
        assert (solution.status, solution.seconds, len(solution.schedule)) == ("optimal", 0.0, 0)


def test_no_time_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to a solver is handed no time either."""
    limits_s: list[float] = []
    lp, cp = LinearProgram.solve, cp_model.CpSolver.solve

    def noted_lp(self: LinearProgram, *, time_limit_s: float, **options: Any) -> LinearAnswer:
        limits_s.append(time_limit_s)
        return lp(self, time_limit_s=time_limit_s, **options)

    def noted_cp(self: cp_model.CpSolver, *args: Any) -> Any:
        limits_s.append(self.parameters.max_time_in_seconds)
        return cp(self, *args)

    monkeypatch.setattr(LinearProgram, "solve", noted_lp)
    monkeypatch.setattr(cp_model.CpSolver, "solve", noted_cp)
    problem = skips(40)
    top = simulate(problem, Schedule.keep_all(problem)).peak_bytes
    for method in (solve, solve_fixed, solve_free):
        solution = method(problem, round(0.9 * top), time_limit_s=0)
        assert solution.bound_seconds <= solution.seconds
    assert max(limits_s, default=0.0) <= 0.1


def of_equal_names(nodes: int) -> nx.DiGraph:
    graph = nx.DiGraph(name="g")
    graph.add_nodes_from([*(Name(k) for k in range(nodes)), nodes - 1], seconds=1.0, bytes=4)
    return graph


def edges_at_random(nodes: int, edges: int) -> nx.DiGraph:
    rng = random.Random(0)
    starts = [rng.randrange(nodes - 1) for _ in range(edges)]
    ends = [min(nodes - 1, a + 1 + int(rng.expovariate(1 / 50))) for a in starts]
    return nx.relabel_nodes(digraph(*zip(starts, ends, strict=True), nodes=nodes), Name)


def refuse(graph: nx.DiGraph) -> None:
    with pytest.raises(ProblemError, match=f"two ops are called '{len(graph) - 2}'"):
        Problem.from_networkx(graph)


def build_one_op(names: list[str]) -> None:
    Problem.build([{"name": "a", "inputs": [], "outputs": names, "seconds": 1.0}], dict.fromkeys(names, 1))


def read_and_judge(graph: nx.DiGraph) -> None:
    problem = Problem.from_networkx(graph)
    line = simulate(problem, Schedule.keep_all(problem))
    assert lower_bounds.peak_floor(problem).bytes <= line.peak_bytes
    problem.to_networkx()


READERS: dict[str, tuple[Callable[[int], Any], Callable[[Any], None]]] = {
    "a graph": (lambda size: edges_at_random(size, 5 * size), read_and_judge),
    "two equal names": (of_equal_names, refuse),
    "an op of many outputs": (lambda size: [Name(f"v{k}") for k in range(size)], build_one_op),
}


@pytest.mark.parametrize("what", READERS)
def test_what_reads_a_graph_is_near_linear(what: str) -> None:
    """Ten times the input is at most twenty times the work; it would be 100 times if quadratic."""
    made, read = READERS[what]
    smaller, larger = (Work(partial(read, made(size))) for size in (100, 1_000))
    assert larger.times(smaller) < 20
