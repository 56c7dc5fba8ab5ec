"""What the tests of the page share."""

import pytest
from checkout import ROOT
from streamlit.testing.v1 import AppTest


@pytest.fixture
def open_page(tiny, tiny_served, monkeypatch):
    """Opens a page of the application, as AppTest, with the tiny models to choose from."""
    monkeypatch.setenv("TASKBOOK_MODELS", " ".join(map(str, [*tiny_served.values(), tiny / "gpt2"])))

    def opened(page: str, language: str = "en") -> AppTest:
        app = AppTest.from_file(ROOT / "deploy" / "app.py", default_timeout=60)
        app.query_params["page"] = page
        app.run()
        if language != "en":
            app.segmented_control[0].set_value(language).run()
        assert not app.exception and not app.error
        return app

    return opened
