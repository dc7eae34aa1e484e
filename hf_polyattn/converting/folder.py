"""The folder of a conversion: models after each stage, written aside and renamed, and at the end the last of them.

OUT/conversion.yaml               what was asked for: another command does not go on from this one
OUT/stages/01-calibrate/          model and stage.json, whole or absent
OUT/stages/02-transfer.safetensors  the steps of a stage under way
OUT/                              at the end the model, its tokenizer, results.json, conversion.md and conversion.png
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS, STAGES, STAGE, RESULTS = "conversion.yaml", "stages", "stage.json", "results.json"
PARTIAL = ".partial"


class ConversionFolder:
    """The folder `out` of a conversion with these settings, a new one or one that was stopped; `open` writes first.

    Raises:
        FileExistsError: when something else lies there, a finished conversion included.
        ValueError: when a conversion with other settings was stopped there; names the differences.
    """

    def __init__(self, out: str | Path, settings: str) -> None:
        self.out, self.settings = Path(out), settings
        self.stages = self.out / STAGES
        mine = self.out / SETTINGS
        if (self.out / RESULTS).exists() and mine.exists():
            raise FileExistsError(f"{self.out} holds a finished conversion: give another folder, or remove it")
        if mine.exists():
            old, new = yaml.safe_load(mine.read_text(encoding="utf-8")), yaml.safe_load(settings)
            changed = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in new if old.get(k) != new.get(k)]
            if changed:
                raise ValueError(
                    f"{self.out} holds a conversion that was stopped, with other settings ({', '.join(changed)}): "
                    "repeat its command to go on, or give another folder"
                )
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise FileExistsError(f"{self.out} is not empty: give a new folder")
        self.is_resumed = mine.exists()

    def open(self) -> None:
        """Call it once the job is known to make sense: a mistake must leave nothing that refuses its correction."""
        self.stages.mkdir(parents=True, exist_ok=True)
        for rest in self.stages.glob(f"*{PARTIAL}"):
            # the steps of a stage are a file, its model a folder
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        if not self.is_resumed:
            _write(self.out / SETTINGS, self.settings)

    def read(self, name: str) -> dict[str, Any] | None:
        """What was noted of a stage; None when it is not finished."""
        file = self.stages / name / STAGE
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def save(self, name: str, model: PreTrainedModel | None, note: dict[str, Any]) -> None:
        """The model after a stage and what is to be noted of it, in one rename; the stage's steps are done with."""
        final, aside = self.stages / name, self.stages / (name + PARTIAL)
        aside.mkdir()
        if model is not None:
            model.save_pretrained(aside)
        (aside / STAGE).write_text(json.dumps(note), encoding="utf-8")
        os.rename(aside, final)
        self.steps(name).unlink(missing_ok=True)

    def steps(self, name: str) -> Path:
        """Where a stage keeps its steps."""
        return self.stages / f"{name}.safetensors"

    def finish(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, results: dict[str, Any], *, keep: bool
    ) -> None:
        """The model in `out` itself; results.json, written last, says that all is there."""
        model.save_pretrained(self.out)
        tokenizer.save_pretrained(self.out)
        _write(self.out / RESULTS, json.dumps(results, indent=2))
        if not keep:
            shutil.rmtree(self.stages)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + PARTIAL)
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
