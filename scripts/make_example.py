"""Thin a run to chosen epochs, gates and samples: this made the runs that `stripe.load_example` opens."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stripe
from stripe.cli.process import dispatch


def main(argv: Sequence[str] | None = None) -> int:
    """Write the small run; the exit code is 2 on bad input."""
    return dispatch(lambda: read_arguments(argv), run, packages=(__name__, "stripe"))


def run(arguments: argparse.Namespace) -> None:
    """Write the small run with its training curves; print what it holds and its size."""
    thin(stripe.open_run(arguments.run), arguments)
    if (metrics := Path(arguments.run, "metrics.csv")).is_file():
        shutil.copyfile(metrics, arguments.out / "metrics.csv")
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{stripe.open_run(arguments.out)}, {size / 1e6:.2f} MB")


def thin(run: stripe.Run, arguments: argparse.Namespace) -> None:
    """Write the chosen part of `run`; on a bad choice, raise ValueError or FileExistsError and write nothing."""
    from stripe.store import RunWriter

    epochs, names = arguments.epochs or run.epochs, arguments.gates or [gate.name for gate in run.gates]
    if unknown := [f"epoch {e}" for e in epochs if e not in run.epochs]:
        raise ValueError(f"run '{arguments.run}' lacks {', '.join(unknown)}; it has {run.epochs}")
    known = [gate.name for gate in run.gates]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"run '{arguments.run}' lacks {', '.join(unknown)}; it has {', '.join(known)}")
    if arguments.out.exists():
        raise FileExistsError(f"'{arguments.out}' is there already: remove it, or choose another directory")
    about: dict[str, Any] = {"model": run.model, "data": run.data, "seeds": run.manifest.seeds}
    gates = [gate for gate in run.gates if gate.name in names]
    squeeze = run.manifest.squeeze
    with RunWriter(arguments.out, gates=gates, squeeze=squeeze, dtype=arguments.dtype, **about) as writer:
        for epoch in epochs:
            with writer.epoch(epoch) as rows:
                rows.append(*read_rows(run, epoch, names, arguments.samples))


def read_rows(run: stripe.Run, epoch: int, gates: Sequence[str], samples: int) -> tuple[Any, ...]:
    """Return ids, labels, attention and squeeze of `samples` rows, spread evenly over the recorded order."""
    import numpy as np

    ids, labels = run.samples(epoch), run.labels(epoch)
    chosen = np.linspace(0, len(ids) - 1, min(samples, len(ids))).round().astype(int)
    attention = {gate: run.attention(gate, epoch)[chosen] for gate in gates}
    squeeze = {gate: run.squeeze(gate, epoch)[chosen] for gate in gates if run.manifest.squeeze}
    return ids[chosen], labels[chosen], attention, squeeze


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: make_example.py runs/se --epochs 1 5 20 --out runs/se-small"
    )
    parser.add_argument("run", metavar="RUN", help="the run to thin")
    parser.add_argument("--epochs", type=int, nargs="+", metavar="E", help="epochs to keep (default: all)")
    parser.add_argument("--gates", nargs="+", metavar="G", help="gates to keep (default: all)")
    parser.add_argument("--samples", type=int, default=500, metavar="N", help="samples to keep (default: 500)")
    parser.add_argument("--dtype", default="float32", help="float32, or float16 for half the size (default: float32)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the small run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
