"""What every process of the cluster does first: its profile, its plane and loop, its trace, its way to the launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from kvpoll.runtime.cluster.config import ProcessConfig
from kvpoll.runtime.control import messages as wire
from kvpoll.runtime.control.plane import ControlPlane
from kvpoll.runtime.loop import Loop
from kvpoll.runtime.trace_file import TraceFile
from kvpoll.spec.protocol import Profile, Protocol, load
from kvpoll.spec.source import BadInput
from kvpoll.spec.trace import NodeStarted

LAUNCHER: Final = "R"
"""The launcher's node name: it is the router of the cluster too."""

_json: Final = msgspec.json.Encoder().encode
_log: Final = logging.getLogger("kvpoll.runtime")


def profile_of(config: ProcessConfig, protocol: Protocol) -> Profile:
    """The profile with the rules that were changed on the command line."""
    return protocol.profile(config.profile).with_rules(config.rules)


class Station:
    """The plane, loop and trace of one process, before anything of the protocol runs on them."""

    def __init__(self, config: ProcessConfig) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
        self.config = config
        self.protocol = load(Path(config.spec)) if config.spec is not None else load()
        self.profile = profile_of(config, self.protocol)
        self.plane = listen(config)
        self.loop = Loop(self.plane, config.origin, config.speed)
        self.trace: TraceFile | None = None
        if config.trace is not None:
            header = {
                "node": config.node,
                "part": True,
                "epoch": config.epoch,
                "profile": config.profile,
                "spec": self.protocol.digest,
            }
            self.trace = TraceFile(Path(config.trace), header)
        signal.signal(signal.SIGTERM, lambda number, frame: self.loop.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def record(self, event: Any) -> None:
        """Write an event, where a trace is wanted."""
        if self.trace is not None:
            self.trace(event)

    def begin(self, origin: float) -> None:
        """This life begins; all processes agree on the origin of time."""
        self.loop.origin = origin
        self.record(NodeStarted(self.loop.now, self.config.node, self.config.epoch))

    def tell_launcher(self, kind: str, **content: Any) -> None:
        """Send the launcher a message of the cluster's own: "hello", "health", "stats", ..."""
        self.plane.send(self.config.launcher, LAUNCHER, None, wire.Command(kind, _json(content)))

    def close(self) -> None:
        """End as planned."""
        self.plane.close(linger_s=0.2)
        if self.trace is not None:
            self.trace.close()


def listen(config: ProcessConfig) -> ControlPlane:
    """The control plane, at the address of the former life as a restarted server is; elsewhere if that was taken."""
    try:
        return ControlPlane(config.node, config.epoch, port=config.control_port)
    except BadInput as error:
        if not config.control_port:
            raise
        _log.warning("%s: %s; listening elsewhere", config.node, error)
        return ControlPlane(config.node, config.epoch)


def stand_still() -> None:
    """Stop this process, as SIGSTOP from outside does, until SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)
