"""Each name that users call first has an example in its docstring, and what the example prints is right."""

import doctest
import importlib
import inspect

import matplotlib
import matplotlib.pyplot as plt
import pytest

matplotlib.use("Agg")
EXAMPLES = [
    "asr.anneal", "asr.deploy", "asr.fuse", "asr.insert", "attention.create_attention", "data.Loader",
    "data.load_images", "examples.load_example", "figures.draw", "folding.compact", "folding.study",
    "memory.keep_memory", "models.create_model", "plots.before_after", "plots.strength_by_gate",
    "plots.strength_over_epochs", "plots.stripe_heatmap", "recipe.Recipe", "report.render", "stats.Moments.of",
    "stats.canonical_correlations", "stats.coefficient_of_variation", "stats.drift", "stats.effective_rank",
    "stats.flags", "stats.intraclass_correlations", "stats.label_share", "stats.match", "stats.spectrum",
    "stats.strength_interval", "stats.stripe_strength", "stats.summarize", "stats.two_way_shares", "store.open_run",
    "timing.interleave", "training.evaluate",
]  # fmt: skip


def found(name: str):
    """Return a public name of stripe."""
    room, *parts = name.split(".")
    thing = importlib.import_module(f"stripe.{room}")
    for part in parts:
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_prints_what_it_says(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    thing = found(name)
    text = inspect.getdoc(thing)
    names = vars(importlib.import_module(thing.__module__)) | {name.rsplit(".", 1)[-1]: thing}
    example = doctest.DocTestParser().get_doctest(text, dict(names), name, None, 0)
    assert example.examples
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    plt.close("all")
    assert result.failed == 0, capsys.readouterr().out


def test_a_wrong_example_is_noticed(capsys):
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(example).failed == 1
