"""What the app does, without a browser and without gradio."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import idcore
from idcore.demo import PHOTO
from idcore.errors import InputError, NoFaceError, WeightsError
from idcore.identity import Identity
from idcore.serving import DrawRequest, SdxlEngine, TinyEngine
from idcore.testing.tiny_models import TinySystem, tiny_pipeline
from idcore.ui.page import Handlers
from idcore.ui.studio import Studio

PROMPT = "a photo of a person, blue background"


@pytest.fixture(scope="module")
def studio():
    return Studio(TinyEngine())


@pytest.fixture(scope="module")
def person(studio):
    return studio.enrol([PHOTO])


def values(person, count=2, prompt=PROMPT, scale=1.0, start=0.0, end=1.0, steps=4, seed=3):
    """What the page's controls send."""
    return person, prompt, scale, start, end, steps, seed, count


def test_pictures_come_in_parts_with_seeds_and_likeness(studio, person):
    shown = list(Handlers(studio).draw(*values(person, count=6)))
    assert [len(gallery) for gallery, _ in shown] == [4, 6] and shown[-1][1] == "6 of 6 drawn."
    pictures, captions = zip(*shown[-1][0])
    assert all(p.size == (256, 256) for p in pictures)
    assert [c.split(",")[0] for c in captions] == [f"seed {3 + i}" for i in range(6)]
    assert sum("same person" in c for c in captions) >= 5
    alone = studio.engine.pipe(PROMPT, person.identity, seed=4)[0]
    drawn = list(studio.draw(DrawRequest(PROMPT, people=(person.identity,), scales=(1.0,), seed=3, count=2), person))
    assert np.abs(np.asarray(drawn[-1][1].picture).astype(int) - np.asarray(alone)).max() <= 1


def test_without_a_person_there_is_no_likeness(studio):
    ((gallery, said),) = Handlers(studio).draw(*values(None, count=1))
    assert gallery[0][1] == "seed 3" and said == "1 of 1 drawn."


def test_several_photos_and_their_previews(studio, person):
    person_of_two, previews, _, said = Handlers(studio).enrol([str(PHOTO), str(PHOTO)])
    assert said == "A person from 2 photos." and person_of_two.faces.shape == (2, 128)
    assert len(previews) == 2 and max(previews[0].size) == 320
    assert Handlers(studio).enrol(None)[0] is None
    assert "0.0" not in repr(person)  # embeddings of faces stay out of logs


def test_identities_as_files(studio, person, tmp_path):
    do = Handlers(studio)
    path = do.enrol([str(PHOTO)]).file
    assert Identity.load(path).system == "tiny"
    again = do.open(path)
    assert again.person.faces is None and again.previews == []
    assert again.message == "A person from identity.safetensors; without a photo there is no similarity."
    assert Identity.load(again.file).tokens.equal(person.identity.tokens)
    first, second = (list(do.draw(*values(who, count=1)))[-1][0][0] for who in (person, again.person))
    assert np.array_equal(np.asarray(first[0]), np.asarray(second[0])) and second[1] == "seed 3"
    other = TinySystem(tiny_pipeline("sdxl").unet).identity()
    other.save(tmp_path / "other.safetensors")
    assert "made by the system 'tiny-random'" in do.open(str(tmp_path / "other.safetensors")).message
    kept = Path(studio._files.name)
    assert kept in Path(path).parents
    short = Studio(studio.engine)
    gone = short.save(person)
    short._files.cleanup()
    assert not gone.exists()


def test_wrong_files_are_messages_that_name_them(studio, tmp_path):
    wall, text, broken = tmp_path / "wall.png", tmp_path / "notes.png", tmp_path / "broken.safetensors"
    Image.new("RGB", (100, 100)).save(wall)
    text.write_text("hello")
    broken.write_bytes(b"0" * 100)
    do = Handlers(studio)
    for use, files, kind, says in [
        (
            do.enrol,
            [str(PHOTO), str(wall)],
            NoFaceError,
            "No face was found in wall.png. Choose a photo in which a",
        ),
        (do.enrol, [str(text)], InputError, "notes.png: The picture is not a picture that is known here; wanted JPEG"),
        (do.enrol, [str(tmp_path / "gone.png")], InputError, "gone.png cannot be read (No such file or directory)"),
        (do.enrol, [str(PHOTO)] * 9, InputError, "Up to 8 photos of one person, got 9"),
        (do.open, str(broken), WeightsError, "broken.safetensors: "),
    ]:
        found, previews, file, said = use(files)
        assert (found, previews, file) == (None, [], None) and said.startswith(says), said
        assert str(tmp_path) not in said
        with pytest.raises(kind):
            (studio.enrol if use == do.enrol else studio.open)(files)


def test_wrong_requests_are_messages(studio, person):
    do = Handlers(studio)
    for how, says in [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"start": 0.5, "end": 0.5}, "start and end must be 0 <= start < end <= 1"),
        ({"scale": 6.0}, "scales of identities must be 0 to 5"),
        ({"seed": -1}, "seed must be a whole number from 0"),
    ]:
        assert list(do.draw(*values(person, **how)))[0][1].startswith(says)


def test_sdxl_draws_one_by_one_with_its_own_controls():
    stock = tiny_pipeline("sdxl")
    studio = Studio(SdxlEngine(idcore.IDPipeline(stock, TinySystem(stock.unet))))
    shown = list(Handlers(studio).draw(*values(None, prompt="a dog"), "bad", 1.5, 32, 16))
    assert [said for _, said in shown] == ["1 of 2 drawn.", "2 of 2 drawn."]
    assert shown[-1][0][0][0].size == (256, 128)
