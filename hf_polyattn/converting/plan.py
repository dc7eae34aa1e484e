"""The stages of a conversion in their order: every stage at every share of the heads."""

from dataclasses import dataclass

from hf_polyattn_stages import CalibrateStage, ConversionArguments, FinetuneStage, Stage


@dataclass(frozen=True)
class Planned:
    """One stage at one share of the heads."""

    name: str
    """Of its folder."""
    label: str
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
        name = f"{len(planned) + 1:02d}-{kind}{end.replace(' ', '-').replace('%', '')}"
        planned.append(Planned(name, kind + end, kind, settings, steps, share))

    if stages and isinstance(stages[0][1], CalibrateStage):
        add("calibrate", stages.pop(0)[1], 0, None, "")
    for share in args.shares:
        end = f" {share:.0%}" if args.shares != [1.0] else ""
        for kind, settings in stages:
            add(kind, settings, max(1, round(settings.steps / len(args.shares))), share, end)  # type: ignore[union-attr]
    return planned


def needs_labels(settings: Stage) -> bool:
    return isinstance(settings, FinetuneStage) and getattr(settings, "cross_entropy", 1.0) > 0
