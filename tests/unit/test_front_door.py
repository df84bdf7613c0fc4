"""What ``import sidecast`` offers, and what it says where a package is missing."""

from __future__ import annotations

import sys

import pytest

import sidecast


@pytest.mark.parametrize(
    ("name", "module", "missing", "extra"),
    [
        ("NowcastCallback", "huggingface", "accelerate", "huggingface"),
        ("LightningNowcastCallback", "lightning", "lightning", "lightning"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    name: str, module: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"sidecast.trainer.integrations.{module}", raising=False)
    for loaded in [item for item in sys.modules if item.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"sidecast\.{name} needs .*sidecast\[{extra}\]"):
        getattr(sidecast, name)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="'sidecast' has no attribute 'detach'"):
        sidecast.detach  # noqa: B018
