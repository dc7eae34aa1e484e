"""Model cards: what was changed, how it was trained, what came out, and how to load it, from what was recorded.

The template is templates/model_card.md.jinja; the metadata on top goes through huggingface_hub's ModelCardData, so
that it is what the Hub reads. Nothing is written that neither the model nor a results.json says.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .activations import get_activation
from .config import PolyAttentionConfig
from .converting.report import ConversionReport
from .hub import license_of
from .models import PolyModelMixin, auto_classes, read_settings, states
from .patching import coverage
from .remote_code import FILE, documented_auto_class, formulas, why_not
from .rendering import render
from .tables import format_states

PIPELINES = {
    "CausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "ImageClassification": "image-classification",
}
"""End of a class's name -> the Hub's name of its task."""
METRICS = {
    "validation_loss": ("loss", "validation loss (nats per token)"),
    "perplexity": ("perplexity", "validation perplexity"),
    "accuracy": ("accuracy", "accuracy"),
    "f1": ("f1", "F1"),
    "pearson": ("pearsonr", "Pearson's correlation"),
    "spearman": ("spearmanr", "Spearman's correlation"),
    "mean_squared_error": ("mse", "mean squared error"),
    "agreement": ("agreement", "share of texts with the softmax model's decision"),
    "rank_agreement": ("spearmanr", "rank agreement of embeddings with the softmax model's"),
}
"""Key of results.json -> (the Hub's name of the metric, ours)."""
_ATTENTION = {
    *("activation", "degree", "coefficients", "init_coefficients", "normalization", "alpha", "beta", "gain"),
    *("learn_gain", "learn_affine", "layers", "heads", "backend"),
    *("calibrate_batches", "calibration_fit", "calibration_target"),
}
"""Arguments that a softmax twin does not have. Not transfer_steps: they are training that the twin did not get."""
_PLACES = {
    *("output_dir", "resume", "overwrite", "report_to"),
    *("push_to_hub", "hub_model_id", "hub_private", "hub_license"),
}
"""Arguments that do not enter the results."""
_DATA_FILES = (".txt", ".md", ".py", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")


def model_card(
    model: PreTrainedModel,
    results: Mapping[str, Any] | None = None,
    twin: Mapping[str, Any] | None = None,
    *,
    name: str = "USER/MODEL",
    base_model: str | None = None,
    license: str | None = None,
    figure: str | None = None,
    norms_figure: str | None = None,
) -> ModelCard:
    """The card of a model, patched or stock.

    Args:
        model: as it is published.
        results: what a recipe wrote into results.json.
        twin: the same of a softmax run, to stand beside it.
        name: "user/name" on the Hub, for the loading code.
        base_model: what it was made from; default: what the results say, where that is a name on the Hub.
        license: the Hub's name of a licence, such as "apache-2.0"; default: that of the base model. Without either the
            card has none.
        figure: file beside the card, of losses or of a conversion's stages.
        norms_figure: file beside the card, of the attention's norms over the training.
    Returns:
        huggingface_hub's ModelCard: `str(card)` is the text, `card.save(path)` writes it.
    Raises:
        ValueError: for results that no recipe has written.
    """
    results, twin = portable(results or {}), portable(twin or {})
    arguments = results.get("arguments", {})
    base_model = base_model or base_of(results)
    dataset = _hub_dataset(arguments.get("dataset"))
    task = _pipeline_tag(model)
    scores, twin_scores = published_scores(results), published_scores(twin)
    settings = read_settings(model.config) if isinstance(model, PolyModelMixin) else None
    stock = model.stock_class if isinstance(model, PolyModelMixin) else type(model)
    evaluations = [
        EvalResult(
            task_type=task,
            dataset_type=dataset or str(arguments.get("dataset", "unknown")),
            dataset_name=str(arguments.get("dataset", "unknown")),
            dataset_split="validation",
            metric_type=METRICS[key][0],
            metric_name=METRICS[key][1],
            metric_value=round(value, 4),
        )
        for key, value in scores.items()
    ]
    data = ModelCardData(
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        license=license or license_of(base_model),
        library_name="transformers",
        pipeline_tag=task,
        tags=["polyattn", "polynomial-attention"] if settings else None,
        metrics=sorted({METRICS[key][0] for key in scores} - {"loss"}) or None,
        model_name=name.split("/")[-1],
        eval_results=evaluations or None,
    )
    config_class: Any = type(model.config)
    autos = {a.__name__: cls.__name__ for a, cls in auto_classes(getattr(config_class, "stock_class", config_class))}
    values: dict[str, Any] = {
        "name": name,
        "summary": _summary(stock.__name__, settings, base_model),
        "auto_class": documented_auto_class([stock.__name__], autos),
        "settings": settings,
        "training": _training(results),
        "rows": _rows(results, twin, scores, twin_scores),
        "twin": bool(twin),
        "differences": ", ".join(_differences(results, twin)),
        "figure": figure,
        "norms_figure": norms_figure,
        "figure_label": "Scores after each stage, and losses" if results.get("stages") else "Losses over the steps",
        **_stages(results),
    }
    if settings is not None:
        formula, divisor = formulas(settings)
        values |= {
            "has_code": not why_not(model.config, settings),
            "code_file": FILE,
            "covered": coverage(model).counts.capitalize(),
            "formula": formula,
            "divisor": divisor,
            "is_polynomial": get_activation(settings.activation).is_polynomial,
            "fields": [(k, _cell(v)) for k, v in settings.to_dict().items() if v is not None and k != "backend"],
            "state_table": format_states({k: dict(state.state_dict()) for k, state in states(model).items()}),
        }
    return ModelCard(render("model_card.md.jinja", card_data=data.to_yaml(), **values))


def read_results(path: str | Path) -> dict[str, Any]:
    """A results.json of a recipe.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: when it is something else.
    """
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(results, dict) or not {"arguments", "command", "seconds"} <= set(results):
        raise ValueError(f"{path} is no results.json of a recipe: it lacks arguments, command or seconds")
    return results


def portable(value: Any) -> Any:
    """`value` with absolute paths cut to their last part: where something lay on one machine is nobody's business."""
    if isinstance(value, Mapping):
        return {key: portable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(entry) for entry in value]
    if isinstance(value, str):
        return re.sub(
            r"(?<![\w.:/\\~-])(?:~|[A-Za-z]:)?[/\\][^\s'\"=:,]+", lambda m: PureWindowsPath(m[0]).name, value
        )
    return value


def published_scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of the best checkpoint, which is the published one; those of other steps are left out."""
    best = results.get("best")
    if best is None or not math.isfinite(best):
        return {}
    key = results.get("best_metric", "validation_loss")
    scores = {key: best}
    if key == "validation_loss":
        scores["perplexity"] = math.exp(min(best, 700))
    elif results.get(key) == best:
        # the last evaluation was the best, so the others belong to it too; but for the loss, which is per token in a
        # language model alone
        names = [name for name in METRICS if name != "validation_loss"]
        scores |= {name: results[name] for name in names if isinstance(results.get(name), float)}
    return scores


def _summary(stock: str, settings: PolyAttentionConfig | None, base_model: str | None) -> str:
    source = f", made from [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    if settings is None:
        return f"A {stock} with softmax attention{source}."
    if not get_activation(settings.activation).is_polynomial:
        return f"A {stock} with {settings.activation} attention through hf_polyattn{source}."
    return f"A {stock} whose attention is a polynomial of degree {settings.degree} instead of softmax{source}."


def _training(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not results:
        return []
    arguments = results["arguments"]
    processes = results.get("processes", 1)
    data = " ".join(str(arguments[k]) for k in ("dataset", "dataset_config") if arguments.get(k))
    shown = {
        "command": f"`{results['command']}`",
        "data": data,
        "tokens": f"{results['tokens']:,}" if "tokens" in results else "",
        "steps": f"{results['steps']:,}" if "steps" in results else "",
        "seed": str(results.get("seed", "")),
        "hardware": results.get("device", "") + (f", {processes} processes" if processes > 1 else ""),
        "seconds": f"{results['seconds']:,.0f}",
        "precision": {"no": "fp32"}.get(results.get("mixed_precision", ""), results.get("mixed_precision", "")),
        "versions": ", ".join(f"{k} {v}" for k, v in results.get("versions", {}).items()),
    }
    return [(label, _cell(value)) for label, value in shown.items() if value]


def _rows(
    results: Mapping[str, Any], twin: Mapping[str, Any], scores: dict[str, float], twin_scores: dict[str, float]
) -> list[tuple[str, str, str]]:
    rows = [
        (METRICS[key][1], f"{value:.4g}", f"{twin_scores[key]:.4g}" if key in twin_scores else "")
        for key, value in scores.items()
    ]
    for key, label in (("tokens_per_second", "training speed (tokens/s)"), ("parameters", "parameters")):
        if scores and key in results:
            rows.append((label, f"{results[key]:,.0f}", f"{twin[key]:,.0f}" if key in twin else ""))
    return rows


def _stages(results: Mapping[str, Any]) -> dict[str, str]:
    """What the template says of a conversion's stages."""
    if not results.get("stages"):
        return {"stages": ""}
    report = ConversionReport.from_dict(results["stages"])
    return {"stages": report.markdown(), "stages_better": "lower" if report.lower_is_better else "higher"}


def _differences(results: Mapping[str, Any], twin: Mapping[str, Any]) -> list[str]:
    """Arguments, other than those of the attention, in which the two runs differ."""
    if not twin:
        return []
    ours, theirs = results.get("arguments", {}), twin.get("arguments", {})
    names = sorted({*ours, *theirs} - _ATTENTION - _PLACES)
    return [f"{n} ({ours.get(n)} and {theirs.get(n)})" for n in names if ours.get(n) != theirs.get(n)]


def _pipeline_tag(model: PreTrainedModel) -> str:
    name = type(model).__name__
    return next((task for end, task in PIPELINES.items() if name.endswith(end)), "feature-extraction")


def base_of(results: Mapping[str, Any]) -> str | None:
    """What a model was made from, as its results say, where that can be a model on the Hub."""
    return _hub_name(portable(results.get("arguments", {}).get("model")))


def _hub_name(value: Any) -> str | None:
    """`value` where it can be a model on the Hub: "user/name" that is no folder here."""
    text = str(value or "")
    return text if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) and not Path(text).exists() else None


def _hub_dataset(value: Any) -> str | None:
    text = str(value or "")
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text) and text not in ("stdlib", "stdlib_lines")
    return text if is_name and not text.endswith(_DATA_FILES) and not Path(text).exists() else None


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
