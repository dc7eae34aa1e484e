"""The tools that people already have around a model, on patched ones: TRL, export, ONNX, quantised bases."""

import copy

import pytest
import torch
from datasets import Dataset
from models import padded_batches, patched_tiny, tiny
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config

from hf_polyattn import patch_model, set_backend
from hf_polyattn.models import PolyModelMixin, states
from hf_polyattn.training.tokenizers import SPECIAL_TOKENS, byte_tokenizer

TEXTS = [f"text number {i} of the training set, {'and more ' * (i % 3)}" for i in range(16)]


def sft(model, tokenizer, folder, **options):
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(
        str(folder), report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=4, **options
    )
    rows = Dataset.from_dict({"text": TEXTS})
    return trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def language_model(tokenizer):
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=2, n_head=4, n_embd=32, n_positions=128, bos_token_id=None, eos_token_id=256
    )
    return patch_model(AutoModelForCausalLM.from_config(config), degree=3)


def test_trl_trains_saves_and_reloads(tmp_path):
    tokenizer = byte_tokenizer(SPECIAL_TOKENS)
    model = language_model(tokenizer)
    before = copy.deepcopy(states(model))
    trainer = sft(model, tokenizer, tmp_path, max_steps=3, max_length=64, learning_rate=1e-2, save_strategy="no")
    trainer.train()
    name, state = next(iter(states(model).items()))
    assert not torch.equal(state.coefficients, before[name].coefficients)
    trainer.save_model(tmp_path / "final")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert isinstance(again, PolyModelMixin)
    ids = torch.arange(60, 80)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_trl_packs_without_mixing_texts(tmp_path):
    """TRL lays texts one behind the other, with position_ids that start anew: each is read as if it were alone."""
    tokenizer = byte_tokenizer(SPECIAL_TOKENS)
    model = language_model(tokenizer)
    trainer = sft(model, tokenizer, tmp_path, max_steps=1, max_length=128, packing=True)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"] == 0).sum().item()
    assert starts > len(batch["input_ids"])
    model.eval()
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        for row, positions, logits in zip(batch["input_ids"], batch["position_ids"], packed, strict=True):
            ends = [*(positions == 0).nonzero().flatten().tolist(), len(row)]
            for start, end in zip(ends, ends[1:], strict=False):
                alone = model(input_ids=row[None, start:end]).logits[0]
                torch.testing.assert_close(logits[start:end], alone, rtol=1e-4, atol=1e-5)


def test_an_encoder_is_exported_with_dynamic_shapes():
    model = patch_model(tiny("bert", AutoModel, double=False), degree=3)
    batch = padded_batches(model)[0]
    dimensions = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", min=3, max=32)}
    shapes = {"input_ids": dimensions, "attention_mask": dimensions}
    program = torch.export.export(model, (), batch, dynamic_shapes=shapes, strict=False).module()
    for inputs in (batch, {name: tensor.repeat(2, 2) for name, tensor in batch.items()}):
        with torch.no_grad():
            given, expected = program(**inputs).last_hidden_state, model(**inputs).last_hidden_state
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_runs_in_onnx(tmp_path):
    """The definition is made of standard operators; the compiled form is one of ours, which ONNX does not know."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = set_backend(patch_model(tiny("bert", AutoModel, double=False), degree=3), "naive")
    batch = padded_batches(model)[0]
    torch.onnx.export(model, (), kwargs=batch, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    given = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})[0]
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit"])
def test_quantised_bases_are_patched_calibrated_and_saved(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    # in 4 bits, rows come in blocks of 64
    tiny("llama", double=False, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    options = {"quantization_config": BitsAndBytesConfig(**{kind: True}), "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    batch = {"input_ids": torch.arange(2, 34).view(2, 16)}
    model = patch_model(model, degree=3, calibrate=[batch], fit="coefficients")
    assert all(torch.isfinite(state.coefficients).all() for state in states(model).values())
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    assert isinstance(again, PolyModelMixin)
    # without gradients, as in calibration, bitsandbytes repacks 4-bit weights and rounds their scales
    tolerance = 1e-2 if kind == "load_in_4bit" else 0
    torch.testing.assert_close(again(**batch).logits, expected, rtol=0, atol=tolerance)


def test_the_learned_numbers_are_in_the_safetensors_header(tmp_path):
    """Format and tensors as any tool reads them, the Hub's viewer too: no pickle, nothing but tensors."""
    model = patched_tiny("llama", double=False)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = [name for name in file.keys() if "polyattn" in name]  # noqa: SIM118
        found = {name: file.get_tensor(name) for name in names}
    learned = {name: p for name, p in model.state_dict().items() if "polyattn" in name}
    assert found.keys() == learned.keys()
    assert {name.rpartition(".")[2] for name in found} >= {"alpha", "beta", "gain", "coefficients"}
    for name, tensor in found.items():
        assert torch.equal(tensor, learned[name]), name
