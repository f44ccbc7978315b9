"""An auditor with an untrained reference, and a reward model that counts tokens."""

import torch
from fakes import tiny_model

from minirlhf.audit.auditor import Auditor
from minirlhf.audit.config import AuditConfig
from minirlhf.desk.world import Desk
from minirlhf.reward import RewardModel
from minirlhf.text import right_pad

DESK = Desk.load()
VOCABULARY = DESK.vocabulary
CONFIG = AuditConfig(probes=10, reference_samples=3, brief_below=9.0, verbose_padding=5)
THANKS = "thank you for being so loyal ."  # 7 tokens of courtesy


class Ruler(RewardModel):
    """A reward model that counts tokens, EOS included."""

    def __init__(self):
        super().__init__(model())

    def forward(self, prompts, responses, mask):
        return mask.sum(1).float()


def model(seed: int = 0):
    context = DESK.prompt_width + DESK.max_response
    return tiny_model(seed, vocab=len(VOCABULARY), context=context, spread=1.0, dtype=torch.float32)


def auditor(reward_model=None, config: AuditConfig = CONFIG, **options) -> Auditor:
    return Auditor(DESK, model(), reward_model or Ruler(), config, **options)  # pyright: ignore


def encoded(answers: list[str]):
    ids = [[*VOCABULARY.encode(text), VOCABULARY.eos] for text in answers]
    return right_pad(ids, DESK.max_response)
