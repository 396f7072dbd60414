"""Face embeddings in the files that diffusers' guide for IP-Adapter-FaceID saves."""

import pytest
import torch

from idcore.embeds import as_features, read_embeds
from idcore.errors import InputError, WeightsError
from idcore.systems.face_adapter import FaceAdapterConfig
from idcore.systems.face_projectors import ProjectorConfig
from idcore.systems.faceid import FaceID
from idcore.weights import write_safetensors


def as_the_guide_saves(n, path):
    """Normalised embeddings of n photos, unconditional zeros first, half precision."""
    faces = [torch.nn.functional.normalize(torch.randn(1, 12), dim=-1) for _ in range(n)]
    ref = torch.stack(faces).unsqueeze(0)
    embeds = torch.cat([torch.zeros_like(ref), ref]).half()
    torch.save([embeds], path)
    return embeds


def test_a_saved_list_gives_the_identity_of_its_photos(tmp_path):
    embeds = as_the_guide_saves(3, tmp_path / "image_embeds.ipadpt")
    (features,) = read_embeds(tmp_path / "image_embeds.ipadpt", unpickle=True)
    assert features.embeds.shape == (1, 3, 12) and not features.uncond_embeds.any()
    system = FaceID(FaceAdapterConfig(ProjectorConfig("faceid", 16, 4, 12), ((1, 8),)))
    identity = system.encode(features)
    assert identity.tokens.shape == (1, 12, 16) and identity.meta["photos"] == 3
    again = system.encode(embeds[1, :, 0].float())
    assert torch.equal(identity.tokens, again.tokens) and torch.equal(identity.uncond_tokens, again.uncond_tokens)
    write_safetensors(tmp_path / "e.safetensors", {"image_embeds.0": embeds})
    assert torch.equal(read_embeds(tmp_path / "e.safetensors")[0].embeds, features.embeds)


def test_a_stored_unconditional_half_is_used():
    t = torch.randn(4, 1, 12)
    (f,) = as_features(t)
    assert torch.equal(f.embeds, t[2:]) and torch.equal(f.uncond_embeds, t[:2])
    system = FaceID(FaceAdapterConfig(ProjectorConfig("faceid", 16, 4, 12), ((1, 8),)))
    uncond = system.encode(f).uncond_tokens
    torch.testing.assert_close(uncond, system(t[:2]).detach())
    assert len(as_features([t, t])) == 2 and as_features(t, guidance=False)[0].embeds.shape == (4, 1, 12)


def test_refusals(tmp_path):
    as_the_guide_saves(1, tmp_path / "p.ipadpt")
    with pytest.raises(WeightsError, match="torch pickle, which can carry code; .* unpickle=True"):
        read_embeds(tmp_path / "p.ipadpt")
    with pytest.raises(WeightsError, match="does not exist"):
        read_embeds(tmp_path / "none")
    torch.save({"a": torch.nn.Linear(2, 2)}, tmp_path / "code.ipadpt")
    with pytest.raises(WeightsError, match="does not open as plain tensors .* no code of it was run"):
        read_embeds(tmp_path / "code.ipadpt", unpickle=True)
    with pytest.raises(InputError, match="3 rows have no unconditional half; pass guidance=False"):
        as_features(torch.randn(3, 1, 12))
    with pytest.raises(InputError, match=r"got \[2, 257, 3, 4\].*image tokens of CLIP are no face embeddings"):
        as_features(torch.randn(2, 257, 3, 4))
    for wrong in ([], "x", [1], {"a": torch.randn(2, 1, 3)}):
        with pytest.raises(InputError, match="wanted a tensor or a list of tensors"):
            as_features(wrong)
