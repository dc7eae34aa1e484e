"""A process that publishes to the Hub of its environment, through the command line, the API and Trainer. Prints JSON.

python hub_publisher.py FOLDER: FOLDER holds the saved models "first", with a results.json, and "second", in shards.
"""

import contextlib
import io
import json
import os
import sys
import time
import urllib.request
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_polyattn.hub import push
from hf_polyattn_cli import main

torch.set_num_threads(1)
# huggingface_hub waits between its attempts
time.sleep = lambda seconds: None


def control(**values: int) -> dict[str, int]:
    """Sets how many connections break; returns the number of commits of each repository."""
    request = urllib.request.Request(
        f"{os.environ['HF_ENDPOINT']}/control", json.dumps(values).encode(), method="POST"
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["commits"]


def run(*words: str) -> tuple[int, str]:
    """Status and output of one command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(list(words))
    return status, out.getvalue()


def failure(action) -> str:
    try:
        action()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def publish(folder: Path) -> dict:
    first, second = str(folder / "first"), str(folder / "second")
    report = {"without_card": run("push", first, "--to", "user/first")}
    results = ["--results", str(folder / "results.json"), "--twin", str(folder / "twin.json")]
    report["without_license"] = run("card", first, *results)
    report["card"] = run("card", first, *results, "--name", "user/first", "--license", "mit")
    run("card", second, "--name", "user/second", "--license", "mit")
    # what must stay at home
    (folder / "first" / "optimizer.bin").write_bytes(b"0" * 100)
    (folder / "first" / "checkpoint-5").mkdir()
    for name in ("model.safetensors", "config.json", "losses.png"):
        (folder / "first" / "checkpoint-5" / name).write_bytes(b"0" * 100)
    (folder / "first" / ".env").write_text(f"HF_TOKEN={os.environ['HF_TOKEN']}")

    control(cut_uploads=2)
    report["push"] = run("push", first, "--to", "user/first", "--json")
    report["files"] = sorted(HfApi().list_repo_files("user/first"))
    report["push_again"] = run("push", first, "--to", "user/first", "--json")
    report["commits_of_two_pushes"] = control()["user/first"]

    report["private"] = run("push", first, "--to", "user/private", "--private", "--message", "Say why")
    report["private_over_public"] = run("push", first, "--to", "user/first", "--private")

    control(cut_uploads=10**6)
    report["cut_upload"] = failure(lambda: push(second, "user/first"))
    report["commits_after_cut_upload"] = control(cut_uploads=0, cut_commits=10**6)["user/first"]
    report["cut_commit"] = failure(lambda: push(second, "user/first"))
    report["commits_after_cut_commit"] = control(cut_commits=0)["user/first"]
    push(second, "user/first")
    report["files_of_second"] = sorted(HfApi().list_repo_files("user/first"))

    report["branch"] = run("push", first, "--to", "user/second", "--revision", "cubic")
    report["pull_request"] = run("push", second, "--to", "user/second", "--create-pr")
    report["refs"] = [b.name for b in HfApi().list_repo_refs("user/second").branches]

    model = AutoModelForCausalLM.from_pretrained(first)
    model.push_to_hub("user/pushed")
    report["files_of_push_to_hub"] = sorted(HfApi().list_repo_files("user/pushed"))
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    arguments = TrainingArguments(
        str(folder / "trainer"),
        max_steps=1,
        report_to="none",
        push_to_hub=True,
        hub_model_id="user/trained",
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    report["files_of_trainer"] = sorted(HfApi().list_repo_files("user/trained"))
    del os.environ["HF_TOKEN"]
    report["without_token"] = failure(lambda: push(first, "user/first"))
    return report


print(json.dumps(publish(Path(sys.argv[1]))))
