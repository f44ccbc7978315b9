"""The command line in process: help, what is said of what is wrong, and a whole small run."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
from command_line import SMALL
from fakes_summary import summary

import minirlhf
from minirlhf.cli.main import COMMANDS, main
from minirlhf.desk.world import Desk
from minirlhf.engine import compute

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _threads():
    yield
    compute.use(1)


def said(capsys, *argv: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    out, err = capsys.readouterr()
    return status, out, err


# --- help ---------------------------------------------------------------------------------------

OPTIONS = {
    "drift": [
        ("--ppo.beta", "price of KL, reward sd per nat"),
        ("--ppo.clip", "epsilon of the clipped ratio"),
        ("--ppo.kl-place", "where the penalty acts"),
        ("--preferences.length-bias", "utility of one more token, in points"),
        ("--seed", "decides every random draw"),
        ("--steps", "PPO steps"),
        ("--device", "auto, cpu, cuda or mps"),
        ("--quick", "a few seconds instead of a minute"),
        ("--out", "folder for everything that the run writes"),
        ("--desk", "a desk.toml of your own"),
        ("--resume", "go on with the run in --out"),
    ],
    "seeds": [("--seeds", "seeds 0"), ("--jobs", "processes at once"), ("--table", "Markdown")],
    "data": [("--folder", "where desk.toml lies")],
    "check": [("--out", "a folder that runs would write to"), ("--device", "auto, cpu")],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_lists_every_option_with_its_meaning(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = said(capsys, command, "--help")
    assert (status, err) == (0, "")
    for option, meaning in OPTIONS[command]:
        assert re.search(rf"{re.escape(option)}\b", out), option
        assert meaning in out, meaning


def test_help_of_drift_leaves_no_setting_unexplained(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    _, out, _ = said(capsys, "drift", "--help")
    rows = re.split(r"^[^\w-]*(?=--[a-z])", out, flags=re.MULTILINE)[1:]
    assert len(rows) > 50
    # a row is: option, metavariable, meaning (default: ...)
    assert not [row for row in rows if not re.search(r"\s{2,}\w.*\(default", row, re.DOTALL)]


def test_help_of_the_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = said(capsys, "--help")
    assert status == 0 and "--version" in out and "minirlhf drift --help" in out
    for command, sentence in COMMANDS.items():
        assert re.search(rf"^ +{command} +{re.escape(sentence)}$", out, re.MULTILINE)
        module = import_module(f"minirlhf.cli.{command}")
        assert callable(module.run) and module.Options()


def test_help_waits_for_nothing_heavy():
    """Of all commands but sweep, whose grid needs torch."""
    lines = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS if name != "sweep")]
    code = f"""
import sys
from contextlib import suppress
from minirlhf.cli.main import main
for line in {lines}:
    with suppress(SystemExit):
        main(line)
    assert not {{"torch", "joblib", "pandas"}} & set(sys.modules), line
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, ""), found.stderr
    assert found.stdout.count("usage: minirlhf") == len(lines) - 1


def test_version(capsys):
    assert said(capsys, "--version") == (0, f"minirlhf {minirlhf.__version__}\n", "")


# --- what is wrong ------------------------------------------------------------------------------

WRONG = [
    ("drift --ppo.beta -1", "--ppo.beta is -1.0; it must be at least 0"),
    ("drift --ppo.clip 1", "--ppo.clip is 1.0; it must lie between 0 and 1, for example 0.2"),
    ("drift --ppo.minibatches 3", "--ppo.minibatches is 3; it must divide ppo.batch (128)"),
    ("drift --ppo.kl-place none --ppo.kl-target 3", "--ppo.kl-target is 3.0; it needs a kl_place"),
    ("drift --seed -1", "--seed is -1; it must be at least 0"),
    ("drift --steps 0", "--steps is 0; it must be at least 1"),
    ("drift --sft.lr nan", "--sft.lr is nan; it must be positive"),
    ("drift --reward.weight-decay -1", "--reward.weight-decay is -1.0; it must be at least 0"),
    ("drift --preferences.skim 2", "--preferences.skim is 2.0; give a share in [0, 1]"),
    ("drift --preferences.pairs 1", "--preferences.pairs is 1; label at least 2 pairs"),
    ("drift --audit.every 0", "--audit.every is 0; it must be positive"),
    ("drift --threads 0", "--threads is 0; give at least 1"),
    ("drift --device tpu", "--device tpu is not available here; use auto or one of: cpu"),
    ("drift --desk nowhere.toml", "nowhere.toml cannot be read"),
    ("seeds --seeds 0", "--seeds is 0; it must be at least 1"),
    ("seeds --jobs 0", "--jobs is 0; it must be at least 1"),
    ("seeds --fresh -1", "--fresh is -1; it must be at least 0"),
    ("seeds --seeds 101", "--seeds is 101; it must be at most 100, where the fresh ones begin"),
    ("data --folder nowhere", "desk.toml cannot be read"),
    ("sweep --jobs -1", "--jobs = -1, retries = 2: give 0 or more"),
    ("sweep --backend dask", "minirlhf: the dask backend needs the address of a running scheduler"),
    ("sweep --grid.beta 1 1", "grid.beta is (1.0, 1.0); give no value twice"),
    ("remedies --steps 0", "--steps is 0; it must be at least 1"),
    ("battery --ppo.beta 0", "ppo.beta is 0; the battery scales the price of KL"),
    ("battery --refresh 0", "refresh is 0; it must be at least 1 step"),
    ("battery --gap nan", "gap is nan; it must be finite"),
]


@pytest.mark.parametrize(("line", "sentence"), WRONG)
def test_what_is_wrong_is_one_sentence(capsys, tmp_path, monkeypatch, line, sentence):
    monkeypatch.chdir(tmp_path)
    status, out, err = said(capsys, *line.split())
    assert (status, out) == (2, "")
    assert err.startswith("minirlhf: ") and err.count("\n") == 1, err
    assert sentence in err and len(err) < 250
    assert not re.search(r"[╭│─]|Traceback|__\w+__", err), "no box, no insides"
    assert not list(tmp_path.iterdir()), "nothing was written"


BOXES = [  # tyro's: what cannot be read, what may have been meant, and where to look
    (
        "drift --ppo.clip x",
        "--ppo.clip: could not convert string to float: 'x'",
        "--ppo.clip FLOAT",
    ),
    ("drift --ppo.clip-style soft", "'soft' for argument '--ppo.clip-style'", "'schulman', 'book'"),
    ("drift --ppo.bet 1", "Unrecognized options: --ppo.bet, 1", "--ppo.beta FLOAT price of KL"),
    ("drift --resum", "Unrecognized options: --resum", "--resume, --no-resume go on with the run"),
    ("drift --ppo.beta", "Missing value for argument '--ppo.beta'", "Expected 1 value"),
    ("drift stray", "Unrecognized options: stray", ""),
    ("sweep --backend ray", "'ray' for argument '--backend'", "'sequential', 'loky', 'dask'"),
]


def unboxed(text: str) -> str:
    """Its words on one line."""
    return " ".join(re.sub(r"[╭╮╰╯│─]|-{5,}", " ", text).split())


@pytest.mark.parametrize(("line", "what", "meant"), BOXES)
def test_what_cannot_be_read_is_said_in_a_box(capsys, tmp_path, monkeypatch, line, what, meant):
    monkeypatch.chdir(tmp_path)
    status, out, err = said(capsys, *line.split())
    assert (status, out) == (2, "")
    text = unboxed(err)
    assert what in text and meant in text
    assert text.endswith(f"minirlhf {line.split()[0]} --help")
    assert not re.search(r"Traceback|__\w+__|Options\b|config\.", err), "no insides"
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(("line", "what"), [("", "no command is given"), ("drfit", "'drfit'")])
def test_what_is_no_command_is_answered_with_those_there_are(capsys, line, what):
    status, out, err = said(capsys, *line.split())
    usage, sentence = err.splitlines()
    assert (status, out) == (2, "") and usage.startswith("usage: minirlhf [-h] [--version] COMMAND")
    assert sentence.startswith("minirlhf: error: ") and what in sentence
    assert all(command in sentence for command in COMMANDS)


@pytest.mark.parametrize(("encoding", "columns"), [("utf-8", "40"), ("ascii", "60")])
def test_what_is_wrong_is_whole_on_any_terminal(encoding, columns):
    env = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": columns, "PYTHONPATH": str(ROOT)}

    def err(*options: str) -> str:
        command = [sys.executable, "-m", "minirlhf.cli", "drift", *options]
        found = subprocess.run(command, env=env, capture_output=True, timeout=60)
        assert (found.returncode, found.stdout) == (2, b"")
        return found.stderr.decode(encoding)

    sentence = err("--ppo.beta", "-1").splitlines()
    assert sentence == ["minirlhf: --ppo.beta is -1.0; it must be at least 0"]
    box = err("--ppo.clip-style", "soft")
    assert max(map(len, box.splitlines())) <= int(columns)
    text = unboxed(box)
    assert "'soft' for argument '--ppo.clip-style'" in text and "minirlhf drift --help" in text


def test_a_stop_by_the_keyboard_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    def stopped(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("minirlhf.drift.run.Drift.run", stopped)
    monkeypatch.setattr("minirlhf.cli.check.check", stopped)
    found = said(capsys, "drift", "--out", str(tmp_path))
    assert found == (130, "", "minirlhf: stopped; the same command with --resume goes on\n")
    assert said(capsys, "check") == (130, "", "minirlhf: stopped\n")


# --- whole commands -----------------------------------------------------------------------------


def test_drift_at_a_desk_of_ones_own(capsys, tmp_path):
    """Everything that `minirlhf drift` prints and writes, small, with a lecturer's desk.toml."""
    desk, out = tmp_path / "desk.toml", tmp_path / "runs" / "mine"
    shipped = (ROOT / "data" / "desk.toml").read_text(encoding="utf-8")
    desk.write_text(shipped.replace("pounds", "euros"), encoding="utf-8")
    line = ["drift", *SMALL, "--desk", str(desk), "--out", str(out)]
    status, text, err = said(capsys, *line)
    assert status == 0, err
    for words in ("offline evaluation", "targeted audit", "before", "after", "Seconds: sft"):
        assert words in text
    assert text.count("    before ") == text.count("    after ") == 5
    assert "Median PPO step, seconds: rollout" in text and f"Written to {out}" in text
    assert re.search(r"\rsft .*100%.*\d.*it/s", err), "bars on stderr"
    names = {"summary.json", "metrics.parquet", "answers.parquet", "drift.png", "report.html"}
    assert names <= {path.name for path in out.iterdir()}
    assert (out / "drift.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "too few pairs and steps" in report, "SMALL is --quick"
    assert "nothing to resume" not in err
    assert "<html" in report and not re.search(r'(src|href)="(http|/|\w+\.)', report)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["vocabulary"] == Desk.load(desk).vocabulary.fingerprint
    assert config["vocabulary"] != Desk.load().vocabulary.fingerprint
    assert len(pd.read_parquet(out / "answers.parquet")) == 2 * 16
    # once more: refused; with --resume: read back; at the shipped desk: refused
    status, _, err = said(capsys, *line)
    assert status == 1 and err.strip().endswith("add --resume or choose another --out")
    status, _, err = said(capsys, *line, "--resume")
    assert status == 0 and "nothing to resume" not in err
    status, _, err = said(capsys, "drift", *SMALL, "--out", str(out), "--resume")
    assert status == 1 and "other settings" in err


def test_resuming_where_nothing_is_says_so_and_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("minirlhf.drift.run.Drift.run", lambda self: 1 / 0)  # it came to the run
    with pytest.raises(ZeroDivisionError):
        main(["drift", *SMALL, "--out", str(tmp_path / "typo"), "--resume"])
    said_so = f"nothing to resume in {tmp_path / 'typo'}: a new run starts there\n"
    assert capsys.readouterr().err == said_so
    assert (tmp_path / "typo" / "config.json").exists()


def test_a_stratum_without_prompts_is_shown_as_none(capsys, tmp_path):
    line = ["drift", *SMALL, "--out", str(tmp_path / "run"), "--audit.brief-below", "1000"]
    status, text, err = said(capsys, *line)
    assert status == 0, err
    assert re.search(r"^ +0 .*│ +\d+\.\d .*│ +none +none$", text, flags=re.MULTILINE)


def test_seeds_writes_the_table_and_the_runs(capsys, tmp_path, monkeypatch):
    from minirlhf.sweeps import seeds

    arms = ("control", "drift")

    def fake(config, wanted, folder, workers, report):
        assert (list(wanted), workers.jobs) == ([0, 1, seeds.FRESH], 3)
        return [summary(seed, arm, batches=[]) for arm in arms for seed in wanted]

    monkeypatch.setattr(seeds, "run_seeds", fake)
    out, table = tmp_path / "seeds.json", tmp_path / "seeds.md"
    where = ["--out", str(out), "--table", str(table), "--fresh", "1"]
    where += ["--parts", str(tmp_path / "parts")]
    status, text, _ = said(capsys, "seeds", "--seeds", "2", "--jobs", "3", *where)
    assert status == 0 and table.read_text(encoding="utf-8") in text
    found = json.loads(out.read_text(encoding="utf-8"))
    order = [(run["arm"], run["seed"]) for run in found["runs"]]
    assert order == [(arm, seed) for arm in arms for seed in (0, 1, seeds.FRESH)]
    assert "batches" not in found["runs"][0]
    # seeds at which settings were chosen, and those at which none was, are counted apart
    runs = {row["seeds"]: row["runs"] for row in found["table"]}
    assert runs == {"seeds 0 to 1": 2, "fresh seeds": 1}
    text = table.read_text(encoding="utf-8")
    assert "Made by `minirlhf seeds --seeds 2 --fresh 1`" in text and seeds.NOTE in text


def test_check_prints_a_row_for_each_subject(capsys, tmp_path):
    status, text, _ = said(capsys, "check", "--out", str(tmp_path), "--device", "cpu")
    assert re.search(r"^\[OK\] +device +cpu", text, flags=re.MULTILINE)
    assert status == (1 if "[FAIL]" in text else 0)


def test_the_module_runs_as_a_program():
    found = subprocess.run(
        [sys.executable, "-m", "minirlhf.cli", "--version"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (0, f"minirlhf {minirlhf.__version__}\n")
