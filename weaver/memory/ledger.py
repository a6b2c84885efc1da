"""A device without numbers: what is computed on it takes memory on paper only, and the most that it held is known.

Tensors there are PyTorch's meta tensors. Every operation's result is written down when it is made and struck out when
its storage dies, so the package's own functions run on it as they are, and none needs to say what it allocates.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weaver.memory.answers import ANSWERS
from weaver.memory.scratch import scratch_bytes
from weaver.memory.shape_rules import ShapeRules

__all__ = ["WEIGHTS", "WORKING", "Ledger", "Peak"]

WEIGHTS = "weights"  # parameters, also those that are copied to the device or to another type
WORKING = "working"  # what is computed and not held under a name
_GPU_BLOCK = 512  # PyTorch's allocator hands out whole blocks on a GPU


@dataclass
class Peak:
    """The most bytes held at a time, `total`, and what they were then, by name."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Ledger(TorchDispatchMode):
    """Within its `with` block, what meta tensors would hold on a device of kind `device` is counted.

    Parameters
    ----------
    device : "cpu", where tensors that really are on the CPU count too, or another kind, where they do not
    rules : to be shared by several; None begins anew

    What needs a number of a tensor, to print it or to choose by it, gets zeros, or true (`weaver.memory.answers`).
    Attention is counted as a fused kernel's, and on the CPU convolutions and attention with the memory that PyTorch's
    kernels take for themselves (`weaver.memory.scratch`); a GPU's libraries take theirs uncounted.
    """

    def __init__(self, device: str, rules: ShapeRules | None = None):
        super().__init__()
        self.device = device
        self.kinds = ("meta", "cpu") if device == "cpu" else ("meta",)
        self.held: Counter[str] = Counter()
        self._live: dict[int, tuple[int, str, weakref.ref]] = {}
        self._peaks: list[Peak] = []
        self._entered: list[ExitStack] = []
        self.run = rules or ShapeRules()

    def __enter__(self):
        self._entered.append(ExitStack())
        self._entered[-1].enter_context(_fused_attention())
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._entered.pop().close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        answer = ANSWERS.get(func)
        result = self.run(func, args, kwargs) if answer is None else answer(self, func, args, kwargs)
        if not func.is_view and not func._schema.is_mutable:
            copied = func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter)
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._note(leaf, WEIGHTS if copied else WORKING)
        self._raise_peaks(scratch_bytes(func, args, result) if self.device == "cpu" else 0)
        return result

    @property
    def total(self) -> int:
        """Bytes that are held now."""
        return sum(self.held.values())

    def size(self, tensor: torch.Tensor) -> int:
        """Bytes of a tensor's storage on the device; 0 if it is elsewhere."""
        if tensor.device.type not in self.kinds:
            return 0
        nbytes = tensor.untyped_storage().nbytes()
        return nbytes if self.device == "cpu" else -(-nbytes // _GPU_BLOCK) * _GPU_BLOCK

    def hold(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of these tensors under a name, known before or not."""
        for tensor in tensors:
            self._note(tensor, name)

    def release(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of these tensors no longer, as if nothing held them."""
        for key in {tensor.untyped_storage()._cdata for tensor in tensors}:
            self._strike(key)

    @contextmanager
    def more(self, name: str, nbytes: int) -> Iterator[None]:
        """Within the block that many bytes more are held under a name: what a longer run would have."""
        self.held[name] += nbytes
        try:
            yield
        finally:
            self.held[name] -= nbytes

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """The peak within the block, which is complete when the block is left; blocks may be nested."""
        peak = Peak()
        self._peaks.append(peak)
        self._raise_peaks(0)
        try:
            yield peak
        finally:
            self._peaks.pop()  # by place: nested ones may be equal

    def _note(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.device.type not in self.kinds:
            return
        storage, nbytes = tensor.untyped_storage(), self.size(tensor)
        key = storage._cdata
        if key in self._live:
            if name != WORKING:
                known, before, reference = self._live[key]
                self.held[before] -= known
                self.held[name] += known
                self._live[key] = known, name, reference
            return
        # A storage's Python object lives as long as the storage.
        self._live[key] = nbytes, name, weakref.ref(storage, lambda _: self._strike(key))
        self.held[name] += nbytes

    def _strike(self, key: int) -> None:
        nbytes, name, _ = self._live.pop(key, (0, WORKING, None))
        self.held[name] -= nbytes

    def _raise_peaks(self, scratch: int) -> None:
        total = self.total + scratch
        for peak in self._peaks:
            if total > peak.total:
                peak.total = total
                peak.parts = _with(self.held, WORKING, scratch)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Within the block `scaled_dot_product_attention` of meta tensors is one kernel, where PyTorch would write it out.

    The function itself is replaced, not a mode set: PyTorch leaves modes while it goes back through a graph, where
    checkpointing computes attention again.
    """
    written_out = F.scaled_dot_product_attention

    @wraps(written_out)
    def attention(query, key, value, *args, **kwargs):
        if query.device.type != "meta" or query.ndim != 4:
            return written_out(query, key, value, *args, **kwargs)
        given = dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        if (mask := given.get("attn_mask")) is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype)
        if (groups := query.shape[1] // key.shape[1]) > 1:
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        options = {"attn_mask": mask, "scale": given.get("scale")}
        return fused(query, key, value, 0.0, bool(given.get("is_causal", False)), **options)[0]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = written_out


def _with(held: Mapping[str, int], name: str, more: int) -> dict[str, int]:
    found = {part: nbytes for part, nbytes in held.items() if nbytes}
    found[name] = found.get(name, 0) + more
    return found
