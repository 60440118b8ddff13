"""The study of networks that others trained: its inputs and their truth, and the study itself on a small network."""

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import study
from studies import rendering, wild

import stripe
from stripe import graphs
from tests.test_graphs import C, Graph, images, squeeze_by_convolution


def test_what_is_drawn_follows_from_the_seed_alone():
    for draw in (rendering.lines, rendering.turned_pages, rendering.pages):
        (first, truth), (again, _), (other, _) = draw(3, 1), draw(3, 1), draw(3, 2)
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)
        assert first.dtype == np.float32
        assert len(truth) == 3


def test_the_boxes_of_a_page_hold_its_ink_and_nothing_else_does():
    rng = np.random.default_rng(0)
    for _ in range(5):
        image, boxes = rendering._page(rng, 320, 320)
        pixels = np.asarray(image).astype(int)
        ink = np.abs(pixels - pixels[0, 0]).sum(2) > 60
        inside = np.zeros_like(ink)
        for left, top, right, bottom in boxes:
            assert ink[top:bottom, left:right].any()
            inside[top - 1 : bottom + 1, left - 1 : right + 1] = True
        assert not (ink & ~inside).any()
        assert 3 <= len(boxes) <= 15


def test_a_page_that_is_turned_is_the_same_page_turned(monkeypatch):
    """Without noise, a page turned back by its truth is upright: its first line begins at the top left."""
    monkeypatch.setattr(rendering, "_noisy", lambda rng, image: np.asarray(image, np.float32).transpose(2, 0, 1))
    drawn, turns = rendering.turned_pages(8, 0)
    assert set(turns) == {0, 1, 2, 3}
    for page, quarters in zip(drawn, turns, strict=True):
        upright = np.rot90(page, quarters, axes=(1, 2))
        paper = np.abs(upright - upright[:, :1, :1]).sum(0) < 0.3
        rows, columns = (~paper).mean(1), (~paper).mean(0)
        assert (rows == 0).sum() > (columns == 0).sum()  # lines leave rows free between them
        assert columns[:112].mean() > columns[112:].mean()  # and begin at the left


def test_the_study_measures_a_network_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    g = Graph()
    x = g.add("HardSwish", g.norm(g.conv("x", C, 3, into=3, bias=False)))
    x = g.conv(g.add("Mul", x, squeeze_by_convolution(g, x), output="first"), C)
    x = g.conv(g.add("Mul", x, squeeze_by_convolution(g, x), output="second"), 4)
    onnx.save(g.model(g.add("Softmax", g.add("Flatten", g.add("GlobalAveragePool", x)))), tmp_path / "n.onnx")
    subject = wild.Subject("small", "n.onnx", lambda n, seed: (images(n, seed=seed), np.arange(n) % 4), 12, 9, 2, 6)
    monkeypatch.setattr(wild, "SUBJECTS", (subject,))
    words = [
        "wild",
        "--networks",
        str(tmp_path),
        "--subjects",
        "small",
        "--rounds",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert study.main(words) == 0
    gates, costs, latency = (
        pd.read_csv(tmp_path / "out" / f"{name}.csv", keep_default_na=False) for name in ("gates", "costs", "latency")
    )
    assert list(gates["gate"]) == ["first", "second"]
    assert list(zip(costs["folded"], costs["constants"], strict=True)) == [
        (0, "none"), (1, "mean"), (1, "energy"), (2, "mean"), (2, "energy"), (2, "learned"),
    ]  # fmt: skip
    assert costs["as before, %"][0] == 100
    assert (costs["output error"][1:] > 0).all()
    assert (costs["exactness"][1:].astype(float) < 1e-5).all()
    assert latency["nodes"][0] > latency["nodes"][1]
    assert (tmp_path / "out" / "costs.png").exists()
    ranks, numbers = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("ranks", "numbers"))
    assert list(ranks["gate"]) == ["first", "second"]
    assert ranks["first 1, %"][0] < ranks["first 2, %"][0] <= ranks["first 4, %"][0] <= 100
    assert list(numbers["k"]) == list(wild.PROJECTED)
    mean = costs[(costs["constants"] == "mean") & (costs["folded"] == 2)].iloc[0]
    assert numbers["output error"][0] == pytest.approx(mean["output error"], rel=0.2)  # of means over other inputs
    assert numbers["output error"].iloc[-1] < numbers["output error"][0]
    assert (tmp_path / "out" / "ranks.png").exists()
    before = (tmp_path / "out" / "records.csv").read_bytes()
    assert study.main(words) == 0
    assert (tmp_path / "out" / "records.csv").read_bytes() == before


def test_attention_that_is_given_whole_changes_nothing_and_other_attention_does(tmp_path):
    g = Graph()
    x = g.conv("x", C, 3, into=3)
    x = g.conv(g.add("Mul", x, squeeze_by_convolution(g, x), output="first"), 4)
    path = tmp_path / "n.onnx"
    onnx.save(g.model(g.add("Softmax", g.add("Flatten", g.add("GlobalAveragePool", x)))), path)
    inputs = images(9)
    gates = graphs.find_gates(path, inputs)
    graphs.record(path, gates, inputs, tmp_path / "run")
    attention = stripe.open_run(tmp_path / "run").attention("first", 0)
    wild._let_be_given(path, gates, tmp_path / "given.onnx")
    found, other = (
        wild._outputs(tmp_path / "given.onnx", inputs, {"first, given": wild._shaped(values, gates[0])})
        for values in (attention, attention * np.linspace(0, 1, C))
    )
    own = wild._outputs(path, inputs)
    np.testing.assert_allclose(found, own, rtol=1e-5)
    assert np.abs(other - own).max() > 1e-3


def test_a_conversion_that_is_not_installed_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wild, "find_spec", lambda name: None)
    subject = wild.Subject("small", "n.onnx", lambda n, seed: (images(n, seed=seed), None), 12, 9, 2, 6, compact=True)
    study_of = wild._Study(subject, Path(__file__), tmp_path, argparse.Namespace(out=tmp_path, rounds=1))
    study_of.compact()
    assert "pip install onnx2torch" in capsys.readouterr().out
    assert not study_of.table.frame().size


def test_a_missing_file_is_said_in_one_line(tmp_path, capsys):
    assert study.main(["wild", "--networks", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "is not there: --networks names the folder" in capsys.readouterr().err


def test_a_line_is_found_where_most_of_its_middle_is():
    mask = np.zeros((10, 10), bool)
    mask[5, 2:6] = True
    for box, found in (((2, 4, 8, 6), True), ((2, 4, 10, 6), False), ((2, 0, 6, 2), False)):
        assert wild._is_found(mask, np.array(box)) == found


@pytest.mark.parametrize(("found", "right", "same"), [([[0.9, 0.1]], 100, 100), ([[0.2, 0.8]], 0, 0)])
def test_classes_are_judged_by_their_truth_and_by_what_they_were(found, right, same):
    judged = wild._judged(np.array([[0.7, 0.3]]), np.array(found), np.array([0]))
    assert (judged["right"], judged["as_before"]) == (right, same)
    p, q = np.array([0.7, 0.3]), np.array(found[0])
    assert judged["divergence"] == pytest.approx((p * np.log(p / q)).sum())
