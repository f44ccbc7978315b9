"""Two ways to the strata: how long the reference answers, and where it is ready to stop."""

import numpy as np
import pytest
import torch
from fakes_audit import auditor

from minirlhf.audit.auditor import Auditor
from minirlhf.audit.config import AuditConfig
from minirlhf.drift.data import shipped


@torch.no_grad()
def test_stopping_is_one_minus_the_chance_of_going_on_state_by_state():
    found = auditor(seed=3)
    eos, desk = found.desk.vocabulary.eos, found.desk
    responses, mask = (part.view(3, 10, -1) for part in found._scored)
    for tokens in (1, 5, 12):
        expected = np.zeros(10)
        for sample in range(3):
            for i in range(10):
                going_on, width = 1.0, int((found.prompts[i] != 0).sum())
                ids = found.prompts[i][-width:].tolist()
                for t in range(min(tokens, int(mask[sample, i].sum()))):
                    logits = found.reference(torch.tensor([ids]))[0][0, -1]
                    going_on *= 1 - float(logits.softmax(0)[eos])
                    ids.append(int(responses[sample, i, t]))
                expected[i] += (1 - going_on) / 3
        assert found.stopped_by(tokens) == pytest.approx(expected, abs=1e-5)
    assert (found.stopped_by(5) <= found.stopped_by(12) + 1e-6).all()
    assert desk.max_response > 12


def test_both_ways_agree_on_the_shipped_reference():
    """On 96 probes at most three are sorted otherwise, all of them near the border."""
    case, config = shipped(), AuditConfig(probes=96)
    found = Auditor(case.desk, case.reference, case.reward_model(), config, seed=1)
    stopped = found.stopped_by(int(config.brief_below))
    otherwise = (stopped >= 0.5) != (found.stratum == "brief")
    assert otherwise.sum() <= 3
    assert (np.abs(found.reference_length[otherwise] - config.brief_below) < 4).all()
    clear = np.abs(found.reference_length - config.brief_below) > 4
    assert clear.sum() > 70 and (stopped[clear & (found.stratum == "brief")] > 0.5).all()
