"""A song and a prompt in, a dancing video out:   python sample.py song.wav "a dog dancing" """

import glob
import json
import math
import os
import re
import signal
import time
from dataclasses import asdict, dataclass, fields
from functools import partial

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports is no traceback

import torch
from tqdm import tqdm

import musicinfuser as mi
from musicinfuser import option

SPLITS = ("tokens", "branches", "seeds", "none")  # a video's tokens, its guidance's branches


@dataclass
class Options(mi.SamplingOptions, mi.RunOptions):
    """All that a video takes; kept in the .json beside it."""

    song: str = option("", "any audio or video file", positional=True, line="song")
    prompt: str = option("", 'such as "a dog dancing"', positional=True)
    whole_song: bool = option(False, "as many frames as the song has, from --start on")
    window_frames: int = option(None, "more are made in windows; default: as the weights prefer")
    adapter: str = option(None, "file, or none; default: the weights' own", line="weights")
    lora_scale: float = option(1.0, "how strongly the adapter's LoRA counts", line="weights")
    skip_scale: float = option(1.0, "guidance scale of what --skip's layers add", line="solver")
    negative: str = option("", "prompt to guide away from", line="solver")
    seeds: tuple = option((0,), "one video for each", parse=int, flag="--seed")
    start: float = option(0.0, "place in the song, in its own seconds", low=0, line="song")
    speed: float = option(1.0, "1.25 is faster, higher", low=0.1, high=10, line="song")
    out: str = option("outputs", "folder, or an .mp4")
    split: str = option("tokens", "what processes share", choices=SPLITS)


def generate(song, prompt, **given):
    """Make a video for each seed; returns their paths.

    given: the fields of Options; what is not given is as the weights folder prefers, else as the
    class says. Raises musicinfuser.InputError, before anything takes long where it can.
    """
    began = time.time()
    options, dit = mi.begin(Options, "sampling", given | {"song": song, "prompt": prompt})
    rank, count = (0, 1) if options.split == "none" else mi.join_processes(options)
    check(options, dit)
    if options.whole_song:
        options.frames, options.whole_song = frames_of_song(options, dit.config.fps), False
    waveform = window_of_song(options, dit.config.fps)
    plan = plan_of(options)
    check_out(options)
    mi.print_options(options)
    if plan:
        print(f"windows  {len(plan)} of {options.window_frames} frames")
    text, null, audio = encode(options, dit, waveform, plan)
    dit, decoder = load(options)
    each_its_own = count > 1 and options.split == "seeds"
    writes = rank == 0 or each_its_own
    if count > 1 and options.split == "tokens":
        mi.TokenParallel(dit)
    elif count > 1 and options.split == "branches":
        mi.BranchParallel(dit)
    if not writes:
        decoder = torch.nn.Identity()  # the first process decodes
    seeds, make = options.seeds, partial(video, options)
    if plan:
        states, seeds = begin_states(options, writes, rank == 0)
        make = partial(long_video, options, plan, states)
    if each_its_own:
        seeds = seeds[rank::count]
    paths = [make(seed, dit, decoder, text, null, audio, writes) for seed in seeds]
    print(f"{time.time() - began:.1f} s, peak memory {mi.peak_memory(options.device):.2f} GB")
    return paths


def check(options, dit):
    """Whatever can be wrong, while nothing has taken long; fills in the adapter."""
    depth, seeds = len(dit.blocks), options.seeds
    if options.skip and not 0 <= min(options.skip) <= max(options.skip) < depth:
        raise mi.InputError(f"--skip takes layers from 0 to {depth - 1}, not {list(options.skip)}")
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**63 for seed in seeds):
        raise mi.InputError("--seed takes different numbers from 0 to 2^63 - 1")
    options.adapter = options.adapter or os.path.join(options.weights, "musicinfuser.safetensors")
    if options.adapter == "none":
        options.music_cfg = 0.0
    else:
        mi.load_adapter(dit, options.adapter)
    mi.check_decoder(options.weights, dit.config)
    if options.window_frames is None:
        options.window_frames = mi.longest_at_once(dit.config)
    needed = ("text_encoder", "tokenizer", "audio_encoder")[: 2 if options.adapter == "none" else 3]
    for folder in (os.path.join(options.weights, name) for name in needed):
        if not os.path.isdir(folder):
            raise mi.InputError(f"no such folder: {folder}")


def check_out(options):
    """Whether videos can be written there, and overwrite nothing."""
    out, ending = options.out, os.path.splitext(options.out)[1].lower()
    if is_video(out) and len(options.seeds) > 1:
        raise mi.InputError(f"--out {out} is one file for many seeds; name a folder")
    if ending in (".mov", ".mkv", ".webm", ".avi"):
        raise mi.InputError(f"--out {out}: videos are .mp4 here")
    for path in (out, os.path.splitext(out)[0] + ".json") if is_video(out) else ():
        if os.path.lexists(path):
            raise mi.InputError(f"{path} exists; name another --out")
    folder = os.path.dirname(os.path.abspath(out)) if is_video(out) else out
    mi.check_writable(folder)


def window_of_song(options, fps):
    """The waveform that the video dances to. Raises InputError for what is no song."""
    waveform, seconds = mi.music_window(
        options.song, options.frames, fps, options.start, options.speed
    )
    if seconds < options.frames / fps:
        print(f"the song ends after {seconds:.1f} s of the video; silence follows")
    return waveform


def frames_of_song(options, fps):
    """How many frames the rest of the song has. Raises InputError where they are too few."""
    waveform = mi.load_audio(options.song, options.start, speed=options.speed)
    seconds = len(waveform) / mi.SAMPLE_RATE
    frames = (int(seconds * fps) - 1) // 6 * 6 + 1
    if frames < 7:
        left = f"{options.song} has {seconds:.2f} s from {options.start:g} s on"
        raise mi.InputError(f"{left}; --whole-song needs {7 / fps:.2f} s")
    return frames


def plan_of(options):
    """The windows of a long video; None where one holds all of it. Raises InputError."""
    frames, length = options.frames, options.window_frames
    if frames <= length:
        return None
    if length < 7 or length % 6 != 1:
        raise mi.InputError(f"--window-frames must be 6k + 1, from 7 on, not {length}")
    return mi.windows(mi.latent_frames(frames), mi.latent_frames(length))


def encode(options, dit, waveform, plan=None):
    """The prompt, the negative prompt, each (y_feat, y_mask), and the music's tokens or None.

    plan: the windows, each of which has music of its own, in a list.
    """
    weights, device = options.weights, options.device
    where = mi.text_device(weights, device)
    if where != device:
        print(f"the text encoder runs on the {where}: the GPU is too small for it")
    text, null = mi.encode_text(weights, [options.prompt, options.negative], where)
    text, null = ([part.to(device) for part in pair] for pair in (text, null))
    check_width("text_encoder", text[0], f"{weights}'s transformer", dit.t5_yproj)
    if options.adapter == "none":
        return text, null, [None] * len(plan) if plan else None
    listen = mi.AudioEncoder(weights, device)
    heard = [listen(sound) for sound in sounds_of(options, dit.config.fps, waveform, plan)]
    check_width("audio_encoder", heard[0], options.adapter, dit.audio_projection.projection[0])
    return text, null, [audio.cpu() for audio in heard] if plan else heard[0]


def sounds_of(options, fps, waveform, plan):
    """What each window hears of the waveform; all of it without windows."""
    if not plan:
        return [waveform]
    length = math.ceil(mi.audio_seconds(options.window_frames, fps) * mi.SAMPLE_RATE)
    # A window's first latent frame stands for the last of the six frames that it is in the video
    firsts = [round(6 * first / fps * mi.SAMPLE_RATE) for first, _ in plan]
    return [waveform[first : first + length] for first in firsts]


def check_width(encoder, features, taker, linear):
    found, wanted = features.shape[-1], linear.in_features
    if found != wanted:
        raise mi.InputError(f"{encoder} gives {found} features a token, {taker} takes {wanted}")


def load(options):
    """The transformer with its adapter, and the decoder."""
    how = options.device, mi.DTYPES[options.dtype]
    dit = mi.load_dit(os.path.join(options.weights, "dit.safetensors"), *how, options.offload)
    if options.adapter != "none":
        mi.load_adapter(dit, options.adapter, lora_scale=options.lora_scale)
    if options.compile:
        mi.compile_blocks(dit)
    return dit, mi.load_decoder(os.path.join(options.weights, "decoder.safetensors"), *how)


def video(options, seed, dit, decoder, text, null, audio, writes=True):
    """Make one video and the .json that tells how; returns its path. writes: by this process."""
    noise = mi.noise_for(seed, dit.config, options.frames, options.size).to(options.device)
    progress = partial(tqdm, desc=f"seed {seed}", unit="step", disable=not writes)
    (film,) = mi.noise_to_video(dit, decoder, noise, text, null, audio, options, progress)
    if not writes:
        return None
    return finish(options, seed, film, dit)


def long_video(options, plan, states, seed, dit, decoder, text, null, music, writes=True):
    """The same in windows; goes on from the state that a killed run left."""
    progress = [
        partial(tqdm, desc=f"seed {seed}", unit="step", disable=not writes),
        partial(tqdm, desc="windows", unit="window", disable=not writes, leave=False),
    ]
    noise = mi.noise_for(seed, dit.config, options.window_frames, options.size)
    noise = mi.in_every_window(noise, mi.latent_frames(options.frames))
    how = mi.how_to_sample(options) | {"plan": plan, "state": states[seed], "progress": progress}
    z = mi.sample_long(dit, noise, text, null, music, **how)
    if not writes:
        return None
    path = finish(options, seed, partial(mi.pieces_of_video, decoder, z, dit.config), dit)
    states[seed].remove()
    return path


def begin_states(options, writes, first):
    """({seed: mi.State}, the seeds that are left to make), for which the first process begins."""
    states = states_of(options, writes)
    seeds = unfinished(states)
    if options.split != "none":
        mi.wait_for_all()  # until all have seen what is there
    if first:
        for seed in seeds:
            states[seed].begin()
    return states, seeds


def states_of(options, writes):
    """{seed: mi.State}, whose key is all that decides a video, files by their content."""
    free = "out", "split", "offload", "song", "weights", "adapter"
    recipe = {name: value for name, value in asdict(options).items() if name not in free}
    files = [mi.model_digest(path) for path in (options.song, mi.__file__, __file__)]
    recipe |= {"model": model_of(options), "files": files, "torch": torch.__version__}
    states = {}
    for seed in options.seeds:
        key = mi.digest(recipe | {"seed": seed})
        begin = os.path.join(options.out, stem_of(options, seed))
        begin = options.out[:-4] if is_video(options.out) else begin
        states[seed] = mi.State(f"{begin}.{key[:12]}.unfinished.safetensors", key, writes)
    return states


def model_of(options):
    """A digest of the weights and the adapter, by their content."""
    adapter = [] if options.adapter == "none" else [options.adapter]
    return mi.digest([mi.model_digest(path) for path in files_of(options.weights) + adapter])[:16]


def files_of(weights):
    """All that sampling reads of a weights folder, but for the adapter."""
    found = [os.path.join(weights, f"{name}.safetensors") for name in ("dit", "decoder")]
    for name in ("text_encoder", "tokenizer", "audio_encoder"):
        found += sorted(glob.glob(os.path.join(glob.escape(weights), name, "*")))
    return [path for path in found if os.path.isfile(path)]


def unfinished(states):
    """The seeds that a killed run of the same command did not finish; all where there was none."""
    seeds = [seed for seed, state in states.items() if os.path.exists(state.path)]
    if seeds:
        print(f"seed {seeds[0]} goes on from {states[seeds[0]].path}")
    return seeds or list(states)


def stem_of(options, seed):
    song = os.path.splitext(os.path.basename(options.song))[0]
    return f"{slug(song, 30)}-{slug(options.prompt)}-{seed}"


def finish(options, seed, film, dit):
    """Write a film, or what gives its pieces, and its recipe; returns its path."""
    recipe = asdict(options) | {"seed": seed, "torch": torch.__version__}
    recipe["model"] = model_of(options)
    path = new_path(options.out, stem_of(options, seed))
    path = save(path, film, dit.config.fps, options, recipe)
    print(path)
    return path


def is_video(out):
    return out.lower().endswith(".mp4")


def new_path(out, stem):
    """A new .mp4 in the folder `out`, or `out` itself; with -2, -3, ... where one is there."""
    path = out if is_video(out) else os.path.join(out, f"{stem}.mp4")
    begin, n = os.path.splitext(path)[0], 1
    while os.path.lexists(path) or os.path.lexists(os.path.splitext(path)[0] + ".json"):
        n += 1
        path = f"{begin}-{n}.mp4"
    return path


def save(path, film, fps, options, recipe):
    """Write the video; under the next free name, where another process took this one meanwhile."""
    window = options.song, options.start, options.speed
    try:
        pieces = film() if callable(film) else film
        mi.save_video(path, pieces, fps, *window, recipe)
    except mi.InputError as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        return save(new_path(path, ""), film, fps, options, recipe)
    return path


def slug(text, length=60):
    """A part of a file name, which has 255 bytes at most."""
    text = re.sub(r"[^\w]+", "-", text.lower()).strip("-")
    return text.encode(errors="ignore")[:length].decode(errors="ignore").strip("-") or "empty"


def read_recipe(path):
    """The options of the .json beside a video, which make it again. Raises InputError."""
    return options_of(load_recipe(path))


def options_of(recipe):
    names = {field.name for field in fields(Options)} - {"out", "split"}
    return {name: recipe[name] for name in names & set(recipe)}


def load_recipe(path):
    """All that is in the .json beside a video. Raises InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            recipe = json.load(file)
        if "frames" in recipe:  # older ones were made all at once, and the music guided to the end
            recipe = {"window_frames": recipe["frames"], "music_above": 0.0} | recipe
        return recipe | {"seeds": [recipe["seed"]]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise mi.InputError(f"{path} is not the recipe of a video ({error})") from error


def say_what_changed(old, path):
    """What may make another video of the same options."""
    with open(f"{path[:-4]}.json", encoding="utf-8") as file:
        new = json.load(file)
    for name, what in {"model": "files of weights or adapter", "torch": "PyTorch"}.items():
        if name in old and old[name] != new[name]:
            print(f"made with other {what} than the recipe's")


def main():
    parser = mi.parser_for(Options, "A song and a prompt in, a dancing video out.")
    parser.add_argument("--from", dest="recipe", help="the .json beside a video, to make it again")
    given = vars(parser.parse_intermixed_args())
    path, recipe = given.pop("recipe"), {}
    if path is not None:
        recipe = load_recipe(path)
        given = options_of(recipe) | given
    if not {"song", "prompt"} <= given.keys():
        parser.error("name a song and a prompt")
    paths = generate(**given)
    for path in filter(None, paths if recipe else ()):  # not every process writes one
        say_what_changed(recipe, path)


if __name__ == "__main__":
    mi.main(main)
