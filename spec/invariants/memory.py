"""Pages and rows: S1 page-lifetime, S5 complete-success, S8 conservation, S11 producer-ready."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final

from kvpoll.spec import trace
from kvpoll.spec.invariants.monitor import Monitor, Recent, said
from kvpoll.spec.trace import PageTag, Pair
from kvpoll.spec.vocabulary import Incarnation

Place = tuple[str, str]
"""(node, pool): where a page number means something."""


NOTHING: Final[frozenset[int]] = frozenset()


def _places(write: trace.WritePosted) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """Where a write may read or place bytes until it is settled."""
    yield (write.target, "kv"), write.target_pages
    yield (write.node, "kv"), write.source_pages
    if write.row is not None:
        yield (write.target, "aux"), (write.row,)


class PageLifetime(Monitor):
    """S1. On Reserved(node, pool, pages): none of them is the source or target of a WritePosted that has no
    WriteSettled. On WriteLanded: none of its pages is reserved by a pair other than the write's own.

    Targets are the ``kv`` pages (and the ``aux`` row) of ``target``, sources the ``kv`` pages of ``node``.
    The violation carries the pair of the event that breaks it: the new owner, or the write that landed late.
    A stopped node has lost its memory, so its pages are forgotten and writes from and to it count as settled; a
    write posted later to a life of its target that is over reaches nobody (its registration died with it). After
    Fenced, no write to that incarnation places anything; what it reads it may still be reading.

    Looking up each page of each write would cost more than the rest of the watch. Pages are held in sets, one for
    each pair, and compared as sets; a page is only looked up once it *dangles*: a write is out on it and the
    write's own pair does not own it (any more).
    """

    invariant = "S1"

    def begin(self) -> None:
        self._owned: defaultdict[Place, set[int]] = defaultdict(set)
        self._owners: defaultdict[Place, dict[Pair, set[int]]] = defaultdict(dict)
        self._ended: dict[str, int] = {}
        self._fenced: Recent[tuple[str, Incarnation], None] = Recent()
        self._writes: dict[int, trace.WritePosted] = {}
        self._touching: dict[Pair, set[int]] = {}
        self._dangling: dict[Place, dict[int, set[int]]] = {}

    def on_reserved(self, event: trace.Reserved) -> None:
        place = (event.node, event.pool)
        owned, pages, pair = self._owned[place], event.pages, event.incarnation[:2]
        if not owned.isdisjoint(pages):
            self._take_over(place, pages)
        if place in self._dangling:
            self._judge_handover(event, pair, self._dangling[place])
        owned.update(pages)
        owners = self._owners[place]
        if pair in owners:
            owners[pair].update(pages)
        else:
            owners[pair] = set(pages)

    def _take_over(self, place: Place, pages: tuple[int, ...], unless: Pair | None = None) -> None:
        """These pages are nobody's from now on; writes of their owners dangle, but for those of one pair."""
        owners = self._owners[place]
        for pair in [pair for pair, theirs in owners.items() if not theirs.isdisjoint(pages)]:
            if pair != unless:
                self._loosen(place, pair, tuple(owners[pair].intersection(pages)))
            owners[pair].difference_update(pages)
            if not owners[pair]:
                del owners[pair]

    def _judge_handover(self, event: trace.Reserved, pair: Pair, dangling: dict[int, set[int]]) -> None:
        page = next((page for page in event.pages if page in dangling), None)
        if page is not None:
            write = self._writes[min(dangling[page])]
            text = (
                f"{event.pool} page {page} went to {said(pair)} while write {write.write} of "
                f"{write.node} for {said(write.incarnation.pair)} was not settled"
            )
            self.violate(event.t, event.node, pair, text)

    def on_released(self, event: trace.Released) -> None:
        place, pair, pages = (event.node, event.pool), event.incarnation[:2], event.pages
        if pair in self._touching:
            self._loosen(place, pair, pages)
        owners = self._owners[place]
        own = owners.get(pair, NOTHING)
        if len(own) == len(pages) and own.issuperset(pages):
            del owners[pair]
        else:
            self._take_over(place, pages, unless=pair)
        self._owned[place].difference_update(pages)

    def _loosen(self, place: Place, pair: Pair, pages: tuple[int, ...]) -> None:
        for number in self._touching.get(pair, ()):
            for touched_place, touched in _places(self._writes[number]):
                if touched_place == place:
                    self._dangle(place, set(touched).intersection(pages), number)

    def _dangle(self, place: Place, pages: Iterable[int], number: int) -> None:
        for page in pages:
            self._dangling.setdefault(place, {}).setdefault(page, set()).add(number)

    def on_write_posted(self, event: trace.WritePosted) -> None:
        number, pair = event.write, event.incarnation[:2]
        if number in self._writes:
            self._settle(number)
        is_fenced = bool(self._fenced) and (event.target, event.incarnation) in self._fenced
        if is_fenced or event.incarnation.epoch <= self._ended.get(event.target, -1):
            event = event._replace(target_pages=(), row=None)
        self._writes[number] = event
        if pair in self._touching:
            self._touching[pair].add(number)
        else:
            self._touching[pair] = {number}
        for place, pages in _places(event):
            own = self._owners[place].get(pair, NOTHING)
            if not own.issuperset(pages):
                self._dangle(place, [page for page in pages if page not in own], number)

    def on_write_landed(self, event: trace.WriteLanded) -> None:
        pair, owners = event.incarnation[:2], self._owners[event.node, "kv"]
        if owners.get(pair, NOTHING).issuperset(event.pages):
            return
        for page in event.pages:
            owner = next((owner for owner, pages in owners.items() if page in pages), None)
            if owner != pair and owner is not None:
                text = f"write {event.write} of {said(pair)} landed on page {page}, now of {said(owner)}"
                self.violate(event.t, event.node, pair, text)
                return

    def on_fenced(self, event: trace.Fenced) -> None:
        self._fenced.remember((event.node, event.incarnation), None)
        for number in self._touching.get(event.incarnation.pair, ()):
            write = self._writes[number]
            if (write.target, write.incarnation) == (event.node, event.incarnation):
                self._tie_up(write._replace(source_pages=()))
                self._writes[number] = write._replace(target_pages=(), row=None)

    def on_write_settled(self, event: trace.WriteSettled) -> None:
        self._settle(event.write)

    def _settle(self, number: int) -> None:
        write = self._writes.pop(number, None)
        if write is None:
            return
        pair = write.incarnation[:2]
        touching = self._touching[pair]
        touching.discard(number)
        if not touching:
            del self._touching[pair]
        if self._dangling:
            self._tie_up(write)

    def _tie_up(self, write: trace.WritePosted) -> None:
        for place, pages in _places(write):
            dangling = self._dangling.get(place, {})
            for page in dangling.keys() & set(pages):
                dangling[page].discard(write.write)
                if not dangling[page]:
                    del dangling[page]
            if not dangling:
                self._dangling.pop(place, None)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        """Its memory is gone, and so is every write from it and to it."""
        node = event.node
        self._ended[node] = event.epoch
        for number in [w.write for w in self._writes.values() if node in (w.node, w.target)]:
            self._settle(number)
        for place in [place for place in self._owners if place[0] == node]:
            del self._owners[place]
            self._owned.pop(place, None)


class CompleteSuccess(Monitor):
    """S5. On Committed: for every page of the prompt and every component, the page holds a tag of that
    component with the committing pair and that part of the prompt, and the aux row belongs to that pair.
    """

    invariant = "S5"

    def on_committed(self, event: trace.Committed) -> None:
        pair = event.incarnation.pair
        for part, page in enumerate(event.contents):
            for component in event.components:
                tag = page.get(component)
                if tag is None or tag.pair != pair or tag.part != part or tag.source != component:
                    self.violate(event.t, event.node, pair, _wrong_page(part, component, pair, tag))
                    return
        if event.row_pair != pair:
            found = "nobody" if event.row_pair is None else said(event.row_pair)
            self.violate(event.t, event.node, pair, f"aux row: expected {said(pair)}, found {found}")


def _wrong_page(part: int, component: str, pair: Pair, tag: PageTag | None) -> str:
    found = "nothing" if tag is None else f"page {tag.part} of {said(tag.pair)} from {tag.source}"
    return f"page {part}, component {component}: expected {said(pair)}, found {found}"


class Conservation(Monitor):
    """S8. In each pool: no Reserved of a page that is owned, no Released of a page that its incarnation's
    pair does not own, and after each Released free + owned is the same total as after the first one.

    After a total that does not add up the new one is taken as true, so that one leak is one violation. A
    stopped node begins with a full pool again.
    """

    invariant = "S8"

    def begin(self) -> None:
        self._owned: defaultdict[Place, set[int]] = defaultdict(set)
        self._owners: defaultdict[Place, dict[Pair, tuple[int, ...]]] = defaultdict(dict)
        self._totals: dict[Place, int] = {}

    def on_reserved(self, event: trace.Reserved) -> None:
        place, pages, pair = (event.node, event.pool), event.pages, event.incarnation[:2]
        owned, owners, before = self._owned[place], self._owners[place], len(self._owned[place])
        taken = not owned.isdisjoint(pages)
        if taken:
            page = next(page for page in pages if page in owned)
            text = f"{event.pool} page {page} went to {said(pair)} while {said(_owner(owners, page))} owned it"
            self.violate(event.t, event.node, pair, text)
            self._disown(place, pages)
        owned.update(pages)
        if not taken and len(owned) - before != len(pages):
            self.violate(event.t, event.node, pair, f"a {event.pool} page was handed out twice in one go")
        owners[pair] = owners[pair] + pages if pair in owners else pages

    def _disown(self, place: Place, pages: tuple[int, ...]) -> None:
        owners = self._owners[place]
        for pair, theirs in list(owners.items()):
            left = tuple([page for page in theirs if page not in pages])
            if not left:
                del owners[pair]
            elif len(left) < len(theirs):
                owners[pair] = left

    def on_released(self, event: trace.Released) -> None:
        place, pair, pages = (event.node, event.pool), event.incarnation[:2], event.pages
        owned, owners = self._owned[place], self._owners[place]
        own = owners.get(pair, ())
        if own == pages:
            del owners[pair]
        else:
            foreign = next((page for page in pages if page not in own), None)
            if foreign is not None:
                whose = said(_owner(owners, foreign)) if foreign in owned else "nobody"
                text = f"{said(pair)} released {event.pool} page {foreign}, owned by {whose}"
                self.violate(event.t, event.node, pair, text)
            self._disown(place, pages)
        owned.difference_update(pages)
        total = event.free + len(owned)
        known = self._totals.setdefault(place, total)
        if known != total:
            self._totals[place] = total
            text = f"{event.pool}: {event.free} free + {len(owned)} owned, but {known} pages in all"
            self.violate(event.t, event.node, pair, text)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        for place in [place for place in self._owners if place[0] == event.node]:
            del self._owners[place]
            self._owned.pop(place, None)
            self._totals.pop(place, None)


def _owner(owners: dict[Pair, tuple[int, ...]], page: int) -> Pair:
    """Whose page that is. Slow, and asked only to tell of a violation."""
    return next(pair for pair, pages in owners.items() if page in pages)


class ProducerReady(Monitor):
    """S11. A WritePosted of (node, pair, chunk) comes after Computed of the same three, in the same life of
    the node. The last ``REMEMBERED`` (node, pair) are remembered, so that a late write is judged by S1 and
    S2, not mistaken for an early one.
    """

    invariant = "S11"

    def begin(self) -> None:
        self._computed: Recent[tuple[str, Pair], set[int]] = Recent()

    def on_computed(self, event: trace.Computed) -> None:
        key = (event.node, event.incarnation[:2])
        chunks = self._computed.get(key)
        if chunks is None:
            self._computed.remember(key, {event.chunk})
        else:
            chunks.add(event.chunk)

    def on_write_posted(self, event: trace.WritePosted) -> None:
        pair = event.incarnation[:2]
        if event.chunk not in self._computed.get((event.node, pair), ()):
            text = f"write {event.write} reads chunk {event.chunk} before it is computed"
            self.violate(event.t, event.node, pair, text)

    def on_node_stopped(self, event: trace.NodeStopped) -> None:
        for key in [key for key in self._computed if key[0] == event.node]:
            del self._computed[key]
