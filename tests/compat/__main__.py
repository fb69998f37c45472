"""`make compat VERSIONS="0.11.0 0.12.4"`: the tests against these Open WebUI.

Each version other than ours has an environment of its own, which is made once and kept
in the user's cache. Only the server runs in it; the tests run in ours. What came of it
becomes a row of `docs/compatibility.md`; rows of other versions stay as they are.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from tests.compat.table import Outcome, Row, write_rows
from tests.unit.host_names import WITH_FALLBACK, Package, missing
from tests.unit.plugin import SOURCE

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "compatibility.md"
INTEGRATION = "tests/integration"
SMOKE = "tests/browser/test_conversation.py"
TWO_AT_A_TIME = ("--numprocesses=2", "--dist=loadfile")  # as `make test` does
SUITE_TIMEOUT = 3600.0
"""Seconds one suite may take against one version."""


def cache() -> Path:
    """Where the environments are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "multi-model-conversation"


def environment_of(version: str) -> Path:
    """The folder of a version's environment, for our version of Python."""
    if version == metadata.version("open-webui"):
        return Path(sys.prefix)  # our own
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    return cache() / f"open-webui-{version}-{python}"


def torch_pin() -> str:
    """The PyTorch of our own environment; the newest one would be twice as large."""
    pins = (ROOT / "constraints.txt").read_text("utf-8").split()
    return next(pin for pin in pins if pin.startswith("torch=="))


def make_environment(version: str) -> Path:
    """Install a version where it is not yet; gives its `open-webui`."""
    folder = environment_of(version)
    ready = folder / "ready"
    if not ready.exists():
        print(f"Making {folder} (some minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        python = str(folder / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, torch_pin()], check=True)
        subprocess.run([*install, torch_pin(), f"open-webui=={version}"], check=True)
        ready.touch()
    return folder / "bin" / "open-webui"


def package_in(folder: Path) -> Package:
    """The sources installed in an environment."""
    return Package(next(folder.glob("lib/python*/site-packages/open_webui")))


def run_suite(program: Path, tests: str, report: Path) -> Outcome:
    """Run tests against a server, two files at a time; what failed once more, alone."""
    files = tests.split()
    first = run_once(program, [*files, *TWO_AT_A_TIME], report)
    if not first.failed:
        return first
    again = [*files, "--last-failed", "--last-failed-no-failures=none"]
    return first.then(run_once(program, again, report))


def run_once(program: Path, arguments: list[str], report: Path) -> Outcome:
    """One run of pytest; its results, the names of what failed included."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    environment = {**os.environ, "MMC_OPEN_WEBUI": str(program)}
    report.unlink(missing_ok=True)
    began = time.monotonic()
    with subprocess.Popen(
        [*command, f"--junitxml={report}"], cwd=ROOT, env=environment
    ) as suite:
        try:
            suite.wait(SUITE_TIMEOUT)
        except subprocess.TimeoutExpired:
            suite.send_signal(signal.SIGINT)  # it then ends its server, too
            return Outcome(failed=(f"no end after {SUITE_TIMEOUT:g} s",))
    return read_report(report, time.monotonic() - began)


def read_report(report: Path, seconds: float) -> Outcome:
    """The outcome in a JUnit file, or that there is none."""
    if not report.exists():
        return Outcome(failed=("the tests did not start",))
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [c for c in cases if {part.tag for part in c} & {"failure", "error"}]
    skipped = [c for c in cases if c.find("skipped") is not None]
    names = tuple(f"{c.get('classname')}.{c.get('name')}" for c in failed)
    passed = len(cases) - len(failed) - len(skipped)
    return Outcome(passed, len(skipped), names, seconds)


def plugin_version() -> str:
    """The version in the file's first lines."""
    found = re.search(r"(?m)^version: (.+)$", SOURCE)
    assert found
    return found[1]


def check(version: str, integration: str, smoke: str) -> Row:
    """Everything about one version."""
    program = make_environment(version)
    folder = environment_of(version)
    absent = missing(package_in(folder))
    known = {f"{name} is gone" for name in WITH_FALLBACK}
    return Row(
        version=version,
        plugin=plugin_version(),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        day=time.strftime("%Y-%m-%d"),
        missing=tuple(one for one in absent if one not in known),
        done_without=tuple(one for one in absent if one in known),
        integration=run_suite(program, integration, folder / "integration.xml"),
        smoke=run_suite(program, smoke, folder / "browser.xml"),
    )


def main() -> int:
    """Check each version named, and write the table; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="make compat", description=__doc__)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--integration", default=INTEGRATION, metavar="TESTS")
    parser.add_argument("--smoke", default=SMOKE, metavar="TESTS")
    options = parser.parse_args()
    rows = []
    for version in options.versions:
        print(f"Open WebUI {version}", flush=True)
        rows.append(check(version, options.integration, options.smoke))
        write_rows(DOCUMENT, rows[-1:])
    for row in rows:
        print(row.summary())
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
