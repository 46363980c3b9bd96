"""``kvpoll serve``: the bootstrap server by itself, until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvpoll.commands.options import Verbs, add_profile, add_spec, add_verb, counted, whole
from kvpoll.commands.plan import read_spec
from kvpoll.commands.screen import Screen
from kvpoll.commands.status import HOLDS
from kvpoll.spec.source import BadInput

if TYPE_CHECKING:
    from kvpoll.runtime.bootstrap import BootstrapServer

PORT: Final = 8998
LIMITS: Final = {
    "--max-ranks": ("ranks", "ranks of the engine (default 4096)"),
    "--max-dp-entries": ("dp_entries", "rooms whose DP rank is on file at a time (default 262144)"),
    "--max-body-bytes": ("body_bytes", "size of one request (default 1048576)"),
    "--max-query-rooms": ("query_rooms", "rooms in one query for DP ranks (default 16384)"),
}


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    says = "Run the bootstrap server, where the ranks of one prefill engine register and decode ranks find them."
    parser = add_verb(verbs, "serve", says, act, "It speaks SGLang's HTTP API. Ctrl-C or SIGTERM ends it.")
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="where to listen (default 127.0.0.1)")
    parser.add_argument(
        "--port", metavar="N", type=whole, default=PORT, help=f"port to listen on, 0 for any (default {PORT})"
    )
    parser.add_argument("--token-file", metavar="FILE", type=Path, help="writes need the bearer token in this file")
    add_profile(parser, "reference", "rules of the server (default reference)")
    for option, (_, says_limit) in LIMITS.items():
        parser.add_argument(option, metavar="N", type=counted, help=says_limit)
    add_spec(parser)


def act(arguments: argparse.Namespace, screen: Screen) -> int:
    """Listen, say where, and serve until SIGINT or SIGTERM. Raises BadInput before anything is started."""
    server = _server(arguments)
    asyncio.run(_serve(server, arguments, screen))
    return HOLDS


async def _serve(server: BootstrapServer, arguments: argparse.Namespace, screen: Screen) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await server.run(stop, lambda: _tell(server, arguments, screen))


def _tell(server: BootstrapServer, arguments: argparse.Namespace, screen: Screen) -> None:
    profile = server.profile.name
    if arguments.json:
        screen.json({"host": server.host, "port": server.port, "profile": profile, "epoch": server.epoch})
        return
    is_open = arguments.token_file is None and not _is_loopback(server.host)
    warning = "; whoever reaches it may register ranks, as there is no --token-file" if is_open else ""
    screen.say(f"bootstrap server at http://{server.address}, profile {profile}, epoch {server.epoch}{warning}")


def _server(arguments: argparse.Namespace) -> BootstrapServer:
    """The server that the options describe; it does not listen yet. Raises BadInput."""
    protocol = read_spec(arguments.spec)
    profile = protocol.profile(arguments.profile)
    token = None if arguments.token_file is None else _read_token(arguments.token_file)
    try:
        from kvpoll.runtime.bootstrap import BootstrapServer, Limits
    except ModuleNotFoundError as error:
        raise BadInput(
            f"kvpoll serve needs {error.name}, which is not installed: pip install 'kvpoll[runtime]'"
        ) from None
    given = {name: getattr(arguments, f"max_{name}") for name, _ in LIMITS.values()}
    limits = replace(Limits(), **{name: value for name, value in given.items() if value is not None})
    return BootstrapServer(protocol, profile, arguments.host, arguments.port, token, limits=limits)


def _read_token(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not text; a token on one line was expected") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
