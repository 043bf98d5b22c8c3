"""The committed constraints fit pyproject.toml, and the matrix finds interpreters and the release that breaks a step."""

import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests import matrix

CONSTRAINTS = sorted((matrix.ROOT / "constraints").glob("py*.txt"))
PROJECT = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [Requirement(line) for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])]


def run_of(path, folder):
    return matrix.Run(sys.executable, "3.11.7", folder / path.stem)


def test_every_supported_python_has_constraints():
    supported = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    assert {f"py{version.replace('.', '')}" for version in supported} == {path.stem for path in CONSTRAINTS}


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_fit_the_bounds_and_leave_torch_alone(path, tmp_path):
    pinned = run_of(path, tmp_path).committed()
    assert not [name for name in pinned if matrix.NOT_OURS.fullmatch(name)]
    for requirement in REQUIREMENTS:
        name = matrix.plain(requirement.name)
        if not matrix.NOT_OURS.fullmatch(name):
            assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]}, but {requirement}"


def test_every_requirement_is_bounded_above():
    assert not [str(one) for one in REQUIREMENTS if not any(bound.operator == "<" for bound in one.specifier)]


def test_interpreters_are_those_that_can_make_environments(tmp_path, monkeypatch):
    for version, prints in (("3.11", "/a/python3.11 3.11.9"), ("3.12", "/a/python3.12 3.11.9"), ("3.13", None)):
        shim = tmp_path / f"python{version}"
        shim.write_text(f"#!/bin/sh\n{'exit 127' if prints is None else f'echo {prints}'}\n")
        shim.chmod(0o755)
    for patch in (9, 10):
        binary = tmp_path / "versions" / f"3.14.{patch}" / "bin" / "python3.14"
        binary.parent.mkdir(parents=True)
        binary.write_text(f"#!/bin/sh\necho {binary} 3.14.{patch}\n")
        binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    found = matrix.interpreters()
    assert found == {"3.11": ("/a/python3.11", "3.11.9"), "3.14": (str(binary), "3.14.10")}
    mine = "{}.{}".format(*sys.version_info)
    assert matrix.chosen(found | {mine: ("", "")}, ["other"], sys.executable) == ["3.14" if mine != "3.14" else "3.11"]
    assert matrix.chosen({mine: ("", "")}, ["other"], sys.executable) == []
    with pytest.raises(SystemExit, match="no Python 3.12"):
        matrix.chosen(found, ["3.11", "3.12"], sys.executable)


def test_the_release_that_breaks_a_step_is_named(tmp_path, monkeypatch, capsys):
    class Fake(matrix.Run):
        now = {"av": "20.0.0", "rich": "16.0.0", "pillow": "13.0.0", "numpy": "3.0.0"}
        old = {"av": "19.0.2", "rich": "15.0.0", "pillow": "13.0.0", "numpy": "2.5.5"}

        def installed(self):
            return dict(self.now)

        def committed(self):
            return dict(self.old)

        def requirements(self):
            return ["av", "numpy", "rich"]

        def try_out(self, name, command):
            if pin := re.fullmatch(r"(\w+)==(.*)", command[-1]):
                self.now = self.now | {pin[1]: pin[2]}
                return True
            good = name != "demo" or self.now["numpy"] == "2.5.5"
            self.steps[name] = "ok" if good else "FAILED"
            return good

    run = Fake(sys.executable, "3.13.0", matrix.ROOT / ".matrix" / "py313")
    matrix.check(run, newest=True)
    assert run.steps["demo"] == "FAILED with numpy 3.0.0" and "smoke" not in run.steps
    assert run.now["rich"] == "16.0.0" and "av: 19.0.2 -> 20.0.0" in capsys.readouterr().out
    assert "FAILED with numpy 3.0.0  not run" in matrix.table([run], list(matrix.DEADLINES_S))


def test_a_step_that_hangs_ends_at_its_deadline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setitem(matrix.DEADLINES_S, "demo", 0.5)
    run = matrix.Run(sys.executable, "3.13.0", tmp_path)
    assert not run.try_out("demo", ["sh", "-c", "echo begun; sleep 600"])
    assert run.steps["demo"].startswith("FAILED") and "failed (deadline)" in (told := capsys.readouterr().out) and "begun" in told
    assert run.try_out("demo", ["sh", "-c", "exit 0"]) and run.steps["demo"].startswith("ok")
