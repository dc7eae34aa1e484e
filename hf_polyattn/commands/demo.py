"""`hf-polyattn demo`: the package's own demonstration."""

from argparse import Namespace

from ..demo import run_demo


def run(args: Namespace) -> str:
    """Trains, reloads and tells; it takes minutes and prints as it goes, so that nothing is left to print."""
    run_demo(out=args.out, quick=args.quick, steps=args.steps, seed=args.seed)
    return ""
