"""The studies end to end in miniature, their resumption, their statistics, and that a changed digit is found."""

import argparse
import dataclasses
import fcntl
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import study
import torch
from scipy import stats
from studies import ablation, commands, comparison, forms, growth, recipes, robustness
from studies.ablation import build_case
from studies.robustness import Disturbance, disturbances
from studies.table import Table, claimed, headed
from study import main

import stripe
from stripe import open_run
from stripe.asr import ASRLayer
from stripe.data import Loader, load_images
from stripe.models import create_model
from stripe.stats import Moments, stripe_strength
from stripe.training import evaluate
from tests.conftest import randomize

ROOT = Path(__file__).parents[1]
TIMES = ["seconds", "cpu_seconds", "images_per_second"]
ABLATION = (
    "ablation --depth 14 --block basicblock --epochs 1 --batch 20 --train-samples 40 --test-samples 40 --seeds 0"
).split()


def names_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, ASRLayer)]


@pytest.fixture(scope="module")
def loader():
    return Loader(load_images("digits", "test", samples=40), 20)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random networks of the four forms, as words for --ckpt."""
    folder = tmp_path_factory.mktemp("networks")
    forms = {"plain": {}, "SE": {"module": "senet"}, "ASR": {"module": "senet", "asr": True}}
    forms["both"] = forms["ASR"] | {"both": True}
    torch.manual_seed(0)
    for name, options in forms.items():
        model = randomize(create_model("resnet", depth=11, **options))
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return [f"{name}={folder / name}.pt" for name in forms]


# ---- ablation --------------------------------------------------------------------------------------------


def test_ablation_writes_a_row_per_case_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    words = [*ABLATION, "--out", str(tmp_path), "--psi-init", "0.1", "normal", "--repeats", "1", "2"]
    assert main([*words[:-2], "1", "--insertion", "every"]) == 0
    first = (tmp_path / "ablation.csv").read_text().splitlines()
    assert len(first) == 3
    trained = []
    original = ablation.train

    def train(*rest, description, **options):
        trained.append(description)
        return original(*rest, description=description, **options)

    monkeypatch.setattr(ablation, "train", train)
    assert main([*words, "--insertion", "every", "last stage"]) == 0
    assert [(case["repeats"], case["insertion"]) for case in trained] == [(2, "every"), (1, "last stage")]
    table = pd.read_csv(tmp_path / "ablation.csv")
    assert list(table["layers"]) == [6, 6, 12, 2]
    assert list(table["psi_init"]) == ["0.1", "normal", "0.1", "0.1"]
    assert table[["accuracy_last", "accuracy_best"]].stack().between(0, 100).all()
    assert (table["best_epoch"] == 1).all()
    assert json.loads(table["config"][0])["depth"] == 14
    assert json.loads(table["versions"][0]).keys() >= {"python", "torch", "stripe-observation"}
    shown = pd.read_csv(tmp_path / "ablation-compared.csv")
    assert list(shown["seeds"]) == [1, 1, 1, 1]
    assert list(shown["last epoch"]) == pytest.approx(list(table["accuracy_last"]), abs=0.0051)
    assert "psi begins at" in capsys.readouterr().out


def test_a_training_that_was_cut_is_finished(tmp_path, capsys):
    words = [*ABLATION, "--psi-init", "0.1", "--repeats", "1", "--insertion", "second"]
    words[words.index("--epochs") + 1] = "2"
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert main([*words, "--out", str(tmp_path / "cut")]) == 0
    (tmp_path / "cut/ablation.csv").unlink()  # stopped after training, before the row
    assert main([*words, "--out", str(tmp_path / "cut")]) == 0
    (directory,) = (path for path in (tmp_path / "cut").iterdir() if path.is_dir())
    (tmp_path / "cut/ablation.csv").unlink()
    (directory / "checkpoints/last.pt").unlink()  # stopped within the first epoch
    assert main([*words, "--out", str(tmp_path / "cut")]) == 0
    whole, cut = (pd.read_csv(tmp_path / name / "ablation.csv").drop(columns=TIMES) for name in ("whole", "cut"))
    pd.testing.assert_frame_equal(cut, whole)


def test_cases_change_one_choice_at_a_time():
    choices = {"psi_init": [0.1, 0.3], "repeats": [1, 2, 3], "insertion": ["every"]}
    cases = list(ablation.cases_of(choices, [0, 1]))
    assert len(cases) == 2 * (1 + 1 + 2)
    assert cases[0] == {"psi_init": 0.1, "repeats": 1, "insertion": "every", "seed": 0}
    assert all((case["psi_init"] != 0.1) + (case["repeats"] != 1) <= 1 for case in cases)


@pytest.mark.parametrize(
    ("insertion", "expected"),
    [
        ("every", [f"layer{stage}.{block}.bn3" for stage in (1, 2, 3) for block in (0, 1)]),
        ("second", [f"layer{stage}.0.bn3" for stage in (1, 2, 3)]),
        ("last stage", ["layer3.0.bn3", "layer3.1.bn3"]),
    ],
)
def test_insertion_in_some_of_the_blocks_leaves_the_plain_weights_alone(insertion, expected):
    case = {"psi_init": 0.1, "repeats": 1, "insertion": insertion, "seed": 4}
    options = {"depth": 20, "block": "bottleneck"}
    arguments = argparse.Namespace(**options, module="senet")
    model = build_case(case, 10, arguments)
    assert names_of(model) == expected
    torch.manual_seed(4)
    plain = create_model("resnet", **options)
    assert torch.equal(model.layer3[0].bn3.bn.weight, plain.layer3[0].bn3.weight)
    assert torch.equal(model.layer3[1].conv3.weight, plain.layer3[1].conv3.weight)


# ---- robustness ------------------------------------------------------------------------------------------


def test_robustness_writes_and_draws_every_network_and_disturbance(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(robustness, "SCALES", (0.5, 1.0))
    monkeypatch.setattr(robustness, "SHIFTS", (0.0, 1.0))
    monkeypatch.setattr(robustness, "SPREADS", (0.5,))
    words = ["robustness", "--samples", "40", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert main([*words, "--ckpt", *checkpoints[:2]]) == 0
    before = (tmp_path / "robustness.csv").read_text()
    assert main([*words, "--ckpt", *checkpoints]) == 0
    assert (tmp_path / "robustness.csv").read_text().startswith(before)
    table = pd.read_csv(tmp_path / "robustness.csv")
    assert list(table["network"].value_counts(sort=False).items()) == [
        (name, 4 + 2) for name in ("plain", "SE", "ASR", "both")
    ]
    assert table.groupby("network")["accuracy"].nunique().max() > 1
    shown = pd.read_csv(tmp_path / "robustness-compared.csv").query("`scale a` == 0.5 and `shift b` == 1")
    assert shown["SE"].item() == table.query("network == 'SE' and a == 0.5 and b == 1")["accuracy"].item()
    assert (tmp_path / "robustness.png").stat().st_size > 10_000
    assert "shift b" in capsys.readouterr().out


@pytest.mark.equal_bits
@pytest.mark.parametrize("options", [{}, {"module": "senet"}, {"module": "senet", "asr": True}])
def test_no_disturbance_changes_nothing_and_any_other_does(options, loader):
    model = randomize(create_model("resnet", depth=11, **options)).eval()
    images, accuracy = next(iter(loader))[0], evaluate(model, loader).accuracy
    with torch.no_grad():
        expected = model(images)
        with Disturbance(a=1, b=0, s=0).applied(model):
            assert torch.equal(model(images), expected)
            assert evaluate(model, loader).accuracy == accuracy
        for change in (Disturbance(a=0.8), Disturbance(b=0.2), Disturbance(s=0.3)):
            with change.applied(model):
                assert not torch.allclose(model(images), expected, rtol=1e-3)
        assert torch.equal(model(images), expected)  # no hook is left


def test_a_disturbance_is_a_x_n_plus_b_of_the_norms_output():
    norm, x = torch.nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        with Disturbance(a=0.5, b=2).applied(norm):
            torch.testing.assert_close(
                norm(x), 0.5 * torch.nn.functional.batch_norm(x, torch.zeros(3), torch.ones(3)) + 2
            )
        plain = norm(x)
        with Disturbance(s=0.5, seed=1).applied(norm):
            noisy = norm(x)
    factors = noisy / plain
    torch.testing.assert_close(factors, factors[:, :, :1, :1].expand_as(factors), rtol=1e-4, atol=1e-4)
    assert factors[:, :, 0, 0].unique().numel() == 12
    with Disturbance(s=0.5, seed=1).applied(norm), torch.no_grad():
        assert torch.equal(norm(x), noisy)
    with Disturbance(s=0.5, seed=2).applied(norm), torch.no_grad():
        assert not torch.equal(norm(x), noisy)


def test_no_hook_survives_an_error():
    model = create_model("resnet", depth=11).eval()
    with pytest.raises(RuntimeError), Disturbance(a=2).applied(model):
        model(torch.zeros(1, 5, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_grid_is_whole_and_holds_the_undisturbed_case():
    grid = list(disturbances([0, 1]))
    assert len(set(grid)) == len(grid) == len(robustness.SCALES) * len(robustness.SHIFTS) + 2 * len(robustness.SPREADS)
    assert Disturbance() in grid
    assert dataclasses.asdict(grid[-1]) == {"a": 1.0, "b": 0.0, "s": robustness.SPREADS[-1], "seed": 1}


# ---- forms -----------------------------------------------------------------------------------------------


FORMS = (
    "forms --dataset digits --depth 8 --block basicblock --epochs 2 --batch 20"
    " --train-samples 80 --val-samples 20 --test-samples 40"
    " --record 10 --seeds 1"
).split()


def run_forms(where, *words):
    assert main([*FORMS, "--out", str(where / "study"), "--runs", str(where / "runs"), *words]) == 0
    return pd.read_csv(where / "study/results.csv") if (where / "study/results.csv").exists() else pd.DataFrame()


def test_forms_are_trained_recorded_and_compared(tmp_path, capsys):
    rows = run_forms(tmp_path, "--seeds", "1", "2")
    assert list(zip(rows["seed"], rows["form"], strict=True))[:5] == [
        *((1, form) for form in ("plain", "attention", "asr", "both")),
        (2, "plain"),
    ]
    assert rows[["accuracy_last", "accuracy_best"]].stack().between(0, 100).all()
    stripes = pd.read_csv(tmp_path / "study/stripes.csv")
    assert set(stripes["form"]) == {"attention", "both"}
    assert set(stripes["epoch"]) == {1, 2}
    observed = open_run(tmp_path / "runs/resnet20-attention-senet-1")
    strength = stripe_strength(Moments.of(observed.attention(observed.gates[0].name, 2))).strength
    [recorded] = stripes.query("form == 'attention' and seed == 1 and epoch == 2 and gate == 'layer1.0'")["strength"]
    assert recorded == pytest.approx(strength, rel=1e-9)
    accuracy = rows.pivot(index="seed", columns="form", values="accuracy_last")
    shown = pd.read_csv(tmp_path / "study/forms.csv").set_index("network")["last epoch"]
    assert shown["SE"] == pytest.approx(accuracy["attention"].mean(), abs=0.0051)
    difference = comparison.paired(rows).loc[0, "difference"]
    assert difference == pytest.approx((accuracy["attention"] - accuracy["plain"]).mean(), abs=1e-4)
    assert (tmp_path / "study/forms-resnet20-senet.png").stat().st_size > 10_000
    assert "seeds to tell 0.5" in capsys.readouterr().out


def test_annealed_gates_are_constants_at_the_end_and_folded_networks_are_those_with_attention(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "learn_constants", partial(forms.learn_constants, steps=5))
    rows = run_forms(tmp_path, "--forms", "attention", "anneal", "folded", "--epochs", "4").set_index("form")
    assert rows[["accuracy_last", "accuracy_best"]].stack().between(0, 100).all()
    stripes = pd.read_csv(tmp_path / "study/stripes.csv").query("form == 'anneal'").set_index("epoch")
    assert (stripes.loc[[1, 2], "std"] > 1e-4).all()
    assert (stripes.loc[[3, 4], "std"] == 0).all()  # 16 steps, blended from the 8th to the 12th
    differences = pd.read_csv(tmp_path / "study/results.csv")
    assert {("anneal", "folded"), ("folded", "attention")} <= set(
        comparison.paired(differences)[["form", "base"]].itertuples(index=False, name=None)
    )


def test_only_a_network_that_was_trained_can_be_folded(tmp_path, capsys):
    words = [*FORMS, "--out", str(tmp_path / "study"), "--runs", str(tmp_path / "runs"), "--forms", "folded"]
    assert main(words) == 2
    assert "train the form 'attention' first" in capsys.readouterr().err


def test_a_network_that_another_process_still_trains_is_not_folded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(forms, "learn_constants", partial(forms.learn_constants, steps=2))
    words = ["--forms", "attention", "folded"]
    run_forms(tmp_path, "--forms", "attention", "--minutes", "0")
    assert (tmp_path / "runs/resnet20-attention-senet-1/checkpoints/last.pt").exists()  # of the first of two epochs
    with claimed(tmp_path / "runs/resnet20-attention-senet-1"):
        assert run_forms(tmp_path, *words).empty
    assert "2 of 2 trainings to go" in capsys.readouterr().out
    assert set(run_forms(tmp_path, *words)["form"]) == {"attention", "folded"}


def test_processes_that_end_together_write_tables_and_figures_one_after_the_other(tmp_path, monkeypatch):
    def another_may_write(*_):
        with (tmp_path / "study/.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return written.append(False)
        return written.append(True)

    written = []
    for module, name in ((forms, "publish"), (comparison, "figures"), (recipes, "publish")):
        monkeypatch.setattr(module, name, another_may_write)
    run_forms(tmp_path, "--forms", "plain")
    assert main([*RECIPES, "--out", str(tmp_path / "study"), "--minutes", "0"]) == 0
    another_may_write()
    assert written == [False, False, False, True]


@pytest.mark.equal_bits
def test_slices_of_no_time_make_an_epoch_each_and_end_where_one_go_ends(tmp_path, capsys):
    words = ["--forms", "attention", "--minutes", "0"]
    assert run_forms(tmp_path / "slices", *words).empty
    assert "1 of 1 trainings to go" in capsys.readouterr().out
    slices, whole = run_forms(tmp_path / "slices", *words), run_forms(tmp_path / "whole", *words[:2])
    assert len(slices) == 1
    pd.testing.assert_frame_equal(slices.drop(columns=TIMES), whole.drop(columns=TIMES))
    seconds = json.loads((tmp_path / "slices/runs/resnet20-attention-senet-1/seconds.json").read_text())
    assert slices["seconds"][0] == pytest.approx(sum(epoch["wall"] for epoch in seconds.values()))
    assert list(seconds) == ["1", "2"]
    stripes = [pd.read_csv(tmp_path / name / "study/stripes.csv") for name in ("slices", "whole")]
    pd.testing.assert_frame_equal(*stripes)


def test_a_case_that_another_process_trains_is_left_to_it(tmp_path):
    with claimed(tmp_path / "runs/resnet20-plain-none-1") as mine:
        assert mine
        assert run_forms(tmp_path, "--forms", "plain").empty
    assert len(run_forms(tmp_path, "--forms", "plain")) == 1


def test_another_recipe_needs_another_setting(tmp_path, capsys):
    run_forms(tmp_path, "--forms", "plain")
    words = [
        *FORMS,
        "--out",
        str(tmp_path / "study"),
        "--runs",
        str(tmp_path / "runs"),
        "--forms",
        "plain",
        "--lr",
        "1",
    ]
    assert main(words) == 2
    assert "another configuration" in capsys.readouterr().err
    assert main([*words, "--setting", "hot"]) == 0
    assert list(pd.read_csv(tmp_path / "study/results.csv")["setting"]) == ["resnet20", "hot"]


def test_rows_of_several_processes_are_all_kept(tmp_path):
    loop = "for i in range(20): Table(Path(sys.argv[1]), {}).put({'a': sys.argv[2], 'i': i}, {})"
    script, scripts = f"import sys; from studies.table import *\n{loop}", Path(study.__file__).parent
    command = [sys.executable, "-c", script, str(tmp_path / "a.csv")]
    both = [subprocess.Popen([*command, name], cwd=scripts) for name in ("x", "y")]
    assert [process.wait(120) for process in both] == [0, 0]
    rows = pd.read_csv(tmp_path / "a.csv")
    assert sorted(zip(rows["a"], rows["i"], strict=True)) == [(a, i) for a in "xy" for i in range(20)]


# ---- comparison ------------------------------------------------------------------------------------------


def results(seeds=6, gain=1.0):
    """Rows of a study in which attention gains `gain` points over plain, and ASR nothing."""
    rng = np.random.default_rng(0)
    base, rows = rng.normal(80, 2, seeds), []
    for form, more in (("plain", 0), ("attention", gain), ("asr", 0), ("both", gain)):
        accuracy = base + more + rng.normal(0, 0.2, seeds)
        module = "none" if form == "plain" else "senet"
        for seed in range(seeds):
            row = {"form": form, "module": module, "seed": seed, "best_epoch": 3, "seconds": 1.0, "setting": "s"}
            rows.append(row | {"accuracy_last": accuracy[seed], "accuracy_best": accuracy[seed]})
    return pd.DataFrame(rows)


def test_power_is_that_of_simulated_tests():
    x = np.random.default_rng(0).normal(0.5, 0.4, (20_000, 8))
    found = (stats.ttest_1samp(x, 0, axis=1).pvalue < comparison.ALPHA).mean()
    assert comparison.power(8, 0.4, 0.5) == pytest.approx(found, abs=0.01)
    assert comparison.power(5, 0.4, 0.5) < found - 0.1


@pytest.mark.parametrize("spread", [0.1, 0.4, 3.0])
def test_the_seeds_needed_are_the_fewest(spread):
    needed = comparison.seeds_needed(spread)
    assert comparison.power(needed, spread) >= comparison.POWER
    assert needed == 2 or comparison.power(needed - 1, spread) < comparison.POWER
    assert comparison.detectable(needed, spread) <= comparison.DIFFERENCE
    assert comparison.power(needed, spread, comparison.detectable(needed, spread)) == pytest.approx(comparison.POWER)


def test_paired_differences_find_a_gain_that_the_spread_of_seeds_hides():
    rows = comparison.paired(results())
    last = rows[rows["measure"] == "last"].set_index(["form", "base"])
    gain, none = last.loc[("attention", "plain")], last.loc[("asr", "plain")]
    assert gain["low"] < 1.0 < gain["high"]
    assert gain["p_adjusted"] < 0.01
    assert none["low"] < 0 < none["high"]
    accuracy = results().pivot(index="seed", columns="form", values="accuracy_last")
    expected = stats.ttest_rel(accuracy["attention"], accuracy["plain"])
    assert gain["p"] == pytest.approx(expected.pvalue, abs=1e-4)
    assert tuple(gain[["low", "high"]]) == pytest.approx(expected.confidence_interval(), abs=1e-4)
    assert stats.ttest_ind(accuracy["attention"], accuracy["plain"]).pvalue > 0.05  # unpaired, it is lost


def test_a_single_seed_gives_differences_without_an_interval():
    row = comparison.paired(results(seeds=1)).iloc[0]
    assert np.isfinite(row["difference"])
    assert np.isnan(row["low"])
    assert len(comparison.paired(results().query("form == 'plain'"))) == 0


def test_the_figure_shows_every_seed_and_interval():
    rows = results()
    differences = comparison.paired(rows)
    left, right = comparison.draw(rows, differences, "senet").axes
    assert len(left.get_lines()) == 6 + 1
    assert [text.get_text() for text in right.get_yticklabels()][0] == "SE \u2212 plain"
    drawn = right.collections[0].get_segments()[0][:, 0]
    assert tuple(drawn) == pytest.approx(tuple(differences.loc[0, ["low", "high"]]))


# ---- compact networks ------------------------------------------------------------------------------------


def test_what_a_few_numbers_cost_is_a_row_for_each_network(tmp_path):
    rows = [{"network": name, "numbers": n, "parameters": 9, "divergence": d} for name, n, d in NETWORKS]
    ranks = pd.DataFrame(rows).assign(worth=90.0, drop=0.123)
    ends = {f"{name}_{end}": ranks[name] for name in ("divergence", "drop") for end in ("low", "high")}
    ranks.assign(**ends).to_csv(tmp_path / "ranks.csv", index=False)
    assert "speedup, eager" not in commands.tables(tmp_path)["numbers.csv"]
    pd.DataFrame({"file": ["k0.onnx", "original.onnx"], "nodes": [60, 100]}).to_csv(tmp_path / "onnx.csv", index=False)
    timed = pd.DataFrame({"network": ["original", "k0"], "backend": "eager", "speedup": [1.0, 1.5]})
    timed.to_csv(tmp_path / "latency.csv", index=False)
    found = commands.tables(tmp_path)["numbers.csv"].set_index("network")
    assert found.loc["k0", ["numbers per image", "divergence", "points lost"]].tolist() == ["0", "0.0123", "0.12"]
    assert found[["nodes", "speedup, eager"]].values.tolist() == [["100", "1.00"], ["60", "1.50"]]


NETWORKS = (("original", 336, 0.0), ("k0", 0, 0.01234))


# ---- growth ----------------------------------------------------------------------------------------------


def table_of(strengths, width=0.01):
    rows = [
        {
            "epoch": e + 1,
            "gate": gate,
            "channels": 16,
            "strength": s,
            "strength_low": s - width,
            "strength_high": s + width,
        }
        | {"std": 0.1, "drift": 0.1 / (e + 1) ** 2, "rank": 1 + s}
        for gate, line in strengths.items()
        for e, s in enumerate(line)
    ]
    return pd.DataFrame(rows)


def test_trends_rise_and_fall_only_where_the_intervals_are_apart():
    strengths = {"up": [0.2, 0.5, 0.9], "down": [0.9, 0.95, 0.3], "flat": [0.500, 0.501, 0.502]}
    table = growth.trends(table_of(strengths)).set_index("gate")
    assert dict(table["trend"]) == {"up": "rises", "down": "falls", "flat": "neither"}
    assert table["rho"]["up"] == 1
    assert table["highest_at"]["down"] == 2
    assert set(growth.trends(table_of(strengths, width=0.5))["trend"]) == {"neither"}
    assert set(growth.trends(table_of(strengths), tolerance=0.02)["settled"]) == {2}
    assert set(growth.trends(table_of(strengths), tolerance=1e-9)["settled"]) == {""}


def test_ranks_are_told_at_the_first_the_greatest_and_the_last_epoch():
    epochs = table_of({"up": [0.2, 0.5, 0.9], "over": [0.1, 0.7, 0.3]})
    epochs.loc[epochs["gate"] == "up", "rank"] = [np.nan, 2.0, 2.5]
    rows = growth._ranks(epochs).set_index("gate")
    assert rows.loc["over"].tolist() == ["16", "1.10", "1.70", "2", "1.300"]
    assert rows.loc["up"].tolist() == ["16", "", "2.50", "3", "2.500"]


@pytest.mark.equal_bits
def test_growth_measures_a_run_and_its_network_on_other_images(tmp_path, capsys):
    run_forms(tmp_path, "--forms", "attention")
    words = ["growth", str(tmp_path / "runs/resnet20-attention-senet-1"), "--dataset", "digits", "--samples", "20"]
    words += ["--out", str(tmp_path / "study/a"), "--runs", str(tmp_path / "runs")]
    assert main(words) == 0
    table = pd.read_csv(tmp_path / "study/a/inputs.csv")
    assert list(table["input"].unique()) == ["test", "train", "blur", "noise", "digits"]
    assert (table.query("input == 'test'")["shift"] == 0).all()
    assert (table.query("input in ['train', 'blur', 'noise']")["shift"] > 0).all()
    assert (table.query("input == 'digits'")["shift"] == 0).all()  # here these are the test images
    blurred = open_run(tmp_path / "runs/resnet20-attention-senet-1-blur")
    row = table.query("input == 'blur' and gate == 'layer2.0'").iloc[0]
    assert row["strength"] == pytest.approx(stripe_strength(blurred.moments()[0, "layer2.0"]).strength, abs=1e-7)
    first = {path.name: path.read_bytes() for path in (tmp_path / "study/a").iterdir()}
    assert {"epochs.csv", "trends.csv", "ranks.csv", "growth.png", "inputs.png", "ranks.png"} <= set(first)
    epochs = pd.read_csv(tmp_path / "study/a/epochs.csv")
    assert (epochs["rank"] >= 1).all()
    assert main(words) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "study/a").iterdir()} == first
    assert "highest at" in capsys.readouterr().out


# ---- recipes ---------------------------------------------------------------------------------------------


RECIPES = (
    "recipes --dataset digits --depth 11 --epochs 1 --batch 8 --train-samples 40 --test-samples 40 --lr 0.01"
    " --amp no --seeds 1 2"
).split()


def test_recipes_are_compared_in_pairs_and_go_on_where_they_stopped(tmp_path, capsys):
    words = [*RECIPES, "--out", str(tmp_path)]
    assert main([*words, "--minutes", "0"]) == 0
    assert "8 of 8 trainings to go" in capsys.readouterr().out
    with claimed(tmp_path / "recipes-SE-stripe-1"):
        assert main(words) == 0
    assert len(pd.read_csv(tmp_path / "recipes.csv")) == 7
    assert main(words) == 0
    rows = pd.read_csv(tmp_path / "recipes.csv")
    assert sorted(zip(rows["seed"], rows["form"], rows["recipe"], strict=True)) == sorted(
        itertools.product([1, 2], ["SE", "ASR"], ["reference", "stripe"])
    )
    found = recipes.differences(rows).set_index("network")
    table = rows.pivot(index=["form", "seed"], columns="recipe", values="accuracy")
    wanted = (table["stripe"] - table["reference"]).groupby("form").mean()
    assert found["difference"].to_dict() == pytest.approx(wanted.to_dict())
    shown = pd.read_csv(tmp_path / "recipes-compared.csv").set_index("network")
    assert shown["difference"].to_dict() == pytest.approx(wanted.to_dict(), abs=0.0051)
    assert shown["reference"].to_dict() == pytest.approx(
        table["reference"].groupby("form").mean().to_dict(), abs=0.0051
    )


# ---- check -----------------------------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path):
    """Records, the tables that follow from them, and a page that shows some of these."""
    results().to_csv(tmp_path / "results.csv", index=False)
    pd.DataFrame({"gate": ["a|b"], "r": ["0.10"], "config": ["{}"]}).to_csv(tmp_path / "r.csv", index=False)
    (tmp_path / "a").mkdir()
    table_of({"g": [0.2, 0.5, 0.9]}).to_csv(tmp_path / "a/epochs.csv", index=False)
    inputs = [{"input": kind, "gate": "g", "strength": 0.5, "strength_low": 0.4, "strength_high": 0.6} for kind in "tu"]
    pd.DataFrame(inputs).assign(shift_std=0.25, accuracy=50.0).to_csv(tmp_path / "a/inputs.csv", index=False)
    shown = ("seeds.csv", "forms.csv", "differences.csv", "a/trends.csv", "a/other-images.csv", "r.csv")
    marks = "\n\n".join(f"<!-- csv: {name} -->\n<!-- /csv -->" for name in shown)
    (tmp_path / "README.md").write_text(f"# Title\n\n{marks}\n\nThe end.\n")
    assert checked(tmp_path, "--write") == 0
    return tmp_path


def checked(where, *words):
    return main(["check", "--pages", str(where / "README.md"), "--records", str(where), *words])


def changed(text, place):
    """Return a text with another digit at a place."""
    return text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]


def test_a_page_shows_its_tables_as_they_stand_and_nothing_else_is_touched(records, capsys):
    text = (records / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- csv: seeds.csv -->\n\n| sd of differences |")
    assert text.endswith("<!-- /csv -->\n\nThe end.\n")
    assert "| gate | r |\n| --- | --- |\n| a\\|b | 0.10 |\n" in text  # text stays text; how it was made is left out
    assert "| s | SE − plain | last epoch | 6 | +0.83 | +0.52 | +1.14 |" in text
    assert "| g | 16 | 0.200 | 0.900 | 0.890 | 0.910 | +1.00 | rises | 3 |" in text
    assert "| g | 0.500 | 0.500 | 0.25 |\n| accuracy | 50.0 % | 50.0 % |  |" in text
    capsys.readouterr()
    assert checked(records) == 0
    assert "6 tables of 1 pages and 6 derived CSVs" in capsys.readouterr().out
    assert checked(records, "--write") == 0
    assert (records / "README.md").read_text() == text


@pytest.mark.parametrize("name", ["README.md", "forms.csv", "differences.csv", "seeds.csv", "a/trends.csv"])
def test_a_changed_digit_is_found_wherever_it_is(records, name, capsys):
    text = (records / name).read_text()
    for place in [match.start() for match in re.finditer(r"(?<=\d)\d(?= ?[,|\n])", text)][::5]:
        (records / name).write_text(changed(text, place))
        capsys.readouterr()
        assert checked(records) == 1
        assert name in capsys.readouterr().out
    assert (records / name).read_text() != text
    assert checked(records, "--write") == 0
    assert (records / name).read_text() == text


def test_a_derived_table_that_is_missing_is_found(records):
    (records / "forms.csv").unlink()
    (records / "README.md").write_text(
        "<!-- csv: r.csv -->\n\n| gate | r |\n| --- | --- |\n| a\\|b | 0.10 |\n\n<!-- /csv -->"
    )
    assert checked(records) == 1
    assert checked(records, "--write") == 0
    assert checked(records) == 0


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        ("<!-- csv: b/trends.csv -->\n<!-- /csv -->", "b/trends.csv"),
        ("<!-- csv: seeds.csv -->", "in pairs"),
        ("<!-- csv: r.csv -->\n<!-- csv: r.csv -->\n<!-- /csv -->", "in pairs"),
        ("<!-- study:r.csv -->\n<!-- /study -->", "in pairs"),
        ("no mark at all", "in pairs"),
    ],
)
def test_a_block_that_cannot_be_made_is_one_line(records, mark, expected, capsys):
    (records / "README.md").write_text(mark)
    assert checked(records) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert expected in line


def test_strengths_are_those_of_the_first_and_the_last_epoch():
    values = {(1, "g"): 0.9, (2, "g"): 0.4, (1, "h"): 0.2, (2, "h"): 0.3}
    table = pd.DataFrame([{"epoch": e, "gate": gate, "strength": strength} for (e, gate), strength in values.items()])
    table["std"] = [0.1, 0.05, 0.2, 0.15]
    [row] = comparison.strengths(table.assign(setting="s", module="eca", form="attention", seed=1)).to_numpy().tolist()
    stds = ["0.1500", "0.1000", "2 of 2"]
    assert row == ["s", "ECA", "1", "0.55", "0.20", "0.90", "0.35", "0.30", "0.40", "1 of 2", *stds]


def test_headings_stand_over_formatted_cells_and_what_is_missing_is_empty():
    table = pd.DataFrame({"a": [1.0, math.nan], "b": ["none", "x"], "c": [3, 4]})
    found = headed(table, {"of a": "a:.2f", "b": "b", "number": "c"})
    assert found.to_dict("list") == {"of a": ["1.00", ""], "b": ["none", "x"], "number": ["3", "4"]}
    with pytest.raises(KeyError, match="d"):
        headed(table, {"of d": "d"})


def test_the_pages_follow_from_the_committed_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["check"]) == 0


@pytest.mark.parametrize(
    ("record", "column"),
    [
        ("study/results.csv", "accuracy_last"),
        ("study/stripes.csv", "strength"),
        ("study/recipes.csv", "accuracy"),
        ("study/losses.csv", "cases"),
        ("study/resnet29/epochs.csv", "strength"),
        ("study/resnet29/inputs.csv", "shift_std"),
        ("study/resnet29/fold/variants.csv", "test"),
        ("study/resnet29/fold/predictors.csv", "rho"),
        ("study/match-same.json", "distance"),
        ("fold-se-resnet20/variants.csv", "test"),
        ("fold-se-resnet20/distilled/variants.csv", "test"),
        ("benchmarks/stats.json", "ratio"),
        ("benchmarks/sizing.json", "seconds"),
        ("benchmarks/coverage.json", "expected"),
    ],
)
def test_a_committed_record_that_changes_is_noticed(tmp_path, capsys, record, column):
    """The table that follows from it differs, or the page that shows it."""
    for name in ("study", "cifar10-se-resnet20", record.partition("/")[0]):
        shutil.copytree(ROOT / "figures" / name, tmp_path / "figures" / name, dirs_exist_ok=True)
    path = tmp_path / "figures" / record
    page = tmp_path / "figures" / record.partition("/")[0] / "README.md"
    words = ["check", "--records", str(path.parent), "--pages", str(page)]
    assert main(words) == 0
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        for row in content.get("gates") or content["rows"]:
            row[column] *= 2
        path.write_text(json.dumps(content))
    else:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])
        (table.assign(**{column: table[column] * 0.9})).to_csv(path, index=False)
    capsys.readouterr()
    assert main(words) == 1
    assert "differ" in capsys.readouterr().out


# ---- losses ----------------------------------------------------------------------------------------------

COUNTING = """
import pytest
@pytest.mark.parametrize("cases", [3, 4])
def test_counts(record_property, cases):
    record_property("a, b", cases)
    record_property("c", 1)
def test_ends(record_property):
    record_property("c", 5)
"""


def test_losses_counts_what_the_tests_tried_and_nothing_where_one_fails(tmp_path, capsys):
    path = tmp_path / "test_counting.py"
    words = ["losses", "--tests", str(path), "--out", str(tmp_path)]
    path.write_text(f"{COUNTING}    assert not 'right'")
    assert main(words) == 2
    assert "exit code 1 and 0 counts" in capsys.readouterr().err
    assert not (tmp_path / "losses.csv").exists()
    path.write_text(COUNTING)
    assert main(words) == 0
    table = pd.read_csv(tmp_path / "losses.csv")
    assert dict(zip(table["tried"], table["cases"], strict=True)) == {"a, b": 7, "c": 7}
    assert table["tests"].str.endswith("test_counting.py").all()


# ---- tables and bad input --------------------------------------------------------------------------------


def test_a_table_of_another_configuration_is_left_alone(tmp_path):
    path = tmp_path / "new" / "a.csv"
    Table(path, {"epochs": 1}).put({"x": 0.1}, {})
    before = path.read_bytes()
    assert Table(path, {"epochs": 1}).missing([{"x": 0.1}, {"x": 0.2}]) == [{"x": 0.2}]
    with pytest.raises(ValueError, match="another configuration"):
        Table(path, {"epochs": 2})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["robustness", "--ckpt", "SE"], "NAME=PATH"),
        (["robustness", "--ckpt", "SE=no/such.pt"], "no/such.pt"),
        (["ablation", "--dataset", "mnist"], "digits"),
        (["ablation", "--module", "sent", "--train-samples", "40"], "senet"),
        (["forms", "--dataset", "mnist"], "digits"),
        (["forms", "--dataset", "digits", "--train-samples", "9000"], "11000"),
        (["growth", "no/such"], "no/such"),
        (["growth", str(stripe.load_example("cifar10-se-resnet20").path)], "last.pt"),
    ],
)
def test_bad_input_is_one_line(words, expected, tmp_path, capsys):
    assert main([*words, "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert expected in line
