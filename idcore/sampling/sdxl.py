"""Schedules for SDXL-Lightning and for the v1.1 path of PuLID, from diffusers' schedulers where they give the
published timesteps and sigmas.

PuLID v1 samples SDXL-Lightning with DPM++ 2M on trailing timesteps (its published pipeline): 4 steps stand at
t = 999, 749, 499, 249, that is sigma = 14.6146, 4.0817, 1.6129, 0.6932. PuLID v1.1 samples on Karras' sigmas with DPM++
2M, or with DPM++ SDE on Lightning models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    from .dpmpp_sde import DpmppSdeScheduler

SAMPLERS = ("dpmpp_2m", "euler")
KARRAS_SAMPLERS = ("dpmpp_2m", "dpmpp_sde")
NAMES = ("lightning", "lightning-euler", "karras-2m", "karras-sde", "own")


def few_step_scheduler(
    config: Mapping[str, Any], sampler: str = "dpmpp_2m", final_sigma: str = "zero"
) -> DPMSolverMultistepScheduler | EulerDiscreteScheduler:
    """A trailing-timestep scheduler made from a pipeline's own scheduler config.

    Args:
        config: `pipe.scheduler.config`; its betas and prediction type are kept.
        sampler: "dpmpp_2m" (PuLID's published choice) or "euler" (SDXL-Lightning's own recommendation).
        final_sigma: "zero" ends at sigma 0; "sigma_min" ends at the sigma of t = 0 as older diffusers did
            (dpmpp_2m only).

    Raises:
        InputError: unknown sampler or final sigma.
    """
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    if sampler not in SAMPLERS:
        raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if final_sigma not in ("zero", "sigma_min"):
        raise InputError(f'final_sigma must be "zero" or "sigma_min", got {final_sigma!r}')
    if sampler == "euler":
        if final_sigma != "zero":
            raise InputError('final_sigma="sigma_min" is there for dpmpp_2m only; euler ends at 0')
        return EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing", use_karras_sigmas=False)
    return DPMSolverMultistepScheduler.from_config(
        config,
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_karras_sigmas=False,
        final_sigmas_type=final_sigma,
    )


def karras_scheduler(
    config: Mapping[str, Any], sampler: str = "dpmpp_2m"
) -> DPMSolverMultistepScheduler | DpmppSdeScheduler:
    """The v1.1 path: Karras' sigmas (rho 7, Karras et al., arXiv 2206.00364, eq. 5) from the model's largest to its
    smallest sigma, then 0.

    Args:
        config: `pipe.scheduler.config`; its betas and prediction type are kept.
        sampler: "dpmpp_2m" (one pass a step; PuLID v1.1's choice for ordinary SDXL models, 25 steps) or "dpmpp_sde"
            (two passes a step but the last; its choice for Lightning models, 5 steps).

    Raises:
        InputError: unknown sampler.
    """
    from diffusers import DPMSolverMultistepScheduler

    from .dpmpp_sde import DpmppSdeScheduler

    if sampler not in KARRAS_SAMPLERS:
        raise InputError(f"sampler must be one of {', '.join(KARRAS_SAMPLERS)}, got {sampler!r}")
    if sampler == "dpmpp_sde":
        return DpmppSdeScheduler.from_config(config)
    return DPMSolverMultistepScheduler.from_config(
        config,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        use_karras_sigmas=True,
        final_sigmas_type="zero",
    )


def scheduler_by_name(name: str, config: Mapping[str, Any], own: Any = None) -> Any:
    """A scheduler by the name that `IDPipeline` takes.

    Args:
        name: "lightning" (DPM++ 2M, trailing), "lightning-euler" (Euler, trailing), "karras-2m", "karras-sde" (the v1.1
            path), or "own" (the pipeline's).
        config: `pipe.scheduler.config`.
        own: the pipeline's scheduler.

    Raises:
        InputError: unknown name.
    """
    made = {
        "lightning": lambda: few_step_scheduler(config),
        "lightning-euler": lambda: few_step_scheduler(config, "euler"),
        "karras-2m": lambda: karras_scheduler(config),
        "karras-sde": lambda: karras_scheduler(config, "dpmpp_sde"),
        "own": lambda: own,
    }
    if name not in made:
        raise InputError(f"sampler must be one of {', '.join(NAMES)}, got {name!r}")
    return made[name]()


def fresh_copy(scheduler: Any) -> Any:
    """A scheduler with the same tables whose state is its own: `set_timesteps` and `step` leave the first alone."""
    made = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(made, name, list(value))
    return made
