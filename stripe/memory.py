"""What glibc does with freed memory, on which much of a network's speed on a CPU depends."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt(3)
NEVER = 2**31 - 1  # bytes; the largest threshold that mallopt takes


def keep_memory() -> bool:
    """Let freed memory serve the next allocation instead of returning it to the system.

    A network frees and allocates feature maps of many MB in every layer. By default glibc maps each of them anew, and
    the kernel zeroes its pages, thousands per layer, when they are first touched. Peak memory changes by a few
    percent in either direction; memory once allocated is not returned until the process ends.

    Returns:
        Whether freed memory is kept from now on; a C library other than glibc is left as it is, and gives False.

    Example:
        >>> kept = keep_memory()  # once, at the start of a script
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    options = ctypes.CDLL(None).mallopt
    return bool(options(M_MMAP_MAX, 0) and options(M_TRIM_THRESHOLD, NEVER))
