"""What a recipe could have written into results.json, for tests of model cards."""

RESULTS = {
    "validation_loss": 1.91,
    "best": 1.9,
    "recipe": "pretrain_causal_lm",
    "steps": 2000,
    "seed": 7,
    "parameters": 800000,
    "tokens": 1024000,
    "seconds": 321.4,
    "tokens_per_second": 3186.1,
    "processes": 1,
    "mixed_precision": "no",
    "device": "cpu (x86_64, 1 threads)",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "command": "recipes/pretrain_causal_lm.py /a/secret/place/config.yaml --seed 7",
    "arguments": {"dataset": "karpathy/tiny", "model": "someone/base", "learning_rate": 0.001, "activation": "poly"},
}
TWIN = {
    **RESULTS,
    "best": 1.8,
    "tokens_per_second": 4000.0,
    "arguments": {**RESULTS["arguments"], "activation": "softmax", "learning_rate": 0.002},
}
