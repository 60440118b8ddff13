"""Files from strangers: checkpoints, image and hub folders. No code runs, nothing is written, memory is bounded."""

import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from stripe.cli import main
from stripe.data import Loader, load_images
from stripe.models import ResNet, load_checkpoint, read_checkpoint, read_epoch

NETWORK = {"arch": "resnet", "depth": 11, "module": "senet"}
HUGE = 2**34


def weights(**changes):
    return ResNet(11, module="senet").state_dict() | changes


def checkpoint(**changes):
    return {"state_dict": weights(), "epoch": 1, "description": {"model": NETWORK}} | changes


def declared(**model):
    return checkpoint(description={"model": NETWORK | model})


class Call:
    """A pickle that calls something when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def rezipped(content, *, edit=lambda name, data: (name, data), compression=zipfile.ZIP_STORED):
    """A checkpoint whose archive was packed again, its entries edited."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(content))) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(*edit(entry.filename, old.read(entry)))
    return buffer.getvalue()


def expanding(name, data):
    """The pickle of a tensor of 4 values, declared to have HUGE of them in as large a storage."""
    count = b"\x8a\x05" + struct.pack("<Q", HUGE)[:5]
    return name, data.replace(b"K\x04tq", count + b"tq").replace(b"K\x04\x85", count + b"\x85")


def laughing(levels=60):
    """A value that holds itself 2**levels times."""
    value = ["ha"]
    for _ in range(levels):
        value = [value, value]
    return value


def endless():
    value = {}
    value["again"] = value
    return value


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../../storages"))
    return buffer.getvalue()


def safetensors(header, body=b"", length=None):
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def one_tensor(shape, end):
    return f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}'.encode()


four = {"w": torch.arange(4.0)}
legacy = {"_use_new_zipfile_serialization": False}
FILES = {
    "call.pt": lambda: saved(checkpoint(extra=Call(os.mkdir, "touched"))),
    "call_legacy.pt": lambda: saved(checkpoint(extra=Call(os.mkdir, "touched")), **legacy),
    "call_plain.pt": lambda: pickle.dumps(Call(os.mkdir, "touched")),
    "call_stack.pt": lambda: pickle.dumps(Call(os.mkdir, "touched"), protocol=5),
    "call_key.pt": lambda: saved({"state_dict": {Call(os.mkdir, "touched"): torch.zeros(1)}}),
    "bytearray.pt": lambda: saved(checkpoint(extra=Call(bytearray, HUGE))),
    "bytearray_legacy.pt": lambda: saved(checkpoint(extra=Call(bytearray, HUGE)), **legacy),
    "storage.pt": lambda: rezipped(four, edit=expanding),
    "storage_legacy.pt": lambda: expanding("", saved(four, **legacy))[1],
    "stride.pt": lambda: saved(weights(**{"fc.weight": torch.zeros(1, 1).expand(HUGE, 64)})),
    "shared.pt": lambda: saved(weights(**{f"extra{i}": torch.arange(2.0**17) for i in range(1)})
                               | dict.fromkeys(map(str, range(10_000)), torch.zeros(2**15))),
    "deflated.pt": lambda: rezipped(
        four, edit=lambda n, d: (n, bytes(2**28) if n.endswith("/0") else d), compression=zipfile.ZIP_DEFLATED
    ),
    "deflated_pickle.pt": lambda: rezipped(
        four, edit=lambda n, d: (n, d + bytes(2**28) if n.endswith(".pkl") else d), compression=zipfile.ZIP_DEFLATED
    ),
    "laughing.pt": lambda: saved(checkpoint(description={"model": NETWORK | {"depth": laughing()}})),
    "endless.pt": lambda: saved(checkpoint(description={"model": NETWORK | {"depth": endless()}})),
    "laughing_epoch.pt": lambda: saved(checkpoint(epoch=laughing())),
    "depth.pt": lambda: saved(declared(depth=9 * 10**9 + 2)),
    "depth_text.pt": lambda: saved(declared(depth="x" * 10**6)),
    "classes.pt": lambda: saved(declared(num_classes=10**10)),
    "repeats.pt": lambda: saved(declared(asr=True, repeats=10**9)),
    "option.pt": lambda: saved(declared(widths=[10**9])),
    "block.pt": lambda: saved(declared(block=["bottleneck"])),
    "hub_network.pt": lambda: saved(declared(arch="timm:hf-hub:nobody/nothing")),
    "hub_giant.pt": lambda: saved({**checkpoint(), "description": {
        "model": {"arch": "timm:vit_giant_patch14_clip_224:pretrained", "num_classes": 10}}}),
    "arch.pt": lambda: saved(declared(arch="os:getcwd")),
    "arch_list.pt": lambda: saved(declared(arch=["resnet"])),
    "key_path.pt": lambda: saved({"../../touched": torch.zeros(3), "/touched": torch.zeros(3)}),
    "entry_path.pt": lambda: rezipped(four, edit=lambda n, d: (f"../../touched/{n}", d)),
    "nan.pt": lambda: saved(weights(**{"bn1.weight": torch.full((16,), torch.nan)})),
    "shape.pt": lambda: saved(weights(**{"bn1.weight": torch.zeros(3)})),
    "scalar.pt": lambda: saved(weights(**{"fc.weight": torch.zeros(())})),
    "missing.pt": lambda: saved({key: value for key, value in weights().items() if "layer2" not in key}),
    "empty.pt": lambda: saved({"state_dict": {}}),
    "texts.pt": lambda: saved({"state_dict": {"a": "b"}}),
    "sparse.pt": lambda: saved(weights(**{"bn1.weight": torch.zeros(16).to_sparse()})),
    "meta.pt": lambda: saved(weights(**{"fc.weight": torch.empty(HUGE, 64, device="meta")})),
    "complex.pt": lambda: saved(weights(**{"bn1.weight": torch.zeros(16, dtype=torch.complex64)})),
    "list.pt": lambda: saved([1, 2]),
    "tar.pt": tarred,
    "cut.pt": lambda: saved(checkpoint())[:-1000],
    "cut_legacy.pt": lambda: saved(checkpoint(), **legacy)[:-1000],
    "head.pt": lambda: b"PK\x03\x04",
    "nothing.pt": lambda: b"",
    "text.pt": lambda: b"not a checkpoint\n" * 10,
    "flipped.pt": lambda: flipped(saved(checkpoint()), 40_000),
    "header.safetensors": lambda: safetensors(b"{}", length=2**62),
    "header_large.safetensors": lambda: safetensors(b"{}" + b" " * 2**20, length=2**33),
    "offsets.safetensors": lambda: safetensors(one_tensor([2**32], 2**34), bytes(16)),
    "shape.safetensors": lambda: safetensors(one_tensor([2**62, 2**62], 16), bytes(16)),
    "json.safetensors": lambda: safetensors(b"[" * 10_000),
    "nothing.safetensors": lambda: b"",
}  # fmt: skip


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def refusal(capsys, *words):
    """The one line that a command fails with."""
    assert main([str(word) for word in words]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) < 1500
    return error


KINDS = "kinds of hostile checkpoints, image and hub folders: exit code 2 and one line"


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_checkpoint_is_one_line(tmp_path, monkeypatch, capsys, record_property, name):
    (tmp_path / "inner" / "most").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "inner" / "most")
    Path(name).write_bytes(FILES[name]())
    error = refusal(capsys, "collect", "--ckpt", name, "--samples", 4, "--out", "run")
    assert name in error
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "inner",
        "inner/most",
        f"inner/most/{name}",
    ]
    record_property(KINDS, 1)


def test_an_honest_checkpoint_is_read(tmp_path):
    """The control of the test above: the same helpers, nothing hostile."""
    for name, content in {
        "a.pt": saved(checkpoint()),
        "b.pt": saved(checkpoint(), **legacy),
        "c.pt": rezipped(checkpoint()),
        "d.pt": saved(checkpoint(epoch=np.float64(1), best=np.float32(0.5))),
    }.items():
        (tmp_path / name).write_bytes(content)
        loaded = load_checkpoint(tmp_path / name)
        assert loaded(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert read_epoch(tmp_path / "a.pt") == read_checkpoint(tmp_path / "b.pt").epoch == 1


def test_code_in_these_files_would_have_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO(FILES["call.pt"]()), weights_only=False)
    assert (tmp_path / "touched").is_dir()


def test_nan_is_told_where(tmp_path, capsys):
    (tmp_path / "nan.pt").write_bytes(FILES["nan.pt"]())
    error = refusal(capsys, "collect", "--ckpt", tmp_path / "nan.pt", "--list-gates")
    assert "not numbers (NaN) in 1 of" in error
    assert "'bn1.weight'" in error


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "absent"])
def test_what_is_no_file_is_not_opened(tmp_path, capsys, kind):
    path = tmp_path / "a.pt"
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}
    make.get(kind, lambda: None)()
    error = refusal(capsys, "collect", "--ckpt", path, "--list-gates")
    assert ("not found" if kind == "absent" else "is no regular file") in error
    error = refusal(capsys, "train", "--depth", 11, "--epochs", 1, "-c", tmp_path / "run", "--resume", path)
    assert "a.pt" in error


MEASURE = """
import sys, torch
from contextlib import contextmanager
from pathlib import Path
from stripe.models import load_checkpoint
def megabytes(field):
    return int(Path("/proc/self/status").read_text().partition(field)[2].split()[0]) / 1024
@contextmanager
def peak():
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = megabytes("VmRSS:")
    yield
    print(megabytes("VmHWM:") - before)
control, honest, *files = sys.argv[1:]
load_checkpoint(honest), load_checkpoint("timm:lcnet_050")  # and with it, timm
with peak():
    for file in files:
        try:
            load_checkpoint(file)
        except (ValueError, OSError):
            continue
        raise SystemExit(f"{file} was read")
with peak():
    torch.load(control, weights_only=True)  # without a look at it first
"""


def test_memory_does_not_follow_what_a_file_declares(tmp_path):
    for name, make in FILES.items():
        (tmp_path / name).write_bytes(make())
    (tmp_path / "control").write_bytes(saved({"extra": Call(bytearray, 2**29)}))
    (tmp_path / "honest").write_bytes(saved(checkpoint()))
    words = [tmp_path / "control", tmp_path / "honest", *(tmp_path / name for name in FILES)]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    guarded, unguarded = map(float, result.stdout.split())
    assert guarded < 150  # MB; the largest of these files is a bomb of 256 MB, most declare 16 GB or more
    assert unguarded > 400


# ---- images ------------------------------------------------------------------------------------------------


def encoded(side=20, form="PNG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def declared_png(side):
    """A PNG that declares side x side pixels and holds few."""
    content = bytearray(encoded())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zipfile.crc32(bytes(content[12:29])))
    return bytes(content)


BROKEN = {
    "cut.jpg": lambda: encoded(200, "JPEG")[:5000],
    "nothing.png": lambda: b"",
    "text.png": lambda: b"this is no image\n",
    "cut.png": lambda: encoded()[:-300],
    "other.png": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "large.png": lambda: declared_png(10_000),
    "bomb.png": lambda: declared_png(100_000),
    "flipped.png": lambda: flipped(encoded(), 60),
}


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(3):
                (tmp_path / "set" / split / name / f"{number}.png").write_bytes(encoded(20 + number))
    return tmp_path / "set"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named_and_nothing_recorded(tmp_path, folder, capsys, record_property, name):
    (tmp_path / "a.pt").write_bytes(saved(checkpoint()))
    words = ["collect", "--ckpt", tmp_path / "a.pt", "--dataset", f"imagefolder:{folder}", "--out", tmp_path / "run"]
    (folder / "test" / "a" / name).write_bytes(BROKEN[name]())
    error = refusal(capsys, *words)
    assert f"broken image '{folder}/test/a/{name}'" in error
    assert not (tmp_path / "run").exists()
    (folder / "test" / "a" / name).unlink()
    assert main([str(word) for word in words]) == 0
    record_property(KINDS, 1)


def test_a_pipe_among_images_is_not_waited_for(tmp_path, folder):
    os.mkfifo(folder / "test" / "b" / "9.png")
    with pytest.raises(ValueError, match=r"broken image '.*b/9\.png' \(no regular file\)"):
        load_images(f"imagefolder:{folder}", "test", size=8)


@pytest.mark.parametrize(
    "data", [{"size": 10**6}, {"size": "8"}, {"size": -1}, {"mean": "abc"}, {"std": [1, 2, float("nan")]}]
)
def test_what_a_checkpoint_says_of_images_is_not_believed(tmp_path, capsys, data):
    plain = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "a.pt").write_bytes(saved(checkpoint(description={"model": NETWORK, "data": plain | data})))
    refusal(
        capsys, "collect", "--ckpt", tmp_path / "a.pt", "--dataset", "digits", "--samples", 4, "--out", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


def test_enlarged_sets_are_resized_batch_by_batch(monkeypatch):
    held = load_images("digits", "test", size=48, samples=20)
    assert isinstance(held.images, torch.Tensor)
    monkeypatch.setattr("stripe.data.decoding.MEMORY_LIMIT", 10_000)
    lazy = load_images("digits", "test", size=48, samples=20, mean=held.mean, std=held.std)
    assert not isinstance(lazy.images, torch.Tensor)
    for one, other in zip(Loader(lazy, 8), Loader(held, 8), strict=True):
        assert torch.equal(one[0], other[0])


# ---- hub folders -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    yield tmp_path / "set"
    datasets.enable_progress_bars()


def table(path, *, labels, images=None, names=("cat", "dog")):
    import datasets

    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    pictures = [{"bytes": content, "path": None} for content in images or [encoded()] * len(labels)]
    made = datasets.Dataset.from_dict({"label": labels, "image": pictures}, features=features)
    changed = made.info.features | {"label": datasets.ClassLabel(names=list(names))}
    made.info.features = datasets.Features(changed)  # the file's word, which its values need not follow
    made.to_parquet(str(path))


def test_an_honest_hub_folder_is_read(hub):
    table(hub / "train.parquet", labels=[0, 1, 1])
    assert load_images(f"hf:{hub}", "train").labels.tolist() == [0, 1, 1]


def garbage(path):
    path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")


def cut(path):
    table(path, labels=[0, 1])
    path.write_bytes(path.read_bytes()[:-50])


def wrong_types(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table(path, labels=[0, 1])
    metadata = pq.read_schema(path).metadata
    pq.write_table(pa.table({"label": ["a", "b"], "image": [1.5, 2.5]}).replace_schema_metadata(metadata), path)


def wrong_metadata(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for_hub = {b"huggingface": b'{"info": {"features": {"label": {"_type": "os.system"}}}}'}
    pq.write_table(pa.table({"label": [0, 1]}).replace_schema_metadata(for_hub), path)


@pytest.mark.parametrize(
    "make",
    [
        garbage,
        cut,
        wrong_types,
        wrong_metadata,
        lambda path: table(path, labels=[0, 7]),
        lambda path: table(path, labels=[0, -5]),
        lambda path: table(path, labels=[0, None]),
        lambda path: table(path, labels=[0, 1], images=[encoded(), b"nothing"]),
        lambda path: table(path, labels=[0, 1], images=[encoded(), declared_png(100_000)]),
    ],
)
def test_a_wrong_hub_folder_is_one_line(tmp_path, hub, capsys, record_property, make):
    make(hub / "train.parquet")
    words = ["collect", "--ckpt", "timm:lcnet_050", "--dataset", f"hf:{hub}", "--split", "train", "--size", 64]
    refusal(capsys, *words, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    record_property(KINDS, 1)


def test_a_script_in_a_hub_folder_is_not_run(tmp_path, hub):
    (hub / "set.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')")
    with contextlib.suppress(FileNotFoundError, ValueError):
        load_images(f"hf:{hub}", "train")
    assert not (tmp_path / "touched").exists()


# ---- fuzzing -----------------------------------------------------------------------------------------------

tried = 0


@pytest.fixture(params=[150, pytest.param(600, marks=pytest.mark.exhaustive)])
def many(request):
    """How many cases each of these tests tries, as hypothesis wants it said."""
    checks = list(HealthCheck)
    return settings(max_examples=request.param, deadline=None, suppress_health_check=checks, database=None)


def refused_or_read(path):
    """Read a file; what refuses it is a ValueError or an OSError of one short line."""
    global tried
    tried += 1
    message = ""
    with contextlib.suppress(ValueError, OSError):
        try:
            load_checkpoint(path)
        except (ValueError, OSError) as error:
            message = str(error)
            raise
    assert "\n" not in message
    assert len(message) < 1500


@pytest.fixture
def place(tmp_path, record_property, many):
    """An empty folder two folders down."""
    global tried
    tried = 0
    folder = tmp_path / "inner" / "most"
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        yield folder
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"a.pt", "a.safetensors"}
    assert tried >= many.max_examples
    record_property("checkpoints mutated or made up: read, or refused in one line; no code run", tried)


KEYS = sorted(ResNet(11, module="senet").state_dict())
names = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(KEYS).flatmap(
        lambda key: st.sampled_from([f"module.{key}", f"{key}.vector", key.replace("0", "7")])
    ),
    st.text(max_size=30),
    st.sampled_from(
        ["../../touched", "/touched", "", ".", "..", "layer1.", "layer1.0.bn3.vector", "a.fused_bn.weight"]
    ),
)
shapes = st.lists(st.integers(0, 9), max_size=4)
kinds = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
tensors = st.builds(lambda shape, dtype: torch.zeros(shape, dtype=dtype), shapes, kinds)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
networks = st.dictionaries(
    st.sampled_from(["arch", "depth", "block", "module", "asr", "both", "num_classes", "repeats", "psi_init", "odd"]),
    st.one_of(
        plain, st.sampled_from(["resnet", "bottleneck", "basicblock", "senet", "timm:se", "timm:lcnet_050", 11, 20])
    ),
)


@pytest.mark.slow
def test_keys_and_shapes_of_any_kind_are_read_or_refused(place, many):
    @many
    @given(
        st.booleans(),
        st.dictionaries(names, st.one_of(tensors, plain), max_size=6),
        st.sets(st.sampled_from(KEYS), max_size=2),
    )
    def check(real, odd, left_out):
        state = {key: value for key, value in (weights() if real else {}).items() if key not in left_out}
        torch.save(state | odd, place / "a.pt")
        refused_or_read(place / "a.pt")

    check()


@pytest.mark.slow
def test_descriptions_of_any_kind_are_read_or_refused(place, many):
    @many
    @example({"depth": "\n"}, None, None)
    @given(networks, plain, plain)
    def check(network, epoch, data):
        description = {"model": {"arch": "resnet", "depth": 11} | network, "data": data}
        torch.save(checkpoint(epoch=epoch, description=description), place / "a.pt")
        refused_or_read(place / "a.pt")

    check()
