"""Tests that kvpoll offers to others: point them at your own transport.

    from kvpoll.testing import TransportConformance

    class TestMine(TransportConformance):
        def make(self, node, epoch, wake, on_death):
            return MyTransport(node, epoch, wake, on_death)

and run ``pytest`` on that file. See ``TransportConformance`` for what else a class may say.
"""

from __future__ import annotations

from kvpoll.testing.conformance import NotConforming, TransportConformance

__all__ = ["NotConforming", "TransportConformance"]
