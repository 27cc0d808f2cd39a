"""Connected components: of documents that are linked, directly or through others, the first; in one process or over many.

One process joins links as it meets them (union-find). Many workers take rounds of two steps, after Kiveris et al. 2014,
"Connected Components in MapReduce and Beyond": each node links its larger neighbours with the smallest one (large star), then
its smaller neighbours with the smallest (small star). Both leave the components as they are and make no more links, and in the
end all of a component are linked with its first. A round halves how far that is: r rounds settle a chain of 2^r.

The rounds of a pipeline are a fixed number. The last step sees at each node whether they were enough; components that they have
not settled are joined by one worker, as in one process, and a warning says by how many links. So the result is exact whatever
their number: more of them only take work from that worker.

A worker holds the neighbours of one document at a time, some 300 bytes each. The one that joins the rest holds some 600 bytes
for each link that is left: none of a settled component.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

log = logging.getLogger(__name__)
ROUNDS = 5  # near duplicates are linked with the first of a bucket, and settle in two or three
Node = Any  # of any one type that is ordered and hashable


def components(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` documents the smallest one it is linked with, directly or through others (union-find)."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(count)]


def firsts_in_one_process(links: Iterable[tuple[Node, Node]]) -> dict[Node, Node]:
    """The nodes of all components but the first of each, with that one."""
    links = list(links)
    nodes = sorted({node for link in links for node in link})
    number = {node: i for i, node in enumerate(nodes)}
    heads = components(len(nodes), [(number[a], number[b]) for a, b in links])
    return {node: nodes[heads[i]] for i, node in enumerate(nodes) if heads[i] != i}


def firsts_over_workers(beam: Any, links: Any, *, rounds: int = ROUNDS) -> Any:
    """`firsts_in_one_process` of a collection of links, as a collection of pairs."""
    for i in range(rounds):
        links = (
            links
            | f"Both ways {i}" >> beam.FlatMap(lambda link: (link, link[::-1]))
            | f"Neighbours {i}" >> beam.GroupByKey()
            | f"Large star {i}" >> beam.FlatMapTuple(large_star)
            | f"Smaller {i}" >> beam.GroupByKey()
            | f"Small star {i}" >> beam.FlatMapTuple(small_star)
        )

    def tagged(node, ends):
        first, rest = settle(node, ends)
        yield node, first
        for link in rest:
            yield beam.pvalue.TaggedOutput("rest", link)

    def but_firsts(item, rest):
        node, first = item
        if (first := rest.get(first, first)) != node:
            yield node, first

    found = (
        links
        | "Ends" >> beam.FlatMap(ends_of)
        | "Ends of each" >> beam.GroupByKey()
        | "Settle" >> beam.FlatMapTuple(tagged).with_outputs("rest", main="firsts")
    )
    rest = found.rest | "Each left" >> beam.Distinct() | "All left" >> beam.combiners.ToList() | beam.Map(joined, rounds)
    return found.firsts | "But firsts" >> beam.FlatMap(but_firsts, beam.pvalue.AsSingleton(rest))


def large_star(node: Node, neighbours: Iterable[Node]) -> Iterator[tuple[Node, Node]]:
    """Links the larger neighbours of a node with the smallest of all, itself among them; as (larger, smaller)."""
    first = min(node, min(neighbours))
    for other in neighbours:
        if other > node:
            yield other, first


def small_star(node: Node, smaller: Iterable[Node]) -> Iterator[tuple[Node, Node]]:
    """Links a node and its smaller neighbours with the smallest of them."""
    found = set(smaller)
    first = min(found)
    yield node, first
    for other in found:
        if other != first:
            yield other, first


def ends_of(link: tuple[Node, Node]) -> Iterator[tuple[Node, Node | None]]:
    """For each node of a link the smaller one that it is linked with; None for that one itself."""
    a, b = max(link), min(link)
    yield a, b
    yield b, None


def settle(node: Node, ends: Iterable[Node | None]) -> tuple[Node, list[tuple[Node, Node]]]:
    """The smallest node that a node is linked with, itself if none is smaller, and the links that the rounds have left of it.

    Of components that are stars nothing is left. Of the others the links that are left join those smallest nodes: two of them
    where a node is linked with both, and one of them with its own.
    """
    smaller = set(ends)
    has_larger = None in smaller
    smaller.discard(None)
    if not smaller:
        return node, []
    first = min(smaller)
    rest = [(other, first) for other in smaller if other != first]
    return first, [*rest, (node, first)] if has_larger else rest


def joined(rest: Sequence[tuple[Node, Node]], rounds: int) -> dict[Node, Node]:
    """The firsts of what the rounds have left, with a warning if that is anything."""
    if rest:
        log.warning("%d links between documents were left after %d rounds: one worker joins them", len(rest), rounds)
    return firsts_in_one_process(rest)
