"""The processes that `hf-polyattn demo` starts: `train` one model, or `reload` a saved one. `demo` holds the story.

    python -m hf_polyattn.demo_worker train JOB.json

Each prints one JSON object a line on its standard output and nothing else; training takes pieces of the recipes.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import load_from_disk
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging

from hf_polyattn_arguments import AttentionArguments, ModelArguments, OptimizationArguments

from .diagnostics import weight_norms
from .patching import coverage
from .training.data import next_token_batch
from .training.devices import device_name, peak_mib
from .training.losses import mean_loss, token_losses
from .training.models import build_model, replace_attention
from .training.optimization import adamw, set_learning_rate
from .training.order import Shuffled, evaluation_loader, training_loader

UNTIMED_STEPS = 3
"""First steps, in which memory is fetched and kernels are chosen: they do not enter tokens/s."""


@dataclass(frozen=True)
class Job:
    """One model of the demo, as it travels to a worker."""

    name: str
    degree: int
    """0: softmax, the stock model."""
    folder: str
    """Where the model is saved."""
    data: str
    """Folder with the tokenizer and the packed blocks."""
    steps: int
    seed: int
    threads: int
    block_size: int
    batch_size: int
    evaluations: int
    learning_rate: float
    model_config: dict[str, Any]


def emit(event: str, **values: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def probe_file(job: Job) -> Path:
    """Inputs and logits of the model before it was saved."""
    return Path(job.data) / f"{job.name}_probe.safetensors"


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss sum and number of predicted tokens of each sequence."""
    return token_losses(model(input_ids=batch["input_ids"]).logits, batch["labels"])


def train(job: Job) -> None:
    """Builds, patches, trains, measures and saves one model, and the logits that a reload must repeat."""
    accelerator = Accelerator()
    data = Path(job.data)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    view = Shuffled(load_from_disk(data / "train"), job.seed)
    validation = load_from_disk(data / "validation")

    new_model = ModelArguments(model_type="gpt2", model_config=json.dumps(job.model_config))
    model = build_model(AutoModelForCausalLM, new_model, tokenizer, job.seed, job.block_size)
    if job.degree:
        model = replace_attention(model, AttentionArguments(activation="poly", degree=job.degree))
    said = str(coverage(model)) if job.degree else f"softmax: {type(model).__name__} as it is"
    emit("built", parameters=sum(p.numel() for p in model.parameters()), attention=said)

    arguments = OptimizationArguments(
        batch_size=job.batch_size, learning_rate=job.learning_rate, warmup_steps=max(1, job.steps // 10), seed=job.seed
    )
    train_loader = training_loader(view, job.batch_size, next_token_batch, 0, job.steps)
    validation_loader = evaluation_loader(validation, job.batch_size, next_token_batch)
    model, optimizer, train_loader, validation_loader = accelerator.prepare(
        model.train(), adamw(model, arguments), train_loader, validation_loader
    )
    seconds, tokens = 0.0, 0
    evaluate_at = {round(job.steps * k / job.evaluations) for k in range(1, job.evaluations + 1)}
    for step, batch in enumerate(train_loader, 1):
        start = time.perf_counter()
        set_learning_rate(optimizer, arguments, step, job.steps)
        sums, counts = loss_of(model, batch)
        loss = sums.sum() / counts.sum()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        if step > min(UNTIMED_STEPS, job.steps - 1):
            seconds += time.perf_counter() - start
            tokens += int(counts.sum())
        if value != value:
            raise RuntimeError(f"the training loss of {job.name} is not a number in step {step}")
        emit("step", step=step, loss=value)
        if step in evaluate_at:
            emit("evaluation", step=step, loss=mean_loss(accelerator, model, validation_loader, loss_of))

    peak = peak_mib()
    model = accelerator.unwrap_model(model).eval()
    batch = next(iter(validation_loader))
    norms = weight_norms(model, batch)
    model.save_pretrained(job.folder)
    tokenizer.save_pretrained(job.folder)
    with torch.no_grad():
        probe = {"input_ids": batch["input_ids"].cpu(), "logits": model(batch["input_ids"]).logits.cpu()}
    save_file(probe, probe_file(job))
    emit(
        "trained",
        tokens_per_second=tokens / seconds,
        peak_mib=peak,
        norms=norms.mean(1).tolist(),
        device=device_name(accelerator.device),
    )


def reload(job: Job, prompt: str, new_tokens: int) -> None:
    """Loads the saved model as anybody would, compares its logits with those before saving, and writes some text."""
    model = AutoModelForCausalLM.from_pretrained(job.folder, device_map=Accelerator().device).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        # the loader leaves tensors where they lie in the file, and matrix products round differently at odd addresses
        tensor.data = tensor.data.clone()
    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    probe = load_file(probe_file(job))
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    new_tokens = min(new_tokens, job.block_size - ids["input_ids"].shape[1])
    with torch.no_grad():
        logits = model(probe["input_ids"].to(model.device)).logits.cpu()
        torch.manual_seed(job.seed)
        settings = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_k=40, pad_token_id=tokenizer.eos_token_id
        )
        text = tokenizer.decode(model.generate(**ids, generation_config=settings)[0], skip_special_tokens=True)
    emit(
        "reloaded",
        model_class=type(model).__name__,
        identical=torch.equal(logits, probe["logits"]),
        difference=(logits - probe["logits"]).abs().max().item(),
        logits=logits.numel(),
        text=text,
    )


def main(argv: list[str]) -> None:
    command, path, *rest = argv
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)
    logging.disable_progress_bar()
    if command == "train":
        train(job)
    else:
        reload(job, prompt=rest[0], new_tokens=int(rest[1]))


def write_job(job: Job, path: Path) -> Path:
    path.write_text(json.dumps(dataclasses.asdict(job), indent=2), encoding="utf-8")
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
