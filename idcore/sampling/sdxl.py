"""Few-step schedules for SDXL and SDXL-Lightning, from diffusers' schedulers.

PuLID v1 samples SDXL-Lightning with DPM++ 2M on trailing timesteps (its published pipeline): 4 steps stand at
t = 999, 749, 499, 249, that is sigma = 14.6146, 4.0817, 1.6129, 0.6932.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

SAMPLERS = ("dpmpp_2m", "euler")


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
        return EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    return DPMSolverMultistepScheduler.from_config(
        config,
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_karras_sigmas=False,
        final_sigmas_type=final_sigma,
    )
