"""ONNX files in `collect` and `fold`: how the two commands handle them without torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stripe.cli import options
from stripe.recipe import CONSTANTS

if TYPE_CHECKING:
    import pandas as pd

    from stripe.folding import GateUse
    from stripe.gate import Gate
    from stripe.gates import Candidate
    from stripe.graphs import Batch, GraphFile

ENDING = ".onnx"
WEIGHTINGS = ("mean", "energy", "learned")  # kinds of constants for the gates of a file
HELD_OUT = 5  # every fifth sample is held out of the measurement, to compare outputs on

Choose = Callable[[argparse.Namespace, str, "Sequence[Candidate]"], "list[Gate]"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --inputs, --mean and --std, which an ONNX file does not hold."""
    group = parser.add_argument_group("ONNX files")
    group.add_argument("--inputs", metavar="PATH", help=".npz or .npy file of inputs, or a folder of such files")
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}", nargs=3, type=float, metavar=("R", "G", "B"), help=f"{name} that images are normalised by"
        )


def is_graph(spec: str) -> bool:
    """Whether a checkpoint is an ONNX file."""
    return spec.lower().endswith(ENDING)


def are_graphs(specs: Sequence[str]) -> bool:
    """Whether all checkpoints are ONNX files.

    Raises:
        ValueError: only some of them are.
    """
    if any(map(is_graph, specs)) and not all(map(is_graph, specs)):
        raise ValueError("--ckpt names ONNX files beside other checkpoints: record them as runs of their own")
    return all(map(is_graph, specs))


def candidates(arguments: argparse.Namespace, spec: str) -> list[Candidate]:
    """Search for gates on the first samples; warn of gates for which these are too small, ValueError if that is all."""
    from stripe.graphs import explain_gates, find_gates, open_graph

    file = open_graph(spec)
    found = explain_gates(file, _batches(arguments, file))
    if any(candidate.hidden for candidate in found):
        find_gates(file, _batches(arguments, file))  # its warning or error says what to do
    return found


def collect(arguments: argparse.Namespace, contents: str, choose: Choose) -> int:
    """Record each file as an epoch of one run, in the order in which the files are given."""
    from stripe.graphs import open_graph, record

    if arguments.resume:
        raise ValueError("--resume goes on with checkpoints of a training, not with ONNX files: leave it out")
    for epoch, spec in enumerate(arguments.ckpt):
        file = open_graph(spec)
        gates = choose(arguments, spec, candidates(arguments, spec))
        samples = _batches(arguments, file)
        record(
            file,
            gates,
            samples,
            arguments.out,
            epoch=epoch,
            squeeze=arguments.squeeze,
            dtype=arguments.dtype,
            contents=contents,
            description={"file": Path(spec).name},
            data=_described(arguments),
            files=samples.files if isinstance(samples, _Images) else None,
            overwrite=arguments.overwrite,
            progress=options.progress(f"epoch {epoch}"),
        )
        print(f"{arguments.out}: epoch {epoch}, {len(gates)} gates, from {spec}")
    return 0


def fold(arguments: argparse.Namespace) -> int:
    """Fold a file by each weighting; print what each costs on held-out samples, and which file costs least."""
    import pandas as pd

    from stripe import graphs

    _require_known(arguments)
    file = graphs.open_graph(arguments.ckpt)
    measured = _Part(arguments, file, held_out=False)
    gates = graphs.find_gates(file, measured)
    if not gates:
        raise ValueError(f"{arguments.ckpt} has no gate: see `stripe collect --ckpt {arguments.ckpt} --explain`")
    uses = graphs.measure_gates(file, gates, measured, progress=options.progress("gates"))
    errors = {name: use.error(use.constant("energy")) for name, use in uses.items()}
    names = sorted(errors, key=errors.__getitem__)[: len(errors) - (arguments.keep or 0)]
    if not names:
        raise ValueError(f"--keep {arguments.keep} leaves no gate to fold: there are {len(errors)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    folded = [gate for gate in gates if gate.name in names]
    rows, tables = [], []
    for weighting, constants in _choices(arguments, file, folded, uses, measured):
        row, table = _fold_by(arguments, file, weighting, constants)
        rows.append(row)
        tables.append(table.assign(energy_error=table["gate"].map(errors)))
    costs, table = pd.DataFrame(rows), pd.concat(tables, ignore_index=True)
    for name, each in (("cost", costs), ("gates", table.drop(columns="into"))):
        print(f"\n{name}\n{each.to_string(index=False, float_format='{:.4g}'.format)}")
    chosen = costs["file"].iloc[int(costs["relative_error"].argmin())]
    content = {"chosen": chosen, "cost": options.plain(costs), "gates": options.plain(table)}
    for path in (arguments.out / "fold.json", arguments.json):
        options.write_json(path, content)
    print(f"\n{arguments.out / chosen}")
    return 0


def _choices(
    arguments: argparse.Namespace,
    file: GraphFile,
    gates: Sequence[Gate],
    uses: Mapping[str, GateUse],
    measured: Iterable[Batch],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the constants to compare, by weighting, for gates that are folded together.

    The means are those of the run, if --run names one. A file from which no constants can be learned is folded without
    learned ones, unless --weightings names them.
    """
    from stripe import graphs
    from stripe.folding import mean_constants
    from stripe.store import open_run

    asked = set(arguments.weightings) != set(CONSTANTS)
    for kind in arguments.weightings if asked else WEIGHTINGS:
        if kind == "mean" and arguments.run_path:
            means = mean_constants(open_run(arguments.run_path))
            if lacking := {gate.name for gate in gates} - means.keys():
                raise ValueError(f"the run holds no gate {', '.join(sorted(lacking))}: record one of this file")
            yield kind, {gate.name: means[gate.name] for gate in gates}
        elif kind == "learned":
            how: Any = {"steps": arguments.learning_steps, "progress": options.progress("learning")}
            try:
                learned = graphs.learn_constants(file, gates, uses, measured, **how)
            except ValueError as error:
                if asked:
                    raise
                print(f"no learned constants: {error}")
            else:
                yield kind, learned
        else:
            yield kind, {gate.name: uses[gate.name].constant(kind) for gate in gates}


def _fold_by(
    arguments: argparse.Namespace, file: GraphFile, weighting: str, constants: Mapping[str, Any]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Write the file folded by one weighting; return what this costs, and what became of each gate."""
    from stripe import graphs

    path, compared = arguments.out / f"folded-{weighting}{ENDING}", _Part(arguments, file, held_out=True)
    report = graphs.fold(file, constants, path, compared)
    merged = int((report.table["direction"] != "kept").sum())
    row = {"weighting": weighting, "folded": len(constants), "merged": merged}
    row |= asdict(graphs.cost(file, path, compared)) | {"exactness": report.error, "file": path.name}
    return row, report.table.assign(weighting=weighting)


def _require_known(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that no ONNX file takes: training, other constants, several numbers of gates."""
    unknown = set(arguments.weightings) - {*WEIGHTINGS} if set(arguments.weightings) != set(CONSTANTS) else set()
    if unknown:
        raise ValueError(f"--weightings {min(unknown)}: an ONNX file is folded by some of {', '.join(WEIGHTINGS)}")
    usual = {"max_drop": None, **options.OF_STUDY, "rank": None}
    options.refuse(arguments, usual, "not for ONNX files; fold the network as a module, or leave it out")
    if arguments.keep is not None and arguments.keep < 0:
        raise ValueError(f"--keep {arguments.keep}: expected a number of gates, at least 0")


# ---- samples ----
def _batches(arguments: argparse.Namespace, file: GraphFile) -> Iterable[Batch]:
    """Return the samples that --inputs or --dataset names."""
    from stripe.graphs import read_inputs

    if arguments.inputs:
        return read_inputs(file, arguments.inputs, samples=arguments.samples, size=arguments.batch)
    if arguments.dataset is None:
        raise ValueError("an ONNX file names no data: give --inputs FILE.npz, or --dataset URI for images")
    return _Images(arguments, file)


class _Images:
    """Batches of a data set, and the names of its files by sample id; torch reads the images."""

    def __init__(self, arguments: argparse.Namespace, file: GraphFile) -> None:
        from stripe.data import Loader, load_images

        info = file.inputs[0].type.tensor_type.shape.dim
        fixed = info[2].dim_value if len(info) == 4 else 0
        size = getattr(arguments, "size", None) or fixed or None
        given = {"size": size, "mean": arguments.mean, "std": arguments.std}
        given["channels"] = 1 if len(info) == 4 and info[1].dim_value == 1 else None
        given["skip_broken"] = getattr(arguments, "skip_broken", None)
        images = load_images(
            arguments.dataset,
            getattr(arguments, "split", "train"),
            samples=arguments.samples,
            data_dir=arguments.data_dir,
            **{name: value for name, value in given.items() if value},
        )
        self.files = images.files
        self._file = file
        self._loader = Loader(images, file.batch_size or arguments.batch, workers=arguments.workers)

    def __iter__(self) -> Iterator[Batch]:
        from stripe.graphs import Batch

        for pixels, labels, sample_ids in self._loader:
            if self._file.batch_size in (None, len(pixels)):
                yield Batch({self._file.inputs[0].name: pixels.numpy()}, labels.numpy(), sample_ids.numpy())


@dataclass(frozen=True)
class _Part:
    """The samples to measure on, or those to compare on; read anew by each loop. Batches of a fixed size stay whole."""

    arguments: argparse.Namespace
    file: GraphFile
    held_out: bool

    def __iter__(self) -> Iterator[Batch]:
        from stripe.graphs import Batch

        for i, batch in enumerate(_batches(self.arguments, self.file)):
            count = len(batch.sample_ids)
            if self.file.batch_size:
                if i == 0 or self._is_in(i):
                    yield batch
                continue
            rows = [n for n in range(count) if self._is_in(n)] or [*range(count)]
            parts = {name: a[rows] if a.ndim and len(a) == count else a for name, a in batch.inputs.items()}
            yield Batch(parts, None if batch.labels is None else batch.labels[rows], batch.sample_ids[rows])

    def _is_in(self, position: int) -> bool:
        return (position % HELD_OUT == HELD_OUT - 1) == self.held_out


def _described(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.inputs:
        return {"uri": Path(arguments.inputs).name}
    known = {"uri": arguments.dataset, "split": arguments.split, "size": arguments.size}
    return known | {name: getattr(arguments, name) for name in ("mean", "std") if getattr(arguments, name)}
