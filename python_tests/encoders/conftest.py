"""The demo photo and the shipped analyzer, loaded once."""

from pathlib import Path

import pytest

import idcore
from idcore.encoders.analyzer import EmbeddedAnalyzer
from idcore.encoders.images import load_image


@pytest.fixture(scope="session")
def photo_path():
    return Path(idcore.__file__).parent / "assets" / "photos" / "astronaut.png"


@pytest.fixture(scope="session")
def photo(photo_path):
    return load_image(photo_path)


@pytest.fixture(scope="session")
def analyzer():
    return EmbeddedAnalyzer("cpu", threads=2)


@pytest.fixture(scope="session")
def face(photo, analyzer):
    (found,) = analyzer.detect(photo)
    return found
