"""Models and batches as files: what each holds, and what is refused.

A checkpoint says what sizes it has and which vocabulary it was trained with, so that a stranger's
file is refused in one sentence. How a file is written and read is in engine/files.py.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from minirlhf.engine.files import StoreError, load_tensors, save_tensors
from minirlhf.model import Transformer, TransformerConfig
from minirlhf.reward import RewardModel
from minirlhf.rollout import Rollout


def save_model(path: Path, model: Transformer, *, vocabulary: str, **meta: Any) -> Path:
    """Write a model with its sizes and the fingerprint of its vocabulary."""
    meta = {"kind": "model", "config": asdict(model.config), "vocabulary": vocabulary, **meta}
    return save_tensors(path, model.state_dict(), meta)


def load_model(path: Path, *, vocabulary: str) -> Transformer:
    """Read a model; StoreError if it is no model or was trained with another vocabulary."""
    tensors, meta = load_tensors(path)
    return build_model(tensors, meta, vocabulary=vocabulary, source=path)


def build_model(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, vocabulary: str, source: Path
) -> Transformer:
    """The model that loaded `tensors` and `meta` describe; `source` names them in errors."""
    if meta.get("kind") != "model":
        raise StoreError(f"{source} holds a {meta.get('kind', 'foreign file')}, not a model")
    if meta["vocabulary"] != vocabulary:
        raise StoreError(
            f"{source} was trained with another vocabulary ({meta['vocabulary']}, the desk's is "
            f"{vocabulary}): use the desk.toml it was trained on, or train it anew"
        )
    try:
        model = Transformer(TransformerConfig(**meta["config"]))
        model.load_state_dict(dict(tensors))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        # torch lists every tensor that does not fit, one a line: the last one is enough
        reason = str(error).split("\n\t")[-1]
        raise StoreError(
            f"{source} does not hold the model it describes ({reason}); make it anew"
        ) from error
    return model


def save_rollout(path: Path, rollout: Rollout, **meta: Any) -> Path:
    """Write a PPO batch and what is known about it."""
    return save_tensors(path, rollout.tensors(), {"kind": "rollout", **meta})


def load_rollout(path: Path) -> tuple[Rollout, dict[str, Any]]:
    """Read a PPO batch and its description. Raises StoreError."""
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "rollout":
        raise StoreError(f"{path} holds a {meta.get('kind', 'foreign file')}, not a rollout")
    try:
        return Rollout(**tensors), meta
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path} is not a usable rollout: {error}") from error


def reward_from(
    tensors: dict[str, Tensor], meta: dict[str, Any], vocabulary: str, source: Path
) -> RewardModel:
    """The reward model of a checkpoint, on its scale."""
    trunk = build_model(tensors, meta, vocabulary=vocabulary, source=source)
    return RewardModel(trunk, **meta["scale"])
