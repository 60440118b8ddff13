"""Studies, one per module, with `add_arguments(parser)`, `run(arguments)` and, for `check`, `tables(directory)`.

A study writes its measurements to a CSV, and the tables that follow from them with readable headings (`headed`).
A page shows a table between the lines `<!-- csv: PATH -->` and `<!-- /csv -->`; `study.py check --write` fills it in.
"""
