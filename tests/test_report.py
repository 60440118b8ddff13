"""The report without a browser: what it says is what the run holds, and what strangers wrote stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stripe import load_example, report, stats
from stripe.cli import main
from stripe.gate import Gate
from stripe.report.content import RECORDS, address, document, judged, learned_vectors
from stripe.report.packing import MAX_TEXT, pack, plain, quantise, spread
from stripe.report.panels import choose
from stripe.store import Run, RunWriter, open_run
from tests.runs import record, writer

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "{{SCRIPT}}\"'`&lt;<!--",
    "__proto__",
)
HARMLESS = ("layer1", "layer2", "layer3", "layer4")


def record_named(path: str | Path, names: tuple[str, ...], **texts: Any) -> Run:
    """Record three epochs of 12 images, squeeze too, with a stripe that settles and one value that is not finite."""
    gates = [Gate(name, 5 + i) for i, name in enumerate(names)]
    rng = np.random.default_rng(0)
    with writer(path, gates=gates, squeeze=True, **texts) as run:
        for epoch in (1, 2, 4):
            values = {g.name: rng.normal(g.channels, 1 / epoch, (12, g.channels)).astype(np.float32) for g in gates}
            values[names[0]][3, 2] = np.nan
            with run.epoch(epoch) as rows:
                labels = np.arange(12) % 3 - 1
                rows.append(np.arange(12) * 7, labels, values, {name: 9 * each for name, each in values.items()})
    return open_run(path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return record_named(tmp_path / "run", HARMLESS)


@pytest.fixture
def hostile(tmp_path: Path) -> Run:
    texts = {HOSTILE[0]: HOSTILE[1], "line\u2028end\u2029": "\u202e\ud800", "nested": [{"</style>": HOSTILE[0]}]}
    return record_named(tmp_path / "hostile", HOSTILE, model=texts, data={HOSTILE[1]: HOSTILE[0]})


class Elements(HTMLParser):
    """Lists the tags of a page with their attributes, and the text inside each script and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[Any, ...]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, tuple(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.texts.append(data)


def data_of(page: str) -> dict[str, Any]:
    [block] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(block)


def content_of(page: str) -> dict[str, Any]:
    """Return what the page holds in all, and of its first run, in one mapping."""
    data = data_of(page)
    return data | data["runs"][0]


def unpack(content: dict[str, Any], gate: int, panel: int) -> np.ndarray:
    """Undo quantise and pack for one panel, as page.js does: (images, channels)."""
    found = content["heatmaps"]["gates"][gate]
    images = content["heatmaps"]["images"][content["heatmaps"]["images_of"][panel // 2]]
    rows, width = len(images["samples"]), len(found["channels"])
    codes = np.frombuffer(zlib.decompress(base64.b64decode(found["panels"])), np.uint8).reshape(-1, rows + 1, width)
    codes = codes[panel, 1:] + codes[panel, :1]
    low, high = found["ranges"][panel]
    return np.where(codes > 0, low + (codes - 1.0) / 254 * (high - low), np.nan)


# ---- strangers' texts ------------------------------------------------------------------------------------


def test_no_text_of_a_run_becomes_an_element(run, hostile):
    evil = {"</script>": [{HOSTILE[0]: HOSTILE[1]}]}
    page = report.render(hostile, fold=evil, command=HOSTILE[0])
    assert Elements(page).tags == Elements(report.render(run)).tags
    assert [gate["name"] for gate in content_of(page)["gates"]] == list(HOSTILE)
    assert Elements(page + HOSTILE[1]).tags != Elements(page).tags  # the reader of tags sees


def test_the_data_block_holds_no_character_that_html_or_script_reads(hostile):
    page = report.render(hostile)
    block = page.split('id="data">', 1)[1].split("</script>", 1)[0]
    assert not set(block) & set("<>&\u2028\u2029")
    facts = {key: value for section in content_of(page)["about"] for key, value in section["facts"]}
    assert facts[HOSTILE[0]] == HOSTILE[1]
    assert facts["line\u2028end\u2029"] == "\u202e?"  # a lone surrogate cannot be written


def test_the_policy_allows_this_script_and_style_alone(run):
    page = report.render(run)
    [policy] = [attrs[1][1] for tag, attrs in Elements(page).tags if attrs and "Security" in str(attrs[0][1])]
    style, data, script = Elements(page).texts
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\bFunction\(", script)
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}


# ---- numbers ---------------------------------------------------------------------------------------------


def test_figures_are_those_of_stats(run):
    content, table = content_of(report.render(run, tolerance=0.2)), stats.summarize(run)
    for gate in content["gates"]:
        rows = table[table["gate"] == gate["name"]]
        for name in ("strength", "strength_low", "strength_high", "cv", "std", "drift", "label_share", "sample_share"):
            shown = np.array(gate["curves"][name], float)
            np.testing.assert_allclose(shown, rows[name], rtol=1e-4)
        assert gate["settled"] == stats.settled_epoch(rows["epoch"], rows["drift"], 0.2)
        assert gate["flags"] == rows["flags"].tolist()
        stripe = run.moments([4], [gate["name"]])[4, gate["name"]]
        np.testing.assert_allclose(np.array(gate["mean"], float), stripe.mean, rtol=1e-4)
        np.testing.assert_allclose(np.array(gate["std"], float), stripe.std, rtol=1e-4)
    assert [gate["flags"][-1] for gate in content["gates"]] == ["nonfinite", "", "", ""]
    assert len({gate["settled"] for gate in content["gates"]}) > 1


def test_heatmaps_are_the_recorded_values_to_half_a_step(run):
    content = content_of(report.render(run))
    heat = content["heatmaps"]
    assert heat["images"] == [{"samples": run.samples(4).tolist(), "labels": run.labels(4).tolist()}]
    for index, gate in enumerate(HARMLESS):
        for place, epoch in enumerate(run.epochs):
            for kind, values in enumerate((run.attention(gate, epoch), run.squeeze(gate, epoch))):
                panel = 2 * place + kind
                low, high = heat["gates"][index]["ranges"][panel]
                shown = unpack(content, index, panel)
                np.testing.assert_allclose(shown, values, rtol=0, atol=1.001 * (high - low) / 508)
                assert np.nanmax(np.abs(shown[::-1] - values)) > 10 * (high - low) / 508


def test_each_squeeze_is_measured_over_all_images(run, monkeypatch):
    monkeypatch.setattr("stripe.report.panels.SIZES", ((4, 3), (1, 1)))  # fewer are shown
    heat = content_of(report.render(run))["heatmaps"]
    for index, gate in enumerate(HARMLESS[1:], start=1):  # the first is not finite at one place
        for place, epoch in enumerate(run.epochs):
            squeeze = run.squeeze(gate, epoch)
            strength, cv = stats.stripe_strength(squeeze).strength, stats.coefficient_of_variation(squeeze)
            assert heat["gates"][index]["squeeze"][place] == pytest.approx([strength, cv], rel=1e-4)
            assert heat["gates"][index]["squeeze"][place] != pytest.approx(
                [stats.stripe_strength(squeeze[:4]).strength, stats.coefficient_of_variation(squeeze[:4])], rel=1e-2
            )


def test_class_means_are_of_all_images_with_a_label(run):
    gate = content_of(report.render(run))["gates"][1]
    values, labels = run.attention("layer2", 4), run.labels(4)
    found = gate["classes"]
    codes = np.frombuffer(base64.b64decode(found["codes"]), np.uint8).reshape(-1, gate["channels"])
    means = found["low"] + (codes - 1.0) / 254 * (found["high"] - found["low"])
    assert found["labels"] == [0, 1]
    expected = np.stack([values[labels == label].mean(0) for label in found["labels"]])
    np.testing.assert_allclose(means, expected, atol=1.01 * (found["high"] - found["low"]) / 508)
    assert np.abs(means[::-1] - expected).max() > 10 * (found["high"] - found["low"]) / 508


def test_a_run_without_two_classes_has_no_class_means(tmp_path):
    with writer(tmp_path / "run", gates=[Gate("gate", 2)]) as run, run.epoch(0) as rows:
        rows.append(range(4), [1, 1, 1, -1], {"gate": np.eye(4, 2)})
    assert content_of(report.render(open_run(tmp_path / "run")))["gates"][0]["classes"] is None


def test_quantising_keeps_the_ends_constants_and_what_is_not_finite():
    codes, low, high = quantise(np.array([[0.25, np.nan], [0.75, np.inf]], np.float32))
    assert codes.tolist() == [[1, 0], [255, 0]]
    assert (low, high) == (0.25, 0.75)
    assert quantise(np.full((2, 2), 0.1, np.float32))[1:] == (0.100000001, 0.100000001)
    assert quantise(np.full((2, 2), np.nan, np.float32))[1:] == (None, None)
    assert quantise(np.array([[-3e38, 3e38]], np.float32))[0].tolist() == [[1, 255]]


def test_differences_to_the_median_pack_stripes_smaller():
    rng = np.random.default_rng(0)
    stripes = (rng.integers(1, 250, 64) + rng.integers(0, 4, (100, 64))).astype(np.uint8)
    assert len(pack([stripes])) < 0.75 * len(base64.b64encode(zlib.compress(stripes.tobytes())))


# ---- a page of bounded size ------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (7, 5), (1000, 64)])
def test_spread_is_even_and_holds_both_ends(count, most):
    indices = spread(count, most)
    assert len(indices) == min(count, most)
    assert (indices[0], indices[-1]) == (0, count - 1)
    steps = np.diff(indices)
    assert not steps.size or steps.min() >= 1 and steps.max() - steps.min() <= 1


def test_panels_fit_the_room_and_use_it(run, monkeypatch):
    full = len(report.render(run))
    heatmaps = len(json.dumps(content_of(report.render(run))["heatmaps"]))
    monkeypatch.setattr(report, "RESERVE", 0)
    sizes = {}
    for room in (40 * heatmaps, heatmaps, heatmaps // 2):
        monkeypatch.setattr(report, "LIMIT", full - heatmaps + room)
        page = report.render(run)
        assert len(page) <= report.LIMIT
        heat = content_of(page)["heatmaps"]
        sizes[room] = len(heat["images"][0]["samples"]) * len(heat["gates"][-1]["channels"])
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert max(sizes.values()) == 12 * 8
    assert min(sizes.values()) < 12 * 8


def test_the_worst_case_leaves_something_to_see(run, monkeypatch):
    gates = [Gate(f"layer{i}", 64 * 2 ** (i // 18)) for i in range(54)]
    assert sum(gate.channels for gate in gates) == 8064
    monkeypatch.setattr(run, "gates", gates)
    monkeypatch.setattr(run, "epochs", list(range(1, 21)))
    choice = choose(run, report.LIMIT, samples=500)
    assert choice.bytes(2) <= report.LIMIT
    assert len(choice.epochs) == 20
    assert {len(channels) for channels in choice.channels.values()} == {64}
    assert choice.rows >= 50


def test_no_table_of_a_file_takes_the_page_beyond_its_limit(run, monkeypatch):
    records = [{f"column {i}": "x" * 300 for i in range(40)}] * 500
    page = report.render(run, fold={f"table {i}": records for i in range(6)})
    assert 1_000_000 < len(page) <= report.LIMIT
    tables = content_of(page)["fold"]["tables"]
    assert {len(table["rows"]) for table in tables} == {100}
    assert {table["note"] for table in tables} == {"Shown: the first 100 of 500 rows."}
    assert content_of(page)["heatmaps"]


def test_gates_that_do_not_fit_on_a_page_are_refused_and_heatmaps_give_way_first(run, monkeypatch):
    least = len(report.render(run, fold=None)) - len(json.dumps(content_of(report.render(run))["heatmaps"]))
    monkeypatch.setattr(report, "RESERVE", 0)
    monkeypatch.setattr(report, "LIMIT", least + 100)
    assert content_of(report.render(run))["heatmaps"] is None
    monkeypatch.setattr(report, "LIMIT", least // 2)
    with pytest.raises(ValueError, match=r"a page of \d+ gates .* record fewer gates"):
        report.render(run)


def test_images_are_the_same_at_every_epoch_that_holds_them(tmp_path):
    path, values = tmp_path / "run", np.arange(36, dtype=np.float32).reshape(12, 3)
    ids = {1: np.arange(12)[::-1], 2: np.arange(12) + 100, 3: np.arange(12)}
    with RunWriter(path, model={}, data={}, gates=[Gate("gate", 3)], allow_mixed=True) as run:
        for epoch, samples in ids.items():
            with run.epoch(epoch) as rows:
                rows.append(samples, None, {"gate": values[samples % 100]})
    heat = content_of(report.render(open_run(path)))["heatmaps"]
    assert heat["images_of"] == [0, 1, 0]
    assert [images["samples"] for images in heat["images"]] == [list(range(12)), list(range(100, 112))]
    assert set(heat["images"][0]["labels"]) == {-1}


def test_ids_beyond_a_double_stay_exact(tmp_path):
    with writer(tmp_path / "run", gates=[Gate("gate", 2)]) as run, run.epoch(0) as rows:
        rows.append(np.array([2**60 + 1, 5]), None, {"gate": np.ones((2, 2))})
    heat = content_of(report.render(open_run(tmp_path / "run")))["heatmaps"]
    assert heat["images"][0]["samples"] == [str(2**60 + 1), 5]


def test_the_rank_curve_is_that_of_the_last_epoch(tmp_path):
    run = load_example()
    gate = run.gates[-1].name
    content = content_of(report.render(run))
    found = next(each for each in content["gates"] if each["name"] == gate)["shares"]
    expected = stats.spectrum(run.attention(gate, run.epochs[-1]), sample_ids=run.samples(run.epochs[-1]))
    np.testing.assert_allclose(found, [expected.shares, expected.low, expected.high], rtol=1e-4)


# ---- other runs, and files beside them -------------------------------------------------------------------


def test_a_run_of_moments_has_stripes_and_no_heatmap(tmp_path):
    from stripe.stats import Moments

    values = np.random.default_rng(0).random((9, 4))
    with writer(tmp_path / "run", contents="moments") as run:
        for number in (1, 2):
            with run.epoch(number) as epoch:
                epoch.append(range(9), None, {"layer1.0.se": values, "layer2.0.se": values[:, :3]})
    content = content_of(report.render(open_run(tmp_path / "run")))
    assert content["heatmaps"] is None
    assert content["gates"][0]["rank"] is None
    assert content["gates"][0]["shares"] is None
    np.testing.assert_allclose(content["gates"][0]["mean"], Moments.of(values).mean, rtol=1e-4)


VALIDATION = {
    "epoch": 2,
    "learned": {"layer2": [0.5] * 6},
    "accuracies": {"stripe": 71.25},
    "gates": [{"gate": "layer2", "r": 0.5, "verdict": "match"}],
}


def test_a_validation_brings_its_vectors_and_its_epochs_stripe(run):
    content = content_of(report.render(run, validation=VALIDATION))
    assert [gate["learned"] for gate in content["gates"]] == [None, [0.5] * 6, None, None]
    assert content["stripe_epoch"] == 2
    np.testing.assert_allclose(content["gates"][1]["mean"], run.attention("layer2", 2).mean(0), rtol=1e-4)
    assert ["accuracies: stripe", 71.25] in content["validation"]["facts"]
    assert "learned" not in {key for key, _ in content["validation"]["facts"]}
    assert [name for name, _ in content["validation"]["tables"][0]["columns"]] == ["gate", "verdict", "r"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epoch": 3}, "epoch 3"),
        ({"epoch": True}, "epoch True"),
        ({"learned": None}, "no vectors"),
        ({"learned": {"other": [1.0]}}, "'other'.*expected no numbers"),
        ({"learned": {"layer2": [0.5] * 5}}, "'layer2'.*expected 6 numbers"),
        ({"learned": {"layer2": ["0.5"] * 6}}, "'layer2'.*expected 6 numbers"),
        ({"learned": {"layer2": 6}}, "'layer2'.*expected 6 numbers"),
    ],
)
def test_a_foreign_validation_is_refused(run, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        report.render(run, validation=VALIDATION | change)
    assert "\n" not in str(caught.value)


def test_the_files_own_legend_explains_heads_and_verdicts():
    row = {"gate": "layer2", "r": 0.5, "limit": 0.001, "verdict": "match"}
    legend = {"gates": {"limit": "what is allowed"}, "verdict": {"match": "it is the same"}}
    found = judged({"gates": [row, row], "legend": legend, "epoch": 3}, RECORDS[0])
    main, further = found["tables"]
    assert main["columns"] == [["gate", ""], ["verdict", ""], ["limit", "what is allowed"]]
    assert [name for name, _ in further["columns"]] == ["gate", "r"]
    assert found["words"] == [["match", "it is the same"]]
    assert found["summary"] == "Of 2 gates: 2 match."
    assert found["facts"] == [["epoch", 3]]
    assert judged({"gates": [row], "conclusion": "All is well."}, RECORDS[0])["summary"] == "All is well."
    assert judged({"gates": [row], "legend": {"gates": 3, "verdict": [1]}}, RECORDS[0])["words"] == []


def test_training_curves_stand_beside_the_run(run):
    assert content_of(report.render(run))["metrics"] is None
    beside = Path(run.path, "metrics.csv")
    beside.write_text("epoch,lr,train_loss,val_accuracy,note\n1,0.1,2.5,,a\n2,0.1,1.25,60,b\n")
    found = content_of(report.render(run))["metrics"]
    assert found == {"epoch": [1, 2], "lr": [0.1, 0.1], "train_loss": [2.5, 1.25], "val_accuracy": [None, 60]}
    beside.write_text("epoch,train_loss\n" + "".join(f"{epoch},1\n" for epoch in range(2 * RECORDS[0])))
    assert len(content_of(report.render(run))["metrics"]["epoch"]) == RECORDS[0]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "epoch,train_loss\nx,1\n", "epoch\n" + "9" * 200_000])
def test_curves_without_epochs_are_refused(run, text):
    Path(run.path, "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.csv of run") as caught:
        report.render(run)
    assert "\n" not in str(caught.value)


def test_two_runs_share_a_page_of_the_same_size(run, tmp_path, monkeypatch):
    other = record_named(tmp_path / "other", ("layer2", "layer3", "more"))
    data = data_of(report.render(run, other=other, validation=VALIDATION))
    assert [each["name"] for each in data["runs"]] == [run.path, other.path]
    assert [gate["name"] for gate in data["runs"][1]["gates"]] == ["layer2", "layer3", "more"]
    assert [each["gates"][0]["learned"] for each in data["runs"]] == [None, None]
    whole = len(report.render(run, other=other))
    monkeypatch.setattr(report, "RESERVE", 0)
    monkeypatch.setattr(report, "LIMIT", whole - 200)
    assert len(report.render(run, other=other)) <= whole - 200
    stranger = record_named(tmp_path / "stranger", ("block",))
    with pytest.raises(ValueError, match="no gate of the same name"):
        report.render(run, other=stranger)


def test_any_records_become_a_table():
    found = document(
        {"measure": "accuracy", "rows": [{"gate": "a", "drop": 0.123456}, {"gate": "b", "into": ["x"]}]}, RECORDS[0]
    )
    assert found["facts"] == [["measure", "accuracy"]]
    [table] = found["tables"]
    assert [name for name, _ in table["columns"]] == ["gate", "drop", "into"]
    assert table["rows"] == [["a", 0.12346, None], ["b", None, '["x"]']]
    assert table["note"] == ""
    long = document({"rows": [{str(i): i for i in range(50)}] * 501}, RECORDS[0])["tables"][0]
    assert (len(long["rows"]), len(long["columns"])) == (500, 40)
    assert long["note"] == "Shown: the first 500 of 501 rows and the first 40 of 50 columns."


def test_plain_is_finite_short_and_writable():
    assert plain(float("nan")) is None
    assert plain(2**60) == str(2**60)
    assert plain(True) is True
    assert len(str(plain("x" * 10**6))) == MAX_TEXT + 3


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("runs/a?b@c", "runs/a?b@c"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("s3://KEY:SECRET@bucket/run?secret=SECRET#SECRET", "s3://bucket/run"),
    ],
)
def test_keys_in_an_address_stay_out(path, shown):
    assert address(path) == shown


@pytest.mark.slow
def test_a_run_in_a_bucket_is_reported_without_its_keys(tmp_path, monkeypatch):
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    try:
        host = "{}:{}".format(*moto.get_host_and_port())
        client = boto3.client("s3", endpoint_url=f"http://{host}", region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        uri = f"s3://bucket/run?endpoint_override={host}&scheme=http&region=us-east-1"
        remote, local = record_named(uri, HARMLESS), record_named(tmp_path / "run", HARMLESS)
        client.put_object(Bucket="bucket", Key="run/validation.json", Body=json.dumps(VALIDATION))
        out = tmp_path / "report.html"
        assert main(["report", uri, "--out", str(out)]) == 0
        client.close()
    finally:
        moto.stop()
    found, same = content_of(out.read_text()), content_of(report.render(local, validation=VALIDATION))
    assert found["name"] == "s3://bucket/run"
    assert found["name"] == address(remote.path)
    assert host not in out.read_text()
    assert [found[key] for key in ("gates", "heatmaps")] == [same[key] for key in ("gates", "heatmaps")]


# ---- the command -----------------------------------------------------------------------------------------


def test_the_command_finds_the_files_beside_the_run(run, tmp_path, capsys):
    Path(run.path, "validation.json").write_text(json.dumps(VALIDATION))
    Path(run.path, "fold.json").write_text(json.dumps({"rows": [{"gate": "layer1", "drop": 0.5}]}))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"rows": [{"gate": "layer1", "drop": 0.25}]}))
    out = tmp_path / "new" / "report.html"
    words = ["report", run.path, "--out", str(out)]
    assert main(words) == 0
    assert re.search(r"report.html: 0\.\d\d MB", capsys.readouterr().out)
    found = content_of(out.read_text())
    assert found["stripe_epoch"] == 2
    assert found["fold"]["tables"][0]["rows"] == [["layer1", 0.5]]
    assert main([*words, "--fold", str(other)]) == 0
    assert content_of(out.read_text())["fold"]["tables"][0]["rows"] == [["layer1", 0.25]]
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_the_command_on_the_page_is_the_one_that_makes_it(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record_named(tmp_path / "b c", HARMLESS)
    Path("v.json").write_text(json.dumps(VALIDATION))
    Path("f.json").write_text(json.dumps({"rows": [{"gate": "layer1", "drop": 0.5}]}))
    choices = "--validation v.json --fold f.json --tolerance 0.25 --out page.html".split()
    assert main(["report", run.path, "b c", *choices]) == 0
    page = Path("page.html").read_text()
    program, *words = shlex.split(data_of(page)["command"])
    assert program == "stripe"
    assert main(words) == 0
    assert Path("page.html").read_text() == page
    assert main([*words, "--tolerance", "0.5"]) == 0
    assert Path("page.html").read_text() != page


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[" * 10**5, "\udcff"])
def test_a_broken_file_is_one_line_and_leaves_the_old_page(run, tmp_path, capsys, text):
    Path(run.path, "validation.json").write_bytes(text.encode(errors="surrogateescape"))
    out = tmp_path / "report.html"
    out.write_text("old")
    assert main(["report", run.path, "--out", str(out)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "validation" in line
    assert out.read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_what_is_no_run_or_no_place_is_refused(run, tmp_path, capsys):
    assert main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "a.html")]) == 2
    assert "is not a run" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert main(["report", run.path, "--out", str(tmp_path / "folder")]) == 2
    assert "folder" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))
    with writer(tmp_path / "empty"):
        pass
    assert main(["report", str(tmp_path / "empty"), "--out", str(tmp_path / "a.html")]) == 2
    assert "no finished epoch" in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


def test_the_same_run_gives_the_same_page(tmp_path):
    run = open_run(record(tmp_path / "run", 1, 2))
    assert report.render(run) == report.render(run)
    assert report.render(run) != report.render(run, tolerance=0.3)


def test_the_example_run_is_reported_with_the_vectors_of_its_gates(tmp_path):
    run = load_example("cifar10-se-resnet20")
    learned = json.loads(Path(run.path, "validation.json").read_text())
    found = learned_vectors(run, learned)
    assert list(found) == [gate.name for gate in run.gates]
    assert len(found) < len(learned["learned"])  # the run was thinned to fewer gates
    with pytest.raises(ValueError, match="'other'.*expected no numbers"):
        learned_vectors(run, learned | {"learned": {"other": [0.5]}})
    assert main(["report", run.path, "--out", str(tmp_path / "report.html")]) == 0
