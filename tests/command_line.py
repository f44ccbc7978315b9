"""Options that make a whole command small."""

SMALL = {"--device": "cpu", "--steps": 2, "--prompts": 30, "--critic-batches": 1, "--ppo.batch": 16}

SMALL |= {"--sft.steps": 5, "--sft.demonstrations": 60, "--preferences.pairs": 80}

SMALL |= {"--reward.batch": 32, "--ppo.epochs": 1, "--audit.probes": 16}

SMALL = ["--quick", *(str(word) for option in SMALL.items() for word in option)]
