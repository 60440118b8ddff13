"""Record, measure and use the stripes of channel attention.

Data flow: network -> `find_gates` -> `Recorder` -> a run (Parquet) -> `open_run` -> `stats.summarize` -> `plots`,
and on the other side `asr.insert` -> training -> `asr.deploy` -> `asr.validate` against the run.
Names are imported on first use, so that `import stripe` costs nothing and reading a run never loads torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stripe import (
        asr,
        attention,
        checkpoints,
        cluster,
        data,
        examples,
        figures,
        folding,
        gate,
        gates,
        graphs,
        models,
        plots,
        recipe,
        recorder,
        report,
        stats,
        store,
        tracking,
        training,
    )
    from stripe.examples import load_example
    from stripe.folding import fold
    from stripe.gate import Gate
    from stripe.gates import find_gates
    from stripe.memory import keep_memory
    from stripe.recorder import Recorder, RecorderCallback
    from stripe.store import Run, open_run
    from stripe.timing import interleave
    from stripe.tracking import Tracker

__version__ = "0.2.0"

_HOMES = {
    "Gate": "stripe.gate",
    "Recorder": "stripe.recorder",
    "RecorderCallback": "stripe.recorder",
    "Run": "stripe.store",
    "Tracker": "stripe.tracking",
    "find_gates": "stripe.gates",
    "fold": "stripe.folding",
    "interleave": "stripe.timing",
    "keep_memory": "stripe.memory",
    "load_example": "stripe.examples",
    "open_run": "stripe.store",
}
__all__ = [
    "Gate", "Recorder", "RecorderCallback", "Run", "Tracker", "asr", "attention", "checkpoints", "cluster", "data",
    "examples", "figures", "find_gates", "fold", "folding", "gate", "gates", "graphs", "interleave", "keep_memory",
    "load_example", "models", "open_run", "plots", "recipe", "recorder", "report", "stats", "store", "tracking",
    "training",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"stripe.{name}")
    raise AttributeError(f"module 'stripe' has no attribute '{name}'; expected one of {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
