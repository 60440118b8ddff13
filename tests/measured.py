"""A process that reads many hostile checkpoints and measures each: memory, sockets, code run. Says the worst as JSON.

Usage: python -m tests.measured FOLDER FIRST COUNT
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from stripe.models import create_model, load_checkpoint

NETWORK = {"arch": "resnet", "depth": 11, "module": "senet"}
WEIGHTS = create_model(**NETWORK).state_dict()
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.mkdir", "subprocess.Popen"}
LONGEST = 1500  # characters of a refusal
events: list[str] = []


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def checkpoint(**changes: Any) -> dict[str, Any]:
    return {"state_dict": WEIGHTS, "epoch": 1, "description": {"model": NETWORK}} | changes


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return buffer.getvalue()


def entries_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {entry.filename: file.read(entry) for entry in file.infolist()}


def with_pickle(data: bytes, name: str = "archive/data.pkl") -> bytes:
    entries = {key: value for key, value in entries_of(saved({})).items() if not key.endswith("data.pkl")}
    return archive({name: data} | entries)


BASES = {"zip": saved(checkpoint()), "legacy": saved(checkpoint(), _use_new_zipfile_serialization=False)}
SAFE = save_safetensors(WEIGHTS)


# ---- what a stranger may make ----
def mutated(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        places = (chance.randrange(min(900, len(content))), -chance.randint(1, min(3000, len(content))))
        changed[chance.choice((*places, chance.randrange(len(content))))] = chance.randrange(256)
    return bytes(changed if chance.random() < 0.6 else changed[: chance.randrange(len(content))])


def broken(chance: random.Random) -> bytes:
    return mutated(BASES[chance.choice(sorted(BASES))], chance)


def broken_pickle(chance: random.Random) -> bytes:
    return archive({n: mutated(d, chance) if n.endswith(".pkl") else d for n, d in entries_of(BASES["zip"]).items()})


def odd_weights(chance: random.Random) -> bytes:
    dtypes = [torch.float32, torch.float16, torch.bool, torch.int8, torch.int64, torch.float64]
    state: dict[Any, Any] = dict(WEIGHTS) if chance.random() < 0.7 else {}
    for _ in range(chance.randint(1, 4)):
        key = chance.choice([*WEIGHTS, "fc.weight", "zero", "module.fc.weight", "layer1.0.bn3.vector", "\x1b[2J"])
        shape = [chance.choice([0, 1, 2, 64, 2**10, 2**20]) for _ in range(chance.randint(0, 3))]
        if torch.Size(shape).numel() <= 2**20:
            state[key] = torch.zeros(shape, dtype=chance.choice(dtypes))
        else:
            state[key] = torch.zeros(1).expand(shape)
    return saved(checkpoint(state_dict=state, description={"model": NETWORK} if chance.random() < 0.5 else {}))


DECLARED: dict[str, list[Any]] = {
    "arch": ["resnet", "torchvision:fasterrcnn_resnet50_fpn", "torchvision:deeplabv3_resnet50", "torchvision:vgg19",
             "torchvision:vit_h_14", "torchvision:fcos_resnet50_fpn", "timm:lcnet_050", "os:system", "resnet\x1b[2J"],
    "num_classes": [1, 10, 2**20, 10**10, -1, "ten"],
    "depth": [11, 20, 1001, 1_999, 9 * 10**9 + 2],
    "repeats": [1, 60, 10**9],
    "asr": [True, False],
    "block": ["bottleneck", "basicblock", "x" * 10_000],
    "widths": [10**9],
}  # fmt: skip


def declared(chance: random.Random) -> bytes:
    network = {key: chance.choice(DECLARED[key]) for key in chance.sample(sorted(DECLARED), chance.randint(1, 3))}
    state = WEIGHTS | {f"extra.{i}": torch.zeros(chance.choice([0, 1])) for i in range(chance.choice([0, 0, 0, 2_000]))}
    return saved(checkpoint(state_dict=state, description={"model": NETWORK | network}))


def copying(chance: random.Random) -> bytes:
    """A pickle that has one large object copied again and again, or builds many small ones."""
    names = ["collections\nOrderedDict", "collections\nCounter", "torch\nSize", "__builtin__\nset"]
    large = pickle.dumps(list(range(chance.choice([100, 50_000]))), 2)[2:-1]
    calls = chance.choice([10, 20_000])
    if chance.random() < 0.3:
        text = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6
        large, names = text + b"q\x05", ["_codecs\nencode"]
        call = b"c" + names[0].encode() + b"\nh\x05\x85R"
    else:
        call = b"c" + chance.choice(names).encode() + b"\nh\x05\x85R"
        large += b"q\x05"
    many = b"\x80\x02" + large + b"](" + call * calls + b"e."
    small = b"\x80\x02](" + chance.choice([b"]", b"}", b")", b"K\x01\x85"]) * chance.choice([100, 3_000_000]) + b"e."
    return with_pickle(chance.choice([many, small]))


def exponential(chance: random.Random) -> bytes:
    """A tuple that holds itself 2**n times, as a key, whose hash goes through all of it."""
    pair = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    return with_pickle(b"\x80\x02}K\x01q\x00" + pair + b"K\x01s.")


def hidden(chance: random.Random) -> bytes:
    """A bomb where a careless reader does not look: another case, another directory, beside the honest pickle."""
    bomb = pickle.dumps(OrderedDict([("a", bytearray(1))]), 2).replace(b"c__builtin__\nbytearray\n", b"")
    call = b"\x80\x02c__builtin__\nbytearray\n" + pickle.dumps(3 * 10**8, 2)[2:-1] + b"\x85R."
    kind = chance.randrange(4)
    if kind == 0:
        return with_pickle(call, chance.choice(["archive/DATA.PKL", "archive/Data.pkl", "archive/data.pkl\0x"]))
    if kind == 1:  # both names
        honest = entries_of(BASES["zip"])
        return archive(
            {"archive/DATA.PKL": call} | honest if chance.random() < 0.5 else honest | {"archive/DATA.PKL": call}
        )
    if kind == 2:  # two directories: Python takes the last, and a record of 64 bits can point at the first
        return two_directories(with_pickle(call), BASES["zip"])
    return with_pickle(bomb + call)


def two_directories(bomb: bytes, honest: bytes) -> bytes:
    """Both archives, one after the other; the file ends as the second does, but for a 64-bit record of the first."""
    start, length, count = [struct.unpack("<H2L", bomb[-12:-2])[i] for i in (2, 1, 0)]
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(bomb), 1)
    return bomb + record + honest[:-22] + locator + honest[-22:]


@cache
def long_header(count: int) -> bytes:
    tensors = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header


def broken_safetensors(chance: random.Random) -> bytes:
    return mutated(SAFE, chance) if chance.random() < 0.5 else long_header(chance.choice([5, 60_000]))


@cache
def many_entries(count: int) -> bytes:
    return archive({f"archive/data/{i}": b"" for i in range(count)} | entries_of(saved({})))


def crowded(chance: random.Random) -> bytes:
    """An archive of very many entries."""
    return many_entries(chance.choice([10, 60_000]))


MAKERS: list[tuple[Callable[[random.Random], bytes], int]] = [
    (broken, 35), (broken_pickle, 40), (odd_weights, 30), (declared, 15), (copying, 5), (exponential, 1), (hidden, 10),
    (broken_safetensors, 20), (crowded, 1),
]  # fmt: skip


# ---- what it costs ----
def megabytes(field: str) -> float:
    return int(Path("/proc/self/status").read_text().partition(field)[2].split()[0]) / 1024


def peak_of(path: Path) -> tuple[float, str]:
    """Return the memory above the start that reading takes, and why it was refused; "" where it was read."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, refusal = megabytes("VmRSS:"), ""
    try:
        load_checkpoint(path)
    except (ValueError, OSError) as error:
        refusal = str(error)
    return megabytes("VmHWM:") - before, refusal


def main(folder: Path, first: int, count: int) -> dict[str, Any]:
    load_checkpoint("timm:lcnet_050")  # the libraries take memory once
    makers, shares = zip(*MAKERS, strict=True)
    worst: dict[str, float] = {}
    refused, unclear = 0, []
    sys.addaudithook(lambda name, _: events.append(name) if name in FORBIDDEN or name.startswith("socket.") else None)
    for seed in range(first, first + count):
        chance = random.Random(seed)
        [make] = chance.choices(makers, shares)
        path = folder / ("a.safetensors" if make is broken_safetensors else "a.pt")
        path.write_bytes(make(chance))
        peak, refusal = peak_of(path)
        refused += bool(refusal)
        if not refusal.isprintable() or len(refusal) > LONGEST:
            unclear.append(refusal)
        excess = peak - 4 * path.stat().st_size / 2**20
        if excess > worst.get(make.__name__, -1e9):
            worst[make.__name__] = excess
            sys.stderr.write(f"{make.__name__} {seed}: {excess:.0f} MB beyond 4 times the file\n")
    return {"tried": count, "refused": refused, "unclear": unclear, "worst": worst, "events": events}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:4]))))
