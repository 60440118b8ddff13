"""Damaged runs: what is damaged is named, the rest stays readable, and repair loses nothing that is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stripe.cli import main
from stripe.store import Manifest, check_run, open_run, repair_run
from tests.runs import (
    edit,
    listing,
    parts,
    record,
    refused,
    sizes_of,
    vectors,
    writer,
)

TAP = {"path": "layer1.0.se", "call": 0, "side": "input", "position": 0}
PRODUCT = {"call": 0, "op": "mul", "operand": 0, "ordinal": 0, "copied": False}
HOSTILE_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer schema": (lambda m: m.update(schema=3, extra=1), "upgrade stripe"),
    "schema is true": (lambda m: m.update(schema=True), "schema"),
    "no gates": (lambda m: m.pop("gates"), "lacks 'gates'"),
    "no dtype": (lambda m: m.pop("dtype"), "dtype"),
    "unknown field": (lambda m: m.update(more=1), "more"),
    "unknown dtype": (lambda m: m.update(dtype="int8"), "float32, float16"),
    "dtype is a list": (lambda m: m.update(dtype=[]), "dtype"),
    "unknown contents": (lambda m: m.update(contents="rows"), "samples, moments"),
    "squeeze is a number": (lambda m: m.update(squeeze=1), "squeeze"),
    "model is a list": (lambda m: m.update(model=[1]), "model"),
    "gates are a number": (lambda m: m.update(gates=3), "iterable"),
    "gate is a string": (lambda m: m.update(gates=["a"]), "mapping"),
    "gate named twice": (lambda m: m["gates"].append(m["gates"][0]), "layer1.0.se"),
    "gate with a line break": (lambda m: m["gates"][0].update(name="a\nb"), "printable"),
    "gate with a key of two lines": (lambda m: m["gates"][0].update({"a\nb": 1}), "a b"),
    "gate without a name": (lambda m: m["gates"][0].update(name=""), "characters"),
    "absurd channels": (lambda m: m["gates"][0].update(channels=10**18), "channels"),
    "gate with a path of control characters": (lambda m: m["gates"][0].update(site="\x1b[2J"), "printable"),
    "gate before a number": (lambda m: m["gates"][0].update(before=0), "printable"),
    "gate before a text": (lambda m: m["gates"][0].update(after="fc"), "expected a list"),
    "gate of an unknown form": (lambda m: m["gates"][0].update(form="cubic"), "multiplicative, additive"),
    "layout without channels": (lambda m: m["gates"][0].update(layout="NHW"), "layout"),
    "layout with two channels": (lambda m: m["gates"][0].update(layout="NCHC"), "layout"),
    "layout of many dimensions": (lambda m: m["gates"][0].update(layout="NC" + "S" * 99), "layout"),
    "gate that is exclusive by word": (lambda m: m["gates"][0].update(exclusive="no"), "true or false"),
    "gate that is exclusive to no module": (lambda m: m["gates"][0].update(exclusive=True), "no module's output"),
    "gate pooled nowhere": (lambda m: m["gates"][0].update(pooled=True), "no tensor"),
    "gate without its flags": (lambda m: m["gates"][0].pop("squeeze"), "squeeze"),
    "tap of a tap": (lambda m: m["gates"][0].update(attention=TAP | {"path": TAP}), "printable"),
    "tap with an unknown side": (lambda m: m["gates"][0].update(attention=TAP | {"side": "top"}), "input, output"),
    "tap at a negative position": (lambda m: m["gates"][0].update(squeeze=TAP | {"position": -1}), "position"),
    "tap with another field": (lambda m: m["gates"][0].update(squeeze=TAP | {"run": "rm"}), "run"),
    "third operand": (lambda m: m["gates"][0].update(product=PRODUCT | {"operand": 2}), "operand"),
    "product in call true": (lambda m: m["gates"][0].update(product=PRODUCT | {"call": True}), "call"),
    "channels true": (lambda m: m["gates"][0].update(channels=True), "channels"),
    "epoch named twice": (lambda m: m["epochs"].append(m["epochs"][0]), "epochs"),
    "negative epoch": (lambda m: m["epochs"][0].update(epoch=-1), "epoch"),
    "epoch without parts": (lambda m: m["epochs"][0].update(parts=[]), "parts"),
    "part twice": (lambda m: m["epochs"][0].update(parts=m["epochs"][0]["parts"] * 2), "part names"),
    "part outside": (lambda m: m["epochs"][0]["parts"][0].update(name="../../part-0000-000.parquet"), "unsafe"),
    "absolute part": (lambda m: m["epochs"][0]["parts"][0].update(name="/etc/passwd"), "unsafe"),
    "part is a number": (lambda m: m["epochs"][0]["parts"][0].update(name=3), "unsafe"),
    "absurd rows": (lambda m: m["epochs"][0]["parts"][0].update(rows=10**30), "rows"),
    "no bytes": (lambda m: m["epochs"][0]["parts"][0].update(bytes=0), "bytes"),
}


@pytest.mark.parametrize(("change", "word"), HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS)
def test_a_manifest_is_read_strictly(tmp_path, change, word):
    edit(record(tmp_path, 1), lambda manifest: None)
    assert open_run(tmp_path).epochs == [1]
    edit(tmp_path, change)
    for opening in (open_run, writer):
        with refused(ValueError, str(tmp_path), "run.json is not usable", word):
            opening(tmp_path)


def test_a_cut_or_foreign_manifest(tmp_path, monkeypatch):
    whole = (record(tmp_path, 1) / "run.json").read_bytes()
    for text in (*(whole[:size] for size in range(0, len(whole) - 1, 97)), b"\xff\xfe", b"[" * 100_000, b"[]", b"7"):
        (tmp_path / "run.json").write_bytes(text)
        with refused(ValueError, str(tmp_path), "run.json is not usable"):
            open_run(tmp_path)
    (tmp_path / "run.json").write_bytes(whole)
    assert open_run(tmp_path).epochs == [1]
    monkeypatch.setattr("stripe.store.directory.MAX_TEXT_BYTES", 100)
    with refused(ValueError, "bytes of run.json"):
        open_run(tmp_path)


json_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
json_values = json_leaves | st.lists(json_leaves, max_size=2) | st.dictionaries(st.text(max_size=9), json_leaves)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded"), 1)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_change_of_the_manifest_is_refused_in_one_line_or_harmless(recorded, data):
    manifest = json.loads((recorded / "run.json").read_text())
    place: Any = manifest
    while True:
        key = data.draw(st.sampled_from(range(len(place)) if isinstance(place, list) else sorted(place)))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    try:
        found = Manifest.from_json(json.dumps(manifest))
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert Manifest.from_json(json.dumps(json.loads(json.dumps(manifest)))).gates == found.gates


def test_a_damaged_part_is_named_and_the_rest_stays_readable(tmp_path):
    run = open_run(record(tmp_path, 1, 2, samples=500))
    name = "attention/epoch=0001/part-0000-000.parquet"
    whole = (tmp_path / name).read_bytes()
    damages = {"cut": whole[:-100], "empty": b"", "other": b"x" * len(whole)}
    for position in np.random.default_rng(0).integers(4, len(whole) - 1000, 20):
        flipped = bytearray(whole)
        flipped[position] ^= 4
        damages[f"bit {position}"] = bytes(flipped)
    for damage in damages.values():
        (tmp_path / name).write_bytes(damage)
        try:
            values = run.attention("layer1.0.se", 1)
        except ValueError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
            assert f"{name} is damaged" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:  # the flipped bit lies in another column
            np.testing.assert_array_equal(values, vectors(500, seed=1)["layer1.0.se"])
            with refused(ValueError, name):
                list(run.batches(1)), run.samples(1), run.labels(1)
        np.testing.assert_array_equal(run.attention("layer1.0.se", 2), vectors(500, seed=2)["layer1.0.se"])


@pytest.mark.parametrize("change", [{"samples": 7}, {"dtype": "float16"}, {"squeeze": True}])
def test_a_part_that_is_not_what_the_manifest_says(tmp_path, change):
    run, other = record(tmp_path / "run", 1), record(tmp_path / "other", 1, **change)
    foreign = (other / parts(other)[0]).read_bytes()
    (run / parts(run)[0]).write_bytes(foreign)
    size = len(foreign)
    edit(run, lambda manifest: manifest["epochs"][0]["parts"][0].update(bytes=size, footer=None))
    with refused(ValueError, parts(run)[0], "7 rows; expected 6" if "samples" in change else "columns"):
        open_run(run).samples(1)


# ---- check and repair ---------------------------------------------------------------------------------------


def cut(path: Path, size: int = 60) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


PART = "attention/epoch=0002/part-0000-000.parquet"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda run: cut(run / PART),
    "bit of a page": lambda run: flip(run / PART, 200),
    "bit of the footer": lambda run: flip(run / PART, -100),
    "empty": lambda run: (run / PART).write_bytes(b""),
    "gone": lambda run: (run / PART).unlink(),
    "another epoch's": lambda run: shutil.copy(run / PART.replace("2", "1"), run / PART),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_epoch_is_told_and_taken_out(tmp_path, damage, capsys):
    values = open_run(record(tmp_path, 1, 2, 3, samples=100)).attention("layer1.0.se", 3)
    whole = check_run(tmp_path)
    assert whole.whole
    assert [(epoch.epoch, epoch.parts, epoch.rows, epoch.problem) for epoch in whole.epochs] == [
        (number, 1, 100, None) for number in (1, 2, 3)
    ]
    assert main(["check", str(tmp_path)]) == 0
    before = listing(tmp_path)
    assert main(["check", str(tmp_path), "--repair"]) == 0  # nothing to do
    assert listing(tmp_path) == before

    damage(tmp_path)
    found, damaged = check_run(tmp_path), listing(tmp_path)
    assert [epoch.epoch for epoch in found.epochs if epoch.problem] == [2]
    assert PART in str(found.epochs[1].problem)
    capsys.readouterr()
    assert main(["check", str(tmp_path), "--json", str(tmp_path / "check.json")]) == 1
    assert "2 epochs whole, 1 damaged" in capsys.readouterr().out
    said = json.loads((tmp_path / "check.json").read_text())
    assert [said["whole"], *(bool(epoch["problem"]) for epoch in said["epochs"])] == [False, False, True, False]

    assert main(["check", str(tmp_path), "--repair"]) == 0
    assert open_run(tmp_path).epochs == [1, 3]
    np.testing.assert_array_equal(open_run(tmp_path).attention("layer1.0.se", 3), values)
    aside = [content for name, content in listing(tmp_path).items() if name.startswith(".damaged/attention/")]
    assert aside == ([damaged[PART]] if PART in damaged else [])
    repaired = listing(tmp_path)
    assert repair_run(tmp_path).whole
    assert listing(tmp_path) == repaired
    assert open_run(record(tmp_path, 2, samples=100)).epochs == [1, 2, 3]
    assert {name: content for name, content in before.items() if name in parts(tmp_path)} == {
        name: listing(tmp_path)[name] for name in parts(tmp_path)
    }


@pytest.mark.parametrize("text", [None, b"", b"{", b'{"schema": 1}', b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("changes", [{"squeeze": True}, {"contents": "label-moments"}])
def test_a_lost_manifest_is_rebuilt_from_the_parts(tmp_path, text, changes):
    with writer(tmp_path, model={"depth": 20}, seeds={"train": 1}, **changes) as run:
        for number in (1, 2):
            with run.epoch(number) as epoch:
                squeeze = {"squeeze": vectors(9)} if "squeeze" in changes else {}
                epoch.append(range(9), [0, 1, 2] * 3, vectors(9, seed=number), **squeeze)
    before = open_run(tmp_path).manifest.to_json()
    (tmp_path / "run.json").unlink()
    if text is not None:
        (tmp_path / "run.json").write_bytes(text)
    found = check_run(tmp_path)
    assert found.problem
    assert not found.whole
    assert [epoch.problem for epoch in found.epochs] == [None, None]
    assert repair_run(tmp_path).whole
    after = json.loads(open_run(tmp_path).manifest.to_json())
    assert after.pop("created")
    assert after == {key: value for key, value in json.loads(before).items() if key != "created"}
    assert [content for name, content in listing(tmp_path).items() if ".damaged" in name] == [text] * (text is not None)


@pytest.mark.parametrize("contents", ["samples", "moments"])
def test_a_rebuilt_manifest_knows_steps_and_what_is_mixed(tmp_path, contents):
    """Steps and a second network stand in the parts alone; that samples differ, their rows tell."""
    with writer(tmp_path, model={"depth": 20}, contents=contents) as run:
        for number, step in ((1, 500), (2, None)):
            with run.epoch(number, step=step) as epoch:
                epoch.append(range(9), None, vectors(9, seed=number))
    with writer(tmp_path, model={"depth": 56}, contents=contents, allow_mixed=True) as run:
        with run.epoch(3, step=0) as epoch:
            epoch.append(range(9), None, vectors(9, seed=3))
    with writer(tmp_path, model={"depth": 20}, contents=contents, allow_mixed=True) as run, run.epoch(4) as epoch:
        epoch.append(range(8), None, vectors(8, seed=4))
    before = open_run(tmp_path).manifest
    assert before.mixed == (("network", "samples") if contents == "samples" else ("network",))
    (tmp_path / "run.json").unlink()
    assert repair_run(tmp_path).whole
    after = open_run(tmp_path)
    assert after.steps == {1: 500, 3: 0}
    assert after.manifest.mixed == before.mixed
    assert after.manifest.epochs == before.epochs


def test_rebuilding_leaves_out_what_was_not_finished(tmp_path):
    record(tmp_path, 1, 2, 3)
    (tmp_path / ".unfinished/epoch=0003").mkdir(parents=True)  # killed before its manifest was written
    (tmp_path / "run.json").unlink()
    with several_parts():
        record(tmp_path / "parts", 1, 2, samples=200)
    names = parts(tmp_path / "parts/attention/epoch=0002")
    assert len(names) > 2
    (tmp_path / "parts/attention/epoch=0002" / names[1]).unlink()
    (tmp_path / "parts/run.json").write_text("{")
    foreign = record(tmp_path / "foreign", 1, seed=5, model={"arch": "another"}) / parts(tmp_path / "foreign")[0]
    (tmp_path / "attention/epoch=0007").mkdir()
    shutil.move(foreign, tmp_path / "attention/epoch=0007")
    for folder, expected in ((tmp_path, [1, 2]), (tmp_path / "parts", [1])):
        assert repair_run(folder).whole
        assert open_run(folder).epochs == expected
        assert not check_run(folder).interrupted
        assert not check_run(folder).unnamed


def several_parts():
    return sizes_of(28 * 10, 1000)


def test_a_run_that_cannot_be_repaired_is_left_as_it_is(tmp_path, capsys):
    cut(record(tmp_path / "cut", 1) / parts(tmp_path / "cut")[0])
    (tmp_path / "cut/run.json").write_text("{")
    record(tmp_path / "newer", 1)
    edit(tmp_path / "newer", lambda manifest: manifest.update(schema=3))
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    for name, words in (
        ("cut", ("cannot be rebuilt",)),
        ("newer", ("upgrade",)),
        ("empty", ("not a run",)),
        ("no", ()),
    ):
        assert main(["check", str(tmp_path / name), "--repair"]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert all(word in error for word in words)
    assert main(["check", str(tmp_path / "cut")]) == 1
    after = listing(tmp_path)
    after.pop("cut/.lock", None)
    before.pop("cut/.lock", None)
    assert after == before
    assert not (tmp_path / "no").exists()


def test_a_run_that_is_being_recorded_is_not_repaired(tmp_path):
    with writer(record(tmp_path, 1, samples=4)) as run, run.epoch(2) as epoch:
        epoch.append(range(4), None, vectors(4))
        epoch._hand_over()
        epoch._wait()
        assert check_run(tmp_path).interrupted == (2,)
        assert check_run(tmp_path).whole
        with refused(BlockingIOError, "being written already"):
            repair_run(tmp_path)
    assert open_run(tmp_path).epochs == [1, 2]
    assert check_run(tmp_path).interrupted == ()


def test_repeated_samples_are_damage(tmp_path):
    run, other = record(tmp_path / "run", 1), record(tmp_path / "other", 1)
    shutil.copy(other / parts(other)[0], run / "attention/epoch=0001/part-0001-000.parquet")
    edit(run, lambda m: m["epochs"][0]["parts"].append(m["epochs"][0]["parts"][0] | {"name": "part-0001-000.parquet"}))
    assert "samples come twice: 0, 1, 2" in str(check_run(run).epochs[0].problem)


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
    class Past(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(1970, 1, 2, tzinfo=tz)

    record(tmp_path, 1)
    for path in tmp_path.rglob("*"):
        os.utime(path, (4e9, 4e9))  # in the future
    monkeypatch.setattr("stripe.store.writing.datetime", Past)
    assert open_run(record(tmp_path, 2)).epochs == [1, 2]
    assert open_run(record(tmp_path, 1, seed=9, overwrite=True)).epochs == [1, 2]
    np.testing.assert_array_equal(open_run(tmp_path).attention("layer1.0.se", 1), vectors(6, seed=10)["layer1.0.se"])
    assert open_run(record(tmp_path / "new", 1)).manifest.created.startswith("1970")
    assert check_run(tmp_path).whole
