"""One study a module: `add_arguments(parser)`, `run(arguments)`; rows go to a `Table` that several processes share."""
