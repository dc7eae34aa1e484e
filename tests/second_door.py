"""A process without the plugin: loads checkpoints by their own modeling_polyattn.py, or is refused. Prints JSON.

python second_door.py JOB.json, where JOB maps names to {"folder", "auto", "again", "autos"}: a checkpoint with
expected.safetensors in it, its Auto class, a folder to save it in again, further Auto classes to try.
"""

import json
import sys

sys.modules["hf_polyattn"] = None

import torch
import transformers
from safetensors.torch import load_file
from transformers import AttentionInterface, PreTrainedModel

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def message(action) -> str:
    """Of the ValueError that `action` raises."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@torch.no_grad()
def examine(model: PreTrainedModel, expected: dict[str, torch.Tensor]) -> dict:
    inputs = {name: expected[name] for name in ("input_ids", "pixel_values") if name in expected}
    mask = expected["attention_mask"]
    shown = mask.bool()
    found = {
        "class": f"{type(model).__name__}",
        "module": type(model).__module__,
        "padded": distance(model(**inputs, attention_mask=mask)[0][shown], expected["padded"][shown]),
        "whole": distance(model(**inputs)[0], expected["whole"]),
        "state": sum(".polyattn." in name for name, _ in model.named_parameters()),
    }
    attentions = model(**inputs, attention_mask=mask, output_attentions=True).attentions
    found["weights"] = max(distance(one, expected[f"weights.{i}"]) for i, one in enumerate(attentions))
    if "generated" in expected:
        for name, options in {
            "cache": {},
            "no_cache": {"use_cache": False},
            "static": {"cache_implementation": "static"},
        }.items():
            out = model.generate(**inputs, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
            found[name] = torch.equal(out, expected["generated"])
    return found


def main() -> None:
    report = {}
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for name, job in jobs.items():
        folder, auto = job["folder"], getattr(transformers, job["auto"])
        refused = message(lambda: auto.from_pretrained(folder, trust_remote_code=False))
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        found = examine(model, load_file(f"{folder}/expected.safetensors"))
        found["refused"] = refused
        found["contradiction"] = message(
            lambda: auto.from_pretrained(folder, trust_remote_code=True, attn_implementation="sdpa")
        )
        new = type(model)(model.config)
        found["start"] = {
            name: row.flatten().tolist() for name, row in new.state_dict().items() if ".polyattn." in name
        }
        found["switched"] = message(lambda: model.set_attn_implementation("eager"))
        found["autos"] = {
            other: type(getattr(transformers, other).from_pretrained(folder, trust_remote_code=True)).__name__
            for other in job.get("autos", ())
        }
        if job.get("again"):
            model.save_pretrained(job["again"])
        report[name] = found
    report["registered"] = [name for name in AttentionInterface()._global_mapping if "polyattn" in name]
    print(json.dumps(report))


main()
