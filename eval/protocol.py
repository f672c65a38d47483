"""The paper's protocol: 10 prompts times the 10 songs that were held out, as 100 videos."""

import glob
import json
import os
from types import SimpleNamespace

import musicinfuser as mi
import sample
from dataset.aist import TEST_SONGS
from eval.beside import recipe_of

PROMPTS = (
    # Figure 13's, as the paper prints it
    "a male dancer dancing in an art gallery with some paintings, captured from a front view",
    # Figure 14's dancer and place, in the words of the one above
    "a male dancer in a suit dancing in the middle of New York City, captured from a front view",
    # The paper's list is not public: these are ours
    "a female dancer in a red dress dancing on a wooden stage, captured from a front view",
    "a female dancer in jeans dancing in a studio with mirrors, captured from a moving front view",
    "a male dancer in a tracksuit dancing on a basketball court, captured from a low angle",
    "a female dancer in a yellow raincoat dancing in a street at night, front-left diagonal view",
    "two dancers in black clothes dancing on a roof at sunset, captured from a front view",
    "an old man in a grey coat dancing in a railway station, captured from a front view",
    "a dancer in silver clothes dancing in a club with coloured lights, front-right diagonal view",
    "a girl in a summer dress dancing on a beach, captured from a front view",
)


def protocol_songs(folder):
    """The files mLH4.*, mKR2.*, ... of a folder, the held-out songs; or all, if ten others."""
    if not os.path.isdir(folder or ""):
        needed = "--protocol needs --songs, a folder with the held-out songs"
        raise mi.InputError(f"{needed}; there is no folder {folder}")
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*")))
    files = [file for file in files if os.path.isfile(file)]
    named = {os.path.splitext(os.path.basename(file))[0]: file for file in files}
    missing = [name for name in TEST_SONGS if name not in named]
    if not missing:
        return [named[name] for name in TEST_SONGS]
    if len(files) != 10 or len(missing) < 10:
        lacks = f"{folder} lacks the held-out {', '.join(missing)}"
        raise mi.InputError(f"{lacks}, and is not a folder of ten others")
    return files


def protocol(songs, out, weights=None, adapter=None, seed=0, share=(0, 1), **where):
    """The paths of the 100 videos, made where they are not there yet.

    share: which of how many processes this is; each makes its own. where: device, dtype.
    """
    process, processes = share
    weights = os.path.normpath(weights or mi.default_weights())
    adapter = adapter or os.path.join(weights, "musicinfuser.safetensors")
    videos = []
    for song in protocol_songs(songs):
        name = os.path.splitext(os.path.basename(song))[0]
        for j, prompt in enumerate(PROMPTS):
            wanted = {"song": song, "prompt": prompt, "weights": weights, "adapter": adapter}
            wanted["seeds"] = [seed + len(videos)]  # each video has its own noise
            if len(videos) % processes == process:
                make_video(os.path.join(out, f"{name}-{j}.mp4"), wanted, **where)
            videos.append(os.path.join(out, f"{name}-{j}.mp4"))
    mi.wait_for_all()
    return videos


def make_video(video, wanted, **where):
    """Sample a video unless it is there. wanted: options of sample.generate, with one seed.

    Raises InputError where it is there and was made otherwise.
    """
    beside = os.path.splitext(video)[0] + ".json"
    if os.path.exists(video) and os.path.exists(beside):
        check_made_so(video, sample.read_recipe(beside), wanted)
        check_model(video)
        return
    for path in (video, beside):  # stopped between the two
        if os.path.exists(path):
            os.remove(path)
    print(f"making   {video}")
    given = {name: value for name, value in where.items() if value is not None}
    sample.generate(**wanted | given | {"out": video, "split": "none"})


def check_model(video):
    """Raises InputError where the files that it names as its model have changed since."""
    recipe = recipe_of(video)
    if "model" not in recipe:  # older ones do not say
        return
    weights, adapter = recipe.get("weights", ""), recipe.get("adapter", "none")
    gone = adapter != "none" and not os.path.isfile(adapter)
    model = SimpleNamespace(weights=weights, adapter=adapter)
    if gone or sample.model_of(model) != recipe["model"]:
        changed = f"{weights} or {adapter} has changed since {video} was made"
        raise mi.InputError(f"{changed}; make it again, in another folder")


def check_made_so(video, made, wanted):
    made, wanted = (json.loads(json.dumps(options)) for options in (made, wanted))
    different = [name for name in wanted if made.get(name) != wanted[name]]
    if different:
        names = ", ".join(different)
        raise mi.InputError(f"{video} was made with another {names}; name another --out")
