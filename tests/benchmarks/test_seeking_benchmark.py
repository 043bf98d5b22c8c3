"""The benchmark of sampling long films times what it says, on films that are made once; at toy sizes."""

import json

import numpy as np

from benchmarks import seeking


def test_seeking_is_measured_on_films_that_are_made_once(tmp_path, capsys):
    seeking.main(["--cache", str(tmp_path), "--json"], seeking.TOY)
    document = json.loads(capsys.readouterr().out)
    assert set(document["figures"]) == {"seek_speedup", "seek_speedup_long_gop"} and document["what"] == "seeking"
    assert all(row["equal_frames"] and row["frames"] == 64 and row["num_film_frames"] == 1000 for row in document["rows"])
    keys = {row["model"]: row["key_frames"] for row in document["rows"]}
    assert 20 <= keys["segments"] <= 30 and 4 <= keys["long"] < 20  # a key frame every 2 s, and at scene changes
    films = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(films) == {film.file_name for film in seeking.TOY}
    assert seeking.make_film(tmp_path, seeking.TOY[0]).stat().st_mtime_ns == films[seeking.TOY[0].file_name]


def test_a_film_is_its_recipe():
    film = seeking.Film(length_s=15.0, width=64, height=48)
    first, again = list(seeking.scenes(film)), list(seeking.scenes(film))
    assert len(first) == film.num_frames == 375 and first[0].shape == (48, 64, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    changes = [np.abs(a.astype(int) - b).mean() for a, b in zip(first, first[1:], strict=False)]
    assert np.median(changes) > 0 and max(changes) > 10 * np.median(changes)  # things move, and scenes end
    assert len({film.file_name, seeking.Film().file_name, seeking.Film(seed=1).file_name}) == 3
