"""Systems by what their weights file holds, and the command line on them."""

from pathlib import Path

import face_adapter_naive as naive
import numpy as np
import pytest
import torch
from naive_attention import one_thread  # noqa: F401
from PIL import Image

import idcore
from idcore.errors import InputError, WeightsError
from idcore.generating import GenerateRequest, generate_pictures
from idcore.identity import Identity
from idcore.systems.face_adapter import FaceAdapterConfig
from idcore.systems.face_projectors import ProjectorConfig
from idcore.systems.faceid import FaceID
from idcore.systems.instantid import InstantID
from idcore.systems.loading import fetched, load_system, system_of
from idcore.systems.pulid import PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig
from idcore.testing.tiny_models import tiny_pipeline, tiny_unet
from idcore.weights import write_safetensors
from idcore.workflows import chosen_files, encode_photos


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, unet = tmp_path_factory.mktemp("weights"), tiny_unet("sdxl")
    for kind, variant in (("faceid", None), ("faceid-plus", "plusv2"), ("instantid", None)):
        naive.make(kind, unet, variant).save(folder / f"{kind}.safetensors")
    encoder = EncoderConfig("v1", id_dim=12, vit_dim=10, width=16, output_dim=14)
    PuLID(PuLIDConfig.for_unet(unet, encoder)).save(folder / "pulid.safetensors", "community")
    return folder


@pytest.mark.parametrize("file,name,cls", [
    ("pulid", "pulid", PuLID), ("faceid", "faceid", FaceID), ("faceid-plus", "faceid", FaceID),
    ("instantid", "instantid", InstantID),
])  # fmt: skip
def test_the_file_says_which_system(files, file, name, cls):
    path = files / f"{file}.safetensors"
    assert system_of(path) == name and isinstance(load_system(path, for_photos=False), cls)
    other = "pulid" if name != "pulid" else "faceid"
    with pytest.raises(WeightsError, match=f"wanted weights of {other}, .* holds {name}"):
        load_system(path, system=other)


def test_refusals(files, tmp_path):
    with pytest.raises(InputError, match="system must be \"auto\", pulid, .*dreamidentity.*, got 'magic'"):
        load_system(files / "faceid.safetensors", system="magic")
    with pytest.raises(WeightsError, match="instantid needs its adapter weights.*idcore fetch instantid --convert"):
        load_system(None, system="instantid")
    with pytest.raises(WeightsError, match="also reads photos with CLIP ViT-H/14: pass --vision FOLDER"):
        load_system(files / "faceid-plus.safetensors")
    with pytest.raises(WeightsError, match="does not load as a CLIP vision model"):
        load_system(files / "faceid-plus.safetensors", vision=tmp_path)
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    with pytest.raises(WeightsError, match="holds no identity system; .* it is of layout unknown"):
        system_of(tmp_path / "x.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    with pytest.raises(WeightsError, match="it is a torch pickle: convert it first"):
        system_of(tmp_path / "x.bin")


def test_a_clip_folder_gives_the_plus_forms_their_tower(files, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=20, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    system = load_system(files / "faceid-plus.safetensors", vision=tmp_path)
    assert system.variant == "plusv2" and system.preprocess.normalise
    assert system.preprocess._look(torch.zeros(1, 3, 28, 28)).shape == (1, 5, 20)
    assert not load_system(files / "instantid.safetensors").preprocess.normalise


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_photo_to_pictures_with_a_faceid_that_reads_the_embedded_recogniser(tmp_path, kind):
    """The whole way on random weights: photo, identity, LoRA and attention on a saved pipeline, and off again."""
    pipe, width = tiny_pipeline(kind), 64 if kind == "sdxl" else 32
    pipe.save_pretrained(tmp_path / "base")
    config = FaceAdapterConfig.for_unet(pipe.unet, ProjectorConfig("faceid", width, 4, 128))
    torch.manual_seed(0)
    system = FaceID(config)
    lora = {f"ip_adapter.{k}": t for k, t in naive.lora_part(pipe.unet, width).items()}
    system.lora_tensors.update(lora)
    weights = system.save(tmp_path / "faceid.safetensors")

    photo = Path(idcore.__file__).parent / "assets/photos/astronaut.png"
    identity = encode_photos([photo], system="faceid", weights=weights)
    assert identity.system == "faceid" and identity.tokens.shape == (1, 4, width)
    banked = encode_photos([photo], system="faceid", weights=weights, bank=tmp_path / "base")
    assert torch.equal(banked.tokens, identity.tokens) and len(banked.banks) == 1 and not identity.banks
    identity.save(tmp_path / "me.safetensors")
    request = dict(prompt="x", base=str(tmp_path / "base"), weights=weights, steps=2, width=16, height=16)

    def pictures(out, **more):
        return [np.asarray(Image.open(p)) for p in generate_pictures(GenerateRequest(out=out, **request, **more))]

    (with_id,) = pictures(tmp_path / "a", id=tmp_path / "me.safetensors")
    (again,) = pictures(tmp_path / "b", id=photo, system="faceid")
    (without,) = pictures(tmp_path / "c")
    assert np.array_equal(with_id, again) and not np.array_equal(with_id, without)
    assert Identity.load(tmp_path / "me.safetensors").system == "faceid"


def test_a_fetched_recipe_brings_its_own_files(files, tmp_path, monkeypatch):
    monkeypatch.setenv("IDCORE_HOME", str(tmp_path))

    def put(name, text="x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    with pytest.raises(
        WeightsError,
        match="pulid-v1.1 was not fetched wholly: .*idcore fetch pulid-v1.1 --needs --convert --accept-licence",
    ):
        fetched("pulid-v1.1")
    weights = put("pulid-v1.1/pulid_v1.1.safetensors")
    assert fetched("pulid-v1.1", for_photos=False) == {"weights": weights}
    with pytest.raises(WeightsError, match="eva-clip has no EVA02_CLIP_L_336_psz14_s6B.pt that can be read"):
        fetched("pulid-v1.1")
    rest = [put(n) for n in ("eva-clip/eva_clip.safetensors", "bisenet/parsing_bisenet.safetensors",
                             "retinaface/retinaface.safetensors")]  # fmt: skip
    for n in ("scrfd_10g_bnkps.onnx", "glintr100.onnx"):
        put(f"antelopev2/{n}")
    want = dict(zip(("vision", "parsing", "retinaface"), rest))
    assert fetched("pulid-v1.1") == {"weights": weights, **want, "faces": str(tmp_path / "antelopev2")}
    for n in ("buffalo-l/det_10g.onnx", "buffalo-l/w600k_r50.onnx", "clip-vit-h/config.json",
              "clip-vit-h/model.safetensors",
              "faceid-plusv2-sd15/ip-adapter-faceid-plusv2_sd15.safetensors"):  # fmt: skip
        put(n)
    plus = fetched("faceid-plusv2-sd15")
    assert plus["vision"] == tmp_path / "clip-vit-h" and plus["faces"] == str(tmp_path / "buffalo-l")
    with pytest.raises(InputError, match="eva-clip is no system; those are pulid-v1, pulid-v1.1, faceid-sd15"):
        fetched("eva-clip")
    # what is given counts more than what was fetched; the file there is no weights file
    given = {"weights": files / "pulid.safetensors", "faces": "embedded", "vision": None}
    assert chosen_files("pulid-v1.1", given, for_photos=True)["weights"] == files / "pulid.safetensors"
    with pytest.raises(InputError, match='system must be "tiny" .embedded model., "auto", pulid, .* got .magic.'):
        chosen_files("magic", given, for_photos=True)
    put("instantid/instantid.safetensors")
    bare = {"weights": None, "faces": "embedded"}
    assert chosen_files("instantid", bare, for_photos=False)["weights"] == tmp_path / "instantid/instantid.safetensors"
    assert chosen_files("faceid", bare, for_photos=False) == {"system": "faceid", **bare}


def test_the_command_line_takes_a_recipe_for_a_system(files, tmp_path, monkeypatch):
    monkeypatch.setenv("IDCORE_HOME", str(tmp_path / "home"))
    unet = tiny_unet("sdxl")
    system = FaceID(FaceAdapterConfig.for_unet(unet, ProjectorConfig("faceid", 64, 4, 128)))
    (tmp_path / "home/faceid-sdxl").mkdir(parents=True)
    system.save(tmp_path / "home/faceid-sdxl/ip-adapter-faceid_sdxl.safetensors")
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "base")
    system.encode(torch.randn(128)).save(tmp_path / "me.safetensors")
    request = GenerateRequest(
        prompt="x", out=tmp_path / "out", id=tmp_path / "me.safetensors", base=str(tmp_path / "base"),
        system="faceid-sdxl", steps=1, width=16, height=16,
    )  # fmt: skip
    assert len(generate_pictures(request)) == 1
