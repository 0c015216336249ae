"""How every command starts and ends: one line for what went wrong, and a status that says which kind."""

import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup

from fastcache.cli.errors import INTERNAL, INTERRUPTED, WRONG_INPUT, line_of

RESUMING = ("sample", "quality", "frontier")


class Commands(TyperGroup):
    """Exit status 0: done; 1: a check failed, or an error of ours; 2: wrong input; 130: interrupted."""

    def main(  # type: ignore[override]  # exits, and takes every option of its base by name
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **options: Any
    ) -> None:
        """Run a command and exit. `--debug`, anywhere, shows the traceback of what went wrong."""
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given
        given = [argument for argument in given if argument != "--debug"]
        name = next((argument for argument in given if argument in self.commands), "")
        options["standalone_mode"] = False
        try:
            status = super().main(given, prog_name or "fastcache", **options)
            if status == INTERRUPTED:
                raise KeyboardInterrupt
            sys.stdout.flush()
        except KeyboardInterrupt:
            _say(
                name,
                f"interrupted; run the same command again to {'go on' if name in RESUMING else 'start over'}",
            )
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # the reader of our output has gone, as `head` does
            sys.stdout = None  # nothing is left to flush
            sys.exit(INTERNAL)
        except Exception as error:
            if debug:
                traceback.print_exc()
            sys.exit(self._told(name, error, given))
        sys.exit(status if isinstance(status, int) else 0)

    def _told(self, name: str, error: Exception, given: Sequence[str]) -> int:
        if type(error).__name__ == "Abort":  # the end of what a question was to be answered from
            _say(name, "aborted")
            return INTERNAL
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # of the command line itself
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
                return 0
            _say(name, _usage(error, given))
            return WRONG_INPUT
        options = {parameter.name for parameter in self.commands[name].params} if name else set()
        text, status = line_of(error, options)
        _say(name, text if status == WRONG_INPUT else f"{text} (--debug shows where)")
        return status


def _usage(error: Exception, given: Sequence[str]) -> str:
    """What is wrong with the command line: of an option, its name, what was expected and what was given."""
    parameter = getattr(error, "param", None)
    said = getattr(error, "message", "") or str(error)
    if parameter is None or not said:
        return said or error.format_message()  # type: ignore[attr-defined]
    for option in parameter.opts:
        for index, argument in enumerate(given):
            if argument == option and index + 1 < len(given):
                return f"{option}: {said[:1].lower()}{said[1:]}, got {given[index + 1]!r}"
            if argument.startswith(f"{option}="):
                return f"{option}: {said[:1].lower()}{said[1:]}, got {argument.partition('=')[2]!r}"
    return error.format_message()  # type: ignore[attr-defined]


def _say(name: str, text: str) -> None:
    """One line on standard error; in a terminal, broken between words."""
    line = " ".join(f"{f'fastcache {name}'.strip()}: {text}".split())
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    print(line, file=sys.stderr)
