"""`folding.study` on a network whose damage is known beforehand: what goes first, what is chosen, what is refused."""

import gc
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stripe
from stripe.folding import study
from stripe.folding.studying import most_folded


class Gated(nn.Module):
    """A map of two channels, 1 and the signal; the gate opens channel 0 where the signal is bright, channel 1 half."""

    def __init__(self, signal: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.zero_()
            self.conv.bias[0] = self.conv.weight[1, signal] = 1
            self.fc.weight[0, 1], self.fc.bias[0] = 20, -10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return (x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))).mean((2, 3))[:, 0]


class Known(nn.Module):
    """Says class 1 where the gate of `common` or that of `rare` opens; `idle` has a gate that nobody listens to."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.rare, self.idle = Gated(0), Gated(1), Gated(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.common(x) + self.rare(x) + 0 * self.idle(x) - 0.5
        return torch.stack([-seen, seen], 1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Known().eval()


@pytest.fixture(scope="module")
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """45 dark images of class 0; of class 1, 45 by the common signal and 10 by the rare one; the idle one is random."""
    signals = torch.tensor([[0, 0]] * 45 + [[1, 0]] * 45 + [[0, 1]] * 10).float()
    idle = torch.rand(100, 1, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    images = torch.cat([signals, idle], 1)[order][..., None, None].expand(100, 3, 4, 4)
    return list(zip(images.split(30), (signals.amax(1) > 0).long()[order].split(30), strict=True))


def accuracies(table: pd.DataFrame, **chosen: str) -> list[float]:
    for column, value in chosen.items():
        table = table[table[column].isin([value, "none"])]
    return table.drop_duplicates("folded")["validation"].tolist()


# At its constant, 0.45, the common gate loses its 45 images to class 0; at its own, 0.1, the rare gate loses its 10.
# With both, 0.45 + 0.1 is above 0.5: everything is class 1, and the 45 dark images are wrong.
KEPT = [100, 100, 90, 55]


def leaving(common: float | None, rare: float | None) -> float:
    """The divergence from the original, worked out by hand, with gates at constants; p(class 1) = sigmoid(2 seen)."""
    total = 0.0
    for images, signals in ((45, (0, 0)), (45, (1, 0)), (10, (0, 1))):
        before = 1 / (1 + np.exp(1 - 2 * sum(signals)))
        held = [
            signal if constant is None else constant for signal, constant in zip(signals, (common, rare), strict=True)
        ]
        after = 1 / (1 + np.exp(1 - 2 * sum(held)))
        total += images * (before * np.log(before / after) + (1 - before) * np.log((1 - before) / (1 - after)))
    return total / 100


DAMAGE = {"common": leaving(0.45, None), "rare": leaving(None, 0.1), "idle": 0}
SLACK = 2e-3  # the gates are sigmoid(10) where they are taken for 1


@pytest.mark.parametrize("order", ["single", "greedy", "foretold"])
@pytest.mark.parametrize("measure", ["accuracy", "agreement"])
def test_gates_go_by_their_damage_and_each_step_costs_what_it_must(model, batches, order, measure):
    found = study(model, batches[0][0][:2], batches, batches, None, order=order, measure=measure)
    gates = found.gates.set_index("gate")
    assert (
        "damage" not in gates if order == "foretold" else gates["damage"].to_dict() == pytest.approx(DAMAGE, abs=SLACK)
    )
    assert gates["place"].to_dict() == {"idle": 1, "rare": 2, "common": 3}
    assert accuracies(found.variants, weighting="energy") == pytest.approx(KEPT)
    assert found.variants["last"][1] == "idle"
    assert (found.variants["error"] < 1e-12).all()
    assert (found.chosen.folded, found.measure) == (3, measure)
    assert stripe.find_gates(found.chosen.network, batches[0][0]) == []
    assert len(stripe.find_gates(model, batches[0][0])) == 3, "the network itself is left alone"


@pytest.mark.parametrize(("max_drop", "folded"), [(0, 1), (9.9, 1), (10.01, 2), (50, 3), (None, 3)])
def test_as_many_gates_are_folded_as_cost_at_most_the_allowed_drop(model, batches, max_drop, folded):
    found = study(model, batches[0][0][:2], batches, batches, max_drop, weightings=["energy"])
    assert found.chosen.folded == folded
    left = {gate.name for gate in stripe.find_gates(found.chosen.network, batches[0][0])}
    assert left == set(found.gates["gate"][found.gates["place"] > folded])
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        right = (found.chosen.network(images).argmax(1) == labels).double().mean()
    assert 100 * float(right) == pytest.approx(KEPT[folded])


def test_half_a_point_is_what_folding_may_cost_unless_it_is_said(model, batches):
    vectors = ["mean", "energy", "fisher", "learned"]
    assert study(model, batches[0][0], batches, batches, weightings=vectors).chosen.folded == 1


def test_keep_leaves_the_most_sensitive_gates_whatever_the_others_cost(model, batches):
    found = study(model, batches[0][0], batches, batches, 0, keep=1, recoveries={}, weightings=["mean"])
    assert found.variants["folded"].tolist() == [0, 2]
    assert found.chosen.folded == 2


def test_the_choice_takes_the_best_of_the_ways_of_folding():
    rows = [
        {"folded": folded, "validation": validation}
        for folded, validation in [(0, 90.0), (1, 89.0), (1, 89.8), (2, 89.4), (2, 89.6), (3, 80.0), (3, 85.0)]
    ]
    assert [most_folded(rows, drop) for drop in (None, 0.5, 0.3, 0.1)] == [3, 2, 1, 0]


def test_recoveries_are_tried_at_the_chosen_number_or_at_each_and_the_best_is_chosen(model, batches):
    def spoil(network: nn.Module) -> nn.Module:
        return Known().eval() if network is model else nn.Sequential(network, nn.Linear(2, 2)).requires_grad_(False)

    rows, tried = [], {"spoiled": spoil}
    choices = {"counts": [2], "weightings": ["mean"], "recoveries": tried, "test": batches[:1], "callback": rows.append}
    found = study(model, batches[0][0], batches, batches, 20, **choices)
    assert found.variants["recovery"].tolist() == ["none", "none", "spoiled", "spoiled"]
    assert found.variants.to_dict("records") == rows
    assert found.chosen.recovery == "none"
    assert found.variants["test"][0] == 100
    each = study(model, batches[0][0], batches, batches, 20, recover_each=True, **choices)
    assert each.variants["recovery"].tolist() == ["none", "spoiled"] * 2


def test_means_of_ones_own_stand_in_for_those_measured(model, batches):
    given = {gate: [1.0, 1.0] for gate in DAMAGE}
    found = study(model, batches[0][0], batches, batches, None, weightings=["mean", "energy"], means=given)
    assert accuracies(found.variants, weighting="energy") == pytest.approx(KEPT)
    assert accuracies(found.variants, weighting="mean") == pytest.approx([100, 100, 55, 55])
    with pytest.raises(ValueError, match="the means lack gates common, idle"):
        study(model, batches[0][0], batches, batches, means={"rare": [1.0, 1.0]})


def test_its_tables_are_what_the_plot_takes(model, batches):
    found = study(model, batches[0][0], batches, batches, None, weightings=["mean"], recoveries={})
    times = found.latencies(counts=[0, 3], backends=["eager"], batches=[1, 4])
    assert times["folded"].tolist() == [0, 3, 0, 3]
    ax = stripe.plots.fold_pareto(found.variants, times)
    assert ax.collections[0].get_offsets().tolist() == pytest.approx(np.array([[times["milliseconds"][3], 55]]))
    assert stripe.plots.fold_pareto(found.variants).get_ylabel() == "validation accuracy (%)"
    plt.close("all")
    assert "<p>3 of 3 gates folded (mean, none): divergence 0.11, accuracy 55.00 %" in found._repr_html_()


def test_batches_may_change_their_order(model, batches):
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    shuffled = DataLoader(TensorDataset(images, labels), 25, shuffle=True, generator=torch.Generator().manual_seed(0))
    for measure in ("accuracy", "agreement"):
        found = study(model, images[:2], shuffled, shuffled, None, measure=measure, weightings=["energy"])
        assert accuracies(found.variants) == pytest.approx(KEPT)


def test_labels_are_not_needed(model, batches):
    bare = [(images,) for images, _ in batches]
    unlabelled = [(images, torch.full_like(labels, -1)) for images, labels in batches]
    for given in (bare, unlabelled):
        found = study(model, batches[0][0][:2], given, given, None, weightings=["energy"])
        assert found.measure == "agreement"
        assert accuracies(found.variants) == pytest.approx(KEPT)
        with pytest.raises(ValueError, match="measure 'accuracy'.*expected one of agreement"):
            study(model, batches[0][0][:2], given, given, measure="accuracy")


class Several(Known):
    """Gives out the scores and the map before them, by name."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = super().forward(x)
        return {"scores": scores, "map": torch.tanh(self.common.conv(x))}


@pytest.mark.equal_bits
def test_any_output_is_measured_by_its_relative_error_and_its_cosine(batches):
    network = Several().eval()
    found = study(network, batches[0][0][:2], batches, batches, None, weightings=["energy"], recoveries={})
    assert found.measure == "cosine"
    scores = np.array([[-seen, seen] for images, seen in ((45, -0.5), (55, 0.5)) for _ in range(images)])
    held = np.array([[-seen, seen] for images, seen in ((45, 0.05), (45, 0.05), (10, 0.05)) for _ in range(images)])
    error = np.sqrt(((scores - held) ** 2).sum() / (scores**2).sum()) / 2  # the mean over two tensors, one exact
    assert found.variants["divergence"].iloc[-1] == pytest.approx(error, abs=SLACK)
    assert found.variants["divergence"][0] == 0
    assert found.variants["validation"][0] == pytest.approx(100)
    assert found.variants["validation"].iloc[-1] < 99.9


def test_of_each_number_of_folded_gates_one_network_alone_is_kept(model, batches):
    built = weakref.WeakSet()

    class Watched(Known):
        def __setstate__(self, state):  # of every copy
            super().__setstate__(state)
            built.add(self)

    watched = Watched().eval()
    watched.load_state_dict(model.state_dict())
    found = study(watched, batches[0][0], batches, batches, weightings=["mean", "energy", "fisher"], recover_each=True)
    gc.collect()
    kept = [network for network in found.networks.values() if network is not watched]
    assert len(found.variants) > 2 * len(found.networks)
    assert sorted(map(id, built)) == sorted(map(id, kept))


def test_the_nearest_to_the_original_is_chosen_of_the_kinds_of_constants(model, batches):
    wrong = {gate: [0.9, 0.5] for gate in DAMAGE}
    found = study(model, batches[0][0][:2], batches, batches, None, counts=[3], recoveries={}, means=wrong)
    rows = found.variants.set_index("weighting")["divergence"]
    assert list(rows.index) == ["none", "mean", "energy", "fisher", "learned", "matrix"]
    assert found.chosen.weighting == rows[1:].idxmin() != "mean"
    assert rows[1:].min() < 0.5 * rows["mean"]
    assert f"divergence {rows[1:].min():.3g}" in found.summary()


def test_a_recovery_that_ruins_the_network_with_nothing_folded_is_shown_and_never_chosen(model, batches):
    """What this one returns is, with gates folded, nearer than folding is; but its control is ruined."""

    def unfair(network: nn.Module) -> nn.Module:
        return Constant() if network is model else model

    def fair(network: nn.Module) -> nn.Module:
        return model

    words = {"counts": [3], "weightings": ["mean"], "recoveries": {"unfair": unfair}}
    found = study(model, batches[0][0], batches, batches, None, **words)
    rows = found.variants.set_index(["folded", "recovery"])["divergence"]
    assert rows[3, "unfair"] < rows[3, "none"] < rows[0, "unfair"]
    assert found.chosen.recovery == "none"
    words["recoveries"] = {"fair": fair}
    assert study(model, batches[0][0], batches, batches, None, **words).chosen.recovery == "fair"


class Constant(nn.Module):
    """Says class 0 of everything."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[5.0, -5.0]]).expand(len(x), 2)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"order": "random"}, "order 'random': expected one of foretold, single, greedy"),
        ({"measure": "loss"}, "measure 'loss': expected one of accuracy, agreement, cosine"),
        ({"max_drop": -1}, "max_drop -1: expected points of at least 0"),
        ({"max_drop": float("nan")}, "max_drop nan"),
        ({"keep": 4}, "-1 gates to fold: expected 0 to 3"),
        ({"counts": [1, 9]}, "1, 9 gates to fold: expected 0 to 3"),
        ({"weightings": ["median"]}, "no weighting 'median'"),
        ({"held_out": iter([])}, "held_out can be read only once"),
        ({"calibration": iter([])}, "calibration can be read only once"),
        ({"held_out": [], "measure": "agreement"}, "there are no batches to compare networks on"),
        ({"model": Known()}, "in train mode"),
        ({"model": nn.Conv2d(3, 2, 1).eval()}, "no gate to fold"),
    ],
)
def test_what_cannot_be_studied_is_refused(model, batches, choices, message):
    words = {"model": model, "images": batches[0][0], "calibration": batches, "held_out": batches} | choices
    with pytest.raises(ValueError, match=message):
        study(**words)
