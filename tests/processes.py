"""Python code in a fresh process: for what can be said only of an import, a crash or an environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(
    code: str, folder: Path = ROOT, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code with `folder` as working directory and first on sys.path; our variables are unset unless
    given.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FASTCACHE_") and name != "PYTHONPATH"
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def succeeds(code: str, folder: Path = ROOT, **environment: str) -> str:
    """Run code that must exit with 0; returns what it printed."""
    done = run_python(code, folder, **environment)
    assert done.returncode == 0, (
        f"exit status {done.returncode} (negative: killed by a signal)\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


def fails(code: str, folder: Path = ROOT, **environment: str) -> str:
    """Run code that must end with a Python exception, not a crash; returns the traceback."""
    done = run_python(code, folder, **environment)
    assert done.returncode == 1, (
        f"exit status {done.returncode}, expected an exception\n{done.stdout}\n{done.stderr}"
    )
    return done.stderr


def copied_package(folder: Path, *, compiled: bool = True) -> Path:
    """A copy of the package in `folder`, with or without its compiled libraries; returns the folder."""
    ignored = ["__pycache__"] if compiled else ["__pycache__", "*.so"]
    shutil.copytree(ROOT / "fastcache", folder / "fastcache", ignore=shutil.ignore_patterns(*ignored))
    return folder
