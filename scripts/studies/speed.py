"""The README's table of speeds, from what `benchmark.py NAME --json` wrote: nothing is timed here."""

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.deploy import REFERENCE
from benchmarks.timing import Timing

Timings = Mapping[str, Timing]


def table(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (what, figures, command) of every benchmark that a folder holds a record of, in the order of FIGURES."""
    for (name, what), figures in FIGURES.items():
        if (folder / f"{name}.json").exists():
            content = json.loads((folder / f"{name}.json").read_text())
            timings = {row["case"]: Timing(row["rounds"], row["peak_mb"], None) for row in content["rows"]}
            command = shlex.join(["benchmark.py", content["benchmark"], *content["arguments"]])
            yield what, figures(timings), f"`{command}`"


def _spread(timings: Timings, case: str, other: str) -> str:
    """Return the median, least and greatest ratio of two cases' rounds."""
    ratios = timings[case].ratios(timings[other])
    return f"{timings[case].ratio(timings[other]):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def _memory(timings: Timings, case: str, other: str) -> str:
    """Return how much more memory a case takes at its peak than another."""
    peaks = [timings[name].peak_mb for name in (case, other)]
    return "" if None in peaks else f"{peaks[0] - peaks[1]:.0f} MB"  # type: ignore[operator]


def _recording(timings: Timings) -> str:
    return f"{_spread(timings, 'stripe', 'forward')}; {_memory(timings, 'stripe', 'forward')}"


def _squeeze(timings: Timings) -> str:
    return f"{_spread(timings, 'stripe, squeeze', 'forward')}; {_memory(timings, 'stripe, squeeze', 'forward')}"


def _extractor(timings: Timings) -> str:
    peer, bare = "feature extractor + pandas", timings["forward"]
    more = timings[peer].difference(bare) / timings["stripe"].difference(bare)
    return f"{_spread(timings, peer, 'forward')}; {_memory(timings, peer, 'forward')}; {more:.1f} times"


def _torchlens(timings: Timings) -> str:
    return f"{timings['torchlens'].ratio(timings['forward']):.1f}; {_spread(timings, 'stripe', 'forward')}"


def _stats(timings: Timings) -> str:
    best = min(("duckdb", "polars", "pandas"), key=lambda name: timings[name].median)
    ours = [_spread(timings, case, "read") for case in ("stripe", "stripe, rank", "stripe, rows")]
    peer = f"{timings[best].ratio(timings['stripe, rows']):.1f} ({best})"
    return "; ".join([*ours, peer, f"{timings['stripe'].peak_mb:.0f} MB"])


def _train(timings: Timings) -> str:
    return "; ".join(_spread(timings, f"{form}, reference", f"{form}, stripe") for form in ("SE", "ASR"))


def _deployed(timings: Timings) -> str:
    return "; ".join(_spread(timings, form, "plain") for form in ("SE", "deployed", "ASR + SE, deployed"))


def _fused(timings: Timings) -> str:
    fastest, runtime = "fused, channels-last", "fused, onnxruntime"
    ratios = [_spread(timings, slower, fastest) for slower in (REFERENCE, "SE")]
    return "; ".join([*ratios, _spread(timings, "SE", runtime)])


def _fold(timings: Timings) -> str:
    return "; ".join(_spread(timings, f"attention, {how}", f"folded, {how}") for how in ("onnxruntime", "eager"))


def _memory_kept(timings: Timings) -> str:
    return "; ".join(_spread(timings, f"{form}, kept", form) for form in ("plain", "SE"))


def _scaling(timings: Timings) -> str:
    figures = []
    for kind in ("collect", "stats"):
        sizes = [int(name.removeprefix(f"{kind}, ")) for name in timings if name.startswith(kind)]
        small, large = (f"{kind}, {size}" for size in (min(sizes), max(sizes)))
        slope = math.log(timings[large].ratio(timings[small])) / math.log(max(sizes) / min(sizes))
        figures.append(f"{slope:.2f}, {_memory(timings, large, small)}")
    return "; ".join(figures)


def _startup(timings: Timings) -> str:
    python = timings["python -c pass"]
    slowest = max(timings.values(), key=lambda timing: timing.median)
    return f"{timings['import stripe'].difference(python):.3f} s; {slowest.median:.2f} s"


FIGURES: dict[tuple[str, str], Callable[[Timings], str]] = {
    (
        "collect",
        "recording 54 gates of SE-ResNet-164, 2,000 images: time over the bare loop's; memory above it",
    ): _recording,
    (
        "collect",
        "by torchvision's feature extractor and pandas: the same; what it adds over what recording adds",
    ): _extractor,
    ("torchlens", "by torchlens, 200 images: time over the bare loop's; ours"): _torchlens,
    ("squeeze", "recording with `--squeeze`: time over the bare loop's; memory above it"): _squeeze,
    (
        "stats",
        "`stats` of 5 x 10,000 x 8,064 values, time over a bare read's: from the moments kept; with the rank; moments "
        "measured from the rows; the best peer's time over that; memory from the moments kept",
    ): _stats,
    ("train", "training SE-ResNet-164, batch 128: images/s over the reference recipe's; the same with ASR"): _train,
    (
        "deploy",
        "inference of ResNet-164, time over the plain network's: SE; ASR deployed; ASR + SE deployed",
    ): _deployed,
    (
        "deploy",
        "ASR fused, channels-last: the reference's form's time over it; SE's; SE's over onnxruntime's",
    ): _fused,
    ("fold-efficientnet", "efficientnet_b0, batch 1: SE's time over the folded network's, onnxruntime; eager"): _fold,
    ("fold-mobilenet", "mobilenet_v3_small, the same"): _fold,
    (
        "memory",
        "inference of ResNet-164 with freed memory kept, as the commands do, over the usual: plain; SE",
    ): _memory_kept,
    ("scaling", "log of time over log of samples, 10,000 to 100,000, and memory added: recording; `stats`"): _scaling,
    ("startup", "`import stripe` over `python -c pass`; the slowest `--help`"): _startup,
}
