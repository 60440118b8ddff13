"""The studies end to end in miniature, their resumption, and that no disturbance means no change."""

import dataclasses
import json

import pandas as pd
import pytest
import torch

from scripts import study
from scripts.study import Disturbance, Table, ablation_cases, build_case, disturbances, main
from stripe.asr import ASRLayer
from stripe.data import Loader, load_images
from stripe.models import create_model
from stripe.training import evaluate
from tests.conftest import randomize

ABLATION = "ablation --depth 20 --epochs 1 --batch 20 --train-samples 40 --test-samples 40 --seeds 0".split()


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
    original = study.train_case
    monkeypatch.setattr(study, "train_case", lambda case, *rest: trained.append(case) or original(case, *rest))
    assert main([*words, "--insertion", "every", "last stage"]) == 0
    assert [(case["repeats"], case["insertion"]) for case in trained] == [(2, "every"), (1, "last stage")]
    table = pd.read_csv(tmp_path / "ablation.csv")
    assert list(table["layers"]) == [6, 6, 12, 2]
    assert list(table["psi_init"]) == ["0.1", "normal", "0.1", "0.1"]
    assert table[["accuracy_last", "accuracy_best"]].stack().between(0, 100).all()
    assert (table["best_epoch"] == 1).all()
    assert json.loads(table["config"][0])["depth"] == 20
    assert json.loads(table["versions"][0]).keys() == {"python", "torch", "stripe"}
    assert "accuracy_best" in capsys.readouterr().out


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
    assert (tmp_path / "cut/ablation.csv").read_bytes() == (tmp_path / "whole/ablation.csv").read_bytes()


def test_cases_change_one_choice_at_a_time():
    choices = {"psi_init": [0.1, 0.3], "repeats": [1, 2, 3], "insertion": ["every"]}
    cases = list(ablation_cases(choices, [0, 1]))
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
    arguments = study.argparse.Namespace(**options, module="senet")
    model = build_case(case, 10, arguments)
    assert names_of(model) == expected
    torch.manual_seed(4)
    plain = create_model("resnet", **options)
    assert torch.equal(model.layer3[0].bn3.bn.weight, plain.layer3[0].bn3.weight)
    assert torch.equal(model.layer3[1].conv3.weight, plain.layer3[1].conv3.weight)


# ---- robustness ------------------------------------------------------------------------------------------


def test_robustness_writes_and_draws_every_network_and_disturbance(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "SCALES", (0.5, 1.0))
    monkeypatch.setattr(study, "SHIFTS", (0.0, 1.0))
    monkeypatch.setattr(study, "SPREADS", (0.5,))
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
    assert (tmp_path / "robustness.png").stat().st_size > 10_000
    assert "network" in capsys.readouterr().out


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
    assert len(set(grid)) == len(grid) == len(study.SCALES) * len(study.SHIFTS) + 2 * len(study.SPREADS)
    assert Disturbance() in grid
    assert dataclasses.asdict(grid[-1]) == {"a": 1.0, "b": 0.0, "s": study.SPREADS[-1], "seed": 1}


# ---- tables and bad input --------------------------------------------------------------------------------


def test_a_table_of_another_configuration_is_left_alone(tmp_path):
    path = tmp_path / "new" / "a.csv"
    Table(path, {"epochs": 1}).add({"x": 0.1})
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
    ],
)
def test_bad_input_is_one_line(words, expected, tmp_path, capsys):
    assert main([*words, "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert expected in line
