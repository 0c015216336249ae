"""All commands in one typer app."""

from typing import Annotated

from typer import Exit, Option, Typer, echo

from fastcache.cli.calibrate import calibrate
from fastcache.cli.commands import Commands
from fastcache.cli.demo import demo
from fastcache.cli.doctor import doctor
from fastcache.cli.frontier import frontier
from fastcache.cli.plan import plan
from fastcache.cli.policies import policies
from fastcache.cli.quality import quality
from fastcache.cli.sample import sample
from fastcache.version import __version__

app = Typer(name="fastcache", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)
for command in (demo, quality, frontier, sample, calibrate, plan, policies, doctor):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        echo(f"fastcache {__version__}")
        raise Exit()


@app.callback()
def fastcache(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Feature caching for diffusion transformers."""
