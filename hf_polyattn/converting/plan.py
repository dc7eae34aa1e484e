"""The stages of a conversion in their order: every stage at every share of the heads."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_polyattn_stages import CalibrateStage, ConversionArguments, FinetuneStage, Stage

TWIN = "99-softmax-tuned"
"""The folder of the fine-tuned softmax model."""


@dataclass(frozen=True)
class Planned:
    """One stage at one share of the heads."""

    name: str
    """Of its folder."""
    label: str
    """In the report: the kind, #2 for the second of its kind, and the share where there are several."""
    kind: str
    settings: Stage
    steps: int
    share: float | None
    """Of the heads that are to be polynomial from here on; None for calibration, which measures all."""


def plan_stages(args: ConversionArguments, has_logits: bool) -> list[Planned]:
    """Every stage at every share, in order; the steps of a stage are divided among the shares."""
    default = ("calibrate", "transfer", "distill") if has_logits else ("calibrate", "transfer")
    stages = args.plan(default)
    planned: list[Planned] = []

    def add(kind: str, settings: Stage, steps: int, share: float | None, end: str) -> None:
        label = f"{kind}{end}"
        plain = label.replace(" ", "-").replace("%", "").replace("#", "")
        planned.append(Planned(f"{len(planned) + 1:02d}-{plain}", label, kind, settings, steps, share))

    if stages and isinstance(stages[0][1], CalibrateStage):
        add("calibrate", stages.pop(0)[1], 0, None, "")
    for share, shown in zip(args.shares, _percentages(args.shares), strict=True):
        seen: Counter[str] = Counter()
        for kind, settings in stages:
            assert not isinstance(settings, CalibrateStage), "it comes first and once"
            seen[kind] += 1
            end = (f" #{seen[kind]}" if seen[kind] > 1 else "") + shown
            add(kind, settings, max(1, round(settings.steps / len(args.shares))), share, end)
    return planned


def _percentages(shares: Sequence[float]) -> list[str]:
    """What labels end in: nothing for all heads at once, and as many digits as tell the shares apart."""
    if list(shares) == [1.0]:
        return [""]
    texts = ([f" {100 * share:.{digits}g}%" for share in shares] for digits in itertools.count(3))
    return next(found for found in texts if len(set(found)) == len(shares))


def twin_settings(planned: Sequence[Planned], steps: int) -> FinetuneStage:
    """How softmax is fine-tuned for so many steps: at the rates of the last stage that trains all weights."""
    stages = [s.settings for s in planned if isinstance(s.settings, FinetuneStage) and not s.settings.lora_r]
    names = set(FinetuneStage.__dataclass_fields__)
    last = {name: value for name, value in asdict(stages[-1]).items() if name in names} if stages else {}
    # it may choose its best weights as the student does, and sees as many tokens all the same
    patience = steps if last.get("patience") else 0
    return FinetuneStage(**{**last, "steps": steps, "patience": patience})


def entries(planned: Sequence[Planned], args: ConversionArguments) -> list[dict[str, Any]]:
    """What decides the result of each stage besides the settings that all share; `ConversionFolder` compares them."""
    found: list[dict[str, Any]] = []
    for stage in planned:
        settings = {**asdict(stage.settings), "steps": stage.steps}
        # calibration also chooses the heads of every share
        share = {"shares": list(args.shares)} if stage.share is None else {"share": stage.share}
        found.append({"name": stage.name, **settings, **share})
    if args.twin:
        settings = asdict(twin_settings(planned, max(1, sum(stage.steps for stage in planned))))
        found.append({"name": TWIN, "after": [stage.name for stage in planned], **settings})
    return found


def needs_labels(settings: Stage) -> bool:
    return isinstance(settings, FinetuneStage) and getattr(settings, "cross_entropy", 1.0) > 0
