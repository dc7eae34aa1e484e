"""Converting pretrained checkpoints, stage by stage: what is lost by the patch, and what each stage gives back.

    python recipes/study_conversion.py sentences --checkpoint all-MiniLM-L6-v2 --train stsb-train.csv --validation stsb-dev.csv
    python recipes/study_conversion.py text --checkpoint gpt2-shakespeare --train tinyshakespeare.txt
    python recipes/study_conversion.py stories --checkpoint stories260k

Stages, each on top of the one before: patched (nothing measured), gain (calibration of size alone), coefficients (least
squares), transfer (attention transfer on unlabelled inputs), distilled (logits and labels, all weights). softmax is the
untouched checkpoint, softmax-tuned the same fine-tuned on as many tokens as transfer and distillation saw.

sentences: Spearman's correlation of a sentence encoder (mean pooling) on pairs with a score (csv without a header:
sentence, sentence, score). text: validation loss on the last tenth of the characters; the alphabet is the text's own, in
sorted order, where the checkpoint has no tokenizer. stories: a small language model on stories that it wrote itself.
Rows go to results/conversion.csv with their processor seconds; those that are there are not measured again.
"""  # noqa: E501

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from study_rows import Row, append, environment, finished, name_of, out_of, rows_of, shown_command, study_parser, where
from study_tables import markdown, mean_of
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_polyattn import calibrate, patch_model
from hf_polyattn.conversion import transfer_attention
from hf_polyattn.distillation import distill

STAGES = ("patched", "gain", "coefficients", "transfer", "distilled")
KEY = ("task", "checkpoint", "attention", "stage", "seed")
CALIBRATION = 16  # batches


class Sentences:
    """A sentence encoder: unlabelled training sentences, and Spearman's correlation on scored pairs."""

    auto_class, metric, stages = AutoModel, "spearman", STAGES[:4]
    batch_size = 32

    def __init__(self, args: argparse.Namespace, teacher: PreTrainedModel) -> None:
        import csv

        self.tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
        with Path(args.train).open(encoding="utf-8", newline="") as file:
            self.train = sorted({sentence for row in csv.reader(file) for sentence in row[:2]})
        with Path(args.validation).open(encoding="utf-8", newline="") as file:
            self.pairs = list(csv.reader(file))

    def batches(self, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(self.train), (self.batch_size,), generator=generator).tolist()
            yield dict(self._encode([self.train[i] for i in chosen]))

    @torch.no_grad()
    def score(self, model: PreTrainedModel) -> float:
        from hf_polyattn.training.metrics import Regression

        sentences = sorted({sentence for row in self.pairs for sentence in row[:2]}, key=len)
        embeddings: dict[str, torch.Tensor] = {}
        for start in range(0, len(sentences), 64):
            part = sentences[start : start + 64]
            batch = self._encode(part)
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            pooled = (states * mask).sum(1) / mask.sum(1)
            embeddings |= dict(zip(part, torch.nn.functional.normalize(pooled, dim=-1), strict=True))
        cosines = [(embeddings[a] * embeddings[b]).sum().item() for a, b, *_ in self.pairs]
        scores = [float(row[2]) for row in self.pairs]
        return Regression().compute(predictions=cosines, references=scores)["spearman"]

    def _encode(self, sentences: list[str]) -> dict[str, torch.Tensor]:
        return self.tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")


class Text:
    """A causal language model on a text: random windows of its first nine tenths, the loss on the last tenth."""

    auto_class, metric, stages = AutoModelForCausalLM, "loss", STAGES

    def __init__(self, args: argparse.Namespace, teacher: PreTrainedModel) -> None:
        text = Path(args.train).read_text(encoding="utf-8")
        rank = {letter: i for i, letter in enumerate(sorted(set(text)))}
        if len(rank) != teacher.config.vocab_size:
            sys.exit(f"the text has {len(rank)} letters, the checkpoint {teacher.config.vocab_size} tokens")
        ids = torch.tensor([rank[letter] for letter in text])
        self.length = teacher.config.max_position_embeddings
        # small batches: many steps bring more here than many tokens a step
        self.batch_size = 768 // self.length
        cut = int(0.9 * len(ids))
        self.train, held_out = ids[:cut], ids[cut:]
        rows = len(held_out) // self.length
        self.held_out = held_out[: rows * self.length].view(rows, self.length)

    def batches(self, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - self.length, (self.batch_size,), generator=generator).tolist()
            ids = torch.stack([self.train[start : start + self.length] for start in starts])
            yield {"input_ids": ids, "labels": ids}

    @torch.no_grad()
    def score(self, model: PreTrainedModel) -> float:
        losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in self.held_out.split(128)]
        return sum(losses) / len(self.held_out)


class Stories(Text):
    """A language model on its own samples at temperature 1: 448 to train on, 64 others for the loss."""

    def __init__(self, args: argparse.Namespace, teacher: PreTrainedModel) -> None:
        path = args.runs / f"samples-{name_of(args.checkpoint)}.pt"
        if not path.exists():
            torch.manual_seed(0)
            start = torch.full((512, 1), teacher.config.bos_token_id)
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_length": 256, "pad_token_id": 0}
            samples = teacher.generate(start, attention_mask=torch.ones_like(start), eos_token_id=None, **options)
            torch.save(samples, path)
        samples = torch.load(path)
        self.train, self.held_out = samples[:448], samples[448:]
        self.batch_size = 2048 // samples.shape[1]

    def batches(self, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            ids = self.train[torch.randint(len(self.train), (self.batch_size,), generator=generator)]
            yield {"input_ids": ids, "labels": ids}


TASKS: dict[str, Any] = {"sentences": Sentences, "text": Text, "stories": Stories}


def convert(
    teacher: PreTrainedModel,
    task: Any,
    options: dict[str, Any],
    stages: list[str],
    seed: int,
    args: argparse.Namespace,
) -> Iterator[tuple[str, PreTrainedModel, int]]:
    """(stage, model, training tokens) of each of the stages, in order, as soon as one student reaches it."""
    student = patch_model(copy.deepcopy(teacher), **options)
    if "patched" in stages:
        yield "patched", student, 0
    stream = task.batches(seed)
    inputs = [{k: v for k, v in next(stream).items() if k != "labels"} for _ in range(CALIBRATION)]
    if "gain" in stages:
        calibrate(student, inputs, fit="gain")
        yield "gain", student, 0
    if not {"coefficients", "transfer", "distilled"} & set(stages):
        return
    print(calibrate(student, inputs, fit="coefficients"), flush=True)
    yield "coefficients", student, 0
    tokens = 0
    if {"transfer", "distilled"} & set(stages):
        report = transfer_attention(student, teacher, stream, steps=args.transfer_steps)
        print(report, flush=True)
        tokens = report.tokens
        yield "transfer", student, tokens
    if "distilled" in stages:
        tokens += tune(student, teacher, stream, args.distill_steps, args)
        yield "distilled", student, tokens


def tune(
    model: PreTrainedModel, teacher: PreTrainedModel | None, stream: Any, steps: int, args: argparse.Namespace
) -> int:
    """All weights, in place: on the teacher's logits and labels in equal parts, or on labels alone; tokens seen."""
    rates = {"learning_rate": args.learning_rate, "attention_learning_rate": args.learning_rate}
    share = 1.0 if teacher is None else 0.5
    return distill(model, teacher, stream, steps=steps, cross_entropy=share, warmup_steps=20, **rates).tokens


def table(rows: list[Row]) -> str:
    """Markdown: one line a checkpoint and attention, one column a stage; means over seeds, and how many there are."""
    columns = ("softmax", "softmax-tuned", *STAGES)
    lines = []
    for checkpoint, metric, attention in dict.fromkeys((r["checkpoint"], r["metric"], r["attention"]) for r in rows):
        own = where(rows, checkpoint=checkpoint, attention=attention)
        found = [[float(row["value"]) for row in where(own, stage=stage)] for stage in columns]
        cells = [mean_of(values) + f" ({len(values)} seeds)" * (len(values) > 1) for values in found]
        lines.append([f"{checkpoint}, {metric}", attention, *cells])
    return markdown(["checkpoint, metric", "attention", *columns], lines)


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("study_conversion", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the data, calibration's too")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub name of the softmax model")
    parser.add_argument("--train", help="sentences: csv; text: the text")
    parser.add_argument("--validation", help="sentences: csv")
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--normalizations", nargs="+", default=["length", "sqrt_length"])
    parser.add_argument("--stages", nargs="+", choices=("softmax-tuned", *STAGES), default=["softmax-tuned", *STAGES])
    parser.add_argument("--transfer_steps", type=int, default=200)
    parser.add_argument("--distill_steps", type=int, default=600)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of distillation and of the softmax twin")
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    kind = TASKS[args.task]
    teacher = kind.auto_class.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    task = kind(args, teacher)
    checkpoint = name_of(args.checkpoint)

    def key(attention: str, stage: str, seed: int) -> tuple[str, ...]:
        return args.task, checkpoint, attention, stage, str(seed)

    out = out_of(args, "conversion.csv")
    have = finished(out, *KEY)

    def note(attention: str, stage: str, seed: int, model: PreTrainedModel, tokens: int, seconds: float) -> None:
        if key(attention, stage, seed) in have:
            return
        value = round(task.score(model.eval()), 4)
        print(f"{checkpoint}, {attention}, {stage}, seed {seed}: {task.metric} {value}", flush=True)
        row = {
            **dict(zip(KEY, key(attention, stage, seed), strict=True)),
            "metric": task.metric,
            "value": value,
            "training_tokens": tokens,
            "processor_seconds": round(seconds),
            **environment(model.device),
            "command": shown_command("study_conversion.py", sys.argv[1:] if argv is None else argv),
        }
        append(out, [row])
        have.add(key(attention, stage, seed))

    note("softmax", "softmax", 0, teacher, 0, 0)
    if "distilled" in task.stages and "softmax-tuned" in args.stages:
        for seed in args.seeds:
            if key("softmax", "softmax-tuned", seed) not in have:
                start, model = time.process_time(), copy.deepcopy(teacher)
                tokens = tune(model, None, task.batches(seed), args.transfer_steps + args.distill_steps, args)
                note("softmax", "softmax-tuned", seed, model, tokens, time.process_time() - start)
    for normalization, degree, seed in itertools.product(args.normalizations, args.degrees, args.seeds):
        attention = f"degree {degree} / {normalization}"
        stages = [
            stage
            for stage in STAGES
            if stage in args.stages and stage in task.stages and key(attention, stage, seed) not in have
        ]
        options = {"degree": degree, "normalization": normalization}
        start = time.process_time()
        for stage, model, tokens in convert(teacher, task, options, stages, seed, args) if stages else ():
            if stage in stages:
                spent = time.process_time() - start
                note(attention, stage, seed, model, tokens, spent)
                start = time.process_time() - spent  # scoring is not part of it
    print(table(rows_of(out)))


if __name__ == "__main__":
    main()
