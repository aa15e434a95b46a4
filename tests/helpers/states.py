"""What hangs on a model and what a run gives, to be compared; exceptions and threads at chosen places."""

import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import fresh
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on the modules of `model`, by identity, and its configurations by value.

    Objects are held, so that an identity is not given away a second time. What models with M-RoPE remember of the last
    prompt is not looked at: they write it down in every forward.
    """
    found: dict[str, Any] = {"state_dict": list(model.state_dict())}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        for key, value in vars(module).items():
            found[name, key] = None if key == "rope_deltas" else Same(value)
            if isinstance(value, dict):
                found[name, key, "items"] = [(entry, Same(inner)) for entry, inner in value.items()]
            elif isinstance(value, list | set | tuple):
                found[name, key, "items"] = list(map(Same, value))
        for field in ("config", "generation_config"):
            if hasattr(vars(module).get(field), "to_dict"):
                found[name, field, "values"] = vars(module)[field].to_dict()
    return found


class Same:
    """Equal to the same object only."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} at {id(self.value):#x}"


def hook_counts(model: nn.Module) -> dict[tuple[str, str], int]:
    """Number of hooks of each kind on each module that has some."""
    return {
        (name, key): len(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "hooks" in key and isinstance(value, dict) and value
    }


def logits(model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**fresh(inputs), **kwargs).logits


def same_run(out: Any, wanted: Any) -> bool:
    """Whether two generations agree bit for bit."""
    pairs = zip(out.logits, wanted.logits, strict=True)
    return torch.equal(out.sequences, wanted.sequences) and all(torch.equal(one, other) for one, other in pairs)


class Interrupt:
    """A hook on a decoder layer that raises while it is armed."""

    def __init__(self, layer: nn.Module, error: type[BaseException] = RuntimeError, *, calls: int = 0) -> None:
        self.armed, self.error, self.left = True, error, calls
        layer.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.armed:
            self.left -= 1
            if self.left < 0:
                raise self.error("interrupted")


# --- threads --------------------------------------------------------------------------------------------------------


def replica_of(model: nn.Module) -> nn.Module:
    """What ``DataParallel`` makes of `model` for one of its threads, on the same device."""
    copying = importlib.import_module("torch.nn.parallel.replicate")

    def spread(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[one.clone() for one in tensors] for _ in devices]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "_broadcast_coalesced_reshape", spread)
        (found,) = copying.replicate(model, [0])
    return found


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """What each of `jobs` returns, all of them run at once; the first error is raised."""
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(i: int) -> None:
        try:
            start.wait(timeout=60)
            results[i] = jobs[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return results
