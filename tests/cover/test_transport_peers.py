"""The lives of a node: one is present, a newer one retires it, and an older one is over as it comes."""

from __future__ import annotations

from kvpoll.runtime.transports.peers import Peers


def test_one_life_of_a_node_is_present_and_the_others_are_told_why_they_are_over() -> None:
    peers: Peers[str] = Peers()
    assert peers.find(b"first", "decode0", 1) is None
    assert peers.enter(b"first", "decode0", 1, "first") is None
    assert peers.enter(b"other", "decode1", 7, "other") is None, "another node has lives of its own"
    assert peers.find(b"first", "decode0", 1) == "first"
    assert peers.find(b"first", "decode0", 2) is None, "the same bytes for another life are read again"
    assert peers.enter(b"second", "decode0", 2, "second") == ("first", "decode0 epoch 1 is over: epoch 2 has come")
    assert peers.enter(b"first", "decode0", 1, "again") == ("again", "decode0 epoch 1 is over: epoch 2 has come")
    assert sorted(peers) == ["other", "second"]


def test_a_life_that_is_described_anew_replaces_its_former_description() -> None:
    peers: Peers[str] = Peers()
    peers.enter(b"first", "decode0", 1, "first")
    over = peers.enter(b"moved", "decode0", 1, "moved")
    assert over is not None and over[0] == "first"
    assert peers.find(b"moved", "decode0", 1) == "moved" and peers.find(b"first", "decode0", 1) is None
