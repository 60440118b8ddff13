"""Where a network scales channels by attention, and how to read it there.

`trace` runs a network once and keeps what it computed as a graph; `finding` decides on that graph which
products are gates, by what is computed and never by class names; `reading` takes or replaces their values.
"""

from stripe.gate import Gate, Gates, Product, Tap, table
from stripe.gates.finding import NORMALISERS, Candidate, explain_gates, find_gates
from stripe.gates.isolating import IsolatedAttention, isolate
from stripe.gates.reading import read_gates, replace_gates

__all__ = [
    "NORMALISERS", "Candidate", "Gate", "Gates", "IsolatedAttention", "Product", "Tap", "explain_gates", "find_gates",
    "isolate", "read_gates",
    "replace_gates", "table",
]  # fmt: skip
