"""Comparisons of responses to one prompt, put together into rankings where they are ones."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

Comparison = tuple[Hashable, Hashable, Hashable]  # prompt, chosen response, rejected response


def merge_comparisons(comparisons: Iterable[Comparison]) -> Iterator[tuple[int, list[int], list[int]]]:
    """(number of its first comparison, responses, their ranks from 1) of each list, in the order of the first ones.

    A response is a number below 2n for n comparisons: i is the chosen one of comparison i, n + i its rejected one.

    Comparisons of one prompt that are connected by common responses are one list where what follows from them, "a
    before b and b before c" meaning a before c, is a ranking with or without ties: one response before three others
    makes these three tied, a chain is ranked from end to end. Where it is not, because some order is left open (a
    before b and c, b before d: is c before d?) or they contradict each other, every comparison is a list of two, and
    nothing is compared that was not. A comparison that is made again counts once in a list.
    """
    found = list(comparisons)
    by_prompt: dict[Hashable, list[int]] = {}
    for number, (prompt, _, _) in enumerate(found):
        by_prompt.setdefault(prompt, []).append(number)
    lists = [entry for numbers in by_prompt.values() for entry in _of_prompt(found, numbers)]
    return iter(sorted(lists))


def _of_prompt(found: list[Comparison], numbers: list[int]) -> Iterator[tuple[int, list[int], list[int]]]:
    places: dict[Hashable, int] = {}  # response -> its number among those of the prompt
    first_seen: list[int] = []  # of those: the number below 2n
    edges: list[tuple[int, int]] = []
    for number in numbers:
        ends = []
        for response, seen in ((found[number][1], number), (found[number][2], len(found) + number)):
            if response not in places:
                places[response] = len(places)
                first_seen.append(seen)
            ends.append(places[response])
        edges.append((ends[0], ends[1]))
    for component in _components(len(places), edges):
        inside = [number for number, (a, _) in zip(numbers, edges, strict=True) if component >> a & 1]
        ranks = _ranking(component, edges)
        if ranks is None:
            yield from ((number, [number, len(found) + number], [1, 2]) for number in inside)
        else:
            members = sorted(ranks, key=lambda place: (ranks[place], place))
            yield inside[0], [first_seen[place] for place in members], [ranks[place] for place in members]


def _components(count: int, edges: list[tuple[int, int]]) -> list[int]:
    """Connected responses, as bit masks."""
    masks = {place: 1 << place for place in range(count)}
    root = list(range(count))
    for a, b in edges:
        a, b = root[a], root[b]
        if a != b:
            masks[a] |= masks.pop(b)
            root = [a if r == b else r for r in root]
    return list(masks.values())


def _ranking(component: int, edges: list[tuple[int, int]]) -> dict[int, int] | None:
    """Ranks from 1 of the component's responses, or None: what follows from the edges is no strict weak order.

    In one, a is before b exactly where fewer responses are before a than before b.
    """
    places = [place for place in range(component.bit_length()) if component >> place & 1]
    before = dict.fromkeys(places, 0)  # bit masks of all that is before a response
    for a, b in edges:
        if b in before:
            before[b] |= 1 << a
    changed = True
    while changed:
        changed = False
        for place in places:
            mask = before[place]
            for other in places:
                if mask >> other & 1:
                    mask |= before[other]
            changed |= mask != before[place]
            before[place] = mask
    counts = {place: before[place].bit_count() for place in places}
    for a in places:
        for b in places:
            if bool(before[b] >> a & 1) != (counts[a] < counts[b]):
                return None
    levels = sorted(set(counts.values()))
    return {place: levels.index(counts[place]) + 1 for place in places}
