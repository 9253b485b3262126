"""The few calls of NVIDIA's driver that running an engine takes, through the library that comes with every driver."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.core.errors import BackendError

if TYPE_CHECKING:
    from torchferry.core.engine import Array

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_NON_BLOCKING = 1


@functools.cache
def why_no_gpu() -> str:
    """Tell why there is no GPU to run on; empty if there is one."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return "this machine has no NVIDIA driver"
    count = ctypes.c_int()
    status = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"NVIDIA's driver does not start (status {status})"
    return "" if count.value else "NVIDIA's driver finds no GPU"


class Gpu:
    """The first GPU that the process sees: memory, copies and streams.

    Raises:
        BackendError: If there is none.
    """

    def __init__(self) -> None:
        reason = why_no_gpu()
        if reason:
            raise BackendError(reason)
        self._driver = ctypes.CDLL(_LIBRARY)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def enter(self) -> None:
        """Make this thread one that may call the others."""
        self._call("cuCtxSetCurrent", self._context)

    def stream(self) -> int:
        """Return a new stream."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def wait(self, stream: int) -> None:
        """Wait until a stream has done all its work."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def allocate(self, size: int) -> int:
        """Return the address of new memory of so many bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: Array) -> None:
        """Copy an array in one piece to the GPU."""
        if array.nbytes:
            pointer = ctypes.c_void_p(array.ctypes.data)
            self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), pointer, ctypes.c_size_t(array.nbytes))

    def download(self, address: int, shape: tuple[int, ...], dtype: str) -> Array:
        """Return a new array with what is on the GPU."""
        array = np.empty(shape, dtype)
        if array.nbytes:
            pointer = ctypes.c_void_p(array.ctypes.data)
            self._call("cuMemcpyDtoH_v2", pointer, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))
        return array

    def destroy(self, stream: int) -> None:
        """Give a stream back."""
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise BackendError(f"NVIDIA's driver fails in {name} with status {status}")
