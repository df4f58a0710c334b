"""A PRM on the disk: what is stored comes back to the last bit, and what does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepkto_fast.errors import RunError
from stepkto_fast.policy import build_policy, build_tokenizer
from stepkto_fast.prm import PRM
from stepkto_fast.prm_files import load_prm, load_prm_and_tokenizer, save_prm
from stepkto_fast.prm_head import HEADS
from stepkto_fast.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture(params=HEADS)
def prm(request, model):
    torch.manual_seed(5)
    head = HEADS[request.param](model.config.hidden_size)
    with torch.no_grad():
        for tensor in head.state_dict().values():
            tensor.uniform_(0.5, 1.5)
    return PRM(model, head, temperature=0.7)


@pytest.mark.parametrize("beside", [True, False])
def test_it_comes_back_with_its_trunk(prm, model, tokenizer, rollouts, tmp_path, beside):
    if beside:
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    for _ in range(2):  # a second time replaces the first
        save_prm(prm, tmp_path, tokenizer, beside=model if beside else None)
    assert (tmp_path / "prm_trunk").exists() is not beside
    assert not list(tmp_path.glob(".unfinished*"))
    again, words = load_prm_and_tokenizer(tmp_path, CPU)
    assert words.get_vocab() == tokenizer.get_vocab()
    assert again.temperature == 0.7
    assert again.score(rollouts, Recipe()) == prm.score(rollouts, Recipe())
    assert again.label([0.4, 1.5]) == prm.label([0.4, 1.5])
    assert load_prm(tmp_path, CPU, tokenizer).score(rollouts[:1], Recipe()) == prm.score(rollouts[:1], Recipe())


@pytest.mark.parametrize("calibrated", [True, False])
def test_whether_it_is_calibrated_comes_back(prm, tokenizer, tmp_path, calibrated):
    prm.calibrated = calibrated
    save_prm(prm, tmp_path, tokenizer)
    assert load_prm(tmp_path, CPU).calibrated is calibrated


@pytest.mark.parametrize("change", ["weights", "size"])
def test_another_model_beside_it_is_refused(prm, model, tokenizer, tmp_path, change):
    save_prm(prm, tmp_path, tokenizer, beside=model)
    if change == "weights":
        with torch.no_grad():
            model.get_decoder().layers[1].self_attn.v_proj.weight[0, 0] += 1e-3
    else:
        model = build_policy(tokenizer, hidden_size=64, layers=1, heads=2, max_length=96, seed=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"is not the one that .*head\.safetensors was fitted on"):
        load_prm(tmp_path, CPU)


def test_another_vocabulary_is_refused(prm, tokenizer, tmp_path):
    save_prm(prm, tmp_path, tokenizer)
    with pytest.raises(RunError, match="reads another vocabulary"):
        load_prm(tmp_path, CPU, build_tokenizer(["other words"]))


def test_damage_is_named(prm, tokenizer, tmp_path):
    with pytest.raises(RunError, match=r"holds no PRM: prm_config.json is not there"):
        load_prm(tmp_path, CPU)
    save_prm(prm, tmp_path, tokenizer)
    head, config = tmp_path / "prm_head" / "head.safetensors", tmp_path / "prm_config.json"
    good, settings = head.read_bytes(), config.read_text()

    def refused(words: str) -> None:
        with pytest.raises(RunError, match=words):
            load_prm(tmp_path, CPU)

    head.write_bytes(good[: len(good) // 2])
    refused("head.safetensors cannot be read")
    tensors = load_file_of(good, tmp_path)
    save_file({k: v for k, v in tensors.items() if k != "threshold"}, head)
    refused("threshold")
    save_file({**tensors, "mean": tensors["mean"][:-1]}, head)
    refused("size mismatch")
    head.unlink()
    refused("head.safetensors cannot be read")
    head.write_bytes(good)
    wrong = {"pooling": "mean", "hidden_size": "32", "trunk": "../elsewhere", "temperature": 0, "calibrated": 1}
    for key, value in wrong.items():
        config.write_text(json.dumps({**json.loads(settings), key: value}))
        refused(f"prm_config.json: {key} is {value!r}")
    config.write_text(json.dumps({**json.loads(settings), "surplus": 1}))
    refused("surplus")
    config.write_text("[1]")
    refused("is not a PRM's")
    config.write_text(settings[:-20])
    refused("is damaged")
    config.write_text(settings)
    (tmp_path / "prm_trunk" / "config.json").unlink()
    refused("prm_trunk' has no config.json")


def load_file_of(content: bytes, folder) -> dict:
    path = folder / "copy.safetensors"
    path.write_bytes(content)
    return load_file(path)
