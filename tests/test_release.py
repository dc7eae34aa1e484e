"""What is released: sdist and wheel hold what they should, run without the clone, and say which versions they need."""

import importlib.metadata
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from test_project import PACKAGE, ROOT, project_files

from hf_polyattn import versions
from hf_polyattn.versions import SUPPORTED, check_versions

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MODULES = {f"hf_polyattn_{name}.py" for name in ("arguments", "cli", "parsing", "scripts", "stages")}


# --- sdist and wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[tarfile.TarFile, zipfile.ZipFile]:
    """sdist of the project's files, and the wheel built from what the sdist holds, as `make dist` does."""
    folder = tmp_path_factory.mktemp("release")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in project_files():
            tar.add(path, path.relative_to(ROOT).as_posix())
    packed.seek(0)
    with tarfile.open(fileobj=packed) as tar:
        tar.extractall(folder / "clone", filter="data")
    sdist = folder / build("build_sdist", folder / "clone", folder)
    with tarfile.open(sdist) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return tarfile.open(sdist), zipfile.ZipFile(folder / build("build_wheel", source, folder))


def build(hook: str, source: Path, out: Path) -> str:
    """One hook of the build backend, in a process of its own; returns the name of the file."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    result = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = set(built[1].namelist())
    code = {p.relative_to(ROOT).as_posix() for p in project_files() if PACKAGE in p.parents}
    assert {path.rpartition(".")[2] for path in code} >= {"py", "cpp", "jinja"}
    recipes = [p.relative_to(ROOT / "recipes") for p in project_files() if ROOT / "recipes" in p.parents]
    carried = {f"hf_polyattn_recipes/{p.as_posix()}" for p in recipes if p.parts[0] != "results"}
    assert any(name.endswith("debug_cpu.yaml") for name in carried)
    assert {name for name in names if ".dist-info/" not in name} == code | MODULES | carried
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_sdist_is_the_project_without_its_history(built):
    held = {name.partition("/")[2] for name in built[0].getnames() if not built[0].getmember(name).isdir()}
    kept = {p.relative_to(ROOT).as_posix() for p in project_files()}
    # what only serves the clone
    kept = {name for name in kept if not name.startswith((".ci/", ".github/", ".gitignore"))}
    assert kept <= held
    extra = {name for name in held - kept if ".egg-info/" not in name}
    assert extra == {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_the_wheel_runs_where_there_is_no_clone(built, tmp_path):
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), built[1].filename], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def hf_polyattn(*words: str) -> str:
        command = [sys.executable, str(target / "bin" / "hf-polyattn"), *words]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "inspect" in hf_polyattn("--help")
    version = re.search(r'"(.*)"', (PACKAGE / "_version.py").read_text()).group(1)
    assert hf_polyattn("--version") == f"hf-polyattn {version}\n"
    report = hf_polyattn("doctor")
    assert report.startswith(f"hf_polyattn {version}, torch {torch.__version__}")
    # a kernel without its source would say that there is no such file
    assert "No such file" not in report
    # without importing them, which takes seconds
    where = "import importlib.util as u; print([u.find_spec(x).origin for x in ('hf_polyattn', 'hf_polyattn_cli')])"
    shown = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.count(str(target)) == 2


# --- versions


def requirements() -> dict[str, Requirement]:
    """Of [project] dependencies, read from the file and not from what is installed."""
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.DOTALL)
    found = [Requirement(entry) for entry in re.findall(r'"([^"]+)"', block)]
    return {entry.name.lower().replace("_", "-"): entry for entry in found}


def test_the_ranges_are_those_of_the_metadata():
    for name, allowed in SUPPORTED.items():
        assert requirements()[name].specifier == Requirement(f"x{allowed.specifier}").specifier


def test_this_environment_is_within_the_ranges(caplog):
    check_versions()
    assert {"transformers", "torch"} == set(SUPPORTED)
    assert Version(torch.__version__) >= Version(SUPPORTED["torch"].tested)
    assert Version(transformers.__version__) >= Version(SUPPORTED["transformers"].tested)
    assert not caplog.records


@pytest.mark.parametrize("version", ["5.20.0", "5.23.0", "5.23.0.dev0", "5.40.1"])
def test_versions_of_transformers_within_the_range(version):
    check_versions({"transformers": version})


@pytest.mark.parametrize(
    ("name", "version", "remedy"),
    [
        ("transformers", "5.19.1", 'pip install "transformers>=5.20,<6"'),
        ("transformers", "6.0.0.dev0", "or upgrade hf_polyattn"),
        ("torch", "2.10.0+cpu", 'pip install "torch>=2.11,<3"'),
        ("torch", "3.0.0", 'pip install "torch>=2.11,<3"'),
    ],
)
def test_versions_outside_say_what_to_install(name, version, remedy):
    with pytest.raises(ImportError) as error:
        check_versions({name: version})
    assert f"{name} {version} is outside the range" in str(error.value)
    assert remedy in str(error.value)


def test_a_version_that_no_test_ran_with_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(versions, "_said", set())
    for _ in range(2):
        check_versions({"torch": "2.12.1+cpu"})
    (record,) = caplog.records
    assert 'not with 2.12.1+cpu: pip install "torch>=2.13"' in record.getMessage()


def pins(name: str) -> dict[str, str]:
    """Package -> version of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(re.match(r"([\w.-]+)==([^ ;]+)", x).groups() for x in lines if x and not x.startswith("#"))


def test_the_oldest_pins_are_the_lower_bounds():
    """Of the packages whose interface we build on; with others, of the oldest that these work with."""
    oldest = pins("constraints-oldest.txt")
    for name in ("transformers", "accelerate", "peft", "datasets", "evaluate", "tokenizers", "safetensors"):
        (bound,) = [s.version for s in requirements()[name].specifier if s.operator == ">="]
        assert (Version(oldest[name]).major, Version(oldest[name]).minor) == (
            Version(bound).major,
            Version(bound).minor,
        )
    for name, requirement in requirements().items():
        assert requirement.specifier.contains(oldest[name]), name


# --- workflows


def commands(workflow: Path) -> list[str]:
    """All `run:` lines of a workflow."""
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    return set(phony.split())


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_make_targets_and_nothing_else(workflow):
    found = commands(workflow)
    assert found
    for line in found:
        program, target, *rest = line.split()
        assert (program, target in targets()) == ("make", True), line
        assert all(re.fullmatch(r"[A-Z]+=\S+", word) for word in rest)
        # no text of an event ends up in a shell
        assert "${{" not in line
        subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, capture_output=True, check=True)


def test_workflows_are_those_of_tests_and_releases():
    assert [path.name for path in WORKFLOWS] == ["release.yml", "test.yml"]
    assert {line.split()[1] for path in WORKFLOWS for line in commands(path)} == {
        *("test", "demo", "test-oldest", "check-tag", "dist"),
    }


def test_only_the_upload_may_do_more_than_read():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}
        for name, job in workflow["jobs"].items():
            expected = {"id-token": "write"} if (path.name, name) == ("release.yml", "publish") else None
            assert job.get("permissions") == expected
            assert "secrets." not in str(job)


def test_workflows_try_each_python_that_is_promised():
    matrix = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)
    assert min(matrix["python"], key=Version) == oldest
    assert f'target-version = "py{oldest.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()


# --- releases


@pytest.mark.parametrize(
    ("tag", "heading", "message"),
    [
        ("v{version}", "## {version} (2026-12-01)", None),
        ("v{version}", "## {version} (not released yet)", "gives no date"),
        ("v99", "## {version} (2026-12-01)", "is not v{version}"),
        ('v"; touch here; "', "## {version} (2026-12-01)", "is not v{version}"),
    ],
)
def test_a_tag_must_fit_version_and_changelog(tmp_path, tag, heading, message):
    version = re.search(r'"(.*)"', (PACKAGE / "_version.py").read_text()).group(1)
    (tmp_path / "hf_polyattn").mkdir()
    (tmp_path / "hf_polyattn" / "_version.py").write_text((PACKAGE / "_version.py").read_text())
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "CHANGELOG.md").write_text(heading.format(version=version))
    result = subprocess.run(
        ["make", "check-tag", f"PYTHON={sys.executable}"],
        cwd=tmp_path,
        env={**os.environ, "TAG": tag.format(version=version)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode == 0) == (message is None), result.stderr
    assert (message or "").format(version=version) in result.stderr
    assert not (tmp_path / "here").exists()


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.M)
    parsed = [re.fullmatch(r"(\d+\.\d+\.\d+) \((not released yet|\d{4}-\d\d-\d\d)\)", heading) for heading in headings]
    assert all(parsed), headings
    found = [Version(m.group(1)) for m in parsed]
    assert found == sorted(found, reverse=True)
    # only the newest may be open, and it is the version of the code
    assert not any("not released" in m.group(2) for m in parsed[1:])
    assert str(found[0]) == importlib.metadata.version("hf-polyattn")
    allowed = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= allowed
