"""The subcommands of ``sidecast`` that are the service's."""
