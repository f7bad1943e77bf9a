"""What public functions say of wrong arguments, in the same words whichever backend would serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from effattn import use_backend


def refused(wrong: Mapping[str, tuple[Callable[[], Any], type[Exception], str]]) -> Callable[..., None]:
    """A test: by name, a call, the type of its error, and how its text begins."""

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize(("call", "error", "text"), wrong.values(), ids=wrong)
    def test(call: Callable[[], Any], error: type[Exception], text: str) -> None:
        for backend in ("cpu", "reference"):
            with use_backend(backend), pytest.raises(error) as raised:
                call()
            assert str(raised.value).startswith(text)

    return test
