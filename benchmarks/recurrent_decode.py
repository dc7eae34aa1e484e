"""Time and memory of a decoding step at lengths up to 65,536: sums (RecurrentCache) against keys and values.

    python benchmarks/recurrent_decode.py

A LLaMA of 2 layers and 4 heads, degree 2, one thread. The model is really fed all tokens through the RecurrentCache,
in pieces, and at each length some single steps are timed (processor time); the ordinary cache is filled with random
keys, whose values do not matter for time. Its steps contain the copy of keys and values that DynamicCache makes to
append one. The state must not have grown, or the script stops. About 3 minutes on one CPU core without other load.
"""

import argparse
import csv
import datetime
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig

import hf_polyattn
from hf_polyattn import RecurrentCache, patch_model
from hf_polyattn.ops import cpu

LENGTHS = tuple(2**i for i in range(8, 17))
HEADS, LAYERS, VOCABULARY = 4, 2, 64


def build(head_dim: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * head_dim,
        intermediate_size=2 * HEADS * head_dim,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=2 * max(LENGTHS),
    )
    return patch_model(AutoModelForCausalLM.from_config(config).eval(), degree=2)


def steps(model: torch.nn.Module, cache: Cache, count: int) -> list[float]:
    """Milliseconds of processor time of single steps."""
    times = []
    for _ in range(count):
        token = torch.randint(VOCABULARY, (1, 1))
        start = time.process_time()
        model(token, past_key_values=cache)
        times.append(1000 * (time.process_time() - start))
    return times


def ordinary(model: torch.nn.Module, head_dim: int, length: int) -> tuple[Cache, int]:
    cache = DynamicCache(config=model.config)
    for layer in range(LAYERS):
        cache.update(torch.randn(1, HEADS, length, head_dim), torch.randn(1, HEADS, length, head_dim), layer)
    return cache, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def measure(head_dim: int, count: int, piece: int) -> list[dict]:
    model = build(head_dim)
    recurrent = RecurrentCache(model, switch_at=0)
    rows, constant = [], None
    for length in LENGTHS:
        while (missing := length - recurrent.get_seq_length()) > 0:
            model(torch.randint(VOCABULARY, (1, min(piece, missing))), past_key_values=recurrent)
        caches = {"sums": (recurrent, recurrent.nbytes), "keys and values": ordinary(model, head_dim, length)}
        constant = constant or recurrent.nbytes
        if recurrent.nbytes != constant:
            sys.exit(f"the state grew from {constant} to {recurrent.nbytes} bytes")
        times = {name: steps(model, cache, 3) and [] for name, (cache, _) in caches.items()}
        for _ in range(count):
            for name, (cache, _) in caches.items():
                times[name] += steps(model, cache, 1)
        for name, (_, size) in caches.items():
            low, median, high = statistics.quantiles(times[name], n=4)
            rows.append(
                {
                    "head_dim": head_dim,
                    "features": 1 + head_dim + head_dim * (head_dim + 1) // 2,
                    "cache": name,
                    "length": length,
                    "ms_per_token": round(median, 3),
                    "quartiles": f"{low:.3f} to {high:.3f}",
                    "cache_bytes": size,
                }
            )
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    print(f"head_dim {head_dim}: RecurrentCache switches at {RecurrentCache(model).switch_at} tokens by itself")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head_dims", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--steps", type=int, default=21, help="timed at each length")
    parser.add_argument("--piece", type=int, default=256, help="tokens fed at once between the lengths")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recurrent_decode.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu.build()
    rows = [row for head_dim in args.head_dims for row in measure(head_dim, args.steps, args.piece)]
    environment = {
        "device": f"{platform.machine()} CPU, {cpu.instruction_set()}",
        "threads": 1,
        "layers": LAYERS,
        "heads": HEADS,
        "dtype": "float32",
        "steps": args.steps,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_polyattn": hf_polyattn.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *environment])
        writer.writeheader()
        writer.writerows({**row, **environment} for row in rows)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
