"""`hf-polyattn doctor`: which forms of the operation this machine has."""

import json
from argparse import Namespace

from .. import doctor


def run(args: Namespace) -> str:
    """The report of `hf_polyattn.doctor`."""
    return json.dumps(doctor.facts(), indent=2) if args.json else doctor.report()
