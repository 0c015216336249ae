"""The command line: one file per command, gathered in `app`, started by `main`."""
