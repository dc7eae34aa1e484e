"""What `import hf_polyattn` costs, and what is there after it; in processes that have imported nothing before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import patched_tiny

import hf_polyattn

LAZY = ("triton", "peft", "datasets", "evaluate", "matplotlib")
LATER = {"transformers.models.auto.tokenization_auto"}
LATER |= {f"hf_polyattn.{name}" for name in ("calibration", "coefficient_fit", "patching", "recurrent_cache")}
IMPORT_SECONDS = 0.1
RUNS = 7

# what any user of a model has loaded by then: Transformers imports most of itself on first use
TRANSFORMERS = """
import json, sys, time
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, CONFIG_MAPPING, PreTrainedModel
import transformers.masking_utils, transformers.initialization
import transformers.models.auto.modeling_auto
"""
MEASURE = """
sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]
before = set(sys.modules)
start = time.process_time()
import hf_polyattn
print(json.dumps({"seconds": time.process_time() - start, "modules": sorted(set(sys.modules) - before)}))
"""


def fresh(code: str, *words: str, **environment: str) -> str:
    """What a new Python prints; it must succeed."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def test_import_is_cheap_and_leaves_optional_packages_alone(tmp_path):
    """At most 0.1 seconds of the processor on top of torch and Transformers.

    The least of several runs: whatever else a machine does makes one slower, and none faster. The first also writes
    the bytecode that an installed package has.
    """
    seconds = []
    while not seconds or (min(seconds) > IMPORT_SECONDS and len(seconds) < RUNS):
        report = json.loads(fresh(TRANSFORMERS + MEASURE, str(tmp_path)))
        seconds.append(report["seconds"])
        assert not {*LAZY, *LATER} & set(report["modules"])
    assert min(seconds) <= IMPORT_SECONDS, seconds


def test_names_that_come_on_first_use_are_there():
    code = """
import hf_polyattn, sys
assert set(hf_polyattn.__all__) <= set(dir(hf_polyattn))
assert "hf_polyattn.patching" not in sys.modules and "hf_polyattn.calibration" not in sys.modules
assert hf_polyattn.patching.patch_model is hf_polyattn.patch_model is vars(hf_polyattn)["patch_model"]
from hf_polyattn import *
print(all(globals()[name] is getattr(hf_polyattn, name) for name in hf_polyattn.__all__))
"""
    assert fresh(code) == "True\n"
    with pytest.raises(AttributeError, match="module 'hf_polyattn' has no attribute 'patch_modle'"):
        _ = hf_polyattn.patch_modle


def test_operators_of_the_fused_form_are_there_after_the_import_alone():
    """As a program of torch.export needs them, which names them and imports nothing. Shapes ask for no Triton."""
    code = """
import torch, hf_polyattn
x = torch.empty(1, 2, 8, 16, device="meta", dtype=torch.float16)
out, divisors = torch.ops.hf_polyattn.fused_forward(x, x, x, None, None, 3, 0, 1.0, 0.25, True, 0, None, None)
print(tuple(out.shape), out.dtype, tuple(divisors.shape), divisors.dtype)
"""
    assert fresh(code) == "(1, 2, 8, 16) torch.float32 (1, 2, 8) torch.float32\n"


ORDERS = {
    "before": "from transformers import AutoTokenizer\nimport hf_polyattn",
    "after": "import hf_polyattn\nfrom transformers import AutoTokenizer",
    "without transformers": "import hf_polyattn, transformers\nAutoTokenizer = transformers.AutoTokenizer",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A polynomial checkpoint with the files of an old tokenizer, which name no class."""
    folder = tmp_path_factory.mktemp("poly")
    patched_tiny("gpt2").save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({"h": 0, "i": 1, "hi": 2, "<|endoftext|>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\nh i\n")
    return folder


@pytest.mark.parametrize("first", ["tokenizer", "configuration"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_tokenizer_of_a_checkpoint_is_found(order, first, folder):
    """Tokenizers are imported by the first polynomial configuration, and not with this package."""
    code = f"""
{ORDERS[order]}
import sys
from transformers import AutoConfig
if {first == "configuration"}:
    AutoConfig.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = AutoConfig.from_pretrained(sys.argv[1])
mapping = sys.modules["transformers.models.auto.tokenization_auto"].TOKENIZER_MAPPING
print(type(tokenizer).__name__, tokenizer("hi").input_ids, type(config).__name__, mapping[type(config)].__name__)
"""
    assert fresh(code, str(folder)) == "GPT2Tokenizer [2] PolyGPT2Config GPT2Tokenizer\n"


@pytest.mark.parametrize("order", ["hf_polyattn, transformers", "transformers, hf_polyattn"])
def test_registries_know_the_polynomial_kind(order, folder):
    code = f"""
import {order}
import sys
from transformers import AutoModelForCausalLM, CONFIG_MAPPING
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
print(sorted(name for name in CONFIG_MAPPING if name.startswith("polyattn_")))
print("polyattn" in functions.valid_keys(), "polyattn" in masks.valid_keys())
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""
    kinds = ["polyattn_bert", "polyattn_gpt2", "polyattn_llama", "polyattn_vit"]
    assert fresh(code, str(folder)).splitlines() == [str(kinds), "True True", "PolyGPT2LMHeadModel"]
