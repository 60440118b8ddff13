"""Where a network scales channels by attention, and how to read it there.

`trace` runs a network once and records what it computed as a `graph`; `rules` decides on that graph which products are
gates, by what they compute and never by class names; `describing` names the gates and says where hooks meet them;
`finding` does all this for a network; `reading` reads or replaces the gates' values. Public names are imported on first
use, because `graph` and `rules` must be usable without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stripe.gate import Gate, Gates, Product, Tap, table

if TYPE_CHECKING:
    from stripe.gates.bounds import NORMALISERS
    from stripe.gates.finding import explain_gates, find_gates
    from stripe.gates.isolating import IsolatedAttention, isolate
    from stripe.gates.reading import read_gates, replace_gates
    from stripe.gates.rules import Candidate

_HOMES = {
    "NORMALISERS": "bounds",
    "Candidate": "rules",
    "IsolatedAttention": "isolating",
    "explain_gates": "finding",
    "find_gates": "finding",
    "isolate": "isolating",
    "read_gates": "reading",
    "replace_gates": "reading",
}

__all__ = [
    "NORMALISERS", "Candidate", "Gate", "Gates", "IsolatedAttention", "Product", "Tap", "explain_gates", "find_gates",
    "isolate", "read_gates", "replace_gates", "table",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stripe.gates' has no attribute '{name}'; expected one of {', '.join(__all__)}")
    return getattr(import_module(f"stripe.gates.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
