"""`python -m fastcache`: the command line, as `fastcache`."""

from fastcache.cli.main import main

if __name__ == "__main__":
    main()
