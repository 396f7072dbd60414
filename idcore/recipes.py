"""Published weights by name: where each file is, its commit and SHA-256 where known, its licence, what it is for.

Nothing here downloads; `idcore fetch NAME` does (`idcore.hub`), `idcore doctor` looks what is there. A commit or hash
that is not known is empty: fetching then resolves the newest commit first, and notes commit and hash of what came.
"""

from __future__ import annotations

from dataclasses import dataclass

from idcore.errors import InputError


@dataclass(frozen=True)
class File:
    """One published file.

    Attributes:
        path: Place in the recipe's folder, with "/".
        repo: Repository of the Hugging Face hub, or "" where `url` is given.
        source: Path in the repository; `path` by default.
        revision: Commit, or "" where it is not known.
        sha256: 64 hex digits, or "" where they are not known.
        url: For a file that stands on no hub.
        converted: For torch pickles: the safetensors file, beside it, that idcore reads.
        optional: Whether the system works without it.
    """

    path: str
    repo: str = ""
    source: str = ""
    revision: str = ""
    sha256: str = ""
    url: str = ""
    converted: str = ""
    optional: bool = False

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        at = self.revision[:12] or "newest"
        return self.url or f"huggingface.co/{self.repo}/{self.source or self.path} at {at}"


@dataclass(frozen=True)
class Recipe:
    """Files that are fetched together.

    Attributes:
        name: As in `idcore fetch NAME`.
        what: One line.
        licence: As its publishers state it.
        files: The files.
        needs: Recipes without which photos cannot be encoded, or the base model that it was trained for.
        restricted: Non-commercial terms: fetching wants them accepted.
    """

    name: str
    what: str
    licence: str
    files: tuple[File, ...]
    needs: tuple[str, ...] = ()
    restricted: bool = False


_SDXL = ("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b")
_FACEID = ("h94/IP-Adapter-FaceID", "43907e6f44d079bf1a9102d9a6e56aef7a219bae")
_INSTANTID = ("InstantX/InstantID", "57b32dfee076092ad2930c71fd6d439c2c3b1820")
_LIGHTNING = ("ByteDance/SDXL-Lightning", "c9a24f48e1c025556787b0c58dd67a091ece2e44")
_INSIGHTFACE = "InsightFace models: non-commercial research only"


def _plain(repo: str, revision: str, *paths: str) -> tuple[File, ...]:
    return tuple(File(p, repo, "", revision) for p in paths)


def _base() -> tuple[File, ...]:
    """An SDXL pipeline folder in half precision, under the names that diffusers reads without a variant."""
    repo, commit = _SDXL
    weights = [f"{part}/model" for part in ("text_encoder", "text_encoder_2")]
    weights += [f"{part}/diffusion_pytorch_model" for part in ("unet", "vae")]
    texts = [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder_2/config.json",
        "unet/config.json", "vae/config.json",
    ]  # fmt: skip
    for folder in ("tokenizer", "tokenizer_2"):
        texts += [f"{folder}/{n}" for n in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json")]
        texts.append(f"{folder}/vocab.json")
    halves = tuple(File(f"{w}.safetensors", repo, f"{w}.fp16.safetensors", commit) for w in weights)
    return _plain(repo, commit, *texts) + halves


def _lightning(steps: int) -> Recipe:
    file = File(f"sdxl_lightning_{steps}step_unet.safetensors", _LIGHTNING[0], "", _LIGHTNING[1])
    name = "sdxl-lightning" if steps == 4 else f"sdxl-lightning-{steps}step"
    what = f"SDXL-Lightning, UNet for {steps} steps (arXiv 2402.13929)"
    return Recipe(name, what, "CreativeML Open RAIL++-M", (file,), ("sdxl-base",))


def _faceid(name: str, published: str, what: str, plus: bool, sha256: str = "") -> Recipe:
    pickle = File(f"{published}.bin", *_split(_FACEID), sha256, converted=f"{published}.safetensors")
    needs = ("buffalo-l", "clip-vit-h") if plus else ("buffalo-l",)
    return Recipe(name, what, "Non-commercial research only (its publishers' card)", (pickle,), needs, True)


def _split(place: tuple[str, str]) -> tuple[str, str, str]:
    return place[0], "", place[1]


_ALL = (
    Recipe(
        "pulid-v1", "PuLID v1 for SDXL (arXiv 2404.16022)", "Apache-2.0",
        (File("pulid_v1.bin", "guozinan/PuLID", converted="pulid_v1.safetensors"),),
        ("sdxl-lightning", "eva-clip", "antelopev2", "bisenet", "retinaface"),
    ),
    Recipe(
        "pulid-v1.1", "PuLID v1.1 for SDXL", "Apache-2.0",
        (File("pulid_v1.1.safetensors", "guozinan/PuLID",
              sha256="4cb8ceec1078e0165399b88332ab3c5971619111b8e1730e6bae64144aabae41"),),
        ("sdxl-base", "eva-clip", "antelopev2", "bisenet", "retinaface"),
    ),
    Recipe(
        "eva-clip", "EVA02-CLIP-L-14-336, PuLID's vision tower", "MIT",
        (File("EVA02_CLIP_L_336_psz14_s6B.pt", "QuanSun/EVA-CLIP", "", "11afd202f2ae80869d6cef18b1ec775e79bd8d12",
              "84c3a17a228c567a155259b2245b0b59072bf7da510260a0a02ec54de6d50b05", converted="eva_clip.safetensors"),),
    ),
    Recipe(
        "bisenet", "BiSeNet face parsing, PuLID's preprocessing", "MIT (facexlib)",
        (File("parsing_bisenet.pth", converted="parsing_bisenet.safetensors",
              url="https://github.com/xinntao/facexlib/releases/download/v0.2.0/parsing_bisenet.pth",
              sha256="468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567"),),
    ),
    Recipe(
        "retinaface", "RetinaFace ResNet-50, landmarks of PuLID's published preprocessing", "MIT (facexlib)",
        (File("detection_Resnet50_Final.pth", converted="retinaface.safetensors",
              url="https://github.com/xinntao/facexlib/releases/download/v0.1.0/detection_Resnet50_Final.pth",
              sha256="6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d"),),
    ),
    Recipe(
        "antelopev2", "SCRFD and ArcFace (glintr100), faces of PuLID and InstantID", _INSIGHTFACE,
        (File("scrfd_10g_bnkps.onnx", "DIAMONIK7777/antelopev2",
              sha256="5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91"),
         File("glintr100.onnx", "DIAMONIK7777/antelopev2",
              sha256="4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf")), (), True,
    ),
    Recipe(
        "buffalo-l", "SCRFD and ArcFace (w600k_r50), faces of FaceID", _INSIGHTFACE,
        tuple(File(n, "public-data/insightface", f"models/buffalo_l/{n}", "33c1063c49c785b7652d3fd529f86fa4f149392b")
              for n in ("det_10g.onnx", "w600k_r50.onnx")), (), True,
    ),
    Recipe(
        "clip-vit-h", "CLIP ViT-H/14, image tokens of FaceID Plus and PlusV2", "MIT (weights), Apache-2.0 (repository)",
        tuple(File(n, "h94/IP-Adapter", f"models/image_encoder/{n}", "018e402774aeeddd60609b4ecdb7e298259dc729")
              for n in ("config.json", "model.safetensors")),
    ),
    Recipe("sdxl-base", "Stable Diffusion XL 1.0, a pipeline folder, fp16", "CreativeML Open RAIL++-M", _base()),
    Recipe(
        "sdxl-vae", "SDXL's VAE that decodes in half precision", "MIT",
        _plain("madebyollin/sdxl-vae-fp16-fix", "207b116dae70ace3637169f1ddd2434b91b3a8cd",
               "config.json", "diffusion_pytorch_model.safetensors"),
    ),
    *(_lightning(steps) for steps in (4, 2, 8)),
    _faceid("faceid-sd15", "ip-adapter-faceid_sd15", "IP-Adapter FaceID for SD 1.5, with LoRA", False),
    _faceid("faceid-sdxl", "ip-adapter-faceid_sdxl", "IP-Adapter FaceID for SDXL, with LoRA", False),
    _faceid("faceid-plusv2-sd15", "ip-adapter-faceid-plusv2_sd15", "FaceID PlusV2 for SD 1.5, with LoRA", True),
    _faceid("faceid-plusv2-sdxl", "ip-adapter-faceid-plusv2_sdxl", "FaceID PlusV2 for SDXL, with LoRA", True,
            "c6945d82b543700cc3ccbb98d363b837e9c596281607857c74b713a876daf5fb"),
    _faceid("faceid-portrait-sdxl", "ip-adapter-faceid-portrait_sdxl", "FaceID Portrait for SDXL (five photos)", False,
            "5631ce7824cdafd2db37c5e85b985730a95ff59c5b4fc80c2b79b0bee5711512"),
    Recipe(
        "instantid", "InstantID for SDXL: adapter and IdentityNet (arXiv 2401.07519)", "Apache-2.0",
        (File("ip-adapter.bin", *_split(_INSTANTID), "02b3618e36d803784166660520098089a81388e61a93ef8002aa79a5b1c546e1",
              converted="instantid.safetensors"),
         File("ControlNetModel/config.json", *_split(_INSTANTID),
              "2480c42f363d712faae8d0e17cb850a5d1e4cafc232fbd022b1d43eee45234eb", optional=True),
         File("ControlNetModel/diffusion_pytorch_model.safetensors", *_split(_INSTANTID),
              "c8127be9f174101ebdafee9964d856b49b634435cf6daa396d3f593cf0bbbb05", optional=True)),
        ("sdxl-base", "antelopev2"),
    ),
)  # fmt: skip

RECIPES: dict[str, Recipe] = {r.name: r for r in _ALL}


def recipe(name: str) -> Recipe:
    """The recipe of that name; raises InputError that lists the names."""
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def fetch_command(name: str, *options: str) -> str:
    """The line that fetches a recipe, with what it asks of a user whose use its terms allow.

    Args:
        name: Of the recipe.
        options: Such as "--needs", "--convert".
    """
    wanted = [recipe(name), *(recipe(n) for n in recipe(name).needs if "--needs" in options)]
    restricted = any(r.restricted for r in wanted)
    return " ".join(["idcore fetch", name, *options, *(["--accept-licence"] if restricted else [])])
