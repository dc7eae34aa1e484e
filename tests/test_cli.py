"""The console script: what it prints, how it fails, and that it answers without importing torch."""

import importlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import run
from transformers import AutoModelForCausalLM, GPT2Config

import hf_polyattn
from hf_polyattn import demo, versions
from hf_polyattn.commands import demo as demo_command
from hf_polyattn.commands import patch
from hf_polyattn.diagnostics import weight_norms
from hf_polyattn.ops import cpu
from hf_polyattn.ops.forms import FORMS
from hf_polyattn.tables import format_table
from hf_polyattn.training.tokenizers import byte_tokenizer
from hf_polyattn_cli import COMMANDS, main


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A stock GPT-2 with a byte tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=len(tokenizer), bos_token_id=256, eos_token_id=256
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_help_imports_no_torch():
    code = (
        "import sys\nimport hf_polyattn_cli\n"
        "try:\n    hf_polyattn_cli.main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'hf_polyattn') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")
    assert all(f"\n    {command} " in result.stdout for command in COMMANDS)
    for promise in ("0 after success; 1 after an error", "2 for wrong usage", "130 after Ctrl-C"):
        assert promise in result.stdout


def test_every_command_has_its_module_and_its_help(capsys):
    for name, (_, line) in COMMANDS.items():
        assert callable(importlib.import_module(f"hf_polyattn.commands.{name}").run)
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        assert line[1:] in said
        # those two report as they go
        assert name in ("demo", "train") or "--json print JSON instead of text" in said


def test_a_shell_completes_commands_and_options(tmp_path):
    pytest.importorskip("argcomplete", reason="argcomplete is not installed: pip install argcomplete")

    def completed(line):
        out = tmp_path / "completions"
        shell = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
        env = {**os.environ, **shell, "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
        subprocess.run([sys.executable, "-m", "hf_polyattn_cli"], env=env, check=True)
        return out.read_text().split()

    assert completed("hf-polyattn do") == ["doctor"]
    assert completed("hf-polyattn eval model --bl") == ["--block-size"]
    assert completed("hf-polyattn patch model --fit g") == ["gain"]


def test_a_shell_that_asks_runs_nothing_where_completion_is_missing(tmp_path):
    env = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": "hf-polyattn demo"}
    code = "import sys; sys.modules['argcomplete'] = None; import hf_polyattn_cli; hf_polyattn_cli.main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""


def test_help_takes_less_than_a_third_of_a_second():
    # processor time, the least of a few, so that a busy machine does not fail it
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "hf_polyattn_cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"hf-polyattn {hf_polyattn.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["paint"], ["patch", "source"], ["demo", "--steps", "many"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


def test_patch_saves_a_model_that_reloads(stock, tmp_path, capsys):
    out = tmp_path / "out"
    code, said, _ = run(capsys, "patch", stock, "--to", out, "--degree", 5, "--normalization", "l2", "--learn-gain")
    assert code == 0
    assert f"saved to {out}" in said
    model = AutoModelForCausalLM.from_pretrained(out)
    settings = model.config.polyattn
    assert (settings["degree"], settings["normalization"], settings["learn_gain"]) == (5, "l2", True)
    assert len(hf_polyattn.coverage(model).patched) == 2
    assert (out / "tokenizer.json").exists()


def test_patch_takes_a_part_and_fixed_numbers(stock, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--layers", -1, "--coefficients", 0, 1, 0.5, "--normalization", 14, "--qk-norm"]
    assert run(capsys, "patch", stock, "--to", out, *words)[0] == 0
    code, said, _ = run(capsys, "inspect", out, "--json")
    report = json.loads(said)
    assert report["patched"] == {"transformer.h.1.attn": 2}
    assert report["softmax"] == ["transformer.h.0.attn"]
    assert report["config"]["normalization"] == 14
    assert report["config"]["qk_norm"] is True
    assert report["state"]["transformer.h.1.attn"]["coefficients"] == [[0, 1, 0.5]] * 2


def test_patch_calibrates_on_a_text(stock, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Polynomials instead of softmax. " * 20)
    assert run(capsys, "patch", stock, "--to", tmp_path / "a", "--calibrate", text)[0] == 0
    assert run(capsys, "patch", stock, "--to", tmp_path / "b")[0] == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / x) for x in "ab"]
    assert [model.config.polyattn["normalization"] for model in models] == ["length", "l1"]
    alphas = [model.transformer.h[0].attn.polyattn.alpha for model in models]
    # one number for all heads without data, one for each head from data
    assert alphas[1].unique().numel() == 1
    assert alphas[0].unique().numel() == 2
    text.write_text("short")
    code, _, error = run(capsys, "patch", stock, "--to", tmp_path / "c", "--calibrate", text)
    assert code == 1
    assert "and at least 64 are needed" in error


def test_patch_fits_the_coefficients_or_the_gain(stock, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Polynomials instead of softmax. " * 20)

    def state(name, *words):
        code, _, error = run(capsys, "patch", stock, "--to", tmp_path / name, "--calibrate", text, *words)
        assert code == 0, error
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.config.polyattn["normalization"] == "length"
        return loaded.config.polyattn, loaded.transformer.h[0].attn.polyattn

    (_, fitted), (_, sized) = state("a", "--fit", "coefficients"), state("b")
    assert (fitted.gain == 1).all()
    assert fitted.coefficients[0].tolist() != fitted.coefficients[1].tolist()
    # the start of learnable coefficients, the same in all heads
    assert sized.coefficients[0].tolist() == sized.coefficients[1].tolist() == pytest.approx([0.5, 0.5, 0.5, 1 / 6])
    assert (sized.gain != 1).all()
    settings, _ = state("c", "--budget", 0.25)
    assert sum(len(heads) for heads in settings["heads"].values()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokenizer", "."], ". holds no tokenizer: name"),
        (["--fit", "gain"], "--fit says what --calibrate sets"),
        (["--budget", "0.5"], "--budget needs --calibrate FILE"),
        (["--budget", "1.5", "--calibrate", __file__], "--budget must be a share of the heads, above 0 and up to 1"),
        (["--calibrate", "nothere.txt"], "no such text for --calibrate: nothere.txt"),
        (["--degree", "17"], "degree must be an integer from 1 to 16, got 17"),
        (["--degree", "3", "--coefficients", "0", "1"], "degree 3 needs 4 coefficients, got 2"),
    ],
)
def test_patch_refuses_before_the_model_is_loaded(words, message, stock, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(patch, "load_checkpoint", lambda path: pytest.fail("the model was loaded"))
    code, _, error = run(capsys, "patch", stock, "--to", tmp_path / "out", *words)
    assert code == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_patch_says_what_the_source_was(stock, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Polynomials instead of softmax. " * 20)

    def said(source, name, *words) -> str:
        code, out, error = run(capsys, "patch", source, "--to", tmp_path / name, *words)
        assert code == 0, error
        return out

    first = said(stock, "cubic", "--calibrate", text, "--learn-gain")
    assert f"saved to {tmp_path / 'cubic'}: poly of degree 3\nits weights were trained for softmax: train it" in first
    assert ": poly of degree 1\n" in said(stock, "line", "--coefficients", 1, 2)
    assert "it computes softmax as before" in said(stock, "twin", "--activation", "softmax")
    assert "trained without QK-norm" in said(stock, "normed", "--activation", "softmax", "--qk-norm")

    square = said(tmp_path / "cubic", "square", "--degree", 2)
    assert "its source was patched already, poly of degree 3: options not named are at their defaults\n" in square
    assert "changed: degree 3 -> 2, learn_gain True -> False" in square
    assert "set anew, not taken from the source: alpha, coefficients, gain\ntrain it" in square
    same = said(tmp_path / "cubic", "same", "--degree", 3)
    assert "at their defaults but for the normalization\nchanged: learn_gain True -> False\n" in same
    assert "all its numbers are the source's" in same
    softmax = said(tmp_path / "cubic", "softmax", "--activation", "softmax")
    assert "changed: activation poly -> softmax" in softmax
    assert "trained for softmax" not in square + same + softmax
    assert "was patched already, softmax:" in said(tmp_path / "twin", "again")


def test_inspect_prints_coverage_settings_and_state(stock, tmp_path, capsys):
    run(capsys, "patch", stock, "--to", tmp_path / "out")
    code, said, _ = run(capsys, "inspect", tmp_path / "out")
    assert code == 0
    for line in (
        "PolyGPT2LMHeadModel",
        "patched 2 of 2 attention modules (4 of 4 heads), normalization l1",
        "degree: 3",
        "c_3",
        "transformer.h.1.attn",
    ):
        assert line in said
    code, said, _ = run(capsys, "inspect", stock)
    assert code == 0
    assert "patched 0 of 2 attention modules" in said
    assert "degree" not in said


def test_inspect_shows_adapters_with_their_base(stock, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    base, folder = tmp_path / "base", tmp_path / "lora"
    run(capsys, "patch", stock, "--to", base, "--degree", 2)
    options = {"r": 2, "target_modules": ["attn.c_attn"], "modules_to_save": ["polyattn"], "fan_in_fan_out": True}
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name and "coefficients" in name:
                parameter.fill_(7)
    adapted.save_pretrained(folder)
    code, said, error = run(capsys, "inspect", folder)
    assert code == 0, error
    for line in ("PolyGPT2LMHeadModel", "patched 2 of 2", f"LORA adapters of rank 2 of {base}", "degree: 2"):
        assert line in said
    report = json.loads(run(capsys, "inspect", folder, "--json")[1])
    # what the adapters have trained, not what the base holds
    assert report["state"]["transformer.h.0.attn"]["coefficients"] == [[7, 7, 7]] * 2
    code, _, error = run(capsys, "patch", folder, "--to", tmp_path / "out")
    assert code == 1
    assert "holds adapters and no whole model: merge them first" in error
    base.rename(tmp_path / "moved")
    code, _, error = run(capsys, "inspect", folder)
    assert code == 1
    assert f"belong to the model in {base}, which is not there" in error


@pytest.mark.parametrize("problem", [None, "g++ is not there"])
def test_doctor_says_which_forms_there_are(problem, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "_build", cpu.Build("avx2", problem))
    code, said, _ = run(capsys, "doctor")
    assert code == 0
    assert "fused      " in said
    expected = f"cpu        no   {problem}" if problem else "cpu        yes  compiled for avx2"
    assert expected in said
    assert [line.split()[0] for line in said.splitlines()[4:]] == list(FORMS)
    assert re.search(r"recurrent  yes  .* linear time.* 11,500 .degree 2. tokens", said)
    assert f"torch {torch.__version__}" in said


def test_doctor_and_its_json_agree(capsys):
    said = run(capsys, "doctor")[1]
    facts = json.loads(run(capsys, "doctor", "--json")[1])
    assert list(facts["forms"]) == list(FORMS)
    assert facts["versions"]["torch"] == torch.__version__
    for form, entry in facts["forms"].items():
        assert f"{form:<11}{'yes' if entry['here'] else 'no':<5}{entry['why']}" in said


def test_patch_and_card_report_as_json(stock, tmp_path, capsys):
    out = tmp_path / "out"
    report = json.loads(run(capsys, "patch", stock, "--to", out, "--degree", 2, "--layers", 0, "--json")[1])
    assert report["saved"] == str(out)
    assert report["tokenizer"] is True
    assert report["patched"] == {"transformer.h.0.attn": 2}
    assert report["softmax"] == ["transformer.h.1.attn"]
    assert report["config"]["degree"] == 2
    assert "trained for softmax" in report["advice"]
    report = json.loads(run(capsys, "card", out, "--license", "mit", "--json")[1])
    assert report == {"card": str(out / "README.md"), "figure": None, "norms": None, "results": None, "twin": None}
    assert (out / "README.md").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "./nowhere"], "no such folder: ./nowhere"),
        (["inspect", "."], ". holds no config.json, so it is no checkpoint"),
        (["patch", "STOCK", "--to", "OUT", "--degree", "0"], "degree must be an integer from 1 to 16, got 0"),
        (["patch", "STOCK", "--to", "OUT", "--layers", "7"], "layers"),
        (["patch", "STOCK", "--to", "OUT", "--activation", "cubist"], "unknown activation 'cubist'"),
        (["patch", "STOCK", "--to", "STOCK"], "is not empty"),
        (["patch", "STOCK", "--to", "STOCK/config.json"], "is not empty"),
        (["demo", "--steps", "1"], "steps must be >= 2, got 1"),
    ],
)
def test_expected_errors_are_one_line(words, message, stock, tmp_path, capsys):
    words = [{"STOCK": str(stock), "OUT": str(tmp_path / "out")}.get(word, word) for word in words]
    words = [word.replace("STOCK", str(stock)) for word in words]
    code, said, error = run(capsys, *words)
    assert code == 1
    assert said == ""
    assert error.startswith(f"hf-polyattn {words[0]}: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_run_points_to_its_checkpoint(tmp_path, stock, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best").symlink_to(stock)
    code, _, error = run(capsys, "inspect", str(tmp_path / "run"))
    assert code == 1
    assert f"is the folder of a run: give its checkpoint, {tmp_path / 'run' / 'best'}" in error


REGISTER = """
import hf_polyattn
hf_polyattn.register_activation("bent", lambda s, n: s.relu(), defaults=dict(normalization="length"))
hf_polyattn.register_architecture("mistral", ["MistralAttention"])
"""
MAKE = """
from transformers import MistralConfig, MistralForCausalLM
sizes = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, hidden_size=8, intermediate_size=8)
model = MistralForCausalLM(MistralConfig(**sizes, vocab_size=9))
hf_polyattn.patch_model(model, "bent").save_pretrained("mistral")
"""


@pytest.mark.slow
def test_a_module_of_the_users_is_imported(stock, tmp_path):
    """In processes of their own: what one registers must not help the next."""

    def cli(*words):
        command = [sys.executable, "-m", "hf_polyattn_cli", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    (tmp_path / "mine.py").write_text(REGISTER + MAKE)
    assert cli("--import", "mine", "patch", stock, "--to", "out", "--activation", "bent").returncode == 0
    (tmp_path / "mine.py").write_text(REGISTER)
    for folder in ("out", "mistral"):
        assert "bent" in cli("--import", "mine", "inspect", folder).stdout
    for folder, call in (("out", "register_activation"), ("mistral", "register_architecture('mistral', ...)")):
        done = cli("inspect", folder)
        assert done.returncode == 1
        assert f"hf_polyattn.{call}" in done.stderr
        assert done.stderr.endswith("hf-polyattn --import MODULE patch ...\n")
        assert "pgrade" not in done.stderr


def test_a_module_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "broken.py").write_text("import not_installed")
    for name, hint in (("absent", ""), ("absent.py", ": name it absent")):
        code, _, error = run(capsys, "--import", name, "doctor")
        assert code == 1
        assert f"--import {name}: there is no such module here or in the environment{hint}\n" in error
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        main(["--import", "broken", "doctor"])


def test_versions_that_cannot_work_are_one_line_and_bugs_keep_their_traceback(stock, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(versions.SUPPORTED, "torch", versions.Range("99", "100", tested="99"))
    code, _, error = run(capsys, "patch", stock, "--to", tmp_path / "out")
    assert code == 1
    assert 'pip install "torch>=99,<100"' in error
    assert error.count("\n") == 1

    def fail(args):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(patch, "run", fail)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        main(["patch", str(stock), "--to", str(tmp_path / "out")])


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(FileNotFoundError):
        main(["--debug", "inspect", "./nowhere"])
    monkeypatch.setenv("HF_POLYATTN_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["inspect", "./nowhere"])


def test_interrupt_has_its_own_status(monkeypatch, capsys):
    def stop(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_command, "run_demo", stop)
    assert run(capsys, "demo") == (130, "", "interrupted\n")


def test_patched_folder_without_tokenizer_and_without_architectures(stock, tmp_path, capsys):
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(stock).save_pretrained(bare)
    code, said, _ = run(capsys, "patch", bare, "--to", tmp_path / "out")
    assert code == 0
    assert "no tokenizer was found" in said
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    config = json.loads((bare / "config.json").read_text())
    del config["architectures"]
    (bare / "config.json").write_text(json.dumps(config))
    code, _, error = run(capsys, "inspect", bare)
    assert code == 1
    assert "names no architectures" in error


def test_demo_notices_a_checkpoint_that_loads_without_the_plugin(stock):
    with pytest.raises(demo.DemoError, match="without the plugin loaded"):
        demo.refusal(stock)


def test_weight_norms_of_softmax_and_of_an_exact_normalization(stock):
    model = AutoModelForCausalLM.from_pretrained(stock)
    ids = torch.randint(0, 256, (2, 24))
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    before = model.config._attn_implementation
    norms = weight_norms(model, {"input_ids": ids})
    assert norms.shape == (2, 2)
    assert model.config._attn_implementation == before
    # an untrained causal model averages its row: sum_i 1/i over N
    expected = (sum(1 / i for i in range(1, 25)) / 24) ** 0.5
    torch.testing.assert_close(norms, torch.full((2, 2), expected), rtol=1e-2, atol=0)
    hf_polyattn.patch_model(model, normalization="l2", gain=2.0)
    for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        # "l2" makes every row of length 1, times the gain
        torch.testing.assert_close(weight_norms(model, batch), torch.full((2, 2), 2.0), rtol=1e-3, atol=0)


def test_table_aligns_and_refuses_ragged_rows():
    assert format_table(["a", "bb"], [["long", "1"]]).splitlines() == ["a     bb", "long   1"]
    with pytest.raises(ValueError, match="every row needs 2 cells"):
        format_table(["a", "b"], [["only one"]])
