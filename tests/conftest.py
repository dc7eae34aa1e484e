"""Shared fixtures: poisoned empty memory, one thread, and the optional folder of real checkpoints and texts."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

torch.set_num_threads(1)
# uninitialised memory becomes NaN, so that nothing can read it and pass by luck
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def deterministic():
    """Fills torch.empty with NaN for the length of a test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def own_registry(monkeypatch):
    """Architectures that a test registers are gone after it, and those that it replaces are back."""
    from hf_polyattn import architectures

    monkeypatch.setattr(architectures, "_REGISTRY", dict(architectures._REGISTRY))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real checkpoints and texts that are not part of the project (POLYATTN_DATA, or a sibling folder)."""
    here = Path(__file__).resolve().parents[1]
    for folder in (os.environ.get("POLYATTN_DATA"), here.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    pytest.skip("no folder of real checkpoints: set POLYATTN_DATA to run this test")


class Recorder:
    """Runs softmax attention written out and keeps the scores and the output of each attention module."""

    def __init__(self):
        self.seen, self.inputs, self.values = {}, {}, {}

    def __call__(self, module, query, key, value, mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = scaling * query @ key.transpose(-1, -2)
        keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
        out = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num() @ value
        self.seen.setdefault(id(module), []).append((scores, keep, out))
        self.values.setdefault(id(module), []).append(value)
        self.inputs[id(module)] = (query, key[:, ::groups], value[:, ::groups], mask, scaling)
        return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def record():
    """Function (stock model, batches) -> [(scores, keep, softmax output) of all batches] for each attention module."""
    recorder = Recorder()
    AttentionInterface.register("recorder", recorder)

    def mask(*args, allow_is_causal_skip=True, allow_is_bidirectional_skip=True, **kwargs):
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            *args, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs
        )

    ALL_MASK_ATTENTION_FUNCTIONS.register("recorder", mask)

    def run(model, batches):
        model.set_attn_implementation("recorder")
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        run.inputs = list(recorder.inputs.values())
        run.values = list(recorder.values.values())
        return list(recorder.seen.values())

    yield run
    for registry in (AttentionInterface._global_mapping, ALL_MASK_ATTENTION_FUNCTIONS._global_mapping):
        registry.pop("recorder")
