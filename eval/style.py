"""Does the music alone choose the dance? On the toy world, whose choreographies are known."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from tiny import world


def silhouettes(film):
    """(T, H, W) in [0, 1]: where a frame differs from its row's median over the film, in front of
    an even backdrop; rolled so that the figure is in the middle."""
    x = torch.from_numpy(np.ascontiguousarray(film)).float() / 255  # (T, H, W, 3)
    backdrop = x.permute(1, 0, 2, 3).flatten(1, 2).median(1).values[:, None]  # (H, 1, 3)
    figure = (((x - backdrop).abs().sum(-1) - 0.15) * 4).clamp(0, 1)
    weight = figure.mean((0, 1)).square()  # (W,)
    middle = (weight * torch.arange(len(weight))).sum() / weight.sum().clamp(min=1e-6)
    return figure.roll(round(len(weight) / 2 - middle.item()), 2)


def held_poses(film, beats):
    """Features (K - 1, 512) of the K whole beats of a film: the silhouettes of each two that follow
    each other, 16x16, whatever the colours. beats (T,): the position of every frame, in beats."""
    figure = F.adaptive_avg_pool2d(silhouettes(film), 16).flatten(1)  # (T, 256)
    whole = np.arange(np.ceil(beats[0]), np.floor(beats[-1]) + 1)
    frames = np.interp(whole, beats, np.arange(len(film))).round().astype(int)
    held = figure[frames]  # (K, 256)
    return torch.cat([held[:-1], held[1:]], 1)


def rendered_poses(genre, seed, advanced):
    """held_poses of one rendering of a genre's choreography and of its mirror image."""
    look = {"subject": "person", "count": 1, "place": "studio", "camera": "01"}
    scene = world.draw_scene(np.random.default_rng(seed), **look, genre=genre, advanced=advanced)
    beats = torch.arange(0, 8.6, 0.2)  # all eight poses, and over again
    film = world.render(scene, beats)
    return [held_poses(film, beats.numpy()), held_poses(film[:, :, ::-1], beats.numpy())]


@functools.cache
def choreographies(renderings=4):
    """({genre: unit features of its poses}, what all have in common), of the world's renderings."""
    bank = {}
    for i, genre in enumerate(world.GENRES):
        poses = []
        for k in range(renderings):
            poses += rendered_poses(genre, (99, i, k), advanced=k % 2 > 0)
        bank[genre] = torch.cat(poses)
    common = torch.cat(list(bank.values())).mean(0)
    return {genre: F.normalize(poses - common, dim=1) for genre, poses in bank.items()}, common


def nearest_genre(film, beats):
    """The genre whose poses are the most like a film's: the best mean, over each two poses that
    follow each other, of the correlation with the most alike of the genre's. None where no two
    do."""
    bank, common = choreographies()
    found = F.normalize(held_poses(film, np.asarray(beats)) - common, dim=1)
    if not len(found):
        return None
    alike = {genre: likeness(found, poses) for genre, poses in bank.items()}
    return max(alike, key=alike.get)


def likeness(poses, others):
    """The mean over unit features (K, 512) of their products with the most alike of the others."""
    if not (len(poses) and len(others)):
        return 0.0
    return (poses @ others.T).amax(1).mean().item()


def style(films, beats, genres):
    """(share, [genre]): how many films, made with the plain prompt to songs of these genres (codes
    such as "BR"), dance nearest to their song's genre, and the genre nearest to each. Chance: 0.1.

    films: uint8 (T, H, W, 3) each. beats (T,) each: the position of every frame, in beats.
    """
    nearest = [nearest_genre(film, at) for film, at in zip(films, beats, strict=True)]
    right = [found == genre for found, genre in zip(nearest, genres, strict=True)]
    return float(np.mean(right)), nearest


def consistency(films, beats, genres, shuffles=300):
    """(share, chance, its deviation): how many films are the most like the others to their genre's
    songs, whatever these dance; the same with the genres shuffled. Arguments: those of style."""
    poses = [held_poses(film, at) for film, at in zip(films, beats, strict=True)]
    mirrored = [held_poses(film[:, :, ::-1], at) for film, at in zip(films, beats)]
    common = torch.cat(poses + mirrored).mean(0)
    poses = [F.normalize(features - common, dim=1) for features in poses]
    mirrored = [F.normalize(features - common, dim=1) for features in mirrored]
    either = [torch.cat(two) for two in zip(poses, mirrored)]  # as choreographies() has both
    table = [[likeness(one, other) for other in either] for one in poses]
    table = (np.array(table) + np.transpose(table)) / 2
    rng = np.random.default_rng(0)
    chances = [share_alike(table, rng.permutation(genres)) for _ in range(shuffles)]
    return share_alike(table, np.array(genres)), float(np.mean(chances)), float(np.std(chances))


def share_alike(table, genres):
    """table (n, n): how alike each two films are; genres (n,). nan where none comes twice."""
    others = ~np.eye(len(genres), dtype=bool)
    names = [genre for genre in np.unique(genres) if (genres == genre).sum() > 1]
    if not names:
        return math.nan
    means = [np.average(table, 1, others & (genres == genre)) for genre in names]  # (n,) each
    return float(np.mean(np.array(names)[np.argmax(means, 0)] == genres))
