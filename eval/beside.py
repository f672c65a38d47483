"""What is beside a video: the .json that sample.py wrote. Nobody vouches for it."""

import json
import math
import os
import sys
from typing import NamedTuple

import musicinfuser as mi
from eval import beats as bt


def read_object(path):
    """A JSON object, {} where there is no file. Raises InputError."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise mi.InputError(f"{path} is not JSON") from error
    if not isinstance(value, dict):
        raise mi.InputError(f"{path} is not what sample.py writes: it holds no object")
    return value


def recipe_of(video):
    """How a video was made, {} where nobody wrote it down. Raises InputError."""
    path = os.path.splitext(video)[0] + ".json"
    recipe = read_object(path)
    for name in ("song", "prompt", "weights", "adapter"):
        if not isinstance(recipe.get(name, ""), str):
            raise mi.InputError(f"{path}: {name} is no text")
    check_number(path, recipe, "start", 0, math.inf)
    check_number(path, recipe, "speed", 0.1, 10)
    return recipe


def check_number(path, recipe, name, low, high):
    value = recipe.get(name, low)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= min(high, sys.float_info.max):
        raise mi.InputError(f"{path}: {name} is {value!r}, not a number from {low}")


class Music(NamedTuple):
    """What a video was made to."""

    song: str  # a file
    start: float = 0.0  # in the song's own seconds
    speed: float = 1.0

    def beats(self):
        """In the video's seconds. Raises bt.NoScore."""
        return (bt.track_beats(self.song, self.start) - self.start) / self.speed


def music_of(video, song=None):
    """The Music of a video; of `song` where that is given; its own sound without a recipe."""
    recipe = recipe_of(video)
    song = song or recipe.get("song", video)
    if not os.path.isfile(song):
        raise mi.InputError(f"{video} was made to {song}, which is not there; name it by --song")
    return Music(song, recipe.get("start", 0.0), recipe.get("speed", 1.0))


def without_music(video):
    return recipe_of(video).get("adapter") == "none"
