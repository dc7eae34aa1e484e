"""A process elsewhere that reads from the Hub of its environment. Prints JSON.

python hub_reader.py plugin|alone INPUT.safetensors OUTPUT.safetensors: writes the logits of each public model.
"""

import json
import sys

if sys.argv[1] == "alone":
    sys.modules["hf_polyattn"] = None
else:
    import hf_polyattn  # noqa: F401

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
OPTIONS = {"trust_remote_code": True} if sys.argv[1] == "alone" else {}
REVISIONS = {"user/first": "main", "user/trained": "main", "user/pushed": "main", "user/second": "cubic"}


def message(action) -> str:
    try:
        action()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def read() -> dict:
    ids = load_file(sys.argv[2])["input_ids"]
    report, logits = {}, {}
    for name, revision in REVISIONS.items():
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, **OPTIONS).eval()
        with torch.no_grad():
            # the loader leaves tensors where they are in the file, and matrix products round differently there
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
            logits[name] = model(ids)[0]
        report[name] = type(model).__module__.split(".")[0]
    save_file(logits, sys.argv[3])
    report["tokens"] = AutoTokenizer.from_pretrained("user/first", **OPTIONS)("hi").input_ids
    report["private"] = message(lambda: AutoModelForCausalLM.from_pretrained("user/private", **OPTIONS))
    if sys.argv[1] == "alone":
        report["refused"] = message(lambda: AutoModelForCausalLM.from_pretrained("user/first"))
        model.save_pretrained(sys.argv[3] + ".again")
        with open(sys.argv[3] + ".again/config.json", encoding="utf-8") as file:
            report["auto_map"] = json.load(file)["auto_map"]
    return report


# the question whether to run remote code ends without a new line
print("\n" + json.dumps(read()))
