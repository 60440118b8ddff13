"""Hostile and damaged runs by the thousand: an error of one line or the values recorded, never anything else."""

from __future__ import annotations

import copy
import io
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from stripe.stats import summarize
from stripe.store import Manifest, check_run, open_run, repair_run
from stripe.store.directory import Directory
from stripe.store.moments import MOMENTS_SCHEMA
from stripe.store.parts import PartWriter, read_footer
from tests.killed import COUNTED, Files
from tests.runs import GATES, edit, listing, parts, record, vectors, writer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
DAMAGED = "Parquet files, their footers and run.json damaged or made up"
SETTINGS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def numbers(part: int, full: int) -> pytest.MarkDecorator:
    """How many cases a test tries: a part of them each time, in full where losses are counted."""
    return pytest.mark.parametrize("cases", [part, pytest.param(full, marks=pytest.mark.exhaustive)])


def campaign(check: Callable[..., None], cases: int, **strategies: st.SearchStrategy[Any]) -> int:
    """Try so many cases; return how many were tried."""
    tried = itertools.count()

    @settings(max_examples=cases, **SETTINGS)
    @given(**strategies)
    def try_one(**drawn: Any) -> None:
        next(tried)
        check(**drawn)

    try_one()
    return next(tried)


def refused_or(call: Callable[[], Any]) -> Any:
    """Return what the call gives, or None for the one kind of error that is allowed."""
    try:
        return call()
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 1500  # noqa: PT017
        return None


def read_all(path: Path) -> dict[int, dict[str, np.ndarray]]:
    """Read everything there is; what is refused is left out."""
    run = refused_or(lambda: open_run(path))
    found = {}
    for epoch in run.epochs if run else ():
        refused_or(lambda epoch=epoch: run.labels(epoch))
        values = refused_or(lambda epoch=epoch: {gate.name: run.attention(gate.name, epoch) for gate in run.gates})
        if values is not None and refused_or(lambda epoch=epoch: run.samples(epoch)) is not None:
            found[epoch] = values
    return found


# ---- run.json ----

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["../../x", "/etc/passwd", "part-0000-000.parquet", 2**60, 10**400, -1, "s3://x", "a\nb", "\0"])
)  # fmt: skip
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=9), v, max_size=3))


def mutated(manifest: Any, data: st.DataObject) -> Any:
    """Replace, remove or add something at up to three places of a manifest."""
    manifest = json.loads(json.dumps(manifest))
    for _ in range(data.draw(st.integers(1, 3))):
        place = manifest
        while isinstance(place, dict | list) and place:
            key = data.draw(st.sampled_from(range(len(place)) if isinstance(place, list) else sorted(place)))
            if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 3)) == 0:
                break
            place = place[key]
        if not isinstance(place, dict | list) or not place:
            continue
        match data.draw(st.sampled_from(["replace", "remove", "add", "repeat"])):
            case "replace":
                place[key] = data.draw(values)
            case "remove":
                del place[key]
            case "add" if isinstance(place, dict):
                place[data.draw(st.text(max_size=9))] = data.draw(values)
            case "repeat" if isinstance(place, list):
                place.append(place[key])
    return manifest


@numbers(200, 2000)
def test_any_json_is_a_manifest_or_refused(record_property, cases):
    def check(content: Any) -> None:
        refused_or(lambda: Manifest.from_json(json.dumps(content)))

    def check_text(content: bytes) -> None:
        assert refused_or(lambda: Manifest.from_json(content)) is None

    texts = cases // 4
    tried = campaign(check, cases - texts, content=values)
    tried += campaign(check_text, texts, content=st.binary(max_size=200))
    assert tried >= 0.95 * cases
    record_property(DAMAGED, tried)


@numbers(200, 2000)
def test_mutated_manifests_lead_nowhere_else(tmp_path, record_property, cases):
    run = record(tmp_path / "around/run", 1, 2)
    secret = tmp_path / "around/part-0000-000.parquet"  # where '..' would lead
    shutil.copy(run / parts(run)[0], secret)
    before, recorded = listing(tmp_path), read_all(run)
    manifest = json.loads((run / "run.json").read_text())
    assert len(recorded) == 2

    def check(data: st.DataObject) -> None:
        (run / "run.json").write_text(json.dumps(mutated(manifest, data)))
        for epoch, found in read_all(run).items():
            for gate, attention in found.items():
                assert any(np.array_equal(attention, each.get(gate)) for each in recorded.values()), (epoch, gate)
        refused_or(lambda: check_run(run))
        after = listing(tmp_path)
        after["around/run/run.json"] = before["around/run/run.json"]
        assert after == before

    tried = campaign(check, cases, data=st.data())
    assert tried >= 0.95 * cases
    record_property(DAMAGED, tried)


# ---- Parquet ----


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Flip bits, cut, insert, or overwrite a stretch."""
    position = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "flip", "flip", "cut", "insert", "overwrite"])):
        case "flip":
            flipped = bytearray(content)
            for place in {position, *data.draw(st.lists(st.integers(0, len(content) - 1), max_size=2))}:
                flipped[place] ^= 1 << data.draw(st.integers(0, 7))
            return bytes(flipped)
        case "cut":
            return content[:position]
        case "insert":
            return content[:position] + data.draw(st.binary(min_size=1, max_size=8)) + content[position:]
        case _:
            return (
                content[:position]
                + (new := data.draw(st.binary(min_size=1, max_size=8)))
                + content[position + len(new) :]
            )


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_every_single_bit_of_a_part_is_checked(tmp_path, record_property, every):
    """Flip each bit; a part where it matters is refused, one where it does not gives the values recorded.

    Of every twenty-fifth bit, all places within a byte are met.
    """
    run = record(tmp_path / "run", 1, samples=20)
    name, opened, recorded = run / parts(run)[0], open_run(run), read_all(run)[1]
    whole, recorded["labels"] = name.read_bytes(), opened.labels(1)
    refused = 0
    bits = range(0, 8 * len(whole), every)
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        name.write_bytes(flipped)
        values = refused_or(lambda: {gate.name: opened.attention(gate.name, 1) for gate in GATES})
        labels = refused_or(lambda: opened.labels(1))
        for gate, found in ((values or {}) | ({} if labels is None else {"labels": labels})).items():
            np.testing.assert_array_equal(found, recorded[gate])
        refused += values is None or labels is None
    assert refused > 0.9 * len(bits)
    assert 8 * len(whole) >= 20_000
    record_property("bits of a Parquet file flipped, one after another: an error or the recorded values", len(bits))


@numbers(150, 3000)
def test_damaged_parquet_gives_the_recorded_values_or_an_error(tmp_path, record_property, cases):
    run = record(tmp_path / "run", 1, 2, samples=20)
    name, recorded = run / parts(run)[0], read_all(run)
    whole = name.read_bytes()

    def check(data: st.DataObject) -> None:
        name.write_bytes(content := damaged(whole, data))
        found = read_all(run)
        assert 2 in found
        for epoch, values in found.items():
            for gate, attention in values.items():
                np.testing.assert_array_equal(attention, recorded[epoch][gate])
        assert 1 not in found or len(content) == len(whole)

    tried = campaign(check, cases, data=st.data())
    assert tried >= 0.95 * cases
    record_property(DAMAGED, tried)


def hostile_footers(folder: str, cases: int) -> int:
    """Read parts with foreign footers that the manifest vouches for, in little memory; return how many were tried."""
    run = record(Path(folder) / "run", 1, samples=20)
    name = run / parts(run)[0]
    whole = name.read_bytes()
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def check(data: st.DataObject) -> None:
        length = int.from_bytes(whole[-8:-4], "little") + 8
        footer = damaged(whole[-length:-8], data)
        name.write_bytes(whole[:-length] + footer + len(footer).to_bytes(4, "little") + whole[-4:])
        with Directory(run).files.open_input_file(parts(run)[0]) as stream:
            crc = zlib.crc32(refused_or(lambda: read_footer(stream)) or b"")
        edit(run, lambda m: m["epochs"][0]["parts"][0].update(bytes=name.stat().st_size, footer=crc))
        read_all(run)
        refused_or(lambda: check_run(run))
        (run / "run.json").rename(run / "hidden")
        refused_or(lambda: check_run(run))  # which rebuilds the manifest from what the footer says
        (run / "hidden").rename(run / "run.json")

    return campaign(check, cases, data=st.data())


def made_up(rows: list[dict[str, Any]], data: st.DataObject) -> bytes:
    """Return a file of moments with a row too few, too many or elsewhere, or with another value in a few places."""
    rows = copy.deepcopy(rows)
    for _ in range(data.draw(st.integers(1, 2))):
        place, other = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, len(rows) - 1))
        match data.draw(st.sampled_from(["change", "change", "change", "drop", "repeat", "swap"])):
            case "drop":
                del rows[place]
            case "repeat":
                rows.insert(other, rows[place])
            case "swap":
                rows[place], rows[other] = rows[other], rows[place]
            case "change":
                field = data.draw(st.sampled_from(list(MOMENTS_SCHEMA)))
                drawn = st.text(max_size=2) if field.name == "gate" else st.sampled_from([-1, 0, 1, 2, 8, 2**40, 2**53])
                if pa.types.is_list(field.type):
                    elements = [False, True] if field.name == "broken" else [0, 1]
                    drawn = st.lists(st.none() | st.sampled_from(elements), max_size=9)
                rows[place][field.name] = data.draw(st.none() | drawn if field.nullable else drawn)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=MOMENTS_SCHEMA), sink)
    return sink.getvalue()


def hostile_moments(folder: str, cases: int) -> int:
    """Read damaged files of moments that the manifest vouches for, in little memory; return how many were tried."""
    run = record(Path(folder) / "run", 1, samples=20)
    [name] = (run / ".moments").rglob("*.moments")
    whole, rows = name.read_bytes(), pq.read_table(name).to_pylist()
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    read = 0

    def check(data: st.DataObject) -> None:
        nonlocal read
        content = made_up(rows, data) if data.draw(st.booleans()) else whole[:-3000] + damaged(whole[-3000:], data)
        name.write_bytes(content)
        edit(run, lambda m: m["epochs"][0].update(moments=zlib.crc32(content)))
        read += refused_or(lambda: open_run(run).moments([1])) is not None
        refused_or(lambda: summarize(run))
        refused_or(lambda: check_run(run))

    tried = campaign(check, cases, data=st.data())
    assert 0 < read < tried
    return tried


@pytest.mark.parametrize("hostile", [hostile_footers, hostile_moments])
@numbers(150, 3000)
def test_what_the_manifest_vouches_for_is_read_in_little_memory(tmp_path, record_property, hostile, cases):
    call = f"t.{hostile.__name__}({str(tmp_path)!r}, {cases})"
    code = f"import os, tests.test_fuzz_store as t; os.write(1, b'%d' % {call})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert int(ended.stdout) >= 0.95 * cases
    record_property(DAMAGED, int(ended.stdout))


# ---- the store as a whole, against a dict ----


class Crash(BaseException):
    """The process is gone."""


class Store(RuleBasedStateMachine):
    """Records, fails, crashes, overwrites, damages and repairs a run; the model is a dict, epoch -> seed of values."""

    steps = 0
    epochs = st.integers(0, 3)
    seeds = st.integers(0, 9)

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path, self.model = self.folder / "run", dict[int, int]()
        with writer(self.path):
            pass

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def record(self, epoch: int, seed: int, overwrite: bool) -> None:
        record(self.path, epoch, seed=100 * seed, overwrite=overwrite)

    @rule(epoch=epochs, seed=seeds, overwrite=st.booleans())
    def finish(self, epoch: int, seed: int, overwrite: bool) -> None:
        if epoch in self.model and not overwrite:
            with pytest.raises(FileExistsError, match="already"):
                self.record(epoch, seed, overwrite)
        else:
            self.record(epoch, seed, overwrite)
            self.model[epoch] = seed

    @rule(epoch=epochs)
    def fail(self, epoch: int) -> None:
        def record_half() -> None:
            with writer(self.path, overwrite=True) as run, run.epoch(epoch) as rows:
                rows.append(range(4), None, vectors(4))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            record_half()

    @rule(epoch=epochs, seed=seeds, operation=st.integers(0, 25), repairing=st.booleans())
    def crash(self, epoch: int, seed: int, operation: int, repairing: bool) -> None:
        with pytest.MonkeyPatch.context() as patch:
            crash_at(operation, patch)
            try:
                repair_run(self.path) if repairing else self.record(epoch, seed, overwrite=True)
            except Crash:
                pass
        if not repairing and self.values(epoch) == values_of(epoch, seed):
            self.model[epoch] = seed

    @rule(epoch=epochs, keep=st.floats(0, 0.99))
    def cut_a_part(self, epoch: int, keep: float) -> None:
        if epoch in self.model:
            name = self.path / "attention" / f"epoch={epoch:04d}"
            for part in name.glob("*.parquet"):
                part.write_bytes(part.read_bytes()[: int(keep * part.stat().st_size)])
            del self.model[epoch]
            assert not check_run(self.path).whole
            assert repair_run(self.path).whole

    @rule(keep=st.floats(0, 0.99))
    def cut_the_manifest(self, keep: float) -> None:
        if self.model:
            record(self.path, 9)  # so that no interrupted recording casts doubt on an epoch
            manifest = (self.path / "run.json").read_bytes()
            (self.path / "run.json").write_bytes(manifest[: int(keep * len(manifest))])
            assert check_run(self.path).problem
            assert repair_run(self.path).whole
            self.forget(9)

    def forget(self, epoch: int) -> None:
        edit(self.path, lambda manifest: manifest["epochs"].pop())
        assert repair_run(self.path).unnamed == ()

    @rule()
    def repair(self) -> None:
        assert repair_run(self.path).interrupted == ()

    def values(self, epoch: int) -> dict[str, list[Any]] | None:
        run = open_run(self.path)
        return {gate.name: run.attention(gate.name, epoch).tolist() for gate in GATES} if epoch in run.epochs else None

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        Store.steps += 1
        assert open_run(self.path).epochs == sorted(self.model)
        assert {epoch: self.values(epoch) for epoch in self.model} == {
            epoch: values_of(epoch, seed) for epoch, seed in self.model.items()
        }
        assert check_run(self.path).whole


def values_of(epoch: int, seed: int) -> dict[str, list[Any]]:
    return {name: rows.tolist() for name, rows in vectors(6, seed=100 * seed + epoch).items()}


def crash_at(operation: int, patch: pytest.MonkeyPatch) -> None:
    """From that operation on, nothing is written any more."""
    numbers = itertools.count()

    def step(name: str, done: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(numbers) >= operation:
                raise Crash
            return done(*arguments, **options)

        return call

    prepare = Directory.__init__

    def init(self: Directory, path: Any) -> None:
        prepare(self, path)
        self.files = Files(self.files, step)  # type: ignore[assignment]

    patch.setattr(Directory, "__init__", init)
    patch.setattr(PartWriter, "write", step("write", PartWriter.write))
    assert "move" in COUNTED


@numbers(15, 100)
def test_the_store_agrees_with_a_dict(record_property, cases):
    Store.steps = 0
    run_state_machine_as_test(Store, settings=settings(max_examples=cases, stateful_step_count=20, **SETTINGS))
    assert Store.steps >= 10 * cases
    record_property("steps of a run's life in random order, crashes and damage among them, against a dict", Store.steps)
