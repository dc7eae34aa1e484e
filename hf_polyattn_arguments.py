"""Arguments of the recipes, one dataclass for each group; `hf_polyattn_parsing` reads them.

A module of its own beside the package, because importing anything below `hf_polyattn` imports torch, and `--help`
should answer at once.
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hf_polyattn_parsing import mapping

_BOUNDS = {
    "at_least": (">=", operator.ge),
    "above": (">", operator.gt),
    "at_most": ("<=", operator.le),
    "below": ("<", operator.lt),
}


def check_numbers(group: Any, *names: str, **bounds: float) -> None:
    """Raises ValueError for the first of the fields `names` that is not a finite number within `bounds`.

    bounds: at_least, above, at_most, below. Empty fields are left alone.
    """
    wanted = " and ".join(f"{_BOUNDS[bound][0]} {end:g}" for bound, end in bounds.items())
    for name in names:
        value = getattr(group, name)
        if value is None:
            continue
        if not (math.isfinite(value) and all(_BOUNDS[bound][1](value, end) for bound, end in bounds.items())):
            raise ValueError(f"{name} must be {wanted}, got {value}")


@dataclass
class ModelArguments:
    """Which model: a checkpoint, or a new one from its configuration."""

    model: str | None = None
    """Checkpoint to start from: a folder or a Hub name. Empty: a new model of model_type."""
    model_type: str | None = None
    """Architecture of a new model, such as gpt2, llama or bert."""
    model_config: str = "{}"
    """Configuration of a new model, or changes to a checkpoint's, as JSON; one entry: --model_config.n_layer 4."""
    score_spread: float | None = None
    """Spread of the scores of a new model, set by scaling its query and key weights. Empty: what the width gives."""
    score_mean: float | None = None
    """Mean of the scores of a new model, set by its query and key biases. Empty: 0."""

    def __post_init__(self) -> None:
        if not self.model and not self.model_type:
            raise ValueError("give model (a folder or a Hub name) or model_type (a new model)")
        if self.model and self.model_type:
            raise ValueError("give model or model_type, not both: a checkpoint knows its own type")
        if self.model and (self.score_spread is not None or self.score_mean is not None):
            raise ValueError("score_spread and score_mean are for new models: a checkpoint's scores are what they are")
        self.config_overrides()

    def config_overrides(self) -> dict[str, Any]:
        return mapping("model_config", self.model_config)


@dataclass
class AttentionArguments:
    """What stands where softmax stood. What is left empty takes the activation's own default."""

    activation: str | None = None
    """poly, monomial, relu, sigmoid, softmax or a registered name. softmax without other options: the stock model with
    SDPA. Empty: poly, or what the checkpoint already is."""
    degree: int | None = None
    """Degree of the polynomial."""
    coefficients: list[str] | None = None
    """learnable, monomial, or the numbers c_0 ... c_p."""
    init_coefficients: list[float] | None = None
    """Where learnable coefficients start, c_0 ... c_p."""
    normalization: str | None = None
    """sqrt_length, length, sum, l1, l2, none, or a number. Empty, of a polynomial with learnable coefficients: l1 from
    degree 3 on where it is not calibrated, length otherwise; a polynomial checkpoint keeps its own."""
    alpha: str | None = None
    """Factor of the score: auto or a number."""
    beta: float | None = None
    """Shift of the scaled score."""
    gain: str | None = None
    """Factor of the weight: auto or a number."""
    learn_gain: bool | None = None
    """Train one gain for each head."""
    learn_affine: bool | None = None
    """Train alpha and beta of each head."""
    qk_norm: bool | None = None
    """RMS-normalise queries and keys per head. With softmax too, for the fair twin."""
    layers: list[int] | None = None
    """Indices of the attention modules to patch, negative ones count from the end. Empty: all."""
    heads: str | None = None
    """Heads to patch by layer (JSON or YAML), such as {"0": [1, 2]}. Empty: all."""
    backend: str | None = None
    """Form of the operation: auto, recurrent, cpu, fused, tiled or naive."""
    calibrate_batches: int | None = None
    """Training batches on which a polynomial is calibrated before the first step; 0: alpha and gain that follow from
    width and weights. Empty: 4 for a softmax checkpoint, 0 for a new model, which trains better so, and for a
    polynomial one that goes on with its own function."""
    calibration_fit: Literal["gain", "coefficients"] = "gain"
    """gain: alpha and gain of each head; coefficients: the polynomial nearest to a softmax checkpoint's attention."""
    calibration_target: Literal["output_rms", "frobenius"] = "output_rms"
    """Of the gain. output_rms: the size of softmax's output; frobenius: ‖A‖_F = sqrt N."""
    transfer_steps: int = 0
    """Steps of attention transfer on the first training batches, without their labels, before the training itself: the
    patched attention learns to give a softmax checkpoint's output, layer by layer. Best after calibration_fit
    coefficients."""

    def calibration_batches(self, model: ModelArguments) -> int:
        """How many batches to calibrate on."""
        if self.calibrate_batches is not None:
            return self.calibrate_batches
        return 4 if model.model else 0

    def inputs(self, first: Callable[..., Any], model: ModelArguments) -> tuple[Any, Any]:
        """What to calibrate on and what to transfer on; first(steps=n) gives the inputs of a run's first n steps."""
        return first(steps=self.calibration_batches(model)), first(steps=self.transfer_steps)

    def __post_init__(self) -> None:
        check_numbers(self, "calibrate_batches", "transfer_steps", at_least=0)
        check_numbers(self, "degree", at_least=1)
        if self.activation is None:
            # what the rest means depends on the checkpoint
            return
        # here, because the help must not wait for torch; and now, before data and model have taken their time
        from hf_polyattn.activations import get_activation, resolve_config

        if get_activation(self.activation).is_polynomial:
            resolve_config(self.activation, **self.options())

    def options(self) -> dict[str, Any]:
        """The options of `patch_model` that were named, as Python values; not activation, calibration, transfer."""
        skip = ("activation", "calibrate_batches", "calibration_fit", "calibration_target", "transfer_steps")
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}
        options = {name: value for name, value in named.items() if value is not None}
        for name in ("normalization", "alpha", "gain"):
            if name in options:
                options[name] = _number_or_word(options[name])
        if "coefficients" in options:
            words = [_number_or_word(word) for word in options["coefficients"]]
            options["coefficients"] = words[0] if len(words) == 1 and isinstance(words[0], str) else tuple(words)
        if "heads" in options:
            options["heads"] = {int(k): v for k, v in mapping("heads", options["heads"]).items()}
        return options


@dataclass
class TextArguments:
    """Text for language models, and how it becomes tokens."""

    dataset: str = "stdlib"
    """stdlib (the source of the running Python's standard library: no download), a text, JSON, CSV or parquet file, a
    folder of them, or a Hub name."""
    dataset_config: str | None = None
    """Configuration of a Hub data set, such as wikitext-2-raw-v1."""
    train_split: str = "train"
    """Split to train on."""
    validation_dataset: str | None = None
    """Separate file, folder or Hub name to validate on. Empty: validation_split, or the end of the training data."""
    validation_split: str | None = None
    """Split of the data set to validate on. Empty: validation_fraction."""
    validation_fraction: float = 0.1
    """Share of the data kept for validation, from the end (characters of a single text, rows otherwise; stdlib: by
    the hash of a file's name)."""
    text_column: str = "text"
    """Column that holds the text."""
    streaming: bool = False
    """Read the training data while training instead of before it (Hub names and large files)."""
    streaming_shuffle_buffer: int = 1000
    """Rows among which a stream is shuffled; 0: the order of the data."""
    validation_rows: int = 100
    """Rows of a stream kept for validation when there is no validation split: its first ones."""
    stdlib_bytes: int = 8_000_000
    """Size cap of the standard library text."""
    tokenizer: str = "bytes"
    """bytes (256 values, no files), chars (the sorted characters of the text), or a folder or Hub name."""
    block_size: int = 256
    """Tokens the model sees at once."""
    shuffle: Literal["epoch", "random_windows"] = "epoch"
    """epoch: every block once an epoch, in a new order each time. random_windows: random offsets into the tokens."""
    num_workers: int = 0
    """Worker processes that load data, for each training process."""

    def __post_init__(self) -> None:
        check_numbers(self, "validation_fraction", above=0, below=1)
        check_numbers(self, "block_size", at_least=2)
        check_numbers(self, "validation_rows", "stdlib_bytes", at_least=1)
        check_numbers(self, "streaming_shuffle_buffer", "num_workers", at_least=0)
        if self.streaming and self.shuffle == "random_windows":
            raise ValueError("random_windows needs the whole token stream: set streaming false or shuffle epoch")
        if self.streaming and self.num_workers:
            raise ValueError("a stream is read in the training process: set num_workers 0")
        if self.streaming and self.tokenizer == "chars":
            raise ValueError(
                "chars needs the whole text before training: set streaming false or choose another tokenizer"
            )
        if self.streaming and self.dataset == "stdlib":
            raise ValueError("the standard library is small: set streaming false")


@dataclass
class OptimizationArguments:
    """Batches, learning rate, precision. batch_size is global: it does not change with processes or accumulation."""

    batch_size: int = 32
    """Sequences of one optimizer step, over all processes and accumulation steps."""
    gradient_accumulation_steps: int = 1
    """Parts in which a batch is computed, to save memory."""
    max_steps: int | None = None
    """Optimizer steps. Empty: as many as epochs needs."""
    epochs: float = 1.0
    """Passes over the training data, when max_steps is empty."""
    learning_rate: float = 1e-3
    """Highest learning rate."""
    min_learning_rate_ratio: float = 0.1
    """Share of the learning rate at which the cosine ends."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Of matrices and embeddings; none on biases, norms and the attention's own learned state."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.99
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: not at all."""
    polyattn_learning_rate_multiplier: float = 1.0
    """Learning rate of coefficients and gains, relative to the others'."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Empty: what accelerate launch or its configuration says."""
    torch_compile: bool = False
    """Compile the model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    seed: int = 1337
    """Of initial weights, data order and dropout. Initial weights are the same for every activation."""

    def __post_init__(self) -> None:
        check_numbers(self, "batch_size", "gradient_accumulation_steps", "max_steps", at_least=1)
        check_numbers(self, "epochs", "learning_rate", "adam_epsilon", above=0)
        # a negative norm to clip to would turn the gradient around
        check_numbers(self, "warmup_steps", "weight_decay", "max_grad_norm", "seed", at_least=0)
        check_numbers(self, "polyattn_learning_rate_multiplier", at_least=0)
        check_numbers(self, "min_learning_rate_ratio", at_least=0, at_most=1)
        check_numbers(self, "adam_beta1", "adam_beta2", at_least=0, below=1)
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward pass, over all processes."""
        return self.batch_size // self.gradient_accumulation_steps

    def total_steps(self, examples: int | None) -> int:
        """Optimizer steps of the run; `examples` is the size of one epoch, None for a stream."""
        if self.max_steps is not None:
            return self.max_steps
        if examples is None:
            raise ValueError("a stream has no length: give max_steps")
        return max(1, round(self.epochs * examples / self.batch_size))


@dataclass
class LoraArguments:
    """Low-rank adapters through PEFT; the attention's learned state is trained and saved in full beside them."""

    lora_r: int = 0
    """Rank of the adapters; 0: train all weights."""
    lora_alpha: int = 16
    """Scale of the adapters."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapters."""
    lora_target_modules: list[str] | None = None
    """Names of the linear layers that get an adapter. Empty: the attention projections of the architecture."""

    def __post_init__(self) -> None:
        check_numbers(self, "lora_r", at_least=0)
        check_numbers(self, "lora_alpha", above=0)
        check_numbers(self, "lora_dropout", at_least=0, below=1)


@dataclass
class RunArguments:
    """Where results go, and how often."""

    output_dir: str = "runs/latest"
    """Folder of checkpoints, metrics.jsonl and results.json."""
    resume: bool = False
    """Continue from output_dir/last if there is one; losses are those of the uninterrupted run."""
    overwrite: bool = False
    """Delete what an earlier run left in output_dir."""
    eval_steps: int = 250
    """Steps between evaluations; a checkpoint is kept whenever the result is the best so far. 0: only at the end."""
    eval_batch_size: int = 32
    """Sequences of one evaluation pass, over all processes."""
    save_steps: int = 250
    """Steps between checkpoints. 0: only at the end."""
    logging_steps: int = 1
    """Steps between lines of metrics.jsonl."""
    diagnostics_steps: int = 0
    """Steps between measurements of the attention, such as 100: norms, Jacobians, scores and gradients of every head,
    in diagnostics.jsonl, diagnostics.png and the tracker. 0: none."""
    report_to: str = "none"
    """Tracker beside metrics.jsonl: none, tensorboard, wandb, or another one that accelerate knows."""
    push_to_hub: bool = False
    """Push model, tokenizer, card and results when training is done; the token comes from `hf auth login` or
    HF_TOKEN."""
    hub_model_id: str | None = None
    """Name on the Hub, such as me/gpt2-cubic. Empty: the name of output_dir."""
    hub_private: bool = False
    """Push to a private repository."""
    hub_license: str | None = None
    """Licence for the model card, such as apache-2.0. Empty: that of the checkpoint it started from."""

    def __post_init__(self) -> None:
        check_numbers(self, "eval_steps", "save_steps", "diagnostics_steps", at_least=0)
        check_numbers(self, "eval_batch_size", "logging_steps", at_least=1)


def _number_or_word(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word
