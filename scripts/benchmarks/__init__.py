"""One benchmark a module; each offers `add_arguments(parser)` and `run(arguments) -> Result`."""
