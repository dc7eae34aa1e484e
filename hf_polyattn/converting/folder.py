"""The folder of a conversion: models after each stage, written aside and renamed, and at the end the last of them.

OUT/conversion.yaml               what was asked for: a finished stage is not mixed with other settings
OUT/stages/01-calibrate/          stage.json, and the model where it is still needed; whole or absent
OUT/stages/02-transfer.safetensors  the steps of a stage under way
OUT/                              at the end the model, its tokenizer, results.json, conversion.md and conversion.png
"""

import json
import os
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS, STAGES, STAGE, RESULTS = "conversion.yaml", "stages", "stage.json", "results.json"
PARTIAL, STEPS = ".partial", ".safetensors"
BEFORE = "00-"
"""Begins the names of what is noted of the models that the stages start from."""


class ConversionFolder:
    """The folder `out` of a conversion with these settings, a new one or one that was stopped.

    `check` compares its stages, `open` writes first.

    common: what decides the result of every stage.
    Raises:
        FileExistsError: when something else lies there, a finished conversion included.
        ValueError: when a conversion with other common settings was stopped there; names the differences.
    """

    def __init__(self, out: str | Path, common: dict[str, Any]) -> None:
        self.out = Path(out)
        self.stages = self.out / STAGES
        self._new = {"common": _plain(common), "stages": []}
        self._old: dict[str, Any] = {"common": {}, "stages": []}
        self._stale: dict[str, list[str]] = {}
        mine = self.out / SETTINGS
        self.is_resumed = mine.exists()
        if self.is_resumed:
            if (self.out / RESULTS).exists():
                raise FileExistsError(f"{self.out} holds a finished conversion: give another folder, or remove it")
            self._old |= yaml.safe_load(mine.read_text(encoding="utf-8"))
            if self.finished():
                self._refuse(_differences(self._old["common"], self._new["common"]))
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise FileExistsError(f"{self.out} is not empty: give a new folder")

    def finished(self) -> list[str]:
        """Names of what is noted, in order."""
        return sorted(p.parent.name for p in self.stages.glob(f"*/{STAGE}") if p.parent.suffix != PARTIAL)

    def check(self, stages: list[dict[str, Any]]) -> None:
        """Compares what decides each stage, an entry with its "name", with what it was when the conversion stopped.

        Stages that are not finished may change: their steps are dropped when the folder is opened.
        Raises ValueError for a finished stage that has changed; names the differences.
        """
        self._new["stages"] = _plain(stages)
        old, new = ({entry["name"]: entry for entry in side["stages"]} for side in (self._old, self._new))
        done = [name for name in self.finished() if not name.startswith(BEFORE)]
        changed = [_differences(old.get(name, {}), new.get(name, {}), f"{name}.") for name in done]
        self._refuse([line for lines in changed for line in lines])
        under_way = [path.name.removesuffix(STEPS) for path in self.stages.glob(f"*{STEPS}")]
        changes = {name: _differences(old.get(name, {}), new.get(name, {})) for name in under_way}
        self._stale = {name: found for name, found in changes.items() if found}

    def _refuse(self, changed: list[str]) -> None:
        if changed:
            raise ValueError(
                f"{self.out} holds a conversion that was stopped, with other settings ({', '.join(changed)}): "
                "repeat its command to go on, or give another folder"
            )

    def open(self) -> None:
        """Call it once the job is known to make sense: a mistake must leave nothing that refuses its correction."""
        self.stages.mkdir(parents=True, exist_ok=True)
        for rest in self.stages.glob(f"*{PARTIAL}"):
            # the steps of a stage are a file, its model a folder
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        for name, changed in self._stale.items():
            say(f"{name} starts anew, the steps that it had done are dropped: other settings ({', '.join(changed)})")
            self.steps(name).unlink()
        _write(self.out / SETTINGS, yaml.safe_dump(self._new, sort_keys=True, allow_unicode=True))

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

    def drop_models(self, keep: Collection[str]) -> None:
        """Removes the models after all finished stages but those of `keep`; what was noted of them stays."""
        for name in set(self.finished()) - set(keep):
            for path in (self.stages / name).iterdir():
                if path.name != STAGE:
                    path.unlink()

    def steps(self, name: str) -> Path:
        """Where a stage keeps its steps."""
        return self.stages / f"{name}{STEPS}"

    def finish(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, results: dict[str, Any], *, keep: bool
    ) -> None:
        """The model in `out` itself; results.json, written last, says that all is there."""
        model.save_pretrained(self.out)
        tokenizer.save_pretrained(self.out)
        _write(self.out / RESULTS, json.dumps(results, indent=2))
        if not keep:
            shutil.rmtree(self.stages)


def say(line: str) -> None:
    """On standard error, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


def _plain(value: Any) -> Any:
    """As it comes back from the file: lists in place of tuples."""
    return json.loads(json.dumps(value))


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    names = [name for name in {**old, **new} if name != "name"]
    return [f"{prefix}{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in names if old.get(n) != new.get(n)]


def _write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + PARTIAL)
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
