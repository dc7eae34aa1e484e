"""Checkpoints that are whole or absent: written aside, flushed to disk, renamed; then `last` and `best` point to them.

OUT/checkpoint-000200/   model, tokenizer, config.yaml, position.json, state/ (optimizer, random states; shards of the
                         weights too under FSDP and DeepSpeed)
OUT/last, OUT/best       links to checkpoints; a checkpoint that neither points to is deleted
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_polyattn_scripts import ExpectedError

from .lora import check_adapter, describe_base

POSITION = "position.json"
PARTIAL = ".partial"


def register_hooks(accelerator: Accelerator) -> None:
    """The model's weights are saved once, by save_pretrained, and not again by accelerate's save_state.

    FSDP and DeepSpeed save and load their shards before any hook is asked: there state/ holds the weights a second
    time, and a resumed run takes them from there.
    """
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def save_checkpoint(
    out: Path,
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    position: dict[str, Any],
    config_yaml: str,
    best: bool,
) -> Path:
    """Writes OUT/checkpoint-STEP and moves `last`, and `best` if asked, to it. All processes must call it.

    position: JSON-ready; must hold "step". A process that dies in here leaves the previous checkpoints as they were.
    """
    final = out / f"checkpoint-{position['step']:06d}"
    aside = out / (final.name + PARTIAL)
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside / "state"))
    # a compiled model prefixes its names, and nothing would load them
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in accelerator.get_state_dict(model).items()}
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    digests = gather_object([random_state_digest()])
    if accelerator.is_main_process:
        bare.save_pretrained(aside, state_dict=weights)
        if (aside / "adapter_model.safetensors").exists():
            check_adapter(aside, bare)
            describe_base(aside, bare, yaml.safe_load(config_yaml).get("model"))
        tokenizer.save_pretrained(aside)
        (aside / "config.yaml").write_text(config_yaml, encoding="utf-8")
        sizes = {p.relative_to(aside).as_posix(): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}
        position = {**position, "random_states": digests, "files": sizes}
        (aside / POSITION).write_text(json.dumps(position, indent=2), encoding="utf-8")
        _flush(aside)
        if final.exists():
            # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        os.rename(aside, final)
        _flush_folder(out)
        point(out / "last", final)
        if best:
            point(out / "best", final)
        prune(out)
    accelerator.wait_for_everyone()
    return final


def find_last(out: Path) -> Path | None:
    """The checkpoint that OUT/last points to, checked to be whole; None when there is none.

    Raises ValueError for a checkpoint with missing or cut files, and FileNotFoundError for one that is gone.
    """
    link = out / "last"
    if not link.exists():
        if link.is_symlink():
            raise FileNotFoundError(
                f"{link} points to {os.readlink(link)}, which is not there: bring that checkpoint back, point {link} "
                "to another one, or use overwrite to start anew"
            )
        return None
    folder = link.resolve()
    position = read_position(folder)
    for name, size in position["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(
                f"{file} is missing or cut: the checkpoint cannot be resumed. Use overwrite to start anew"
            )
    return folder


def read_position(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as position, with sizes of files and digests of random states."""
    return json.loads((folder / POSITION).read_text(encoding="utf-8"))


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """Optimizer and random states back into what `accelerator.prepare` returned; the model is loaded by build_model.

    Under FSDP and DeepSpeed the model's shards come back with them.

    accelerate reads with weights_only=True, so that these files cannot run code. The shards of FSDP and DeepSpeed are
    pickles beyond our control: resume only runs of your own under those.
    Raises ExpectedError when the number of processes changed or a random state did not come back.
    """
    digests = read_position(folder)["random_states"]
    if len(digests) != accelerator.num_processes:
        raise ExpectedError(
            f"{folder} was written by {len(digests)} processes and cannot continue exactly on "
            f"{accelerator.num_processes}: use {len(digests)}, or start a new run with --model {folder}"
        )
    accelerator.load_state(str(folder / "state"))
    # accelerate only logs when it fails to restore random states, and dropout would silently differ
    if random_state_digest() != digests[accelerator.process_index]:
        raise ExpectedError(
            f"the random state in {folder / 'state'} could not be restored: was it copied incompletely?"
        )


def random_state_digest() -> str:
    """Hash of torch's random states on this process, CPU and current GPU."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return hashlib.sha256(b"".join(state.numpy().tobytes() for state in states)).hexdigest()[:16]


def point(link: Path, target: Path) -> None:
    """Makes `link` a relative link to `target` in one step."""
    aside = link.with_name(link.name + PARTIAL)
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.name, target_is_directory=True)
    os.replace(aside, link)
    _flush_folder(link.parent)


def prune(out: Path) -> None:
    """Deletes checkpoints that neither `last` nor `best` points to, and what interrupted saves left."""
    kept = {link.resolve() for link in (out / "last", out / "best") if link.exists()}
    for folder in out.glob("checkpoint-*"):
        if folder.resolve() not in kept:
            shutil.rmtree(folder)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_folder(path) if path.is_dir() else _sync(path, os.O_RDWR)


def _flush_folder(folder: Path) -> None:
    # directories cannot be opened on Windows, and need no flushing there
    if os.name == "posix":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
