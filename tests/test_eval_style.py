"""Style: the toy world's own dances, where every genre's choreography is known."""

import numpy as np
import torch

from eval import style
from eval.style import world


def ground_truth():
    """(films, beats, genres) of each genre twice, at a tempo of its own."""
    films, beats, genres = [], [], list(world.GENRES) * 2
    look = {"subject": "person", "count": 1, "place": "studio", "camera": "01"}
    for i, genre in enumerate(genres):
        scene = world.draw_scene(np.random.default_rng((5, i)), **look, genre=genre)
        beat = 0.4 + torch.arange(73) / 30 * (80 + 3 * i) / 60
        films.append(world.render(scene, beat))
        beats.append(beat.numpy())
    return films, beats, genres


def test_style_tells_the_genres_choreographies_apart():
    films, beats, genres = ground_truth()
    share, nearest = style.style(films, beats, genres)
    assert share >= 0.9 and len(nearest) == 20
    assert style.style(films, beats, genres[1:] + genres[:1])[0] <= 0.1  # of another song
    assert style.style([film[:, :, ::-1] for film in films], beats, genres)[0] >= 0.9  # mirrored


def test_a_film_without_two_whole_beats_dances_nothing():
    films, beats, genres = ground_truth()
    first = genres.index("BR")
    short, at = films[first][:20], np.linspace(0.2, 1.5, 20)
    assert style.style([short], [at], ["BR"]) == (0, [None])
    films[first], beats[first] = short, at
    assert style.consistency(films, beats, genres)[0] >= 0.4


def test_consistency_asks_for_the_same_dance_whatever_it_is_called():
    films, beats, genres = ground_truth()
    share, chance, deviation = style.consistency(films, beats, genres)
    assert share >= 0.5 and 0 < chance < 0.25 and 0 < deviation < 0.15  # parts of the dances differ
    other = dict(zip(world.GENRES, [*list(world.GENRES)[1:], "BR"]))
    assert style.consistency(films, beats, [other[genre] for genre in genres])[0] == share
    half = genres[:10] + genres[11:] + genres[:1]  # the two of a genre have two names
    assert style.consistency(films, beats, half)[0] <= 0.2
    assert np.isnan(style.consistency(films[:10], beats[:10], genres[:10])[0])
