"""A conversion as one job: what its stages leave, how it goes on after a stop, and what it refuses."""

import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from models import HEADS, LAYERS, scale_attention
from recipe_runs import die, in_fork, recipe, run_recipe, write_text
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from hf_polyattn import coverage, patch_model
from hf_polyattn.converting.plan import plan_stages
from hf_polyattn.converting.sources import load_teacher
from hf_polyattn.converting.tasks import TokenLoss
from hf_polyattn.models import PolyModelMixin, states
from hf_polyattn.steps import DivergedError
from hf_polyattn.training.tokenizers import SPECIAL_TOKENS, byte_tokenizer
from hf_polyattn_stages import ConversionArguments

SIZE = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
CONFIGS = {
    "gpt2": lambda **more: GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=32, n_positions=32, resid_pdrop=0.1, eos_token_id=None, **more
    ),
    "llama": lambda **more: LlamaConfig(**SIZE, num_key_value_heads=2, max_position_embeddings=32, **more),
    "bert": lambda **more: BertConfig(**SIZE, max_position_embeddings=32, **more),
}
FAST = (
    *("--block_size", "16", "--batch_size", "4", "--validation_batches", "2", "--save_steps", "2"),
    *("--calibrate.batches", "2"),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"), 4_000)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """(family, Auto class) -> folder of a softmax checkpoint with its tokenizer."""
    made: dict[tuple, Path] = {}

    def folder(family="gpt2", auto=AutoModelForCausalLM) -> Path:
        if (family, auto) not in made:
            torch.manual_seed(3)
            tokenizer = byte_tokenizer(SPECIAL_TOKENS)
            model = auto.from_config(CONFIGS[family](vocab_size=len(tokenizer)))
            path = tmp_path_factory.mktemp(f"{family}-{auto.__name__}")
            scale_attention(model, 8.0).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[family, auto] = path
        return made[family, auto]

    return folder


def run(source, text, out, *extra):
    words = [*FAST, *map(str, extra)]
    if "--stages" not in words or "transfer" in words:
        words = ["--transfer.steps", "4", *words]
    return recipe("convert").main(["--model", str(source), "--dataset", str(text), "--output_dir", str(out), *words])


def logits_of(path, auto=AutoModelForCausalLM):
    model = auto.from_pretrained(path).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(40, 56)[None]).logits


STAGES = (
    *("--stages", "calibrate", "transfer", "distill", "finetune"),
    *("--distill.steps", 4, "--finetune.steps", 4),
)


def test_every_stage_leaves_its_score_and_the_last_its_model(teachers, text, tmp_path):
    out = tmp_path / "out"
    report = run(teachers(), text, out, *STAGES, "--twin")
    names = ["softmax", "patched", "calibrate", "transfer", "distill", "finetune"]
    assert [row.stage for row in report.rows] == names
    assert [row.steps for row in report.rows] == [0, 0, 0, 4, 4, 4]
    assert report.tokens == 12 * 4 * 16 == report.tuned.tokens
    assert report.metric == "loss"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, PolyModelMixin)
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"][1:4] == [97, 98, 99]
    # what is saved is what was judged
    results = json.loads((out / "results.json").read_text())
    assert results["validation_loss"] == report.rows[-1].score
    assert results["tokens"] == report.tokens
    assert f"{report.rows[3].score:.4f}" in (out / "conversion.md").read_text()
    assert (out / "conversion.png").stat().st_size > 10_000
    assert not (out / "stages").exists()
    lines = str(report).splitlines()
    assert lines[1].startswith("teacher, untouched ")
    assert lines[2].startswith("softmax, fine-tuned on as many tokens ")


def test_the_untouched_teacher_is_what_the_report_begins_with(teachers, text, tmp_path):
    first = run(teachers(), text, tmp_path / "a", "--stages", "calibrate").rows[0].score
    model = load_teacher(str(teachers()))
    ids = torch.tensor(list(text.read_bytes()[-400:]))  # the held-out tenth
    with torch.no_grad():
        blocks = ids[:384].view(-1, 16)[:8]
        expected = model(input_ids=blocks, labels=blocks).loss.item()
    assert first == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("family", "auto", "metric", "stages"),
    [
        ("llama", AutoModelForCausalLM, "loss", ("calibrate", "transfer", "distill")),
        ("bert", AutoModelForMaskedLM, "loss", ("calibrate", "transfer", "distill")),
        ("bert", AutoModel, "rank_agreement", ("calibrate", "transfer")),
        ("bert", AutoModelForSequenceClassification, "agreement", ("calibrate", "transfer", "distill")),
    ],
)
def test_the_model_decides_how_it_is_judged(family, auto, metric, stages, teachers, text, tmp_path):
    extra = ("--distill.steps", 2) if "distill" in stages else ()
    report = run(teachers(family, auto), text, tmp_path / "out", *extra)
    assert report.metric == metric
    assert [row.stage for row in report.rows] == ["softmax", "patched", *stages]
    if not report.lower_is_better:
        assert report.rows[0].score == pytest.approx(1)
    assert isinstance(auto.from_pretrained(tmp_path / "out"), PolyModelMixin)


def test_transfer_brings_an_encoder_nearer_to_its_teacher(teachers, text, tmp_path):
    report = run(teachers("bert", AutoModel), text, tmp_path / "out", "--transfer.steps", 30)
    patched, calibrated, transferred = (row.score for row in report.rows[1:])
    assert patched < calibrated < transferred


def killed(teachers, text, out, monkeypatch, stage, stages=STAGES):
    """Runs a conversion that is killed within a stage: after 3 of its 4 steps, or between stages."""
    from hf_polyattn import steps

    original = steps.Steps.take

    def take(self, loss):
        original(self, loss)
        if self.name == stage and self.done == 3:
            die()

    monkeypatch.setattr(steps.Steps, "take", take)
    # made here: in the fork it would be another folder than that of the runs that follow
    source = teachers()
    code = in_fork(lambda: run(source, text, out, *stages))
    monkeypatch.setattr(steps.Steps, "take", original)
    assert code == -9


@pytest.mark.parametrize("stage", ["attention transfer", "distillation", "fine-tuning"])
def test_a_killed_conversion_goes_on_to_the_same_end(stage, teachers, text, tmp_path, monkeypatch, capsys):
    straight = run(teachers(), text, tmp_path / "straight", *STAGES)
    killed(teachers, text, tmp_path / "out", monkeypatch, stage)
    assert not (tmp_path / "out" / "results.json").exists()
    # the model to go on from, and of those before it only what was noted
    models = [path.parent.name for path in (tmp_path / "out" / "stages").glob("*/model.safetensors")]
    assert models == [{"attention": "01-calibrate", "distillation": "02-transfer"}.get(stage.split()[0], "03-distill")]
    again = run(teachers(), text, tmp_path / "out", *STAGES)
    assert "going on in" in capsys.readouterr().err
    assert [row.score for row in again.rows] == [row.score for row in straight.rows]
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "straight"))


def test_a_stopped_conversion_is_not_mixed_with_another(teachers, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed(teachers, text, out, monkeypatch, "distillation")
    with pytest.raises(ValueError, match=r"other settings \(degree: None -> 2\)"):
        run(teachers(), text, out, *STAGES, "--degree", 2)
    run(teachers(), text, out, *STAGES)
    with pytest.raises(FileExistsError, match="finished conversion"):
        run(teachers(), text, out, *STAGES)


def test_heads_are_converted_share_by_share(teachers, text, tmp_path):
    out = tmp_path / "out"
    shares = ("--shares", 0.25, 0.5, 1, "--keep_stages", "--distill.steps", 3, "--transfer.steps", 6)
    report = run(teachers(), text, out, *shares)
    labels = [row.stage for row in report.rows[2:]]
    parts = [f"{kind} {share}%" for share in (25, 50, 100) for kind in ("transfer", "distill")]
    assert labels == ["calibrate", *parts]
    assert [row.steps for row in report.rows[3:]] == [2, 1, 2, 1, 2, 1]
    total = LAYERS * HEADS
    before: dict = {}
    for folder, count in (("02-transfer-25", total // 4), ("04-transfer-50", total // 2), ("06-transfer-100", total)):
        model = AutoModelForCausalLM.from_pretrained(out / "stages" / folder)
        assert sum(coverage(model).patched.values()) == count
        heads = {(name, head) for name, state in states(model).items() for head in state.heads}
        assert set(before) <= heads
        before = dict.fromkeys(heads)


def test_labels_tell_stages_and_shares_apart():
    options = {"model": "m", "output_dir": "o"}
    stages = ["calibrate", "finetune", "transfer", "finetune"]
    plan = plan_stages(ConversionArguments(**options, stages=stages), has_logits=True)
    assert [stage.label for stage in plan] == ["calibrate", "finetune", "transfer", "finetune #2"]
    shares = [0.125, 1 / 3, 0.33334, 1.0]
    plan = plan_stages(ConversionArguments(**options, shares=shares, stages=["calibrate", "transfer"]), True)
    labels = [f"transfer {share}" for share in ("12.5%", "33.333%", "33.334%", "100%")]
    assert [stage.label for stage in plan] == ["calibrate", *labels]
    assert plan[2].name == "03-transfer-33.333"


def test_heads_of_shares_that_are_nearly_equal_are_those_of_each(teachers, text, tmp_path):
    """The shares differ in the seventh digit and lie on both sides of the third of eight heads and a half."""
    shares, out = (0.4374999, 0.4375001), tmp_path / "out"
    run(teachers(), text, out, "--shares", *shares, "--stages", "calibrate", "transfer", "--keep_stages")
    counts = [
        sum(coverage(AutoModelForCausalLM.from_pretrained(path)).patched.values())
        for path in sorted((out / "stages").glob("*-transfer-*"))
    ]
    assert counts == [3, 4]


def test_heads_keep_what_they_learned_when_others_follow(teachers, text, tmp_path):
    """With rates of 0 for everything else, a head's coefficients after the second share are those of the first."""
    out = tmp_path / "out"
    frozen = ("--stages", "calibrate", "transfer", "--transfer.polyattn_learning_rate", 1e-12, "--keep_stages")
    run(teachers(), text, out, "--shares", 0.5, 1, *frozen, "--transfer.learning_rate", 1e-9)
    fitted, half, whole = (
        states(AutoModelForCausalLM.from_pretrained(out / "stages" / name))
        for name in ("01-calibrate", "02-transfer-50", "03-transfer-100")
    )
    for name, state in whole.items():
        torch.testing.assert_close(state.coefficients, fitted[name].coefficients)
        if name in half:
            mine = [state.heads.index(head) for head in half[name].heads]
            torch.testing.assert_close(state.coefficients[mine], half[name].coefficients)


def test_the_hardest_heads_can_stay_softmax(teachers, text, tmp_path):
    run(teachers(), text, tmp_path / "out", "--shares", 0.5, "--stages", "calibrate", "transfer")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(coverage(model).patched.values()) == LAYERS * HEADS // 2


def test_adapters_are_merged_at_the_end(teachers, text, tmp_path):
    out = tmp_path / "out"
    lora = ("--stages", "calibrate", "finetune", "--finetune.lora_r", 2, "--finetune.steps", 4, "--keep_stages")
    report = run(teachers(), text, out, *lora)
    before = AutoModelForCausalLM.from_pretrained(out / "stages" / "01-calibrate").state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert set(before) == set(after)
    changed = {name.split(".", 3)[-1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"attn.c_attn.weight", "attn.c_proj.weight", "attn.polyattn.coefficients"}
    assert report.rows[-1].steps == 4


def test_what_least_squares_cannot_fit_is_fitted_in_size(teachers, text, tmp_path):
    with pytest.raises(ValueError, match=r"--calibrate\.fit gain"):
        run(teachers(), text, tmp_path / "out", "--normalization", "l1")
    report = run(teachers(), text, tmp_path / "out", "--normalization", "l1", "--calibrate.fit", "gain", *STAGES)
    assert len(report.rows) == 6
    state = next(iter(states(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).values()))
    assert not torch.equal(state.alpha, torch.ones_like(state.alpha))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--transfer_steps", 5), r"use --transfer\.steps"),
        (("--calibration_fit", "coefficients"), r"use --calibrate\.fit"),
        (("--activation", "softmax"), "no conversion"),
        (("--block_size", 64), "32 positions"),
        (("--layers", 99), "99"),
        (("--shares", 0.01), "leaves none of 8 heads"),
        (("--tokenizer", "./gone"), "holds no tokenizer|gone"),
        (("--stages", "transfer", "calibrate"), "calibrate comes first"),
        (("--shares", 0.5, 0.25), "shares must rise"),
        (("--shares", 0.5, 1, "--calibrate.fit", "gain"), "shares go by"),
        (("--transfer.stepz", 5), "did you mean 'steps'"),
        (("--transfer.steps", 0), "steps must be >= 1"),
        (("--stages", "gone.yaml"), r"no such file for a stage: gone\.yaml"),
        (("--finetune.steps", 3), "finetune has settings and is not among"),
        (("--streaming", "true"), "reads its text whole|standard library|streaming"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(extra, message, teachers, text, tmp_path):
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        run(teachers(), text, out, *extra)
    if not isinstance(caught.value, SystemExit):
        assert caught.match(message)
    # so that the corrected command finds nothing in its way
    assert not out.exists()


def test_models_that_cannot_be_converted_are_refused(teachers, text, tmp_path):
    polynomial = tmp_path / "polynomial"
    patch_model(load_teacher(str(teachers()))).save_pretrained(polynomial)
    with pytest.raises(ValueError, match="polynomial already"):
        run(polynomial, text, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run("./gone", text, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no such file: gone\.gguf"):
        run("gone.gguf", text, tmp_path / "out")
    encoder = teachers("bert", AutoModel)
    with pytest.raises(ValueError, match="has no logits to train on"):
        run(encoder, text, tmp_path / "a", "--stages", "calibrate", "transfer", "distill")
    classifier = teachers("bert", AutoModelForSequenceClassification)
    with pytest.raises(ValueError, match=r"distill\.cross_entropy 0"):
        run(classifier, text, tmp_path / "b", "--stages", "calibrate", "finetune")
    for head in (AutoModelForQuestionAnswering, AutoModelForSequenceClassification):
        options = {"num_labels": 1} if head is AutoModelForSequenceClassification else {}
        tokenizer = byte_tokenizer(SPECIAL_TOKENS)
        head.from_config(CONFIGS["bert"](vocab_size=len(tokenizer), **options)).save_pretrained(tmp_path / "head")
        tokenizer.save_pretrained(tmp_path / "head")
        with pytest.raises(ValueError, match="knows language models, classifiers of two classes"):
            run(tmp_path / "head", text, tmp_path / "c")


def test_after_adapters_a_stage_trains_all_weights_also_after_a_stop(teachers, text, tmp_path, monkeypatch):
    stages = ("--stages", "calibrate", "distill", "finetune", "--distill.lora_r", 2)
    steps = ("--distill.steps", 4, "--finetune.steps", 4)
    run(teachers(), text, tmp_path / "straight", *stages, *steps, "--keep_stages")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "stages" / "02-distill")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "straight")
    assert not torch.equal(before.transformer.wte.weight, after.transformer.wte.weight)
    killed(teachers, text, tmp_path / "out", monkeypatch, "fine-tuning", stages=(*stages, *steps))
    run(teachers(), text, tmp_path / "out", *stages, *steps)
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "straight"))


def test_a_stage_that_is_not_finished_may_change_and_starts_anew(teachers, text, tmp_path, monkeypatch, capsys):
    """Also where the file of the stage is what changed, in a setting that the shape of its steps does not show."""
    (tmp_path / "tune.yaml").write_text("stage: finetune\nsteps: 4\nmax_grad_norm: 1\n")
    stages = ("--stages", "calibrate", tmp_path / "tune.yaml")
    killed(teachers, text, tmp_path / "out", monkeypatch, "fine-tuning", stages=stages)
    assert (tmp_path / "out" / "stages" / "02-finetune.safetensors").exists()
    (tmp_path / "tune.yaml").write_text("stage: finetune\nsteps: 4\nmax_grad_norm: 0.1\n")
    run(teachers(), text, tmp_path / "out", *stages)
    said = (
        "02-finetune starts anew, the steps that it had done are dropped: other settings (max_grad_norm: 1.0 -> 0.1)"
    )
    assert said in capsys.readouterr().err
    run(teachers(), text, tmp_path / "straight", *stages)
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "straight"))


def test_a_stage_that_failed_is_repeated_with_other_rates(teachers, text, tmp_path):
    stages = ("--stages", "calibrate", "finetune", "--finetune.steps", 4, "--finetune.warmup_steps", 0)
    with pytest.raises(DivergedError, match="not finite"):
        run(teachers(), text, tmp_path / "out", *stages, "--finetune.learning_rate", 1e30)
    report = run(teachers(), text, tmp_path / "out", *stages, "--finetune.learning_rate", 1e-3)
    assert [row.steps for row in report.rows] == [0, 0, 0, 4]


def test_a_stage_that_is_finished_may_not_change(teachers, text, tmp_path, monkeypatch):
    (tmp_path / "transfer.yaml").write_text("stage: transfer\nsteps: 4\nlearning_rate: 1e-3\n")
    stages = ("--stages", "calibrate", tmp_path / "transfer.yaml", "finetune", "--finetune.steps", 4)
    killed(teachers, text, tmp_path / "out", monkeypatch, "fine-tuning", stages=stages)
    with pytest.raises(ValueError, match=r"01-calibrate\.batches: 2 -> 3.*give another folder"):
        run(teachers(), text, tmp_path / "out", *stages, "--calibrate.batches", 3)
    with pytest.raises(ValueError, match=r"01-calibrate\.shares: \[1\.0\] -> \[0\.5, 1\.0\]"):
        run(teachers(), text, tmp_path / "out", *stages, "--shares", 0.5, 1)
    (tmp_path / "transfer.yaml").write_text("stage: transfer\nsteps: 4\nlearning_rate: 2e-3\n")
    with pytest.raises(ValueError, match=r"other settings \(02-transfer\.learning_rate: 0\.001 -> 0\.002\)"):
        run(teachers(), text, tmp_path / "out", *stages)


def test_the_twin_sees_as_many_tokens_whatever_the_patience(teachers, text, tmp_path, monkeypatch):
    """Also where the student's score falls in each look and the twin's in none, so that patience would end it."""
    looks = itertools.count()

    def score(self, model):
        return next(looks) * (-1.0 if isinstance(model, PolyModelMixin) else 1.0)

    monkeypatch.setattr(TokenLoss, "score", score)
    tune = ("--finetune.steps", 6, "--finetune.eval_steps", 1, "--finetune.patience", 1)
    report = run(teachers(), text, tmp_path / "a", "--stages", "calibrate", "finetune", *tune, "--twin")
    assert report.steps == report.tuned.steps == 6
    assert report.tuned.tokens == report.tokens
    with pytest.raises(ValueError, match="no stage trains on any"):
        run(teachers(), text, tmp_path / "b", "--stages", "calibrate", "--twin")


def test_a_wrong_tokenizer_and_a_broken_teacher_are_told(teachers, text, tmp_path):
    small = tmp_path / "small"
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"](vocab_size=100))
    model.save_pretrained(small)
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, the model 100"):
        run(small, text, tmp_path / "out", "--tokenizer", "bytes")
    broken = tmp_path / "broken"
    model = load_teacher(str(teachers()))
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[0, 0] = float("nan")
    model.save_pretrained(broken)
    byte_tokenizer(SPECIAL_TOKENS).save_pretrained(broken)
    with pytest.raises(ValueError, match="finite"):
        run(broken, text, tmp_path / "out2")


def test_too_little_text_is_told(teachers, tmp_path):
    (tmp_path / "short.txt").write_text("a few words only")
    with pytest.raises(ValueError, match="shorter than one block"):
        run(teachers(), tmp_path / "short.txt", tmp_path / "out")


def test_a_folder_of_something_else_stays_as_it_is(teachers, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        run(teachers(), text, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_stages_come_from_files(teachers, text, tmp_path):
    (tmp_path / "transfer.yaml").write_text("stage: transfer\nsteps: 3\nlearning_rate: 1e-3\n")
    stages = ("--stages", "calibrate", tmp_path / "transfer.yaml")
    argv = ["--model", str(teachers()), "--dataset", str(text), "--output_dir", str(tmp_path / "out")]
    report = recipe("convert").main([*argv, *FAST, *map(str, stages)])
    assert [row.steps for row in report.rows] == [0, 0, 0, 3]


def test_finished_conversions_are_collected_once(teachers, text, tmp_path, monkeypatch):
    study = recipe("study_converted")
    folders = [tmp_path / "one", tmp_path / "two"]
    reports = [run(teachers(), text, folder, *STAGES, "--twin", "--seed", i) for i, folder in enumerate(folders)]
    out = tmp_path / "converted.csv"
    for _ in range(2):
        study.main([*map(str, folders), "--out", str(out)])
    rows = study.rows_of(out)
    assert len(rows) == 2 * 7
    assert not any("/" in row["command"] for row in rows)
    table = out.with_suffix(".md").read_text().splitlines()
    gaps = [report.rows[-1].score - report.tuned.score for report in reports]
    last = next(line for line in table if "| finetune |" in line)
    assert f"{sum(gaps) / 2:+.3f}" in last
    assert last.endswith("| 2 |")
    assert "| transfer |" in table[5]
    cells = [cell.strip() for cell in table[5].split("|")]
    # no twin has seen as many tokens by then; its perplexity is that of the teacher, times so much
    assert cells[6] == ""
    ratios = [math.exp(report.rows[2].score - report.rows[0].score) for report in reports]
    assert "| calibrate |" in table[4]
    assert table[4].split("|")[5].strip() == f"{sum(ratios) / 2:.3f}"


@pytest.mark.parametrize("name", ["causal_lm", "encoder", "debug_cpu"])
def test_configurations_are_whole(name, monkeypatch, tmp_path):
    from hf_polyattn_parsing import parse_arguments

    root = Path(__file__).resolve().parents[1]
    monkeypatch.chdir(root)
    config = f"recipes/configs/convert/{name}.yaml"
    args, _, _ = parse_arguments([config, "--output_dir", str(tmp_path)], recipe("convert").GROUPS)
    kinds = [kind for kind, _ in args.plan(())]
    assert kinds[:2] == ["calibrate", "transfer"]


def test_the_debug_configuration(tmp_path):
    run_recipe("pretrain_causal_lm", tmp_path / "softmax", "--activation", "softmax", "--max_steps", 4)
    report = run_recipe("convert", tmp_path / "out", "--model", tmp_path / "softmax" / "best")
    assert [row.stage for row in report.rows[2:]] == ["calibrate", "transfer", "distill", "finetune"]
    assert report.tuned.steps == 16
