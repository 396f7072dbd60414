"""What a run is made of, as whole named tensors and plain values, whatever the number of processes and their shards.

Functions that take shards are collective: every process calls them, and process 0 gets the result.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..files import require_keys
from .optimise import Average, local, set_rate


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards, on the CPU, in memory of its own."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.to("cpu", copy=True).contiguous()


def place(value: Tensor, into: Tensor) -> None:
    """Copy a whole tensor into one that may be a shard. Only what process 0 brings counts."""
    if hasattr(into, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(into.device, into.dtype), into.device_mesh, into.placements).to_local()
    local(into).copy_(value)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {k: whole(v) for k, v in module.state_dict().items()}


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Put whole tensors into a module.

    Raises:
        WeightsError: the names or shapes are others.
    """
    mine = module.state_dict()
    require_keys(tensors, {k: v.shape for k, v in mine.items()}, what)
    with torch.no_grad():
        for name, into in mine.items():
            place(tensors[name], into)


def average_tensors(average: Average, module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict with the averaged weights."""
    average.swap()
    try:
        return module_tensors(module)
    finally:
        average.swap()


def load_average(average: Average, module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Put an averaged state dict into `average`; the module stays as it is."""
    average.swap()
    try:
        load_module(module, tensors, what)
    finally:
        average.swap()


def _parts(value: Tensor) -> dict[str, Tensor]:
    """The plain tensors of one that is packed (8-bit states): by attribute; {"": value} for a usual one."""
    if hasattr(value, "__tensor_flatten__") and not hasattr(value, "full_tensor"):
        names, _ = value.__tensor_flatten__()
        return {f"#{n}{rest}": t for n in names for rest, t in _parts(getattr(value, n)).items()}
    return {"": value}


def _optimised(module: nn.Module, optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, parameter in module.named_parameters():
        if parameter in optimiser.state:
            yield name, optimiser.state[parameter]


def optimiser_state(module: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by "what.parameter", and the numbers among the state by parameter."""
    tensors, numbers = {}, {}
    for name, state in _optimised(module, optimiser):
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors |= {f"{key}{part}.{name}": whole(t) for part, t in _parts(value).items()}
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def load_optimiser(
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Mapping[str, Any]],
    what: str,
) -> None:
    """Bring an optimiser to a saved state; the module's weights stay as they are.

    Raises:
        WeightsError: the state is another optimiser's.
    """
    _prime(optimiser)
    left, known = dict(tensors), {k.split(".", 1)[1] for k in tensors} | set(numbers)
    for name, parameter in module.named_parameters():
        if name not in known:
            optimiser.state.pop(parameter, None)  # no step has used it yet
    with torch.no_grad():
        for name, state in _optimised(module, optimiser):
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    state[key] = _taken(numbers.get(name, {}), key, f"{key} of {name}", what)
                    continue
                for part, into in _parts(value).items():
                    full = f"{key}{part}.{name}"
                    saved = _taken(left, full, full, what)
                    if saved.shape != into.shape:
                        raise WeightsError(
                            f"{what}: {full} is {list(saved.shape)}, this optimiser's is {list(into.shape)}"
                        )
                    place(left.pop(full), into)
    if left:
        raise WeightsError(f"{what}: {len(left)} tensors of another optimiser, the first {next(iter(left))}")


def _taken(values: Mapping[str, Any], key: str, name: str, what: str) -> Any:
    if key not in values:
        raise WeightsError(f"{what}: the optimiser's state lacks {name}; it was saved by another optimiser")
    return values[key]


def _prime(optimiser: torch.optim.Optimizer) -> None:
    """Make the optimiser allocate its state, by a step of rate 0 along no gradient (the loop sets
    the rate anew before each step)."""
    weights = [(p, local(p).clone()) for group in optimiser.param_groups for p in group["params"]]
    set_rate(optimiser, 0.0)
    for parameter, _ in weights:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    for parameter, kept in weights:
        local(parameter).copy_(kept)  # even a zero keeps its sign


def seed_all(seed: int) -> None:
    """Python's, NumPy's and PyTorch's own generators; tasks draw from `contract.Step`, layers (dropout) from these."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of Python's, NumPy's and PyTorch's own generators: tensors, and plain values."""
    version, words, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state()
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors, {"python": [version, gauss], "numpy": [name, int(pos), int(has_gauss), float(cached)]}


def load_random_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any], device: torch.device) -> None:
    version, gauss = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, pos, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def keep_random_state(device: torch.device) -> Callable[[], None]:
    """Remember the generators; the function returned brings them back."""
    tensors, plain = random_state(device)
    return lambda: load_random_state(tensors, plain, device)
