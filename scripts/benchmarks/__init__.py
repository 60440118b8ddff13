"""One benchmark per module; each offers `add_arguments(parser)` and `run(arguments) -> Result`."""
