"""The rendezvous of prefill and decode: SGLang's bootstrap API with the ranks' process epochs added, and its client.

``BootstrapServer`` is embedded in a prefill engine or run alone (``kvpoll serve``). ``BootstrapClient`` speaks to it
and to SGLang's own server; ``Caller`` lets a scheduler use the client without ever waiting for HTTP (A19).
"""

from kvpoll.runtime.bootstrap.caller import Caller
from kvpoll.runtime.bootstrap.client import BootstrapClient, Reply
from kvpoll.runtime.bootstrap.rows import Coordinate, Endpoint, RankInfo, Topology
from kvpoll.runtime.bootstrap.server import BootstrapServer, Limits

__all__ = [
    "BootstrapClient",
    "BootstrapServer",
    "Caller",
    "Coordinate",
    "Endpoint",
    "Limits",
    "RankInfo",
    "Reply",
    "Topology",
]
