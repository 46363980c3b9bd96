"""The generated TLA+ tables are fresh, whole, and name nothing that Machine.tla does not define."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvpoll.spec.protocol import SPEC_PATH, Row, load, parse
from kvpoll.spec.source import Source
from kvpoll.spec.tables_tla import COMMAND, TABLES_PATH, render, rules_record, write
from kvpoll.statemachine.guards import GUARDS
from kvpoll.statemachine.updates import UPDATES

PROTOCOL = load()
TABLES = render(PROTOCOL)
MACHINE = (TABLES_PATH.parent / "Machine.tla").read_text(encoding="utf-8")


def test_the_tables_are_fresh() -> None:
    assert TABLES_PATH.read_text(encoding="utf-8") == TABLES, f"spec/tla/Tables.tla is stale: run {COMMAND}"


def test_a_changed_row_makes_the_file_stale() -> None:
    text = SPEC_PATH.read_text(encoding="utf-8")
    changed = text.replace('fact = "ClientLeft", to = "Answered"', 'fact = "ClientLeft", to = "HalfFailed"')
    assert changed != text
    lines = set(render(parse(Source("kvpoll.toml", changed))).splitlines()) - set(TABLES.splitlines())
    [line] = lines
    assert 'fact |-> "ClientLeft", to |-> "HalfFailed"' in line


def test_every_row_has_its_line_and_its_source() -> None:
    rows = [row for role in PROTOCOL.roles.values() for row in role.table.rows]
    leases = [role.lease for role in PROTOCOL.roles.values() if role.lease is not None]
    assert TABLES.count("[from |-> ") == len(rows) + sum(len(lease.rows) for lease in leases)
    assert TABLES.count("[polls |-> ") == sum(len(role.joint) for role in PROTOCOL.roles.values())
    assert len(re.findall("breaks ", TABLES)) == sum(bool(row.defect) for row in all_rows())
    assert "\\* P1'', A11; breaks S4\n" in TABLES
    assert '["sglang-0.5.23"' not in TABLES and '"sglang-0.5.23" :> Rules_sglang_0_5_23' in TABLES


def all_rows() -> list[Row]:
    leases = [role.lease for role in PROTOCOL.roles.values() if role.lease is not None]
    found = [row for role in PROTOCOL.roles.values() for row in role.table.rows]
    found += [row for lease in leases for row in lease.rows]
    return [*found, *(joint.row for role in PROTOCOL.roles.values() for joint in role.joint)]


def test_rules_of_a_switched_profile_are_written_in_full() -> None:
    profile = PROTOCOL.profile("sglang-0.5.23").with_rules({"register_attempts": 2.5, "identity": "incarnation"})
    text = rules_record(PROTOCOL, profile)
    assert 'identity |-> "incarnation"' in text and 'early_abort |-> "forgotten"' in text
    assert "register_attempts |-> 3" in text  # attempt < 2.5 is attempt < 3
    assert "timeout_s" not in text and "jitter" not in text


@pytest.mark.parametrize(("operator", "names"), [("Guard", GUARDS), ("Update", UPDATES)])
def test_the_hand_written_twin_knows_the_same_names(operator: str, names: dict[str, object]) -> None:
    body = MACHINE.split(f"\n{operator}(name, s, detail) ==")[1].split("\n\\* -----")[0]
    written = re.findall(r'name = "(\w+)" ->', body)
    assert sorted(written) == sorted(names)


def test_the_module_is_written_where_it_is_wanted(tmp_path: Path) -> None:
    path = write(tmp_path / "Tables.tla")
    assert path.read_text(encoding="utf-8") == TABLES
