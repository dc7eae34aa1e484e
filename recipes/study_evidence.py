"""What the paper claims and what was seen here: docs/evidence.md, written from the csv files of the studies.

    python recipes/study_evidence.py
    python recipes/study_evidence.py --out evidence.md

Nothing on that page is typed: numbers are read from recipes/results, and the word at the end of a claim (holds, holds
in part, does not hold, undecided, not measured) comes from the rule in its entry of CLAIMS. To add a claim, add an
entry: a function that reads csv files and returns a Finding. A claim whose csv is missing is listed as not measured,
with the command.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from study_norms_training import MODELS
from study_parity import VARIANTS, Results, collect
from study_rows import by_seed, rows_of, where
from study_scale import curves, fit
from study_tables import mean_and_spread
from study_vision import of_scikit_learn

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "evidence.md"

HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"
UNDECIDED, MISSING = "undecided", "not measured"
EXPONENT_TOLERANCE = 0.1
"""An exponent of N within this of the paper's counts as the paper's: short sequences bend log-log lines."""
LOSS_TOLERANCE = 0.02
"""A loss of a language model within this share of softmax's, in the mean over the seeds, counts as parity."""
POINTS = 1.0
"""An accuracy at most so many points behind softmax's, in the mean over the seeds, counts as parity."""
SEEDS = 2
"""Paired seeds without which nothing is judged."""


@dataclass(frozen=True)
class Finding:
    """Lines of what was seen, each with its numbers, and the verdict."""

    seen: Sequence[str]
    verdict: str


@dataclass(frozen=True)
class Claim:
    """One row of the page.

    says: the claim, and whose it is. ran: what was run. files: the csv files that it is judged by, in recipes/results;
    where one of them is missing nothing is. also: others that are read where they exist. rule: how the verdict
    follows, in words; `judge` is that rule, called with the folder of the csv files.
    """

    name: str
    says: str
    ran: str
    files: tuple[str, ...]
    command: str
    rule: str
    judge: Callable[[Path], Finding]
    also: tuple[str, ...] = ()

    def finding(self, folder: Path) -> Finding:
        if missing := [name for name in self.files if not rows_of(folder / name)]:
            return Finding([f"there is no {', '.join(missing)}: `{self.command}` writes it"], MISSING)
        return self.judge(folder)


def verdict_of(checks: Sequence[bool]) -> str:
    """holds: all; does not hold: none; in part: some."""
    return HOLDS if all(checks) else IN_PART if any(checks) else FAILS


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean, Student's."""
    error = statistics.stdev(values) / len(values) ** 0.5
    half = float(of_scikit_learn("scipy.stats").t.ppf(0.975, len(values) - 1)) * error
    return statistics.mean(values) - half, statistics.mean(values) + half


def softmax_bounds(folder: Path) -> Finding:
    rows = rows_of(folder / "norms_theory_bounds.csv")
    # 1e-6 for float64 sums
    checks = [float(row["largest_over_sqrt_N"]) <= float(row["bound"]) + 1e-6 for row in rows]
    seen = []
    for norm, label in (("frobenius", "‖A‖_F"), ("jacobian", "the Jacobian's norm")):
        own = [row for row in rows if row["norm"] == norm]
        largest = max(float(row["largest_over_sqrt_N"]) for row in own)
        lengths = ", ".join(row["N"] for row in own)
        seen.append(f"{label}: at most {largest:.3f} √N of {own[0]['bound']} √N (N = {lengths})")
    return Finding(seen, verdict_of(checks))


def exponents(inputs: str) -> Callable[[Path], Finding]:
    """Judge of the growth exponents of s^p and s^p/√n for one kind of inputs."""

    def judge(folder: Path) -> Finding:
        checks, seen = [], []
        for normalization, claimed, form in (("none", 1.0, "s^p"), ("sqrt_length", 0.5, "s^p/√n")):
            rows = where(rows_of(folder / "norms_theory_exponents.csv"), inputs=inputs, normalization=normalization)
            # O(.) is a bound from above
            within = [float(row["exponent"]) <= claimed + EXPONENT_TOLERANCE for row in rows]
            checks += within
            for norm, label in (("frobenius", "‖A‖_F"), ("jacobian", "Jacobian")):
                cubic = where(rows, norm=norm, degree="3")
                values = [float(row["exponent"]) for row in rows if row["norm"] == norm]
                shown = "; ".join(
                    f"p = 3, {row['mask']}: {float(row['exponent']):.2f} ({float(row['low']):.2f} to "
                    f"{float(row['high']):.2f})"
                    for row in cubic
                )
                seen.append(f"{form}, {label}: N^{claimed:g} claimed; {min(values):.2f} to {max(values):.2f}; {shown}")
            seen.append(f"{form}: {sum(within)} of {len(within)} exponents within the claim")
        return Finding(seen, verdict_of(checks))

    return judge


def scale_law(folder: Path) -> Finding:
    rows = rows_of(folder / "vision_scale.csv")
    by_length = curves(rows)
    seeds = sorted({len(curve) for curve in by_length.values()})
    seen = [f"N = {', '.join(map(str, by_length))}; {' to '.join(map(str, seeds))} seeds; {len(rows)} runs"]
    if len(by_length) < 3:
        return Finding([*seen, "fewer than three lengths: no law can be judged"], MISSING)
    line = fit(rows)
    seen.append(f"the best {line}; 1/√N is c ~ n^0.50")
    if line.low <= 0 and line.high >= 0.5:
        return Finding(seen, UNDECIDED)
    if line.low > 0:
        return Finding(seen, HOLDS if line.low <= 0.5 <= line.high and not line.without else IN_PART)
    return Finding(seen, FAILS)


def scaled_against_unscaled(folder: Path) -> Finding:
    rows = where(rows_of(folder / "vision.csv"), data="digits")
    losses = {name: by_seed(where(rows, variant=name), "test_loss") for name in ("monomial", "unscaled")}
    both = sorted(set(losses["monomial"]) & set(losses["unscaled"]))
    if len(both) < SEEDS:
        return Finding([f"{len(both)} seeds with both: a difference needs {SEEDS}"], MISSING)
    paired = [losses["unscaled"][seed] - losses["monomial"][seed] for seed in both]
    low, high = interval(paired)
    seen = [
        f"ViT on digits, {rows[0]['N']} patches: test loss of s^3 minus that of s^3/√n "
        f"{mean_and_spread(paired, 3, sign='+')} ({len(paired)} seeds; 95 % interval of the mean {low:+.3f} to "
        f"{high:+.3f})",
        f"diverged: {sum(bool(row['note']) for row in rows if row['variant'] == 'unscaled')} runs of s^3, "
        f"{sum(bool(row['note']) for row in rows if row['variant'] == 'monomial')} of s^3/√n",
    ]
    return Finding(seen, HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED)


def late_norm(rows: Sequence[dict[str, str]], model: str, variant: str) -> float:
    """‖A‖_F/√N, geometric mean over layers, seeds and the second half of the steps."""
    own = [row for row in rows if (row["model"], row["variant"]) == (model, variant)]
    half = max(int(row["step"]) for row in own) / 2
    return statistics.geometric_mean(float(row["frobenius"]) for row in own if int(row["step"]) >= half)


def norms_in_training(scaled: str, unscaled: str) -> Callable[[Path], Finding]:
    """Judge of the norms while models train: scaled within a factor 2 of softmax, unscaled above it."""

    def judge(folder: Path) -> Finding:
        rows, runs = rows_of(folder / "norms_training.csv"), rows_of(folder / "norms_training_runs.csv")
        checks, seen = [], []
        for model, label in MODELS.items():
            seeds = {
                name: {run["seed"] for run in runs if (run["model"], run["variant"]) == (model, name)}
                for name in ("softmax", scaled, unscaled)
            }
            shared = sorted(set.intersection(*seeds.values()))
            if not shared:
                continue
            paired = [row for row in rows if row["seed"] in shared]
            ends = {name: late_norm(paired, model, name) for name in seeds}
            tracks = 0.5 <= ends[scaled] / ends["softmax"] <= 2
            grows = ends[unscaled] > max(2 * ends[scaled], 2 * ends["softmax"])
            checks += [tracks, grows]
            seen.append(
                f"{label}: ‖A‖_F/√N: softmax {ends['softmax']:.2g}, s^3/√n "
                f"{ends[scaled]:.2g} ({'tracks' if tracks else 'does not track'}), s^3 {ends[unscaled]:.2g} "
                f"({'far larger' if grows else 'not far larger'}); {len(shared)} seed(s)"
            )
        return Finding(seen, verdict_of(checks) if checks else MISSING)

    return judge


def parity(variant: str) -> Callable[[Path], Finding]:
    """Judge of one form beside softmax, model by model: language models by their loss, ViT by its accuracy."""

    def is_level(found: Results) -> bool:
        difference = statistics.mean(found.paired(variant))
        if "accuracy" in found.metric:
            return 100 * difference >= -POINTS
        return difference <= LOSS_TOLERANCE * statistics.mean(found.values["softmax"].values())

    def judge(folder: Path) -> Finding:
        results = collect(folder / "parity.csv")
        checks, seen = {}, []
        for name in (*MODELS, "vit-accuracy"):
            found = results.get(name)
            paired = found.paired(variant) if found else []
            if not paired:
                continue
            line = f"{found.label}, {found.metric}: {found.shown(paired, '+')} against softmax"
            line += f" ({len(paired)} seeds)"
            if name != "vit" and len(paired) >= SEEDS:
                checks[name.removesuffix("-accuracy")] = is_level(found)
                line += ": level or better" if is_level(found) else ": behind"
            seen.append(line)
        if absent := [label for name, label in MODELS.items() if name not in checks]:
            seen.append(f"not measured on {SEEDS} seeds: {', '.join(absent)}")
        if not checks:
            return Finding(seen, MISSING)
        verdict = verdict_of(list(checks.values()))
        return Finding(seen, IN_PART if verdict == HOLDS and absent else verdict)

    return judge


def stability(folder: Path) -> Finding:
    """Of the cells of the sweeps that softmax and s^3/√n were both trained in, fp32."""
    rows = [row for row in rows_of(folder / "stability.csv") if row["precision"] == "no"]
    broken = {
        name: {
            tuple(row[key] for key in ("seed", "learning_rate", "layers", "clip")): bool(row["diverged_at"])
            for row in rows
            if row["attention"] == name
        }
        for name in ("softmax", "monomial")
    }
    both = set(broken["softmax"]) & set(broken["monomial"])
    if not both:
        return Finding(["no run of s^3/√n beside one of softmax"], MISSING)
    counts = {name: sum(cells[cell] for cell in both) for name, cells in broken.items()}
    seen = [f"diverged, of {len(both)} runs each: softmax {counts['softmax']}, s^3/√n {counts['monomial']}"]
    return Finding(seen, HOLDS if counts["monomial"] <= counts["softmax"] else FAILS)


def accuracies(name: str, form: str) -> Callable[[Path], Finding]:
    """Judge of a form's accuracies in one csv beside softmax's, task by task, means over all lengths of a seed."""

    def judge(folder: Path) -> Finding:
        rows = [row for row in rows_of(folder / name) if row["accuracy"]]
        checks, seen = [], []
        for task in dict.fromkeys(row.get("task", "") for row in rows):
            found: dict[str, dict[str, list[float]]] = {}
            for row in rows:
                if row.get("task", "") == task:
                    found.setdefault(row["attention"], {}).setdefault(row["seed"], []).append(float(row["accuracy"]))
            means = {key: {seed: statistics.mean(x) for seed, x in own.items()} for key, own in found.items()}
            results = Results(task, "accuracy", means, scale=100, digits=1)
            if paired := results.paired(form):
                checks.append(100 * statistics.mean(paired) >= -POINTS)
                seen.append(
                    f"{task}{': ' * bool(task)}softmax {results.shown(means['softmax'].values())} %, difference "
                    f"{results.shown(paired, '+')} points ({len(paired)} seeds): "
                    f"{'level or better' if checks[-1] else 'behind'}"
                )
        return Finding(seen or ["no run of the form beside one of softmax"], verdict_of(checks) if checks else MISSING)

    return judge


def longer_than_trained(folder: Path) -> Finding:
    """Loss at the longest length minus loss at the trained one, of the default form and of softmax."""
    column = "minus_trained_length"
    rows = [row for row in rows_of(folder / "length.csv") if row[column]]
    longest = max((int(row["length"]) for row in rows), default=0)
    rises = {name: by_seed(where(rows, attention=name, length=str(longest)), column) for name in ("softmax", "poly")}
    results = Results("", "loss", rises, digits=2)
    paired = results.paired("poly")
    if not paired:
        return Finding(["no run of the form beside one of softmax"], MISSING)
    seen = [
        f"at {longest} characters the loss is {results.shown(rises['softmax'].values(), '+')} (softmax) and "
        f"{results.shown(rises['poly'].values(), '+')} (degree 3, defaults) from that at the trained length"
    ]
    return Finding(seen, HOLDS if statistics.mean(paired) <= 0 else FAILS)


PAPER = "arXiv 2410.18613"
# one entry a claim, in the order of the page
CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Softmax is bounded",
        f"‖softmax(S)‖_F <= √N and the norm of its Jacobian <= 2√N, for every S ({PAPER}).",
        "gradient ascent on the scores, 8 starts a length",
        ("norms_theory_bounds.csv",),
        "python recipes/study_norms_theory.py",
        "all largest norms found are within their bound",
        softmax_bounds,
    ),
    Claim(
        "Growth with N, Gaussian scores",
        "For Gaussian queries and keys ‖A‖_F and the Jacobian's norm of s^p are O(N), those of s^p/√N O(√N) "
        f"({PAPER}).",
        "degrees 1 to 6, causal and full, N = 32 to 1,024; slopes of log(mean norm) over log N",
        ("norms_theory_exponents.csv",),
        "python recipes/study_norms_theory.py",
        f"every exponent is at most the claimed one plus {EXPONENT_TOLERANCE}",
        exponents("gaussian"),
    ),
    Claim(
        "Growth with N, trained scores",
        "The same for queries and keys of a trained model (not the paper's claim, but what it is used for).",
        "a trained character GPT-2 on windows of tiny Shakespeare, N = 8 to 64",
        ("norms_theory_exponents.csv",),
        "python recipes/study_norms_theory.py --checkpoint gpt2-shakespeare --text tinyshakespeare.txt",
        f"every exponent is at most the claimed one plus {EXPONENT_TOLERANCE}",
        exponents("trained"),
    ),
    Claim(
        "The best scale falls like 1/√N",
        f"Of s^3/c, the c that trains best grows like √N ({PAPER}, figure 1).",
        "a ViT of 2 layers on digits as 8 to 256 patches, c in powers of 4 around √N, best by validation loss",
        ("vision_scale.csv",),
        "python recipes/study_scale.py",
        "holds: the 95 % interval of the exponent is above 0 and has 1/2 in it, and all curves have a valley; "
        "in part: it is above 0; undecided: it reaches from 0 or less to 1/2 or more; three lengths at least",
        scale_law,
    ),
    Claim(
        "Scaled trains better than unscaled",
        f"s^3/√N trains better than s^3 ({PAPER}).",
        "the ViT of study_vision.py from the usual initialisation",
        ("vision.csv",),
        "python recipes/study_vision.py",
        "holds: the 95 % interval (Student) of the paired difference of test losses is above 0; undecided: 0 is in it",
        scaled_against_unscaled,
    ),
    Claim(
        "Norms in training, usual initialisation",
        f"While a model trains, ‖A‖_F of s^3/√N follows softmax's and that of s^3 is far larger ({PAPER}, figures).",
        "100 steps from the usual initialisation; mean of an early, a middle and the last layer over the second half",
        ("norms_training.csv", "norms_training_runs.csv"),
        "python recipes/study_norms_training.py --data tinyshakespeare.txt",
        "for each model, in the second half: s^3/√n is within a factor 2 of softmax, and s^3 more than twice both",
        norms_in_training("scaled", "unscaled"),
    ),
    Claim(
        "Norms in training, scores of spread 1",
        "The same where scores start at spread 1, as the theory has them.",
        "100 steps, query and key weights scaled at the start; the same mean",
        ("norms_training.csv", "norms_training_runs.csv"),
        "python recipes/study_norms_training.py --data tinyshakespeare.txt",
        "for each model, in the second half: s^3/√n is within a factor 2 of softmax, and s^3 more than twice both",
        norms_in_training("scaled-spread", "unscaled-spread"),
    ),
    *(
        Claim(
            f"Parity: {VARIANTS[variant][0]}",
            says,
            "GPT-2, LLaMA and BERT of 0.7 to 0.8M parameters on tiny Shakespeare, a ViT on digits; from scratch, the "
            "same recipe and seeds",
            ("shakespeare_activations.csv",),
            "python recipes/study_parity.py --data tinyshakespeare.txt",
            f"for each model: behind softmax by at most {LOSS_TOLERANCE:.0%} of its loss, ViT by at most {POINTS:g} "
            "point of accuracy, in the mean over the seeds; holds: for all four",
            parity(variant),
            ("parity.csv", "vision.csv"),
        )
        for variant, says in (
            ("monomial", f"s^3/√N trains as well as softmax ({PAPER})."),
            ("monomial-mean0.5", "s^3/√n does, where scores start at mean 1/2 and the gain learns (this project's)."),
            ("poly", "A cubic with learnable coefficients does (this project's default)."),
            ("length", "It does without normalised rows too (this project's)."),
        )
    ),
    Claim(
        "Training is as stable as softmax's",
        f"Scaled powers train without divergence where softmax does ({PAPER}).",
        "a small GPT-2 over learning rates and depths",
        ("stability.csv",),
        "python recipes/study_stability.py --data tinyshakespeare.txt",
        "s^3/√n diverges in no more of the runs that both have, in fp32",
        stability,
    ),
    Claim(
        "ListOps",
        f"s^3/√N is level with softmax on tasks of the Long Range Arena ({PAPER}).",
        "a small BERT from scratch on generated ListOps, shorter than the Long Range Arena's",
        ("listops.csv",),
        "python recipes/study_listops.py",
        f"the mean accuracy is at most {POINTS:g} point behind softmax's, same seeds",
        accuracies("listops.csv", "monomial"),
    ),
    Claim(
        "Recall",
        "A cubic with learnable coefficients recalls as well as softmax (not in the paper).",
        "induction, a passkey and multi-query recall, from scratch",
        ("recall.csv",),
        "python recipes/study_recall.py",
        f"for each task: the mean accuracy is at most {POINTS:g} point behind softmax's, same seeds",
        accuracies("recall.csv", "poly"),
    ),
    Claim(
        "Longer than trained",
        "A cubic with learnable coefficients loses no more than softmax beyond the trained length (not in the paper).",
        "a LLaMA-shaped character model on windows longer than those it was trained on",
        ("length.csv",),
        "python recipes/study_length.py --data tinyshakespeare.txt",
        "the loss at the longest length rises from that at the trained one by no more than softmax's",
        longer_than_trained,
    ),
)

HEADER = """# Evidence

What the paper ([arXiv 2410.18613](https://arxiv.org/abs/2410.18613)) and this project claim, what was run here, what
was seen, and whether it holds. This page is written by `recipes/study_evidence.py` from the csv files in
[recipes/results](../recipes/results), which hold every run with its command, seed, versions and device; verdicts
follow from the rules that stand beside them. Models are small and trained on one CPU core: what holds here may not
hold at scale, and the other way round. ± is the standard deviation over the seeds.
"""


def page(folder: Path) -> str:
    """The whole page: verdicts in one table, then claim by claim."""
    findings = [(claim, claim.finding(folder)) for claim in CLAIMS]
    lines = [HEADER, "| claim | verdict |", "|---|---|"]
    lines += [f"| {claim.name} | {finding.verdict} |" for claim, finding in findings]
    for claim, finding in findings:
        files = ", ".join(
            f"[{name}](../recipes/results/{name})" for name in (*claim.files, *claim.also) if (folder / name).exists()
        )
        lines += ["", f"## {claim.name}", "", claim.says, ""]
        lines.append(f"- Run: {claim.ran}{': ' + files if files else ''}.")
        lines += [f"- Seen: {line}." for line in finding.seen]
        lines += [f"- Rule: {claim.rule}.", f"- **{finding.verdict[0].upper()}{finding.verdict[1:]}.**"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the csv files")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    args.out.write_text(page(args.results), encoding="utf-8")
    print(f"{args.out}: {len(CLAIMS)} claims")


if __name__ == "__main__":
    sys.exit(main())
