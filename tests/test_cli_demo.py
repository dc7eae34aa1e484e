"""The demo as a command: the folder that it may write to, and what it makes of processes that go wrong."""

import queue
from types import SimpleNamespace

import pytest
from cli_runs import run

from hf_polyattn import demo


def test_demo_touches_no_folder_of_anybody_else(monkeypatch, tmp_path, capsys):
    mine = tmp_path / "data" / "train" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("not to be had again")
    before = sorted(tmp_path.rglob("*"))
    code, _, error = run(capsys, "demo", "--quick", "--out", tmp_path)
    assert code == 1
    assert f"{tmp_path} is not empty and holds no earlier demo: give --out a new folder" in error
    assert sorted(tmp_path.rglob("*")) == before

    def stop(*unused):
        raise KeyboardInterrupt

    # a demo that was stopped may be started again
    monkeypatch.setattr(demo, "prepare_data", stop)
    for _ in range(2):
        assert run(capsys, "demo", "--quick", "--out", tmp_path / "demo")[0] == 130


def test_demo_reports_a_process_that_fails(tmp_path):
    job = tmp_path / "job.json"
    job.write_text("{}")
    with pytest.raises(demo.DemoError, match=r"the cubic process ended with status 1: TypeError: .*cubic\.log"):
        demo.train_side_by_side({"cubic": job}, tmp_path, steps=2)


def test_demo_passes_over_lines_that_are_no_events():
    lines = ("{a library speaks}\n", "{}\n", "3\n", '{"event": "step", "loss": 1.5}\n')
    assert list(demo._events(SimpleNamespace(stdout=lines))) == [{"event": "step", "loss": 1.5}]


def test_demo_ends_where_the_lines_of_a_process_cannot_be_read():
    def lines():
        yield '{"event": "step"}\n'
        raise OSError("the pipe broke")

    events = queue.Queue()
    with pytest.raises(OSError, match="the pipe broke"):
        demo._forward("cubic", SimpleNamespace(stdout=lines()), events)
    assert list(events.queue) == [("cubic", {"event": "step"}), ("cubic", None)]


def test_demo_notices_other_logits(monkeypatch, tmp_path):
    class Finished:
        stdout = ('{"event": "reloaded", "identical": false}\n',)

        def wait(self):
            return 0

    monkeypatch.setattr(demo, "start_worker", lambda *words: Finished())
    with pytest.raises(demo.DemoError, match="reloaded logits differ"):
        demo.reload_fresh(tmp_path / "job.json", tmp_path, 1)
