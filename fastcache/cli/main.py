"""Entry point of the `fastcache` command."""

import sys

from fastcache.errors import FastCacheError
from fastcache.extras import needs_extra


def main() -> None:
    """Run the command line. What is missing, a package or a file, and what does not fit is told in one
    line.
    """
    try:
        with needs_extra("demo"):
            from fastcache.cli.app import app
        app()
    except (ModuleNotFoundError, FileNotFoundError, FastCacheError) as error:
        sys.exit(f"fastcache: {error}")


if __name__ == "__main__":
    main()
