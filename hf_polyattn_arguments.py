"""Arguments of the recipes: dataclasses whose field docs are the help; a YAML file first, the command line on top.

A module of its own beside the package, because importing anything below `hf_polyattn` imports torch, and `--help`
should answer at once.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from hf_polyattn_scripts import DEBUG

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
    """sqrt_length, length, sum, l1, l2, none, or a number."""
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


Group = Any


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The recipe's own header as it is, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def answer_help(module: str, groups: Sequence[type], description: str | None) -> None:
    """In a script, prints the help and exits if it is asked for; call it above the imports that take long.

    module: the caller's `__name__`; nothing happens unless it is "__main__".
    """
    if module == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
        parse_arguments(["--help"], groups, description)


def parse_arguments(
    argv: Sequence[str] | None, groups: Sequence[type], description: str | None = None
) -> tuple[Group, ...]:
    """One instance of each dataclass of `groups` from `[CONFIG.yaml] --name value ...`; the command line wins.

    argv: arguments without the program's name; None: sys.argv[1:].
    Exits with status 2 and a message that names the nearest known key when a key is unknown, in YAML or on the line.
    """
    from transformers import HfArgumentParser

    argv = list(sys.argv[1:] if argv is None else argv)
    for group in groups:
        add_help(group)
    parser = HfArgumentParser(
        groups,  # type: ignore[arg-type]
        usage="%(prog)s [CONFIG.yaml] [--name value ...]",
        description=description,
        epilog=f"{DEBUG}=1 in the environment shows the whole traceback of an error.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    known = [field.name for group in groups for field in dataclasses.fields(group)]
    values: dict[str, Any] = {}
    if argv and not argv[0].startswith("-"):
        path = Path(argv.pop(0))
        if not path.is_file():
            parser.error(f"no such configuration file: {path}")
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(values, dict):
            parser.error(f"{path} must hold `name: value` lines")
        for name in values:
            if name not in known:
                parser.error(_unknown(f"{path}: unknown key {name!r}", name, known))
    argv = [_plain_number(word) for word in _fold_dotted(argv, values)]
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            [*_as_argv(values), *argv], return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    for word in rest:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        parser.error(_unknown(f"unknown argument {word!r}", name, known))
    return tuple(parsed)


def parse_values(group: type, values: dict[str, Any], name: str) -> Any:
    """One instance of a dataclass from a mapping, with the types and messages of the command line.

    Raises ValueError for a key that it has not, and for a value that is no such thing.
    """
    from transformers import HfArgumentParser

    known = [field.name for field in dataclasses.fields(group)]
    for key in values:
        if key not in known:
            raise ValueError(_unknown(f"{name}: unknown key {key!r}", key, known))
    parser = HfArgumentParser((group,), prog=name, exit_on_error=False, allow_abbrev=False)  # type: ignore[arg-type]
    try:
        return parser.parse_args_into_dataclasses(_as_argv(values), look_for_args_file=False)[0]
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def add_help(group: type) -> type:
    """Copies the docstring under each field into its metadata, where HfArgumentParser looks for the help."""
    fields = {field.name: field for field in dataclasses.fields(group)}
    for cls in group.__mro__:
        if not dataclasses.is_dataclass(cls):
            continue
        for name, doc in _field_docs(cls):
            if name in fields and "help" not in fields[name].metadata:
                options: dict[str, Any] = {"help": " ".join(doc.split()).replace("%", "%%")}
                if fields[name].type == bool | None:
                    # --qk_norm alone means true, as it does for plain bools
                    options |= {"nargs": "?", "const": True}
                fields[name].metadata = MappingProxyType({**fields[name].metadata, **options})
    if group.__doc__ and "_argument_group_name" not in vars(group):
        group._argument_group_name = " ".join(group.__doc__.split()).rstrip(".")  # type: ignore[attr-defined]
    return group


def as_yaml(*groups: Group) -> str:
    """The arguments as a YAML file that `parse_arguments` reads back."""
    values: dict[str, Any] = {}
    for group in groups:
        values.update({k: v for k, v in dataclasses.asdict(group).items() if v is not None})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def mapping(name: str, text: str) -> dict[str, Any]:
    """The mapping written as JSON or YAML in `text`."""
    try:
        value = yaml.safe_load(text) or {}
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping such as {{n_layer: 4}}, got {text!r}")
    return value


def _field_docs(cls: type) -> Iterator[tuple[str, str]]:
    body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield field.target.id, str(below.value.value)  # type: ignore[union-attr]


def _as_argv(values: dict[str, Any]) -> list[str]:
    # everything goes through argparse, so that YAML's 1e-3, which is a string, becomes a number like any other
    out: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            out += [f"--{name}", *(_plain_number(str(entry)) for entry in value)]
        else:
            out.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return out


def _fold_dotted(argv: list[str], values: dict[str, Any]) -> list[str]:
    """Puts `--model_config.n_layer 2`, on top of any `--model_config` before it, into `values`; returns the rest."""
    dotted = re.compile(r"--(\w[\w-]*)\.([\w.]+)(?:=(.*))?$", re.DOTALL)
    changed = {match[1].replace("-", "_") for match in map(dotted.match, argv) if match}
    rest, words = [], iter(argv)
    for word in words:
        match = dotted.match(word)
        whole, _, text = word.removeprefix("--").partition("=")
        name = (match[1] if match else whole).replace("-", "_")
        if match:
            text = next(words, "") if match[3] is None else match[3]
            current = values.get(name) or {}
            current = mapping(name, current) if isinstance(current, str) else current
            values[name] = {**current, match[2]: yaml.safe_load(text)}
        elif word.startswith("--") and name in changed:
            values[name] = text or next(words, "")
        else:
            rest.append(word)
    return rest


def _plain_number(word: str) -> str:
    """-1e-2 -> -0.01: argparse takes a word that starts with a minus for an option unless it is a plain number."""
    return format(Decimal(word), "f") if re.fullmatch(r"-[\d.]+[eE][-+]?\d+", word) else word


def _unknown(message: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return message + (f"; did you mean {near[0]!r}?" if near else "; --help lists what there is")


def _number_or_word(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word
