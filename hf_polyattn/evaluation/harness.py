"""Tasks of lm-evaluation-harness, where it is installed: `pip install lm-eval`."""

import importlib
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from .scores import Evaluation, Score
from .text import is_causal


def harness() -> ModuleType:
    """The package lm_eval.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        return importlib.import_module("lm_eval")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise ValueError(f"lm-eval is here, but not {error.name}, which it needs: pip install lm-eval") from error
        raise ValueError("--tasks needs lm-evaluation-harness: pip install lm-eval") from error


def find_tasks(names: list[str], include_path: str | None) -> Any:
    """The harness's task manager, once it knows all of `names`; patterns such as mmlu_* count.

    Raises:
        ValueError: for a task that is nowhere.
    """
    harness()
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=include_path)
    if missing := [name for name in names if not manager.match_tasks([name])]:
        where = f"{include_path} and lm-eval" if include_path else "lm-eval"
        raise ValueError(
            f"no task {missing[0]!r} in {where}: `lm-eval ls tasks` lists its own; the YAML files of yours are found "
            "with --include_path DIR"
        )
    return manager


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    names: list[str],
    manager: Any,
    *,
    shots: int | None = None,
    batch_size: int = 4,
    limit: int | None = None,
) -> Evaluation:
    """What lm_eval.simple_evaluate says of each task, "task metric" -> its number.

    manager: from `find_tasks`. shots: worked examples before each question; what the task says by default.
    """
    if not is_causal(model):
        raise ValueError(f"a {type(model).__name__} is no causal language model, which the harness's tasks need")
    wrapped = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size
    )
    found = harness().simple_evaluate(
        wrapped, tasks=names, task_manager=manager, num_fewshot=shots, limit=limit, log_samples=False
    )
    scores = {}
    for task, numbers in found["results"].items():
        for key, value in numbers.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)) or not kind:
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            label = f"{task} {metric}" + (f" ({kind})" if kind != "none" else "")
            scores[label] = Score(float(value), error if isinstance(error, float) else None)
    samples = {task: count["effective"] for task, count in found["n-samples"].items()}
    return Evaluation(scores, {"documents": samples, "shots": found["n-shot"]})
