# PYTHON_ARGCOMPLETE_OK
"""The console script `hf-polyattn`: arguments and error messages only.

A module of its own beside the package, because importing anything below `hf_polyattn` imports torch and transformers,
and `--help` should answer at once. A command is an entry in COMMANDS, a function here that names its arguments, and a
module of its name in hf_polyattn/commands, which is imported when it runs.
"""

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hf_polyattn_scripts import ExpectedError, exit_status

EXPECTED = (ValueError, OSError, OverflowError, ExpectedError)
"""Errors that carry a message for the user; shown as one line unless --debug asks for the traceback."""

IMPORT = "name the module that calls it with --import, as in hf-polyattn --import MODULE patch ..."

_CHECKPOINT = "folder or Hub name of a checkpoint"
_SAVED = "folder of a saved model"

STATUS = """exit status: 0 after success; 1 after an error, which is one line on standard error; 2 for wrong usage;
130 after Ctrl-C; train ends with what accelerate launch ends with. Reports go to standard output, progress to
standard error; --json prints a report for programs. hf-polyattn COMMAND --help shows the options of a command.

completion, with argcomplete installed: eval "$(register-python-argcomplete hf-polyattn)" where your shell starts"""


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        from importlib.metadata import version

        print(f"hf-polyattn {version('hf-polyattn')}")
        parser.exit()


def demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a smaller model: shows that everything works"
    )
    parser.add_argument(
        "--out", default="demo", metavar="DIR", help="where models, table and figure go (default: demo)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each model")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of weights and data order (default: 0)")


def patch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=_CHECKPOINT)
    _to(parser, "folder to save the patched model in")
    parser.add_argument("--activation", default="poly", help="poly (default), monomial, softmax, relu or sigmoid")
    normalizations = "sqrt_length, length, sum, l1, l2, none or a number"
    default = (
        "l1 for learned coefficients from degree 3, else and with --calibrate length; a patched one keeps its own"
    )
    _polynomial(parser, "3, or what --coefficients gives", f"{normalizations} (default: {default})")
    parser.add_argument(
        "--coefficients", type=float, nargs="+", metavar="C", help="fixed c_0 ... c_p instead of learnable"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="L", help="attention modules to patch; the rest stay softmax"
    )
    parser.add_argument("--qk-norm", action="store_true", help="RMS-normalise queries and keys")
    parser.add_argument("--learn-gain", action="store_true", help="train one gain for each head")
    parser.add_argument("--calibrate", metavar="FILE", help="text on which each head is fitted to softmax")
    parser.add_argument(
        "--fit",
        choices=("coefficients", "gain"),
        help="what --calibrate sets: the whole polynomial by least squares, or alpha and gain alone (default: gain)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SHARE",
        help="convert only this share of the heads, those that a polynomial fits best; needs --calibrate",
    )
    _tokenizer(parser)
    _json(parser)


def inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=_CHECKPOINT)
    parser.add_argument("--text", metavar="FILE", help="text on which norms, ranges and dead scores are measured")
    parser.add_argument("--figure", metavar="PNG", help="the same as a figure, by layer and head; needs --text")
    _tokenizer(parser)
    _json(parser)


def eval_(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=f"{_CHECKPOINT}, patched or stock")
    parser.add_argument("--against", metavar="OTHER", help="a second checkpoint beside it, such as its softmax twin")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="text: loss in nats per token, perplexity, bits per byte")
    what.add_argument("--data", metavar="FILE", help="CSV, TSV, JSON or parquet of texts and labels, for a classifier")
    what.add_argument(
        "--tasks", nargs="+", metavar="NAME", help="tasks of lm-evaluation-harness (pip install lm-eval)"
    )
    text = parser.add_argument_group("with --text")
    text.add_argument(
        "--block-size", type=int, metavar="N", help="tokens seen at a time (default: PATH's positions, 1024 at most)"
    )
    text.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="from one block to the next; fewer give more context (default: a block)",
    )
    data = parser.add_argument_group("with --data")
    data.add_argument(
        "--metric",
        nargs="+",
        metavar="NAME",
        choices=("accuracy", "f1", "loss", "pearson", "spearman", "mean_squared_error"),
        help="accuracy, f1, loss; of a model that gives a value pearson, spearman, mean_squared_error (default: all)",
    )
    data.add_argument("--text-column", metavar="NAME", help="column of the text (default: text)")
    data.add_argument("--pair-column", metavar="NAME", help="column of the second text, where there are pairs")
    data.add_argument("--label-column", metavar="NAME", help="column of the label or value (default: label)")
    data.add_argument("--column-names", nargs="+", metavar="NAME", help="of CSV and TSV files without a header line")
    data.add_argument("--max-length", type=int, metavar="N", help="cut texts to N tokens (default: PATH's positions)")
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument(
        "--include-path", "--include_path", metavar="DIR", help="folder of YAML files of tasks of yours"
    )
    tasks.add_argument("--shots", type=int, metavar="N", help="worked examples in front (default: what the task says)")
    _tokenizer(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N blocks, rows or documents of a task")
    parser.add_argument("--batch-size", type=int, metavar="N", help="at a time; does not change the result")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: the checkpoint's own)")
    _json(parser)


def train(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [-h] [--accelerate FILE] [--processes N] [RECIPE [CONFIG] [--name value ...]]"
    parser.add_argument("--accelerate", metavar="FILE", help="of accelerate: a path, or a name such as ddp or fsdp2")
    parser.add_argument("--processes", type=int, metavar="N", help="one for each GPU (default: what accelerate says)")
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="such as pretrain_causal_lm, or a path; none: list what there is"
    )
    parser.add_argument(
        "words",
        metavar="CONFIG --name value",
        nargs=argparse.REMAINDER,
        help="of the recipe: a YAML file, or the name of one of its configurations, and fields that differ from it",
    )


def convert(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [-h] SOURCE --to OUT [options] [-- [CONFIG.yaml] [--name value ...]]"
    parser.epilog = (
        "behind --: a YAML file and fields of recipes/convert.py, such as -- --transfer.steps 500 --batch_size 8"
    )
    parser.add_argument("source", metavar="SOURCE", help="softmax checkpoint: a folder, a Hub name or a .gguf file")
    _to(parser, "folder of the model and its report")
    parser.add_argument("--text", metavar="DATA", help="text file or Hub data set (default: the standard library)")
    _polynomial(parser, "3", "sqrt_length, length, l1, l2, none or a number (default: length)")
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="S", help="of the heads, easiest first, such as 0.25 0.5 1"
    )
    parser.add_argument("--twin", action="store_true", help="fine-tune softmax on as many tokens, to compare")
    parser.add_argument("--seed", type=int, metavar="S", help="of the order of the data (default: 1)")
    _json(parser)


def card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=_SAVED)
    parser.add_argument("--name", metavar="USER/NAME", help="name on the Hub, for the card's loading code")
    parser.add_argument("--results", metavar="FILE", help="results.json of the run that made it")
    parser.add_argument("--twin", metavar="FILE", help="results.json of the softmax run to stand beside it")
    parser.add_argument("--base-model", metavar="NAME", help="what it was made from (default: what the results say)")
    parser.add_argument("--license", metavar="ID", help="such as apache-2.0 (default: that of the base model)")
    parser.add_argument(
        "--figure", metavar="FILE", help="image to show (default: losses, drawn from the metrics.jsonl of the runs)"
    )
    parser.add_argument("--out", metavar="FILE", help="where the card goes (default: PATH/README.md)")
    _json(parser)


def push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=f"{_SAVED} with its card")
    _to(parser, "repository; it is created if need be", "USER/NAME")
    parser.add_argument("--private", action="store_true", help="create it as a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    _json(parser)


def bench(parser: argparse.ArgumentParser) -> None:
    passes, phis = ("forward", "forward+backward", "decode"), ("coefficients", "s^3", "s^2")
    parser.add_argument("--quick", action="store_true", help="float32 at N = 256 and few rounds: seconds")
    parser.add_argument("--passes", nargs="+", choices=passes, default=passes, help="(default: all)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), help="(default: float32 bfloat16)"
    )
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="of keys (default: 512 2048)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="(default: 64)")
    parser.add_argument("--mask", choices=("causal", "full", "padded"), default="causal", help="(default: causal)")
    parser.add_argument("--phis", nargs="+", choices=phis, default=phis[:2], help="(default: coefficients s^3)")
    parser.add_argument("--forms", nargs="+", metavar="FORM", help="(default: cpu tiled; on a GPU fused tiled)")
    parser.add_argument("--seconds", type=float, metavar="S", help="for the rounds of one cell (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: a GPU where there is one)")
    _json(parser)


def _to(parser: argparse.ArgumentParser, what: str, metavar: str = "OUT") -> None:
    parser.add_argument("--to", required=True, metavar=metavar, help=what)


def _polynomial(parser: argparse.ArgumentParser, default_degree: str, normalization_help: str) -> None:
    parser.add_argument("--degree", type=int, metavar="P", help=f"of the polynomial (default: {default_degree})")
    parser.add_argument("--normalization", metavar="Z", help=normalization_help)


def _tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", metavar="DIR", help="folder or Hub name (default: the checkpoint's own)")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "demo": (demo, "pretrain a small GPT-2 with softmax and with a cubic, side by side (minutes)"),
    "patch": (patch, "load a checkpoint, make its attention polynomial, save it"),
    "inspect": (inspect, "say which attention of a checkpoint is polynomial, and with what numbers"),
    "convert": (convert, "convert a pretrained checkpoint in stages: calibrate, transfer, distil; report each"),
    "train": (train, "run a recipe: pretrain, fine-tune; stands for accelerate launch recipes/RECIPE.py"),
    "eval": (eval_, "measure a checkpoint, alone or beside another: a text, labelled data, tasks of lm-eval"),
    "card": (card, "write the model card of a checkpoint, and its results beside it"),
    "push": (push, "upload a saved model with its card to the Hub, in one commit"),
    "bench": (bench, "time the attention on this machine, every form of it beside softmax"),
    "doctor": (_json, "say which forms of the operation this machine has, and why not the others"),
}
"""Name -> what names its arguments, and its line in --help; in the order of --help."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-polyattn",
        description="Polynomial attention instead of softmax for Hugging Face Transformers models.",
        epilog=STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--debug", action="store_true", help="show the whole traceback of an error (HF_POLYATTN_DEBUG=1: always)"
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module of yours first, which runs its code: one that calls register_activation or "
        "register_architecture; may be repeated",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add_arguments, line) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + "."))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C (argparse exits with 2)."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        # a shell asks what may follow: nothing must run, so that where argcomplete is missing this is an error
        importlib.import_module("argcomplete").autocomplete(parser)
    words = list(sys.argv[1:] if argv is None else argv)
    # argparse takes what stands behind -- for positional arguments, each Python version after its own fashion
    cut = words.index("--") if command_of(words) == "convert" and "--" in words else len(words)
    args, rest = parser.parse_known_args(words[:cut])
    if rest:
        line = f"unrecognized arguments: {shlex.join(rest)}"
        if args.command == "convert":
            line += f"; fields of recipes/convert.py go behind --: -- {shlex.join(rest)}"
        parser.error(line)
    args.words = getattr(args, "words", words[cut + 1 :])
    return exit_status(f"hf-polyattn {args.command}", lambda: run(args), EXPECTED, args.debug)


def command_of(words: Sequence[str]) -> str | None:
    """The command among the words of a command line: the first one that no option in front of it takes."""
    front = iter(words)
    for word in front:
        if len(word) > 2 and "--import".startswith(word):
            next(front, None)
        elif not word.startswith("-"):
            return word
    return None


def run(args: argparse.Namespace) -> None:
    """Does what the command says, and prints its report."""
    for name in args.modules:
        import_module(name)
    command = importlib.import_module(f"hf_polyattn.commands.{args.command}")
    try:
        report = command.run(args)
    except ValueError as error:
        if "hf_polyattn.register_" not in str(error):
            raise
        # there is no Python here in which to call it
        raise ValueError(f"{error}: {IMPORT}") from error
    if report:
        print(report)


def import_module(name: str) -> None:
    """Imports a module of the user's, from the folder where the command runs or from the environment."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        # a console script has the folder of the script there, and `python -m` the current one
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name != error.name and not name.startswith(f"{error.name}."):
            # the module is there, and what it imports is not
            raise
        hint = f": name it {name.removesuffix('.py')}" if name.endswith(".py") else ""
        raise ValueError(f"--import {name}: there is no such module here or in the environment{hint}") from error


if __name__ == "__main__":
    sys.exit(main())
