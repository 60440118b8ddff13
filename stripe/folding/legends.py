"""What the columns of the tables of `study`, `tradeoff`, `latencies` and `save_onnx` mean."""

from __future__ import annotations

LEGENDS: dict[str, dict[str, str]] = {
    "gates": {
        "place": "position in the order of folding: 1 is folded first, being the least sensitive",
        "1 - strength": "share of the gate's variance that is not stripes",
        "within": "variance over images, the mean over channels",
        "CV": "how far the gate is from constant, relative to its mean vector",
        "energy error": "error left by the constant, as a share of the scaled map's energy",
        "foretold": "the damage that one backward pass predicts",
        "damage": "divergence that folding this gate alone causes on the held-out images",
        "direction": "back: merged into the layer before the gate; forward: into the layers after it",
        "into": "the parameters that took the constant",
        "through": "the layers between the gate and these parameters",
        "reason": "why a multiplication by the constant is left, where no layer could take the constant",
        "weight_growth": "largest weight after merging over the largest before",
    },
    "variants": {
        "folded": "how many gates are folded",
        "last": "the gate folded last",
        "weighting": "which constants replace the gates",
        "recovery": "how the network was improved after folding",
        "divergence": "from the original's outputs on the images held out to choose by",
        "validation": "percent on these images",
        "test_divergence": "from the original's outputs on the test images",
        "test": "percent on the test images",
        "error": "largest difference from the network with constant gates, relative to its output; 0 is exact",
    },
    "predictors": {
        "predictor": "a column of the table of gates",
        "rho": "Spearman's rank correlation with the damage",
        "p": "probability that chance alone gives a correlation as strong",
        "gates": "number of gates that were compared",
    },
    "ranks": {
        "k": "scores per gate; 0: all gates folded",
        "source": "the gate whose map gives the scores of all gates; empty: each gate has its own",
        "numbers": "numbers per image in place of the attention, over all gates",
        "parameters": "number of parameters of the whole network",
        "divergence": "from the original's outputs on the test images; _low and _high: its 95 % interval over images",
        "worth": "percent on the test images",
        "drop": "points lost against the original, image by image; _low and _high likewise",
        "validation_drop": "the same on the images held out to choose by",
    },
    "latency": {
        "milliseconds": "median time of a batch",
        "low": "time in the fastest round",
        "high": "time in the slowest round",
        "speedup": "time of the unfolded network over that of this one",
    },
    "onnx": {
        "nodes": "operators in the file",
        "max_abs_error": "largest difference between onnxruntime's output and torch's",
        "relative_error": "the same, relative to the largest output",
        "operators": "the number of operators of each kind",
    },
}
"""By table and column."""
