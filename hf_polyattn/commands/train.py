"""`hf-polyattn train`: a recipe, found by its name and started by accelerate."""

import importlib.util
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import torch
from accelerate.commands.config.config_args import default_yaml_config_file

PACKAGE = "hf_polyattn_recipes"
"""The recipes as an installed package, where a distribution brings them."""
LAUNCH = "hf_polyattn_scripts"
"""A module that is `accelerate launch`."""
FOLDER = "recipes"
"""The same in a clone of the repository."""
ELSEWHERE = (
    "the recipes are in the repository of hf_polyattn: clone it and run this in the clone, or give the path of the "
    "script instead of its name"
)


def run(args: Namespace) -> str:
    """Starts args.recipe and waits for it; ends with its exit status. Without a recipe, says which there are.

    The recipe runs in processes of its own, as `accelerate launch` makes them; it prints its own progress and errors.
    """
    if args.recipe is None:
        return _listing()
    if args.modules:
        raise ValueError(f"--import does not reach {args.recipe}, which runs in a process of its own: leave it out")
    script = find_recipe(args.recipe)
    words = list(args.words)
    if words and not words[0].startswith("-"):
        words[0] = str(find_config(script, words[0]))
    if {"-h", "--help"} & set(words):
        # at once, and without what accelerate says of its defaults
        command = [sys.executable]
    else:
        command = [sys.executable, *_launch(args, script)]
    status = _wait(subprocess.Popen([*command, str(script), *words]))
    if status:
        # the recipe has said why
        raise SystemExit(status)
    return ""


def _launch(args: Namespace, script: Path) -> list[str]:
    """`accelerate launch` with the options that the command line gives it."""
    words = ["-m", LAUNCH, "--quiet"]
    if args.accelerate:
        words += ["--config_file", str(_find_yaml(args.accelerate, script.parent / "accelerate", "--accelerate"))]
    if args.processes is not None:
        _check_processes(args, script)
    elif args.accelerate or Path(default_yaml_config_file).is_file():
        return words
    if not args.accelerate:
        # accelerate's own defaults, given so that it does not warn of each
        words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*words, "--num_processes", str(args.processes or max(1, torch.cuda.device_count()))]


def recipe_folders() -> list[Path]:
    """Where recipes may be: the clone in which the command runs, the one it was installed from, its own package."""
    folders = [Path.cwd() / FOLDER, Path(__file__).resolve().parents[2] / FOLDER]
    spec = importlib.util.find_spec(PACKAGE)
    folders += [Path(place) for place in (spec.submodule_search_locations if spec else None) or ()]
    return [folder for folder in dict.fromkeys(folders) if any((folder / "configs").glob("*/*.yaml"))]


def find_recipe(name: str) -> Path:
    """The script of a recipe: a path to it, or its name without .py.

    Raises:
        FileNotFoundError: with the names there are, or with where to get them.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folders = recipe_folders()
    for folder in folders:
        if (script := folder / f"{path.name.removesuffix('.py')}.py").is_file() and path.parent == Path():
            return script
    if not folders:
        raise FileNotFoundError(f"no recipe {name!r}: {ELSEWHERE}")
    raise FileNotFoundError(f"no recipe {name!r} in {folders[0]}: there are {', '.join(_names(folders[0]))}")


def find_config(script: Path, name: str) -> Path:
    """A configuration of a recipe: a path to it, or its name in configs/RECIPE beside the script."""
    return _find_yaml(name, script.parent / "configs" / script.stem, script.stem)


def _find_yaml(name: str, folder: Path, what: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if (known := folder / f"{path.name.removesuffix('.yaml')}.yaml").is_file() and path.parent == Path():
        return known
    there = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise FileNotFoundError(
        f"{what}: no configuration {name!r}: give the path of a YAML file"
        + (f", or one of {there} from {folder}" if there else "")
    )


def _names(folder: Path) -> list[str]:
    """Recipes that come with configurations; studies run recipes themselves."""
    return sorted(path.name for path in (folder / "configs").iterdir() if (folder / f"{path.name}.py").is_file())


def _listing() -> str:
    folders = recipe_folders()
    if not folders:
        raise FileNotFoundError(f"no recipes here: {ELSEWHERE}")
    folder = folders[0]
    lines = [f"recipes in {folder}, each with its configurations; hf-polyattn train RECIPE --help lists the fields"]
    for name in _names(folder):
        configs = sorted(file.stem for file in (folder / "configs" / name).glob("*.yaml"))
        lines.append(f"  {name}: {', '.join(configs)}")
    return "\n".join(lines)


def _check_processes(args: Namespace, script: Path) -> None:
    """Raises where accelerate would start one process and say nothing."""
    if args.processes < 1:
        raise ValueError(f"--processes must be 1 or more, got {args.processes}")
    if not args.accelerate and args.processes > max(1, torch.cuda.device_count()):
        raise ValueError(
            f"--processes {args.processes}: there are {torch.cuda.device_count()} GPUs here. On CPUs: "
            f"ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node {args.processes} {script} CONFIG.yaml"
        )


def _wait(process: subprocess.Popen) -> int:
    """Exit status of a process, as a shell gives it; Ctrl-C goes to it too, and it may take a while to end."""
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        # the recipe has said where it stopped
        return 130
    return 128 - status if status < 0 else status
