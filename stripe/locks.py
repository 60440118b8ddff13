"""One writer at a time: by the kernel's lock on a file, or by claims where the storage has no such locks.

A claim is a small file that its writer renews while it works. A writer first puts down its own claim and then looks for
others, so of two writers at least one sees the other; a writer starts work only once it is alone. The storage must
guarantee no more than that a file, once written, is seen by whoever lists the folder afterwards.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from stripe.files import own_path
from stripe.messages import printable

LOCK = ".lock"
CLAIM = ".writer-"  # the beginning of a claim's name
RENEWAL = 15.0  # seconds between two renewals of a claim
LIFETIME = 120.0  # seconds after which a claim that was not renewed no longer counts
PATIENCE = 3.0  # of several writers that begin together, one waits this many seconds for the others to give way
NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}

Confirm = Callable[[], None]  # raises BlockingIOError once another writer has taken over
_own: set[str] = set()  # the claims that this process holds


class Claims(Protocol):
    """A folder for claims, on whatever storage."""

    def put(self, name: str, text: str) -> None:
        """Write a claim, or renew it."""
        ...

    def renewed(self) -> Mapping[str, float]:
        """Return when each claim was last renewed, in seconds by the storage's clock."""
        ...

    def read(self, name: str) -> str:
        """Return a claim's text; FileNotFoundError where there is no such claim."""
        ...

    def remove(self, name: str) -> None:
        """Remove a claim; it may be gone already."""
        ...


class FolderClaims:
    """Claims in a local folder."""

    def __init__(self, folder: Path) -> None:
        """Use an existing folder."""
        self._folder = folder

    def put(self, name: str, text: str) -> None:
        """Write a claim, or renew it."""
        own_path(self._folder, name).write_text(text, encoding="utf-8")

    def renewed(self) -> Mapping[str, float]:
        """Return when each claim was last renewed, in seconds by the file system's clock."""
        times = {}
        for path in self._folder.glob(f"{CLAIM}*"):
            with suppress(FileNotFoundError):
                times[path.name] = path.lstat().st_mtime
        return times

    def read(self, name: str) -> str:
        """Return a claim's text."""
        return own_path(self._folder, name).read_text(encoding="utf-8")

    def remove(self, name: str) -> None:
        """Remove a claim."""
        (self._folder / name).unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: Path, what: str) -> Iterator[Confirm]:
    """Keep other writers out of a local folder, which must exist; the kernel drops the lock of a dead process.

    Where the file system has no such locks, claims take their place.

    Args:
        folder: the folder to be written by one writer at a time.
        what: what messages call the folder, such as "run 'runs/a'".

    Yields:
        a function to call before something is made final: it raises BlockingIOError if another writer has taken over.

    Raises:
        BlockingIOError: another writer is at work.
        OSError: the folder cannot be written.
    """
    import fcntl  # writing needs POSIX, reading does not

    with _opened(own_path(folder, LOCK), what) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{what} is being written already: wait for it, or choose another directory"
            raise BlockingIOError(message) from error
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        else:
            try:
                yield lambda: None
            finally:
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave the lock with forked children
            return
    with claimed(FolderClaims(folder), what) as confirm:
        yield confirm


@contextmanager
def _opened(path: Path, what: str) -> Iterator[int]:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        why = os.strerror(error.errno or errno.EIO)
        message = f"{what} could not be locked ({why}): look at the permissions, or choose another directory"
        raise OSError(error.errno, message) from error
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def claimed(claims: Claims, what: str) -> Iterator[Confirm]:
    """Keep other writers out by a claim; `what`, the yielded function and the errors are those of `sole_writer`."""
    name, text = f"{CLAIM}{secrets.token_hex(8)}", json.dumps(_myself())
    _own.add(name)
    try:
        claims.put(name, text)
        _wait_until_alone(claims, name, what)
        with _renewing(claims, name, text):
            yield lambda: _require_held(claims, name, what)
    finally:
        _own.discard(name)
        with suppress(OSError):  # the claim expires by itself
            claims.remove(name)


def _wait_until_alone(claims: Claims, name: str, what: str) -> None:
    """Return once no other claim is left; of simultaneous claims the first by name stays, the others give way."""
    deadline = time.monotonic() + PATIENCE
    while True:
        times = claims.renewed()
        if name not in times:
            raise BlockingIOError(f"{what}: another writer took this one's claim away: try again")
        ages = {each: times[name] - renewed for each, renewed in times.items() if each != name}
        over = {each for each, age in ages.items() if age > LIFETIME or _is_of_the_dead(claims, each)}
        for each in over:
            claims.remove(each)
        rivals = ages.keys() - over
        if not rivals:
            return
        first = min(rivals)
        if first < name or time.monotonic() > deadline:
            raise BlockingIOError(_refusal(claims, first, ages[first], what))
        time.sleep(0.05)


def _refusal(claims: Claims, rival: str, age: float, what: str) -> str:
    holder = _holder(claims, rival)
    who = printable(f"process {holder.get('process')!s:.20} on {holder.get('host')!s:.80}")
    message = f"{what} is being written already, by {who}: wait for it, or choose another directory"
    if age < 2 * RENEWAL:
        return message
    return (
        f"{message}. It gave its last sign of life {age:.0f} seconds ago: if that process is gone, try again in "
        f"{max(1, LIFETIME - age):.0f} seconds, or remove {rival} there"
    )


@contextmanager
def _renewing(claims: Claims, name: str, text: str) -> Iterator[None]:
    """Renew a claim in the background until it ends or was removed, which is how another writer takes over."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEWAL):
            with suppress(OSError):  # the next renewal may succeed
                if name not in claims.renewed():
                    return
                claims.put(name, text)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _require_held(claims: Claims, name: str, what: str) -> None:
    if name not in claims.renewed():
        raise BlockingIOError(
            f"{what} was taken over by another writer, since this one gave no sign of life for {LIFETIME:.0f} seconds: "
            "what it had not finished is lost, start it again"
        )


def _is_of_the_dead(claims: Claims, name: str) -> bool:
    """Return whether a claim's holder is known to be gone: it was a process of this machine that no longer runs."""
    holder, me = _holder(claims, name), _myself()
    if "machine" not in me or any(holder.get(key) != me[key] for key in ("host", "machine")):
        return False
    process = holder.get("process")
    if process == me["process"]:
        return name not in _own
    return type(process) is int and not Path(f"/proc/{process}").exists()


def _holder(claims: Claims, name: str) -> dict[str, Any]:
    """Return what a claim says of its holder; an empty dict if the claim cannot be read."""
    try:
        holder = json.loads(claims.read(name))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _myself() -> dict[str, Any]:
    """Identify this process; "machine" tells containers on one host apart, and is left out where unknown."""
    me: dict[str, Any] = {"host": platform.node(), "process": os.getpid()}
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        me["machine"] = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return me
