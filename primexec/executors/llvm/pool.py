"""Memory kept between calls: large outputs from storages that nobody refers to any more, and arenas.

A fresh allocation of some megabytes costs more in page faults than a kernel costs to fill it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from primexec._torch import empty_strided_cpu, set_version_counter, storage_use_count

SMALLEST = 1 << 20  # bytes; below, the allocator reuses memory by itself
HUGE = 1 << 21  # bytes of a page, where the system has large ones
SMALLEST_INSIDE = 1 << 22  # bytes of a tensor inside of a program: what is kept adds to the peak of a call
ROOM = 4  # times its size: what a tensor inside of a program may take
ALIGNMENT = 64
PATIENCE = (
    0.01  # seconds; a finalizer that runs inside the pool and calls it again goes without, and never waits on itself
)


_advise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None


def fresh(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, nbytes: int) -> Tensor:
    """A new tensor, as torch.empty_strided makes it, in large pages where it has room for one and the system has them.

    Filling 64 MiB that are new takes 5 ms so, and 24 in pages of 4 KiB.
    """
    made = empty_strided_cpu(shape, strides, dtype)
    if nbytes >= HUGE and _advise is not None:
        start = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        _advise(ctypes.c_void_p(start), ctypes.c_size_t(made.data_ptr() + nbytes - start), mmap.MADV_HUGEPAGE)
    return made


class _Entry:
    """A storage that was given out, with what must still hold when it is given out again."""

    __slots__ = ("address", "nbytes", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.nbytes = storage.nbytes()
        self.address = storage.data_ptr()

    def unused(self) -> bool:
        """Whether nobody but the pool refers to the storage, in C++ or as a Python object."""
        return storage_use_count(self.storage._cdata) == 1 and sys.getrefcount(self.storage) <= _references_alone()

    def intact(self) -> bool:
        """Whether it is the memory that it was: not resized, not moved, not shared between processes.

        Asking for the address also gives a copy-on-write storage memory of its own.
        """
        s = self.storage
        return s.nbytes() == self.nbytes and not s.is_shared() and s.data_ptr() == self.address


@cache
def _references_alone() -> int:
    """What `unused` counts where only an entry refers to the storage's Python object."""
    entry = _Entry(torch.empty(1).untyped_storage())
    return _count(entry)


def _count(entry: _Entry) -> int:
    return sys.getrefcount(entry.storage)


class OutputPool:
    """Storages of SMALLEST bytes and more, reused when nobody else refers to them.

    Args:
        limit: bytes of all storages it remembers, given out or not; the least recently used are forgotten first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._by_size: OrderedDict[int, list[_Entry]] = OrderedDict()  # least recently used sizes first
        self._bytes = 0

    def empty(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, nbytes: int, roomy: bool = False
    ) -> Tensor:
        """An uninitialised tensor of its own, as torch.empty_strided makes it.

        Args:
            nbytes: its storage's size.
            roomy: whether the storage may be larger: nobody outside of a program sees the tensor.
        """
        storage = None
        if self._lock.acquire(timeout=PATIENCE):
            try:
                sizes = [s for s in self._by_size if nbytes < s <= ROOM * nbytes] if roomy else []
                storage = next(filter(None, map(self._take, (nbytes, *sorted(sizes)))), None)
            finally:
                self._lock.release()
        if storage is not None:
            reused = torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)
            if not reused.is_inference():
                set_version_counter((reused,), (0,))  # set_ counts as a change; a new tensor has seen none
            return reused
        made = fresh(shape, strides, dtype, nbytes)
        self._remember(made.untyped_storage())
        return made

    def _take(self, nbytes: int) -> torch.UntypedStorage | None:
        entries = self._by_size.get(nbytes)
        if entries is None:
            return None
        self._by_size.move_to_end(nbytes)
        for i, entry in enumerate(entries):
            if not entry.unused():
                continue
            if entry.intact():
                entries.append(entries.pop(i))
                return entry.storage
            self._bytes -= entry.nbytes
            del entries[i]
            return None
        return None

    def _remember(self, storage: torch.UntypedStorage) -> None:
        entry = _Entry(storage)
        if entry.nbytes > self.limit or not self._lock.acquire(timeout=PATIENCE):
            return
        try:
            self._by_size.setdefault(entry.nbytes, []).append(entry)
            self._bytes += entry.nbytes
            while self._bytes > self.limit:
                size, entries = next(iter(self._by_size.items()))
                entries.pop(0)
                self._bytes -= size
                if not entries:
                    del self._by_size[size]
        finally:
            self._lock.release()

    def clear(self) -> None:
        """Forget every storage; those in use live on with their tensors."""
        with self._lock:
            self._by_size.clear()
            self._bytes = 0

    def after_fork(self) -> None:
        """In a child process: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()
        self._by_size.clear()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that it remembers."""
        return self._bytes


class Arenas:
    """Blocks for intermediates, one checked out for each run: as many as ever ran at once, as large as was needed."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, nbytes: int) -> Tensor:
        """A block of at least so many bytes, aligned to 64; the last one given back, which caches may still hold."""
        try:
            block = self._free.pop()  # one step under the GIL: no two runs get the same block
        except IndexError:
            pass
        else:
            if block.numel() >= nbytes:
                return block
            del block  # programs that need less can share the larger one
        return aligned(rounded(nbytes))

    def give_back(self, block: Tensor) -> None:
        """Return a block once no kernel writes to it any more."""
        self._free.append(block)

    def clear(self) -> None:
        """Free the blocks that are not checked out."""
        self._free = []


def aligned(nbytes: int) -> Tensor:
    """A new block of so many bytes, aligned to 64."""
    with torch.inference_mode(False):
        made = fresh((nbytes + ALIGNMENT,), (1,), torch.uint8, nbytes + ALIGNMENT)
    skip = -made.data_ptr() % ALIGNMENT
    return made[skip : skip + nbytes]


def dropped(block: Tensor) -> None:
    """Takes back a block that nobody else gets: it goes with its last reference."""


def rounded(nbytes: int) -> int:
    """So many bytes, or up to a quarter more: one of four sizes between a power of two and the next.

    >>> rounded(1), rounded(5000), rounded(9000), rounded(1 << 20)
    (4096, 8192, 12288, 1048576)
    """
    step = max(1 << 12, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return -(-max(nbytes, 1) // step) * step


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 1 << 32


outputs = OutputPool(limit=_physical_memory() // 8)
arenas = Arenas()
os.register_at_fork(after_in_child=outputs.after_fork)


def empty_cache() -> None:
    """Free the memory that compiled programs keep between calls. What is in use stays as it is."""
    outputs.clear()
    arenas.clear()
