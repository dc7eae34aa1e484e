"""`hf-polyattn train`: which script it starts, with which words, and what becomes of its exit status."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from cli_runs import run, write

from hf_polyattn.commands import train

SCRIPT = """
import json, os, sys
print(json.dumps({"words": sys.argv[1:], "processes": os.environ.get("ACCELERATE_NUM_PROCESSES")}))
sys.exit(3 if "--fail" in sys.argv else 0)
"""

DEFAULTS = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", "1"]
ON_CPU = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\n"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder of recipes with one script that says what it was given; the command runs beside it."""
    folder = tmp_path / "recipes"
    for name in ("configs/paint", "accelerate"):
        (folder / name).mkdir(parents=True)
    write(folder / "paint.py", SCRIPT)
    write(folder / "study_paint.py", SCRIPT)
    write(folder / "configs" / "paint" / "quick.yaml", "colour: red\n")
    write(folder / "accelerate" / "cpu.yaml", ON_CPU)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def started(monkeypatch):
    """The commands that would be started."""
    commands = []

    class Process:
        def __init__(self, command):
            commands.append([str(word) for word in command])

        def wait(self):
            return 0

    monkeypatch.setattr(train.subprocess, "Popen", Process)
    monkeypatch.setattr(train, "default_yaml_config_file", "none.yaml")
    monkeypatch.setattr(train.torch.cuda, "device_count", lambda: 0)
    return commands


def test_accelerate_does_not_warn_of_its_defaults(clone, monkeypatch, capfd):
    monkeypatch.setattr(train, "default_yaml_config_file", str(clone / "none.yaml"))
    code, said, error = run(capfd, "train", "paint", "quick")
    assert code == 0, error
    assert json.loads(said)["words"] == [str(clone / "configs" / "paint" / "quick.yaml")]
    assert "default" not in error.lower()


def test_a_recipe_runs_under_accelerate_and_its_failure_is_passed_on(clone, capfd):
    code, said, error = run(capfd, "train", "--accelerate", "cpu", "paint", "quick", "--size", 3)
    assert code == 0, error
    config = clone / "configs" / "paint" / "quick.yaml"
    assert json.loads(said)["words"] == [str(config), "--size", "3"]
    with pytest.raises(SystemExit) as stop:
        run(capfd, "train", "--accelerate", "cpu", "paint", "--fail")
    # accelerate ends with 1 whatever its script ends with
    assert stop.value.code == 1
    assert "Traceback" not in capfd.readouterr().err


def test_names_and_paths(clone, started, monkeypatch, capsys):
    script, config = clone / "paint.py", clone / "configs" / "paint" / "quick.yaml"
    elsewhere = write(clone.parent / "mine.yaml", "")
    for words, end in (
        (["paint"], [*DEFAULTS, script]),
        (["paint.py", "quick.yaml"], [*DEFAULTS, script, config]),
        (["paint", config, "--size=2"], [*DEFAULTS, script, config, "--size=2"]),
        (["paint", elsewhere.name], [*DEFAULTS, script, elsewhere.name]),
        (["recipes/study_paint.py", "--seeds", "1"], [*DEFAULTS, "recipes/study_paint.py", "--seeds", "1"]),
        (["--processes", "1", "paint", "--processes", "9"], [*DEFAULTS, script, "--processes", "9"]),
        (["--accelerate", "cpu", "paint"], ["--config_file", clone / "accelerate" / "cpu.yaml", script]),
    ):
        code, _, error = run(capsys, "train", *words)
        assert code == 0, error
        launch, rest = started[-1][:4], started[-1][4:]
        assert launch == [sys.executable, "-m", "hf_polyattn_scripts", "--quiet"]
        assert rest == list(map(str, end))
    # what the user has told accelerate holds
    monkeypatch.setattr(train, "default_yaml_config_file", str(config))
    assert run(capsys, "train", "paint")[0] == 0
    assert started[-1][4:] == [str(script)]
    assert run(capsys, "train", "paint", "--help")[0] == 0
    assert started[-1] == [sys.executable, str(script), "--help"]


def test_listing_names_recipes_with_their_configurations(clone, capsys):
    code, said, _ = run(capsys, "train")
    assert code == 0
    assert str(clone) in said
    assert said.splitlines()[1:] == ["  paint: quick"]


def test_recipes_of_this_clone_are_found_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said, _ = run(capsys, "train")
    assert code == 0
    assert "  pretrain_causal_lm: debug_cpu, " in said
    assert "study" not in said


def test_recipes_of_an_installed_package_are_found(clone, started, tmp_path, monkeypatch, capsys):
    package = tmp_path / "site" / train.PACKAGE
    package.parent.mkdir()
    clone.rename(package)
    monkeypatch.setattr(train, "FOLDER", "nowhere")
    monkeypatch.syspath_prepend(package.parent)
    assert run(capsys, "train", "paint", "quick")[0] == 0
    assert started[-1][-2:] == [str(package / "paint.py"), str(package / "configs" / "paint" / "quick.yaml")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["draw"], "no recipe 'draw' in HERE/recipes: there are paint"),
        (["./draw.py"], "no recipe './draw.py'"),
        (["paint", "slow"], "paint: no configuration 'slow': give the path of a YAML file, or one of quick from"),
        (["--accelerate", "ddp", "paint"], "--accelerate: no configuration 'ddp'"),
        (["--processes", "0", "paint"], "--processes must be 1 or more, got 0"),
        (["--processes", "999", "paint"], "torchrun --standalone --nproc_per_node 999 HERE/recipes/paint.py"),
    ],
)
def test_errors_name_the_remedy(words, message, clone, started, capsys):
    code, said, error = run(capsys, "train", *words)
    assert (code, said) == (1, "")
    assert message.replace("HERE", str(clone.parent)) in error
    assert not started


def test_without_recipes_the_error_says_where_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "FOLDER", "nowhere")
    monkeypatch.setattr(train, "PACKAGE", "nowhere_either")
    for words in (["paint"], []):
        code, _, error = run(capsys, "train", *words)
        assert code == 1
        assert "the recipes are in the repository of hf_polyattn: clone it and run this in the clone" in error


def test_modules_of_the_users_do_not_get_lost(clone, started, capsys):
    code, _, error = run(capsys, "--import", "json", "train", "paint")
    assert code == 1
    assert "--import does not reach paint" in error
    assert not started


def test_signals_become_the_status_of_a_shell():
    process = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"])
    assert train._wait(process) == 128 + 15


@pytest.mark.slow
def test_the_real_recipe_trains(tmp_path):
    command = [sys.executable, "-m", "hf_polyattn_cli", "train", "--accelerate", "cpu", "pretrain_causal_lm"]
    words = ["debug_cpu", "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 1


def stopped(command: list[str], tmp_path, is_time: Callable[[], bool]) -> tuple[int, str]:
    """Exit status and standard error of a command that gets Ctrl-C, as a terminal gives it to all its processes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
        # a job in a shell's background ignores Ctrl-C, and so would all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not is_time():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        return process.wait(60), process.communicate()[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_ctrl_c_is_one_line_that_says_where_the_last_checkpoint_is(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "hf_polyattn_cli", "train", "--accelerate", "cpu", "pretrain_causal_lm"]
    words = ["debug_cpu", "--max_steps", "100000", "--save_steps", "5", "--eval_steps", "0", "--output_dir", str(out)]
    status, said = stopped([*command, *words], tmp_path, (out / "last").exists)
    assert status == 130
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "interrupted" in line]
    assert re.search(
        r"interrupted in step \d+\. The last good checkpoint is \S+checkpoint-\d+, of step \d+: .*--resume", line
    )


def test_ctrl_c_while_a_recipe_imports_what_takes_seconds_is_one_line(tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    write(tmp_path / "accelerate.py", f"import pathlib, time\npathlib.Path({str(seen)!r}).touch()\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    script = train.recipe_folders()[0] / "pretrain_causal_lm.py"
    status, said = stopped([sys.executable, str(script), "--model_type", "gpt2"], tmp_path, seen.exists)
    # as a process that the signal ended, for which a shell gives 130
    assert (status, said) == (-signal.SIGINT, "interrupted\n")
