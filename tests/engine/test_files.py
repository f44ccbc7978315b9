"""Files: never half of one, never a pickle, every failure one sentence."""

import ast
import errno
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import fake_rollout, tiny_model

from minirlhf import checkpoints
from minirlhf.engine import files
from minirlhf.engine.files import StoreError

ROOT = Path(__file__).parents[2]


def test_tensors_come_back_bit_for_bit_with_their_notes(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {
        "f32": torch.randn(3, 4, generator=g),
        "f64": torch.randn(2, generator=g, dtype=torch.float64),
        "view": torch.arange(12).view(3, 4).T,  # not contiguous
        "mask": torch.tensor([True, False]),
        "state": g.get_state(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
    }
    tensors["alias"] = tensors["f32"]  # shared storage is refused by safetensors itself
    path = files.save_tensors(tmp_path / "deep" / "x.safetensors", tensors, {"step": 3, "ä": "ö"})
    loaded, meta = files.load_tensors(path)
    assert meta == {"step": 3, "ä": "ö"} and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype


def test_model_round_trip_and_the_vocabulary_it_belongs_to(tmp_path):
    model = tiny_model(3, dtype=torch.float32)
    path = checkpoints.save_model(tmp_path / "m.safetensors", model, vocabulary="abc", seed=4)
    again = checkpoints.load_model(path, vocabulary="abc")
    assert again.config == model.config
    tokens = torch.tensor([[0, 3, 4, 2]])
    for a, b in zip(model(tokens), again(tokens), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(StoreError, match=r"another vocabulary \(abc, .* xyz\): use the desk.toml"):
        checkpoints.load_model(path, vocabulary="xyz")
    assert files.load_tensors(path)[1]["seed"] == 4


def test_rollout_round_trip(tmp_path):
    rollout = fake_rollout(0)
    path = checkpoints.save_rollout(tmp_path / "r.safetensors", rollout, beta=0.05)
    again, meta = checkpoints.load_rollout(path)
    assert meta["beta"] == 0.05 and again.tensors().keys() == rollout.tensors().keys()
    for name, tensor in rollout.tensors().items():
        assert torch.equal(getattr(again, name), tensor), name


def test_the_wrong_kind_of_file_is_named(tmp_path):
    model = checkpoints.save_model(tmp_path / "m.st", tiny_model(), vocabulary="v")
    rollout = checkpoints.save_rollout(tmp_path / "r.st", fake_rollout(0))
    foreign = files.save_tensors(tmp_path / "f.st", {"x": torch.zeros(1)}, {})
    with pytest.raises(StoreError, match=r"r.st holds a rollout, not a model"):
        checkpoints.load_model(rollout, vocabulary="v")
    with pytest.raises(StoreError, match=r"m.st holds a model, not a rollout"):
        checkpoints.load_rollout(model)
    for load in (checkpoints.load_rollout, lambda p: checkpoints.load_model(p, vocabulary="v")):
        with pytest.raises(StoreError, match="foreign file"):
            load(foreign)


def test_a_model_of_other_sizes_than_it_says_is_refused(tmp_path):
    meta = files.load_tensors(checkpoints.save_model(tmp_path / "m", tiny_model(), vocabulary="v"))[
        1
    ]
    broken = [
        {**meta, "config": {**meta["config"], "d_model": 16}},
        {**meta, "config": {**meta["config"], "layers": 2}},
        {"kind": "model", "vocabulary": "v"},
    ]
    for i, notes in enumerate(broken):
        path = files.save_tensors(tmp_path / f"b{i}", tiny_model().state_dict(), notes)
        with pytest.raises(StoreError, match=r"b\d does not hold the model it describes") as error:
            checkpoints.load_model(path, vocabulary="v")
        assert "\n" not in str(error.value)


def test_a_rollout_that_does_not_fit_is_refused(tmp_path):
    tensors = fake_rollout(0).tensors()
    path = files.save_tensors(
        tmp_path / "r", {**tensors, "scores": torch.zeros(2)}, {"kind": "rollout"}
    )
    with pytest.raises(StoreError, match=r"(?s)not a usable rollout: .*'scores'"):
        checkpoints.load_rollout(path)
    path = files.save_tensors(tmp_path / "q", {"mask": tensors["mask"]}, {"kind": "rollout"})
    with pytest.raises(StoreError, match="not a usable rollout"):
        checkpoints.load_rollout(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_checkpoint_is_one_sentence(tmp_path, keep):
    path = checkpoints.save_model(tmp_path / "m.safetensors", tiny_model(), vocabulary="v")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=r"m.safetensors is damaged or not a safetensors file"):
        checkpoints.load_model(path, vocabulary="v")


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(StoreError, match=r"no file .*nowhere: check the path"):
        files.load_tensors(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not a tensor in sight")
    for path in (tmp_path / "text", tmp_path):
        with pytest.raises(StoreError, match="restore it or make it anew"):
            files.load_tensors(path)
    with pytest.raises(StoreError, match="cannot read"):
        files.read_json(tmp_path / "text")
    with pytest.raises(StoreError, match="cannot read"):
        files.read_json(tmp_path / "nowhere")


def full_disk(path: Path) -> None:
    path.write_bytes(b"half of")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_and_no_scrap(tmp_path):
    path = files.write_text(tmp_path / "summary.json", "old")
    with pytest.raises(StoreError, match=r"cannot write .*No space left on device; free some"):
        files.write_atomic(path, full_disk)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_spares_the_old_checkpoint(tmp_path, monkeypatch):
    old = tiny_model(0, dtype=torch.float32)
    path = checkpoints.save_model(tmp_path / "m.safetensors", old, vocabulary="v")
    digest = files.sha256(path)
    monkeypatch.setattr(files, "save_file", lambda tensors, p, metadata: full_disk(p))
    with pytest.raises(StoreError, match="an earlier version of the file is untouched"):
        checkpoints.save_model(path, tiny_model(1), vocabulary="v")
    assert files.sha256(path) == digest and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_no_scrap_either(tmp_path):
    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "x", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*choose another folder"):
        files.write_text(tmp_path / "file" / "inside.json", "x")


def test_json_is_strict_and_utf8(tmp_path):
    value = {"b": [1, 2.5, None, "é"], "a": True}
    path = files.write_json(tmp_path / "x.json", value)
    assert files.read_json(path) == value
    assert path.read_bytes().endswith(b"}\n") and b"\r" not in path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == value


def test_tables_keep_names_types_and_gaps(tmp_path):
    rows = [{"step": 1, "kl": 0.5, "name": "a"}, {"step": 2, "kl": None, "name": "b"}]
    path = files.write_table(tmp_path / "m.parquet", iter(rows))
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["step", "kl", "name"] and frame["step"].tolist() == [1, 2]
    assert pd.isna(frame["kl"][1])
    assert pd.read_parquet(files.write_table(path, frame)).equals(frame)


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_nothing_in_the_package_pickles():
    forbidden = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
    for path in (ROOT / "minirlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Attribute):
                names = [f"{getattr(node.value, 'id', '')}.{node.attr}"]
            hits = forbidden & set(names) or {"torch.load", "torch.save"} & set(names)
            assert not hits, f"{path.name}:{node.lineno} uses {hits}"


def test_plain_values_are_json():
    value = {1: (np.float32(0.5), float("nan"), np.int64(3)), "s": frozenset({"b", "a"})}
    assert files.plain(value) == {"1": [0.5, None, 3], "s": ["a", "b"]}
