"""Tiny models whose attention matters: with default weights a wrong mask changes the logits by 1e-8 only."""

import copy

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

import hf_polyattn

LAYERS, HEADS, WIDTH, VOCAB, POSITIONS = 2, 4, 32, 64, 64
# of images: 9 patches and the class token
IMAGE, PATCH = 6, 2
TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
# projections of queries, keys, values and outputs
PROJECTIONS = ("c_attn", "q_attn", "c_proj", "q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value")

LANGUAGE_MODELS = ("gpt2", "llama", "bert-decoder")
AUTO_CLASSES = {
    "gpt2": (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
    ),
    "llama": (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
    ),
    "bert": (
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
    ),
    "vit": (AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling),
    "bert-decoder": (AutoModel, AutoModelForCausalLM),
    "gpt2-cross": (AutoModel, AutoModelForCausalLM),
    "bert-cross": (AutoModel, AutoModelForCausalLM),
}
ALL_AUTO_CLASSES = [(family, auto) for family, classes in AUTO_CLASSES.items() for auto in classes]

hf_polyattn.register_architecture("mistral", ["MistralAttention"], reads_packing=True, exist_ok=True)


def tiny_config(family: str, **options) -> PretrainedConfig:
    """Configuration of one family of AUTO_CLASSES, or of "mistral" with a sliding window of 4."""
    if family.startswith("gpt2"):
        sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": POSITIONS}
        cross = family == "gpt2-cross"
        return GPT2Config(**{**sizes, "vocab_size": VOCAB, "add_cross_attention": cross, **TOKENS, **options})
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCAB}
    if family == "vit":
        sizes = {name: size for name, size in sizes.items() if name != "vocab_size"} | {"intermediate_size": 2 * WIDTH}
        sizes |= {"image_size": IMAGE, "patch_size": PATCH, "encoder_stride": PATCH, "num_channels": 1}
        return ViTConfig(**{**sizes, **options})
    sizes |= {"intermediate_size": 2 * WIDTH, "max_position_embeddings": POSITIONS}
    if family.startswith("bert"):
        decoder = {"is_decoder": family != "bert", "add_cross_attention": family == "bert-cross"}
        return BertConfig(**{**sizes, **decoder, **TOKENS, **options})
    if family == "mistral":
        return MistralConfig(**{**sizes, "num_key_value_heads": 2, "sliding_window": 4, **TOKENS, **options})
    return LlamaConfig(**{**sizes, "num_key_value_heads": 2, **TOKENS, **options})


def tiny(family: str, auto=AutoModelForCausalLM, *, double: bool = True, factor: float = 15.0, **options):
    """A stock model in eval mode, in float64 unless told otherwise, with attention weights `factor` times as large."""
    model = auto.from_config(tiny_config(family, **options)).eval()
    return scale_attention(model, factor).double() if double else scale_attention(model, factor)


def scale_attention(model: PreTrainedModel, factor: float = 15.0) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = name.split(".")[-2]
            of_attention = owner in PROJECTIONS and "mlp" not in name or "attention.output.dense" in name
            if parameter.ndim > 1 and of_attention:
                parameter.mul_(factor)
    return model


def patched_tiny(family: str, auto=AutoModelForCausalLM, *, poly: dict | None = None, **options) -> PreTrainedModel:
    """A polynomial model of calibrated size, so that scores, gains and coefficients all matter."""
    model = tiny(family, auto, **options)
    settings = {"activation": "poly", **(poly or {})}
    plain = settings["activation"] in ("softmax", "relu", "sigmoid")
    hf_polyattn.patch_model(model, **settings, calibrate=None if plain else [batch_for(model)])
    return disturb(model)


def disturb(model: PreTrainedModel) -> PreTrainedModel:
    """Moves every learned or measured number of the patch off its default, each head differently."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".polyattn." in name:
                tensor.add_(0.05 * torch.randn_like(tensor))
    return model


def token_ids(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def batch_for(model: PreTrainedModel, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs that suit the model: images, or ids, with states of another sequence of 5 for cross-attention."""
    if model.main_input_name == "pixel_values":
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(batch, 1, IMAGE, IMAGE, generator=generator).to(model.dtype)}
    inputs = {"input_ids": token_ids(batch, length, seed)}
    if getattr(model.config, "add_cross_attention", False):
        generator = torch.Generator().manual_seed(seed + 1)
        inputs["encoder_hidden_states"] = torch.randn(batch, 5, WIDTH, generator=generator).to(model.dtype)
    return inputs


def padded_batches(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Two batches, the first with its first sequence padded on the right from position 6 on."""
    batches = [batch_for(model, seed=seed) for seed in (1, 2)]
    # images come as their patches and one class token more
    length = (IMAGE // PATCH) ** 2 + 1 if "pixel_values" in batches[0] else batches[0]["input_ids"].shape[1]
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, 6:] = 0
    return [{**batches[0], "attention_mask": mask}, batches[1]]


@torch.no_grad()
def output(model: PreTrainedModel, **inputs) -> torch.Tensor:
    """Logits, or what the model returns first."""
    return model(**(inputs or batch_for(model)))[0].clone()


def same_bits(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models compute bit-equal outputs, once the tensors of both lie at aligned addresses.

    The loader leaves tensors where they are in the file, and matrix products round differently at odd addresses.
    """
    outputs = []
    for model in (one, other):
        model = copy.deepcopy(model)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        outputs.append(output(model))
    return outputs[0].dtype == outputs[1].dtype and torch.equal(*outputs)
