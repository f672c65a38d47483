"""Real recordings with beats that can be trusted, for the audio encoder: songs with charts, and
game music where two beat trackers agree. They come from Debian's packages; none of them is in
this repository."""

import glob
import json
import os
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import musicinfuser as mi
from eval.beats import import_librosa
from tiny.music import FASTEST, RATE, SLOWEST, save_wav
from tiny.studio import WORK

# fmt: off
TRAINING = {  # Debian package: its recordings, below --sounds; their licences
    "colobot-common-sounds": "games/colobot/music/*.ogg",  # GPL-3+
    "extremetuxracer-data": "games/etr/music/*.ogg",  # GPL-2+
    "fillets-ng-data": "games/fillets-ng/music/*.ogg",  # GPL-2
    "fretsonfire-songs-muldjord": "games/fretsonfire/data/songs/muldjord/*/song.ogg",  # CC-BY-SA
    "frozen-bubble-data": "games/frozen-bubble/snd/*.ogg",  # GPL-2
    "hedgewars-data": "games/hedgewars/Data/Music/*.ogg",  # GPL-2
    "hyperrogue-music": "hyperrogue/music/hr3-*.ogg",  # CC-BY-SA
    "lincity-ng-data": "games/lincity-ng/music/default/*.ogg",  # GPL-2+
    "marsshooter-data": "games/marsshooter/audio/music/*.ogg",  # CC-BY-SA
    "naev-data": "naev/dat/snd/music/*.ogg",  # GPL, CC-BY, CC-BY-SA
    "openclonk-data": "games/openclonk/Music.ocg/*.ogg",  # CC-BY or CC0
    "pushover-data": "pushover/themes/*.ogg",  # GPL-3+
    "starfighter-data": "starfighter/music/*.ogg",  # GPL-2+
    "supertux-data": "games/supertux2/music/*/*.ogg",  # GPL-2+, CC-BY-SA
    "supertuxkart-data": "games/supertuxkart/data/music/*.ogg",  # CC-BY-SA, CC-BY, CC0
    "warzone2100-music": "games/warzone2100/music/**/*.opus",  # GPL-2+
    "xmoto-data": "games/xmoto/Textures/Musics/*.ogg",  # GPL-2+
}
VALIDATION = {  # kept back whole
    "asc-music": "games/asc/music/*.mp3",  # GPL-2+
    "fretsonfire-songs-sectoid": "games/fretsonfire/data/songs/sectoid/*/song.ogg",  # MIT
    "gigalomania-data": "gigalomania/music/*.ogg",  # CC-BY
    "gunroar-data": "games/gunroar/sounds/musics/*.ogg",  # BSD
    "megaglest-data": "games/megaglest/techs/megapack/factions/*/music/*.ogg",  # CC-BY-SA
    "parsec47-data": "games/parsec47/sounds/*.ogg",  # BSD
    "raincat-data": "games/raincat/data/music/*.ogg",  # CC-BY-SA
    "singularity-music": "games/singularity/music/**/*.ogg",  # CC-BY-SA
    "titanion-data": "games/titanion/sounds/musics/*.ogg",  # BSD
    "torcs-data": "games/torcs/data/music/*.ogg",  # GPL-2+
}
SCORES = {  # MIDI files, for training
    "openttd-openmsx": "games/openttd/baseset/openmsx/*.mid",  # GPL-2
    "planetblupi-music-midi": "planetblupi/music/*.mid",  # GPL-3+
}
# fmt: on


LONGEST = 100.0  # seconds of each recording
LATE = 0.02  # seconds by which librosa hears a beat too late


class Piece(NamedTuple):
    samples: np.ndarray  # at 16 kHz, float16: half the memory
    beats: np.ndarray  # (K,), seconds
    genre: int  # its place in world.GENRES, or -1
    source: str


def beat_at(beats, times):
    """Positions in beats; beyond the first and the last beat at their tempo."""
    i = np.clip(np.searchsorted(beats, times) - 1, 0, len(beats) - 2)
    return i + (times - beats[i]) / (beats[i + 1] - beats[i])


def find_recordings(folder, packages):
    """[(package, file)] below `folder`, /usr/share where the packages are installed."""
    found, missing = [], []
    for package, pattern in packages.items():
        files = sorted(glob.glob(os.path.join(folder, pattern), recursive=True))
        found += [(package, file) for file in files]
        if not files:
            missing.append(package)
    if missing:
        raise mi.InputError(
            f"recordings are missing below {folder}: apt-get install {' '.join(missing)}, or "
            "unpack them and name the folder with --sounds"
        )
    return found


def pieces_of(folder, packages):
    """The parts of the recordings whose beats are known, as Pieces."""
    pieces = []
    for _, file in tqdm(find_recordings(folder, packages), "recordings", mininterval=10):
        samples = mi.load_audio(file, 0, LONGEST).numpy()
        chart = os.path.join(os.path.dirname(file), "notes.mid")
        if os.path.exists(chart):
            guitar = os.path.join(os.path.dirname(file), "guitar.ogg")
            guitar = mi.load_audio(guitar, 0, LONGEST).numpy()
            samples = samples[: len(guitar)] + guitar[: len(samples)]
            runs = [in_step(chart_beats(chart, len(samples) / RATE), librosa_beats(samples))]
        else:
            runs = kept_beats(file, samples)
        for beats in runs:
            pieces.append(cut_out(samples, beats, file))
    return pieces


def kept_beats(file, samples):
    """agreed_beats, which take seconds a song, kept in work/."""
    path = os.path.join(WORK, "beats", f"{mi.file_digest(file)}.json")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        mi.save_json(path, [beats.tolist() for beats in agreed_beats(file, samples)])
    with open(path) as kept:
        return [np.array(beats) for beats in json.load(kept)]


def cut_out(samples, beats, source):
    start = max(0, int((beats[0] - 0.5) * RATE))
    end = int((beats[-1] + 0.5) * RATE)
    return Piece(samples[start:end].astype(np.float16), beats - start / RATE, -1, source)


# --------------------------------------------------------------------------------------------------
# Two beat trackers
# --------------------------------------------------------------------------------------------------


def check_trackers():
    import_librosa()
    if not shutil.which("aubio"):
        raise mi.InputError("the second beat tracker is missing: apt-get install aubio-tools")


def aubio_beats(path):
    """Of a file's first LONGEST seconds, at the rate that aubio's notion of tempo is made for."""
    with tempfile.TemporaryDirectory() as folder:
        wav = os.path.join(folder, "song.wav")
        save_wav(wav, mi.load_audio(path, 0, LONGEST, rate=44100).numpy(), 44100)
        run = subprocess.run(["aubio", "beat", "-i", wav], capture_output=True, text=True)
    return np.array([float(line) for line in run.stdout.split()])


def librosa_beats(samples):
    beats = import_librosa().beat.beat_track(y=samples, sr=RATE, hop_length=256, units="time")[1]
    return beats - LATE


def agreed_beats(path, samples, shortest=9):
    """[beats (K,)]: the runs of at least so many beats on which librosa and aubio agree, in
    level and in phase."""
    check_trackers()
    one, other = librosa_beats(samples), aubio_beats(path)
    if len(one) < shortest or len(other) < shortest:
        return []
    period = np.gradient(one)
    nearest = np.abs(one[:, None] - other).argmin(1)
    level = np.gradient(other)[nearest] / period
    fits = (np.abs(one - other[nearest]) < 0.12 * period) & (np.abs(level - 1) < 0.15)
    fits &= (60 / FASTEST <= period) & (period <= 60 / SLOWEST)
    beats = (one + other[nearest]) / 2
    return [run[1:] for run in np.split(beats, np.flatnonzero(~fits)) if len(run) > shortest]


# --------------------------------------------------------------------------------------------------
# Charts
# --------------------------------------------------------------------------------------------------


def chart_beats(path, seconds):
    """The times of the quarter notes up to `seconds`, by the tempos in a MIDI file."""
    with open(path, "rb") as file:
        data = file.read()
    per_beat = int.from_bytes(data[12:14], "big")
    changes = sorted(tempo_changes(data)) or [(0, 500_000)]
    beats, now, beat = [], 0.0, 0  # seconds; how many quarters have begun
    for (tick, micros), (after, _) in zip(changes, changes[1:] + [(10**9, 0)]):
        second = micros / 1e6 / per_beat  # a tick
        while beat * per_beat < after and now + (beat * per_beat - tick) * second < seconds:
            beats.append(now + (beat * per_beat - tick) * second)
            beat += 1
        now += (after - tick) * second
    return at_dancing_level(np.array(beats))


def in_step(beats, heard):
    """A chart's beats, moved by what they lie before those that a tracker hears: 20 to 70 ms. A
    tracker may hear the off-beats, so it is told from twice the phase."""
    turn = np.exp(4j * np.pi * beat_at(beats, heard)).mean()
    return beats + np.angle(turn) / (4 * np.pi) * np.median(np.diff(beats))


def at_dancing_level(beats):  # every second one where there are too many
    return beats[::2] if np.median(np.diff(beats)) < 60 / FASTEST else beats


def tempo_changes(data):
    """[(tick, microseconds a quarter)] of all tracks of a MIDI file."""
    changes, at = [], 14
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "big")
        at, tick, status = at + 8, 0, 0
        while at < end:
            delta, at = read_number(data, at)
            tick += delta
            if data[at] & 128:
                status, at = data[at], at + 1
            if status == 0xFF or status in (0xF0, 0xF7):
                kind = data[at] if status == 0xFF else None
                length, at = read_number(data, at + (status == 0xFF))
                if kind == 0x51:
                    changes.append((tick, int.from_bytes(data[at : at + 3], "big")))
                at += length
            else:
                at += 1 if status >> 4 in (0xC, 0xD) else 2
        at = end
    return changes


def read_number(data, at):  # MIDI's, of seven bits a byte: (number, where the next thing begins)
    number = 0
    while True:
        number = number << 7 | data[at] & 127
        at += 1
        if not data[at - 1] & 128:
            return number, at
