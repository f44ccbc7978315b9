"""Rows of remedies and sweeps with known numbers, for the lab's pictures: nothing is trained."""

import numpy as np
import pandas as pd

from minirlhf.remedies.arms import ARMS, REMEDIES

STRATA = ("brief", "detailed")
SIDES = ("verbose", "concise")
PARTS = ("reward", "kl", "baseline", "shift", "value_loss", "kl_loss")
NO_PUSH = ("dpo", "best_of_n")
DEFAULT = {"brief_length": 30.0, "brief_gold": -1.0, "steps": 0.9, "verbose": 0.8, "push": 0.04}
MENDED = {"brief_length": 8.0, "brief_gold": 0.6, "steps": 0.88, "verbose": 0.03, "push": -0.05}


def fault_of(name):
    """The arm that an arm repairs, as the table of remedies says."""
    return REMEDIES[name].fault if name in REMEDIES else "none" if name == "fair" else name


def noise(name, seed, size=0.05):
    """The same small number for the same arm and seed."""
    return float(np.random.default_rng([*name.encode(), seed]).normal() * size)


def outcome(name, seed, *, brief_length, brief_gold, steps, verbose, **_):
    """Reference and end of one run, the reference 8 tokens, gold 0.5, 4 % verbose, 90 % steps."""
    e, found = noise(name, seed), {}
    first = {"length_tokens": 8.0, "gold": 0.5, "steps_share": 0.9, "verbose_rate": 0.04}
    last = {"length_tokens": brief_length + 10 * e, "gold": brief_gold + e, "steps_share": steps}
    last["verbose_rate"] = float(np.clip(verbose + e / 5, 0, 1))
    for stratum in STRATA:
        longer = 1 if stratum == "brief" else 3
        for moment, given in (("reference", first), ("final", last)):
            full = {**given, "length_tokens": longer * given["length_tokens"], "n": 120}
            drift = verbose if moment == "final" else 0.05
            full |= {f"{k}_rate": drift for k in ("evasion", "hedged")} | {"correct_rate": 0.8}
            full |= {"direct_rate": 1 - drift, "truncated_rate": 0.0}
            full["kl_nats"] = 0.0 if moment == "reference" else 10 * verbose + e
            found |= {f"{moment}_{stratum}_{k}": v for k, v in full.items()}
    found |= {"rm_score_sd": 3 * verbose, "kl_nats": 10 * verbose, "steps": 60}
    found |= {f"gap_courtesy_{s}_sd": 0.25 * verbose for s in STRATA}
    return found | {f"gap_hedge_{s}_sd": 0.5 * verbose for s in STRATA}


def batch(name, seed, *, push, **_):
    """What an arm makes of the logged batch: four parts that add up to `push`, and its mirror."""
    if name in NO_PUSH:
        return {}
    e = noise(name, seed, 0.002)
    found = {
        "anew": name == "rloo",
        "verbose_then": 0.45,
        "gap_score": 8 * push,
        "gap_cost": 3 * abs(push),
    }
    found |= {"gap_effective": 8 * push - 3 * abs(push), "fork_verbose": 9 * push}
    found["fork_concise"] = -5 * push
    for side, sign in (("verbose", 1), ("concise", -1)):
        shares = {"reward": 1.5, "kl": -0.8, "baseline": 0.2, "shift": 0.1}
        parts = {p: sign * (push + e) * shares.get(p, 0.0) for p in PARTS}
        found |= {f"push_{side}_{p}": v for p, v in parts.items()}
        found[f"push_{side}"] = sum(parts.values())
    return found


def remedy_rows(arms, seeds=5):
    """A frame as shipped().remedies: arms is name -> the five numbers of DEFAULT."""
    rows = [
        {"remedy": name, "fault": fault_of(name), "seed": seed}
        | outcome(name, seed, **given)
        | batch(name, seed, **given)
        for name, given in arms.items()
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def every_arm(seeds=5):
    """All arms of the package, somewhere between drifted and mended."""
    arms = {}
    for i, name in enumerate(ARMS):
        t = (7 * i % 11) / 10 * (name not in ("none", "grpo", "book_literal", "token_mean"))
        arms[name] = {k: (1 - t) * DEFAULT[k] + t * MENDED[k] for k in DEFAULT}
    return remedy_rows(arms, seeds)


def sweep_rows(betas=(0.02, 0.07, 0.2), clips=(0.1, 0.2), biases=(0.0, 0.0455), seeds=3, steps=20):
    """Frames as shipped().sweep and .trajectories. The first length of a cell's seed s is
    1000 beta + 10 clip + bias + s, so no two runs share one number."""
    rows, paths = [], []
    for beta in betas:
        for clip in clips:
            for bias in biases:
                for seed in range(seeds):
                    key = {"remedy": "none", "beta": beta, "clip": clip, "length_bias": bias}
                    key["seed"] = seed
                    given = {**DEFAULT, "verbose": min(0.9, bias * 0.9 / beta)}
                    given["brief_length"] = 8 + 20 * given["verbose"]
                    rows.append({**key, **outcome(f"{key}", seed, **given)})
                    rows[-1]["gap_courtesy_brief_sd"] = 5 * bias + 0.01 * seed
                    first = 1000 * beta + 10 * clip + bias + seed
                    for step in range(1, steps + 1):
                        path = {"step": step, "length_tokens": first + 0.1 * step}
                        for side, sign in (("verbose", 1), ("concise", -1)):
                            kept = step in (1, steps // 2, steps)
                            path[f"advantage_{side}"] = sign * beta + seed if kept else None
                        paths.append({**key, **path})
    return pd.DataFrame(rows), pd.DataFrame(paths)
