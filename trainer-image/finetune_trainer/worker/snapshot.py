"""The files of a checkpoint in host memory, as they are at one moment, to be written while training goes on.

The library's own save runs as it is and decides on names, formats and content; only its writes of tensors are held. So
a checkpoint looks the same whether it was written at once or later.
"""

from __future__ import annotations

import copy
import errno
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import peft.peft_model
import torch
import transformers.modeling_utils
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune_trainer.worker.memory import available_bytes

# Written by the library unasked; it is a pickle of its settings.
_NEVER_HELD = ("training_args.bin",)
# Where the libraries write safetensors: the name under which each of them knows save_file.
_TENSOR_WRITERS = ((peft.peft_model, "safe_save_file"), (transformers.modeling_utils, "safe_save_file"))
# Of the memory that is free: the rest is for training itself.
_LARGEST_SHARE = 0.5
_UNCHANGING = (int, float, bool, str, bytes, type(None))
_write_pickled = torch.save
_find_adapter_state = peft.peft_model.get_peft_model_state_dict
_Write = Callable[[Any, Path], None]
_Kind = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


@dataclass(frozen=True)
class HeldFile:
    """A file that is not written yet; write(content, path) writes it."""

    path: Path
    content: Any
    write: _Write


class Snapshot:
    """The held files of one checkpoint. The buffers serve the next one again, where shapes are equal.

    A file that would take more than half of the host memory that this process's share of the node has left is not held
    but written at once: training waits for it, as it would without snapshots.
    """

    def __init__(self, processes: int = 1) -> None:
        """processes: how many on this node take snapshots at the same time."""
        self.files: list[HeldFile] = []
        self._processes = processes
        self._buffers: dict[_Kind, list[Tensor]] = {}
        self._free: dict[_Kind, list[Tensor]] = {}
        self._adapters: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Inside, files of tensors that the libraries write are held; all others they write as ever.

        The files of the snapshot before must be written by now: their buffers are taken.
        """
        self.files = []
        self._free, self._buffers = self._buffers, defaultdict(list)
        _wait_for_gpu()  # what pages between host and GPU is read from the host
        with ExitStack() as seams:
            seams.enter_context(_replaced(torch, "save", self._hold_pickled))
            for module, name in _TENSOR_WRITERS:
                seams.enter_context(_replaced(module, name, self.hold_tensors))
            seams.enter_context(_replaced(peft.peft_model, "get_peft_model_state_dict", self._adapter_state))
            # A text for people, which nobody reads in a checkpoint and which takes PEFT longer than the copy.
            seams.enter_context(_replaced(peft.PeftModel, "create_or_update_model_card", lambda model, folder: None))
            yield
        _wait_for_gpu()
        self._free = {}

    def hold_tensors(self, tensors: Mapping[str, Tensor], path: str | Path, metadata: Any = None) -> None:
        """Hold a safetensors file."""
        self._hold(Path(path), dict(tensors), lambda content, target: save_file(content, target, metadata))

    def _hold_pickled(self, content: Any, file: Any, **options: Any) -> None:
        if not isinstance(file, str | os.PathLike):
            _write_pickled(content, file, **options)
        elif Path(file).name not in _NEVER_HELD:
            self._hold(Path(file), content, partial(_write_to_file, **options))

    def _adapter_state(
        self, model: nn.Module, state_dict: Any = None, *, adapter_name: str, **options: Any
    ) -> dict[str, Tensor]:
        """What PEFT puts into an adapter's file. It walks the model many times to find that, so it is asked only once.

        What it gives is asked for anew where it is no part of the model's memory, as a soft prompt that is computed.
        """
        known = self._adapters.get(adapter_name)
        if state_dict is None and known and all(t.data_ptr() == p.data_ptr() for t, p in known.values()):
            return {name: tensor for name, (tensor, _) in known.items()}
        found: dict[str, Tensor] = _find_adapter_state(model, state_dict, adapter_name, **options)
        weights = {(p.data_ptr(), p.shape, p.dtype): p for p in model.parameters()}
        places = {name: (t.data_ptr(), t.shape, t.dtype) for name, t in found.items()}
        if state_dict is None and weights.keys() >= set(places.values()):
            self._adapters[adapter_name] = {name: (t, weights[places[name]]) for name, t in found.items()}
        return found

    def _hold(self, path: Path, content: Any, write: _Write) -> None:
        if not self._fits(content):
            _write_at(path, content, write)
            return
        copies = _Copies(self._buffer)
        held = copies.of(content)
        copies.fill()
        self.files.append(HeldFile(path, held, write))

    def _fits(self, content: Any) -> bool:
        pieces = {_place(tensor): host_bytes(tensor) for tensor in _tensors(content)}
        free = Counter({kind: len(buffers) for kind, buffers in self._free.items()})
        new = 0
        for (_, kind), size in pieces.items():
            free[kind] -= 1
            new += size if free[kind] < 0 else 0
        return new == 0 or new <= _LARGEST_SHARE * available_bytes() / self._processes

    def _buffer(self, tensor: Tensor, kind: _Kind) -> Tensor:
        free = self._free.get(kind)
        buffer = free.pop() if free else torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._buffers[kind].append(buffer)
        return buffer

    def write(self) -> None:
        """Write every held file. Raises OSError with ENOSPC where the disk is full, and what the formats' writers raise."""
        for file in self.files:
            _write_at(file.path, file.content, file.write)

    def release(self) -> None:
        """Give the memory back; what was held must be written by now."""
        self.files, self._buffers = [], {}
        if torch.accelerator.is_available():
            torch.accelerator.empty_host_cache()

    def discard(self) -> None:
        """Delete what of the held files was written: the disk may be full."""
        for file in self.files:
            file.path.unlink(missing_ok=True)


def host_bytes(tensor: Tensor) -> int:
    """Host memory that a copy of tensor takes, in bytes.

    A copy from a GPU is pinned, and torch's allocator of pinned memory takes the next power of two for each block
    (c10's CachingHostAllocator, where no pinned_max_round_threshold_mb is set).
    """
    size = tensor.nbytes
    return 1 << (size - 1).bit_length() if tensor.is_cuda and size > 0 else size


def _write_at(path: Path, content: Any, write: _Write) -> None:
    try:
        write(content, path)
    except Exception as error:
        if _disk_is_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _write_to_file(content: Any, path: Path, **options: Any) -> None:
    # Given a path, torch keeps Python's global lock for as long as the write takes, and hides why one failed.
    with path.open("wb") as file:
        _write_pickled(content, file, **options)


def _disk_is_full(error: BaseException | None) -> bool:
    """torch's writer reports a wrong position and has the reason in its context; that of safetensors has it as text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if f"(os error {errno.ENOSPC})" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif type(value) in (list, tuple):
        for inner in value:
            yield from _tensors(inner)


def _place(tensor: Tensor) -> tuple[int, _Kind]:
    """Equal for tensors that are one piece of memory; and what a buffer for it has to be like."""
    return tensor.data_ptr(), (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class _Copies:
    """Copies of what one file holds; what is one piece of memory in it stays one."""

    def __init__(self, buffer: Callable[[Tensor, _Kind], Tensor]) -> None:
        self._buffer = buffer
        self._pairs: dict[tuple[int, _Kind], tuple[Tensor, Tensor]] = {}

    def of(self, value: Any) -> Any:
        """value with buffers in place of its tensors; the rest is copied too, so that nobody changes it any more."""
        if isinstance(value, Tensor):
            place = _place(value)
            if place not in self._pairs:
                source = value.detach()
                source = source if type(source) is Tensor else source.as_subclass(Tensor)
                self._pairs[place] = source, self._buffer(source, place[1])
            return self._pairs[place][1]
        if isinstance(value, dict):
            fresh = copy.copy(value)
            fresh.update((key, self.of(inner)) for key, inner in value.items())
            return fresh
        if type(value) in (list, tuple):
            return type(value)(self.of(inner) for inner in value)
        return value if type(value) in _UNCHANGING else copy.deepcopy(value)

    def fill(self) -> None:
        """Copy the tensors into their buffers."""
        if self._pairs:
            sources, buffers = zip(*self._pairs.values(), strict=True)
            torch._foreach_copy_(buffers, sources, non_blocking=True)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
