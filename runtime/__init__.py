"""The same machine over real processes, sockets and memory.

``bootstrap`` is the rendezvous server and its client, ``control`` carries the messages between ranks, ``transports``
move the bytes, ``pools`` hold them. Nothing here decides anything of the protocol: what to do comes from the step
functions of ``statemachine``, which the simulator and the explorer call too.
"""
