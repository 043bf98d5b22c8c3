"""Demo and smoke tests with every Python of this machine, each in a fresh environment: `make matrix`, `make constraints`.

Runs before anything is installed: standard library only. What a step printed is in .matrix/pyXYZ/<step>.log; an environment is
removed once all of its steps passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ["3.11", "3.12", "3.13", "3.14"]
DEADLINES_S = {"setup": 3000, "newest": 1200, "demo": 900, "smoke": 1500}
# Of torch's build and of the installer: no committed version fits all of TORCH_SPEC, TORCH_INDEX and pip.
NOT_OURS = re.compile(r"torch|triton|nvidia-.*|cuda-.*|pip|setuptools|wheel|uv", re.IGNORECASE)
LINES_SHOWN = 30


@dataclass
class Run:
    """One interpreter, its environment and what became of each step: "ok 12 s", "failed", ..."""

    python: str
    version: str
    folder: Path
    steps: dict[str, str] = field(default_factory=dict)

    @property
    def venv(self) -> Path:
        return self.folder / "venv"

    @property
    def constraints(self) -> Path:
        return ROOT / "constraints" / f"{self.folder.name}.txt"

    def make(self, target: str, *variables: str) -> list[str]:
        return ["make", f"PYTHON={self.python}", f"VENV={self.venv}", *variables, target]

    def smoke(self) -> list[str]:
        # A folder of its own: other runs of pytest on this machine remove the oldest of those that they share.
        options = ["-p", "no:cacheprovider", f"--basetemp={self.folder / 'tmp'}", "--durations=5"]
        return [str(self.venv / "bin" / "python"), "-m", "pytest", "-m", "smoke", *options]

    def try_out(self, name: str, command: list[str]) -> bool:
        """Whether the command ends well within its deadline; its output goes to a log file."""
        log, start_s = self.folder / f"{name}.log", time.monotonic()
        say(f"Python {self.version}: {name} (at most {DEADLINES_S[name] // 60} min, log: {log.relative_to(ROOT)})")
        with log.open("w") as file:
            print("$", *command, file=file, flush=True)
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code: int | str = process.wait(DEADLINES_S[name])
            except subprocess.TimeoutExpired:
                code = "deadline"
            finally:
                end(process)
        took = f"{time.monotonic() - start_s:.0f} s"
        self.steps[name] = f"ok {took}" if code == 0 else f"FAILED {took}"
        if code == 0:
            say(f"Python {self.version}: {name} ok after {took}")
            return True
        say(f"Python {self.version}: {name} failed ({code}) after {took}; the end of its log:")
        print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-LINES_SHOWN:]), flush=True)
        return False

    def installed(self) -> dict[str, str]:
        """name -> version of what constraints may name."""
        command = [str(self.venv / "bin" / "python"), "-m", "pip", "list", "--format=json", "--exclude-editable"]
        rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
        return {plain(row["name"]): row["version"] for row in rows if not NOT_OURS.fullmatch(row["name"])}

    def committed(self) -> dict[str, str]:
        lines = self.constraints.read_text().splitlines() if self.constraints.exists() else []
        return dict(line.split("==") for line in lines if line and not line.startswith("#"))

    def requirements(self) -> list[str]:
        """Names of what pyproject.toml asks for, extras included, without bounds."""
        lines = ask(
            str(self.venv / "bin" / "python"), "import importlib.metadata as m; print(*m.requires('sparsevila-cluster'), sep='|')"
        )
        names = [re.match(r"[\w.-]+(\[[\w,]+\])?", line) for line in lines.split("|")]
        return [name[0] for name in names if name and not NOT_OURS.fullmatch(name[0])]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def end(process: subprocess.Popen) -> None:
    """Ends what a step left behind, and the step itself where it did not end in time."""
    for sent, within_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, sent)
            process.wait(within_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def interpreters() -> dict[str, tuple[str, str]]:
    """version -> (path, full version): the first one on PATH that can make environments, else the newest of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = {}
    for version in VERSIONS:
        on_path = [Path(folder) / f"python{version}" for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
        of_pyenv = sorted(pyenv.glob(f"{version}.*/bin/python{version}"), key=numbers_of, reverse=True)
        for path in [*on_path, *of_pyenv]:
            full = ask(str(path), "import sys, venv, ensurepip; print(sys.executable, '%d.%d.%d' % sys.version_info[:3])")
            if full and full.split()[-1].startswith(f"{version}."):
                found[version] = (full.rpartition(" ")[0], full.split()[-1])
                break
    return found


def numbers_of(path: Path) -> list[int]:
    """.../versions/3.12.10/bin/python3.12 -> [3, 12, 10]"""
    return [int(number) for number in re.findall(r"\d+", path.parts[-3])]


def ask(python: str, code: str) -> str:
    """What Python prints, "" where it cannot run."""
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def chosen(found: dict[str, tuple[str, str]], only: list[str], own: str) -> list[str]:
    if only == ["other"]:
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        mine = ask(own, code) or ask(sys.executable, code)
        return [version for version in found if version != mine][-1:]
    missing = [version for version in only if version not in found]
    if missing:
        raise SystemExit(f"no Python {', '.join(missing)} that can make environments; found: {', '.join(found) or 'none'}")
    return only or list(found)


def check(run: Run, newest: bool) -> None:
    """All steps of one interpreter, up to the first that fails."""
    if not run.try_out("setup", run.make("setup", *["CONSTRAINTS="] * newest)):
        return
    if newest:
        upgrade = [str(run.venv / "bin" / "python"), "-m", "pip", "install", "--upgrade", *run.requirements()]
        if not run.try_out("newest", upgrade):
            return
        tell_differences(run)
    for name, command in (("demo", run.make("demo", *["CONSTRAINTS="] * newest)), ("smoke", run.smoke())):
        if not run.try_out(name, command):
            if newest:
                find_culprits(run, name, command)
            return


def differences(run: Run) -> dict[str, tuple[str, str]]:
    """name -> (committed, installed) where they differ."""
    committed, installed = run.committed(), run.installed()
    names = sorted(committed.keys() | installed.keys())
    pairs = {name: (committed.get(name, "-"), installed.get(name, "-")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def tell_differences(run: Run) -> None:
    changed = differences(run)
    say(f"Python {run.version}: {len(changed)} releases differ from {run.constraints.relative_to(ROOT)}")
    for name, (old, new) in changed.items():
        print(f"    {name}: {old} -> {new}", flush=True)


def find_culprits(run: Run, name: str, command: list[str]) -> None:
    """Puts the committed versions back, one requirement after the other, until the step passes: the last one was to blame."""
    required = {plain(re.sub(r"\[.*", "", requirement)) for requirement in run.requirements()}
    changed = {package: pair for package, pair in differences(run).items() if package in required and "-" not in pair}
    for package, (old, new) in changed.items():
        say(f"Python {run.version}: {package} back to {old}")
        back = [str(run.venv / "bin" / "python"), "-m", "pip", "install", "-q", "-c", str(run.constraints), f"{package}=={old}"]
        if run.try_out("newest", back) and run.try_out(name, command):
            run.steps[name] = f"FAILED with {package} {new}"
            return
    run.steps[name] = "FAILED"


def freeze(run: Run) -> None:
    if not run.try_out("setup", run.make("setup", "CONSTRAINTS=")):
        return
    head = f"# Python {run.version}: made by `make constraints`, tested by `make matrix`. Torch and what it brings are not here.\n"
    run.constraints.parent.mkdir(exist_ok=True)
    run.constraints.write_text(head + "".join(f"{name}=={version}\n" for name, version in sorted(run.installed().items())))
    say(f"wrote {run.constraints.relative_to(ROOT)}")


def table(runs: list[Run], names: list[str]) -> str:
    rows = [["Python", *names]] + [[run.version, *(run.steps.get(name, "not run") for name in names)] for run in runs]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="versions such as 3.12, or `other`: one that --own is not")
    parser.add_argument("--own", default=str(ROOT / ".venv" / "bin" / "python"), help="the interpreter that `other` leaves out")
    parser.add_argument("--newest", action="store_true", help="newest releases, without constraints and upper bounds")
    parser.add_argument("--freeze", action="store_true", help="write constraints instead")
    parser.add_argument("--keep", action="store_true", help="keep environments, and go on with those that are there")
    args = parser.parse_args()
    found = interpreters()
    for python, full in found.values():
        say(f"found Python {full}: {python}")
    versions = chosen(found, args.only, args.own)
    if not versions:
        print(f"no {'other ' * (args.only == ['other'])}Python from {VERSIONS[0]} to {VERSIONS[-1]} here", flush=True)
        raise SystemExit(args.only != ["other"])
    runs = []
    for version in versions:
        run = Run(*found[version], folder=ROOT / ".matrix" / f"py{version.replace('.', '')}")
        runs.append(run)
        if not args.keep:
            shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True, exist_ok=True)
        freeze(run) if args.freeze else check(run, args.newest)
        if not args.keep and all(step.startswith("ok") for step in run.steps.values()):
            for part in (run.venv, run.folder / "tmp"):
                shutil.rmtree(part, ignore_errors=True)
    names = ["setup"] if args.freeze else [name for name in DEADLINES_S if name != "newest" or args.newest]
    print(f"\n{table(runs, names)}", flush=True)
    raise SystemExit(not all(step.startswith("ok") for run in runs for step in run.steps.values()))


if __name__ == "__main__":
    main()
