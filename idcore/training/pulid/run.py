"""`idcore train pulid`, callable from Python: models, data, and the stages one after the other, resumable anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...attention.sites import attention_of, find_sites
from ...errors import InputError, WeightsError
from ...photos import SUFFIXES
from ...results import is_result, read_result
from ...systems.pulid import PuLID, PuLIDConfig
from ...workflows import writable_folder
from ..bases.opening import analyzer_for, face_points, open_base
from ..contract import Base, Batch, Source
from ..launching import join
from ..loop import train
from ..losses.faces import DetectedFace, FixedFace, Recogniser
from ..losses.identity import IdentityLoss
from ..processes import device_of, from_first, of_all, rank_and_world, together
from ..resuming import begun
from .config import STAGES, PuLIDTrainConfig
from .task import PuLIDTask, features_of
from .validation import Guest, Judge, Validator

RESULT = "model"
Say = Callable[[str], None]


def train_pulid(
    config: PuLIDTrainConfig,
    source: Source,
    out: str | Path,
    *,
    stages: Sequence[int] = STAGES,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    say: Say = lambda text: None,
) -> Path:
    """Train the stages in order; each has a folder OUT/stageN of its own and begins with the weights of the one before.

    Args:
        config: all settings.
        source: prepared data with the face features that `config.face.features` names.
        out: folder of the run.
        stages: which, ascending. The first begins with OUT/stage(N-1)'s result, else with `config.init`, else (stage 1
            alone) anew.
        resume: go on where the run was stopped: stages that are done are passed over.
        allow_change: see `loop.train`.

    Returns:
        The result: OUT/model after stage 3 or the last of `stages`; the newest checkpoint's folder where
        `loop.stop_at` ended a stage early.

    Raises:
        InputError, WeightsError, TrainingStopped: see `loop.train`.
    """
    stages, out = sorted(set(stages)), Path(out)
    join(config.loop)
    with together():
        writable_folder(out)
        check_stages(config, out, stages, resume)
        check_bases(config)
        models = Models(config)
        if hasattr(source, "check_base"):  # prepared data may hold latents of another autoencoder
            source.check_base(models.base)
        if getattr(source, "texts", None) is not None:
            models.base.use_texts(source.texts)
    for number in stages:
        folder = out / f"stage{number}"
        if from_first(is_result(folder / RESULT)):
            say(f"stage {number} is done ({folder / RESULT})")
            continue
        made = _train_stage(models, config, source, out, number, resume, allow_change, say)
        if made.name != RESULT:
            return made
    with together():
        if rank_and_world()[0] == 0:
            _publish(out / f"stage{stages[-1]}" / RESULT, out / RESULT)
    return out / RESULT


def _train_stage(
    models: Models, config: PuLIDTrainConfig, source: Source, out: Path, number: int, resume: bool,
    allow_change: Sequence[str], say: Say,
) -> Path:  # fmt: skip
    folder, loop = out / f"stage{number}", config.loop_of(number)
    going_on = from_first(resume and begun(folder))
    with together():
        start = start_weights(config, out, number)
        begins = "going on" if going_on else f"from {start}" if start else "from new weights"
        say(f"stage {number}: {loop.steps} steps, {begins}")
        task = models.task(models.system(start), number, source)
    facts = {"stage": number, "start": str(start) if start else "new weights"}
    try:
        return train(
            task, source, loop, folder, resume=going_on, facts=facts, settings=config, allow_change=allow_change
        )
    finally:
        task.close()


def check_stages(config: PuLIDTrainConfig, out: Path, stages: Sequence[int], resume: bool) -> None:
    """Raise InputError for stages that cannot be trained in OUT: unknown ones, one that is finished where nothing is
    to be resumed, or one whose start is missing and will not come about on the way."""
    if not stages or not set(stages) <= set(STAGES):
        raise InputError(f"PuLID's training has the stages 1, 2 and 3, got {list(stages)}")
    for number in stages:
        folder = out / f"stage{number}"
        if is_result(folder / RESULT):
            if not resume:
                raise InputError(f"{folder} holds a finished stage already; add --resume, or choose another --out")
        elif number - 1 not in stages:
            if number > stages[0] and not is_result(out / f"stage{number - 1}" / RESULT):
                raise InputError(
                    f"stage {number} begins with the weights of stage {number - 1}, which --stage leaves out"
                )
            start_weights(config, out, number)


def check_bases(config: PuLIDTrainConfig) -> None:
    """Raise InputError for bases that no process would train on."""
    world = rank_and_world()[1]
    if len(config.bases) > world:
        raise of_all(InputError(
            f"settings: model.base and model.others are {len(config.bases)} models, one for each process, and "
            f"{'one process runs' if world == 1 else f'{world} processes run'}: start at least {len(config.bases)} "
            "(torchrun --nproc-per-node), or name fewer"
        ))  # fmt: skip


def start_weights(config: PuLIDTrainConfig, out: Path, number: int) -> Path | None:
    """What a stage begins with; None: new weights.

    Raises:
        InputError: stage 2 or 3 without a stage before it.
    """
    before = out / f"stage{number - 1}" / RESULT
    if number > 1 and is_result(before):
        return before / read_result(before).weights
    if config.init is not None:
        return Path(config.init)
    if number == 1:
        return None
    raise InputError(
        f"stage {number} begins with the weights of stage {number - 1}: there is no {before}; train that stage first, "
        "or set init to PuLID weights"
    )


def _publish(result: Path, final: Path) -> None:
    """Copy a stage's result to where the run's result is looked for: result.json, which makes it one, last."""
    staging = final.with_name(f".{final.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(result, staging)
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)


class Models:
    """The frozen models of a run, loaded once for all its stages."""

    def __init__(self, config: PuLIDTrainConfig) -> None:
        if config.loop.compile:
            raise InputError("settings: loop.compile: PuLID's training puts processors on the UNet as it is; set false")
        self.config = config
        self.device = device_of(config.loop)
        rank, _ = rank_and_world()
        self.base = load_base(config.bases[rank % len(config.bases)], config, self.device)
        fast = config.model.fast
        self.fast = self.base if fast is None else load_base(fast, config, self.device)
        self._judge: IdentityLoss | None = None
        self._preprocess: Any = None

    def system(self, weights: Path | None) -> PuLID:
        """The system with new weights, or those of a file."""
        if weights is None:
            return new_system(self.config, self.base).to(self.device)
        wanted = PuLIDConfig.for_unet(self.base.unet, self.config.encoder_config())
        system = PuLID.from_weights(weights)
        if (system.config.encoder, system.config.layers) != (wanted.encoder, wanted.layers):
            raise WeightsError(
                f"{weights} has the sizes {system.config.encoder} and {len(system.config.layers)} layers; the settings "
                f"want {wanted.encoder} and {len(wanted.layers)}. Set encoder.* and the base as they were"
            )
        return system.requires_grad_(True).to(self.device)

    def task(self, system: PuLID, number: int, source: Source) -> PuLIDTask:
        """A stage's task with its validator."""
        judge = self.judge() if number > 1 else None
        task = PuLIDTask(system, number, self.config, self.base, self.fast, judge)
        if self.config.loop.validate_every and rank_and_world()[0] == 0:
            task.validator = Validator(self.guests(source), self.judges(), self.config.validation)
        return task

    def judge(self) -> IdentityLoss:
        """L_id's recogniser, which finds faces as `face.analyzer` does; the tiny base draws them in one place."""
        if self._judge is None:
            face = self.config.face
            self._judge = IdentityLoss(load_recogniser(face).to(self.device), self._locate())
        return self._judge

    def _locate(self) -> Any:
        points = face_points(self.fast, self.config.model.resolution)
        return DetectedFace(self.analyzer()) if points is None else FixedFace(points)

    def analyzer(self) -> Any:
        return analyzer_for(self.config.face.analyzer, self.base)

    def judges(self) -> list[Judge]:
        from ...encoders.analyzer import analyzer_from

        second = self.config.validation.judge
        return [Judge("face", self.analyzer())] + ([] if second is None else [Judge("second", analyzer_from(second))])

    def guests(self, source: Source) -> list[Guest]:
        """The people of the validation: photos of a folder, or samples of the data in an order of their own."""
        v = self.config.validation
        if v.people is None:
            batch = next(iter(source.micro_batches(0, self.config.loop.seed + 1, 0, 1, v.count, 1)))
            return _guests_of(batch, self.base, self.device)
        from ...encoders.images import load_image

        photos = sorted(p for p in Path(v.people).glob("*") if p.suffix.lower() in SUFFIXES)[: v.count]
        if not photos:
            raise InputError(f"validation.people: no photos ({', '.join(SUFFIXES)}) in {v.people}")
        return [Guest(p.stem, load_image(p), self.preprocess()(p)) for p in photos]

    def preprocess(self) -> Any:
        """What reads photos for the encoder, as `face.features` says."""
        if self._preprocess is None:
            self._preprocess = make_preprocess(self.config)
        return self._preprocess


def make_preprocess(config: PuLIDTrainConfig) -> Any:
    """Photos to `PuLIDFeatures`.

    Raises:
        InputError: features "pulid" without a vision tower or with the embedded recogniser, which is not ArcFace.
    """
    face = config.face
    if face.features == "tiny-pulid":
        from ...encoders.dlib_tokens import DlibTokens

        return DlibTokens()
    if face.vision is None or face.analyzer == "embedded":
        raise InputError(
            "settings: features pulid are read by ArcFace and EVA02-CLIP-L-336: set face.analyzer to a folder in the "
            "layout of antelopev2 and face.vision to the tower's weights; or set face.features=tiny-pulid, which "
            "needs no download"
        )
    from ...encoders.analyzer import analyzer_from
    from ...encoders.pulid_preprocess import PuLIDPreprocess

    return PuLIDPreprocess.from_weights(analyzer_from(face.analyzer), face.vision, face.parsing, face.retinaface)


def load_base(name: str, config: PuLIDTrainConfig, device: torch.device) -> Base:
    """One of the frozen models, which must be able to draw `model.resolution`; see `open_base`."""
    base = open_base(name, dtype=getattr(torch, config.model.dtype), device=device)
    base.latent_shape(config.model.resolution, config.model.resolution)
    return base


def load_recogniser(face: Any) -> Recogniser:
    """L_id's network."""
    more = {} if face.measure == "auto" else {"measure": face.measure}
    return Recogniser.dlib(**more) if face.recogniser == "embedded" else Recogniser.arcface(face.recogniser, **more)


def new_system(config: PuLIDTrainConfig, base: Base) -> PuLID:
    """A PuLID for this base with new weights, the same for the same `loop.seed`.

    id_to_k and id_to_v begin as `encoder.init` says; taking the base's own text projections is what IP-Adapter's
    published training does for its layers.
    """
    sizes = PuLIDConfig.for_unet(base.unet, config.encoder_config())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.loop.seed)
        system = PuLID(sizes)
        for site in find_sites(base.unet):
            layer = system.id_adapter_attn_layers[str(site.index)]
            _begin(layer, attention_of(base.unet, site), config.encoder.init)
    return system


@torch.no_grad()
def _begin(layer: nn.Module, attn: nn.Module, how: str) -> None:
    for ours, theirs in ((layer.id_to_k, attn.to_k), (layer.id_to_v, attn.to_v)):
        same = how != "random" and ours.weight.shape == theirs.weight.shape
        if same:
            ours.weight.copy_(theirs.weight)
        else:
            nn.init.normal_(ours.weight, std=0.02)
    if how == "zero":
        layer.id_to_v.weight.zero_()


def _guests_of(batch: Batch, base: Base, device: torch.device) -> list[Guest]:
    """The samples as people; where latents alone are cached, their pictures are decoded."""
    from PIL import Image

    from ...encoders.pulid_features import PuLIDFeatures
    from ..losses.faces import as_bytes

    shown = batch.pixels
    if shown is None:
        with torch.no_grad():
            shown = base.decode(batch.latents.to(device))
    seen = features_of(batch)
    pictures = [Image.fromarray(a) for a in as_bytes(shown)]
    return [
        Guest(name, picture, PuLIDFeatures(seen.id_cond[i : i + 1], tuple(h[i : i + 1] for h in seen.hidden)))
        for i, (name, picture) in enumerate(zip(batch.ids, pictures))
    ]


__all__ = ["Models", "load_base", "make_preprocess", "new_system", "start_weights", "train_pulid"]
