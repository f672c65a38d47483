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
