"""A prefill rank towards decode: rooms, destinations, writes, status, registration. The scheduler comes on top."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kvpoll.spec.vocabulary import Action, Incarnation
from kvpoll.statemachine import dp_rank
from kvpoll.statemachine.agreement import Report
from kvpoll.statemachine.conduct import counts_pages, stops_writes
from kvpoll.statemachine.machine import Room
from kvpoll.statemachine.ranks.engine import PrefillHome, prefill_timers
from kvpoll.statemachine.ranks.host import Destination, Request, is_of, unique_index
from kvpoll.statemachine.ranks.pool import Pool
from kvpoll.statemachine.ranks.rank import Rank
from kvpoll.statemachine.retry import register_delay_s
from kvpoll.statemachine.roles import Queued, Registration

OF_DECODE: Final = ("Metadata", "Abort")
EARLY_MAX: Final = 4096
"""How many messages of later attempts wait for rooms that are not over."""


class Entry:
    """A request in a prefill rank's scheduler: where it stands and how much of it is computed."""

    __slots__ = ("chunk", "computed", "incarnation", "pages", "rejected", "request", "state")

    def __init__(self, request: Request, epoch: int) -> None:
        self.request = request
        self.incarnation = Incarnation(*request.pair, epoch)
        self.state = Queued()
        self.computed = 0
        self.chunk = 0
        self.pages: tuple[int, ...] = ()
        self.rejected: str | None = None


class SenderRank(Rank):
    """One prefill rank: replica ``dp``, stage ``pp``, tensor index ``tp``, context index ``cp``."""

    role = "sender"

    def __init__(self, engine: PrefillHome, node: str, dp: int, pp: int, tp: int, cp: int) -> None:
        super().__init__(engine, node, engine.host.machines.sender, prefill_timers(engine.host.profile))
        self.prefill_engine = engine
        self.dp, self.pp, self.tp, self.cp = dp, pp, tp, cp
        self.component = node
        self.index = cp * engine.shape.sizes.tp + tp
        self.unique_index = unique_index(engine.shape.sizes, pp, tp, cp)
        self.kv = Pool(self.host, node, "kv", engine.shape.kv_pages)
        self.destinations: dict[tuple[int, ...], dict[int, Destination]] = {}
        self.askers: dict[tuple[int, ...], dict[int, tuple[str, Incarnation]]] = {}
        self.by_pair: dict[tuple[int, int], Entry] = {}
        self.registration = Registration()
        self._counts_pages = counts_pages(engine.host.profile)
        self._stops_writes = stops_writes(engine.host.profile)
        self._left: list[Callable[[], None]] = []
        self._early: dict[int, list[tuple[Any, ...]]] = {}
        self._early_count = 0
        self.mail |= {"Metadata": self.receive_metadata, "Abort": self.receive_abort}
        self._actions |= {
            "NotifyDecode": self._notify_decode,
            "AnswerDecode": self._answer_decode,
            "AcknowledgeAbort": self._acknowledge_abort,
            "ReleasePages": lambda action, origin: self.kv.release(action.incarnation),
            "RejectRequest": self._reject,
        }

    # -- messages from decode

    def receive(self, message: str, incarnation: Incarnation, *arguments: Any) -> None:
        """What decode says of the next attempt at a room waits until the room is over, up to EARLY_MAX of it (R2)."""
        room = self.rooms.get(incarnation.room)
        if room is None or message not in OF_DECODE or not self.machine.is_ahead(room, incarnation):
            super().receive(message, incarnation, *arguments)
        elif self._early_count < EARLY_MAX:
            self._early_count += 1
            self.host.mark(self.node, "attempt_ahead")
            self._early.setdefault(incarnation.room, []).append((message, incarnation, *arguments))

    def poll_changed(self, room: Room) -> None:
        if self._stops_writes and room.local.poll == "Failed":
            self.host.abandon(room.incarnation)
        if room.local.poll in ("Retired", "Absent") and room.incarnation.room in self._early:
            for message in self._early.pop(room.incarnation.room):
                self._early_count -= 1
                self.host.after(0.0, self._receive_late, *message)

    def _receive_late(self, *message: Any) -> None:
        if not self.is_over():
            self.receive(*message)

    def receive_metadata(self, incarnation: Incarnation, destination: Destination, required: int) -> None:
        """A decode rank published its pages for a room of ours."""
        if self.stopped:
            return
        key = self.key(incarnation)
        self.destinations.setdefault(key, {})[destination.bit] = destination
        self.deliver("DestinationRegistered", incarnation, (destination.bit, required), destination)
        room = self.rooms.get(incarnation.room)
        if room is None or self.key(room.incarnation) != key:
            self.destinations.pop(key, None)
        elif incarnation.pair in self.by_pair:
            self._check(incarnation, destination)

    def _check(self, own: Incarnation, destination: Destination) -> None:
        """Memory that this rank could not write to fails the request now, not when its KV is computed."""
        problem = self.host.problem(destination) if destination.pages else None
        if problem is not None:
            self.host.explain(own, problem)
            self.deliver("AbortRequested", own, "layout_mismatch")

    def receive_abort(self, incarnation: Incarnation, index: int, node: str, theirs: Incarnation) -> None:
        """A decode rank gave up; ``theirs`` is the incarnation to acknowledge."""
        if self.stopped:
            return
        key = self.key(incarnation)
        self.askers.setdefault(key, {})[index] = (node, theirs)
        self.deliver("PeerAborted", incarnation, index, (node, theirs))
        room = self.rooms.get(incarnation.room)
        if room is None or self.key(room.incarnation) != key:
            self.askers.pop(key, None)

    def forget(self, incarnation: Incarnation) -> None:
        key = self.key(incarnation)
        self.destinations.pop(key, None)
        self.askers.pop(key, None)

    # -- actions

    def _send_status(self, destination: Destination, outcome: str) -> None:
        if not destination.pages:
            return
        own = destination.incarnation
        self.host.send(self.node, destination.node, f"Status {outcome}", own, self.unique_index, outcome)

    def _notify_decode(self, action: Action, origin: Any) -> None:
        for destination in self.destinations.get(self.key(action.incarnation), {}).values():
            self._send_status(destination, action.detail)

    def _answer_decode(self, action: Action, origin: Any) -> None:
        if isinstance(origin, Destination):
            self._send_status(origin, action.detail[0])

    def _acknowledge_abort(self, action: Action, origin: Any) -> None:
        askers = self.askers.get(self.key(action.incarnation), {})
        chosen = askers.values() if action.detail is None else [origin]
        for node, theirs in chosen:
            self.host.send(self.node, node, "AbortAck", theirs, self.unique_index)

    def _reject(self, action: Action, origin: Any) -> None:
        self.host.mark(self.node, "rival_rejected")
        entry = self.by_pair.get(action.incarnation.pair)
        if entry is not None:
            entry.rejected = "room_in_use"
            self.refused(entry)

    def refused(self, entry: Entry) -> None:
        """The machine would not open the room of this request."""

    # -- requests

    def open(self, entry: Entry) -> bool:
        """Open the request's room, and say or check where it runs. False when the machine found it illegal."""
        host, engine = self.host, self.prefill_engine
        required = 0 if self.cp else engine.destinations_required
        if not self.deliver("RequestOpened", entry.incarnation, required):
            return False
        self.opened(entry)
        if entry.rejected is None:
            for destination in list(self.destinations.get(self.key(entry.incarnation), {}).values()):
                self._check(entry.incarnation, destination)
        pair, dp_size, follows = entry.request.pair, engine.dp_ranks, engine.follows_room
        rank = dp_rank.known_rank(host.profile, self.dp, engine.dp_attention)
        cause = dp_rank.conflict(host.profile, pair[0], dp_size, follows, rank)
        if cause is not None:
            host.mark(self.node, "dp_conflict")
            self.deliver("DpConflictFound", entry.incarnation, cause)
        elif dp_rank.must_register(host.profile, dp_size, follows) and self.pp == 0 and self.index == 0:
            key = dp_rank.entry_key(host.profile, pair)
            host.request(self.node, engine.name, "POST /register_dp_rank", (key, rank), 0, lambda status, body: None)
        return True

    def opened(self, entry: Entry) -> None:
        """The room of this request is open."""

    def own_report(self, entry: Entry) -> Report:
        """Poll and cause of a request of ours; one that was refused has no room."""
        return self.report(entry.incarnation) if entry.rejected is None else Report(0, entry.rejected)

    def poll(self, entry: Entry) -> str:
        """State of the request's room, by name; Absent when the room is another's."""
        own = entry.incarnation
        room = self.rooms.get(own.room)
        if room is None or (room.incarnation is not own and self.key(room.incarnation) != self.key(own)):
            return "Absent"
        return room.local.poll

    def post(self, entry: Entry, chunk: int, first: int, pages: tuple[int, ...], last: bool) -> None:
        """One write per destination; the request's final write is the last chunk's to the last destination."""
        incarnation = entry.incarnation
        known = self.destinations.get(self.key(incarnation), {}).values()
        targets = [destination for destination in known if destination.pages]
        if not targets:
            self.deliver("WritePosted", incarnation, last)
            self.deliver("WriteCompleted", incarnation)
        for position, destination in enumerate(targets):
            final = last and position == len(targets) - 1
            if self.poll(entry) not in ("WaitingForInput", "Transferring"):
                return
            if self.deliver("WritePosted", incarnation, final):
                self.host.post(
                    self, destination, chunk, first, pages, last,
                    lambda outcome: self._write_ended(incarnation, outcome),
                )  # fmt: skip

    def has_place_for(self, entry: Entry, count: int, last: bool) -> bool:
        """Can a prompt of ``count`` pages so far go to where decode has published? If not, the request fails: it would
        succeed with pages that nobody filled (A08).
        """
        own = entry.incarnation
        if not self._counts_pages:
            return True
        for destination in self.destinations.get(self.key(own), {}).values():
            wanted = len(destination.pages)
            if wanted and (count > wanted or (last and count < wanted)):
                more = "" if last else " or more"
                self.host.explain(own, f"prefill has {count} pages{more}, decode published {wanted}")
                self.deliver("AbortRequested", own, "page_count_mismatch")
                return False
        return True

    def _write_ended(self, incarnation: Incarnation, outcome: str) -> None:
        fact = {"completed": "WriteCompleted", "failed": "WriteFailed", "settled": "WriteSettled"}[outcome]
        self.deliver(fact, incarnation)

    # -- registration

    def register(self, fact: str) -> None:
        """Step this rank's registration and do what it orders. Where only the loop has ended, the process can leave."""
        if self.over or (self.stopped and fact not in ("LeaveRequested", "UnregistrationAnswered")):
            return
        profile = self.host.profile
        before = self.registration.state
        self.registration, orders = self.host.machines.registration.step(self.registration, fact)
        for order, _ in orders:
            if order == "SendRegistration":
                detail = (self.node, self.epoch, self.prefill_engine.rank_count)
                repeat = self.registration.attempt - 1
                self.host.request(self.node, self.engine.name, "PUT /route", detail, repeat, self._registered)
            elif order == "SendUnregistration":
                who = (self.node, self.epoch)
                self.host.request(self.node, self.engine.name, "DELETE /route", who, 0, self._unregistered)
            elif order == "ArmRetry":
                self.host.mark(self.node, "registration_retried")
                exhausted = self.registration.state == "Exhausted"
                delay = register_delay_s(profile, self.registration.attempt, exhausted, self.chance.random())
                self.host.after(delay, self.register, "RetryDue")
        after = self.registration.state
        if before != after and ("Exhausted" in (before, after) or after == "Leaving"):
            self.engine.report_health()
        if after == "Left":
            left, self._left = self._left, []
            for then in left:
                then()

    def _registered(self, status: int | str, body: Any) -> None:
        self.register("RegistrationAccepted" if status == 200 else "RegistrationFailed")

    def _unregistered(self, status: int | str, body: Any) -> None:
        self.register("UnregistrationAnswered")

    def leave(self, then: Callable[[], None] = lambda: None) -> None:
        """Be found by no new request, for good; those that are here go on. ``then``: the server has answered or never
        will. A registration that was under way may list the rank once more; when it is answered, so is the goodbye.
        """
        if self.over:
            then()
            return
        self._left.append(then)
        self.register("LeaveRequested")

    # -- what it believes of decode engines

    def suspect(self, engine: str) -> None:
        """A decode engine does not answer: every room that writes to it fails; its memory may still be written."""
        self._tell_rooms(engine, "PeerSuspected", None)

    def bury(self, name: str, alive_since: int) -> None:
        """Lives of a decode engine, or of one of its ranks, before this one are over."""
        self._tell_rooms(name, "PeerDied", alive_since)

    def restored(self, engine: str) -> None:
        """The channel to a decode engine is back."""
        self._tell_rooms(engine, "LinkRestored", None)

    def _tell_rooms(self, name: str, fact: str, alive_since: int | None) -> None:
        for room in list(self.rooms.values()):
            known = self.destinations.get(self.key(room.incarnation), {}).values()
            if any(is_of(d.node, name) and (alive_since is None or d.incarnation.epoch < alive_since) for d in known):
                self.deliver(fact, room.incarnation)
