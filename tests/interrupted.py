"""A process that has every library loaded and forks children, each of which is a command that is interrupted.

One JSON request per line of stdin, {"words", "folder", "seconds"}; one answer per line of stdout, {"code", "seconds"}.
The child works in `folder`/work, has `folder`/temporary for its temporary files, and prints into `folder`/said. After
so many seconds it gets the signal of Ctrl-C, as do all the processes that it started; without any it ends by itself.
"""

import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import stripe
from stripe.cli import main

PATIENCE = 300.0  # seconds after which a command that does not end is killed


def load_everything() -> None:
    for module in pkgutil.walk_packages(stripe.__path__, "stripe."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("onnx", "sklearn.datasets", "torchvision"):  # onnxruntime has a thread, with which nothing may fork
        importlib.import_module(name)


def command(words: list[str], folder: Path, ready: int) -> NoReturn:
    os.setsid()
    os.chdir(folder / "work")
    os.environ["TMPDIR"], tempfile.tempdir = str(folder / "temporary"), None
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said), (2, said)):
        os.dup2(source, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    sys.argv = ["stripe", *words]
    os.write(ready, b"!")
    raise SystemExit(main())


def answer(words: list[str], folder: str, seconds: float | None = None) -> dict[str, Any]:
    inlet, outlet = os.pipe()
    child = os.fork()
    if child == 0:
        command(words, Path(folder), outlet)
    os.close(outlet)
    os.read(inlet, 1)
    os.close(inlet)
    began = time.monotonic()
    if seconds is not None:
        time.sleep(seconds)
        os.killpg(child, signal.SIGINT)
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() - began > PATIENCE + (seconds or 0):
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    took = time.monotonic() - began
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "seconds": took, "left": alive(child)}


def alive(group: int) -> bool:
    """Tell whether a process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    load_everything()
    gc.freeze()  # or every child would copy all that was loaded, to look for garbage in it
    for request in sys.stdin:
        os.write(1, (json.dumps(answer(**json.loads(request))) + "\n").encode())
