"""What the loader refuses: every kind of mistake in ``kvpoll.toml`` gets one line with file, line and mend.

Each story changes the real file in one place, so the mistakes are those that somebody who edits it can make.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from kvpoll.reports.diagrams import COMMAND, documents, mermaid, svg, transition_table, write_docs
from kvpoll.spec.protocol import SPEC_PATH, load, parse
from kvpoll.spec.source import BadInput, Source, nearest
from kvpoll.spec.vocabulary import POLL_NUMBERS, TERMINAL_POLLS, UNPOLLED
from kvpoll.statemachine import Machine, Machines

TEXT = SPEC_PATH.read_text(encoding="utf-8")
HOUSE = Path(__file__).resolve().parents[2]


def changed(old: str, new: str, after: str = "") -> tuple[str, int]:
    """The real text with the first ``old`` behind ``after`` replaced by ``new``, and the line of that."""
    begin = TEXT.index(old, TEXT.index(after))
    return TEXT[:begin] + new + TEXT[begin + len(old) :], line_at(TEXT, begin)


def line_at(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def line_of(text: str, needle: str) -> int:
    return line_at(text, text.index(needle))


def line_in(text: str, role: str, key: str) -> int:
    return line_at(text, text.index(f"\n{key}", text.index(role)) + 1)


def refusal(text: str) -> str:
    with pytest.raises(BadInput) as refused:
        parse(Source("kvpoll.toml", text))
    assert "\n" not in str(refused.value)
    return str(refused.value)


SENDER = "[role.sender]"
RECEIVER = "[role.receiver]"
SENDER_LEASE = "[role.sender.lease]"
ROUTER = "[role.router]"
REGISTRATION = "[role.registration]"
DP_ENTRY = "[role.dp_entry]"


# --- what the real file says ----------------------------------------------------------------------


def test_the_real_file_loads_and_every_machine_compiles_under_every_profile() -> None:
    protocol = load()
    assert len(protocol.digest) == 12 and protocol.path.endswith("kvpoll.toml")
    assert {"reference", "sglang-0.5.23", "before-sglang-24772"} <= protocol.profiles.keys()
    for profile in protocol.profiles.values():
        assert profile.rules.keys() == protocol.rules.keys()
        machines = Machines(protocol, profile)
        assert machines.small("router").role is protocol.roles["router"]


def test_rooms_speak_of_polls_and_of_nothing_else() -> None:
    for name in ("sender", "receiver"):
        table = load().roles[name].table
        assert set(table.states) <= POLL_NUMBERS.keys() | UNPOLLED
        assert set(table.terminal) == TERMINAL_POLLS


def test_a_profile_takes_from_its_base_what_it_does_not_choose() -> None:
    protocol = load()
    before, base = protocol.profile("before-sglang-24772"), protocol.profile("sglang-0.5.23")
    assert before.base == base.name
    assert {rule for rule in protocol.rules if before[rule] != base[rule]} == {"setup_failure", "http_calls"}


def test_a_scenarios_switches_make_a_profile_with_a_telling_name() -> None:
    reference = load().profile("reference")
    switched = reference.with_rules({"early_abort": "forgotten", "drain_timeout_s": 7})
    assert switched.name == "reference+drain_timeout_s=7,early_abort=forgotten"
    assert (switched["early_abort"], switched.number("drain_timeout_s"), switched.base) == (
        "forgotten",
        7.0,
        "reference",
    )
    assert reference["early_abort"] == "remembered" and reference.with_rules({}) is reference


def test_an_unknown_profile_is_answered_with_the_nearest() -> None:
    with pytest.raises(BadInput) as refused:
        load().profile("sglang-0.5.32")
    assert str(refused.value) == "unknown profile 'sglang-0.5.32' (did you mean 'sglang-0.5.23'?)"


# --- one mistake, one line ------------------------------------------------------------------------

# name, what stands there, what is written instead, behind which text, the message behind "kvpoll.toml:LINE"
ON_THE_LINE = [
    ("section", "[bounds]", "[bound]", "", "unknown section 'bound' (did you mean 'bounds'?)"),
    ("poll", "Failed = 0", "Failed = 5", "[poll]", None),
    (
        "state left",
        'from = ["Transferring"], fact = "WriteFailed"',
        'from = ["Transfering"], fact = "WriteFailed"',
        SENDER,
        "unknown state 'Transfering' (did you mean 'Transferring'?)",
    ),
    (
        "state reached",
        'fact = "WriteFailed", to = "Failed"',
        'fact = "WriteFailed", to = "Fialed"',
        SENDER,
        "unknown state 'Fialed' (did you mean 'Failed'?)",
    ),
    (
        "initial state",
        'initial = "Waiting"',
        'initial = "Wating"',
        ROUTER,
        "unknown state 'Wating' (did you mean 'Waiting'?)",
    ),
    (
        "terminal state",
        'terminal = ["Answered"]',
        'terminal = ["Answer"]',
        ROUTER,
        "unknown state 'Answer' (did you mean 'Answered'?)",
    ),
    (
        "ignored state",
        'WriteFailed = ["Absent"',
        'WriteFailed = ["Abscent"',
        "[role.sender.ignored]",
        "unknown state 'Abscent' (did you mean 'Absent'?)",
    ),
    (
        "fact",
        'fact = "WriteFailed"',
        'fact = "WriteFaild"',
        SENDER,
        "unknown fact 'WriteFaild' (did you mean 'WriteFailed'?)",
    ),
    (
        "illegal fact",
        "WritePosted = [",
        "WritePoste = [",
        "[role.sender.illegal]",
        "unknown fact 'WritePoste' (did you mean 'WritePosted'?)",
    ),
    (
        "stale fact",
        "PeerAborted = [",
        "PeerAbort = [",
        "[role.sender.stale]",
        "unknown fact 'PeerAbort' (did you mean 'PeerAborted'?)",
    ),
    (
        "stale action",
        '"AcknowledgeAbort"',
        '"AknowledgeAbort"',
        "[role.sender.stale]",
        "unknown action 'AknowledgeAbort' (did you mean 'AcknowledgeAbort'?)",
    ),
    (
        "lease fact",
        'facts = ["PagesReserved"',
        'facts = ["PagesReservd"',
        SENDER_LEASE,
        "unknown fact 'PagesReservd' (did you mean 'PagesReserved'?)",
    ),
    (
        "joint state",
        'poll = ["Success"], lease = ["Exposed"]',
        'poll = ["Success"], lease = ["Expsed"]',
        SENDER_LEASE,
        "unknown state 'Expsed' (did you mean 'Exposed'?)",
    ),
    (
        "joint key",
        'lease = ["Exposed"], to_lease = "Released"',
        'lease = ["Exposed"], lease_to = "Released"',
        SENDER_LEASE,
        "unknown key 'lease_to' (did you mean 'lease'?)",
    ),
    (
        "action",
        '"NotifyDecode(Success)"',
        '"NotifyDecod(Success)"',
        SENDER,
        "unknown action 'NotifyDecod(Success)' (did you mean 'NotifyDecode'?)",
    ),
    (
        "action's argument",
        '"NotifyDecode(Success)"',
        '"NotifyDecode(Success"',
        SENDER,
        "unknown action 'NotifyDecode(Success' (did you mean 'NotifyDecode'?)",
    ),
    (
        "row key",
        'cause = "transfer_error"',
        'causes = "transfer_error"',
        SENDER,
        "unknown key 'causes' (did you mean 'cause'?)",
    ),
    (
        "role key",
        "terminal = [",
        "terminals = [",
        SENDER,
        "unknown key 'terminals' (did you mean 'terminal'?)",
    ),
    (
        "rule of a row",
        "when = { clear_leaves =",
        "when = { clear_leave =",
        SENDER,
        "unknown rule 'clear_leave' (did you mean 'clear_leaves'?)",
    ),
    (
        "rule value of a row",
        'when = { clear_leaves = "tombstone" }',
        'when = { clear_leaves = "tomb" }',
        SENDER,
        "rule 'clear_leaves' has no value 'tomb' (did you mean 'tombstone'?)",
    ),
    (
        "rule of a profile",
        "clear_leaves =",
        "clears_leave =",
        "[profile.reference.rules]",
        "unknown rule 'clears_leave' (did you mean 'clear_leaves'?)",
    ),
    (
        "rule value of a profile",
        'early_abort = "remembered"',
        'early_abort = "remember"',
        "[profile.reference.rules]",
        "rule 'early_abort' has no value 'remember' (did you mean 'remembered'?)",
    ),
    (
        "negative number",
        "drain_timeout_s = 5",
        "drain_timeout_s = -5",
        "[profile.reference.rules]",
        "rule 'drain_timeout_s' is a number of seconds and not negative, got -5",
    ),
    (
        "number as text",
        "drain_timeout_s = 5",
        'drain_timeout_s = "5 s"',
        "[profile.reference.rules]",
        "rule 'drain_timeout_s' is a number of seconds and not negative, got '5 s'",
    ),
    (
        "number as truth",
        "drain_timeout_s = 5",
        "drain_timeout_s = true",
        "[profile.reference.rules]",
        "rule 'drain_timeout_s' is a number of seconds and not negative, got True",
    ),
    (
        "base",
        'base = "reference"',
        'base = "referense"',
        "",
        "unknown base profile 'referense' (did you mean 'reference'?); it must stand above",
    ),
    (
        "profile key",
        "upstream =",
        "upstreams =",
        "[profile.before-sglang-24772]",
        "unknown key 'upstreams' (did you mean 'upstream'?)",
    ),
    ("rule key", "values =", "value =", "[rule.identity]", "unknown key 'value' (did you mean 'values'?)"),
    ("bound", "step_s =", "steps =", "[bounds]", "unknown bound 'steps' (did you mean 'step_s'?)"),
    (
        "bound's value",
        "step_s = 1 ",
        "step_s = -1 ",
        "[bounds]",
        "bound 'step_s' must be a number that is not negative",
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "after", "cause"),
    [case[1:] for case in ON_THE_LINE],
    ids=[case[0] for case in ON_THE_LINE],
)
def test_a_mistake_is_named_on_its_line(old: str, new: str, after: str, cause: str | None) -> None:
    text, line = changed(old, new, after)
    if cause is None:
        line, cause = line_of(text, "[poll]"), f"the poll numbers are fixed by every engine: {POLL_NUMBERS}"
    assert refusal(text) == f"kvpoll.toml:{line}: {cause}"


@pytest.mark.parametrize(
    ("old", "new", "after", "cause"),
    [
        (
            '"was_last_write"',
            '"was_last_rite"',
            SENDER,
            "guard 'was_last_rite' (did you mean 'was_last_write'?)",
        ),
        (
            '"uncount_write"',
            '"uncounts_write"',
            SENDER,
            "update 'uncounts_write' (did you mean 'uncount_write'?)",
        ),
        ('"was_cleared"', '"was_clear"', SENDER_LEASE, "guard 'was_clear' (did you mean 'was_cleared'?)"),
    ],
)
def test_names_of_guards_and_updates_are_checked_when_a_machine_is_made(
    old: str, new: str, after: str, cause: str
) -> None:
    text, line = changed(old, new, after)
    protocol = parse(Source("kvpoll.toml", text))
    with pytest.raises(BadInput) as refused:
        Machine(protocol.roles["sender"], protocol.profile("reference"))
    assert str(refused.value) == f"kvpoll.toml:{line}: unknown {cause}"


# --- what is missing, and what contradicts itself -------------------------------------------------


MEND = "add a transition, or list it as ignored or illegal"


def test_a_cell_of_which_nothing_is_said() -> None:
    text, _ = changed('"Absent", "Announced", ', '"Announced", ', "\nAbortRequested = ")
    said = "role 'sender', profile 'reference': nothing is said of AbortRequested in Absent"
    assert refusal(text) == f"kvpoll.toml:{line_in(text, SENDER, 'facts = ')}: {said}; {MEND}"


def test_a_cell_that_guards_leave_open() -> None:
    text, _ = changed('fact = "DpRankRegistered", to', 'fact = "DpRankRegistered", guards = ["rank_is_known"], to')
    where = "role 'dp_entry', profile 'reference'"
    said = "nothing is said of DpRankRegistered in Unknown when no guard holds"
    assert refusal(text) == f"kvpoll.toml:{line_in(text, DP_ENTRY, 'facts = ')}: {where}: {said}; {MEND}"


def test_a_rule_that_leaves_a_cell_open_under_another_profile() -> None:
    """The loader looks at every profile, not only at the reference."""
    text, _ = changed('RetryDue = ["Registered", "Exhausted", ', 'RetryDue = ["Registered", ', REGISTRATION)
    said = "role 'registration', profile 'sglang-0.5.23': nothing is said of RetryDue in Exhausted"
    assert refusal(text) == f"kvpoll.toml:{line_in(text, REGISTRATION, 'facts = ')}: {said}; {MEND}"


def test_a_cell_that_is_ignored_and_illegal() -> None:
    text, _ = changed("\n[role.sender.illegal]\n", '\n[role.sender.illegal]\nLinkRestored = ["Absent"]\n')
    said = "role 'sender': LinkRestored in Absent is both ignored and illegal"
    assert refusal(text) == f"kvpoll.toml:{line_of(text, SENDER)}: {said}"


def test_a_state_that_nothing_leads_to() -> None:
    text, _ = changed('states = ["Waiting",', 'states = ["Limbo", "Waiting",', ROUTER)
    text = text.replace('ignored = { DecodeAnswered = ["Answered"', 'ignored = { DecodeAnswered = ["Limbo", "Answered"')
    text = text.replace('LegFailed = ["Answered"', 'LegFailed = ["Limbo", "Answered"')
    text = text.replace('ClientLeft = ["Answered"', 'ClientLeft = ["Limbo", "Answered"')
    line = line_in(text, ROUTER, "states = ")
    assert refusal(text) == f"kvpoll.toml:{line}: no row of role 'router' ever leads to state 'Limbo'"


def test_a_way_out_of_a_terminal_state() -> None:
    row = '  { from = ["Answered"], fact = "ClientLeft", to = "Waiting" },\n'
    text, _ = changed(
        '  { from = ["Waiting"], fact = "DecodeAnswered"',
        row + '  { from = ["Waiting"], fact = "DecodeAnswered"',
    )
    assert refusal(text) == (
        f"kvpoll.toml:{line_of(text, row)}: terminal state 'Answered' has an exit to 'Waiting' in 'reference'"
    )


def test_a_row_that_breaks_an_invariant_in_the_reference() -> None:
    text, line = changed(
        'when = { setup_failure = "overwritten" }',
        'when = { setup_failure = ["final", "overwritten"] }',
        RECEIVER,
    )
    assert refusal(text) == (f"kvpoll.toml:{line}: a row that breaks S3 exists in 'reference'; give it a `when`")


def test_a_joint_row_that_breaks_an_invariant_in_the_reference() -> None:
    text, line = changed('when = { source_release = "at_once" }, defect = ["S1"]', 'defect = ["S1"]', SENDER_LEASE)
    assert refusal(text) == f"kvpoll.toml:{line}: a row that breaks S1 exists in 'reference'; give it a `when`"


def test_a_profile_that_leaves_a_rule_open() -> None:
    text, _ = changed('early_abort = "remembered"\n', "", "[profile.reference.rules]")
    assert refusal(text) == (
        f"kvpoll.toml:{line_of(text, '[profile.reference]')}: "
        "profile 'reference' does not choose rule 'early_abort' and has no base that does"
    )


def test_a_protocol_without_the_reference() -> None:
    text = TEXT.replace("profile.reference", "profile.standard").replace('base = "reference"', 'base = "standard"')
    assert refusal(text).endswith(": the profile 'reference' is missing")


def test_a_section_that_is_missing() -> None:
    text = TEXT.replace("version = 1\n", "")
    assert refusal(text) == "kvpoll.toml:1: section [version] is missing"


@pytest.mark.parametrize("key", ["title", "initial", "states", "terminal", "facts", "transition"])
def test_a_role_that_lacks_something(key: str) -> None:
    begin = TEXT.index(f"\n{key} = ", TEXT.index("[role.dp_entry]")) + 1
    end = TEXT.index("\n]", begin) + 2 if key == "transition" else TEXT.index("\n", begin)
    text = TEXT[:begin] + TEXT[end + 1 :]
    assert refusal(text) == f"kvpoll.toml:{line_of(text, '[role.dp_entry]')}: role 'dp_entry' lacks `{key}`"


def test_a_bound_that_is_missing() -> None:
    text = re.sub(r"\nrecover_s = .*", "", TEXT)
    assert refusal(text) == (
        f"kvpoll.toml:{line_of(text, '[bounds]')}: bound 'recover_s' must be a number that is not negative"
    )


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ('kind = "choice"', 'kind = "chioce"', 'rule \'identity\' needs kind = "choice" or "number"'),
        (
            'kind = "choice"',
            'kind = "number"',
            "rule 'identity': a choice has `values`, a number has a `unit`",
        ),
        ('kind = "choice"\n', "", 'rule \'identity\' needs kind = "choice" or "number"'),
    ],
)
def test_a_rule_of_no_kind(old: str, new: str, cause: str) -> None:
    text, _ = changed(old, new, "[rule.identity]")
    assert refusal(text) == f"kvpoll.toml:{line_of(text, '[rule.identity]')}: {cause}"


# --- what is no TOML at all -----------------------------------------------------------------------


def test_toml_that_does_not_parse_names_its_line() -> None:
    text, line = changed('[profile.reference]\ntitle = "', "[profile.reference]\ntitle = ")
    message = refusal(text)
    assert message.startswith(f"kvpoll.toml:{line + 1}: not valid TOML: ") and f"line {line + 1}" in message


def test_toml_that_ends_too_early_names_the_last_line() -> None:
    message = refusal('[role.sender]\nstates = ["Absent",\n')
    assert message == "kvpoll.toml:3: not valid TOML: Invalid value (at end of document)"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "kvpol.toml"
    with pytest.raises(BadInput) as refused:
        load(missing)
    assert str(refused.value) == f"{missing}: cannot be read: No such file or directory; check the path"


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    binary = tmp_path / "kvpoll.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput) as refused:
        load(binary)
    assert str(refused.value) == f"{binary}: is not UTF-8 text; a TOML file was expected"


def test_nearest_lists_what_is_valid_when_nothing_is_close() -> None:
    assert nearest("zzz", ["b", "a"]) == " (valid: a, b)"
    assert nearest("zzz", map(str, range(13))) == f" (valid: {', '.join(sorted(map(str, range(13)))[:12])}, ...)"


# --- wrong shapes ---------------------------------------------------------------------------------

SHAPES = [
    ("row without from", '{ from = ["Transferring"], fact = "WriteFailed"', '{ fact = "WriteFailed"', SENDER),
    ("row without fact", 'fact = "WriteFailed", to', "to", SENDER),
    ("row without to", 'fact = "WriteFailed", to = "Failed"', 'fact = "WriteFailed"', SENDER),
    (
        "joint without poll",
        '{ poll = ["Success"], lease = ["Exposed"]',
        '{ lease = ["Exposed"]',
        SENDER_LEASE,
    ),
    (
        "joint without lease",
        '{ poll = ["Success"], lease = ["Exposed"]',
        '{ poll = ["Success"]',
        SENDER_LEASE,
    ),
    ("lease without facts", 'facts = ["PagesReserved", "WritePosted"]\n', "", SENDER_LEASE),
    (
        "from as text",
        'from = ["Transferring"], fact = "WriteFailed"',
        'from = 3, fact = "WriteFailed"',
        SENDER,
    ),
    ("guards as text", 'guards = ["was_last_write"]', 'guards = "was_last_write"', SENDER),
    ("guards as number", 'guards = ["was_last_write"]', "guards = 7", SENDER),
    ("update as text", 'update = ["count_write"]', 'update = "count_write"', SENDER),
    ("actions as number", 'actions = ["CancelDeadline(announced)"]', "actions = 7", SENDER),
    ("action as list", '"CancelDeadline(announced)"', '["CancelDeadline"]', SENDER),
    ("when as text", 'when = { clear_leaves = "tombstone" }', 'when = "clear_leaves"', SENDER),
    ("fact as list", 'fact = "WriteFailed"', 'fact = ["WriteFailed"]', SENDER),
    ("states as number", 'states = ["Waiting", "HalfFailed", "Answered"]', "states = 3", ROUTER),
    ("facts as number", "facts = {", "facts = 7 # {", "[role.dp_entry]"),
    ("ignored as number", 'WriteFailed = ["Absent"', 'WriteFailed = 3 # ["Absent"', "[role.sender.ignored]"),
    ("profile as number", "[profile.reference]", "[profile]\nodd = 3\n[profile.reference]", ""),
    (
        "rule value as list",
        'early_abort = "remembered"',
        'early_abort = ["remembered"]',
        "[profile.reference.rules]",
    ),
    ("base as list", 'base = "reference"', 'base = ["reference"]', ""),
]


@pytest.mark.parametrize(("old", "new", "after"), [case[1:] for case in SHAPES], ids=[case[0] for case in SHAPES])
def test_a_wrong_shape_is_named_on_its_line(old: str, new: str, after: str) -> None:
    text, _ = changed(old, new, after)
    assert re.match(r"kvpoll\.toml:\d+: \S", refusal(text))


# --- pages that repeat the spec -------------------------------------------------------------------


def test_generated_pages_are_fresh() -> None:
    for name, text in documents(load()).items():
        path = HOUSE / name
        assert path.is_file(), f"{name} is missing: run {COMMAND}"
        assert path.read_text(encoding="utf-8") == text, f"{name} is stale: run {COMMAND}"


def test_no_page_is_left_over_from_a_role_that_is_gone() -> None:
    found = {f"docs/diagrams/{path.name}" for path in (HOUSE / "docs" / "diagrams").iterdir()}
    assert found == {name for name in documents(load()) if name.startswith("docs/diagrams/")}


def test_pages_are_written_where_they_are_wanted(tmp_path: Path) -> None:
    written = write_docs(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in written} == documents(load()).keys()
    assert (tmp_path / "docs/protocol.md").read_text(encoding="utf-8").startswith("# The protocol\n")


def test_the_page_tells_rules_profiles_and_invariants() -> None:
    text = documents(load())["docs/protocol.md"]
    assert "| `drain_timeout_s` | seconds | `5` | `30` | `SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV" in text
    assert "| `before-sglang-25125` |" in text and "`register_attempts` = `1`" in text
    assert "| S1 | page-lifetime | safety |" in text and "release_requires_quiescence = never" in text
    for rule in load().rules:
        assert f"| `{rule}` |" in text


def test_a_changed_row_changes_picture_and_page() -> None:
    text, _ = changed('fact = "ClientLeft", to = "Answered"', 'fact = "ClientLeft", to = "HalfFailed"', ROUTER)
    other = parse(Source("kvpoll.toml", text))
    stale = {name for name, page in documents(load()).items() if documents(other)[name] != page}
    assert stale == {"docs/protocol.md", "docs/diagrams/router.svg", "docs/diagrams/router.mmd"}


def test_pictures_follow_the_profile() -> None:
    router, protocol = load().roles["router"], load()
    assert mermaid(router, protocol.profile("reference")) == (
        "stateDiagram-v2\n    [*] --> Waiting\n    Waiting --> Answered : DecodeAnswered<br/>LegFailed<br/>ClientLeft\n"
    )
    sglang = mermaid(router, protocol.profile("sglang-0.5.23"))
    assert "Waiting --> HalfFailed : LegFailed\n" in sglang
    assert ">HalfFailed<" in svg(router, protocol.profile("sglang-0.5.23"))
    assert ">HalfFailed<" not in svg(router, protocol.profile("reference"))


def test_texts_of_a_picture_never_overlap() -> None:
    """A monospaced letter is at most 0.61 of its size wide, so the room that a text takes is known."""
    for role in load().roles.values():
        for profile in load().profiles.values():
            drawn = re.findall(r'<text x="(\d+)" y="(\d+)" [^>]*size="(\d+)"[^>]*>([^<]+)<', svg(role, profile))
            boxes = sorted((int(y), int(x), int(x) + len(text) * int(size) * 0.61) for x, y, size, text in drawn)
            assert len(boxes) > len(role.table.states) / 2
            for number, (y, left, right) in enumerate(boxes):
                below = itertools.takewhile(lambda box, y=y: box[0] < y + 11, boxes[number + 1 :])
                assert not [box for box in below if box[1] < right and left < box[2]], (
                    role.name,
                    profile.name,
                )


def test_the_table_tells_every_cell() -> None:
    router = load().roles["router"]
    table = transition_table(router, load().profile("sglang-0.5.23"))
    assert "| `LegFailed` | **HalfFailed** | **Answered** | *ignored* |" in table
    assert "| `DecodeAnswered` | **Answered** | **Answered** | *ignored* |" in table
    assert "| HalfFailed | `DecodeAnswered` |  | Answered | `AnswerClient(failed)`, `CancelLeg` |" in table
