"""The python blocks of docs/diagnostics.md run, and its table names every statistic there is."""

import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from models import patched_tiny, tiny, token_ids
from transformers import Trainer, TrainingArguments

from hf_polyattn.diagnostics import STATISTICS, read_reports
from hf_polyattn.diagnostics.statistics import BLOCK, DEAD_SLOPE, GRADIENTS
from hf_polyattn.training.diagnosing import SEQUENCES, DiagnosticsCallback

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "diagnostics.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- test: run -->\n```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """What a Trainer leaves of its data loader in accelerate's shared state would cut the batches of later tests."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("build", [tiny, patched_tiny])
def test_blocks_of_the_guide_run(build, tmp_path, capsys):
    ids = token_ids(4)
    model = build("gpt2", double=False)
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    names = {"model": model, "batch": {"input_ids": ids, "labels": ids}, "trainer": trainer}
    assert len(BLOCKS) == 2
    for text in BLOCKS:
        exec(compile(text, "guide", "exec"), names)
    assert names["report"]["frobenius"].shape == (2, 4)
    assert "effective keys" in capsys.readouterr().out
    assert sorted(read_reports(tmp_path / "diagnostics.jsonl")) == [0, 2]


def test_the_table_names_every_statistic():
    rows = [line.split("|")[1] for line in GUIDE.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) >= {*STATISTICS, *GRADIENTS}


def test_numbers_of_the_guide_are_those_of_the_code():
    assert f"`abs(n_i ∂a_ij/∂s_ij) < {DEAD_SLOPE}`" in GUIDE
    assert f"2^{BLOCK.bit_length() - 1} scores" in GUIDE
    assert f"the first {SEQUENCES} sequences" in GUIDE
    assert DiagnosticsCallback.__init__.__defaults__ == (100,)


def test_links_of_the_guide_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)[)#]", GUIDE):
        assert (ROOT / "docs" / target).exists(), target
