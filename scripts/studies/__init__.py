"""One study a module; each offers `add_arguments(parser)`, `run(arguments)` and, for `check`, `tables(directory)`.

A study writes what it measured to a CSV, and what follows from that as a table with headings for people (`headed`).
A page shows a table between the lines `<!-- csv: PATH -->` and `<!-- /csv -->`; `study.py check --write` fills it in.
"""
