"""The real commands over bad and odd inputs: each ends in the right result, or in one line and a
non-zero code, with nothing half-written and within a bound of time and memory.

Top to bottom:   the folder that they run in | the table | what needs a process of its own
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from conftest import PROMPT, PYTHONPATH, ROOT, bounded, small_dit, write_wav

import adaptability
import musicinfuser as mi
import sample
import train
from dataset.aist import find_videos
from dataset.clips import Preprocessor
from eval import ablate, evaluate
from eval import beats as bt
from eval.quality import FEATURE
from tiny import make

COMMANDS = {
    "sample": sample.main,
    "train": train.main,
    "adaptability": adaptability.main,
    "evaluate": evaluate.main,
    "ablate": ablate.main,
    "make": make.main,
}
ALWAYS = {  # what every line of a command has; what stands in the line counts
    "sample": "--weights weights --device cpu --out out",
    "train": "--weights weights --device cpu --out run --layers 0 --rank 2 --steps 1",
    "adaptability": "--weights weights --device cpu --out run --metric loud:score --prompts dog",
    "evaluate": "",
    "ablate": "--weights weights --device cpu --data . --out cells --seeds 1 --steps 1 --batch 1",
    "make": "",
}
SECONDS = 100  # of a line at most; most take a tenth of one


# ------------------------------------------------------------------------------------------------
# The folder that they run in
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def attacked(weights, dance_videos, song, tmp_path_factory):
    """weights/, aist/, wild/, song.wav, and everything that is wrong with such things."""
    folder = tmp_path_factory.mktemp("attacked")
    shutil.copytree(weights, folder / "weights")
    shutil.copytree(dance_videos, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "aist" / ".musicinfuser", ignore_errors=True)
    for name in ("gPO_sGR_c01_d07_mPO0_ch03", "gKR_sBM_c01_d30_mKR1_ch04"):
        os.remove(folder / "aist" / f"{name}.mp4")  # two to train on are enough
    shutil.copy(song, folder)
    prep = Preprocessor(str(folder / "aist" / ".musicinfuser"), str(weights), (32, 32), 7, 30)
    prep.texts_of(prep.clips(find_videos(folder / "aist", folder / "wild")))
    prep.clips(find_videos(folder / "aist", split="test"))
    bad_media(folder, song)
    bad_weights(folder, weights)
    bad_texts(folder)
    return folder


def bad_media(folder, song):
    for name in ("empty.mp4", "empty.wav"):
        (folder / name).touch()
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:3,\n{song}\n#EXT-X-ENDLIST\n")
    (folder / "concat.wav").write_text(f"ffconcat version 1.0\nfile {song}\n")
    (folder / "http:127.0.0.1:1.mp4").write_text("no video")
    (folder / "<video0>.mp4").write_text("no video")
    os.mkfifo(folder / "pipe.wav")
    whole = (folder / "wild" / "a.mp4").read_bytes()
    (folder / "short.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "video.mp4").write_bytes(whole)
    wav = song.read_bytes()
    for rate in (1, 2**32 - 1):
        (folder / f"rate-{rate}.wav").write_bytes(wav[:24] + rate.to_bytes(4, "little") + wav[28:])
    write_wav(folder / "silence.wav", np.zeros(44100))
    mi.save_video(folder / "dot.mp4", torch.zeros(3, 40, 2, 2), song=song)
    mi.save_video(folder / "mute.mp4", torch.zeros(3, 40, 16, 16))
    aist = "gBR_sBM_c01_d01_mBR1_ch01.mp4"
    for name in ("mute", "links"):
        (folder / name).mkdir()
    shutil.copy(folder / "mute.mp4", folder / "mute" / aist)
    (folder / "links" / "gone.mp4").symlink_to("nowhere")
    (folder / "links" / "zero.mp4").symlink_to("/dev/zero")
    os.mkfifo(folder / "links" / "pipe.mp4")
    (folder / "links" / "folder.mp4").mkdir()
    for name in ("c.mp4", "c.txt"):
        shutil.copytree(folder / "wild", folder / "links" / name)
    (folder / "lists").mkdir()
    shutil.copy(folder / "playlist.mp4", folder / "lists")
    shutil.copy(folder / "concat.wav", folder / "lists" / "concat.mp4")
    base = f"<BaseURL>file://{folder}/wild/a.mp4</BaseURL>"
    for kind in ("AdaptationSet", "Period", "MPD"):
        base = f"<{kind} mimeType='video/mp4'>{base}</{kind}>"
    (folder / "lists" / "dash.mp4").write_text(f"<?xml version='1.0'?>\n{base}\n")


def bad_weights(folder, weights):
    dit = small_dit()
    for name, config in {
        "timeless": mi.ModelConfig(fps=1e-300),
        "flat": mi.ModelConfig(std=(0.0,) * 12),
        "prefers": mi.ModelConfig(sampling={"solver": ["rk4"]}, training={"layers": 5}),
        "wordy": mi.ModelConfig(sampling={"size": "32x32"}, training={"wild": 3}),
    }.items():
        dit.config = config
        shutil.copytree(weights, folder / name)
        mi.save_dit(dit, folder / name / "dit.safetensors")
    shutil.copytree(weights, folder / "deaf")
    config = folder / "deaf" / "audio_encoder" / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sampling_rate": None}))
    wrong = {"mean": torch.zeros(5), "cov": torch.eye(5)}
    mi.save_safetensors(folder / "deaf" / "reference.safetensors", wrong, {"feature": FEATURE})
    for name in ("remote", "words"):
        shutil.copytree(weights, folder / name)
    code = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "remote" / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(code))
    (folder / "remote" / "tokenizer" / "evil.py").write_text("open('evil', 'w').close()\n")
    sizes = {"vocab_size": 9, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    t5.save_pretrained(folder / "words" / "text_encoder")
    (folder / "deep.safetensors").write_bytes(b"\0\0\1\0\0\0\0\0" + b"[" * 65536)
    (folder / "huge.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    (folder / "folder.safetensors").mkdir()


RECIPE = {"song": "song.wav", "prompt": PROMPT, "seed": 1, "frames": 7, "size": [32, 32]}


def bad_texts(folder):
    recipes = {
        "good": {},
        "no-song": {"song": 5},
        "no-prompt": {"prompt": ["a dog"]},
        "half-a-character": {"prompt": "dog \ud800"},
        "no-seed": {"seed": "one"},
        "many-seeds": {"seed": [1, 2]},
        "no-size": {"size": {"height": 32}},
        "odd-size": {"size": [32, "a"]},
        "no-frames": {"frames": None},
        "no-number": {"cfg": "high"},
        "no-layers": {"skip": 1},
        "odd-layers": {"skip": ["1"]},
        "no-switch": {"offload": "never"},
    }
    for name, change in recipes.items():
        (folder / f"{name}.json").write_text(json.dumps(RECIPE | change))
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "list.json").write_text("[1]")
    (folder / "binary.json").write_bytes(bytes(range(256)))
    (folder / "ranking.json").write_text('{"ranking": [true, 0, 2]}')
    (folder / "strings.json").write_text('{"ranking": ["0", "1", "2"]}')
    (folder / "video.json").write_text('{"song": "song.wav", "start": 1e999}')
    (folder / "loud.py").write_text("def score(video):\n    return float(video.square().mean())\n")
    (folder / "breaks.py").write_text("1 / 0\n")
    (folder / "cells" / "ours-1").mkdir(parents=True)
    (folder / "cells" / "ours-1" / "result.json").write_text('{"identity": [1]}')


# ------------------------------------------------------------------------------------------------
# The table: a command line, and words of the line that it ends with. "works": it does, and prints
# these words. "later": what it wrote until then may stay. NAME=VALUE goes into the environment.
# ------------------------------------------------------------------------------------------------

# fmt: off
TABLE = [
    # Songs
    ("sample nowhere.wav dog", "no such file: nowhere.wav"),
    ("sample '' dog", "no such file"),
    ("sample . dog", "no such file"),
    ("sample pipe.wav dog", "no such file"),
    ("sample /dev/zero dog", "no such file"),
    ("sample empty.wav dog", "empty.wav cannot be read as audio"),
    ("sample concat.wav dog", "concat.wav cannot be read as audio"),
    ("sample playlist.mp4 dog", "playlist.mp4 cannot be read as audio"),
    ("sample short.mp4 dog", "short.mp4 cannot be read as audio"),
    ("sample mute.mp4 dog", "has no sound"),
    ("sample http://127.0.0.1:1/a.wav dog", "no such file"),
    ("sample http:127.0.0.1:1.mp4 dog", "cannot be read as audio"),
    ("sample rate-1.wav dog", "rate-1.wav"),
    ("sample rate-4294967295.wav dog", "rate-4294967295.wav"),
    ("sample song.wav dog --start 1e18", "song.wav"),
    ("sample song.wav dog --start 1e300", "--start must be 9223372036854775807 or less"),
    ("sample song.wav dog --start=-0.001", "--start must be 0 or more"),
    ("sample song.wav dog --speed nan", "--speed must be a number"),
    ("sample silence.wav dog", "works: song     silence.wav"),
    ("sample video.mp4 dog", "works: out/video-dog-0.mp4"),
    ("sample song.wav ''", "works: out/song-empty-0.mp4"),
    ("sample song.wav '/../..'", "works: out/song-empty-0.mp4"),
    # Sizes, lengths, seeds
    ("sample song.wav dog --frames 1", "works: frames 1\n"),
    ("sample song.wav dog --frames 9999999999999999999999", "--frames must be 1000000 or less"),
    (f"sample song.wav dog --frames {10**400}", "--frames must be 1000000 or less"),
    ("sample song.wav dog --frames=-5", "1 or 7"),
    ("sample song.wav dog --size 0x0", "multiples of 16"),
    ("sample song.wav dog --size 99999999984x32", "up to 8192"),
    ("sample song.wav dog --size -32x32", "error"),
    ("sample song.wav dog --size 16x16 --skip 0 1 2", "works: skip 0 1 2"),
    ("sample song.wav dog --steps 99999999999", "--steps must be 100000 or less"),
    ("sample song.wav dog --seed 9223372036854775807", "works: 9223372036854775807.mp4"),
    ("sample song.wav dog --seed -1", "from 0 to 2^63"),
    ("sample song.wav dog --skip -1", "from 0 to 2"),
    ("sample song.wav dog --lora-scale 1e18", "works: lora scale 1e+18"),
    ("sample song.wav dog --cfg 1e18 --steps 9", "works: cfg 1e+18"),
    # Where it goes
    ("sample song.wav dog --out song.wav/x", "cannot write in song.wav/x"),
    ("sample song.wav dog --out song.wav", "cannot write in song.wav"),
    ("sample song.wav dog --out /proc/nowhere", "cannot write in /proc/nowhere"),
    ("sample song.wav dog --out ''", "cannot write"),
    ("sample song.wav dog --out video.mp4", "video.mp4 exists"),
    ("sample song.wav dog --out new/A.MP4", "works: new/A.MP4"),
    # Weights and adapters
    ("sample song.wav dog --weights nowhere", "no such file: nowhere/dit.safetensors"),
    ("sample song.wav dog --weights song.wav", "no such file: song.wav/dit.safetensors"),
    ("sample song.wav dog --weights timeless", "fps"),
    ("sample song.wav dog --weights flat", "std"),
    ("sample song.wav dog --weights prefers", "--solver must be one of"),
    ("sample song.wav dog --weights wordy", "--size cannot be '32x32'"),
    ("sample song.wav dog --weights deaf", "is for sound at None Hz"),
    ("sample song.wav dog --weights words", "tokenizer has more tokens than words/text_encoder"),
    ("sample song.wav dog --weights remote", ""),
    ("sample song.wav dog --weights deaf --adapter none", "works: adapter none"),
    ("sample song.wav dog --adapter song.wav", "song.wav is not a whole safetensors file"),
    ("sample song.wav dog --adapter deep.safetensors", "not a whole safetensors file"),
    ("sample song.wav dog --adapter huge.safetensors", "not a whole safetensors file"),
    ("sample song.wav dog --adapter folder.safetensors", "no such file: folder.safetensors"),
    ("sample song.wav dog --adapter weights/dit.safetensors", "not a MusicInfuser adapter"),
    # Recipes
    ("sample --from nowhere.json", "nowhere.json is not the recipe of a video"),
    ("sample --from deep.json", "deep.json is not the recipe of a video"),
    ("sample --from list.json", "list.json is not the recipe of a video"),
    ("sample --from binary.json", "binary.json is not the recipe of a video"),
    ("sample --from song.wav", "song.wav is not the recipe of a video"),
    ("sample --from no-song.json", "song cannot be 5"),
    ("sample --from no-prompt.json", "prompt cannot be"),
    ("sample --from half-a-character.json", "works: out/song-dog"),
    ("sample --from no-seed.json", "--seed cannot hold 'one'"),
    ("sample --from many-seeds.json", "--seed cannot hold [1, 2]"),
    ("sample --from no-size.json", "--size cannot be"),
    ("sample --from odd-size.json", "--size cannot hold 'a'"),
    ("sample --from no-frames.json", "works: frames 7\n"),
    ("sample --from no-number.json", "--cfg must be a number"),
    ("sample --from no-layers.json", "--skip cannot be 1"),
    ("sample --from odd-layers.json", "--skip cannot hold '1'"),
    ("sample --from no-switch.json", "--offload cannot be 'never'"),
    ("sample --from good.json --seed 2 3", "works: in-the-park-3.mp4"),
    # The machine
    ("WORLD_SIZE=2 sample song.wav dog", "not torchrun"),
    ("WORLD_SIZE=many sample song.wav dog", "not torchrun"),
    ("IMAGEIO_FFMPEG_EXE=/nowhere/ffmpeg sample song.wav dog", "there is no ffmpeg"),
    # Training
    ("train --data nowhere", "no such folder: nowhere"),
    ("train --data song.wav", "no such folder: song.wav"),
    ("train --data wild", "no AIST video of cameras c01 and c10"),
    ("train --data mute", "no AIST video"),
    ("train --data aist --wild nowhere", "no such folder: nowhere"),
    ("train --data aist --wild links", "works: skipped  links/pipe.mp4 is no file"),
    ("train --data lists --wild lists", "no AIST video"),
    ("train --data aist --wild lists", "works: skipped  4 of 6 videos"),
    ("train --data aist --out song.wav", "cannot use song.wav"),
    ("train --data aist --out /proc/nowhere", "cannot use /proc/nowhere"),
    ("train --data aist --layers ''", "--layers"),
    ("train --data aist --layers 0,1,", "--layers 0,1,"),
    ("train --data aist --layers 2,99999999", "layers must be different numbers from 0 to 2"),
    ("train --data aist --layers deep.json", "deep.json is not a ranking"),
    ("train --data aist --layers strings.json", "strings.json is not a ranking"),
    ("train --data aist --layers ranking.json --top 4", "--top must be from 1 to 3"),
    ("train --data aist --rank 100000000000000000000", "--rank must be"),
    ("train --data aist --heads 5", "--heads must divide the model's width, 32"),
    ("train --data aist --heads 0", "--heads must be 1 or more"),
    ("train --data aist --window 1.5", "invalid int value"),
    ("train --data aist --lr 1e999", "--lr must be a number"),
    ("train --data aist --eval-sigmas nan", "--eval-sigmas must be from 0 to 1"),
    ("train --data aist --min-size 5", "--min-size takes two numbers"),
    ("train --data aist --init nowhere", "no such file: nowhere"),
    ("train --data aist --init weights/dit.safetensors", "not a MusicInfuser adapter"),
    ("train --data aist --offload --shard", "do not go together"),
    ("train --data aist --weights prefers", "--layers cannot be 5"),
    ("train --data aist --weights wordy", "--wild cannot be 3"),
    ("train", "--data"),
    # Ranking
    ("adaptability --layers 0-9999999999", "layers from 0 to 2"),
    ("adaptability --layers 1,,2", "ranges such as"),
    ("adaptability --layers ²", "ranges such as"),
    ("adaptability --prompts ' '", "an empty one"),
    ("adaptability --prompts-file nowhere.txt", "cannot read the prompts of nowhere.txt"),
    ("adaptability --prompts-file aist", "cannot read the prompts of aist"),
    ("adaptability --prompts-file song.wav", "cannot read the prompts of song.wav"),
    ("adaptability --metric breaks:score", "cannot be imported (ZeroDivisionError"),
    ("adaptability --metric loud:none", "cannot be imported (AttributeError"),
    ("adaptability --metric os:system", "later: os:system fails on"),
    ("adaptability --metric frechet", "needs --reference"),
    ("adaptability --metric frechet --reference links", "works: reference 4 clips"),
    ("adaptability --metric frechet --weights deaf", "later: deaf/reference.safetensors has cov"),
    ("adaptability --seed -3", "numbers from 0"),
    ("adaptability --batch 99999", "--batch must be 4096 or less"),
    ("adaptability --out song.wav", "song.wav/kept/settings"),
    ("adaptability --skip-scale inf", "--skip-scale must be a number"),
    ("adaptability --seed 99999999999999999999999 --layers 0", "works: layers 1, 2 are missing"),
    # Measuring
    ("evaluate", "nothing to do"),
    ("evaluate nowhere.mp4", "no such file: nowhere.mp4"),
    ("evaluate <video0>", "no such file: <video0>"),
    ("evaluate imageio:cockatoo.mp4", "no such file"),
    ("evaluate http://127.0.0.1:1/a.mp4", "no such file"),
    ("evaluate video.mp4", "video.json: start is inf"),
    ("evaluate list.mp4 short.mp4", "no such file: list.mp4"),
    ("evaluate playlist.mp4", "playlist.mp4 cannot be read as audio"),
    ("evaluate concat.wav", "concat.wav cannot be read as audio"),
    ("evaluate empty.mp4", "empty.mp4 cannot be read as audio"),
    ("evaluate http:127.0.0.1:1.mp4", "http:127.0.0.1:1.mp4 cannot be read as audio"),
    ("evaluate '<video0>.mp4'", "<video0>.mp4 cannot be read as audio"),
    ("evaluate dot.mp4 --song nowhere.wav", "no such file: nowhere.wav"),
    ("evaluate dot.mp4 --judge nowhere", "no such folder: nowhere"),
    ("evaluate dot.mp4 --json list.json", "list.json is not what sample.py writes"),
    ("evaluate dot.mp4 --json binary.json", "binary.json is not JSON"),
    ("evaluate --caption aist", "--caption needs --judge"),
    ("evaluate --protocol --songs nowhere", "there is no folder nowhere"),
    ("evaluate --protocol --songs aist", "lacks the held-out"),
    ("evaluate dot.mp4 --dtype float8", "invalid choice"),
    # Ablating
    ("ablate nonsense", "no row nonsense"),
    ("ablate ours --data nowhere", "make them: python -m tiny.make data nowhere"),
    ("ablate ours --data aist", "there is no aist/aist and aist/wild"),
    ("ablate ours --seeds -1", "--seeds takes numbers from 0"),
    ("ablate ours --steps 0 --dry-run", "--steps must be 1 or more"),
    ("ablate ours --films -1 --dry-run", "--films must be 0 or more"),
    ("ablate ours --weights nowhere", "no such file: nowhere/dit.safetensors"),
    ("ablate ours --dry-run", "works: failed   ours, seed 1"),
    ("ablate --table --out nowhere", "there is no finished cell in nowhere"),
    ("ablate --table", "there is no finished cell in cells"),
    ("ablate no-LoRA first-layers --table", "there is no finished cell in cells"),
    # Making the toy
    ("make nonsense", "no stage nonsense"),
    ("make data toy --videos 0", "--videos takes 1 or more"),
    ("make report --songs 1", "--songs 2 or more"),
    ("make report --adapter nowhere", "no such file: nowhere"),
    ("make data --videos 1e3", "invalid int value"),
    ("make data song.wav --videos 1", "cannot write"),
    ("make hear --sounds nowhere", "no sampled instruments"),
]
# fmt: on


@pytest.fixture
def room(attacked, tmp_path, monkeypatch):
    """A copy of the folder to run in; time and memory have an end."""
    folder = tmp_path / "room"
    shutil.copytree(attacked, folder, symlinks=True, ignore=pipes)
    for pipe in ("pipe.wav", "links/pipe.mp4"):
        os.mkfifo(folder / pipe)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(bt, "import_librosa", lambda: None)  # what it is needed for comes later
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    with bounded():
        yield folder
    sys.unraisablehook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pipes(folder, names):
    return [name for name in names if name.startswith("pipe.")]


def files(folder):
    """{path: (size, date)} of all files but the cache's, which every command may fill."""
    found = {}
    for path in folder.rglob("*"):
        if ".musicinfuser" not in path.parts and "__pycache__" not in path.parts:
            state = path.lstat()
            found[str(path)] = None if path.is_dir() else (state.st_size, state.st_mtime_ns)
    return found


def attack(line, monkeypatch, capsys):
    """Run a line of the table in this process: -> (its error or "", what it printed)."""
    words = shlex.split(line)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    command, *arguments = words
    monkeypatch.setattr(sys, "argv", [command, *shlex.split(ALWAYS[command]), *arguments])
    error = ""
    try:
        with bounded(SECONDS):
            mi.main(COMMANDS[command])
    except SystemExit as stop:
        error = stop.code
    captured = capsys.readouterr()
    if error == 2:  # argparse's
        error = captured.err.strip().splitlines()[-1]
    return error, captured.out


@pytest.mark.parametrize("line, words", TABLE, ids=[line[:70] for line, _ in TABLE])
def test_what_is_odd_works_or_ends_in_one_line(room, monkeypatch, capsys, line, words):
    before = files(room)
    error, printed = attack(line, monkeypatch, capsys)
    assert not list(room.rglob(".tmp*"))
    if words.startswith("works"):
        assert not error and words.removeprefix("works: ") in printed
        return
    assert isinstance(error, str) and words.removeprefix("later: ") in error
    assert "error: " in error and "\n" not in error and len(error) < 700
    after = {path: state for path, state in files(room).items() if state or path in before}
    if words.startswith("later"):
        after = {path: after[path] for path in before}
    assert after == before


class Fault(RuntimeError):
    """A mistake of ours."""


NOT_THEIRS = Fault("ours"), OSError("ours"), KeyError("ours"), ValueError("ours")


@pytest.mark.parametrize("error", NOT_THEIRS, ids=repr)
def test_our_own_mistakes_keep_their_traceback(room, error):
    def breaks():
        raise error

    with pytest.raises(type(error)):
        mi.main(breaks)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("no room")], ids=repr)
def test_no_memory_is_one_line(room, error):
    def breaks():
        raise error

    with pytest.raises(SystemExit, match="^error: out of memory; .*--offload take less$"):
        mi.main(breaks)


# ------------------------------------------------------------------------------------------------
# What needs a process of its own
# ------------------------------------------------------------------------------------------------

SAMPLE = "python sample.py {} dog --weights weights --device cpu --out out"
STRANGE = "$'\\xff \\xe6\\xad\\x8c.wav'"
LINES = {
    "full disk": ("ulimit -f 20; " + SAMPLE.format("song.wav") + " --size 128x128", "cannot write"),
    "strange name": (f"mv song.wav {STRANGE}; " + SAMPLE.format(STRANGE), ""),
    "nobody reads": ("python train.py --data aist --split test | true; exit ${PIPESTATUS[0]}", "?"),
}


@pytest.mark.parametrize("name", LINES)
def test_the_shell_is_strange(room, name):
    line, words = LINES[name]
    line = line.replace("python ", f"{sys.executable} ", 1).replace(
        " sample.py", f" {ROOT}/sample.py"
    )
    line = line.replace(" train.py", f" {ROOT}/train.py")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"}
    how = {"env": os.environ | ascii_only, "capture_output": True, "text": True}
    run = subprocess.run(["bash", "-c", line], **how)
    assert "Traceback" not in run.stderr and "Exception" not in run.stderr
    assert not list(room.rglob(".tmp*"))
    if words != "?":
        assert (run.returncode != 0) == bool(words) and words in run.stderr
    assert bool(list(room.glob("out/*.mp4"))) == (not words)


@pytest.mark.parametrize(
    "module", ["sample", "train", "adaptability", "eval.evaluate", "tiny.make"]
)
def test_stopped_while_it_imports(module):
    """Before anything of ours runs: the signal ends it, without a word."""
    code = "import runpy, os, signal, sys; sys.argv = ['x']\n"
    code += "class Stops:\n    def find_spec(self, name, *_):\n"
    code += "        if name == 'numpy': os.kill(os.getpid(), signal.SIGINT)\n"
    code += f"sys.meta_path.insert(0, Stops())\nrunpy.run_module('{module}', run_name='__main__')\n"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == -signal.SIGINT and not run.stderr


# ------------------------------------------------------------------------------------------------
# Killed at a random moment; KILLS=20 pytest -k killed_while: so many times
# ------------------------------------------------------------------------------------------------

KILLS = int(os.environ.get("KILLS", 2))
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
RANK = "--weights weights --device cpu --metric loud:score --prompts dog stage --batch 1 --keep"


def killed(line, folder, number, begun, moment):
    """Start a command in `folder`, kill it `moment` seconds after begun(); its standard error."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TMPDIR": str(temporary)}
    how = {"env": os.environ | threads | {"PYTHONPATH": PYTHONPATH}, "cwd": folder}
    how |= {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(list(map(str, line)), **how) as run:
        while not begun() and run.poll() is None:
            time.sleep(0.02)
        time.sleep(moment)
        if number == signal.SIGINT and run.poll() is None:
            os.killpg(run.pid, number)  # as a terminal does: ffmpeg hears it too
        else:
            run.send_signal(number)
        error = run.stderr.read().decode()
    assert "Traceback" not in error
    if number != signal.SIGKILL and run.returncode:
        assert run.returncode < 0 or error.strip().splitlines()[-1] == "stopped"
        assert not list(folder.rglob(".tmp*")) and not list(temporary.iterdir())
    return run.returncode


def check_whole(folder):
    """Every file that has its name is all there."""
    for path in folder.rglob("*.*"):
        if any(part.startswith(".tmp") for part in path.parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".mp4":
            assert mi.count_frames(path) > 0


def in_this_process(main, line, monkeypatch):
    mi.clear_temporaries.cache_clear()  # as if it were another
    monkeypatch.setattr(sys, "argv", ["x", *line])
    main()


def test_ranking_killed_while_it_samples_ends_the_same(room, monkeypatch):
    line = shlex.split(RANK)
    in_this_process(adaptability.main, [*line, "--out", "whole"], monkeypatch)
    wanted = json.loads((room / "whole" / "adaptability.json").read_text())
    rng = random.Random(0)
    for i in range(KILLS):
        out = room / f"run-{i}"
        script = [sys.executable, os.path.join(ROOT, "adaptability.py"), *line, "--out", out.name]
        killed(script, room, SIGNALS[i % 3], lambda: list(out.glob("kept/*-*.json")), rng.random())
        check_whole(out)
        in_this_process(adaptability.main, [*line, "--out", out.name], monkeypatch)
        found = json.loads((out / "adaptability.json").read_text())
        assert found["ranking"] == wanted["ranking"]
        assert found["adaptability"] == pytest.approx(wanted["adaptability"], abs=1e-6)
        names = {path.relative_to(room / "whole") for path in (room / "whole").rglob("*")}
        assert {path.relative_to(out) for path in out.rglob("*")} == names


def test_evaluating_killed_while_it_scores_ends_the_same(room, monkeypatch):
    pytest.importorskip("librosa")
    monkeypatch.undo()  # the room's stand-in for librosa
    monkeypatch.chdir(room)
    from test_eval import dance

    videos = [dance(room / f"{name}.mp4", late=i / 4) for i, name in enumerate("abcd")]
    evaluating = [*videos, "--json", "scores.json"]
    in_this_process(evaluate.main, evaluating, monkeypatch)
    wanted = (room / "scores.json").read_bytes()
    rng = random.Random(0)
    for i in range(KILLS):
        (room / "scores.json").unlink()
        script = [sys.executable, "-m", "eval.evaluate", *evaluating]
        killed(script, room, SIGNALS[i % 3], lambda: True, 10 * rng.random())
        if (room / "scores.json").exists():  # it was done
            assert (room / "scores.json").read_bytes() == wanted
        in_this_process(evaluate.main, evaluating, monkeypatch)
        assert (room / "scores.json").read_bytes() == wanted
        assert not list(room.glob(".tmp*"))
