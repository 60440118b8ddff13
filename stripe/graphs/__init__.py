"""Gates of an ONNX file: found, recorded and folded like those of a module, but without torch.

`trace` translates a graph into the terms that `stripe.gates.rules` and `stripe.folding.merging` work with, so that a
network has the same gates and the same merges as a file and as a module. `find_gates` finds the gates, `record` writes
their attention into a run, `measure_gates` gives their constants, `fold` writes a file without gates, and `cost` says
how far the outputs of that file are from the original's:

    gates = stripe.graphs.find_gates("model.onnx", images)
    stripe.graphs.record("model.onnx", gates, images, "runs/a")
    uses = stripe.graphs.measure_gates("model.onnx", gates, images)
    constants = {name: use.constant("mean") for name, use in uses.items()}
    report = stripe.graphs.fold("model.onnx", constants, "folded.onnx", images)

The package needs the extra `onnx`: onnx and onnxruntime.
"""

from importlib.util import find_spec

if missing := [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]:
    raise ModuleNotFoundError(f"ONNX files need {', '.join(missing)}: pip install 'stripe-observation[onnx]'")

from stripe.graphs.comparing import Cost, cost  # noqa: E402
from stripe.graphs.file import GraphFile, open_graph  # noqa: E402
from stripe.graphs.folding import fold  # noqa: E402
from stripe.graphs.inputs import Batch, Batches, read_inputs  # noqa: E402
from stripe.graphs.learning import learn_constants  # noqa: E402
from stripe.graphs.recording import explain_gates, find_gates, measure_gates, record  # noqa: E402

__all__ = [
    "Batch", "Batches", "Cost", "GraphFile", "cost", "explain_gates", "find_gates", "fold",
    "learn_constants", "measure_gates", "open_graph", "read_inputs", "record",
]  # fmt: skip
