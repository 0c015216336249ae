"""All commands in one typer app."""

import typer

from fastcache.cli.calibrate import calibrate
from fastcache.cli.demo import demo
from fastcache.cli.doctor import doctor
from fastcache.cli.frontier import frontier
from fastcache.cli.plan import plan
from fastcache.cli.quality import quality
from fastcache.cli.sample import sample

app = typer.Typer(name="fastcache", help="Feature caching for diffusion transformers.", no_args_is_help=True)
for command in (demo, quality, frontier, sample, calibrate, plan, doctor):
    app.command()(command)
