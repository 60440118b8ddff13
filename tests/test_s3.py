"""Runs on an object store: recorded, read, checked and repaired over S3's protocol, also when the connection drops."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from stripe.cli import main
from stripe.gate import Gate
from stripe.store import check_run, open_run, repair_run
from tests.runs import record, refused, vectors, writer

CUTS = "a connection to a real S3 server cut while writing or reading"
WIDE = (Gate("wide", 4096),)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Proxy:
    """Passes TCP connections on to a port; cuts them once so many bytes have passed, and refuses new ones."""

    def __init__(self, port: int) -> None:
        self._target, self.budget, self.cuts = ("127.0.0.1", port), float("inf"), 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            other = {client: server, server: client}
            while self.budget > 0:
                for readable in select.select([client, server], [], [], 0.1)[0]:
                    try:
                        data = readable.recv(65536)
                        other[readable].sendall(data)
                    except OSError:
                        return
                    if not data:
                        return
                    self.budget -= len(data)
            self.cuts += 1
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, no goodbye

    def close(self) -> None:
        self._server.close()


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """A real S3 server in its own process."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "moto_server"), "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.05)
        yield port
        process.kill()


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to that server, named to AWS clients by their usual environment variables."""
    proxy = Proxy(server)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fs.FileSystem.from_uri("s3://bucket/run?allow_bucket_creation=true")[0].create_dir("bucket")
    yield proxy
    proxy.close()


@pytest.fixture
def run_path(proxy: Proxy, request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name}"


def objects(path: str) -> dict[str, bytes]:
    files, root = fs.FileSystem.from_uri(path)
    infos = files.get_file_info(fs.FileSelector(root, recursive=True))
    return {
        info.path.removeprefix(f"{root}/"): files.open_input_file(info.path).read()
        for info in infos
        if info.type == fs.FileType.File
    }


def test_a_run_in_a_bucket_is_that_of_a_directory(run_path, tmp_path):
    record(run_path, 1, 2, samples=50)
    record(run_path, 2, 3, samples=50, seed=50, overwrite=True)
    record(tmp_path, 1, 2, samples=50)
    record(tmp_path, 2, 3, samples=50, seed=50, overwrite=True)
    found, local = open_run(run_path), open_run(tmp_path)
    assert found.epochs == local.epochs == [1, 2, 3]
    for epoch in found.epochs:
        np.testing.assert_array_equal(found.samples(epoch), local.samples(epoch))
        for gate in vectors(1):
            np.testing.assert_array_equal(found.attention(gate, epoch), local.attention(gate, epoch))
    stored = objects(run_path)
    del stored["run.json"]
    kept = [path for pattern in ("*.parquet", "*.moments") for path in tmp_path.rglob(pattern) if path.is_file()]
    assert stored == {str(path.relative_to(tmp_path)): path.read_bytes() for path in kept}
    with refused(FileNotFoundError, "s3://bucket/none", "is not a run"):
        open_run("s3://bucket/none")


def test_commands_take_addresses(run_path, tmp_path, capsys):
    record(run_path, 1, 2, samples=20)
    assert main(["stats", run_path]) == 0
    assert main(["check", run_path]) == 0
    assert main(["figures", run_path, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "drift.png").exists()
    assert main(["check", "s3://bucket/none"]) == 2
    assert "s3://bucket/none" in capsys.readouterr().err


def test_damage_in_a_bucket_is_repaired(run_path):
    record(run_path, 1, 2, 3, samples=20)
    files, root = fs.FileSystem.from_uri(run_path)
    name = "attention/epoch=0002/part-0000-000.parquet"
    cut = objects(run_path)[name][:-40]
    for path, content in ((name, cut), ("run.json", b"{")):
        with files.open_output_stream(f"{root}/{path}") as stream:
            stream.write(content)
    assert [bool(epoch.problem) for epoch in check_run(run_path).epochs] == [False, True, False]
    assert repair_run(run_path).whole
    assert open_run(run_path).epochs == [1, 3]
    assert cut in objects(run_path).values()
    np.testing.assert_array_equal(open_run(run_path).attention("layer1.0.se", 3), vectors(20, seed=3)["layer1.0.se"])


def record_wide(path: str, epoch: int) -> None:
    with writer(path, gates=WIDE) as run, run.epoch(epoch) as rows:
        for start in range(0, 1000, 250):
            rows.append(np.arange(start, start + 250), None, vectors(250, WIDE, seed=epoch + start))


def assert_whole(path: str, *epochs: int) -> None:
    run = open_run(path)
    assert run.epochs == list(epochs)
    for epoch in epochs:
        expected = np.concatenate([vectors(250, WIDE, seed=epoch + start)["wide"] for start in range(0, 1000, 250)])
        np.testing.assert_array_equal(run.attention("wide", epoch), expected)


@pytest.mark.slow
def test_a_connection_that_drops_while_recording_loses_only_the_unfinished_epoch(run_path, proxy, record_property):
    record_wide(run_path, 1)
    for budget in (2_000_000, 12_000_000):
        proxy.budget = budget
        with refused(OSError, run_path, "could not be written"):
            record_wide(run_path, 2)
        assert proxy.cuts
        proxy.budget = float("inf")
        assert_whole(run_path, 1)
        assert check_run(run_path).whole
        record_property(CUTS, 1)
    record_wide(run_path, 2)
    assert_whole(run_path, 1, 2)
    assert check_run(run_path).interrupted == ()


@pytest.mark.slow
def test_a_connection_that_drops_while_reading_is_no_damage(run_path, proxy, record_property):
    record_wide(run_path, 1)
    run = open_run(run_path)
    for budget in (300, 5_000_000):
        proxy.budget = budget
        with refused(OSError, run_path, "could not be read"):
            run.attention("wide", 1)
        record_property(CUTS, 1)
    for read in (repair_run, open_run):  # each tries again for six seconds, as above
        with refused(OSError, run_path, "could not be read"):
            read(run_path)
    proxy.budget = float("inf")
    assert_whole(run_path, 1)
    assert check_run(run_path).whole
