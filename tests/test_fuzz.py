"""Damaged files of every kind that is read: each loads, or is one InputError, within a bound of
time and memory. The seeds are the numbers from 0, so that what is found comes again.

FUZZ=100000 pytest tests/test_fuzz.py: so many in all.
"""

import copy
import itertools
import json
import os
import random
import shutil

import pytest
import torch
from conftest import PROMPT, TooLong, bounded, header_of, small_dit, with_header

import musicinfuser as mi
import sample
import train
from dataset.aist import caption
from dataset.cache import Cache, Index
from dataset.clips import video_size
from dataset.runs import RunFolder
from eval import ablate, beside, quality
from eval import judge as jd

FUZZ = int(os.environ.get("FUZZ", 2000))

# ------------------------------------------------------------------------------------------------
# What can be wrong with a file
# ------------------------------------------------------------------------------------------------

# fmt: off
VALUES = [
    None, True, -1, 0, 1, 3, 0.5, 2**40, -(2**63), 2**64, 10**400, 1e300, -1e-300, float("nan"),
    float("inf"), "x", "", "1", "\ud800", "a" * 300, "../..", [], [1], {}, [[]], [-2, -4], {"x": 1},
    [0, 1, 2], ["0", "1"], [None], [1e18] * 12, "/dev/zero", "euler",
]
# fmt: on


def nodes(value, path=()):
    """The path of everything in a JSON value but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items) if isinstance(value, (dict, list)) else ():
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from nodes(inner, (*path, key))


def with_changes(value, rng):
    """A JSON value with one or two of its parts gone, another, or of another name."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 2)):
        paths = list(nodes(value))
        if not paths:
            return value
        *way, key = rng.choice(paths)
        owner = value
        for step in way:
            owner = owner[step]
        kind = rng.randrange(6)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[rng.choice(["x", "song", "steps", "__metadata__"])] = owner.pop(key)
        else:
            owner[key] = another_value(rng)
    return value


def another_value(rng):
    return copy.deepcopy(rng.choice(VALUES))


def damaged_text(whole, rng):
    """The bytes of a JSON file, of one line or of many, that was damaged."""
    if rng.random() < 0.2:
        return damaged_bytes(whole, rng)
    if rng.random() < 0.02:
        return b"[" * 100_000
    lines = whole.decode().splitlines() if whole.count(b"}\n{") else [whole.decode()]
    i = rng.randrange(len(lines))
    value = another_value(rng) if rng.random() < 0.05 else with_changes(json.loads(lines[i]), rng)
    lines[i] = json.dumps(value)
    return "\n".join([*lines, ""]).encode()


WORDS = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1)  # of four bytes: lengths, rates, counts


def damaged_bytes(whole, rng):
    """Cut short, bits flipped, a length that is absurd, a part twice or not at all."""
    damaged, kind = bytearray(whole), rng.randrange(5)
    begins = rng.random() < 0.6  # most formats have their sizes there
    place = rng.randrange(min(len(whole), 4000 if begins else len(whole)))
    if kind == 0:
        return whole[:place]
    if kind == 1:
        for _ in range(rng.randint(1, 8)):
            i = rng.randrange(min(len(whole), 4000 if begins else len(whole)))
            damaged[i] ^= 1 << rng.randrange(8)
    elif kind == 2:
        order = rng.choice(["little", "big"])
        damaged[place : place + 4] = rng.choice(WORDS).to_bytes(4, order)
    else:
        part = damaged[place : place + rng.randrange(200)]
        damaged[place : place + len(part)] = part * 2 if kind == 3 else b""
    return bytes(damaged)


def damaged_tensors(whole, rng):
    """A safetensors file; in half of them only its header is wrong, and in it a name or a value."""
    if rng.random() < 0.3:
        return damaged_bytes(whole, rng)
    header, data = header_of(whole)
    if rng.random() < 0.4 and "__metadata__" in header:
        return with_header(header | {"__metadata__": damaged_metadata(header, rng)}, data)
    if rng.random() < 0.7:
        name = rng.choice(list(header))
        changed = with_changes({"entry": header[name]}, rng)
        return with_header(header | {name: changed["entry"] if "entry" in changed else 0}, data)
    name = rng.choice(list(header))
    header[rng.choice(["x", "pos_frequencies", "__metadata__"])] = header.pop(name)
    return with_header(header, data)


def damaged_metadata(header, rng):
    """Of the JSON within the JSON."""
    metadata = dict(header["__metadata__"])
    name = rng.choice(list(metadata))
    how = damaged_text if metadata[name].startswith("{") else damaged_bytes
    metadata[name] = how(metadata[name].encode(), rng).decode(errors="replace")
    return metadata


# ------------------------------------------------------------------------------------------------
# What reads it
# ------------------------------------------------------------------------------------------------


def use_dit(path, folder):
    """With the options that it prefers, as the scripts settle them."""
    dit = mi.load_dit(path, "meta")
    mi.settle(sample.Options, dit.config.sampling, {})
    options = mi.settle(train.Options, dit.config.training, {"layers": "0"})
    train.complete(options, len(dit.blocks))
    mi.latent_frames(round(dit.config.fps))


def use_adapter(path, folder):
    mi.load_adapter(mi.load_dit(folder / "dit.safetensors", "meta"), path)


def use_recipe(path, folder):
    given = {"weights": str(folder), "device": "cpu"} | sample.read_recipe(path)
    if not {"song", "prompt"} <= given.keys():
        return
    given["weights"] = str(folder)
    options = mi.settle(sample.Options, {}, given)
    mi.choose_device(options.device, options.dtype)
    sample.check(options, small_dit())
    beside.music_of(os.path.splitext(path)[0] + ".mp4")


def use_ranking(path, folder):
    assert len(train.pick_layers(str(path), 3, str(folder))) == 1


def use_config(path, folder):
    shutil.copy(folder / "musicinfuser.safetensors", folder / "state.safetensors")
    config = json.loads((folder / "run.json").read_text())
    with RunFolder(str(folder), True) as run:
        run.begin(config, config, train.FREE)


def use_log(path, folder):
    RunFolder(str(folder), True).cut_log(3)


def use_state(path, folder):
    dit = mi.infuse(small_dit(), [0], rank=2, audio_width=16)
    optimiser = torch.optim.AdamW(mi.adapter_parameters(dit).values())
    RunFolder(str(folder), True).load_state(mi.adapter_parameters(dit), optimiser)


def use_score(path, folder):
    found = quality.Number("imaging").read(str(path).removesuffix(".json"))
    assert found is None or found * 0 == 0


def use_result(path, folder):
    results, failed = ablate.finished(str(folder))
    ablate.same_table(results)
    ablate.print_tables(results, failed)


def use_answers(path, folder):
    kept = beside.read_object(path)
    answers = jd.answers_of(kept | {"videos": {}}, str(folder / "song.wav"), None)
    if isinstance(kept.get("videos"), dict):
        answers = jd.answers_of(kept, str(folder / "song.wav"), None)
    jd.averages([answers])


def use_index(path, folder):
    index = Index(str(path))
    assert index.recall("digest", str(folder / "song.wav"), lambda _: "again")


def use_entry(path, folder):
    cache = Cache(str(folder))
    if cache.holds(path.name):
        cache.read(path.name)["starts"].tolist()


def use_reference(path, folder):
    quality.load_reference(path, 8)


def use_preprocessor(path, folder):
    tokens = mi.AudioEncoder(str(folder))(torch.zeros(4000))
    assert tokens.shape[::2] == (1, 16)


def use_caption(path, folder):
    assert caption(str(path))


def use_sound(path, folder):
    mi.music_window(path, 7, start=0.1, speed=1.25)


def use_video(path, folder):
    """As caching and scoring read it."""
    mi.count_frames(path)
    height, width = video_size(path)
    assert height * width < 2**28
    for frame in itertools.islice(mi.read_frames(path, 16, 16), 40):
        assert frame.shape == (16, 16, 3)
    use_sound(path, folder)


# name of the file that is damaged: (how, what reads it, its share of all)
TARGETS = {
    "dit.safetensors": (damaged_tensors, use_dit, 0.13),
    "musicinfuser.safetensors": (damaged_tensors, use_adapter, 0.1),
    "encoder.safetensors": (damaged_tensors, lambda p, _: mi.load_encoder(p, "meta"), 0.07),
    "decoder.safetensors": (damaged_tensors, lambda p, _: mi.load_decoder(p, "meta"), 0.07),
    "state.safetensors": (damaged_tensors, use_state, 0.05),
    "reference.safetensors": (damaged_tensors, use_reference, 0.05),
    "entry.safetensors": (damaged_tensors, use_entry, 0.06),
    "index.jsonl": (damaged_bytes, use_index, 0.05),
    "video.json": (damaged_text, use_recipe, 0.1),
    "adaptability.json": (damaged_text, use_ranking, 0.05),
    "config.json": (damaged_text, use_config, 0.05),
    "log.jsonl": (damaged_text, use_log, 0.04),
    "score.json": (damaged_text, use_score, 0.04),
    "ours-1/result.json": (damaged_text, use_result, 0.05),
    "answers.json": (damaged_text, use_answers, 0.03),
    "caption.txt": (damaged_bytes, use_caption, 0.02),
    "audio_encoder/preprocessor_config.json": (damaged_text, use_preprocessor, 0.015),
    "song.wav": (damaged_bytes, use_sound, 0.015),
    "video.mp4": (damaged_bytes, use_video, 0.01),
}


@pytest.fixture(scope="module")
def whole(weights, dance_videos, song, tmp_path_factory):
    """A folder with a good file of each kind."""
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    shutil.copytree(weights, folder)
    shutil.copy(song, folder / "song.wav")
    shutil.copy(dance_videos / "wild" / "a.mp4", folder / "video.mp4")
    (folder / "caption.txt").write_text("a dog on a stage, caf\xe9\n", encoding="utf-8")
    write_tensors(folder)
    index = Index(str(folder / "index.jsonl"))
    index.recall("digest", str(folder / "song.wav"), mi.file_digest)
    options = {"prompt": PROMPT, "song": str(folder / "song.wav"), "weights": str(folder)}
    options["adapter"] = str(folder / "musicinfuser.safetensors")
    recipe = mi.asdict(mi.settle(sample.Options, {}, options)) | {"seed": 0}
    config = mi.asdict(mi.settle(train.Options, {}, {})) | {"clips": "4 clips", "init": None}
    config = json.loads(json.dumps(config))
    identity = {"steps": 2, "batch": 1, "data": "toy", "model": ["x"]}
    figures = dict.fromkeys(ablate.KEYS, 0.5) | {"parameters": 9, "seconds": 0.1, "layers": "0"}
    score = {"score": 61.5, "layer": 0, "prompt": PROMPT, "seed": 1}
    answers = {"sha256": mi.file_digest(folder / "song.wav"), "prompt": None}
    answers |= {"answers": {"style": "8/10", "beat": "7"}}
    for name, value in {
        "video.json": recipe,
        "adaptability.json": {"ranking": [2, 0, 1], "adaptability": [0.1, 0.0, 0.3]},
        "config.json": config,
        "run.json": config,
        "score.json": score,
        "ours-1/result.json": figures | {"identity": identity, "commit": "x", "hardware": "x"},
        "answers.json": {"videos": {str(folder / "song.wav"): answers}},
    }.items():
        mi.save_json(folder / name, value)
    lines = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(5)]
    (folder / "log.jsonl").write_text("".join(lines))
    return folder


def write_tensors(folder):
    starts = {"starts": torch.tensor([3, 9]), "size": torch.tensor([48, 96])}
    Cache(str(folder)).write("entry.safetensors", starts)
    cov = {"mean": torch.zeros(8), "cov": torch.eye(8)}
    mi.save_safetensors(folder / "reference.safetensors", cov, {"feature": quality.FEATURE})
    dit = mi.infuse(small_dit(), [0], rank=2, audio_width=16)
    parameters = mi.adapter_parameters(dit)
    optimiser = torch.optim.AdamW(parameters.values())
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    RunFolder(str(folder), True).save(dit, optimiser, 2)
    shutil.copy(folder / "musicinfuser.safetensors", folder / "of-a-run.safetensors")


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_loads_or_is_one_line(whole, tmp_path, monkeypatch, name):
    damage, use, share = TARGETS[name]
    folder = tmp_path / "folder"
    shutil.copytree(whole, folder)
    monkeypatch.chdir(folder)
    path, good = folder / name, (whole / name).read_bytes()
    path.write_bytes(good)
    use(path, folder)
    refused = 0
    with bounded():
        for seed in range(max(5, round(share * FUZZ))):
            path.write_bytes(damage(good, random.Random(seed)))
            try:
                with bounded(20):
                    use(path, folder)
            except mi.InputError as error:
                refused += 1
                assert str(error) and len(str(error)) < 3000
            except (Exception, TooLong) as error:
                raise AssertionError(f"seed {seed} of {name}") from error
    tolerant = "log", "score", "ours-1", "answers", "index", "entry", "caption", "video.mp4"
    assert refused or name.startswith(tolerant) or FUZZ < 500
