"""How a run looks in a notebook: its manifest as HTML, in which every name is escaped."""

import html
from typing import Any

from stripe.gate import table
from stripe.messages import listing
from stripe.store.manifest import KINDS, Manifest

ROWS = 12  # gates shown; of a longer list the middle is left out


def run_html(path: str, manifest: Manifest) -> str:
    """Return HTML that shows how a run was made, what it holds, and its gates, without reading its values."""
    kinds = " and ".join(KINDS if manifest.squeeze else KINDS[:1])
    rows = listing(sorted({sum(part.rows for part in epoch.parts) for epoch in manifest.epochs}))
    facts = {
        "Run": path,
        "model": _sentence(manifest.model),
        "data": _sentence(manifest.data),
        "holds": f"{kinds} of {rows} samples" if manifest.has_samples else manifest.contents,
        "epochs": listing(sorted(epoch.epoch for epoch in manifest.epochs)),
        "gates": f"{len(manifest.gates)}, {sum(gate.channels for gate in manifest.gates)} channels",
    }
    head = "<br>".join(f"<b>{name}</b> {html.escape(fact)}" for name, fact in facts.items())
    gates = table(manifest.gates)
    return f"<p>{head}</p>{gates.to_html(max_rows=ROWS)}"


def _sentence(description: dict[str, Any]) -> str:
    """Write a description as "name value, ...", without values that are unset or too long to read."""
    texts = {name: str(value) for name, value in description.items() if value not in (None, False)}
    return ", ".join(f"{name} {text}" for name, text in texts.items() if len(text) <= 60)
