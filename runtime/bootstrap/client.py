"""The client of a bootstrap server, SGLang's or ours. Synchronous and without patience: one call, one answer.

No call raises for anything that a network or a server does; the answer says what it was. Whether and when to try
again is decided by the machines of the registration and the resolution, not here.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, ReadTimeoutError

from kvpoll.runtime.bootstrap.rows import EPOCH_HEADER, TOPOLOGY, Coordinate, Endpoint, RankInfo, Topology
from kvpoll.spec.protocol import Profile
from kvpoll.spec.source import BadInput
from kvpoll.statemachine.dp_rank import entry_key

ANSWER_BYTES_MAX: Final = 4 << 20
NOT_AN_ANSWER: Final = 502
"""Status of an answer that cannot be one of a bootstrap server; no server sends it."""


class Reply(NamedTuple):
    """How a call ended, as in ``sim/bootstrap.py``: status code, "refused" or "timeout", and what came with it.

    body with 200 is what the method promises; with another code the server's reason, one line; else None.
    """

    status: int | Literal["refused", "timeout"]
    body: Any = None


class BootstrapClient:
    """Calls to one bootstrap server. Safe to share between threads, unless it was given a session.

    address: "host:port". token: sent with writes. session: used for all calls instead of one per thread. Every wait
    for the network is bounded by the profile's http_timeout_s. Raises BadInput for an address that is none.
    """

    def __init__(
        self, address: str, profile: Profile, token: str | None = None, session: requests.Session | None = None
    ) -> None:
        self.address = _checked(address)
        self.profile = profile
        self._timeout_s = profile.number("http_timeout_s")
        self._headers = {"Accept-Encoding": "identity"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._given = session
        self._own = threading.local()
        self._sessions: list[requests.Session] = []
        self._lock = threading.Lock()

    # -- calls

    def health(self) -> Reply:
        """GET /health. body: the server's epoch, None from SGLang's."""
        return self._ask("GET", "/health", lambda response, body: _epoch_of(response))

    def register(self, info: RankInfo) -> Reply:
        """PUT /route: this rank is here. body: the server's epoch, None from SGLang's."""
        return self._ask("PUT", "/route", lambda response, body: _epoch_of(response), payload=info.as_json())

    def unregister(self, place: Coordinate, epoch: int | None = None) -> Reply:
        """DELETE /route: this life of a rank leaves on purpose. SGLang's server knows no such call and answers 405."""
        query: dict[str, Any] = _query(place) if epoch is None else {**_query(place), "process_epoch": epoch}
        return self._ask("DELETE", "/route", lambda response, body: _epoch_of(response), query=query)

    def topology(self) -> Reply:
        """GET /route for the whole engine. body: Topology."""
        query = {**_query(TOPOLOGY), "server_epoch": 1}
        return self._ask("GET", "/route", lambda response, body: Topology.read(_parsed(body)), query=query)

    def endpoint(self, dp: int, cp: int, tp: int, pp: int) -> Reply:
        """GET /route for one rank. body: Endpoint."""
        query = _query(Coordinate(dp, cp, tp, pp))
        return self._ask("GET", "/route", lambda response, body: Endpoint.read(_parsed(body)), query=query)

    def register_dp_rank(self, room: int, rank: int, attempt: int | None = None) -> Reply:
        """POST /register_dp_rank: a request runs on this DP rank. The attempt is told where the profile's identity
        has one (``dp_rank.entry_key``), else the entry is of the bare room.
        """
        payload: dict[str, Any] = {"bootstrap_room": room, "dp_rank": rank}
        if self._names_attempts(attempt):
            payload["attempt"] = attempt
        return self._ask("POST", "/register_dp_rank", lambda response, body: None, payload=payload)

    def query_dp_ranks(self, rooms: Sequence[int], attempts: Sequence[int] | None = None) -> Reply:
        """POST /query_dp_ranks. body: DP rank of every request that is known, by ``dp_rank.entry_key``.

        That is (room, attempt), or the bare room where no attempts are given or the profile's identity is the room.
        SGLang's server knows no attempts and always answers by room.
        """
        payload: dict[str, Any] = {"bootstrap_rooms": list(rooms)}
        if attempts is not None and rooms and self._names_attempts(attempts[0]):
            payload["attempts"] = list(attempts)
        return self._ask("POST", "/query_dp_ranks", lambda response, body: _ranks(_parsed(body)), payload=payload)

    def close(self) -> None:
        """Close the connections of all threads; a session that was given stays open."""
        with self._lock:
            sessions, self._sessions = self._sessions, []
        for session in sessions:
            session.close()

    # -- HTTP

    def _names_attempts(self, attempt: int | None) -> bool:
        return attempt is not None and entry_key(self.profile, (0, attempt)) == (0, attempt)

    def _ask(
        self,
        method: str,
        path: str,
        read: Callable[[requests.Response, bytes], Any],
        query: dict[str, Any] | None = None,
        payload: dict[str, Any] | None = None,
    ) -> Reply:
        """One request. Waits at most http_timeout_s for the connection, for each part of the answer, and for all of
        the body together.
        """
        end_s = time.monotonic() + self._timeout_s
        try:
            with self._session().request(
                method, f"http://{self.address}{path}", params=query, json=payload, headers=self._headers,
                timeout=self._timeout_s, stream=True, allow_redirects=False,
            ) as response:  # fmt: skip
                body = _read_until(response, end_s)
        except (requests.Timeout, ReadTimeoutError, TimeoutError):
            return Reply("timeout")
        except requests.ConnectionError:
            return Reply("refused")
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            return Reply(NOT_AN_ANSWER, f"not an answer of a bootstrap server: {_line(str(error))}")
        if response.status_code != 200:
            return Reply(response.status_code, _reason(body))
        try:
            return Reply(200, read(response, body))
        except ValueError as error:
            return Reply(NOT_AN_ANSWER, f"not an answer of a bootstrap server: {_line(str(error))}")

    def _session(self) -> requests.Session:
        """This thread's session: requests' are not safe to share (SGLang keeps them per thread too)."""
        if self._given is not None:
            return self._given
        session: requests.Session | None = getattr(self._own, "session", None)
        if session is None:
            session = self._own.session = requests.Session()
            # Neither a proxy nor a .netrc of the environment has a say between the ranks of one engine.
            session.trust_env = False
            session.mount("http://", HTTPAdapter(pool_connections=1, pool_maxsize=1))
            with self._lock:
                self._sessions.append(session)
        return session


def _checked(address: str) -> str:
    host, colon, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    is_plain = host.isascii() and not any(sign in host for sign in " /?#@\\\t\r\n")
    if not colon or not host or not is_plain or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise BadInput(f"{address!r}: is not the address of a bootstrap server; give HOST:PORT, such as 127.0.0.1:8998")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise BadInput(f"{address!r}: an IPv6 address needs brackets, as in [::1]:8998")
    return f"{host}:{int(port)}"


def _query(place: Coordinate) -> dict[str, Any]:
    return {
        "prefill_dp_rank": place.dp,
        "prefill_cp_rank": place.cp,
        "target_tp_rank": place.tp,
        "target_pp_rank": place.pp,
    }


def _read_until(response: requests.Response, end_s: float) -> bytes:
    """The body. Raises TimeoutError when it is not complete in time, ValueError when it is too long."""
    body = bytearray()
    # read1 returns what has come; read would wait for a full part, and each byte of a dripping server would renew
    # the time limit of the socket. The body is taken as it is: we said that we accept no encoding.
    while part := response.raw.read1(1 << 16, decode_content=False):
        body += part
        if len(body) > ANSWER_BYTES_MAX:
            raise ValueError(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
        if time.monotonic() > end_s:
            raise TimeoutError
    return bytes(body)


def _epoch_of(response: requests.Response) -> int | None:
    text = response.headers.get(EPOCH_HEADER, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _ranks(data: Any) -> dict[int | tuple[int, int], int]:
    """DP ranks by room or (room, attempt). Raises ValueError."""
    if not isinstance(data, dict) or not all(type(rank) is int for rank in data.values()):
        raise ValueError("not a table of DP ranks")
    return {_key(text): rank for text, rank in data.items()}


def _key(text: str) -> int | tuple[int, int]:
    room, slash, attempt = text.partition("/")
    return (int(room), int(attempt)) if slash else int(room)


def _reason(body: bytes) -> str:
    """What a server said of an error: our JSON, or SGLang's plain text."""
    try:
        data = _parsed(body)
        told = data["error"] if isinstance(data, dict) and isinstance(data.get("error"), str) else str(data)
    except ValueError:
        told = body.decode("utf-8", "replace")
    return _line(told)


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
