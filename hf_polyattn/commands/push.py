"""`hf-polyattn push`: a saved model onto the Hub."""

import json
from argparse import Namespace

import transformers

from ..hub import push


def run(args: Namespace) -> str:
    """Uploads args.path to args.to."""
    transformers.logging.disable_progress_bar()
    done = push(
        args.path,
        args.to,
        private=args.private or None,
        revision=args.revision,
        message=args.message,
        create_pr=args.create_pr,
    )
    url = done.pr_url or done.commit_url
    return json.dumps({"url": url, "commit": done.oid}, indent=2) if args.json else f"pushed: {url}"
