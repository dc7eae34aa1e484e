"""Promises about the project as a whole: who imports whom, what the files do not say."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_polyattn"


def project_files() -> list[Path]:
    """Every file that is, or could be, committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]
    hidden = (".venv", "build", "dist", "demo", "runs", "__pycache__")
    return [p for p in ROOT.rglob("*") if p.is_file() and not set(p.relative_to(ROOT).parts) & set(hidden)]


def top_imports(path: Path) -> set[str]:
    """Names of the modules that a file imports anywhere, relative ones without their dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_the_definition_fits_on_one_screen():
    assert len((PACKAGE / "ops" / "naive.py").read_text().splitlines()) <= 60


def test_the_demo_starts_without_what_only_recipes_need():
    code = "import sys, hf_polyattn.demo_worker; print({'peft', 'evaluate'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_every_package_that_is_imported_is_a_dependency():
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "recipes").glob("*.py")]
    names = {name.split(".")[0] for path in files for name in foreign_imports(path)} - set(sys.stdlib_module_names)
    names -= {path.stem for path in files} | {PACKAGE.name}
    owners = importlib.metadata.packages_distributions()
    required = dependencies()
    # torch's own wheels for GPUs bring it; it is imported where there is one
    names -= {"triton"}
    missing = {name for name in names if not {normal(owner) for owner in owners.get(name, [name])} & required}
    assert not missing


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def dependencies() -> set[str]:
    """Names under [project] dependencies, read from the file and not from what is installed."""
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.DOTALL)
    return {normal(re.match(r"[\w.-]+", entry).group()) for entry in re.findall(r'"([^"]+)"', block)}


def foreign_imports(path: Path) -> set[str]:
    """Modules that a file imports by their full names."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}


def test_ops_know_nothing_of_transformers():
    for path in (PACKAGE / "ops").glob("*.py"):
        foreign = {name for name in top_imports(path) if name.split(".")[0] in ("transformers", "accelerate")}
        assert not foreign, f"{path.name} imports {foreign}"


def test_config_needs_no_torch():
    assert not {"torch", "transformers"} & top_imports(PACKAGE / "config.py")


def test_package_imports_no_recipe():
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.split(".")[0] == "recipes" for name in top_imports(path)), path


def test_modules_are_small():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 500, path


def test_version_is_written_once():
    version = importlib.metadata.version("hf-polyattn")
    holders = [p for p in project_files() if p.suffix == ".py" and "__version__ =" in p.read_text(encoding="utf-8")]
    assert [p.relative_to(ROOT).as_posix() for p in holders if p != Path(__file__)] == ["hf_polyattn/_version.py"]
    assert f'"{version}"' in (PACKAGE / "_version.py").read_text(encoding="utf-8")
    assert version not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# put together here, so that this file does not contain them
FORBIDDEN = [
    re.escape("/" + "work/"),
    re.escape("/" + "tmp/"),
    re.escape("/" + "root/"),
    re.escape("/" + "home/"),
    re.escape("/opt/" + "wheels"),
    re.escape("../" + "shared"),
    "py" + r"pi\.org",
    "python" + "hosted",
    "download" + r"\.pytorch",
]


def test_no_path_of_a_machine_and_no_registry_host():
    pattern = re.compile("|".join(FORBIDDEN))
    found = []
    for path in project_files():
        if path.suffix in (".png", ".safetensors", ".npz"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def pins() -> dict[str, str]:
    """Name -> version in constraints.txt (the last one where Python versions differ)."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [re.match(r"([A-Za-z0-9_.-]+)==([^ ;]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found), "constraints.txt holds a line that is no pin"
    return {m.group(1).lower().replace("_", "-"): m.group(2) for m in found if m}


def test_every_direct_dependency_is_pinned():
    required = importlib.metadata.requires("hf-polyattn") or []
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-") for line in required}
    assert names <= set(pins()), sorted(names - set(pins()))


def test_pins_name_no_package_of_a_device():
    # torch brings those that fit it; Triton is named for machines without a GPU, where it interprets
    assert not [name for name in pins() if name.startswith(("nvidia", "cuda"))]


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "Makefile", ".ci/run"])
def test_first_screen_is_there(name):
    assert (ROOT / name).stat().st_size > 100


def test_license_is_the_one_in_the_metadata():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert importlib.metadata.metadata("hf-polyattn")["License-Expression"] == "Apache-2.0"


def test_ci_is_executable():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
