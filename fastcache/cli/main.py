"""Entry point of the `fastcache` command."""

import sys

from fastcache.extras import needs_extra


def main() -> None:
    """Run the command line; `Commands` tells what goes wrong in one line, but for a missing package."""
    try:
        with needs_extra("demo"):
            from fastcache.cli.app import app
    except ModuleNotFoundError as error:
        print(f"fastcache: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fastcache: interrupted", file=sys.stderr)
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
