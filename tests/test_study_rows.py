"""What studies share: rows that are added look like those that are there, and say where they were measured."""

import doctest
import math

import pytest
import torch
from accelerate import PartialState
from recipe_runs import recipe

from hf_polyattn.training.devices import device_name


@pytest.fixture
def rows():
    return recipe("study_rows")


@pytest.fixture
def tables():
    return recipe("study_tables")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_added_rows_take_the_order_and_the_line_ends_of_the_file(rows, tmp_path, end):
    path = tmp_path / "r.csv"
    path.write_bytes(f"seed,loss{end}1,0.5{end}".encode())
    rows.append(path, [{"loss": 0.25, "seed": 2}])
    assert path.read_bytes() == f"seed,loss{end}1,0.5{end}2,0.25{end}".encode()
    rows.write_rows(path, rows.rows_of(path))
    assert path.read_bytes() == f"seed,loss{end}1,0.5{end}2,0.25{end}".encode()
    assert rows.finished(path, "seed") == {("1",), ("2",)}


@pytest.mark.parametrize("row", [{"seed": 2}, {"seed": 2, "loss": 1, "note": ""}])
def test_rows_of_other_columns_are_refused(rows, tmp_path, row):
    path = tmp_path / "r.csv"
    rows.append(path, [{"seed": 1, "loss": 0.5}])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"\((loss|note)\): move it aside"):
        rows.append(path, [row])
    assert path.read_bytes() == before


def test_a_row_names_the_device_of_recipes_or_of_its_own_loop(rows, monkeypatch):
    assert rows.environment()["device"] == device_name(PartialState().device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"abacus {device.index}")
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda", 1))
    assert rows.environment()["device"] == "abacus 1"
    assert rows.environment(torch.device("cpu"))["device"].startswith("cpu")


def test_commands_are_without_folders_and_can_be_typed(rows):
    command = rows.shown_command("a.py", ["--data", "/some/my text.txt", "--shape", '{"n": 1}'])
    assert command == """python recipes/a.py --data 'my text.txt' --shape '{"n": 1}'"""


def test_a_short_form_stays_out_of_the_results(rows):
    parser = rows.study_parser("study_x", "What it is.\n\nMore.", quick="short")
    assert rows.out_of(parser.parse_args([]), "x.csv") == rows.RESULTS / "x.csv"
    assert rows.out_of(parser.parse_args(["--quick"]), "x.csv").parts == ("runs", "study_x", "quick_x.csv")
    assert rows.out_of(parser.parse_args(["--quick", "--out", "y.csv"]), "x.csv").name == "y.csv"


def test_a_mean_of_what_is_not_finite_has_no_spread(tables):
    assert tables.mean_and_spread([1.0, math.nan], 2) == "nan"


def test_examples(rows, tables):
    assert doctest.testmod(tables).attempted == 3
    assert doctest.testmod(tables).failed == 0


def test_figures_have_neither_date_nor_version(tables, tmp_path):
    from matplotlib.figure import Figure

    tables.save_figure(Figure(figsize=(1, 1)), tmp_path / "f.png")
    assert b"Matplotlib" not in (tmp_path / "f.png").read_bytes()
