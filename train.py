"""A folder of dance videos in, an adapter out:   python train.py --data aist/

The paper's settings are the defaults. Whatever happens at a step follows from the seed and the step alone, so a run
that was killed goes on by the same command and ends with the adapter of a run that never was.
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import random
import re
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

import musicinfuser as mi

# ------------------------------------------------------------------------------------------------------------------
# AIST, by its file names
# ------------------------------------------------------------------------------------------------------------------

AIST_NAME = re.compile(r"g([A-Z]{2})_s([A-Z]{2})_c(\d\d)((?:_d\d+)+)_m([A-Z]{2}\d+)_ch\d+")
GENRES = {"BR": "Break", "PO": "Pop", "LO": "Lock", "MH": "Middle Hip-hop", "LH": "LA style Hip-hop", "HO": "House",
          "WA": "Waack", "KR": "Krump", "JS": "Street Jazz", "JB": "Ballet Jazz"}  # fmt: skip
SITUATIONS = {"BM": "basic dance", "FM": "advanced dance", "MM": "moving camera", "GR": "group dance", "SH": "showcase",
              "CY": "cypher", "BT": "battle"}  # fmt: skip
CAMERAS = {"01": "front view", "02": "front-left diagonal view", "03": "left side view", "04": "back-left diagonal view",
           "05": "back view", "06": "back-right diagonal view", "07": "right side view", "08": "front-right diagonal view",
           "09": "close-up front view from a low angle", "10": "moving front view"}  # fmt: skip
TRAINING_CAMERAS = ("01", "10")
TEST_SONGS = ("mLH4", "mKR2", "mBR0", "mLO2", "mJB5", "mWA0", "mJS3", "mMH3", "mHO5", "mPO1")
FEMALE = {1, 2, 3, 7, 8, 9, 12, 13, 15, 16, 18, 19, 25, 26, 27}  # of the dancers 1 to 35
AIST_CROP = 324 / 1920, 270 / 1080, 1272 / 1920, 720 / 1080  # x, y, width, height: the dancers, of the whole stage

PLAIN = "a professional dancer dancing in a studio with a white backdrop"
WILD_PLAIN = "a dance video"
TEMPLATES = (
    "{who} dancing {genre} in {situation} setting in a studio with a white backdrop, {camera}",
    "{who} performing {genre} in a studio with a white backdrop, captured from a {camera}, in {situation} setting",
    "in a studio with a white backdrop, {who} dancing {genre}, {camera}, {situation} setting",
    "a {camera} of {who} dancing {genre} in {situation} setting, in a studio with a white backdrop",
)


def aist_prompts(name):
    """The four prompts of an AIST file name."""
    genre, situation, camera, dancers, _ = AIST_NAME.search(name).groups()
    sexes = {True: "a professional female dancer", False: "a professional male dancer", None: "unknown"}
    who = [sexes[(d in FEMALE) if 1 <= d <= 35 else None] for d in map(int, re.findall(r"\d+", dancers))]
    who = " and ".join([", ".join(who[:-1]), who[-1]] if len(who) > 1 else who)
    situation = SITUATIONS.get(situation, situation)
    words = dict(who=who, genre=GENRES.get(genre, genre), camera=CAMERAS.get(camera, "front view"))
    words["situation"] = f"{'an' if situation[0] in 'aeiou' else 'a'} {situation}"
    return [template.format(**words) for template in TEMPLATES]


def find_videos(data, wild, split="train"):
    """[{path, kind, song, prompts}]: AIST's videos below `data` in that split and all videos below `wild`."""
    videos = []
    for path in walk(data):
        if match := AIST_NAME.search(os.path.basename(path)):
            song = "m" + match[5]
            if match[3] in TRAINING_CAMERAS and (song in TEST_SONGS) == (split == "test"):
                videos.append({"path": path, "kind": "aist", "song": song, "prompts": aist_prompts(match[0])})
    for path in walk(wild) if wild and split == "train" else ():
        caption, text = os.path.splitext(path)[0] + ".txt", ""
        if os.path.exists(caption):
            with open(caption, encoding="utf-8", errors="replace") as file:
                text = file.read().strip()
        videos.append({"path": path, "kind": "wild", "song": path, "prompts": [text or WILD_PLAIN]})
    return videos


def walk(folder):
    if not os.path.isdir(folder):
        raise mi.InputError(f"no such folder: {folder}")
    paths = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(path for path in paths if path.lower().endswith((".mp4", ".mov", ".webm", ".mkv", ".avi")))


# ------------------------------------------------------------------------------------------------------------------
# The cache: latents and music of every clip, features of every text, computed once and kept beside the data
# ------------------------------------------------------------------------------------------------------------------


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def file_digest(path, index):
    """Of a file's content; `index` remembers it for as long as the file's size and date stay."""
    state = os.stat(path)
    key = f"{os.path.abspath(path)} {state.st_size} {state.st_mtime_ns}"
    if key not in index:
        with open(path, "rb") as file:
            index[key] = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    return index[key]


def folder_digest(folder, index):
    if not os.path.isdir(folder):
        raise mi.InputError(f"no such folder: {folder}")
    paths = (os.path.join(folder, name) for name in sorted(os.listdir(folder)))
    return digest(*(file_digest(path, index) for path in paths if os.path.isfile(path)))  # hf leaves a .cache/


def read_entry(path, *names):
    """The tensors of a cache entry, or None where it is not there or damaged, to be made again."""
    try:
        tensors, _ = mi.read_safetensors(path)
    except mi.InputError:
        return None
    return tensors if all(name in tensors for name in names) else None


def read_json(path, kind):
    """A file of the cache, or None where it is not there or damaged, to be made again."""
    try:
        with open(path) as file:
            value = json.load(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, kind) else None


def clip_starts(frames, length, key):
    """Where the clips of a video begin, in frames: five a minute, at random, 5% of both ends left out."""
    margin = round(0.05 * frames)
    room = frames - 2 * margin - length
    if room < 0:  # short, but whole clips count
        return [(frames - length) // 2] if frames >= length else []
    rng = random.Random(key)
    return sorted({rng.randint(margin, margin + room) for _ in range(math.ceil(5 * frames / 30 / 60))})


def cached_clips(videos, folder, weights, size, length, fps, device, dtype):
    """[{entry, kind, song, path, start, prompts}]: latents and audio tokens of all clips, made where they are not."""
    os.makedirs(folder, exist_ok=True)
    index_path = os.path.join(folder, "index.json")
    index = read_json(index_path, dict) or {}
    models = digest(file_digest(os.path.join(weights, "encoder.safetensors"), index),
                    folder_digest(os.path.join(weights, "audio_encoder"), index), size, length, fps)  # fmt: skip
    clips, failed, encoder, listen = [], [], None, None
    for video in tqdm(videos, "reading the videos", unit="video", mininterval=1):
        try:
            key = digest(file_digest(video["path"], index), models, video["kind"])
            listing = os.path.join(folder, f"{key}.json")
            starts = read_json(listing, list)
            entries = lambda: [os.path.join(folder, f"{key}-{start}.safetensors") for start in starts]  # noqa: E731
            if starts is None or any(read_entry(e, "mean", "logvar", "audio") is None for e in entries()):
                encoder = encoder or mi.load_encoder(os.path.join(weights, "encoder.safetensors"), device, dtype)
                listen = listen or mi.AudioEncoder(weights, device)
                crop = AIST_CROP if video["kind"] == "aist" else None
                if starts is None:
                    count = mi.count_frames(video["path"], fps)
                    starts = clip_starts(count, length, key)
                    if not starts:
                        raise mi.InputError(f"{video['path']} has {count} frames, fewer than a clip's {length}")
                wanted = dict(zip(starts, entries()))
                for start, frames in cut(mi.read_frames(video["path"], *size, fps, crop), starts, length):
                    waveform, heard = mi.music_window(video["path"], length, fps, start / fps)
                    with torch.no_grad():
                        mean, logvar = encoder(frames.to(device))
                    entry = {"mean": mean[0], "logvar": logvar[0], "audio": listen(waveform)[0]}
                    mi.save_safetensors(wanted[start], entry)
                starts = [start for start in starts if os.path.exists(wanted[start])]  # it may end before it says
                if not starts:
                    raise mi.InputError(f"{video['path']} ends before its first clip does")
                mi.save_json(listing, starts)
        except mi.InputError as error:
            failed.append(str(error))
            continue
        clips += [video | {"entry": e, "start": start} for e, start in zip(entries(), starts)]
    mi.save_json(index_path, index)
    for error in failed:
        print(f"skipped  {error}")
    if failed:
        print(f"skipped  {len(failed)} of {len(videos)} videos")
    return clips


def cut(frames, starts, length):
    """(start, video (1,3,length,H,W) in [-1,1]) for every start, in one pass over the frames."""
    parts = {start: [] for start in starts}
    for i, frame in enumerate(frames):
        for start in [start for start in parts if start <= i]:
            parts[start].append(torch.from_numpy(frame))
            if len(parts[start]) == length:
                yield start, torch.stack(parts.pop(start)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def cached_texts(texts, folder, weights, device, dtype):
    """{text: (y_feat (L, D_text), y_mask (L,))} for all texts."""
    models = digest(folder_digest(os.path.join(weights, "text_encoder"), {}), str(dtype))
    paths = {text: os.path.join(folder, f"text-{digest(models, text)}.safetensors") for text in texts}
    missing = [text for text in texts if read_entry(paths[text], "y_feat") is None]
    features = mi.encode_text(weights, tqdm(missing, "reading the texts"), device, dtype) if missing else []
    for text, (y_feat, y_mask) in zip(missing, features):
        mi.save_safetensors(paths[text], {"y_feat": y_feat[0], "y_mask": y_mask[0]})
    return {text: mi.read_safetensors(path)[0] for text, path in paths.items()}


# ------------------------------------------------------------------------------------------------------------------
# Batches and the loss
# ------------------------------------------------------------------------------------------------------------------


class Data:
    """Clips as batches. What the n-th sample of a run is follows from the seed and n alone."""

    def __init__(self, clips, texts, natural, settings):
        self.kinds = {kind: [clip for clip in clips if clip["kind"] == kind] for kind in ("aist", "wild")}
        self.texts, self.natural, self.settings = texts, natural, settings

    def choose(self, n):
        """(clip, prompt, generator) of sample n: the kinds mixed at the ratio, within one a clip at most once an epoch."""
        s = self.settings
        rng = random.Random(f"{s['seed']} {n}")
        wild = self.kinds["wild"] and (not self.kinds["aist"] or rng.random() < s["wild_ratio"] / (1 + s["wild_ratio"]))
        clips = self.kinds["wild" if wild else "aist"]
        order = list(range(len(clips)))
        random.Random(f"{s['seed']} epoch {n // len(clips)}").shuffle(order)
        clip = clips[order[n % len(clips)]]
        plain = WILD_PLAIN if wild else PLAIN
        prompt = plain if rng.random() < s["base_prompt_ratio"] else rng.choice(clip["prompts"])
        if rng.random() < s["caption_dropout"]:
            prompt = None
        return clip, prompt, torch.Generator().manual_seed(rng.getrandbits(48))

    def batch(self, numbers, step):
        """z, sigma, eps, y_feat, y_mask, audio and the clips' names for the samples of these numbers."""
        rows, names = [], []
        for n in numbers:
            clip, prompt, generator = self.choose(n)
            entry = mi.read_safetensors(clip["entry"])[0]
            z = entry["mean"] + (entry["logvar"] / 2).exp() * torch.randn(entry["mean"].shape, generator=generator)
            sigma = mi.beta_uniform(step, 1, self.settings["beta"], self.settings["half_life"], generator)
            text = self.texts[PLAIN if prompt is None else prompt]
            y_mask = text["y_mask"] & (prompt is not None)
            rows.append(
                (z, sigma[0], torch.randn(z.shape, generator=generator), text["y_feat"], y_mask, entry["audio"])
            )
            names.append(f"{clip['path']} at frame {clip['start']}")
        return *collate(rows, self.natural), names


def collate(rows, natural):
    z, sigma, eps, y_feat, y_mask, audio = zip(*rows)
    y_feat = torch.nn.utils.rnn.pad_sequence(y_feat, batch_first=True)
    y_mask = torch.nn.utils.rnn.pad_sequence(y_mask, batch_first=True)
    z = mi.to_dit_space(torch.stack(z), natural.mean, natural.std)  # the official trainer leaves this out
    return z, torch.stack(sigma), torch.stack(eps), y_feat, y_mask, torch.stack(audio)


@torch.no_grad()
def listening_gap(dit, held_out, device, batch=1, sigmas=(0.25, 0.5, 0.75, 0.9)):
    """Loss on held_out_rows with their own song and with another's, at each sigma, the same noise throughout."""
    z, _, eps, y_feat, y_mask, audio, other = (tensor.to(device) for tensor in held_out)
    losses = {}
    for s in sigmas:
        sigma = torch.full((len(z),), s, device=device)
        for name, song in (("right", audio), ("wrong", other)):
            rows = zip(*(tensor.split(batch) for tensor in (z, sigma, eps, y_feat, y_mask, song)))
            parts = [mi.flow_matching_loss(dit, *row) for row in rows]
            losses[f"{name}_{s}"] = torch.cat(parts).mean().item()
    return losses


def held_out_rows(clips, texts, natural, seed, count=16):
    """A batch of clips of the test songs, one song after another, and another song for each; None for fewer than two."""
    rows, songs = [], sorted({clip["song"] for clip in clips})
    if len(songs) < 2:
        return None
    by_song = [[clip for clip in clips if clip["song"] == song] for song in songs]
    chosen = [group[i] for i in range(count) for group in by_song if i < len(group)][:count]
    for i, clip in enumerate(chosen):
        generator, entry = torch.Generator().manual_seed(seed * 1000 + i), mi.read_safetensors(clip["entry"])[0]
        text = texts[PLAIN]
        eps = torch.randn(entry["mean"].shape, generator=generator)
        rows.append((entry["mean"], torch.tensor(0.0), eps, text["y_feat"], text["y_mask"], entry["audio"]))
    batch, n = collate(rows, natural), len(rows)
    other = [next(j for j in range(i - 1, i - n, -1) if chosen[j]["song"] != chosen[i]["song"]) for i in range(n)]
    return *batch, batch[-1][other]


# ------------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------------


def learning_rate(step, steps, peak, warmup):
    """Linear from 0, then a cosine to 0 (the authors' schedule)."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def pick_layers(choice, depth, weights, top):
    """--layers: numbers, a ranking file, a name; None: the weights folder's ranking, else the authors' for Mochi."""
    if top is not None and not 1 <= top <= depth:
        raise mi.InputError(f"--top must be from 1 to {depth}, not {top}")
    if choice is None:
        choice = os.path.join(weights, "adaptability.json")
        if not os.path.exists(choice) and depth == 48:
            return list(mi.MUSICINFUSER_LAYERS)
        if not os.path.exists(choice):
            raise mi.InputError(f"there is no {choice}; name --layers, such as all or 0,3,6")
    if choice in ("even", "first", "middle", "last", "all"):
        return mi.choose_layers(choice, depth, top)
    if choice.endswith(".json"):
        return sorted(read_ranking(choice, depth)[: top or round(depth / 3)])
    if not re.fullmatch(r"\d+(,\d+)*", choice):
        raise mi.InputError(
            f"--layers {choice}: give numbers such as 0,3,6, a ranking file, even, first, middle, last or all"
        )
    layers = [int(number) for number in choice.split(",")]
    mi.check_layers(layers, depth)
    return layers


def read_ranking(path, depth):
    """The layers, best first, of a file of adaptability.py's. Raises InputError for any other."""
    if not os.path.isfile(path):
        raise mi.InputError(f"no such file: {path}")
    try:
        with open(path) as file:
            ranking = json.load(file)["ranking"]
        if sorted(ranking) != list(range(depth)):
            raise ValueError(f"it does not rank the layers 0 to {depth - 1}")
    except (ValueError, KeyError, TypeError) as error:
        raise mi.InputError(f"{path} is not a ranking of this model's layers ({error})") from error
    return ranking


class Run:
    """A run folder: config.json, state.safetensors, musicinfuser.safetensors, log.jsonl."""

    FREE = ("offload", "save_every", "eval_every", "sample_every")  # options that do not change the adapter

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        path = self.path("config.json")
        if os.path.exists(self.path("state.safetensors")):
            old = read_json(path, dict) or {}
            changed = sorted(k for k in {*old, *config} if k not in self.FREE and old.get(k) != config.get(k))
            if changed:
                raise mi.InputError(f"{folder} holds a run with another {', '.join(changed)}; name another --out")
        os.makedirs(folder, exist_ok=True)
        mi.save_json(path, config)

    def path(self, name):
        return os.path.join(self.folder, name)

    def save(self, dit, optimiser, step):
        parameters = mi.adapter_parameters(dit)
        state = {f"parameter.{k}": p for k, p in parameters.items()}
        for k, p in parameters.items():
            state |= {f"{key}.{k}": value for key, value in optimiser.state.get(p, {}).items()}
        mi.save_adapter(dit, self.path("musicinfuser.safetensors"))
        mi.save_safetensors(self.path("state.safetensors"), state, {"step": str(step)})  # last: what is there is whole

    def load(self, dit, optimiser):
        """Back to the last save; returns its step, 0 for a new run."""
        step = 0
        if os.path.exists(self.path("state.safetensors")):
            tensors, metadata = mi.read_safetensors(self.path("state.safetensors"))
            step = int(metadata["step"])
            for k, p in mi.adapter_parameters(dit).items():
                p.data.copy_(tensors[f"parameter.{k}"])
                if f"exp_avg.{k}" in tensors:  # absent for a parameter that never had a gradient
                    moments = {key: tensors[f"{key}.{k}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
                    optimiser.state[p] = {key: t if key == "step" else t.to(p.device) for key, t in moments.items()}
        lines = open(self.path("log.jsonl")).read().splitlines() if os.path.exists(self.path("log.jsonl")) else []
        whole = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
        with mi.written_whole(self.path("log.jsonl")) as temporary, open(temporary, "w") as file:
            file.writelines(line + "\n" for line in whole)
        return step

    def log(self, line):
        with open(self.path("log.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


OPTIONS = {  # name: (default, type, help); a default of None follows from the model or from --steps
    "wild": (None, str, "folder of other dance videos, a caption in a .txt beside each"),
    "wild_ratio": (1.0, float, "of them for each of --data's"),
    "weights": (None, str, "folder; default: weights/ if it holds a model, else tiny/"),
    "out": ("runs/musicinfuser", str, "run folder; the same command goes on where it stopped"),
    "steps": (4000, int, "optimiser steps"),
    "batch": (1, int, "clips at once"),
    "accumulate": (1, int, "batches a step"),
    "lr": (1e-4, float, "AdamW's peak learning rate"),
    "warmup": (None, int, "steps to the peak; default: a twentieth of --steps"),
    "layers": (None, str, "numbers such as 0,3,6, a ranking file, even, first, middle, last or all"),
    "top": (None, int, "how many layers of a ranking or a named choice; default: a third"),
    "adapter": ("zica", str, "or add: feature addition instead of cross-attention"),
    "window": (None, int, "latent frames either side that a frame hears; default: all"),
    "rank": (64, int, "of LoRA; 0: none"),
    "random_init": (False, bool, "no zero initialisation"),
    "init": (None, str, "an adapter of the same shapes to begin from; default: a fresh one"),
    "beta": (3.0, float, "Beta-Uniform noise begins at Beta(1, beta); 1: uniform throughout"),
    "half_life": (None, float, "steps in which it comes half-way to uniform; default: a twentieth of --steps"),
    "base_prompt_ratio": (0.2, float, "how often the plain prompt replaces the clip's own"),
    "caption_dropout": (0.1, float, "how often there is no prompt"),
    "audio_dropout": (0.0, float, "how often a batch has no music"),
    "save_every": (500, int, "steps"),
    "eval_every": (100, int, "steps between losses on held-out clips with the right and a wrong song"),
    "sample_every": (0, int, "steps between videos of a held-out song; 0: none"),
    "seed": (42, int, "of everything"),
    "device": (None, str, "default: cuda if there is one"),
    "dtype": (None, str, "of the frozen model: float32 or bfloat16, the default on a GPU"),
    "offload": (False, bool, "keep the frozen blocks in host memory, or in their file"),
    "compile": (False, bool, "compile the blocks"),
}


def train(data, **options):
    """Train an adapter on the videos in `data`; returns the path of the adapter. Options: see OPTIONS.

    Raises musicinfuser.InputError.
    """
    settings = {name: default for name, (default, *_) in OPTIONS.items()} | options
    for name in ("warmup", "half_life"):
        settings[name] = max(settings["steps"] // 20, 1) if settings[name] is None else settings[name]
    settings["weights"] = weights = settings["weights"] or mi.default_weights()
    for name in ("steps", "batch", "accumulate", "beta", "half_life", "lr", "save_every", "eval_every"):
        if not settings[name] > 0:
            raise mi.InputError(f"--{name.replace('_', '-')} must be more than 0, not {settings[name]}")
    for name in ("warmup", "rank", "wild_ratio", "sample_every", "window"):
        if settings[name] is not None and not settings[name] >= 0:
            raise mi.InputError(f"--{name.replace('_', '-')} must not be negative, as {settings[name]}")
    for name in ("base_prompt_ratio", "caption_dropout", "audio_dropout"):
        if not 0 <= settings[name] <= 1:
            raise mi.InputError(f"--{name.replace('_', '-')} must be from 0 to 1, not {settings[name]}")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device, dtype = mi.choose_device(settings["device"], settings["dtype"])
    if world > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        patience = datetime.timedelta(days=7)  # the others wait while the first makes the cache
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=patience)
    say = print if rank == 0 else lambda *_: None

    if settings["offload"] and world > 1:
        raise mi.InputError("--offload trains in one process; leave out torchrun")
    dit = mi.load_dit(os.path.join(weights, "dit.safetensors"), device, dtype, settings["offload"])
    natural = dit.natural
    mi.check_sizes(natural.frames, natural.height, natural.width)
    layers = pick_layers(settings["layers"], len(dit.blocks), weights, settings["top"])
    model = os.stat(os.path.join(weights, "dit.safetensors"))
    model = {"dit.safetensors": [model.st_size, model.st_mtime_ns]}  # an adapter goes on only over its own model
    run = Run(settings["out"], {"data": data} | settings | {"layers": layers} | model)
    say(f"weights  {weights}")
    say(f"device   {device}{f' x {world}' if world > 1 else ''}, {str(dtype).removeprefix('torch.')}, adapter float32")
    say(f"video    {natural.height}x{natural.width}, {natural.frames} frames at {natural.fps} fps")

    # Everything that is computed once: by the first process, then read by all
    folder, size = os.path.join(data, ".musicinfuser"), (natural.height, natural.width)
    if rank > 0:
        dist.barrier()
    arguments = folder, weights, size, natural.frames, natural.fps, device, dtype
    clips = cached_clips(find_videos(data, settings["wild"]), *arguments)
    held_out = cached_clips(find_videos(data, None, "test"), *arguments)
    texts = {PLAIN, WILD_PLAIN} | {prompt for clip in clips for prompt in clip["prompts"]}
    texts = cached_texts(sorted(texts), folder, weights, device, dtype)
    if world > 1 and rank == 0:
        dist.barrier()
    if not clips:
        raise mi.InputError(f"no AIST video of cameras c01 and c10 to train on below {data}, and no --wild video")
    songs = len({clip["song"] for clip in clips})
    hours = len(clips) * natural.frames / natural.fps / 3600
    say(f"data     {len(clips)} clips, {hours:.2f} hours, {songs} songs; {len(held_out)} clips of test songs held out")

    torch.manual_seed(settings["seed"])
    audio_width = mi.read_safetensors(clips[0]["entry"])[0]["audio"].shape[-1]
    mi.infuse(dit, layers, settings["rank"], settings["window"], heads=8 if settings["adapter"] == "zica" else 0,
              audio_width=audio_width, zero_init=not settings["random_init"])  # fmt: skip
    if settings["init"]:
        tensors, fresh = mi.read_safetensors(settings["init"])[0], mi.adapter_parameters(dit)
        mi.check_names(settings["init"], {k: t.shape for k, t in tensors.items()}, {k: p.shape for k, p in fresh.items()})
        for k, p in fresh.items():
            p.data.copy_(tensors[k])
    if settings["compile"]:
        mi.compile_blocks(dit)
    parameters = list(mi.adapter_parameters(dit).values())
    optimiser = torch.optim.AdamW(parameters, settings["lr"], weight_decay=0.0)
    start = run.load(dit, optimiser)
    trainable, frozen = (
        sum(p.numel() for p in dit.parameters() if p.requires_grad is wanted) for wanted in (True, False)
    )
    tokens = settings["batch"] * ((natural.frames - 1) // 6 + 1) * natural.height * natural.width // 256
    block = 40 * tokens * dit.width * dtype.itemsize  # about what the backward pass through one needs
    # Checkpointing costs a third of the speed, so not where it would save little
    dit.checkpointing = settings["offload"] or len(dit.blocks) * block > 2e9
    kept = (len(dit.blocks) / 40 + 1 if dit.checkpointing else len(dit.blocks)) * block
    memory = frozen * dtype.itemsize + 16 * trainable + kept
    say(f"adapter  layers {layers}, {trainable:,} parameters to train, {frozen:,} frozen; about {memory / 1e9:.1f} GB")
    if start:
        say(f"going on from step {start}")

    unused = settings["audio_dropout"] > 0
    model = dit if world == 1 else torch.nn.parallel.DistributedDataParallel(dit, find_unused_parameters=unused)
    samples = Data(clips, texts, natural, settings)
    held_out_batch = held_out_rows(held_out, texts, natural, settings["seed"])
    began, shown = time.time(), {}
    bar = tqdm(range(start, settings["steps"]), "training", initial=start, total=settings["steps"], disable=rank > 0)
    for step in bar:
        losses, sigmas, last = [], [], time.time()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, settings["steps"], settings["lr"], settings["warmup"])
        for micro in range(settings["accumulate"]):
            part = (step * settings["accumulate"] + micro) * world + rank
            *batch, names = samples.batch(range(part * settings["batch"], (part + 1) * settings["batch"]), step)
            z, sigma, eps, y_feat, y_mask, audio = (tensor.to(device) for tensor in batch)
            silent = random.Random(f"{settings['seed']} silent {part}").random() < settings["audio_dropout"]
            if world > 1:
                model.require_backward_grad_sync = micro == settings["accumulate"] - 1
            loss = mi.flow_matching_loss(model, z, sigma, eps, y_feat, y_mask, None if silent else audio)
            if loss.requires_grad:  # else a silent batch without LoRA
                (loss.mean() / settings["accumulate"]).backward()
            losses += loss.tolist()
            sigmas += sigma.tolist()
            if not all(map(math.isfinite, losses)):
                raise mi.InputError(f"the loss is not finite at step {step}, on {'; '.join(names)}; "
                                    f"the last good checkpoint is {run.path('state.safetensors')}")  # fmt: skip
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimiser.step()
        optimiser.zero_grad()
        if rank > 0:
            continue
        line = {"step": step, "loss": sum(losses) / len(losses), "lr": group["lr"], "grad_norm": norm.item()}
        for low in (0.0, 0.25, 0.5, 0.75):
            bin_ = [
                loss for loss, sigma in zip(losses, sigmas) if low <= sigma < low + 0.25 or sigma == low + 0.25 == 1
            ]
            line |= {f"loss_{low}": sum(bin_) / len(bin_)} if bin_ else {}
        if held_out_batch and ((step + 1) % settings["eval_every"] == 0 or step + 1 == settings["steps"]):
            line |= listening_gap(dit, held_out_batch, device, settings["batch"])
            shown["gap"] = line["wrong_0.75"] - line["right_0.75"]
        shown["loss"] = 0.95 * shown.get("loss", line["loss"]) + 0.05 * line["loss"]
        bar.set_postfix_str(" ".join(f"{name} {value:.4f}" for name, value in shown.items()), refresh=False)
        run.log(line | {"seconds": time.time() - last, "memory_gb": mi.peak_memory(device)})
        if (step + 1) % settings["save_every"] == 0 or step + 1 == settings["steps"]:
            run.save(dit, optimiser, step + 1)
        if settings["sample_every"] and (step + 1) % settings["sample_every"] == 0 and held_out:
            show(dit, held_out[0], texts, weights, device, dtype, run.path(f"step-{step + 1}.mp4"))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    say(
        f"{run.path('musicinfuser.safetensors')}: {time.time() - began:.0f} s, peak memory {mi.peak_memory(device):.2f} GB"
    )
    return run.path("musicinfuser.safetensors")


def show(dit, clip, texts, weights, device, dtype, path):
    """A video of the plain prompt, to a held-out clip's music."""
    n, entry = dit.natural, mi.read_safetensors(clip["entry"])[0]
    text = tuple(texts[PLAIN][key][None].to(device) for key in ("y_feat", "y_mask"))
    noise = torch.randn(entry["mean"][None].shape, generator=torch.Generator().manual_seed(0)).to(device)
    z = mi.sample(dit, noise, text, (text[0], text[1] & False), entry["audio"][None].to(device),
                  sigmas=mi.linear_quadratic_schedule(n.steps), cfg=n.cfg, music_cfg=n.music_cfg)  # fmt: skip
    decoder = mi.load_decoder(os.path.join(weights, "decoder.safetensors"), device, dtype)
    with torch.inference_mode():
        mi.save_video(path, decoder(mi.to_vae_space(z, n.mean, n.std))[0], n.fps, clip["path"], clip["start"] / n.fps)


def main():
    parser = argparse.ArgumentParser(description="Train a MusicInfuser adapter on a folder of dance videos.")
    parser.add_argument("--data", required=True, help="folder of AIST videos; its cache is made in it")
    parser.add_argument(
        "--split", choices=("train", "test"), default="train", help="test: list what is held out, and stop"
    )
    for name, (default, kind, text) in OPTIONS.items():
        how = {"action": "store_true"} if kind is bool else {"type": kind, "default": default}
        if name in ("adapter", "dtype"):
            how["choices"] = ("zica", "add") if name == "adapter" else list(mi.DTYPES)
        shown = "" if default in (None, False) else f" (default {default})"
        parser.add_argument("--" + name.replace("_", "-"), help=text + shown, **how)
    options = vars(parser.parse_args())
    if options.pop("split") == "test":
        print("\n".join(video["path"] for video in find_videos(options["data"], None, "test")))
    else:
        train(options.pop("data"), **options)


if __name__ == "__main__":
    mi.main(main)
