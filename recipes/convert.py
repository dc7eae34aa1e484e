r"""Convert a pretrained softmax checkpoint: calibrate, transfer its attention, distil, fine-tune; report each stage.

    python recipes/convert.py recipes/configs/convert/causal_lm.yaml --model openai-community/gpt2 --dataset text.txt \
        --output_dir gpt2-cubic
    python recipes/convert.py recipes/configs/convert/encoder.yaml --model sentence-transformers/all-MiniLM-L6-v2 \
        --dataset sentences.txt --output_dir minilm-cubic --degree 2

Each stage has a YAML file of its own beside the configuration, and is changed in one entry by --transfer.steps 100.
The same command after a stop goes on where it stopped; stages that are not finished may have other settings then.
--twin fine-tunes the softmax model on as many tokens, for a fair comparison; --shares 0.25 0.5 1 converts the heads
that a polynomial follows best first. debug_cpu.yaml takes seconds and starts from what pretrain_causal_lm's
debug_cpu.yaml with --activation softmax has left in runs/softmax.
"""

from hf_polyattn_arguments import AttentionArguments
from hf_polyattn_parsing import check_usage, parse_arguments
from hf_polyattn_scripts import run_script
from hf_polyattn_stages import ConversionArguments, ConversionTextArguments

GROUPS = (ConversionArguments, AttentionArguments, ConversionTextArguments)
check_usage(__name__, GROUPS, __doc__)  # at once: the imports below take seconds

import transformers

from hf_polyattn.converting.pipeline import convert
from hf_polyattn.converting.report import ConversionReport


def main(argv: list[str] | None = None) -> ConversionReport:
    """Converts as `argv` says and returns the report."""
    args, attention, text = parse_arguments(argv, GROUPS, description=__doc__)
    transformers.logging.disable_progress_bar()  # its own: of every checkpoint that is written and read
    report = convert(args, attention, text)
    print(f"\n{report}\n\nsaved: {args.output_dir}; figure: {args.output_dir}/conversion.png")
    return report


if __name__ == "__main__":
    run_script(main)
