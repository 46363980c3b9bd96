"""Engines are imported when they are asked for; what is missing is told by name, with the command that mends it."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Final

from kvpoll.spec.source import BadInput

DEBIAN: Final = {
    "libibverbs.so.1": "libibverbs1",
    "libmlx5.so.1": "ibverbs-providers",
    "librdmacm.so.1": "librdmacm1",
    "libnl-3.so.200": "libnl-3-200",
    "libnl-route-3.so.200": "libnl-route-3-200",
    "libnuma.so.1": "libnuma1",
    "libcurl.so.4": "libcurl4",
}
"""Shared libraries that the engines' wheels leave to the system, and the Debian package of each (ENGINES 1)."""

NOT_DEBIAN: Final = {
    "libcudart.so.12": "pip install nvidia-cuda-runtime-cu12",
    "libcudart.so.13": "pip install nvidia-cuda-runtime",
    "libcuda.so.1": "it is part of the NVIDIA driver: run on a machine with a GPU, or install a build without CUDA",
}

_SONAME = re.compile(r"\b(lib[\w.+-]+\.so[\w.]*): cannot open shared object")


def load_engine(module: str, extra: str) -> ModuleType:
    """Import an engine that comes with ``kvpoll[extra]``. Raises BadInput: one line, cause and mend."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a wheel for another machine fails in many ways
        raise BadInput(f"the transport {extra} cannot be used: {cause_and_mend(error, module, extra)}") from None


def cause_and_mend(error: Exception, module: str, extra: str) -> str:
    """Why an import failed and what to do about it, in one line. ``extra`` is "" where none of kvpoll's brings it."""
    top = module.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name in (top, module):
        mend = f"pip install 'kvpoll[{extra}]'" if extra else f"pip install {top}"
        return f"{top} is not installed; {mend}"
    said = " ".join(str(error).split())
    found = _SONAME.search(said)
    if found is None:
        return f"{module} cannot be imported: {said}; reinstall the package that it comes with"
    return f"the shared library {found[1]} is missing; {library_mend(found[1])}"


def library_mend(soname: str) -> str:
    """How to get a shared library."""
    if soname in DEBIAN:
        return f"apt-get install {DEBIAN[soname]}"
    return NOT_DEBIAN.get(soname, f"install the system package that provides {soname}")
