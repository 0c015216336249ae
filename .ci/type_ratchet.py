#!/usr/bin/env python3
"""Types as a ratchet: no folder may have more mypy errors than `.ci/type-errors.json` allows it.

    python .ci/type_ratchet.py            check; what is not in the file must have none
    python .ci/type_ratchet.py --write    lower the allowed counts to those of now (make types-baseline)

Settings are in pyproject.toml. Only what mypy says of a whole run counts, so files are not passed.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ROOT / ".ci" / "type-errors.json"
ERROR = re.compile(r"^(?P<path>[^:]+):\d+: error: ")


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"]):
        print(__doc__, file=sys.stderr)
        return 2
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ERROR.match(line)]
    if done.returncode not in (0, 1) or (done.returncode == 1) != bool(errors):
        print(done.stdout + done.stderr, file=sys.stderr)
        return 2
    found = Counter(folder_of(line) for line in errors)
    allowed: dict[str, int] = json.loads(ALLOWED.read_text())
    rose = {folder for folder in found if found[folder] > allowed.get(folder, 0)}
    for line in errors:
        if folder_of(line) in rose:
            print(line)
    if arguments:
        return lowered(found, allowed, rose)
    for folder in sorted(rose):
        print(f"types: {folder} has {found[folder]} errors, at most {allowed.get(folder, 0)} are allowed")
    fell = {folder for folder in allowed if found[folder] < allowed[folder]}
    for folder in sorted(fell):
        print(f"types: {folder} has {found[folder]} errors instead of {allowed[folder]}: make types-baseline")
    if not rose | fell:
        print(f"types: {found.total()} errors, as many as are allowed")
    return 1 if rose else 0


def lowered(found: "Counter[str]", allowed: dict[str, int], rose: set[str]) -> int:
    """Writes the counts of now, unless one rose; a larger count is for a person to write."""
    if rose:
        print(f"types: not written, these rose: {', '.join(sorted(rose))}", file=sys.stderr)
        return 1
    ALLOWED.write_text(json.dumps(dict(sorted(found.items())), indent=2) + "\n")
    print(f"types: {sum(allowed.values())} errors were allowed, {found.total()} are now")
    return 0


def folder_of(line: str) -> str:
    """fastcache/engine/trunk.py:1: error: ... -> fastcache/engine"""
    match = ERROR.match(line)
    assert match is not None
    return "/".join(Path(match["path"]).parts[:2]) if match["path"].count("/") > 1 else match["path"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
