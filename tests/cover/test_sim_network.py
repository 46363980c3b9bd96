"""Channels keep order, nothing orders two channels, and what a severed channel carried is lost and noticed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from sim_stage import A, Stage

from kvpoll.sim.topology import Topology
from kvpoll.sim.world import covers, engine_of
from kvpoll.spec.trace import Delivered, Lost, Sent


class Mail:
    """Sends numbered messages and notes which of them arrived, and when."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.arrived: list[tuple[str, str, int]] = []
        for engine in ("P0", "P1", "D0"):
            stage.world.alive[engine] = True
            stage.world.epochs[engine] = 0

    def send(self, node: str, to: str, number: int) -> None:
        self.stage.world.network.send(node, to, f"Letter {number}", A, self._arrive, node, to, number)

    def _arrive(self, node: str, to: str, number: int) -> None:
        self.arrived.append((node, to, number))

    def numbers(self, node: str, to: str) -> list[int]:
        return [number for left, right, number in self.arrived if (left, right) == (node, to)]


@pytest.fixture
def stage() -> Stage:
    return Stage(Topology(latency_s=0.01))


@pytest.fixture
def mail(stage: Stage) -> Mail:
    return Mail(stage)


def test_a_channel_keeps_its_order_whatever_the_latencies(stage: Stage, mail: Mail) -> None:
    """TCP: a later message may be faster, and still waits for the earlier one."""
    stage.world.network.delays.append(("*", 0.5, True))
    chance = random.Random(1)
    for number in range(300):
        stage.world.after(chance.random(), mail.send, "D0", "P0", number)
        stage.world.after(chance.random(), mail.send, "D0", "P1", number)
    stage.until(5)
    sent = {to: [int(event.message.split()[1]) for event in stage.of(Sent, to=to)] for to in ("P0", "P1")}
    assert mail.numbers("D0", "P0") == sent["P0"] != sorted(sent["P0"])
    assert mail.numbers("D0", "P1") == sent["P1"]


def test_nothing_orders_two_channels(stage: Stage, mail: Mail) -> None:
    stage.world.network.delays.append(("*", 0.5, True))
    for number in range(100):
        mail.send("D0", f"P{number % 2}", number)
    stage.until(5)
    assert [number for _, _, number in mail.arrived] != list(range(100))
    assert sorted(number for _, _, number in mail.arrived) == list(range(100))


def test_latency_is_one_to_two_times_nominal_and_a_delay_is_added(stage: Stage) -> None:
    network = stage.world.network
    plain = [network.latency_s("P0") for _ in range(200)]
    assert 0.01 <= min(plain) < 0.011 < 0.019 < max(plain) <= 0.02
    network.delays.append(("P0", 1.0, False))
    assert 1.01 <= network.latency_s("P0/tp1") <= 1.02
    assert network.latency_s("P01") <= 0.02


def test_every_message_has_one_fate(stage: Stage, mail: Mail) -> None:
    mail.send("P0", "D0", 1)
    stage.world.network.severed.append(("P0", "D0"))
    mail.send("P1", "D0", 2)
    stage.until(1)
    (first, second) = stage.of(Sent)
    (lost,) = stage.of(Lost)
    (delivered,) = stage.of(Delivered)
    assert (lost.serial, lost.node, lost.sender, lost.message) == (first.serial, "D0", "P0", "Letter 1")
    assert (delivered.serial, delivered.node, delivered.sender) == (second.serial, "D0", "P1")
    assert first.serial != second.serial


def test_a_severed_channel_loses_what_is_on_the_way_and_both_ends_learn_when_it_is_back(
    stage: Stage, mail: Mail
) -> None:
    network, told = stage.world.network, []
    network.on_restored = lambda left, right: told.append((left, right))
    mail.send("P0/tp0", "D0", 0)  # on the way when the link breaks
    stage.until(0.001)
    network.severed.append(("P0", "D0"))
    mail.send("P0/tp0", "D0", 1)
    mail.send("D0", "P0/tp1", 2)
    mail.send("P1", "D0", 3)  # not concerned
    stage.until(0.5)
    assert told == []
    network.restore("P0", "D0")
    assert told == [("D0", "P0/tp0"), ("D0", "P0/tp1")]
    mail.send("P0/tp0", "D0", 4)
    stage.until(1)
    assert mail.arrived == [("P1", "D0", 3), ("P0/tp0", "D0", 4)]
    assert stage.world.marks["message_lost"] == 3


def test_a_link_that_lost_nothing_has_nothing_to_tell(stage: Stage, mail: Mail) -> None:
    network, told = stage.world.network, []
    network.on_restored = lambda left, right: told.append((left, right))
    network.severed.append(("P0", "D0"))
    stage.until(0.5)
    network.restore("P0", "D0")
    assert told == []


def test_a_link_is_back_when_the_last_partition_of_it_ends(stage: Stage, mail: Mail) -> None:
    network, told = stage.world.network, []
    network.on_restored = lambda left, right: told.append((left, right))
    network.severed += [("P0", "D0"), ("D0", "*")]
    mail.send("P0", "D0", 1)
    stage.until(0.5)
    network.restore("P0", "D0")
    assert told == []
    assert network.is_severed("P0", "D0")
    network.restore("D0", "*")
    assert told == [("D0", "P0")]


def test_links_inside_an_engine_are_reliable(stage: Stage, mail: Mail) -> None:
    """A broken link between two ranks of one engine is a crash of the engine, not a lost message."""
    network = stage.world.network
    network.severed += [("*", "*"), ("P0/tp0", "*")]
    network.duplicating.append(("*", 1.0))
    mail.send("P0/tp0", "P0/tp1", 1)
    mail.send("P0/tp0", "D0", 2)
    stage.until(1)
    assert mail.arrived == [("P0/tp0", "P0/tp1", 1)]
    assert not network.is_severed("P0/tp0", "P0/tp1")


def test_a_duplicating_channel_delivers_twice_and_in_order(stage: Stage, mail: Mail) -> None:
    stage.world.network.duplicating.append(("D0", 1.0))
    for number in range(3):
        mail.send("D0", "P0", number)
        mail.send("P0", "D0", number)
    stage.until(1)
    assert mail.numbers("D0", "P0") == [0, 0, 1, 1, 2, 2]
    assert mail.numbers("P0", "D0") == [0, 1, 2]
    assert len({event.serial for event in stage.of(Delivered, node="P0")}) == 3


@pytest.mark.parametrize("fate", ["died", "died and came back"])
def test_mail_for_a_process_that_is_gone_is_lost(stage: Stage, mail: Mail, fate: str) -> None:
    """The connection died with it; its successor has another one."""
    mail.send("P0", "D0", 1)
    if fate == "died":
        stage.world.alive["D0"] = False
    else:
        stage.world.epochs["D0"] = 1
    mail.send("P0", "P1", 2)
    stage.until(1)
    assert mail.arrived == [("P0", "P1", 2)]
    assert [event.message for event in stage.of(Lost)] == ["Letter 1"]


@pytest.mark.parametrize(
    "prefix, node, answer",
    [
        ("*", "P0/tp0", True),
        ("P0", "P0", True),
        ("P0", "P0/dp1/tp0", True),
        ("P0/dp1", "P0/dp1/tp0", True),
        ("P0/dp1", "P0/dp10", False),
        ("P1", "P10", False),
        ("P0/tp0", "P0", False),
    ],
)
def test_a_target_covers_its_node_and_what_is_below_it(prefix: str, node: str, answer: bool) -> None:
    assert covers(prefix, node) is answer


def test_an_engine_is_the_first_part_of_a_name() -> None:
    assert [engine_of(node) for node in ("P0", "D1/dp0/tp3", "R")] == ["P0", "D1", "R"]


def chances(stage: Stage, purpose: str) -> list[float]:
    chance = stage.world.chance(purpose)
    return [chance.random() for _ in range(3)]


def test_chance_is_named_and_seeded() -> None:
    """A generator for every purpose: more draws of one thing must not move another."""
    one, same, other = Stage(seed=1), Stage(seed=1), Stage(seed=2)
    one.world.chance("rooms").random()
    assert chances(one, "rooms") == chances(same, "rooms") != chances(other, "rooms")
    assert chances(one, "rooms") != chances(one, "latency")


def test_events_at_one_time_keep_the_order_in_which_they_were_made() -> None:
    stage, seen = Stage(), list[int]()
    for number in range(20):
        stage.world.after(1.0, seen.append, number)
    stage.until(2)
    assert seen == list(range(20))


def test_a_mark_is_counted_each_time(stage: Stage) -> None:
    marks: Any = stage.world.marks
    stage.world.mark("P0", "seen")
    stage.world.mark("P0", "seen")
    assert marks == {"seen": 2}


# ----------------------------------------------------------------------------------- the router's connections


def test_what_router_and_engines_could_not_tell_each_other_is_told_when_the_link_is_back(
    stage: Stage, mail: Mail
) -> None:
    """A cancel that was lost for good left a decode rank waiting for a request that had long been answered."""
    network = stage.world.network
    network.severed.append(("P0", "*"))
    mail.send("R", "P0/tp0", 1)
    mail.send("P0/tp0", "R", 2)
    mail.send("P0/tp0", "D0", 3)  # ranks resend by themselves, when they are told that the link is back
    stage.until(1)
    assert mail.arrived == []
    network.restore("P0", "*")
    stage.until(2)
    assert sorted(mail.arrived) == [("P0/tp0", "R", 2), ("R", "P0/tp0", 1)]
    assert len(stage.of(Lost)) == 3
    stage.until(3)
    assert len(mail.arrived) == 2


def test_a_link_that_is_still_severed_keeps_them(stage: Stage, mail: Mail) -> None:
    network = stage.world.network
    network.severed += [("P0", "*"), ("P0", "R")]
    mail.send("R", "P0", 1)
    stage.until(1)
    network.restore("P0", "*")
    stage.until(2)
    assert mail.arrived == []
    network.restore("P0", "R")
    stage.until(3)
    assert mail.arrived == [("R", "P0", 1)]


def test_a_new_process_is_not_told_what_its_predecessor_missed(stage: Stage, mail: Mail) -> None:
    stage.world.network.severed.append(("P0", "R"))
    mail.send("R", "P0", 1)
    stage.until(1)
    stage.world.epochs["P0"] = 1
    stage.world.network.restore("P0", "R")
    stage.until(2)
    assert mail.arrived == []


def test_where_lost_is_lost_nothing_is_sent_again() -> None:
    stage = Stage(Topology(latency_s=0.01), resend_on_reconnect="no")
    mail = Mail(stage)
    stage.world.network.severed.append(("P0", "R"))
    mail.send("R", "P0", 1)
    stage.until(1)
    stage.world.network.restore("P0", "R")
    stage.until(2)
    assert mail.arrived == []
