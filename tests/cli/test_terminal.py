"""What a command says while it runs: bars, failed jobs, and the command as it was given."""

import sys

from minirlhf.cli.terminal import Bars, as_given, say_if_new


def last_of(err: str) -> list[str]:
    """What stands on the terminal in the end, without what was written over."""
    return [line.split("\r")[-1] for line in err.split("\n")]


def test_a_stage_has_one_bar_and_the_next_stage_ends_it(capsys):
    bars = Bars()
    bars("sft", 1, 2, {})
    bars("sft", 2, 2, {"sft/loss_nats": 1.234, "seconds/step": 9.0})
    bars("ppo", 1, 4, {"objective/kl_nats": 0.5, "policy/loss": -2.0})
    bars.close()
    first, second, rest = last_of(capsys.readouterr().err)
    assert first.startswith("sft ") and "100%" in first and first.endswith(", loss_nats=1.23]")
    assert second.startswith("ppo ") and " 25%" in second
    assert second.endswith(", kl_nats=0.50, loss=-2.00]") and rest == ""


def test_a_job_that_failed_is_a_line_above_the_bar(capsys):
    bars = Bars()
    report = bars.of_jobs("runs")
    report("one", 1, 3)
    report("two failed (ValueError: no); it is run again", 1, 3)
    report("two", 2, 3)
    bars.close()
    lines = last_of(capsys.readouterr().err)
    assert lines[0] == "minirlhf: two failed (ValueError: no); it is run again"
    assert lines[1].startswith("runs ") and "2/3" in lines[1]


def test_a_first_job_that_failed_is_a_line_too(capsys):
    bars = Bars()
    bars.of_jobs("runs")("one failed (ValueError: no); it is run again", 0, 3)
    bars.close()
    assert "minirlhf: one failed (ValueError: no); it is run again" in capsys.readouterr().err


def test_a_note_stands_behind_its_bar(capsys):
    bars = Bars()
    bars.move("runs", 0, 9, "as it is")
    assert last_of(capsys.readouterr().err)[0].endswith(", as it is]"), "before anything is done"
    bars.move("runs", 3, 9, "no clip")
    bars.close()
    assert last_of(capsys.readouterr().err)[0].endswith(", no clip]")


def test_the_command_as_given_names_no_place_and_no_workers(monkeypatch):
    line = "minirlhf sweep --out runs/mine --grid.beta 0.1 0.2 --jobs 3 --backend loky --resume"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--grid.seed", "1", "--ship", "--address"])
    assert as_given() == "minirlhf sweep --grid.beta 0.1 0.2 --grid.seed 1"


def test_nothing_to_resume_is_said_once_and_only_then(capsys, tmp_path):
    say_if_new(tmp_path / "sweep.json", "sweep")
    (tmp_path / "sweep.json").touch()
    say_if_new(tmp_path / "sweep.json", "sweep")
    text = f"nothing to resume in {tmp_path}: a new sweep starts there\n"
    assert capsys.readouterr().err == text


def test_a_failure_that_comes_first_in_a_resumed_sweep_is_said_too(capsys):
    """Four jobs are done already, so that the bar moves as it reports the first failure."""
    bars = Bars()
    report = bars.of_jobs("runs")
    report("five failed (ValueError: no); it is run again", 4, 9)
    report("six", 5, 9)
    bars.close()
    err = capsys.readouterr().err
    assert "minirlhf: five failed (ValueError: no); it is run again" in err
    assert "minirlhf: six" not in err
