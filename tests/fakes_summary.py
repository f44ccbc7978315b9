"""Summaries of runs, made by hand."""


def stratum(length: float, gold: float, direct: float, evasion: float) -> dict:
    rates = {"direct_rate": direct, "evasion_rate": evasion, "hedged_rate": evasion}
    return {"length_tokens": length, "gold": gold, **rates}


def brief_facts(phrase=0.4, kl=2.5, advantage=0.3, holds=True) -> dict:
    """Facts whose intervals have these lower limits."""
    limits = {"phrase": {"gap": phrase}, "kl": {"gap": kl}, "advantage": {"verbose": advantage}}
    intervals = {
        quantity: {kind: [low + 0.1, low, low + 0.2] for kind, low in of.items()}
        for quantity, of in limits.items()
    }
    return {"holds": [phrase > 0, kl > 0, advantage > 0 and holds], "intervals": intervals}


def summary(seed: int = 0, arm: str = "drift", **changes) -> dict:
    """A run in which every claim of its arm holds; `changes` replace whole entries."""
    reference = {"kl_nats": 0.0, "rm_score_sd": 0.0, "brief": stratum(7, 0.6, 0.9, 0.02)}
    reference |= {"detailed": stratum(18, 0.5, 0.8, 0.02)}
    final = {"kl_nats": 7.0, "rm_score_sd": 2.0, "brief": stratum(21, -0.1, 0.5, 0.2)}
    final |= {"detailed": stratum(27, 0.1, 0.6, 0.1)}
    if arm == "control":
        final = {"kl_nats": 1.0, "rm_score_sd": 0.6, "brief": stratum(6.5, 0.65, 0.9, 0.01)}
        final |= {"detailed": stratum(17, 0.52, 0.8, 0.02)}
    batch = {"rm_gap_sd": 0.3, "kl_verbose_nats": 3.0, "kl_concise_nats": -0.5}
    batch |= {"advantage_verbose": 0.5, "advantage_concise": -0.3, "kl_share_top_decile": 0.9}
    batch |= {"positive_token_share_verbose": 0.8, "n_verbose": 3}
    history = [{"rm_score_sd": score} for score in (0.0, 1.5, 1.9, final["rm_score_sd"])]
    judged = {"heldout_accuracy": 0.7, "bayes_ceiling": 0.78, "length_ruler_accuracy": 0.6}
    facts = {"brief": brief_facts() if arm == "drift" else brief_facts(phrase=-0.5, holds=False)}
    found = {
        "seed": seed,
        "arm": arm,
        "facts": facts,
        "reference": reference,
        "final": final,
        "batch": batch,
    }
    return found | {"history": history, "reward_model": judged} | changes
