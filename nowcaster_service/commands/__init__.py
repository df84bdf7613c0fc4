"""One module per ``sidecast`` subcommand, each with ``add_parser`` and ``run``."""
