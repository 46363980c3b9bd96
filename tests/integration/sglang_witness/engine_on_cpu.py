"""The unmodified prefill/decode classes of SGLang on a CPU, in one process, for the witnesses beside this file.

Everything below ``sglang`` is the installed package. Ours are: a stand-in for torchvision (its wheel wants CUDA), the
ranks and options that a launcher would have set, a little memory, and a transport that copies with memmove.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

os.environ |= {"SGLANG_HOST_IP": "127.0.0.1", "SGLANG_ENABLE_FAILED_SESSION_PROBE": "0", "CUDA_VISIBLE_DEVICES": ""}


class _AnyName(type):
    """A class of which every public attribute is again such a class: good as a base, an annotation and an enum."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


class _Hollow(ModuleType):
    __path__: tuple[str, ...] = ()
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


if importlib.util.find_spec("torchvision") is None:
    sys.meta_path.append(_HollowTorchvision())

import numpy as np  # noqa: E402
import requests  # noqa: E402
import torch  # noqa: E402
from sglang.srt.disaggregation.base.conn import KVArgs, KVPoll  # noqa: E402
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer  # noqa: E402
from sglang.srt.disaggregation.mooncake.conn import (  # noqa: E402
    MooncakeKVManager,
    MooncakeKVReceiver,
    MooncakeKVSender,
)
from sglang.srt.disaggregation.utils import DisaggregationMode, MetadataBuffers  # noqa: E402
from sglang.srt.runtime_context import get_context, get_device, get_parallel  # noqa: E402

PAGES, PAGE_BYTES, SLOTS = 16, 64, 8


def until(holds: Callable[[], bool], what: str, limit_s: float = 10.0) -> None:
    """Wait for something that must happen. Raises TimeoutError."""
    end = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.002)


def tell(candidate: str, seen: dict[str, Any]) -> NoReturn:
    """The one line that the test reads; then leave without waiting for threads that SGLang never ends."""
    print(json.dumps({"candidate": candidate, "seen": seen}), flush=True)
    os._exit(0)


def free_port(low: int = 0) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", low))
        return int(probe.getsockname()[1])


def start_bootstrap(port: int) -> CommonKVBootstrapServer:
    """The real bootstrap server, answering."""
    server = CommonKVBootstrapServer("127.0.0.1", port)

    def answers() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok
        return False

    until(answers, "the bootstrap server")
    return server


def configure(port: int) -> Any:
    """What a launcher would have set for a single rank; returns the server arguments."""
    options = get_context().override_server_args(
        disaggregation_mode="prefill",
        disaggregation_transfer_backend="mooncake",
        host="127.0.0.1",
        disaggregation_bootstrap_port=port,
    )
    ranks = dict.fromkeys(("tp_rank", "pp_rank", "dp_rank"), 0)
    ranks |= dict.fromkeys(("attn_tp_rank", "attn_dp_rank", "attn_cp_rank", "attn_dcp_rank"), 0)
    arguments = options.install()
    get_parallel().clear_stamp()
    get_parallel().override_permanently(**ranks, pp_group=SimpleNamespace(world_size=1, rank_in_group=0))
    get_device()._set("gpu_id", 0)
    return arguments


def lonely_group() -> Any:
    """A real process group with one member, for the collectives of the queues."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return torch.distributed.group.WORLD


class Copier:
    """The transport that the managers see as Mooncake's engine; all engines live in this process."""

    everyone: dict[str, Copier] = {}  # noqa: RUF012  (one world, on purpose)
    lost: set[int] = set()  # noqa: RUF012
    """Destination addresses at which a write is reported as done and does not happen."""

    def __init__(self) -> None:
        self.session = f"127.0.0.1:{20001 + len(self.everyone)}"
        self.everyone[self.session] = self

    def get_session_id(self) -> str:
        return self.session

    def batch_register(self, addresses: list[int], lengths: list[int]) -> int:
        return 0

    def batch_transfer_sync(self, session: str, sources: list[int], targets: list[int], lengths: list[int]) -> int:
        for source, target, length in zip(sources, targets, lengths, strict=True):
            if int(target) not in self.lost:
                ctypes.memmove(int(target), int(source), int(length))
        return 0


class Memory:
    """One layer of keys and values, and the real metadata buffers, as a manager wants them described."""

    def __init__(self) -> None:
        self.pages = [np.zeros((PAGES, PAGE_BYTES), dtype=np.uint8) for _ in range(2)]
        self.metadata = MetadataBuffers(SLOTS, 16, torch.float32, 16)

    def described(self) -> KVArgs:
        args = KVArgs()
        zeros = ("engine_rank", "pp_rank", "system_dp_rank", "num_draft_entries", "gpu_id", "prefill_start_layer")
        ones = ("kv_head_num", "total_kv_head_num", "page_size", "prefill_end_layer")
        states = ("types", "data_ptrs", "data_lens", "item_lens", "layer_ids", "dim_per_tensor")
        lists = ("kv_layer_ids", *(f"state_{name}" for name in (*states, "slice_outer_counts", "conv_shard_groups")))
        nones = ("rust_http_port", "kv_layout", "swa_kv_cache_layout", "mla_compression_ratios")
        for names, value in ((zeros, 0), (ones, 1), (nones, None)):
            for name in names:
                setattr(args, name, value)
        for name in lists:
            setattr(args, name, [])
        args.kv_cache_dtype_str, args.ib_device, args.is_hybrid_mla_backend = "uint8", "", False
        args.kv_data_ptrs = [each.ctypes.data for each in self.pages]
        args.kv_data_lens = [each.nbytes for each in self.pages]
        args.kv_item_lens = [PAGE_BYTES for _ in self.pages]
        args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = self.metadata.get_buf_infos()
        return args

    def room_cell(self, slot: int) -> int:
        """Address of the room number in a metadata row."""
        return int(self.metadata.bootstrap_room[slot].data_ptr())


class CopyingManager(MooncakeKVManager):
    """The real manager; only its transport is ours."""

    def init_engine(self) -> None:
        self.engine = Copier()


class Pair:
    """A bootstrap server, one prefill rank and one decode rank."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        arguments = configure(self.port)
        self.server = start_bootstrap(self.port)
        self.prefill_memory, self.decode_memory = Memory(), Memory()
        self.prefill = CopyingManager(self.prefill_memory.described(), DisaggregationMode.PREFILL, arguments)
        self.decode = CopyingManager(self.decode_memory.described(), DisaggregationMode.DECODE, arguments)
        assert self.decode.try_ensure_parallel_info(self.address)

    def receiver(self, room: int) -> MooncakeKVReceiver:
        made = MooncakeKVReceiver(self.decode, self.address, room)
        made.init(0)
        return made

    def handshake(self, room: int, slot: int) -> tuple[MooncakeKVSender, MooncakeKVReceiver]:
        """Both ends of a room that waits for prefill's pages. Its metadata row is ``slot`` on both sides."""
        sender, receiver = MooncakeKVSender(self.prefill, self.address, room), self.receiver(room)
        receiver.send_metadata(np.array([slot], dtype=np.int32), aux_index=slot)
        until(lambda: sender.poll() == KVPoll.WaitingForInput, "the handshake")
        self.prefill_memory.metadata.bootstrap_room[slot, 0] = room  # as MetadataBuffers.set_buf does
        sender.init(1, aux_index=slot)
        return sender, receiver


def send(sender: MooncakeKVSender, page: int) -> None:
    """Queue the only page of a request: the worker writes it and the metadata row, and tells decode."""
    sender.send(np.array([page], dtype=np.int32))


def name(status: int) -> str:
    return {0: "Failed", 1: "Bootstrapping", 2: "WaitingForInput", 3: "Transferring", 4: "Success"}[int(status)]
