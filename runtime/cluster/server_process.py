"""A bootstrap server as a process of its own, which can be told to be slow or to answer with errors."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from kvpoll.runtime.bootstrap import BootstrapServer
from kvpoll.runtime.cluster.config import ServerConfig
from kvpoll.runtime.cluster.process import LAUNCHER, Station
from kvpoll.runtime.control import messages as wire
from kvpoll.spec.source import BadInput


class StagedServer(BootstrapServer):
    """A bootstrap server whose requests can be held up, or answered with an error, before it sees them."""

    before: Callable[[], tuple[float, int | None]] = staticmethod(lambda: (0.0, None))

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        wait_s, status = self.before()
        if wait_s:
            await asyncio.sleep(wait_s)
        if status is not None:
            return web.Response(status=status, text="staged")
        return await super()._guard(request, handler)


class ServerProcess:
    """The server, and the launcher's commands."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.station = station = Station(config)
        self.slow_s = 0.0
        self.error_share = 0.0
        self.failure: BadInput | None = None
        self.server = StagedServer(
            station.protocol, station.profile, port=config.port, epoch=config.epoch, emit=self._emit,
            node=config.node, now=lambda: station.loop.now,
        )  # fmt: skip
        self.server.before = self._before
        self._try_port()
        station.tell_launcher("hello")

    def _try_port(self) -> None:
        """A port that is taken ends this process before it says hello, and with it the start of the cluster."""
        try:
            socket.create_server((self.server.host, self.config.port)).close()
        except OSError as error:
            self.station.close()
            raise BadInput(
                f"{self.config.node}: port {self.config.port} cannot be listened on: {error.strerror}; "
                f"end the process that holds it, or start the cluster anew"
            ) from None

    def _emit(self, event: Any) -> None:
        """From the server's thread; a trace is written line by line."""
        self.station.record(event)

    def _before(self) -> tuple[float, int | None]:
        """Before a request is handled: how long to wait (wall seconds), and a status to answer instead."""
        fails = self.error_share and random.random() < self.error_share
        return self.slow_s / self.station.loop.speed, 500 if fails else None

    def _serve(self) -> None:
        """Listen. The port may have been taken since it was tried; then the process ends, saying why."""
        try:
            self.server.start()
        except BadInput as error:
            self.failure = error
            self.station.loop.stop()

    def _receive(self) -> None:
        for envelope, message in self.station.plane.receive():
            if envelope.node != LAUNCHER or not isinstance(message, wire.Command):
                continue
            content = msgspec.json.decode(message.payload)
            if message.kind == "begin":
                self.station.loop.origin = content["origin"]
                self._serve()
            elif message.kind == "quit":
                self.station.loop.stop()
            elif message.kind == "speed":
                self.station.loop.change_speed(content["at"], content["speed"])
            elif message.kind == "disturb":
                self.slow_s, self.error_share = content["slow_s"], content["error_share"]

    def run(self) -> None:
        """Serve until the launcher says quit, or SIGTERM. Raises BadInput when the port cannot be listened on."""
        try:
            self.station.loop.run(self._receive)
        finally:
            self.server.close()
            self.station.close()
        if self.failure is not None:
            raise self.failure
