"""`hf-polyattn card`: the model card of a checkpoint, with what belongs beside it."""

import json
from argparse import Namespace
from pathlib import Path

from ..figures import copy_beside, draw_losses
from ..hub import CARD, license_of
from ..model_card import base_of, model_card, portable, read_results
from ..training.diagnosing import FIGURE
from .loading import load_checkpoint


def run(args: Namespace) -> str:
    """Writes the card of args.path; results and figure go beside it, where `push` finds them."""
    folder = Path(args.path)
    out = Path(args.out) if args.out else folder / CARD
    results, twin = (read_results(path) if path else None for path in (args.results, args.twin))
    base_model = args.base_model or base_of(results or {})
    license = args.license or license_of(base_model)
    if license is None:
        raise ValueError("the licence cannot be told from the base model: name it, such as --license apache-2.0")
    model = load_checkpoint(args.path)
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = {"this model": args.results, "softmax twin": args.twin}
    logs = {label: Path(path).with_name("metrics.jsonl") for label, path in runs.items() if path}
    figure = _figure(args.figure, {label: log for label, log in logs.items() if log.exists()}, out.parent)
    drawn = Path(args.results).with_name(FIGURE) if args.results else None
    norms = copy_beside(drawn, out.parent) if drawn and drawn.exists() else None
    text = model_card(
        model,
        results,
        twin,
        name=args.name or folder.resolve().name,
        base_model=base_model,
        license=license,
        figure=figure,
        norms_figure=norms,
    )
    text.save(out)
    written = {
        "card": str(out),
        "figure": str(out.parent / figure) if figure else None,
        "norms": str(out.parent / norms) if norms else None,
    }
    for key, content, name in (("results", results, "results.json"), ("twin", twin, "results_softmax.json")):
        written[key] = str(out.parent / name) if content else None
        if content:
            (out.parent / name).write_text(json.dumps(portable(content), indent=2), encoding="utf-8")
    return json.dumps(written, indent=2) if args.json else f"card: {out}"


def _figure(given: str | None, logs: dict[str, Path], folder: Path) -> str | None:
    """Name of the image in `folder`: a copy of the given one, or the losses of `logs`; None without either."""
    if given:
        return copy_beside(Path(given), folder)
    return draw_losses(logs, folder / "losses.png").name if logs else None
