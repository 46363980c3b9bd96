"""Sockets that a forked child of this process must not hold.

A child that inherits a socket keeps the connection open after its parent's death: the peer sees no end, and no proof.
``exec`` closes such sockets by itself (they are made close-on-exec); a plain ``fork`` needs this.
"""

from __future__ import annotations

import os
import socket
import weakref

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def keep_from_children(connection: socket.socket) -> socket.socket:
    """A forked child closes its copy of this socket at once. Returns the socket."""
    _sockets.add(connection)
    return connection


def _close_in_child() -> None:
    for connection in list(_sockets):
        if connection.fileno() >= 0:
            os.close(connection.detach())


os.register_at_fork(after_in_child=_close_in_child)
