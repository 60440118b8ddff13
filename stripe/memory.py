"""How this process's C library holds memory: for the speed of networks on a CPU."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
NEVER = 2**31 - 1  # bytes; the largest threshold that mallopt takes


def keep_memory() -> bool:
    """Let freed memory serve the next allocation, where glibc would return it to the system; return whether it does.

    A network frees and allocates feature maps of many MB in every layer. By default glibc maps each anew, and the
    kernel zeroes its pages, thousands a layer, at first touch. The peak of the process moves by some percent either
    way; what lies under it is held until the process ends. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    options = ctypes.CDLL(None).mallopt
    return bool(options(M_MMAP_MAX, 0) and options(M_TRIM_THRESHOLD, NEVER))
