"""Every page of docs/ is true: its Python and its commands run, in order, and its links and figures lead somewhere.

A comment above a block changes how it is tested:

    <!-- test: skip: reason -->      it is not run, and the reason is shown
    <!-- test: with steps=2 -->      numbers are replaced first, so that it takes seconds
    <!-- test: raises ValueError --> it has to fail like that, and the text block behind it is part of the message
    <!-- test: prints -->            the text block behind it is what it prints, numbers apart; also `prints with ...`

A page that another file of tests runs (`test_..._guide.py`) is left to that one.
"""

import contextlib
import io
import itertools
import logging
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from models import scale_attention
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import hf_polyattn
from hf_polyattn import activations, architectures
from hf_polyattn.training.tokenizers import byte_tokenizer
from hf_polyattn_cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
HUB_MODEL = "openai-community/gpt2"


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """A page may change what the package's loggers let through; the tests behind it must not see that."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("hf_polyattn")]
    before = [(logger, logger.level, list(logger.filters)) for logger in loggers]
    yield
    for logger, level, filters in before:
        logger.setLevel(level)
        logger.filters[:] = filters


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(r"(?:<!-- test: ([^>]*) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
    found = pattern.finditer(text)
    return [Block(page.name, text.count("\n", 0, m.start()) + 1, m[2], m[1] or "", m[3]) for m in found]


def runs_elsewhere(page: Path) -> bool:
    """Whether another file of tests reads this page and runs what it finds."""
    texts = (p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*_guide.py"))
    return any(f'"{page.name}"' in text and "exec(" in text for text in texts)


OURS = [page for page in PAGES if not runs_elsewhere(page)]
SKIPPED = [block for page in OURS for block in blocks(page) if block.note.startswith("skip")]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the recipes, a small GPT-2 under its name on the Hub, and a text; registries as imported."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    tokenizer = byte_tokenizer()
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=len(tokenizer), eos_token_id=256, bos_token_id=256
    )
    model = AutoModelForCausalLM.from_config(config)
    scale_attention(model)
    model.save_pretrained(tmp_path / HUB_MODEL)
    tokenizer.save_pretrained(tmp_path / HUB_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(activations, "_REGISTRY", dict(activations._REGISTRY))
    stock = {
        name: entry for name, entry in architectures._REGISTRY.items() if name in ("gpt2", "llama", "bert", "vit")
    }
    monkeypatch.setattr(architectures, "_REGISTRY", stock)
    return tmp_path


def names_of(page: Path) -> dict[str, object]:
    """What the reader of a page is told to have: batches of inputs, where it says `batches`."""
    tokenizer = AutoTokenizer.from_pretrained(HUB_MODEL)
    batches = [dict(tokenizer([f"any text that the model will see, {i}"] * 2, return_tensors="pt")) for i in range(2)]
    for batch in batches:
        batch.pop("token_type_ids", None)
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    return {"batches": batches, "labelled_batches": labelled} if "`batches`" in page.read_text() else {}


def changed(block: Block) -> str:
    """Text of a block with the numbers that its note gives."""
    text = block.text
    for name, number in re.findall(r"(\w+)=(\d+)", "" if block.note.startswith("skip") else block.note):
        text, count = re.subn(rf"\b({name} ?= ?)[\d_]+", rf"\g<1>{number}", text)
        assert count, f"{block}: there is no {name} to replace"
    return text


def skeleton(text: str) -> list[str]:
    """Lines with their numbers and widths taken out."""
    lines = (re.sub(r"\s+", " ", re.sub(r"-?[\d.,]*\d", "#", line)).strip() for line in text.splitlines())
    return [line for line in lines if line]


def run_command(line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        subprocess.run([program, *words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    else:
        assert program == "hf-polyattn", line
        assert main(words) == 0, line


def run(block: Block, names: dict[str, object]) -> None:
    if block.language == "python":
        exec(compile("\n" * block.line + changed(block), block.page, "exec"), names)
    else:
        for line in changed(block).replace("\\\n", " ").splitlines():
            if line and not line.startswith("#"):
                run_command(line)


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.name)
def test_a_page_runs_from_top_to_bottom(page, workplace):
    names = names_of(page)
    found = blocks(page)
    for block, following in itertools.pairwise([*found, None]):
        if block.language == "text" or block.note.startswith("skip"):
            continue
        print(f"--- {block}")
        shown = io.StringIO()
        if block.note.startswith("raises "):
            with pytest.raises(Exception) as error:
                run(block, names)
            assert type(error.value).__name__ == block.note.split()[1]
            said, expected = (" ".join(x.split()) for x in (str(error.value), following.text))
            assert expected in f"{type(error.value).__name__}: {said}", block
        elif block.note.startswith("prints"):
            with contextlib.redirect_stdout(shown):
                run(block, names)
            assert skeleton(shown.getvalue()) == skeleton(following.text), block
        else:
            run(block, names)


@pytest.mark.parametrize("block", SKIPPED, ids=str)
def test_blocks_that_are_not_run(block):
    pytest.skip(block.note.removeprefix("skip: "))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_of_a_kind_that_is_tested(page):
    for block in blocks(page):
        assert block.language in ("python", "bash", "text"), block
        assert re.match(r"(skip: .+|(prints )?with( \w+=\d+)+|raises \w+|prints|run)?$", block.note), block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_figures_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else page.parent / name
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            known = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in known, f"{page.name} links to {target}"


def test_numbers_of_the_kernels_page_are_those_of_the_benchmark():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    measured = (ROOT / "benchmarks" / "results" / "attention.md").read_text(encoding="utf-8").splitlines()
    head = measured[0]
    assert head in page
    rows = page[page.index(head) :].split("\n\n")[0].splitlines()
    assert len(rows) > 6
    assert set(rows) <= set(measured)


def test_the_figure_is_what_its_script_draws(tmp_path):
    from matplotlib.testing.compare import compare_images

    drawn, folder = tmp_path / "seam.png", ROOT / "docs" / "figures"
    subprocess.run([sys.executable, str(folder / "seam.py"), str(drawn)], check=True, capture_output=True)
    kept = tmp_path / "kept.png"  # the comparison writes files beside it
    shutil.copy(folder / "seam.png", kept)
    # another version of matplotlib sets letters a little differently
    assert compare_images(str(kept), str(drawn), tol=5) is None


def test_pages_name_what_there_is():
    """Each `hf_polyattn` name that a page imports or calls exists, also in the blocks that are skipped."""
    for page in PAGES:
        for names in re.findall(r"^from hf_polyattn import ([\w, ]+)$", page.read_text(encoding="utf-8"), re.M):
            assert all(hasattr(hf_polyattn, name.strip()) for name in names.split(",")), page.name
