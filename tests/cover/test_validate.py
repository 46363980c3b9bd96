"""`kvpoll validate` on our own traces: what a profile explains, what it does not, and what is no trace at all."""

from __future__ import annotations

import gzip
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from validate_traces import happy, written

from kvpoll import trace_lines, validation
from kvpoll.commands import validate
from kvpoll.commands.options import Parser
from kvpoll.commands.screen import Screen
from kvpoll.sim.run import Run
from kvpoll.sim.scenario import chosen_profile, find, load_scenario
from kvpoll.spec.protocol import load
from kvpoll.spec.source import BadInput
from kvpoll.statemachine.judge.rows import BITS_MAX
from kvpoll.validation import Asked, Trial, Verdict

PROTOCOL = load()


def recording(scenario: str, label: str) -> list[dict[str, Any]]:
    """The trace of a run of seed 0: its header and its events, as objects."""
    loaded = load_scenario(find(scenario), PROTOCOL)
    said = next(said for said in loaded.expectations if said.label == label)
    file = io.StringIO()
    Run(PROTOCOL, loaded, chosen_profile(PROTOCOL, said), 0, trace=file)()
    return [json.loads(line) for line in file.getvalue().splitlines()]


REFERENCE = recording("happy", "reference")
DEFECTIVE = recording("sglang-24772", "before-sglang-24772")

Objects = list[dict[str, Any]]


def copied(objects: Objects) -> Objects:
    copy: Objects = json.loads(json.dumps(objects))
    return copy


def verdict(objects: Objects, **asked: Any) -> Verdict:
    lines = iter([json.dumps(each).encode() + b"\n" for each in objects])
    return Trial(PROTOCOL, Asked(**asked), lines, "trace")()


def line_of(objects: Objects, **fields: Any) -> int:
    """Line of the first event with these fields; as an index, it is one less."""
    return next(
        number
        for number, each in enumerate(objects, start=1)
        if all(each.get(name) == value for name, value in fields.items())
    )


# -- what is explained, and what is not


def test_a_trace_is_explained_by_the_profile_in_its_header() -> None:
    judged = verdict(REFERENCE)
    assert judged.holds and judged.profile == "reference" and judged.lines == len(REFERENCE)
    assert judged.steps == sum(each.get("event") == "Stepped" for each in REFERENCE)


def test_an_older_defect_is_named_by_rule_event_and_invariant() -> None:
    """sglang#24772: a receiver whose set-up had failed was set to WaitingForInput all the same."""
    assert verdict(DEFECTIVE, only=()).holds
    judged = verdict(DEFECTIVE, profile="reference")
    changes, departure = next(
        (changes, each) for changes, each in judged.departures.items() if changes[0].rule == "setup_failure"
    )
    found = departure.first
    assert [tuple(change) for change in changes] == [("setup_failure", "final", "overwritten")]
    assert found.line == line_of(DEFECTIVE, fact="SetupFinished", poll_before="Failed")
    assert found.before == "Failed/Unreserved (route_refused)" and found.invariants == ("S3",)
    assert found.allowed[0] == "SetupFinished: ignored in Failed/Unreserved (route_refused)"
    assert [told.text.split(":")[0] for told in found.context] == [
        "D0 RequestOpened",
        "D0 RouteUnavailable 'route_refused'",
    ]
    loop = next(each.first for changes, each in judged.departures.items() if changes[0].rule == "illegal_fact")
    assert loop.line == line_of(DEFECTIVE, event="LoopStopped") and loop.invariants == ("S10",)
    assert judged.first is not None and judged.first.line < found.line
    assert set(judged.broken) >= {"S3", "S10"}


Spoil = Callable[[Objects, int], object]


def spoil_field(name: str, value: Any) -> Spoil:
    return lambda objects, at: objects[at].__setitem__(name, value)


SPOILED: dict[str, tuple[dict[str, Any], Spoil, int]] = {
    "a step is missing": ({"fact": "RequestOpened", "role": "receiver"}, lambda objects, at: objects.pop(at), 1),
    "a step happens twice": ({"fact": "SetupFinished"}, lambda objects, at: objects.insert(at, objects[at]), 1),
    "another poll": ({"fact": "DestinationRegistered"}, spoil_field("poll_after", "Transferring"), 0),
    "another poll before": ({"fact": "DestinationRegistered"}, spoil_field("poll_before", "Success"), 0),
    "another lease": ({"fact": "PagesReserved"}, spoil_field("lease_after", "Exposed"), 0),
    "another action": ({"fact": "RequestOpened"}, spoil_field("actions", ["ReleasePages"]), 0),
    "no action": ({"fact": "StatusReceived"}, spoil_field("actions", []), 0),
    "a cause of nothing": ({"fact": "PagesReserved"}, spoil_field("cause", "bad luck"), 0),
    "another room's identity": ({"fact": "PagesReserved"}, spoil_field("incarnation", [1, 0, 0]), 0),
    "an unknown fact": ({"fact": "PagesReserved"}, spoil_field("fact", "PagesEaten"), 0),
    "a failure reported as success": ({"fact": "StatusReceived"}, spoil_field("detail", [0, "Failed"]), 0),
    "a detail of the wrong kind": ({"fact": "DestinationRegistered"}, spoil_field("detail", "all"), 0),
    "a detail below zero": ({"fact": "DestinationRegistered"}, spoil_field("detail", [-1, 1]), 0),
    "a detail that would fill memory": ({"fact": "DestinationRegistered"}, spoil_field("detail", [10**15, 1]), 0),
    "a mask that would fill memory": ({"fact": "RoutesResolved"}, spoil_field("detail", [1 << BITS_MAX, 1]), 0),
    "no detail": ({"fact": "StatusReceived"}, spoil_field("detail", None), 0),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_step_is_found(name: str) -> None:
    """``later``: a missing or doubled step shows at the next event of that room, at that line or after it."""
    where, spoil, later = SPOILED[name]
    objects = copied(REFERENCE)
    at = line_of(objects, event="Stepped", **where) - 1
    spoil(objects, at)
    first = verdict(objects).first
    assert first is not None and not first.changes, first
    assert first.line >= at + 1 and (later or first.line == at + 1), first


def test_a_departure_may_need_two_rules() -> None:
    """A prefill that fails under sglang keeps it from decode, and is forgotten when it is cleared."""
    judged = verdict(DEFECTIVE, profile="reference")
    cleared = {change.rule for changes in judged.departures for change in changes}
    assert {"clear_leaves", "prefill_failure_notice"} <= cleared
    assert () not in judged.departures


def test_a_fact_that_the_table_allows_was_not_refused() -> None:
    objects = copied(DEFECTIVE)
    at = line_of(objects, event="IllegalFactRaised") - 1
    objects[at] |= {"fact": "AbortRequested"}
    first = verdict(objects).first
    assert first is not None and first.line == at + 1
    assert first.why == "the profile does not forbid this fact in this state"
    objects[at] |= {"fact": "MetadataSent", "state": "Success"}
    first = verdict(objects).first
    assert first is not None and "the trace says that the room was Success" in first.why


def test_after_a_departure_the_judge_goes_on() -> None:
    """What no rule explains is believed, so one spoiled line is one departure."""
    objects = copied(REFERENCE)
    objects[line_of(objects, fact="WriteCompleted") - 1]["actions"] = ["AnswerClient"]
    judged = verdict(objects)
    assert judged.unexplained == 1 and judged.complete


# -- traces that do not hold everything


def is_news(each: dict[str, Any]) -> bool:
    """Would a monitored runtime write this down (`Rank._is_news`)? Arrivals and owners are kept by name."""
    if each.get("event") != "Stepped" or each["actions"]:
        return True
    kept = ("DestinationRegistered", "StatusReceived", "RequestOpened")
    moved = each["poll_before"] != each["poll_after"] or each["lease_before"] != each["lease_after"]
    return moved or each["fact"] in kept


@pytest.mark.parametrize("label", ["after-sglang-27028", "reference"])
def test_a_trace_of_news_is_explained(label: str) -> None:
    objects = recording("sglang-34572", label)
    news = [each for each in objects if is_news(each)]
    assert len(news) < len(objects)
    assert verdict(news, only=()).first is not None, "judged as a full trace, it has holes"
    assert verdict(news, only=(), news_only=True).first is None
    marked = [{**news[0], "steps": "news"}, *news[1:]]
    assert verdict(marked, only=()).notes == ["only news was recorded: what a room did not show was taken as it suits"]


def test_news_can_still_be_wrong() -> None:
    news = copied([each for each in REFERENCE if is_news(each)])
    at = line_of(news, fact="StatusReceived") - 1
    news[at]["poll_after"] = "Failed"
    first = verdict(news, news_only=True).first
    assert first is not None and first.line == at + 1


def test_a_trace_may_begin_under_way() -> None:
    begun = [REFERENCE[0], *REFERENCE[line_of(REFERENCE, fact="PagesReserved") - 1 :]]
    judged = verdict(begun, only=())
    assert judged.first is None and "were under way when the trace began" in judged.notes[0]
    started = [REFERENCE[0], *(each for each in REFERENCE if each.get("event") == "NodeStarted"), *begun[1:]]
    assert verdict(started, only=()).first is not None, "a node that starts in the trace has no older rooms"


def test_one_rank_alone_is_judged_by_what_it_decides() -> None:
    router = [REFERENCE[0], *(each for each in REFERENCE[1:] if each["node"] == "R")]
    assert "S9" in verdict(router).broken, "nobody in this trace commits what the router reports"
    judged = verdict(router, part=True)
    assert judged.holds and "some of the ranks only" in judged.notes[0]
    decode = [{**REFERENCE[0], "part": True}, *(each for each in REFERENCE[1:] if each["node"] == "D0")]
    assert verdict(decode).holds


def test_nodes_that_are_no_machines_are_left_to_the_invariants() -> None:
    objects = copied(REFERENCE)
    objects[line_of(objects, role="receiver") - 1]["actions"] = []
    assert verdict(objects).first is not None
    node = objects[line_of(objects, role="receiver") - 1]["node"]
    assert verdict([{**objects[0], "not_machines": [node]}, *objects[1:]]).first is None
    with pytest.raises(BadInput, match="'not_machines' is a list of node names"):
        verdict([{**objects[0], "not_machines": node}, *objects[1:]])


def test_a_room_that_ended_is_forgotten() -> None:
    lines = iter([json.dumps(each).encode() for each in REFERENCE])
    trial = Trial(PROTOCOL, Asked(), lines, "trace")
    trial()
    assert trial.judge.live_rooms() == 0


# -- what is no trace


def no_trace(text: bytes, **asked: Any) -> str:
    with pytest.raises(BadInput) as told:
        Trial(PROTOCOL, Asked(**asked), iter(text.splitlines(keepends=True)), "trace")()
    assert "\n" not in str(told.value)
    return str(told.value)


HEADER = json.dumps(REFERENCE[0]).encode() + b"\n"
STARTED = b'{"t":0,"event":"NodeStarted","node":"P0","epoch":0}\n'
STEPPED = json.dumps(REFERENCE[line_of(REFERENCE, event="Stepped") - 1]).encode() + b"\n"

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "trace:1: the trace is empty"),
    "blank": (b"\n \n", "trace:3: the trace is empty"),
    "no JSON": (b"hello\n", "trace:1: not a JSON object"),
    "a list": (b"[1]\n", "trace:1: not a JSON object"),
    "bytes": (b"\xff\xfe\n", "trace:1: not a JSON object"),
    "another object": (b'{"a": 1}\n', "trace:1: neither a kvpoll trace"),
    "cut off": (HEADER + STARTED + STEPPED[:60], "trace:3: not a JSON object"),
    "cut off to a value": (HEADER + b"1\n", "trace:2: not a JSON object"),
    "no text": (HEADER + STARTED + b"\xff\xfe\n", "trace:3:"),
    "unknown event": (HEADER + STARTED.replace(b"NodeStarted", b"NodeStartled"), "trace:2: 'NodeStartled'"),
    "missing field": (HEADER + STARTED.replace(b',"epoch":0', b""), "trace:2: NodeStarted lacks"),
    "unknown field": (HEADER + STARTED.replace(b"}", b',"age":1}'), "trace:2: NodeStarted lacks or does not have"),
    "a word for a number": (HEADER + STARTED.replace(b'"epoch":0', b'"epoch":"0"'), "trace:2:"),
    "a word for a time": (HEADER + STARTED.replace(b'"t":0', b'"t":"now"'), "trace:2:"),
    "no number": (HEADER + STARTED.replace(b'"t":0', b'"t":NaN'), "trace:2:"),
    "unknown role": (HEADER + STEPPED.replace(b'"role": "', b'"role": "X'), "trace:2:"),
    "a list in a detail": (HEADER + STEPPED.replace(b'"detail": ', b'"detail": [[1]], "detail2": '), "trace:2:"),
    "half an identity": (HEADER + STEPPED.replace(b', 0, 0], "fact"', b'], "fact"'), "trace:2:"),
    "time runs back": (HEADER + STARTED.replace(b'"t":0', b'"t":2') + STARTED, "trace:3: time 0.0 is before 2.0"),
    "unknown profile": (HEADER.replace(b'"reference"', b'"referense"'), "trace:1: unknown profile 'referense'"),
    "unknown rule": (HEADER.replace(b'"reference"', b'"reference+helth=no"'), "trace:1: unknown rule 'helth'"),
    "unknown value": (HEADER.replace(b'"reference"', b'"reference+health=no"'), "trace:1: rule 'health' has no value"),
    "no number of a rule": (HEADER.replace(b'"reference"', b'"reference+end=1"'), "trace:1: unknown rule 'end'"),
    "no profile": (b'{"kvpoll_trace": 1}\n', "trace:1: the header names no profile"),
    "another version": (b'{"kvpoll_trace": 2}\n', "trace:1: a kvpoll trace starts with"),
}


@pytest.mark.parametrize("decoding", ["msgspec", "json"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_by_line(name: str, decoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(decoding, monkeypatch)
    text, said = BAD[name]
    told = no_trace(text)
    assert told.startswith(said), told


def choose(decoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if decoding == "json":
        monkeypatch.setattr(trace_lines, "msgspec", None)
    elif trace_lines.msgspec is None:
        pytest.skip("msgspec is not installed")


@pytest.mark.parametrize("decoding", ["msgspec", "json"])
def test_both_ways_of_decoding_judge_alike(decoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(decoding, monkeypatch)
    assert verdict(REFERENCE).holds
    judged = verdict(DEFECTIVE, profile="reference")
    assert {name: broken.line for name, broken in judged.broken.items()}["S3"] == 29
    assert judged.first is not None and judged.first.event.startswith("D0 RequestOpened")


def test_a_line_without_end_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trace_lines, "LINE_MAX", 1000)
    place = tmp_path / "long.jsonl"
    place.write_bytes(HEADER + b'{"t":0,"event":"Marked","node":"R","mark":"' + b"x" * 5000 + b'"}\n')
    lines, _, _ = trace_lines.lines_of(str(place))
    with pytest.raises(BadInput, match=r"trace:2: a line of more than"):
        Trial(PROTOCOL, Asked(), lines, "trace")()


# -- the command


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and standard output of a command line."""
    top = Parser(prog="kvpoll")
    validate.add(top.add_subparsers())
    arguments = top.parse_args(shlex.split(line))
    status = int(arguments.act(arguments, Screen()))
    return status, capsys.readouterr().out


def saved(objects: Objects, place: Path) -> Path:
    place.write_text("".join(f"{json.dumps(each)}\n" for each in objects))
    return place


def test_what_people_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    saved(REFERENCE, tmp_path / "good.jsonl")
    saved(DEFECTIVE, tmp_path / "bad.jsonl")
    status, out = run("validate good.jsonl", capsys)
    assert status == 0
    assert out.splitlines()[-1] == "repeat: kvpoll validate good.jsonl --profile reference"
    assert out.startswith("explained by reference; no invariant broke")

    status, out = run("validate bad.jsonl --no-invariants", capsys)
    assert status == 0 and "--no-invariants" in out.splitlines()[-1]

    status, out = run("validate bad.jsonl --profile reference", capsys)
    assert status == 1
    first, *rest = out.splitlines()
    assert first.startswith("bad.jsonl:15: D0 RequestOpened: Absent/Unreserved -> Bootstrapping/Unreserved")
    assert "  before: Absent/Unreserved" in rest
    assert any(line.startswith("  rule: decode_bootstrap_deadline is armed") for line in rest)
    assert any("explained by setup_failure = overwritten (S3), 1 times" in line for line in rest)
    assert any(line.startswith("bad.jsonl:29: S3 breaks on D0") for line in rest)


def test_one_object_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = saved(DEFECTIVE, tmp_path / "bad.jsonl")
    status, out = run(f"validate {place} --profile reference --json --invariant S3", capsys)
    told = json.loads(out)
    assert (status, told["verdict"], told["explained"], told["lines"]) == (1, "breaks", False, len(DEFECTIVE))
    assert [each["invariant"] for each in told["violations"]] == ["S3"]
    assert told["first"]["rules"] == [{"rule": "decode_bootstrap_deadline", "has": "armed", "needs": "none"}]
    assert told["repeat"].endswith("--profile reference --invariant S3")
    assert sum(each["times"] for each in told["departures"]) == told["unexplained"]


def test_it_stops_when_enough_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = saved(DEFECTIVE, tmp_path / "bad.jsonl")
    status, out = run(f"validate {place} --profile reference --max-violations 1 --json", capsys)
    told = json.loads(out)
    assert (status, told["unexplained"], told["complete"], told["lines"]) == (1, 1, False, 15)


def test_archives_pipes_and_traces_of_sglang(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = written(tmp_path / "sglang.jsonl", happy())
    assert run(f"validate {place}", capsys)[0] == 0
    assert run(f"validate {place} --profile reference", capsys)[0] == 1

    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(place.read_bytes()))
    assert run(f"validate {packed}", capsys)[0] == 0
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(BadInput, match="cannot be read on"):
        run(f"validate {packed}", capsys)

    class Pipe:
        buffer = io.BytesIO(place.read_bytes())

    monkeypatch.setattr("sys.stdin", Pipe())
    status, out = run("validate -", capsys)
    assert status == 0 and out.splitlines()[-1] == "repeat: kvpoll validate - --profile sglang-0.5.23"


def test_wrong_options_are_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = saved(REFERENCE, tmp_path / "good.jsonl")
    for line, said in (
        (f"validate {tmp_path}/none.jsonl", "cannot be read: No such file"),
        (f"validate {tmp_path}", "Is a directory"),
        (f"validate {place} --profile referense", "--profile: unknown profile 'referense'"),
        (f"validate {place} --format xml", "unknown --format 'xml'"),
        (f"validate {place} --format sglang", "needs 'seq'"),
        (f"validate {place} --invariant S99", "'S99' is not an invariant"),
        (f"validate {place} --invariant S1 --no-invariants", "exclude each other"),
        (f"validate {place} --max-violations 0", "must be 1 or more"),
    ):
        with pytest.raises(BadInput) as told:
            run(line, capsys)
        assert said in str(told.value), line


def test_an_interrupt_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> Any:
        yield from (json.dumps(each).encode() for each in REFERENCE[:20])
        raise KeyboardInterrupt

    judged = Trial(PROTOCOL, Asked(), lines(), "trace")()
    assert not judged.complete and judged.notes[-1] == "interrupted at line 20"
    assert validation.SGLANG == "sglang-0.5.23"
