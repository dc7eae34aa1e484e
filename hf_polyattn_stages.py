"""Arguments of a conversion: what is converted, and one dataclass for each kind of stage.

Beside the package for the reason that `hf_polyattn_arguments` gives.
"""

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_polyattn_arguments import TextArguments, check_numbers
from hf_polyattn_parsing import mapping, parse_values


@dataclass
class CalibrateStage:
    """Each head's polynomial from a few batches, in closed form; nothing is trained."""

    batches: int = 16
    """Batches to measure on."""
    fit: Literal["coefficients", "gain"] = "coefficients"
    """coefficients: least squares against softmax's output; gain: its size alone, for what is not linear in them."""
    inputs: Literal["teacher", "student"] = "teacher"
    """Of coefficients. student: layer by layer, each on what the polynomial layers before it make of the batches."""
    monotone: bool = False
    """Keep polynomials from falling in the range of scores seen."""

    def __post_init__(self) -> None:
        check_numbers(self, "batches", at_least=1)


@dataclass
class TransferStage:
    """Attention transfer: all layers at once learn softmax's output on the teacher's own inputs; no labels."""

    steps: int = 200
    """Optimizer steps, divided among the shares where there are several."""
    train: Literal["all", "query_key", "state"] = "all"
    """all: the attention's projections and what the patch learns; query_key: without values and outputs; state: what
    the patch learns."""
    learning_rate: float = 1e-3
    """Of weights, at the start of a cosine."""
    final_learning_rate: float = 1e-5
    """At its end."""
    polyattn_learning_rate: float = 1e-2
    """Of coefficients and gains, along the same cosine."""

    def __post_init__(self) -> None:
        check_numbers(self, "steps", at_least=1)
        check_numbers(self, "learning_rate", "final_learning_rate", "polyattn_learning_rate", above=0)


@dataclass
class FinetuneStage:
    """All weights on the labels of the text: next tokens, or masked ones."""

    steps: int = 500
    """Optimizer steps, divided among the shares where there are several."""
    learning_rate: float = 1e-4
    """Of the body, at the start of a cosine."""
    attention_learning_rate: float = 1e-4
    """Of the attention's projections."""
    polyattn_learning_rate: float = 1e-2
    """Of coefficients and gains."""
    final_ratio: float = 0.01
    """Share of its rate at which each cosine ends."""
    warmup_steps: int = 20
    """Over which the rates rise from zero."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: not at all."""
    eval_steps: int = 100
    """Steps between looks at the validation score, where patience asks for them."""
    patience: int = 0
    """Looks without a better score after which the stage ends with its best weights; 0: all steps are done."""
    lora_r: int = 0
    """Rank of adapters that are trained instead of all weights, and merged at the end; 0: all weights."""
    lora_alpha: int = 16
    """Scale of the adapters."""

    def __post_init__(self) -> None:
        check_numbers(self, "steps", "eval_steps", at_least=1)
        check_numbers(self, "learning_rate", "attention_learning_rate", "polyattn_learning_rate", above=0)
        check_numbers(self, "final_ratio", "warmup_steps", "max_grad_norm", "patience", "lora_r", at_least=0)
        check_numbers(self, "lora_alpha", above=0)


@dataclass
class DistillStage(FinetuneStage):
    """All weights on the teacher's logits, and on the labels."""

    cross_entropy: float = 0.1
    """Share of the labels in the loss; the rest is the divergence from the teacher."""
    temperature: float = 1.0
    """Divides both models' logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "cross_entropy", at_least=0, below=1)
        check_numbers(self, "temperature", above=0)


Stage = CalibrateStage | TransferStage | DistillStage | FinetuneStage
STAGES: dict[str, type] = {
    "calibrate": CalibrateStage,
    "transfer": TransferStage,
    "distill": DistillStage,
    "finetune": FinetuneStage,
}


@dataclass
class ConversionArguments:
    """What is converted, in which stages, and where it goes."""

    model: str = ""
    """Softmax checkpoint: a folder, a Hub name, or a .gguf file."""
    output_dir: str = ""
    """Folder of the converted model and its report. The same command after a stop goes on in it."""
    stages: list[str] = field(default_factory=list)
    """Stages in their order: calibrate, transfer, distill, finetune, or YAML files that name one with `stage:`.
    Empty: calibrate transfer distill for a model with logits, calibrate transfer for one without."""
    calibrate: str = "{}"
    """Changes to that stage, as JSON; one entry: --calibrate.batches 4."""
    transfer: str = "{}"
    """Changes to that stage, as in --transfer.steps 100."""
    distill: str = "{}"
    """Changes to that stage, as in --distill.learning_rate 1e-4."""
    finetune: str = "{}"
    """Changes to that stage, as in --finetune.lora_r 8."""
    shares: list[float] = field(default_factory=lambda: [1.0])
    """Progressive conversion: shares of the heads, easiest first, such as 0.25 0.5 1; each goes through the training
    stages before the next. The last share is what the model ends with: 0.75 leaves the hardest quarter softmax."""
    twin: bool = False
    """Also fine-tune the softmax model on as many tokens, for a fair comparison."""
    batch_size: int = 16
    """Sequences of one step."""
    validation_batches: int = 64
    """Batches of held-out text at most, for the report."""
    save_steps: int = 100
    """Steps of a stage after which its state is saved, to go on from."""
    keep_stages: bool = False
    """Keep the model after each stage in output_dir/stages."""
    seed: int = 1
    """Of the order of the text, masking and dropout."""

    def __post_init__(self) -> None:
        if not self.model or not self.output_dir:
            raise ValueError("give model (a folder, a Hub name or a .gguf file) and output_dir")
        check_numbers(self, "batch_size", "validation_batches", "save_steps", at_least=1)
        check_numbers(self, "seed", at_least=0)
        ordered = all(a < b for a, b in zip(self.shares, self.shares[1:], strict=False))
        if not self.shares or not ordered or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares must rise, above 0 and up to 1, got {self.shares}")
        self.plan(())

    def plan(self, default: tuple[str, ...]) -> list[tuple[str, Stage]]:
        """(kind, its settings) of each stage, in order; `default` where none were named.

        Raises ValueError for a stage that there is not, settings it has not, and an order that makes no sense.
        """
        plan = [self._stage(word) for word in self.stages or default]
        kinds = [kind for kind, _ in plan]
        for name in STAGES:
            if mapping(name, getattr(self, name)) and kinds and name not in kinds:
                raise ValueError(f"{name} has settings and is not among the stages {kinds}")
        if "calibrate" in kinds[1:]:
            raise ValueError(f"calibrate comes first and once: after training it would undo what was learned; {kinds}")
        if kinds and "calibrate" not in kinds and self.shares != [1.0]:
            raise ValueError("shares need the stage calibrate, which tells the easy heads from the hard ones")
        return plan

    def _stage(self, word: str) -> tuple[str, Stage]:
        values: dict[str, Any] = {}
        kind = word
        if word.endswith((".yaml", ".yml")):
            values = mapping(word, _find(word).read_text(encoding="utf-8"))
            kind = values.pop("stage", "")
        if kind not in STAGES:
            raise ValueError(f"a stage is one of {list(STAGES)} or a YAML file that says stage: NAME, got {word!r}")
        values |= mapping(kind, getattr(self, kind))
        return kind, parse_values(STAGES[kind], values, kind)


def _find(word: str) -> Path:
    """A stage's file: where the command runs, or among the recipes that are installed with the package."""
    path = Path(word)
    spec = importlib.util.find_spec("hf_polyattn_recipes") if path.parts[0] == "recipes" else None
    installed = [Path(folder, *path.parts[1:]) for folder in (spec.submodule_search_locations or () if spec else ())]
    for candidate in (path, *installed):
        if candidate.is_file():
            return candidate
    raise ValueError(f"no such file for a stage: {path}")


_WITHOUT_EFFECT = ("output_dir", "keep_stages", "save_steps", "num_workers")


@dataclass
class ConversionTextArguments(TextArguments):
    """Text of the conversion, and how it becomes tokens. A model without logits reads it line by line."""

    tokenizer: str = ""
    """Empty: the checkpoint's own. bytes, chars, a folder or a Hub name otherwise."""
    block_size: int | None = None  # type: ignore[assignment]
    """Tokens the model sees at once. Empty: 256, or the model's positions where it has fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming:
            raise ValueError("a conversion reads its text whole: set streaming false")


def common_settings(*groups: Any) -> dict[str, Any]:
    """What decides the result of every stage of a conversion: all but what is a stage's own and what decides none."""
    values: dict[str, Any] = {}
    for group in groups:
        values |= dataclasses.asdict(group)
    own = ("stages", *STAGES, "shares", "twin")
    return {name: value for name, value in values.items() if name not in own + _WITHOUT_EFFECT}
