"""What is seen of the commands: 80 columns, help without torch, one bar, and the table of policies."""

import io
import re
import sys

import pytest
from processes import ROOT, run_python, succeeds

pytest.importorskip("typer")
pytest.importorskip("diffusers")

import typer.main
from rich.console import Console
from typer.testing import CliRunner

import fastcache
import fastcache.public
from fastcache.cli import demo as demo_command, doctor as doctor_command, frontier as frontier_command
from fastcache.cli.app import app
from fastcache.cli.policies import DESCRIPTIONS, fields_of
from fastcache.cli.policy_options import NAMES
from fastcache.engine.record import StepKindSummary
from fastcache.ops.verify import Verdict
from fastcache.policies import POLICIES
from fastcache.version import __version__
from fastcache.workshop.environment import Environment
from fastcache.workshop.progress import Progress
from fastcache.workshop.studies.comparison import SETTINGS, Sampler
from fastcache.workshop.studies.demo import DemoReport, DemoRow
from fastcache.workshop.studies.frontier.grid import DEFAULT_GRID
from fastcache.workshop.studies.frontier.report import FrontierReport
from fastcache.workshop.studies.frontier.results import FrontierRow

WIDTH = 80
WHERE = Environment("0.1.0", "2.13.0+cpu", "3.11.7", "AMD EPYC 9R14 96-Core Processor", "cpu", 2, "cpp")


def shown(*parts: object) -> list[str]:
    """The lines that a terminal of 80 columns shows of tables and texts."""
    console = Console(file=io.StringIO(), width=WIDTH)
    for part in parts:
        console.print(part)
    return console.file.getvalue().splitlines()


def fits(lines: list[str], *words: str) -> None:
    """No line is longer than 80 columns, and every one of these words stands whole in some line."""
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    assert "…" not in text
    missing = [word for word in words if not re.search(rf"(?<!\S){re.escape(word)}(?!\S)", text)]
    assert not missing, f"{missing}\n{text}"


def output(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(WIDTH)})
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


# --- 80 columns ------------------------------------------------------------------------------------


def demo_report() -> DemoReport:
    kinds = {
        kind: StepKindSummary(17, 1.0, ops) for kind, ops in (("full", 157), ("partial", 73), ("skip", 22))
    }
    rows = [
        DemoRow(s.name, {}, [1.0], 12.345, 13.87, 13.97, 14.37, 1.02, 38.1, 1.0, kinds, 188_500_000, 0)
        for s in SETTINGS
    ]
    return DemoReport(WHERE, Sampler(), 36, 2, rows)


def test_the_demo_fits_with_every_number_whole() -> None:
    report = demo_report()
    lines = shown(demo_command.table_of(report), demo_command.costs_of(report))
    fits(lines, "12.345", "13.87x", "13.97x", "14.37x", "1.02", "38.1", "100%", "188.5", "157,", "73,", "22")
    for setting in SETTINGS:
        assert any(line.strip().startswith(setting.name) for line in lines)


def frontier_report() -> FrontierReport:
    rows = [
        FrontierRow(s.name, s.method, s.interval, s.usual, {}, 1008, 1234.567, 0.999, 38.1, 0.245, 0.45,
                    13.87, 13.9, 14.37, 1.02, [1.0], [1.0], {"full": 20, "partial": 30}, 188_500_000)
        for s in DEFAULT_GRID
    ]  # fmt: skip
    return FrontierReport(WHERE, Sampler(), 1008, 0.123, rows, [], {}, [])


def test_the_frontier_fits_with_every_number_whole() -> None:
    lines = shown(frontier_command.table_of(frontier_report()))
    names = {word for setting in DEFAULT_GRID for word in setting.name.split()}
    fits(lines, "0.245", "13.87x", "14.37x", "1.02", "1234.567", "38.1 dB", "99.9%", *names)


def test_doctor_fits_with_every_operator_whole() -> None:
    fits(output("doctor"), *fastcache.backends.library.OPERATORS, "libfastcache_cpu", "eager")


def test_doctor_shows_the_limit_that_it_applies_on_every_line() -> None:
    verdicts = [
        Verdict("residual_update", form, "cpp", dtype, 0.97, limit, True)
        for form, limit in (("sum of 5 gated terms", 1.1), ("attention received, sums given", 3.0))
        for dtype in ("float32", "float16", "bfloat16")
    ]
    lines = shown(doctor_command.verdict_table(verdicts, "cpu"))
    fits(lines, "0.97", "bfloat16", "limit")
    rows = [line.split() for line in lines if "cpp" in line]
    assert [row[-1] for row in rows] == ["1.1", "3.0"]


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_and_breaks_no_word(command: str) -> None:
    lines = output(command, "--help")
    told = [COMMANDS[command].help, *(parameter.help for parameter in COMMANDS[command].params)]
    names = [
        name for parameter in COMMANDS[command].params for name in parameter.opts if name.startswith("-")
    ]
    fits(lines, *names, *{word for text in told for word in (text or "").split()})


def test_help_lists_the_commands_and_the_options_of_all() -> None:
    fits(output("--help"), "--version", "--debug", *COMMANDS)


@pytest.mark.parametrize("policy", NAMES)
def test_a_plan_and_the_table_of_policies_fit(policy: str) -> None:
    fits(output("policies", policy), *DESCRIPTIONS[policy].fields)
    if policy not in ("smoothcache", "l2c"):
        fits(output("plan", "--policy", policy, "--model", "DiT-S/8"))


# --- policies, version -----------------------------------------------------------------------------


def test_every_policy_is_in_the_table_with_fields_defaults_and_page() -> None:
    assert NAMES == tuple(POLICIES) == tuple(DESCRIPTIONS)
    text = "\n".join(output("policies"))
    for name, kind in POLICIES.items():
        assert f"docs/methods/{name}.md" in text and f"fastcache.{kind.__name__}" in text


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_a_policy_has_a_meaning_and_no_other_has(name: str) -> None:
    fields = fields_of(POLICIES[name])
    assert set(DESCRIPTIONS[name].fields) == set(fields) and all(DESCRIPTIONS[name].fields.values())
    lines = output("policies", name)
    for field, default in fields.items():
        assert any(line.split()[:2] == [field, default] for line in lines)


def test_one_policy_is_shown_alone_whatever_its_case() -> None:
    text = "\n".join(output("policies", "ToCa"))
    assert "docs/methods/toca.md" in text and "docs/methods/fora.md" not in text


@pytest.mark.parametrize("way", ["fastcache", "fastcache.cli.main"])
def test_python_runs_the_package_as_the_command(way: str) -> None:
    start = "import runpy, sys; sys.argv = ['fastcache', '--version']; "
    done = run_python(f"{start}runpy.run_module({way!r}, run_name='__main__')")
    assert (done.returncode, done.stdout) == (0, f"fastcache {__version__}\n"), done.stderr


# --- help without torch ----------------------------------------------------------------------------

COUNTED = """
import runpy, sys
sys.argv = {argv!r}
try:
    runpy.run_module("fastcache", run_name="__main__", alter_sys=False)
except SystemExit as ended:
    assert not ended.code, ended.code
heavy = sorted({{"torch", "numpy", "diffusers", "matplotlib", "PIL"}} & set(sys.modules))
assert not heavy, heavy
assert len(sys.modules) < 700, len(sys.modules)
"""


@pytest.mark.parametrize(
    "options",
    [["--help"], ["--version"], *[[name, "--help"] for name in ("sample", "doctor", "plan")]],
    ids=" ".join,
)
def test_help_imports_neither_torch_nor_numpy(options: list[str]) -> None:
    succeeds(COUNTED.format(argv=["/somewhere/bin/fastcache", *options]))


def test_help_of_python_m_fastcache_does_not_import_torch_either() -> None:
    import subprocess

    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fastcache", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "Commands" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fastcache.cli.app" in imported and not {"torch", "numpy"} & imported


def test_an_import_by_anybody_else_registers_the_operators_at_once() -> None:
    succeeds("import fastcache, torch; torch.ops.fastcache.residual_update; assert 'FORA' in vars(fastcache)")


def test_the_names_are_there_in_the_process_of_the_command_too() -> None:
    succeeds("""
import sys
sys.argv = ["bin/fastcache", "--help"]
import fastcache
assert "torch" not in sys.modules
assert {*fastcache.__all__} <= {*dir(fastcache)} | {*fastcache.__all__}
assert fastcache.FORA(interval=2).interval == 2 and fastcache.ops.residual_update
from fastcache import *
assert accelerate and Schedule
try:
    fastcache.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
""")


def test_what_is_public_is_what_the_module_of_public_names_has() -> None:
    made = {name for name in vars(fastcache.public) if not name.startswith("_")}
    assert made == set(fastcache.__all__)


# --- one bar ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_says_what_runs_and_which_kinds_of_step_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    with Progress(100, "sampling", "batch") as bar:
        bar.begin("TaylorSeer interval 5")
        for _ in range(3):
            bar.ran({"full": 11, "forecast": 39})
        bar._bar.refresh()
    last = sys.stderr.getvalue().split("\r")[-3]
    assert last.startswith("TaylorSeer interval 5:   3%|") and "33 full, 117 forecast]" in last


def test_nothing_to_do_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(0, "measuring", "batch") as bar:
        bar.begin("uncached")
    assert sys.stderr.getvalue() == ""


def test_the_extra_is_named_so_that_it_can_be_installed() -> None:
    from fastcache.extras import needs_extra

    with (
        pytest.raises(ModuleNotFoundError, match=r"pip install pillow;.*--no-build-isolation '\.\[demo\]'"),
        needs_extra("demo"),
    ):
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
