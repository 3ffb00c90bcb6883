"""docs/settings.md is what the code says."""

from __future__ import annotations

from scripts import make_settings_docs


def test_the_page_of_settings_is_up_to_date() -> None:
    assert make_settings_docs.page() == make_settings_docs.PAGE.read_text("utf-8")
