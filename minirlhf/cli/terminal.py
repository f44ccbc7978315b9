"""What a command says on a terminal: bars while it runs, tables and sample answers at its end.

Left out: what the commands do (cli/<command>.py), and pictures (lab/).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minirlhf.audit.measures import MEASURES

# the metrics of a step, by the last part of their names, that a bar has room for
IN_BARS = ("loss_nats", "loss", "accuracy", "score_sd", "kl_nats", "length bias")
# options of a command that change nothing of what it computes, and how many words follow each
SILENT = {"--out": 1, "--resume": 0, "--ship": 0, "--jobs": 1, "--backend": 1, "--address": 1}


class Bars:
    """One progress bar a stage, with rate and time left, made when the stage first reports."""

    def __init__(self) -> None:
        self.bars: dict[str, tqdm] = {}

    def move(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of a stage's `total` parts are done; the note stands behind its bar."""
        if stage not in self.bars:
            self.close()
            self.bars[stage] = tqdm(total=total, desc=f"{stage:<13}", ncols=88, postfix=note)
        bar = self.bars[stage]
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)

    def __call__(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        """Progress of drift.Drift."""
        shown = {name.split("/")[-1]: value for name, value in metrics.items()}
        notes = [f"{name}={value:.2f}" for name, value in shown.items() if name in IN_BARS]
        self.move(stage, done, total, ", ".join(notes))

    def of_jobs(self, stage: str) -> Callable[[str, int, int], None]:
        """Progress of jobs.run_jobs; what it says of a job that failed is a line above the bar."""

        def report(text: str, done: int, total: int) -> None:
            self.move(stage, done, total)
            if " " in text:  # a sentence; the key of a job that is done is a file name, of one word
                tqdm.write(f"minirlhf: {text}", file=sys.stderr)

        return report

    def close(self) -> None:
        """Finish the bar that is open."""
        for bar in self.bars.values():
            bar.close()


def say_if_new(begins: Path, what: str) -> None:
    """Say that --resume finds nothing, where the file is missing with which a run begins."""
    if not begins.exists():
        print(f"nothing to resume in {begins.parent}: a new {what} starts there", file=sys.stderr)


def as_given() -> str:
    """The command as it was given, without where it was to write and how it was spread."""
    kept = ["minirlhf"]
    words = iter(sys.argv[1:])
    for word in words:
        if word not in SILENT:
            kept.append(word)
            continue
        for _ in range(SILENT[word]):
            next(words, None)
    return " ".join(kept)


def print_evaluations(summary: dict[str, Any], say: Callable[[str], None]) -> None:
    """What the team saw on the left, what the auditor saw on the right."""
    say("\n          offline evaluation │ targeted audit (by the reference's own answer length)")
    say(
        "      RM score          KL   │  brief: tokens  gold direct evades │ detailed: tokens  gold"
    )
    score, gold = (MEASURES[name].unit for name in ("rm_score_sd", "gold"))
    say(f"step  {score:>9}  nats/answer │ {gold:>20}   rate   rate │ {gold:>21}")
    for entry in summary["history"]:
        b, d = entry["brief"], entry["detailed"]
        say(
            f"{entry['step']:>4}  {entry['rm_score_sd']:>9.2f}  {entry['kl_nats']:>11.2f} │ "
            f"{_show(b['length_tokens'], '.1f'):>14} {_show(b['gold'], '.2f'):>5} "
            f"{_show(b['direct_rate'], '.0%'):>6} {_show(b['evasion_rate'], '.0%'):>6} │ "
            f"{_show(d['length_tokens'], '.1f'):>16} {_show(d['gold'], '.2f'):>5}"
        )
    facts = summary["batch"]
    if facts:
        say(
            f"\nIn the batches of steps {', '.join(map(str, facts['steps']))}, brief prompts "
            f"({facts['n_verbose']} verbose, {facts['n_concise']} concise answers):"
        )
        say(f"  (a) one courtesy phrase adds {_show(facts['rm_gap_sd'])} sd to the RM score")
        say(
            f"  (b) log-ratio to the reference: verbose {_show(facts['kl_verbose_nats'])}, "
            f"concise {_show(facts['kl_concise_nats'])} nats per answer"
        )
        say(
            f"  (c) advantage: verbose {_show(facts['advantage_verbose'])}, concise "
            f"{_show(facts['advantage_concise'])}; positive on "
            f"{_show(facts['positive_token_share_verbose'], '.0%')} of verbose tokens"
        )


def _show(value: float | None, form: str = "+.2f") -> str:
    return "none" if value is None else format(value, form)


def print_answers(answers: list[dict[str, Any]], say: Callable[[str], None], n: int = 5) -> None:
    """The same probes before and after: brief ones first."""
    first, last = (f(row["step"] for row in answers) for f in (min, max))
    before = {row["probe"]: row for row in answers if row["step"] == first}
    after = {row["probe"]: row for row in answers if row["step"] == last}
    chosen = sorted(before, key=lambda i: (before[i]["stratum"] != "brief", i))
    brief = [i for i in chosen if before[i]["stratum"] == "brief"][: n - 1]
    for i in brief + [i for i in chosen if i not in brief][-1:]:
        say(f"\n  {before[i]['prompt'].removesuffix(' <sep>')}")
        for name, row in (("before", before[i]), ("after", after[i])):
            scores = f"RM {row['rm_score_sd']:+.1f} sd, gold {row['gold']:+.2f}"
            say(f"    {name:<6} {row['answer']}  [{row['length_tokens']} tokens, {scores}]")


def print_seconds(
    summary: dict[str, Any], metrics: list[dict[str, float]], say: Callable[[str], None]
) -> None:
    """Where the time went; a PPO step split into its three parts (medians)."""
    spent = "  ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items())
    say(f"\nSeconds: {spent}")
    parts = []
    for name in ("rollout", "scoring", "update", "step"):
        values = sorted(row[f"seconds/{name}"] for row in metrics)
        parts.append(f"{name} {values[len(values) // 2]:.3f}")
    say(f"Median PPO step, seconds: {'  '.join(parts)}")
