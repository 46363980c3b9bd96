"""``transports.make``: by name, lazily, and one clear line for what cannot be made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvpoll.runtime.transports import NAMES, make
from kvpoll.runtime.transports.descriptor import decode, encode
from kvpoll.runtime.transports.engine_import import cause_and_mend, library_mend, load_engine
from kvpoll.runtime.transports.interface import TransportError
from kvpoll.runtime.transports.mooncake import Descriptor, refuse_open_interfaces
from kvpoll.runtime.transports.mooncake_namespace import open_interfaces
from kvpoll.runtime.transports.nixl import Descriptor as NixlDescriptor
from kvpoll.spec.source import BadInput

LIMIT_S = 60.0


def made(name: str, **options: object) -> object:
    return make(name, "decode0", 0, lambda: None, lambda *life: None, **options)


def test_an_unknown_transport_is_named_with_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"there is no transport 'mooncakes' \(did you mean 'mooncake'\?\)"):
        made("mooncakes")


def test_an_unknown_option_is_named_with_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"the transport nixl has no option 'net_device' .*'net_devices'"):
        made("nixl", net_device="lo")


def test_the_factory_imports_no_engine() -> None:
    """An embedding process that uses tcp pays for neither torch nor NIXL nor Mooncake."""
    script = "import sys, kvpoll.runtime.transports as t; print(sorted(set(sys.modules) & set(%r)))"
    heavy = ["torch", "triton", "mooncake", "nixl_cu12", "zmq"]
    source = str(Path(__file__).parents[2] / "src")
    told = subprocess.run(
        [sys.executable, "-P", "-c", script % heavy], env={"PYTHONPATH": source}, capture_output=True, text=True,
        timeout=LIMIT_S, check=True,
    )  # fmt: skip
    assert told.stdout == "[]\n"
    assert set(NAMES) == {"memory", "shm", "tcp", "mooncake", "nixl", "cuda_ipc"}


# --- engines that are not there ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "module"), [("nixl", "nixl_cu12"), ("mooncake", "mooncake")])
def test_an_engine_that_is_not_installed_is_told_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    for hidden in (module, f"{module}._api", f"{module}.engine"):
        monkeypatch.setitem(sys.modules, hidden, None)  # as if it were not installed
    options = {"allow_all_interfaces": True} if name == "mooncake" else {}
    with pytest.raises(BadInput) as caught:
        made(name, **options)
    mend = f"{module} is not installed; pip install 'kvpoll[{name}]'"
    assert str(caught.value) == f"the transport {name} cannot be used: {mend}"


def test_a_missing_shared_library_is_told_with_its_debian_package() -> None:
    def told(said: str) -> str:
        return cause_and_mend(ImportError(said), "mooncake.engine", "mooncake")

    missing = "libibverbs.so.1: cannot open shared object file: No such file or directory"
    assert told(missing) == "the shared library libibverbs.so.1 is missing; apt-get install libibverbs1"
    assert "nvidia-cuda-runtime-cu12" in library_mend("libcudart.so.12")
    assert "driver" in library_mend("libcuda.so.1")
    assert library_mend("libodd.so.3") == "install the system package that provides libodd.so.3"
    other = told("undefined symbol:\n foo")
    assert (
        other == "mooncake.engine cannot be imported: undefined symbol: foo; reinstall the package that it comes with"
    )
    assert load_engine("json", "nixl").__name__ == "json"


def test_without_a_gpu_cuda_ipc_says_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BadInput, match="the transport cuda_ipc finds no GPU: torch"):
        made("cuda_ipc")


# --- where Mooncake may listen ----------------------------------------------------------------------


def test_mooncake_is_refused_where_other_machines_could_reach_it() -> None:
    if not open_interfaces():
        pytest.skip("this machine has no interface but loopback")
    with pytest.raises(TransportError) as caught:
        refuse_open_interfaces()
    said = str(caught.value)
    assert open_interfaces()[0] in said and "unshare -rn" in said and "allow_all_interfaces=True" in said
    with pytest.raises(TransportError, match="listens on every interface"):
        made("mooncake")


def test_a_namespace_with_only_loopback_is_recognised() -> None:
    """Read by ioctl: /sys still shows the interfaces of the machine in there."""
    script = (
        "from kvpoll.runtime.transports.mooncake_namespace import *\n"
        "down = open_interfaces()\nraise_loopback()\nprint(down, open_interfaces())"
    )
    source = str(Path(__file__).parents[2] / "src")
    command = ["unshare", "-rn", sys.executable, "-P", "-c", script]
    try:
        told = subprocess.run(
            command, env={"PYTHONPATH": source}, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if "unshare:" in told.stderr:
        pytest.skip(told.stderr.strip())
    assert told.stdout == "[] []\n", told.stderr


# --- descriptors ------------------------------------------------------------------------------------

BODY = Descriptor("decode0", 2, "127.0.0.1:12345", [(4096, 100), (8192, 7)])


def test_a_descriptor_comes_back_as_it_was() -> None:
    assert decode("mooncake", 1, encode("mooncake", 1, BODY), Descriptor, "decode0", 2) == BODY
    binary = NixlDescriptor("d", 0, "d#0#ab", bytes(range(256)), [(1, 2)], "host", 0)
    assert decode("nixl", 1, encode("nixl", 1, binary), NixlDescriptor, "d", 0) == binary


def test_a_descriptor_that_does_not_fit_is_refused_in_one_line() -> None:
    sealed = encode("mooncake", 1, BODY)
    for wrong, said in (
        (sealed.replace(b"4096", b'"x"'), "mooncake: the descriptor is damaged"),
        (sealed.replace(b"4096", b"-1"), "mooncake: the descriptor is damaged"),
        (sealed.replace(b"4096", str(1 << 63).encode()), "mooncake: the descriptor is damaged"),
        (encode("nixl", 1, BODY), "the peer's descriptor is of the transport 'nixl'"),
    ):
        with pytest.raises(TransportError, match=said) as caught:
            decode("mooncake", 1, wrong, Descriptor, "decode0", 2)
        assert "\n" not in str(caught.value)
