"""A cache that does not grow for ever."""

from __future__ import annotations

from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class BoundedCache(dict[Key, Value]):
    """A dict that is cleared when it is full. Its keys are sizes of calls: few of them, or caching is no use."""

    MAX = 1024

    def __setitem__(self, key: Key, value: Value) -> None:
        if len(self) >= self.MAX and key not in self:
            self.clear()
        super().__setitem__(key, value)
