"""Studies of the strength and of the verdicts: on simulated gates of known truth, and over a training."""

import numpy as np
import pandas as pd
import pytest
import torch
from studies import coverage, verdicts
from study import main

import stripe
from stripe.stats import Interval, effective_rank
from stripe.stats.intervals import NO_SHAPE
from tests.runs import record

SMALL = ["coverage", "--images", "20", "--channels", "16", "--strengths", "0.5", "--repetitions", "60", "--out"]


@pytest.mark.parametrize("noise", coverage.NOISES)
def test_simulated_gates_have_the_strength_that_they_are_said_to_have(noise):
    """Of very many images the channel's share of the variance is the true strength, whatever the noise."""
    for values in coverage.draw(noise, (40_000, 12), 0.3, 2):
        between, within = values.mean(axis=0).var(ddof=1), values.var(axis=0, ddof=1).mean()
        assert between / (between + within) == pytest.approx(0.3, abs=0.03 if noise == "t3" else 0.01)
    shares = stripe.stats.two_way_shares(next(coverage.draw(noise, (4000, 64), 0.3, 1)))
    assert (shares.sample > 0.3) == (noise == "half common to a row")


def test_heavy_tails_of_few_images_show_in_single_values(monkeypatch):
    """Twenty images' sums over channels hardly tell how heavy the tails are."""
    held = coverage.simulate("t3", (20, 256), 0.5, 500)["coverage"]
    monkeypatch.setattr("stripe.stats.intervals._shape_of_values", lambda blocks: NO_SHAPE)
    assert held >= 0.9 > coverage.simulate("t3", (20, 256), 0.5, 500)["coverage"]


def test_the_table_grows_cell_by_cell_and_goes_on(tmp_path, monkeypatch, capsys):
    assert main([*SMALL, str(tmp_path), "--noises", "independent"]) == 0
    first = pd.read_csv(tmp_path / "coverage.csv")
    assert main([*SMALL, str(tmp_path), "--noises", "independent", "t3"]) == 0
    table = pd.read_csv(tmp_path / "coverage.csv")
    assert table["noise"].tolist() == ["independent", "t3"]
    pd.testing.assert_frame_equal(table.iloc[:1], first)
    assert first["coverage"].between(0.85, 1.0).all()
    np.testing.assert_allclose(table["coverage"] + table["above"] + table["below"], 1.0, atol=2e-4)
    assert "t3: covered in" in capsys.readouterr().out


def test_an_interval_that_lacks_its_estimate_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coverage, "strength_interval", lambda moments: Interval(0.0, 0.1))
    assert main([*SMALL, str(tmp_path)]) == 2
    assert "lacks its own estimate" in capsys.readouterr().err
    assert not (tmp_path / "coverage.csv").exists()


def test_the_change_of_runs_is_a_row_for_each_gate_and_measure(tmp_path, capsys):
    example = stripe.load_example("cifar10-se-resnet20").path
    record(tmp_path / "moments", 1, 5, samples=80, contents="moments")
    assert main(["constancy", str(example), str(tmp_path / "moments"), "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "constancy.csv")
    assert len(table) == 4 * 3 + 3 * 2  # the rank where rows were kept
    found = table.set_index(["run", "gate", "measure"])
    assert found.loc[("cifar10-se-resnet20", "layer1.0", "cv"), "direction"] == "falls"
    assert found.loc[("cifar10-se-resnet20", "layer3.1", "cv"), "direction"] == "rises"
    rank = found.loc[("cifar10-se-resnet20", "layer3.1", "rank")]
    assert rank["at the last"] == pytest.approx(
        effective_rank(stripe.load_example().attention("layer3.1", 20)), rel=1e-3
    )
    assert rank["low end"] < rank["change"] == pytest.approx(rank["at the last"] / rank["at the first"], rel=1e-3)
    assert (found.loc["moments", "direction"] == "unsettled").mean() > 0.5  # random values at both epochs
    assert "falls" in capsys.readouterr().out
    assert main(["constancy", str(record(tmp_path / "one", 1)), "--out", str(tmp_path)]) == 2


def test_the_course_of_a_run_is_a_row_for_each_epoch_gate_and_measure(tmp_path):
    example = stripe.load_example("cifar10-se-resnet20")
    record(tmp_path / "runs" / "moments", 1, 5, samples=80, contents="moments")
    out = tmp_path / "out"
    runs = [str(example.path), str(tmp_path / "runs" / "moments")]
    assert main(["constancy", *runs, "--every-epoch", "--out", str(out)]) == 0
    courses = pd.read_csv(out / "courses.csv")
    steps = len(example.epochs) - 1
    assert len(courses) == 4 * (3 * steps + 2)  # three measures and drift, of three gates and of two
    found = courses.set_index(["run", "epoch", "gate", "measure"]).sort_index()
    last = found.loc[("cifar10-se-resnet20", example.epochs[-1], "layer2.0")]
    table = pd.read_csv(out / "constancy.csv").set_index(["run", "gate", "measure"])
    whole = table.loc[("cifar10-se-resnet20", "layer2.0", "cv")]
    assert last.loc["cv"].tolist() == [whole["change"], whole["low end"], whole["high end"]]
    drifts = stripe.stats.summarize(example).query("gate == 'layer2.0'").set_index("epoch")["drift"]
    assert last.loc["drift", "value"] == pytest.approx(drifts.iloc[-1], rel=1e-3)
    assert 0 < last.loc["drift", "low"] < last.loc["drift", "high"]
    assert (out / "courses.png").exists()
    assert main(["constancy", *runs, "--out", str(tmp_path / "less")]) == 0
    assert [path.name for path in (tmp_path / "less").iterdir()] == ["constancy.csv"]


def test_psi_that_was_never_trained_hardly_ever_matches_and_psi_fitted_to_the_stripe_does():
    """Both share the attention's bias with the stripe, as in a network: what they are near to by itself counts not."""
    torch.manual_seed(0)
    gates = list(verdicts.simulated(64, 6))
    rates = {
        kind: verdicts.rates([verdicts.judged(subjects, kind, seed) for seed, subjects in enumerate(gates)])
        for kind in verdicts.PSIS
    }
    assert [rate["judged"] for rate in rates.values()] == [54, 54, 54]
    assert rates["untrained"]["match"] <= 5
    assert rates["untrained, wide"]["match"] <= 5
    assert rates["untrained"]["no match"] > 50  # control: they are no stripes, and it is said
    assert rates["fitted"]["told"] >= 90


def test_verdicts_on_a_trained_network_are_a_row_for_each_kind_of_psi(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "CHANNELS", (16,))
    torch.save(stripe.models.create_model("resnet", depth=11, module="senet").state_dict(), tmp_path / "se.pt")
    words = ["--dataset", "digits", "--ckpt", str(tmp_path / "se.pt"), "--images", "40"]
    words += ["--rounds", "1", "--draws", "2", "--fitted", "1", "--out", str(tmp_path)]
    assert main(["verdicts", *words]) == 0
    table = pd.read_csv(tmp_path / "verdicts.csv")
    assert table["gates"].tolist() == ["simulated"] * 3 + ["se"] * 3
    assert table["judged"].tolist() == [9, 9, 9, 6, 6, 3]
    shares = [column for column in table if column.endswith(", %") and "told" not in column]
    np.testing.assert_allclose(table[shares].sum(axis=1), 100, atol=0.3)
