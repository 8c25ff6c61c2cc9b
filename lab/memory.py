"""Memory that is freed stays at hand.

The C library of Linux gives large blocks back to the system at once, and the system wipes every
page before it lends it again. A training step asks for the same blocks each time: without this it
spends up to half of its time on their return.
"""

import ctypes
import gc
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # glibc's names of what can be set


def c_library(function):
    """A function of the C library, or None where it has none of that name."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), function, None)


def keep():
    """From here on this process keeps what it frees, for itself, to use again."""
    mallopt = c_library("mallopt")
    if mallopt:
        mallopt(MMAP_MAX, 0)  # large blocks come from the heap too,
        mallopt(TRIM_THRESHOLD, -1)  # whose end is not cut off
        mallopt(TOP_PAD, 2**26)  # and which grows 64 MB at a time


def give_back():
    """What nobody needs any longer goes back to the system after all."""
    gc.collect()
    trim = c_library("malloc_trim")
    if trim:
        trim(0)
