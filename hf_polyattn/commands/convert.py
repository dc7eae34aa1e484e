"""`hf-polyattn convert`: a softmax checkpoint becomes polynomial in stages, with a report of each."""

import json
from argparse import Namespace
from pathlib import Path

import transformers

from hf_polyattn_arguments import AttentionArguments
from hf_polyattn_parsing import parse_arguments
from hf_polyattn_stages import ConversionArguments, ConversionTextArguments

GROUPS = (ConversionArguments, AttentionArguments, ConversionTextArguments)


def run(args: Namespace) -> str:
    """Converts args.source, saves it in args.to, returns the table of its stages."""
    # here, because it loads what trains
    from ..converting.pipeline import convert

    transformers.logging.disable_progress_bar()

    words = ["--model", args.source, "--output_dir", args.to]
    for name in ("degree", "normalization", "seed"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", str(value)]
    if args.text:
        words += ["--dataset", args.text]
    if args.shares:
        words += ["--shares", *map(str, args.shares)]
    if args.twin:
        words += ["--twin"]
    settings = args.words
    config = settings[:1] if settings and not settings[0].startswith("-") else []
    # what the command itself names goes last: it wins over the file
    conversion, attention, text = parse_arguments([*config, *settings[len(config) :], *words], GROUPS)
    report = convert(conversion, attention, text)
    out = Path(args.to)
    if args.json:
        return json.dumps({"saved": str(out), **report.to_dict()}, indent=2)
    return (
        f"{report}\n\nsaved:  {out}\nfigure: {out / 'conversion.png'}\n"
        f"next:   hf-polyattn card {out} --results {out / 'results.json'} --figure {out / 'conversion.png'}"
        " --license ID  (leave --license out where the source names its own)"
    )
