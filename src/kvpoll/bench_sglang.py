"""Handshakes of SGLang's own prefill and decode classes, for ``kvpoll bench runtime``. Runs as a script by itself.

    PYTHON_WITH_SGLANG bench_sglang.py both|prefill|decode [ADDRESS]

It imports nothing of kvpoll, because it runs in the interpreter that has SGLang. Everything below ``sglang`` is the
installed package, unmodified. Ours are: a stand-in for torchvision (its wheel wants CUDA), what a launcher would have
set, a little memory, a scheduler's loop of polls, and the engine that copies: memmove where both ends live in one
process, process_vm_writev where they do not. Both cost microseconds; a real engine would cost more.

It speaks lines of JSON. It says ``{"ready": ADDRESS}``; for each ``{"first": N, "requests": N, "window": N}`` it
answers ``{"done": N, "wall_s": S, "latency_s": [...]}``; the end of its input ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import os
import socket
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

LAYERS, PAGES, PAGE_BYTES, ROWS, PAGES_EACH = 2, 1024, 256, 256, 4
"""As ``bench_handshakes`` has them: two layers of keys and values, four pages a request, one aux row."""

IDLE_S = 1e-4
"""Pause of the scheduler's loop when nothing has moved. Tried once each, on a busy machine: a pause of 1 ms cost a
fifth of the throughput with 32 requests at once; none at all gained a twentieth with one at a time.
"""

WAIT_S = 60.0


class _AnyName(type):
    """A class of which every public attribute is again such a class: good as a base, an annotation and an enum."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


class _Hollow(ModuleType):
    __path__ = []  # noqa: RUF012  (as of a package)
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


class _HollowTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        ours = fullname.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A hollow module has nothing to run."""


class Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Copier:
    """What the managers see as Mooncake's engine. Its session names the process whose memory it stands for."""

    def __init__(self) -> None:
        self._write = ctypes.CDLL(None, use_errno=True).process_vm_writev

    def get_session_id(self) -> str:
        return f"127.0.0.1:{os.getpid()}"

    def batch_register(self, addresses: list[int], lengths: list[int]) -> int:
        return 0

    def batch_deregister(self, addresses: list[int]) -> int:
        return 0

    def batch_transfer_sync(self, session: str, sources: list[int], targets: list[int], lengths: list[int]) -> int:
        """0, or -1 as Mooncake has it. At most 1024 ranges; a request here has far fewer."""
        pid = int(session.rpartition(":")[2])
        if pid == os.getpid():
            for source, target, length in zip(sources, targets, lengths, strict=True):
                ctypes.memmove(int(target), int(source), int(length))
            return 0
        here, there = (
            (Vector * len(lengths))(*[Vector(int(a), int(n)) for a, n in zip(side, lengths, strict=True)])
            for side in (sources, targets)
        )
        written = self._write(pid, here, len(lengths), there, len(lengths), 0)
        return 0 if written == sum(map(int, lengths)) else -1


class Side:
    """The packages, and one process's managers and memory."""

    def __init__(self, role: str, address: str) -> None:
        os.environ |= {
            "SGLANG_HOST_IP": "127.0.0.1",
            "SGLANG_ENABLE_FAILED_SESSION_PROBE": "0",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if importlib.util.find_spec("torchvision") is None:
            sys.meta_path.append(_HollowTorchvision())
        disaggregation = "sglang.srt.disaggregation."
        self.numpy: Any = importlib.import_module("numpy")
        self.base = importlib.import_module(disaggregation + "base.conn")
        self.common = importlib.import_module(disaggregation + "common.conn")
        self.mooncake = importlib.import_module(disaggregation + "mooncake.conn")
        self.tools = importlib.import_module(disaggregation + "utils")
        self.context = importlib.import_module("sglang.srt.runtime_context")
        logging.disable(logging.CRITICAL)
        self.address = address or f"127.0.0.1:{_free_port()}"
        self.server = None if role == "decode" else self._start_server()
        arguments = self._configure()
        modes = self.tools.DisaggregationMode
        self.prefill = None if role == "decode" else self._manager(modes.PREFILL, arguments)
        self.decode = None if role == "prefill" else self._manager(modes.DECODE, arguments)
        if self.decode is not None:
            _until(lambda: self.decode[0].try_ensure_parallel_info(self.address), "the topology")

    def _start_server(self) -> Any:
        port = int(self.address.rpartition(":")[2])
        server = self.common.CommonKVBootstrapServer("127.0.0.1", port)

        def answers() -> bool:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                return True
            return False

        _until(answers, "the bootstrap server")
        return server

    def _configure(self) -> Any:
        """What a launcher would have set for a single rank; returns the server arguments."""
        options = self.context.get_context().override_server_args(
            disaggregation_mode="prefill",
            disaggregation_transfer_backend="mooncake",
            host="127.0.0.1",
            disaggregation_bootstrap_port=int(self.address.rpartition(":")[2]),
            load_balance_method="follow_bootstrap_room",
        )
        names = ("tp_rank", "pp_rank", "dp_rank", "attn_tp_rank", "attn_dp_rank", "attn_cp_rank", "attn_dcp_rank")
        arguments = options.install()
        parallel = self.context.get_parallel()
        parallel.clear_stamp()
        group = SimpleNamespace(world_size=1, rank_in_group=0)
        parallel.override_permanently(**dict.fromkeys(names, 0), pp_group=group)
        self.context.get_device()._set("gpu_id", 0)
        return arguments

    def _manager(self, mode: Any, arguments: Any) -> tuple[Any, Any, Any]:
        """(manager, pages of each buffer, metadata rows); only the manager's engine is ours."""
        pages = [self.numpy.zeros((PAGES, PAGE_BYTES), dtype=self.numpy.uint8) for _ in range(2 * LAYERS)]
        rows = self.tools.MetadataBuffers(ROWS, 16, self.tools.torch.float32, 16)

        def init_engine(manager: Any) -> None:
            manager.engine = Copier()

        kind = type("CopyingManager", (self.mooncake.MooncakeKVManager,), {"init_engine": init_engine})
        return kind(self._described(pages, rows), mode, arguments, False), pages, rows

    def _described(self, pages: list[Any], rows: Any) -> Any:
        args = self.base.KVArgs()
        zeros = ("engine_rank", "pp_rank", "system_dp_rank", "num_draft_entries", "gpu_id", "prefill_start_layer")
        ones = ("kv_head_num", "total_kv_head_num", "page_size")
        states = ("types", "data_ptrs", "data_lens", "item_lens", "layer_ids", "dim_per_tensor")
        lists = ("kv_layer_ids", *(f"state_{name}" for name in (*states, "slice_outer_counts", "conv_shard_groups")))
        nones = ("rust_http_port", "kv_layout", "swa_kv_cache_layout", "mla_compression_ratios")
        for names, value in ((zeros, 0), (ones, 1), (nones, None)):
            for name in names:
                setattr(args, name, value)
        for name in lists:
            setattr(args, name, [])
        args.kv_cache_dtype_str, args.ib_device, args.is_hybrid_mla_backend = "uint8", "", False
        args.prefill_end_layer = LAYERS
        args.kv_data_ptrs = [each.ctypes.data for each in pages]
        args.kv_data_lens = [each.nbytes for each in pages]
        args.kv_item_lens = [PAGE_BYTES for _ in pages]
        args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = rows.get_buf_infos()
        return args


class Request:
    """One request on this process: what it still has to do. ``step`` is what a scheduler does when it looks at it."""

    def __init__(self, side: Side, room: int, slot: int) -> None:
        self.side, self.room, self.slot = side, room, slot
        self.began = time.perf_counter()
        self.pages = side.numpy.arange(slot * PAGES_EACH, (slot + 1) * PAGES_EACH, dtype=side.numpy.int32)
        self.sender = self.receiver = None
        self.is_sent = self.is_published = False
        if side.prefill is not None:
            self.sender = side.mooncake.MooncakeKVSender(side.prefill[0], side.address, room)
        if side.decode is not None:
            self.receiver = side.mooncake.MooncakeKVReceiver(side.decode[0], side.address, room)
            self.receiver.init(0)

    def step(self) -> bool:
        """Did anything move?"""
        sent = self._send()
        return self._publish() or sent

    def _publish(self) -> bool:
        if self.receiver is None or self.is_published:
            return False
        if self.receiver.poll() != self.side.base.KVPoll.WaitingForInput:
            return False
        self.receiver.send_metadata(self.pages, aux_index=self.slot, state_indices=None, decode_prefix_len=0)
        self.is_published = True
        return True

    def _send(self) -> bool:
        if self.sender is None or self.is_sent:
            return False
        if self.sender.poll() != self.side.base.KVPoll.WaitingForInput:
            return False
        self.side.prefill[2].bootstrap_room[self.slot, 0] = self.room  # type: ignore[index]
        self.sender.pop_decode_prefix_len()
        self.sender.init(PAGES_EACH, aux_index=self.slot)
        self.sender.send(self.pages)
        self.is_sent = True
        return True

    def is_over(self) -> bool:
        """Success on every end that lives here; then what was kept of it is given up. Raises if an end failed."""
        polls = self.side.base.KVPoll
        for end, ready in ((self.sender, self.is_sent), (self.receiver, self.is_published)):
            if end is None:
                continue
            poll = end.poll()
            if poll == polls.Failed:
                raise RuntimeError(f"room {self.room} failed")
            if not ready or poll != polls.Success:
                return False
        for end in (self.sender, self.receiver):
            if end is not None:
                end.clear()
        return True


def drive(side: Side, first: int, requests: int, window: int) -> dict[str, Any]:
    """``requests`` handshakes, ``window`` at once, from room ``first`` on, by one loop that polls them all."""
    latencies: list[float] = []
    live: dict[int, Request] = {}
    free = list(range(window))
    following, end = first, first + requests
    began = time.perf_counter()
    while len(latencies) < requests:
        moved = False
        while free and following < end:
            live[following] = Request(side, following, free.pop())
            following += 1
            moved = True
        for room, request in list(live.items()):
            moved |= request.step()
            if request.is_over():
                latencies.append(time.perf_counter() - request.began)
                free.append(live.pop(room).slot)
                moved = True
        if time.perf_counter() - began > WAIT_S:
            raise RuntimeError(f"{len(latencies)} of {requests} handshakes within {WAIT_S:g} s")
        if not moved:
            time.sleep(IDLE_S)
    return {"done": len(latencies), "wall_s": time.perf_counter() - began, "latency_s": latencies}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until(holds: Any, what: str, limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > end_s:
            raise TimeoutError(what)
        time.sleep(0.01)


def main(role: str, address: str = "") -> None:
    """Serve the orders on standard input. What SGLang prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side = Side(role, address)
    print(json.dumps({"ready": side.address}), file=answers)
    for line in sys.stdin:
        gc.collect()
        gc.freeze()  # as SGLang's server does when it is asked to (/freeze_gc), and as bench_handshakes does
        print(json.dumps(drive(side, **json.loads(line))), file=answers)
    os._exit(0)  # SGLang leaves threads that never end


if __name__ == "__main__":
    main(*sys.argv[1:])
