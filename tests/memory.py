"""Counts the memory of tensors, whatever the allocator: what peaks of a process cannot tell of small models."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors of at least `least` bytes that come to be in this context and exist at once."""

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.least, self.bytes, self.most = least, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((arguments, named)) if torch.is_tensor(leaf)}
        result = function(*arguments, **(named or {}))
        for tensor in (leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if size >= self.least and key not in before | self._known:
                self._known.add(key)
                self.bytes += size
                self.most = max(self.most, self.bytes)
                weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
