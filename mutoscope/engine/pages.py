"""Pages of memory: kept for reuse, given back, or left to the file they came from. Linux with glibc; elsewhere nothing.

glibc returns large blocks to the system when they are freed and asks for them again, and every page of them is then
zeroed anew: for tensors of some megabytes that takes longer than the arithmetic on them.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_MADV_DONTNEED = 4  # of sys/mman.h


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


@cache
def reuse_freed() -> bool:
    """From now on freed memory stays with this process until `give_back`. Whether that could be arranged."""
    libc = _libc()
    if libc is None:
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))


def give_back() -> None:
    """Return all freed memory to the system."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(ctypes.c_size_t(0))


def drop(mapped: Tensor) -> None:
    """Take the pages of a mapped file that `mapped` covers out of this process; they are read again when used.

    The file's pages stay in the system's cache. Never to be called with memory that is not a read-only mapping of a
    file: its contents would be lost.
    """
    libc = _libc()
    if libc is None:
        return
    start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)
