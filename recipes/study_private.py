"""A sentence encoder whose attention adds and multiplies only: what the constant denominator costs, and what brings it back.

    python recipes/study_private.py --checkpoint all-MiniLM-L6-v2 --train stsb-train.csv --validation stsb-dev.csv

Spearman's correlation on scored pairs of sentences, mean pooling. length: polynomials of degree 2 with each row's own
length as its denominator, patched and not fitted, after least squares (coefficients), and after attention transfer on
unlabelled training sentences. constant: the same with one number for all rows, the mean length of the sentences that
it is calibrated on, shorter and longer sentences included; bounded: with the penalty on the range of scores during transfer.
constant and bounded are made private and scored on the graph that is exported, in which padding is left out by a mask in
the clear. GELU, LayerNorm and pooling stay as they are.

`held_out` is the correlation on training pairs whose sentences are not trained on. Settings are chosen by it, and `value` is on
the validation pairs. Rows go to results/private.csv, with processor seconds of calibration and transfer; those that are
there are not measured again. The table goes to results/private.md, with the ranges and depths of the first seed.
"""  # noqa: E501

import argparse
import contextlib
import copy
import csv
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from study_conversion import CALIBRATION, Sentences
from study_rows import Row, append, environment, finished, name_of, out_of, rows_of, shown_command, study_parser, where
from study_tables import markdown, mean_and_spread, mean_of, write_up
from transformers import AutoModel, PreTrainedModel

from hf_polyattn import calibrate, patch_model
from hf_polyattn.conversion import transfer_attention
from hf_polyattn.private import computing_privately, make_private, private_report, score_range_penalty

DEGREE, BUCKETS = 2, 8
STAGES = ("patched", "coefficients", "transfer")
REACHED = {"length": STAGES, "constant": STAGES[1:], "bounded": STAGES[2:]}
"""The stages that are scored; up to the penalty, bounded is constant."""
ATTENTIONS = ("softmax", *REACHED)
KEY = ("checkpoint", "attention", "stage", "seed")


class HeldOut(Sentences):
    """Training sentences without those of `held_out` training pairs, on which settings are chosen."""

    def __init__(self, args: argparse.Namespace, teacher: PreTrainedModel) -> None:
        super().__init__(args, teacher)
        self.validation = self.pairs
        with Path(args.train).open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        self.held_out = [rows[i] for i in order[: args.held_out]]
        kept_back = {sentence for row in self.held_out for sentence in row[:2]}
        self.train = [sentence for sentence in self.train if sentence not in kept_back]

    def batches(self, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Sentences of about one length together: half of a batch of any lengths is padding."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(self.train), (BUCKETS * self.batch_size,), generator=generator).tolist()
            drawn = sorted((self.train[i] for i in chosen), key=len)
            for bucket in torch.randperm(BUCKETS, generator=generator).tolist():
                yield dict(self._encode(drawn[bucket * self.batch_size : (bucket + 1) * self.batch_size]))

    def score_on(self, model: PreTrainedModel, pairs: list[list[str]]) -> float:
        self.pairs = pairs
        return self.score(model)


def convert(
    teacher: PreTrainedModel, task: HeldOut, attention: str, seed: int, args: argparse.Namespace
) -> Iterator[tuple[str, PreTrainedModel, dict[str, Any]]]:
    """(stage, model, what was spent on it) of each stage, in order, as one student reaches it."""
    stream = task.batches(seed)
    inputs = [next(stream) for _ in range(CALIBRATION)]
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in inputs]).float()
    denominator = "length" if attention == "length" else float(lengths.mean().round())
    student = patch_model(copy.deepcopy(teacher), degree=DEGREE, normalization=denominator)
    spent = {"denominator": denominator, "training_tokens": 0, "processor_seconds": 0}
    if attention == "length":
        yield "patched", student, spent
    start = time.process_time()
    print(calibrate(student, inputs, fit="coefficients"), flush=True)
    spent["processor_seconds"] = round(time.process_time() - start)
    if attention != "bounded":
        yield "coefficients", student, spent
    options: dict[str, Any] = {"steps": args.transfer_steps, "learning_rate": args.learning_rate}
    spent |= options
    if attention == "bounded":
        penalty = score_range_penalty(student, args.score_bound, masked=True)
        options |= {"penalty": penalty, "penalty_weight": args.score_weight}
        spent |= {"score_bound": args.score_bound, "score_weight": args.score_weight}
    start = time.process_time()
    report = transfer_attention(student, teacher, stream, progress=False, **options)
    print(report, flush=True)
    spent["training_tokens"] = report.tokens
    spent["processor_seconds"] += round(time.process_time() - start)
    yield "transfer", student, spent


@torch.no_grad()
def largest_score(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> float:
    """The largest absolute score of a patched model on some batches, with those of padding."""
    with score_range_penalty(model, bound=1.0, masked=True) as penalty:
        for batch in batches:
            model(**batch)
        return penalty.largest


def table(rows: list[Row]) -> str:
    """Markdown: means and standard deviations over seeds on the validation pairs, and the largest score."""
    lines = []
    rows = sorted(rows, key=lambda row: (row["checkpoint"], ATTENTIONS.index(row["attention"])))
    for checkpoint, attention, stage in dict.fromkeys((r["checkpoint"], r["attention"], r["stage"]) for r in rows):
        here = where(rows, checkpoint=checkpoint, attention=attention, stage=stage)

        def values(name: str, here: list[Row] = here) -> list[float]:
            return [float(row[name]) for row in here if row[name]]

        cells = [mean_and_spread(values(name)) for name in ("held_out", "value")]
        cells += [mean_of(values("largest_score"), 1), mean_of(values("processor_seconds"), 0)]
        lines.append([checkpoint, attention, stage, *cells, len(here)])
    scores = "held out", "validation", "largest score", "processor seconds"
    return markdown(["checkpoint", "attention", "stage", *scores, "seeds"], lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser("study_private", __doc__, runs=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the data, calibration's too")
    parser.add_argument("--checkpoint", required=True, help="folder or Hub name of the softmax model")
    parser.add_argument("--train", required=True, help="csv of sentence, sentence, score, without a header")
    parser.add_argument("--validation", required=True, help="csv, the same")
    parser.add_argument("--held_out", type=int, default=500, help="training pairs to choose settings on")
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--transfer_steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--score_bound", type=float, default=8.0)
    parser.add_argument("--score_weight", type=float, default=1.0)
    parser.add_argument("--no_validation", action="store_true", help="held-out pairs only, to choose settings")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    teacher = AutoModel.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    task = HeldOut(args, teacher)
    checkpoint = name_of(args.checkpoint)
    measured = [next(task.batches(0)) for _ in range(8)]

    out = out_of(args, "private.csv")
    have = finished(out, *KEY)

    def note(attention: str, stage: str, seed: int, model: PreTrainedModel, **found: Any) -> None:
        value = "" if args.no_validation else round(task.score_on(model, task.validation), 4)
        held_out = round(task.score_on(model, task.held_out), 4)
        print(f"{attention}, {stage}, seed {seed}: held out {held_out}, validation {value}", flush=True)
        names = ("denominator", "steps", "learning_rate", "score_bound", "score_weight", "training_tokens")
        row = {
            **dict(zip(KEY, (checkpoint, attention, stage, str(seed)), strict=True)),
            "metric": "spearman",
            "held_out": held_out,
            "value": value,
            **{name: found.get(name, "") for name in ("largest_score", *names, "processor_seconds")},
            **environment(model.device),
            "command": shown_command("study_private.py", sys.argv[1:] if argv is None else argv),
        }
        append(out, [row])

    if "softmax" in args.attentions and (checkpoint, "softmax", "softmax", "0") not in have:
        note("softmax", "softmax", 0, teacher)
    for seed, attention in itertools.product(args.seeds, [name for name in args.attentions if name in REACHED]):
        stages = [stage for stage in REACHED[attention] if stage in args.stages]
        wanted = [stage for stage in stages if (checkpoint, attention, stage, str(seed)) not in have]
        for stage, model, spent in convert(teacher, task, attention, seed, args) if wanted else ():
            if stage in wanted:
                found = {**spent, "largest_score": round(largest_score(model.eval(), measured), 1)}
                private = model if attention == "length" else make_private(copy.deepcopy(model))
                as_exported = contextlib.nullcontext if attention == "length" else computing_privately
                with as_exported(private.eval()):
                    note(attention, stage, seed, private, **found)
                if attention != "length" and stage == "transfer" and seed == args.seeds[0]:
                    path = out.with_name(f"{out.stem}_ranges_{attention}.txt")
                    path.write_text(f"{private_report(private, measured)}\n")
            if stage == wanted[-1]:
                break
    write_up(out, rows_of(out), table)


if __name__ == "__main__":
    main()
