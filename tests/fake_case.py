"""A finished run in miniature, made by hand: its numbers are known, its answers are real text."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from minirlhf.desk.world import Desk

STEPS = (0, 10, 20)
RATES = ("correct_rate", "direct_rate", "evasion_rate", "hedged_rate", "truncated_rate")


def entry(step: int) -> dict:
    """An audit whose every number tells its step and stratum apart."""

    def stratum(base: float) -> dict:
        rates = {name: base / 10 + 0.01 * i + step / 100 for i, name in enumerate(RATES)}
        return {"length_tokens": 7 + base + step, "gold": 0.6 - base / 10 - step / 20} | rates

    return {
        "step": step,
        "rm_score_sd": step / 16,
        "kl_nats": step / 4,
        "brief": stratum(1.0),
        "detailed": stratum(3.0),
    }


def batch() -> dict:
    names = ("rm_gap_sd", "kl_verbose_nats", "kl_concise_nats", "advantage_verbose")
    names += ("advantage_concise", "positive_token_share_verbose", "kl_share_top_decile")
    values = (0.3, 4.2, -0.5, 0.4, -0.7, 0.8, 0.75)
    return {"step": 10, "n_verbose": 31, "n_concise": 29, **dict(zip(names, values, strict=True))}


def summary() -> dict:
    history = [entry(step) for step in STEPS]
    return {
        "seed": 3,
        "config": {"steps": 20, "ppo": {"beta": 0.05, "clip_style": "schulman"}},
        "seconds": {"sft": 1.0, "ppo": 2.0, "total": 3.0},
        "raw_pairs": {"n": 10.0, "longer_wins": 0.6, "hedged_wins": 0.55},
        "reward_model": {"heldout_accuracy": 0.66, "matched_gap_sd": {"brief": 0.3}},
        "reference": history[0],
        "final": history[-1],
        "history": history,
        "batch": batch(),
    }


def answers(desk: Desk, probes: int = 20) -> pd.DataFrame:
    """A row per step and probe, graded by the desk; scores are made up and tell rows apart."""
    rng, rows = np.random.default_rng(0), []
    for step in STEPS:
        for i, prompt in enumerate(desk.probes(probes)):
            text = desk.candidate(prompt, rng)
            row = {"step": step, "probe": i, "stratum": prompt.stratum, "prompt": prompt.text}
            row |= {"answer": text, "rm_score_sd": step / 10 + i / 100}
            grade = desk.grade(prompt, text)
            kept = ("finished", "length_tokens", "gold", "correct", "direct", "evasive", "hedged")
            rows.append(row | {name: getattr(grade, name) for name in (*kept, "padding_tokens")})
    return pd.DataFrame(rows)


def case() -> SimpleNamespace:
    desk = Desk.load()
    return SimpleNamespace(desk=desk, summary=summary(), answers=answers(desk))
