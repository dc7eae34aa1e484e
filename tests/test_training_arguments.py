"""YAML first, command line on top, field docs as help, near matches for unknown keys."""

import dataclasses
import logging
import subprocess
import sys

import pytest
import yaml
from recipe_runs import RECIPES, recipe

import hf_polyattn_arguments as args
import hf_polyattn_scripts as scripts
from hf_polyattn.config import PolyAttentionConfig
from hf_polyattn.steps import DivergedError
from hf_polyattn.training.nonfinite import NonFiniteError
from hf_polyattn.versions import VersionError
from hf_polyattn_parsing import as_yaml, parse_arguments

GROUPS = (
    args.ModelArguments,
    args.AttentionArguments,
    args.TextArguments,
    args.OptimizationArguments,
    args.LoraArguments,
    args.RunArguments,
)

SCRIPTS = sorted(path.stem for path in RECIPES.glob("*.py") if not path.stem.startswith("study"))
TRAINING = [name for name in SCRIPTS if name != "convert"]


def parse(tmp_path, text, *extra):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse_arguments([str(path), *extra], GROUPS)


def test_yaml_first_then_command_line(tmp_path):
    text = "model_type: gpt2\nlearning_rate: 1e-3\nmodel_config: {n_layer: 4, n_head: 2}\nlayers: [0, -1]\n"
    model, attention, _, optimization, _, run = parse(
        tmp_path,
        text,
        "--learning-rate",
        "2e-4",
        "--model_config.n_layer",
        "6",
        "--model_config.tie=false",
        "--resume",
    )
    # 1e-3 is a string in YAML
    assert optimization.learning_rate == 2e-4
    assert parse(tmp_path, text)[3].learning_rate == 1e-3
    assert model.config_overrides() == {"n_layer": 6, "n_head": 2, "tie": False}
    assert attention.options() == {"layers": [0, -1]}
    assert run.resume is True


def test_one_entry_of_a_mapping(tmp_path):
    def overrides(*words):
        return parse(tmp_path, "model_type: gpt2\nmodel_config: {a: 1}", *words)[0].config_overrides()

    assert overrides("--model_config.b", "2") == {"a": 1, "b": 2}
    # in the order of the line
    assert overrides("--model_config", "{c: 3}", "--model-config.b=x") == {"c": 3, "b": "x"}
    assert overrides("--model_config.b", "2", "--model_config={c: 3}") == {"c": 3}
    assert overrides("--model_config.b", "2", "--tokenizer", "relu.x") == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--normalization", "length", "--alpha", "auto"], {"normalization": "length", "alpha": "auto"}),
        (["--normalization", "14", "--gain", "0.5"], {"normalization": 14.0, "gain": 0.5}),
        (["--coefficients", "learnable"], {"coefficients": "learnable"}),
        (["--coefficients", "0", "1", "0", "-1e-1"], {"coefficients": (0.0, 1.0, 0.0, -0.1)}),
        (["--heads", '{"0": [1, 2]}'], {"heads": {0: [1, 2]}}),
        (["--learn_gain", "--degree", "5"], {"learn_gain": True, "degree": 5}),
        ([], {}),
    ],
)
def test_attention_options(tmp_path, words, options):
    attention = parse(tmp_path, "model_type: gpt2", *words)[1]
    assert attention.options() == options


def test_every_field_of_the_attention_config_is_an_argument():
    fields = {field.name for field in dataclasses.fields(PolyAttentionConfig)}
    assert fields <= {field.name for field in dataclasses.fields(args.AttentionArguments)}


@pytest.mark.parametrize(
    ("text", "extra", "message"),
    [
        ("model_type: gpt2\nlearning_rat: 1", [], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("model_type: gpt2", ["--batchsize", "2"], "unknown argument '--batchsize'; did you mean 'batch_size'?"),
        ("model_type: gpt2", ["--learn", "1"], "unknown argument '--learn'"),
        ("model_type: gpt2", ["--batch_size", "9", "--gradient_accumulation_steps", "2"], "must be a multiple"),
        ("batch_size: 2", [], "give model (a folder or a Hub name) or model_type"),
        ("model_type: gpt2\nmodel: here", [], "not both"),
        ("- 1", [], "`name: value`"),
        ("model_type: gpt2", ["--shuffle", "often"], "invalid choice"),
        ("model_type: gpt2", ["--activation", "cubic"], "unknown activation 'cubic'; registered: monomial, poly"),
        ("model_type: gpt2", ["--degree", "0"], "degree must be >= 1, got 0"),
        ("model_type: gpt2\nactivation: poly", ["--degree", "17"], "degree must be an integer from 1 to 16, got 17"),
        ("model_type: gpt2\nactivation: poly", ["--normalization", "sum"], "needs weights of one sign"),
        ("model_type: gpt2", ["--model_config.n_layer"], "--model_config.n_layer: expected a value"),
        ("model_type: gpt2", ["--model_config.a", "--seed", "3"], "--model_config.a: expected a value"),
        ("model_type: gpt2", ["--model_config.a", "1", "--model_config"], "--model_config: expected a value"),
        ("model_type: gpt2", ["--model_config", "3", "--model_config.a", "1"], "must be a mapping"),
        ("model_type: gpt2", ["--validation_fraction", "1"], "validation_fraction must be > 0 and < 1, got 1.0"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, text, extra, message):
    with pytest.raises(SystemExit) as exit_:
        parse(tmp_path, text, *extra)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        *("max_grad_norm -1", "learning_rate 0", "learning_rate nan", "epochs 0", "warmup_steps -1"),
        *("weight_decay -0.1", "adam_beta2 1", "adam_epsilon 0", "min_learning_rate_ratio 1.5", "seed -1"),
        *("polyattn_learning_rate_multiplier -1", "max_steps 0", "lora_r -1", "lora_dropout 1", "lora_alpha 0"),
        *("calibrate_batches -1", "eval_steps -1", "save_steps -1", "eval_batch_size 0", "logging_steps 0"),
        *("num_workers -1", "block_size 1", "stdlib_bytes 0", "learning_rate inf"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, capsys, words):
    name, value = words.split()
    with pytest.raises(SystemExit):
        parse(tmp_path, "model_type: gpt2", f"--{name}={value}")
    assert f"{name} must be " in capsys.readouterr().err


def test_numbers_at_the_ends_of_their_range_are_accepted(tmp_path):
    ends = {
        "max_grad_norm": 0,
        "warmup_steps": 0,
        "calibrate_batches": 0,
        "eval_steps": 0,
        "min_learning_rate_ratio": 1,
    }
    parse(tmp_path, "model_type: gpt2", *(f"--{name}={value}" for name, value in ends.items()))


def test_no_configuration_file(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["nowhere.yaml"], GROUPS)
    assert "no such configuration file: nowhere.yaml" in capsys.readouterr().err


def test_arguments_survive_yaml(tmp_path):
    text = "model_type: llama\ncoefficients: [0, 1, 0, 0.1]\nmodel_config: {n_layer: 4}\nlora_target_modules: [a, b]\n"
    first = parse(tmp_path, text, "--overwrite")
    assert parse(tmp_path, as_yaml(*first)) == first


def test_small_negative_numbers_survive_yaml(tmp_path):
    text = "model_type: gpt2\ninit_coefficients: [0, 1, -1.0e-05, -1e-5]\n"
    first = parse(tmp_path, text)
    assert first[1].init_coefficients == [0, 1, -1e-5, -1e-5]
    assert parse(tmp_path, as_yaml(*first)) == first
    fixed = parse(tmp_path, "model_type: gpt2\ncoefficients: [0, 1, -1.0e-05, -1e-5]\n")
    assert fixed[1].options() == {"coefficients": (0, 1, -1e-5, -1e-5)}
    assert parse(tmp_path, as_yaml(*fixed)) == fixed


def exit_status_of(main, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["recipes/train.py"])
    with pytest.raises(SystemExit) as stop:
        scripts.run_script(main)
    return stop.value.code


def raiser(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileExistsError("runs/a holds a run already:\n  pass --resume"), "runs/a holds a run already: pass --resume"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "No such file or directory: a.txt"),
        (ValueError("the text is short"), "the text is short"),
        (ValueError(), "ValueError"),
        (NonFiniteError("loss nan in step 3"), "loss nan in step 3"),
        (DivergedError("loss nan in step 3"), "loss nan in step 3"),
        (VersionError("torch 3 is outside the range"), "torch 3 is outside the range"),
    ],
)
def test_a_script_answers_a_mistake_with_one_line(error, line, monkeypatch, capsys):
    assert exit_status_of(raiser(error), monkeypatch) == 1
    assert capsys.readouterr().err == f"train.py: {line}\n"
    monkeypatch.setenv(scripts.DEBUG, "1")
    with pytest.raises(type(error)):
        scripts.run_script(raiser(error))


def test_a_script_leaves_out_what_bitsandbytes_says(monkeypatch, caplog):
    said = logging.getLogger("bitsandbytes.backends")
    assert exit_status_of(lambda: said.warning("a kernel is missing"), monkeypatch) == 0
    assert not caplog.records
    assert said.isEnabledFor(logging.WARNING)


def test_a_script_says_on_ctrl_c_what_its_work_asked_it_to(monkeypatch, capsys):
    def work(*lines):
        for line in lines:
            scripts.when_interrupted(lambda line=line: line)
        raise KeyboardInterrupt

    for lines, said in ((("early", "late"), "late\n"), ((), "interrupted\n"), (("",), "")):
        assert exit_status_of(lambda lines=lines: work(*lines), monkeypatch) == 130
        assert capsys.readouterr().err == said


def test_a_script_shows_where_the_unexpected_happened(monkeypatch, capsys):
    for error in (RuntimeError, TypeError, KeyError):
        with pytest.raises(error):
            scripts.run_script(raiser(error("a bug")))
    assert exit_status_of(raiser(KeyboardInterrupt()), monkeypatch) == 130
    assert exit_status_of(lambda: {"loss": 1}, monkeypatch) == 0


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_answers_a_mistake_with_one_line(name, tmp_path):
    """As a script, where it is the data that is missing; from Python the same raises."""
    config = str(RECIPES / "configs" / name / "debug_cpu.yaml")
    words = [config, "--dataset", "nothere.txt", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, str(RECIPES / f"{name}.py"), *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"{name}.py: no such file or folder: nothere.txt"
    assert "Traceback" not in done.stderr
    with pytest.raises(FileNotFoundError, match=r"nothere\.txt"):
        recipe(name).main(words)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_comes_from_the_field_docs(name, capsys):
    module = recipe(name)
    with pytest.raises(SystemExit) as exit_:
        module.main(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    ours = "Sequences of one optimizer step, over all processes and accumulation steps."
    assert ("Softmax checkpoint: a folder, a Hub name, or a .gguf file." if name == "convert" else ours) in text
    for group in module.GROUPS:
        for field in dataclasses.fields(group):
            assert field.metadata.get("help"), f"{group.__name__}.{field.name} has no doc"


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "--batch_size"),
        (
            ["--activation", "relu", "--batch_sise", "3"],
            2,
            "unknown argument '--batch_sise'; did you mean 'batch_size'?",
        ),
        (["--batch_size", "many"], 2, "invalid int value: 'many'"),
    ],
    ids=["help", "unknown", "value"],
)
def test_a_script_answers_usage_without_importing_torch(name, words, status, said):
    script = str(RECIPES / f"{name}.py")
    code = (
        f"import runpy, sys\nsys.argv = {[script, *words]!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"except SystemExit as stop:\n    assert (stop.code or 0) == {status}\n"
        "print(sorted({'torch', 'datasets', 'accelerate', 'hf_polyattn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said in done.stdout + done.stderr
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("configs/*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_configurations_parse_and_explain_themselves(path):
    module = recipe(path.parent.name)
    header = path.read_text()
    of_a_checkpoint = ["--model=x"] if path.parent.name == "convert" else ["--model_type=", "--model=x"]
    parse_arguments([str(path), *(of_a_checkpoint if "model:" in header else [])], module.GROUPS)
    assert header.startswith("# ")
    assert ("python recipes/convert.py" if path.parent.name == "convert" else "accelerate launch") in header


@pytest.mark.parametrize("path", sorted(RECIPES.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configurations_are_known_to_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_machines == 1
    assert yaml.safe_load(path.read_text())["distributed_type"] == str(config.distributed_type.value)
