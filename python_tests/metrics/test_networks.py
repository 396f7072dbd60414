"""Networks by path: CLIP equals transformers' own call, feature networks give what their file computes."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import save_tiny_clip

from idcore.errors import InputError, MissingDependencyError, WeightsError
from idcore.metrics.networks import Clip, feature_network


def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    save_tiny_clip(path)
    return path


def test_clip_scores_are_transformers_own(folder):
    from transformers import CLIPModel, CLIPProcessor

    pictures, prompts = [picture(0), picture(1, (64, 64))], ["a cat", "a portrait, oil on canvas " * 20]
    ours = Clip(folder)
    whole = CLIPProcessor(image_processor=ours.processor, tokenizer=ours.tokenizer)
    inputs = whole(text=prompts, images=pictures, return_tensors="pt", padding="max_length", truncation=True)
    with torch.no_grad():
        truth = CLIPModel.from_pretrained(folder).eval()(**inputs)
    a, b = (torch.from_numpy(x) for x in (ours(pictures), ours.text(prompts)))
    torch.testing.assert_close(torch.nn.functional.normalize(a), truth.image_embeds, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.nn.functional.normalize(b), truth.text_embeds, atol=1e-6, rtol=1e-5)


def test_the_key_is_that_of_the_weights(folder, tmp_path):
    save_tiny_clip(tmp_path / "other", seed=1)
    assert Clip(folder).key == Clip(folder).key != Clip(tmp_path / "other").key


def test_folders_that_are_no_clip(folder, tmp_path):
    with pytest.raises(WeightsError, match="has no config.json; wanted a folder with a CLIP model .*nothing is downl"):
        Clip(tmp_path)
    shutil.copytree(folder, tmp_path / "tower")
    tensors = load_file(folder / "model.safetensors")
    kept = {k: t for k, t in tensors.items() if not k.startswith("text_")}
    save_file(kept, tmp_path / "tower" / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="CLIP: .*tower lacks .* tensors .*wanted text and image towers"):
        Clip(tmp_path / "tower")


class Patches(torch.nn.Module):
    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = x.float().mean((2, 3))
        return means if return_features else means.sum(1, keepdim=True)


def test_a_torchscript_file_is_asked_for_features_in_runs_of_one_size(tmp_path):
    torch.jit.script(Patches()).save(str(tmp_path / "net.pt"))
    net = feature_network(str(tmp_path / "net.pt"))
    pictures = [picture(0), picture(1), picture(2, (9, 9)), picture(3)]
    truth = np.stack([np.asarray(p, np.float32).mean((0, 1)) for p in pictures])
    np.testing.assert_allclose(net(pictures), truth, rtol=1e-5)
    assert net.key.startswith("torchscript:") and "net.pt" in net.words


def test_the_embedded_features_see_pictures_not_their_size():
    net = feature_network("embedded")
    a, b = picture(0), picture(1)
    found = net([a, b, a.resize((160, 120), Image.Resampling.NEAREST)])
    assert found.shape == (3, 736) and found.dtype == np.float32
    assert np.linalg.norm(found[0] - found[2]) < np.linalg.norm(found[0] - found[1])


def test_what_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="there is no file .*missing.pt; nothing is downloaded"):
        feature_network(str(tmp_path / "missing.pt"))
    (tmp_path / "x.pt").write_bytes(b"not a network")
    with pytest.raises(WeightsError, match="is no TorchScript network"):
        feature_network(str(tmp_path / "x.pt"))
    with pytest.raises(InputError, match='wanted "embedded", clip:FOLDER'):
        feature_network(" ")


def test_torch_fidelity_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(MissingDependencyError, match=r"pip install 'idcore\[fid\]'"):
        feature_network(f"torch-fidelity:{tmp_path / 'w.pth'}")
