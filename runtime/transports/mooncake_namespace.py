"""Where Mooncake may listen. Its handshake and data ports are open on every interface, whatever it is told.

Measured (ENGINES 1): ``MC_TCP_BIND_ADDRESS`` sets only the address that is advertised; the ports listen on 0.0.0.0 and
[::], and the data port takes writes into registered memory from whoever connects. So the adapter starts only where
every interface that is up is a loopback one, which a network namespace of its own provides without any privilege.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from typing import Final

MEND: Final = (
    "start the process in a namespace of its own: unshare -rn sh -c 'ip link set lo up; exec \"$@\"' - COMMAND"
)

_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_UP: Final = 0x1
_LOOPBACK: Final = 0x8
_RUNNING: Final = 0x40
_IFREQ: Final = struct.Struct("16sH22x")


def open_interfaces() -> list[str]:
    """Interfaces that are up and not loopback, by name. Raises OSError where this cannot be known.

    Asked by ioctl, because /sys shows the namespace in which it was mounted, not that of this process. Interfaces
    that are down (a fresh namespace may have tunnels of that kind) can receive nothing.
    """
    if sys.platform != "linux":
        raise OSError(f"the flags of interfaces cannot be read on {sys.platform}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        return [name for _, name in socket.if_nameindex() if _is_open(_flags(asked, name))]


def raise_loopback() -> None:
    """Bring lo up, as a fresh namespace needs. Raises OSError without the right to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        flags = _flags(asked, "lo") | _UP | _RUNNING
        fcntl.ioctl(asked, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags))


def _flags(asked: socket.socket, name: str) -> int:
    answer = fcntl.ioctl(asked, _SIOCGIFFLAGS, _IFREQ.pack(name.encode(), 0))
    return int(_IFREQ.unpack(answer)[1])


def _is_open(flags: int) -> bool:
    return bool(flags & _UP) and not flags & _LOOPBACK
