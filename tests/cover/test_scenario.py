"""A scenario file is checked completely before it runs: one clear line for every mistake, and never a traceback."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_stage import PROTOCOL

from kvpoll.sim.run import Run
from kvpoll.sim.scenario import (
    Expectation,
    Scenario,
    Timing,
    chosen_profile,
    find,
    load_scenario,
    names_available,
    parse_scenario,
)
from kvpoll.sim.workload import Arrival
from kvpoll.spec.invariants import INVARIANTS
from kvpoll.spec.source import BadInput, Source
from kvpoll.statemachine.mapping import Sizes

TEXT = """\
title = "everything that a scenario can say"
story = "It was a dark night."
upstream = "sgl-project/sglang#1"
race = "sglang#1"

[topology]
page_tokens = 512
load_balance = "total_requests"
mla = false

[topology.prefill]
count = 2
dp = 2
pp = 2
tp = 4
tokens_per_s = 60000

[topology.decode]
tp = 2
kv_pages = 512

[timing]
hostile_s = 20
probes = 2

[workload]
kind = "poisson"
rate_per_s = 4
input_tokens = 4000
output_tokens = 16

[[fault]]
kind = "message_delay"
target = "P0/dp1"
at_s = 1.5
for_s = 2
delay_s = 0.5

[[fault]]
kind = "pp_abort"
target = "P1"
stage = 1
share = 0.5
trigger = { event = "Answered", node = "D0*", status = 200 }

[[fault]]
kind = "partition"
target = "P0"
peer = "D0"

[[fault]]
kind = "client_abort"
share = 0.5
after_s = 0.1

[[expect]]
profile = "reference"
marks = ["fault:message_delay"]

[[expect]]
profile = "sglang-0.5.23"
label = "sglang-0.5.23 (query)"
rules = { dp_lookup = "query", register_attempts = 3 }
shows = ["S3"]
follows = ["R1"]
causes = ["client_left"]
"""

REQUESTS = """\
kind = "requests"
requests = [
  { at_s = 0.5, input_tokens = 8000, output_tokens = 2 },
  { at_s = 0.1, input_tokens = 4000, output_tokens = 16 },
]
"""
POISSON = TEXT[TEXT.index('kind = "poisson"') : TEXT.index('[[fault]]\nkind = "message_delay"')]
BURSTS = """\
kind = "bursts"
rate_per_s = 0
burst_rate_per_s = 4
burst_s = 2
period_s = 5
input_tokens = 4000
output_tokens = 16
"""


def parse(text: str) -> Scenario:
    return parse_scenario(Source("here.toml", text), PROTOCOL, "here")


def changed(old: str, new: str, behind: str = "") -> str:
    """The text with the first ``old`` behind some other text replaced."""
    start = TEXT.index(old, TEXT.index(behind))
    return TEXT[:start] + new + TEXT[start + len(old) :]


def refused(text: str) -> str:
    """The message with which a text is refused."""
    with pytest.raises(BadInput) as error:
        parse(text)
    return str(error.value)


# ----------------------------------------------------------------------------------------- what a file may say


def test_everything_that_a_file_says_is_in_the_scenario() -> None:
    read = parse(TEXT)
    assert (read.name, read.path, read.title) == ("here", "here.toml", "everything that a scenario can say")
    assert (read.story, read.upstream, read.race) == ("It was a dark night.", "sgl-project/sglang#1", "sglang#1")
    assert read.topology.prefill.sizes == Sizes(dp=2, pp=2, tp=4, cp=1)
    assert (read.topology.prefill.count, read.topology.prefill.tokens_per_s) == (2, 60000)
    assert (read.topology.decode.sizes.tp, read.topology.decode.kv_pages) == (2, 512)
    assert (read.topology.page_tokens, read.topology.follows_room, read.topology.mla) == (512, False, False)
    assert read.timing == Timing(hostile_s=20, probes=2)
    delay, abort, partition, client = read.faults
    assert (delay.id, delay.kind.name, delay.target, delay.at_s, delay.for_s) == (
        "message_delay-0", "message_delay", "P0/dp1", 1.5, 2,
    )  # fmt: skip
    assert (delay.parameters, delay.trigger) == ({"delay_s": 0.5}, None)
    assert abort.trigger == {"event": "Answered", "node": "D0*", "status": 200}
    assert abort.parameters == {"stage": 1, "share": 0.5, "after_s": 0.05}
    assert (partition.parameters, partition.at_s) == ({"peer": "D0"}, 0.0)
    assert partition.for_s > 1e8  # to the end of the hostile phase
    assert (client.target, client.parameters["side"]) == ("R", "client")
    assert read.expectations[1] == Expectation(
        "sglang-0.5.23", "sglang-0.5.23 (query)", {"dp_lookup": "query", "register_attempts": 3},
        ("S3",), ("S3", "R1"), (), ("client_left",),
    )  # fmt: skip
    assert len(read.digest) == 12 and read.digest != parse(TEXT + "\n").digest


def test_an_expectation_is_found_by_label_or_profile_and_makes_a_profile() -> None:
    read = parse(TEXT)
    (reference, query) = read.expectations
    assert read.expectation("reference") is reference
    assert read.expectation("sglang-0.5.23 (query)") is query
    assert read.expectation("sglang-0.5.23") is query
    assert read.expectation("before-sglang-24772") is None
    profile = chosen_profile(PROTOCOL, query)
    assert profile.name == "sglang-0.5.23+dp_lookup=query,register_attempts=3"
    assert chosen_profile(PROTOCOL, reference) is PROTOCOL.profile("reference")


def test_defaults_are_one_prefill_and_one_decode_without_faults() -> None:
    read = parse('title = "small"\n[workload]\nkind = "synthetic"\n')
    assert read.topology.prefill.sizes == read.topology.decode.sizes == Sizes()
    assert (read.timing, read.faults, read.expectations, read.story) == (Timing(), (), (), "")
    assert (read.upstream, read.race) == (None, None)


def arrivals(workload: str, until_s: float = 20.0) -> list[Arrival]:
    return parse(TEXT.replace(POISSON, workload)).workload(random.Random(1), until_s)


def test_listed_requests_come_in_order_of_time() -> None:
    assert arrivals(REQUESTS) == [Arrival(0.1, 4000, 16), Arrival(0.5, 8000, 2)]


def test_drawn_requests_end_with_the_hostile_phase_or_before() -> None:
    drawn = arrivals(POISSON)
    assert 50 < len(drawn) < 110
    assert {(arrival.input_tokens, arrival.output_tokens) for arrival in drawn} == {(4000, 16)}
    early = arrivals(POISSON.replace("rate_per_s = 4", "rate_per_s = 4\nuntil_s = 3"))
    assert early == [arrival for arrival in drawn if arrival.t < 3]
    busy = arrivals(BURSTS)
    assert busy and all(arrival.t % 5 >= 3 for arrival in busy)
    assert len(arrivals('kind = "synthetic"\n')) > 20


def test_a_recorded_trace_is_read(tmp_path: Path) -> None:
    line = {"timestamp": 1500, "input_length": 700, "output_length": 3, "hash_ids": [0, 1]}
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert arrivals(f'kind = "mooncake"\npath = "{path}"\n') == [Arrival(1.5, 700, 3)]


def test_scenarios_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert find("happy").name == "happy.toml"
    assert find("some/where.toml") == Path("some/where.toml")
    assert {"happy", "main", "sglang-24772"} <= set(names_available())
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    assert load_scenario(path, PROTOCOL).name == "mine"
    with pytest.raises(BadInput) as error:
        find("hapy")
    assert str(error.value) == "unknown scenario 'hapy' (did you mean 'happy'?)"
    with pytest.raises(BadInput) as error:
        load_scenario(tmp_path / "none.toml", PROTOCOL)
    assert str(error.value) == f"{tmp_path / 'none.toml'}: cannot be read: No such file or directory; check the path"


@pytest.mark.parametrize("name", names_available())
def test_every_scenario_that_comes_with_kvpoll_is_sound(name: str) -> None:
    read = load_scenario(find(name), PROTOCOL)
    assert read.title and read.story and read.expectations
    assert {invariant for said in read.expectations for invariant in said.violates} <= INVARIANTS.keys()
    assert len({said.label for said in read.expectations}) == len(read.expectations)
    fired = {f"fault:{fault.kind.name}" for fault in read.faults}
    for said in read.expectations:
        assert {mark for mark in said.marks if mark.startswith("fault:")} <= fired


# --------------------------------------------------------------------------------- one mistake, one line

# name, what stands there, what is written instead, behind which text, the message behind "here.toml:LINE: ";
# the line is that of what is written
ON_THE_LINE = [
    ("key", "story =", "stroy =", "", "unknown key 'stroy' (did you mean 'story'?)"),
    ("title", '"everything that a scenario can say"', "7", "", "title must be text in quotes, got 7"),
    ("story", '"It was a dark night."', "[1]", "", "story must be text in quotes, got [1]"),
    ("topology key", "page_tokens =", "page_token =", "", "unknown key 'page_token' (did you mean 'page_tokens'?)"),
    ("side", "[topology.decode]", "[topology.decoder]", "", "unknown key 'decoder' (did you mean 'decode'?)"),
    ("shape key", "tokens_per_s =", "token_per_s =", "", "unknown key 'token_per_s' (did you mean 'tokens_per_s'?)"),
    ("balance", '"total_requests"', '"total_request"', "",
     "unknown load_balance 'total_request' (did you mean 'total_requests'?)"),
    ("balance type", '"total_requests"', "3", "", "load_balance must be a str, got 3"),
    ("flag", "mla = false", 'mla = "no"', "", "mla must be a bool, got 'no'"),
    ("number", "page_tokens = 512", 'page_tokens = "512"', "", "page_tokens must be a number, got '512'"),
    ("whole number", "page_tokens = 512", "page_tokens = 51.2", "", "page_tokens must be a whole number, got 51.2"),
    ("truth is no number", "page_tokens = 512", "page_tokens = true", "", "page_tokens must be a number, got True"),
    ("size type", "tp = 4", 'tp = "4"', "", "tp must be a number, got '4'"),
    ("negative size", "tp = 4", "tp = -4", "", "tp must not be negative, got -4"),
    ("no rank", "tp = 4", "tp = 0", "", "this cluster cannot exist: prefill tp is 0"),
    ("no engine", "count = 2", "count = 0", "", "this cluster cannot exist: prefill count is 0"),
    ("no pages", "kv_pages = 512", "kv_pages = 0", "", "this cluster cannot exist: decode kv_pages is 0"),
    ("no speed", "tokens_per_s = 60000", "tokens_per_s = 0", "",
     "this cluster cannot exist: prefill tokens_per_s is 0"),
    ("no page size", "page_tokens = 512", "page_tokens = 0", "", "this cluster cannot exist: page_tokens is 0"),
    ("no link", "page_tokens = 512", "link_bytes_per_s = 0", "", "this cluster cannot exist: link_bytes_per_s is 0"),
    ("too many ranks", "tp = 4", "tp = 4096", "", "prefill tp is 4096; at most 1024 are simulated"),
    ("too many pages", "kv_pages = 512", "kv_pages = 10000001", "",
     "decode kv_pages is 10000001; at most 10000000 are simulated"),
    ("timing key", "hostile_s =", "hostil_s =", "", "unknown key 'hostil_s' (did you mean 'hostile_s'?)"),
    ("negative time", "hostile_s = 20", "hostile_s = -1", "", "hostile_s must not be negative, got -1"),
    ("no number", "hostile_s = 20", "hostile_s = nan", "", "hostile_s must be a finite number, got nan"),
    ("no end", "hostile_s = 20", "hostile_s = inf", "", "hostile_s must be a finite number, got inf"),
    ("half a probe", "probes = 2", "probes = 2.5", "", "probes must be a whole number, got 2.5"),
    ("workload", '"poisson"', '"poison"', "", "unknown workload 'poison' (did you mean 'poisson'?)"),
    ("workload type", '"poisson"', "[1]", "",
     "unknown workload [1] (valid: bursts, mooncake, poisson, requests, synthetic)"),
    ("workload key", "rate_per_s =", "rates_per_s =", "", "unknown key 'rates_per_s' (did you mean 'rate_per_s'?)"),
    ("rate", "rate_per_s = 4", "rate_per_s = -4", "", "rate_per_s must not be negative, got -4"),
    ("no rate", "rate_per_s = 4", "rate_per_s = 0", "", "rate_per_s must be above 0"),
    ("tokens type", "input_tokens = 4000", 'input_tokens = "long"', "", "input_tokens must be a number, got 'long'"),
    ("half a token", "input_tokens = 4000", "input_tokens = 0.5", "", "input_tokens must be a whole number, got 0.5"),
    ("no tokens", "output_tokens = 16", "output_tokens = 0", "", "output_tokens must be above 0"),
    ("fault", '"message_delay"', '"message_dealy"', "",
     "unknown fault 'message_dealy' (did you mean 'message_delay'?)"),
    ("fault type", '"message_delay"', "5", "", "kind must be text in quotes, got 5"),
    ("target", '"P0/dp1"', '"P0/dp2"', "", "no node 'P0/dp2' in this cluster (did you mean 'P0/dp1'?)"),
    ("target type", '"P0/dp1"', "0", "", "target must be text in quotes, got 0"),
    ("fault time", "at_s = 1.5", "at_s = -1.5", "", "at_s must not be negative, got -1.5"),
    ("fault time type", "at_s = 1.5", 'at_s = "1.5"', "", "at_s must be a number, got '1.5'"),
    ("fault never", "for_s = 2", "for_s = nan", "", "for_s must be a finite number, got nan"),
    ("parameter", "delay_s = 0.5", "delay = 0.5", "",  "unknown parameter 'delay' (did you mean 'delay_s'?)"),
    ("negative parameter", "delay_s = 0.5", "delay_s = -0.5", "", "delay_s must not be negative, got -0.5"),
    ("parameter type", "delay_s = 0.5", 'delay_s = "x"', "", "delay_s must be a number, got 'x'"),
    ("share", "share = 0.5", "share = 1.5", '"pp_abort"', "share must be between 0 and 1, got 1.5"),
    ("stage", "stage = 1", "stage = 2", "", "stage must be below 2, prefill's stages, got 2"),
    ("half a stage", "stage = 1", "stage = 0.5", "", "stage must be a whole number, got 0.5"),
    ("peer", 'peer = "D0"', 'peer = "D1"', "", "no node 'D1' in this cluster (did you mean 'P1'?)"),
    ("event", '"Answered"', '"Answred"', "", "unknown trace event 'Answred' (did you mean 'Answered'?)"),
    ("event type", '"Answered"', "2", "", "unknown trace event 2 (valid: Addressed, Admitted, Answered, "
     "CollectiveEntered, Committed, Computed, Decided, Delivered, FaultBegan, FaultEnded, Fenced, Healed, ...)"),
    ("event field", "status = 200", "state = 200", "", "unknown field 'state' (did you mean 'status'?)"),
    ("trigger type", 'trigger = { event = "Answered", node = "D0*", status = 200 }', 'trigger = "Answered"', "",
     "trigger must be a table, got 'Answered'"),
    ("profile", '"reference"', '"refrence"', "", "unknown profile 'refrence' (did you mean 'reference'?)"),
    ("profile type", '"reference"', "1", "", "profile must be text in quotes, got 1"),
    ("expectation key", "marks =", "mark =", "", "unknown key 'mark' (did you mean 'marks'?)"),
    ("marks type", '["fault:message_delay"]', '"fault:message_delay"', "",
     "marks must be a list of texts, got 'fault:message_delay'"),
    ("rule", "dp_lookup =", "dp_look_up =", "", "unknown rule 'dp_look_up' (did you mean 'dp_lookup'?)"),
    ("rule value", '"query"', '"quest"', "", "rule 'dp_lookup' has no value 'quest' (did you mean 'query'?)"),
    ("rule number", "register_attempts = 3", "register_attempts = -3", "",
     "rule 'register_attempts' is a number of attempts and not negative, got -3"),
    ("rule infinity", "register_attempts = 3", "register_attempts = inf", "",
     "rule 'register_attempts' is a number of attempts and not negative, got inf"),
    ("invariant", '["S3"]', '["S13"]', "", "unknown invariant 'S13' (did you mean 'S3'?)"),
    ("invariant that follows", '["R1"]', '["r1"]', "", "unknown invariant 'r1' (did you mean 'R1'?)"),
    ("shows type", '["S3"]', "[3]", "", "shows must be a list of texts, got [3]"),
]  # fmt: skip


@pytest.mark.parametrize("name, old, new, behind, message", ON_THE_LINE, ids=[case[0] for case in ON_THE_LINE])
def test_a_mistake_is_named_where_it_stands(name: str, old: str, new: str, behind: str, message: str) -> None:
    line = TEXT[: TEXT.index(old, TEXT.index(behind))].count("\n") + 1
    said = refused(changed(old, new, behind))
    assert said == f"here.toml:{line}: {message}"
    assert "\n" not in said


def whole(text: str, wanted: str) -> int:
    """Line of the first line that reads so."""
    return text.split("\n").index(wanted) + 1


def test_what_is_missing_is_named_where_it_should_stand() -> None:
    assert refused("") == "here.toml:1: a scenario needs `title`"
    assert refused('title = "x"') == "here.toml:1: a scenario needs `workload`"
    text = changed("delay_s = 0.5\n", "")
    line = whole(text, "[[fault]]")
    assert refused(text) == f"here.toml:{line}: fault 'message_delay' needs the parameter 'delay_s'"
    text = changed("rate_per_s = 4\n", "")
    assert refused(text) == f"here.toml:{whole(text, '[workload]')}: workload 'poisson' needs `rate_per_s`"
    text = changed('kind = "poisson"\n', "")
    assert refused(text) == f"here.toml:{whole(text, '[workload]')}: a workload needs `kind`"
    text = changed('profile = "reference"\n', "")
    assert refused(text) == f"here.toml:{whole(text, '[[expect]]')}: an expectation needs `profile`"
    text = changed('kind = "message_delay"\n', "")
    assert refused(text) == f"here.toml:{whole(text, '[[fault]]')}: a fault needs `kind`"
    text = changed('event = "Answered", ', "")
    line = whole(text, 'trigger = { node = "D0*", status = 200 }')
    assert refused(text) == f"here.toml:{line}: a trigger needs `event`"
    text = TEXT.replace(POISSON, REQUESTS.replace(", output_tokens = 2 }", " }"))
    line = whole(text, "  { at_s = 0.5, input_tokens = 8000 },")
    assert refused(text) == f"here.toml:{line}: a request needs `output_tokens`"


def test_requests_are_checked_one_by_one() -> None:
    def told(old: str, new: str) -> str:
        text = TEXT.replace(POISSON, REQUESTS.replace(old, new))
        said = refused(text)
        line = whole(text, next(each for each in text.split("\n") if new in each))
        assert said.startswith(f"here.toml:{line}: ")
        return said.partition(": ")[2]

    assert told("at_s = 0.5", "at_s = -0.5") == "at_s must not be negative, got -0.5"
    assert told("at_s = 0.5", 'at_s = "x"') == "at_s must be a number, got 'x'"
    assert told("input_tokens = 8000", "input_tokens = 8.5") == "input_tokens must be a whole number, got 8.5"
    assert told("output_tokens = 2 ", "output_tokens = 0 ") == "output_tokens must be above 0"
    assert told("at_s = 0.1", "at = 0.1") == "unknown key 'at' (did you mean 'at_s'?)"
    requests = REQUESTS[REQUESTS.index("requests = [") :]
    text = TEXT.replace(POISSON, REQUESTS.replace(requests, "requests = 3\n"))
    assert refused(text) == (
        f"here.toml:{whole(text, 'requests = 3')}: requests must be a list of tables ([[...]]), got 3"
    )


def test_a_workload_that_cannot_be_drawn_is_refused_before_it_runs() -> None:
    text = TEXT.replace(POISSON, BURSTS.replace("period_s = 5", "period_s = 2"))
    assert refused(text) == f"here.toml:{whole(text, 'period_s = 2')}: period_s must be above burst_s (2)"
    text = TEXT.replace(POISSON, 'kind = "mooncake"\npath = "no/such/trace"\n')
    line = whole(text, 'path = "no/such/trace"')
    assert refused(text) == f"here.toml:{line}: path 'no/such/trace' is no file; give a Mooncake-format trace"
    text = TEXT.replace(POISSON, 'kind = "mooncake"\npath = 3\n')
    assert refused(text) == f"here.toml:{whole(text, 'path = 3')}: path must be text in quotes, got 3"


TOPOLOGIES = [
    ("tp = 4", "tp = 3", "prefill TP 3 and decode TP 2: one must divide the other"),
    ("[topology.decode]\n", "[topology.decode]\ncp = 2\n", "decode CP must be 1"),
    ("[topology.decode]\n", "[topology.decode]\npp = 3\n", "decode PP 3 must be 1 or equal to prefill's PP 2"),
    ("[topology.decode]\n", "[topology.decode]\npp = 2\n", "decode PP above 1 is not simulated; use pp = 1"),
    ("page_tokens = 512\n", "chunk_tokens = 1000\n", "chunk_tokens 1000 is not a multiple of page_tokens 512"),
]


@pytest.mark.parametrize("old, new, problem", TOPOLOGIES)
def test_a_cluster_that_cannot_exist_is_refused(old: str, new: str, problem: str) -> None:
    text = changed(old, new)
    assert refused(text) == f"here.toml:{whole(text, '[topology]')}: this cluster cannot exist: {problem}"


def test_without_a_topology_table_the_first_table_below_it_is_named() -> None:
    text = 'title = "x"\n[topology.prefill]\ntp = 3\n[topology.decode]\ntp = 2\n[workload]\nkind = "synthetic"\n'
    problem = "prefill TP 3 and decode TP 2: one must divide the other"
    assert refused(text) == f"here.toml:2: this cluster cannot exist: {problem}"


def test_a_cluster_of_too_many_ranks_is_refused() -> None:
    text = changed("dp = 2", "dp = 1000")
    line = whole(text, "[topology.prefill]")
    assert refused(text) == f"here.toml:{line}: prefill has 16000 ranks; at most 1024 are simulated"


TARGETS = [
    ("bootstrap_slow", "slow_s = 1", "a bootstrap server (B0)", ("R", "*", "P0", "D0"), ("B0", "B1")),
    ("bootstrap_error", "share = 1", "a bootstrap server (B0)", ("R",), ("B0",)),
    ("bootstrap_late", "", "a bootstrap server (B0)", ("P0",), ("B1",)),
    ("rank_crash", "", "an engine or rank (P0, D0)", ("R", "*", "B0"), ("P0", "P0/dp1/pp0/tp3", "D0")),
    ("quick_restart", "", "an engine or rank (P0, D0)", ("R",), ("D0/tp1",)),
    ("write_fail", "share = 1", "a prefill node (P0)", ("D0", "R"), ("P1/dp0", "*")),
]


@pytest.mark.parametrize("kind, parameters, needs, wrong, right", TARGETS, ids=[case[0] for case in TARGETS])
def test_a_fault_needs_a_target_that_it_can_act_on(
    kind: str, parameters: str, needs: str, wrong: tuple[str, ...], right: tuple[str, ...]
) -> None:
    for target in wrong:
        text = TEXT + f'[[fault]]\nkind = "{kind}"\ntarget = "{target}"\n{parameters}\n'
        line = whole(text, f'kind = "{kind}"') + 1
        assert refused(text) == f"here.toml:{line}: fault {kind!r} needs {needs} as its target, got {target!r}"
    for target in right:
        text = TEXT + f'[[fault]]\nkind = "{kind}"\ntarget = "{target}"\n{parameters}\n'
        assert parse(text).faults[-1].target == target


def test_an_unknown_side_is_answered_with_the_nearest() -> None:
    text = TEXT.replace("after_s = 0.1\n", 'after_s = 0.1\nside = "decoder"\n')
    assert (
        refused(text)
        == f"here.toml:{whole(text, 'after_s = 0.1') + 1}: unknown side 'decoder' (did you mean 'decode'?)"
    )


def test_what_is_not_toml_is_said_to_be_so() -> None:
    assert refused("title = \n").startswith("here.toml:1: not valid TOML: ")
    assert refused(TEXT.replace("[timing]", "[timing")).startswith(
        f"here.toml:{whole(TEXT, '[timing]')}: not valid TOML: "
    )
    assert refused("x = " + "[" * 5000 + "]" * 5000) == "here.toml:1: nested too deeply to be read"


# ---------------------------------------------------------------- whatever is written, one line or a scenario

ODD_VALUES: list[Any] = [
    0, -1, 1, 2.5, 10**30, math.inf, -math.inf, math.nan, "", "reference", "P0", "*", "é\n", True, False,
    [], [1], ["S3"], [[]], {}, {"kind": "poisson"}, {"event": "Stepped"}, [{}], [{"kind": 3}],
]  # fmt: skip
ODD_KEYS = ["kind", "tp", "zz", "profile", "rules", "trigger", "requests", "at_s", "prefill", "é x", "path"]


def toml(value: Any) -> str:
    """A value as inline TOML, for whatever ``tomllib`` can give back."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def written(data: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in data.items())


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in a nest of tables and lists."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


BASES = [
    Source("base.toml", text).data for text in (TEXT, TEXT.replace(POISSON, REQUESTS), TEXT.replace(POISSON, BURSTS))
]


@st.composite
def edited(draw: st.DrawFn) -> dict[str, Any]:
    """A sound scenario with up to four things replaced, removed, renamed or added."""
    data: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 4))):
        container, key = draw(st.sampled_from(list(places(data)) or [(data, "title")]))
        edit = draw(st.sampled_from(["replace", "remove", "rename", "add"]))
        if edit == "replace":
            container[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        elif edit == "remove":
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(draw(st.sampled_from(ODD_VALUES))))
        else:
            value = container.pop(key) if edit == "rename" else draw(st.sampled_from(ODD_VALUES))
            container[draw(st.sampled_from(ODD_KEYS))] = copy.deepcopy(value)
        if not data:
            break
    return data


def judge(text: str) -> None:
    """A scenario comes of it, or one line."""
    try:
        read = parse(text)
    except BadInput as error:
        assert "\n" not in str(error)
        assert str(error).startswith("here.toml:")
    else:
        assert read.title == Source("here.toml", text).data["title"]
        assert all(arrival.t >= 0 for arrival in read.workload(random.Random(0), 1.0))


@settings(max_examples=500)
@given(edited())
def test_no_edit_of_a_scenario_ends_in_a_traceback(data: dict[str, Any]) -> None:
    judge(written(data))


@given(st.lists(st.integers(0, TEXT.count("\n")), min_size=1, max_size=8))
def test_no_loss_of_lines_ends_in_a_traceback(lost: list[int]) -> None:
    judge("\n".join(line for number, line in enumerate(TEXT.split("\n")) if number not in lost))


@given(st.integers(0, len(TEXT)))
def test_no_file_that_was_cut_off_ends_in_a_traceback(length: int) -> None:
    judge(TEXT[:length])


def test_the_scenario_of_this_page_runs() -> None:
    """Otherwise everything above could be about a file that is sound and useless."""
    outcome = Run(PROTOCOL, parse(TEXT), PROTOCOL.profile("reference"))()
    assert outcome.unfired == []
    assert outcome.requests > 50
    assert outcome.violations == {}
