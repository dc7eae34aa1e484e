"""The model of a recipe: built or loaded in fp32, then given its attention."""

import copy
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_polyattn_arguments import AttentionArguments, ModelArguments

from ..activations import change_config, get_activation, resolve_config, with_own_normalization
from ..config import NORMALIZED
from ..conversion import transfer_attention
from ..initialization import start_scores
from ..models import PolyModelMixin, read_settings
from ..patching import coverage, patch_model, unpatch_model
from ..positions import positions_of


def build_model(
    auto_class: Any,
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    block_size: int | None = None,
    checkpoint: str | Path | None = None,
    **values: Any,
) -> PreTrainedModel:
    """A model in fp32, its initial weights a function of the seed alone.

    auto_class: AutoModelForCausalLM or a relative.
    block_size: positions that a new model needs at least.
    checkpoint: load this folder instead of what `args` says; used to resume.
    values: further entries of the configuration, such as num_labels.
    Raises ValueError when the tokenizer has more tokens, or block_size more positions, than the model.
    """
    set_seed(seed)
    overrides = {**values, **args.config_overrides()}
    if checkpoint is not None:
        model = auto_class.from_pretrained(checkpoint, dtype=torch.float32)
    elif args.model:
        model = auto_class.from_pretrained(args.model, dtype=torch.float32, **overrides)
    else:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _check_names(str(args.model_type), args.config_overrides())
        config = AutoConfig.for_model(str(args.model_type), **{"vocab_size": len(tokenizer), **special, **overrides})
        if block_size and not {"max_position_embeddings", "n_positions"} & set(overrides):
            config.max_position_embeddings = block_size
        model = auto_class.from_config(config, dtype=torch.float32)
        if args.score_spread is not None or args.score_mean is not None:
            start_scores(model, spread=args.score_spread, mean=args.score_mean)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}: use the model's own tokenizer")
    positions = positions_of(model)
    if block_size and positions and block_size > positions:
        raise ValueError(f"block_size {block_size} is more than the model's {positions} positions: lower it")
    return model


def _check_names(model_type: str, overrides: Mapping[str, Any]) -> None:
    """Raises ValueError for names that a configuration would take in and nothing would read, such as n_layers."""
    default = AutoConfig.for_model(model_type)
    elsewhere = {"attn_implementation", "is_decoder", "rope_theta", "rope_scaling"}  # read, but no attribute by itself
    for name in overrides:
        if not hasattr(default, name) and name not in elsewhere:
            close = difflib.get_close_matches(name, [*default.to_dict(), *default.attribute_map], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"model_config: the configuration of {model_type} has no {name!r}{hint}")


def replace_attention(
    model: PreTrainedModel,
    args: AttentionArguments,
    batches: Iterable[Mapping[str, torch.Tensor]] = (),
    transfer: Iterable[Mapping[str, torch.Tensor]] = (),
    *,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Patches `model` as `args` say, and says what was done; a checkpoint that is patched already stays what it is.

    Options that are named without an activation change a patched checkpoint's own settings. Numbers that it has
    learned stay where they mean the same, and it is then calibrated again only where calibrate_batches is named; see
    `patch_model`.

    batches: model inputs to calibrate polynomials on; none: the analytic default. Activations that are not polynomials
        keep the scalings of their literature.
    transfer: model inputs for attention transfer from the softmax checkpoint, one step each.
    device: where calibration and transfer run.
    Raises ValueError when transfer is asked for and there is no softmax checkpoint to transfer from.
    """
    options = args.options()
    own = read_settings(model.config) if isinstance(model, PolyModelMixin) else None
    if args.transfer_steps and (own is not None or not model.name_or_path):
        what = "this checkpoint is polynomial already" if own is not None else "a new model has none"
        raise ValueError(f"transfer_steps teaches a softmax checkpoint's attention, and {what}: leave it 0")
    if args.activation is None and own is not None and not options and not args.calibrate_batches:
        print_once(f"the checkpoint's own attention: {coverage(model)}")
        return model
    activation = args.activation or (own.activation if own is not None else "poly")
    is_polynomial = get_activation(activation).is_polynomial
    if not is_polynomial:
        options = _options_of_a_twin(activation, options)
    if args.activation == "softmax" and args.transfer_steps:
        print_once("softmax has nothing to learn from softmax: transfer_steps left out")
    if args.activation == "softmax" and not options.get("qk_norm"):
        model = unpatch_model(model) if own is not None else model
        print_once(f"softmax: {type(model).__name__} stays a stock model ({model.config._attn_implementation})")
        return model
    batches = [_moved(batch, device) for batch in batches] if is_polynomial else []
    if batches:
        # asked to measure, fixed numbers that nobody named give way
        options = {"alpha": "auto", "gain": "auto", **options}
    # a checkpoint that goes on with its own function is not fitted anew
    is_fitted = bool(batches) and args.calibration_fit == "coefficients" and (own is None or args.calibrate_batches)
    if args.activation is None and own is not None:
        if is_fitted and own.normalization in NORMALIZED:
            options.setdefault("normalization", "length")
        settings = change_config(own, **options)
    else:
        settings = resolve_config(activation, calibrated=bool(batches), **options)
        if own is not None:
            settings = with_own_normalization(settings, own, options, linear=bool(is_fitted))
    if own is not None and settings.computes_like(own) and not args.calibrate_batches:
        # it was trained with the numbers that it has
        settings = change_config(
            settings, **{n: getattr(own, n) for n in ("alpha", "gain") if n not in args.options()}
        )
        batches = []
    home = model.device
    model.to(device)  # type: ignore[arg-type]
    teacher = copy.deepcopy(model) if args.transfer_steps and activation != "softmax" else None
    # the random state is that of a softmax twin afterwards, whatever calibration draws
    with torch.random.fork_rng():
        fitting: dict[str, Any] = {}
        if batches:
            fitting = {"calibrate": batches, "fit": args.calibration_fit, "target": args.calibration_target}
        model = patch_model(model, config=settings, **fitting)
        if teacher is not None:
            print_once(str(transfer_attention(model, teacher, [_moved(batch, device) for batch in transfer])))
    return model.to(home)  # type: ignore[arg-type]


def recompute_activations(model: Any) -> None:
    """Keeps less memory in training: activations are computed again for the backward pass (gradient checkpointing)."""
    # Transformers renamed it after 5.20
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def _moved(batch: Mapping[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _options_of_a_twin(activation: str, options: dict[str, Any]) -> dict[str, Any]:
    """What is left for a baseline of a configuration that was written for a polynomial; says what is not."""
    if activation == "softmax":
        kept = {name: value for name, value in options.items() if name in ("qk_norm", "layers", "heads")}
    else:
        without = ("degree", "coefficients", "init_coefficients")
        kept = {name: value for name, value in options.items() if name not in without}
    if dropped := sorted(set(options) - set(kept)):
        print_once(f"{activation} has no {', '.join(dropped)}: left out")
    return kept


def print_once(text: str) -> None:
    """Prints on the main process, above a progress bar if there is one."""
    if PartialState().is_main_process:
        tqdm.write(text)
