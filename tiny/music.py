"""The toy world in sound: songs in ten genres, composed here, played by a synthesiser or by sampled
instruments.

A song is a row of notes, counted in sixteenths from its first beat. The sampled instruments are
fluidsynth's, with the sound fonts and drum kits that Debian packages; the training of the audio
encoder needs them, the toy AIST set and the report do with what there is."""

import glob
import os
import re
import shutil
import subprocess
import tempfile
import wave
from typing import NamedTuple

import numpy as np

import musicinfuser as mi
from tiny.world import GENRES

RATE = 16000
SLOWEST, FASTEST = 60, 180  # BPM

# fmt: off
RHYTHMS = {  # sixteenths of a bar: kick, snare, hat, bass; loudness of chords and melody
  "BR": ("x.x.......x.....", "....x.......x...", "x.x.x.x.x.x.x.x.", "x.x...x...x..x..", 0.3, 0.3),
  "PO": ("x.....x.x.......", "....x.......x...", "xxxxxxxxxxxxxxxx", "x..x..x.x..x..x.", 0.4, 0.4),
  "LO": ("x......x..x.....", "....x.......x..x", "x.x.x.x.x.x.x.x.", "x...x..x..x.x...", 0.6, 0.3),
  "MH": ("x......x.xx.....", "....x.......x...", "x..xx..xx..xx..x", "x.......x.......", 0.4, 0.2),
  "LH": ("x..x......x.....", "....x.......x...", "x.xxx.x.x.xxx.x.", "x..x......x.....", 0.5, 0.5),
  "HO": ("x...x...x...x...", "....x.......x...", "..x...x...x...x.", "..x...x...x...x.", 0.7, 0.3),
  "WA": ("x...x...x...x...", "....x.......x...", "x.xxx.xxx.xxx.xx", "x.x.x.x.x.x.x.x.", 0.6, 0.6),
  "KR": ("x..x..x.x.......", "....x.......x...", "x...x...x...x...", "x..x..x.x.......", 0.2, 0.3),
  "JS": ("x.......x.x.....", "....x.......x...", "x.x.x.x.x.x.x.x.", "x...x...x...x...", 0.6, 0.7),
  "JB": ("x...............", "................", "....x.......x...", "x.......x.......", 0.9, 0.8),
}
MINOR, MAJOR = (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 5, 7, 9, 11)  # semitones of a scale's degrees
# General MIDI's keys
DRUMS = {"kick": (35, 36), "snare": (37, 38, 39, 40), "hat": (42, 44, 46, 51, 54, 70)}
PROGRAMS = {  # General MIDI's instruments, from 0
    "bass": (32, 33, 34, 35, 36, 38, 39, 43, 58),
    "chord": (0, 1, 4, 5, 16, 18, 24, 25, 26, 27, 28, 29, 30, 48, 50, 61, 62, 80, 88, 89, 90, 105),
    "melody": (0, 4, 11, 12, 22, 26, 29, 40, 52, 53, 56, 60, 64, 65, 66, 68, 71, 73, 75, 80, 84),
}
KITS = (0, 8, 16, 24, 25, 32, 40)  # standard, room, power, electronic, TR-808, jazz, brush
CHANNELS = {"bass": 0, "chord": 1, "melody": 2, "kick": 9, "snare": 9, "hat": 9}
# fmt: on

# --------------------------------------------------------------------------------------------------
# The score
# --------------------------------------------------------------------------------------------------


class Note(NamedTuple):
    step: float  # sixteenths since the first beat, as is the length
    part: str  # kick, snare, hat, bass, chord or melody
    pitch: int  # MIDI's
    length: float
    loudness: float


class Harmony:
    """A key, a scale and four chords, a bar each."""

    def __init__(self, rng):
        self.key = int(rng.integers(36, 48))
        self.scale = MINOR if rng.random() < 0.5 else MAJOR
        self.progression = rng.choice([0, 3, 4, 5], 4)

    def degree(self, bar):
        return int(self.progression[bar % 4])

    def pitch(self, degree, octave):
        return self.key + 12 * (octave + degree // 7) + self.scale[degree % 7]


def levels_of(genre, rng):
    """How loud each part is; now and then an instrument is missing."""
    ranges = {"kick": (0.6, 1.1), "snare": (0.2, 0.6), "hat": (0.05, 0.3), "bass": (0.2, 0.6)}
    levels = {part: rng.uniform(*ends) * (rng.random() > 0.07) for part, ends in ranges.items()}
    if genre == "JB":
        levels["hat"] *= 0.5
    return levels | {"chord": 0.16 * RHYTHMS[genre][4], "melody": 0.25 * RHYTHMS[genre][5]}


def write_score(genre, steps, rng):
    """The notes of `steps` sixteenths: the genre's rhythm, in a harmony, with a motif, that are
    drawn."""
    kicks, snares, hats, basses = RHYTHMS[genre][:4]
    level, harmony = levels_of(genre, rng), Harmony(rng)
    motif = np.where(rng.random(16) < [0.9, 0.1, 0.3, 0.1] * 4, rng.integers(0, 8, 16), -1)
    stab = int(rng.choice([4, 4, 8, 16]))  # sixteenths between chords
    notes = []
    for step in range(steps):
        s, bar, accent = step % 16, step // 16, rng.uniform(0.8, 1.0)
        degree = harmony.degree(bar)
        fill = bar % 4 == 3 and s >= 12 and rng.random() < 0.3
        if kicks[s] == "x":
            notes.append(Note(step, "kick", 36, 1, level["kick"] * accent))
        if snares[s] == "x" or fill:
            notes.append(Note(step, "snare", 38, 1, level["snare"] * accent))
        if hats[s] == "x":
            weight = 1.0 if s % 4 == 0 else 0.7
            notes.append(Note(step, "hat", 42, 1, level["hat"] * accent * weight))
        if basses[s] == "x":
            notes.append(Note(step, "bass", harmony.pitch(degree, 0), 1.6, level["bass"] * accent))
        if s % stab == 0:
            for third in (0, 2, 4):
                pitch = harmony.pitch(degree + third, 1)
                notes.append(Note(step, "chord", pitch, 0.9 * stab, level["chord"]))
        if motif[s] >= 0:
            pitch = harmony.pitch(degree + int(motif[s]), 2)
            notes.append(Note(step, "melody", pitch, 2, level["melody"] * accent))
    return notes


def starts(notes, tempo, rng):
    """Seconds at which the notes begin, off-beats late in a song that swings."""
    sixteenth = 15 / tempo
    swing = rng.choice([0, 0, 0.12, 0.25]) * sixteenth
    return [note.step * sixteenth + swing * (note.step % 2 == 1) for note in notes]


# --------------------------------------------------------------------------------------------------
# The synthesiser
# --------------------------------------------------------------------------------------------------


class Synthesiser:
    """Drums of noise and sweeps, tones of six partials; all that can differ follows from the
    generator."""

    def __init__(self, rng, rate=RATE):
        self.rng, self.rate = rng, rate
        self.partials, self.attack = {}, {}
        for part in ("bass", "chord", "melody"):
            slope = rng.uniform(0.6, 2.2)
            self.partials[part] = rng.uniform(0.2, 1, 6) * np.arange(1, 7) ** -slope
            self.attack[part] = rng.uniform(0.002, 0.02)
        snare = rng.uniform(0.04, 0.12), rng.uniform(200, 900), rng.uniform(4000, 7900)
        hat = rng.uniform(0.01, 0.05), rng.uniform(4000, 6000), 7900
        self.drums = {"kick": self.kick(), "snare": self.hiss(*snare), "hat": self.hiss(*hat)}

    def seconds(self, length):
        return np.arange(int(length * self.rate) + 1) / self.rate

    def kick(self):
        t = self.seconds(0.4)
        low, sweep, decay = (
            self.rng.uniform(*ends) for ends in ((45, 65), (60, 160), (0.06, 0.16))
        )
        cycles = low * t + sweep * 0.03 * (1 - np.exp(-t / 0.03))
        return np.sin(2 * np.pi * cycles) * np.exp(-t / decay)

    def hiss(self, decay, low, high):
        t = self.seconds(6 * decay)
        spectrum = np.fft.rfft(self.rng.standard_normal(len(t)) * np.exp(-t / decay))
        f = np.fft.rfftfreq(len(t), 1 / self.rate)
        return np.fft.irfft(spectrum * ((f > low) & (f < high)), len(t))

    def tone(self, part, pitch, length):
        t = self.seconds(length)
        f = 440 * 2 ** ((pitch - 69) / 12)
        sound = np.zeros(len(t))
        for n, amplitude in enumerate(self.partials[part], 1):
            if f * n < self.rate / 2:
                sound += amplitude * np.sin(2 * np.pi * f * n * t)
        envelope = np.exp(-t / (0.5 * length + 0.05)) * np.minimum(1, t / self.attack[part])
        fade = np.minimum(1, (length - t) / 0.01).clip(0)
        return sound / sum(self.partials[part]) * envelope * fade

    def play(self, note, sixteenth):
        if note.part in self.drums:
            return note.loudness * self.drums[note.part]
        return note.loudness * self.tone(note.part, note.pitch, note.length * sixteenth)


def compose(genre, tempo, seed, seconds, rate=RATE):
    """A song of the synthesiser's, float32 (samples,), that follows from the seed. Its first
    beat is at 0 s, the next ones are 60 / tempo s apart."""
    rng = np.random.default_rng(seed)
    notes = write_score(genre, int(seconds * tempo / 15) + 1, rng)
    synthesiser = Synthesiser(rng, rate)
    song = np.zeros(int(seconds * rate))
    for note, start in zip(notes, starts(notes, tempo, rng)):
        lay(song, int(start * rate), synthesiser.play(note, 15 / tempo))
    if rng.random() < 0.5:
        song = room(song, rng, rate)
    song += rng.standard_normal(len(song)) * np.abs(song).max() * 10 ** rng.uniform(-4, -2)
    return level(song) * np.float32(rng.uniform(0.5, 0.95))


def lay(song, start, sound):  # in place
    sound = sound[: max(0, len(song) - start)]
    song[start : start + len(sound)] += sound


def level(song):
    return (song / max(np.abs(song).max(), 1e-6)).astype(np.float32)


def draw_tempo(rng, genre=None):
    """BPM, between SLOWEST and FASTEST, two in five around what the genre likes."""
    if genre and rng.random() < 0.4:
        tempo = GENRES[genre][1] * np.exp(rng.normal(0, 0.12))
    else:
        tempo = np.exp(rng.uniform(np.log(SLOWEST), np.log(FASTEST)))
    return float(np.clip(tempo, SLOWEST, FASTEST))


def draw_song(rng, genre=None, seconds=10.0):
    """(samples, genre, tempo)"""
    genre = genre or str(rng.choice(list(GENRES)))
    tempo = draw_tempo(rng, genre)
    return compose(genre, tempo, int(rng.integers(2**31)), seconds), genre, tempo


# --------------------------------------------------------------------------------------------------
# Sampled instruments
# --------------------------------------------------------------------------------------------------


def find_sounds(folder):
    """(sound fonts, drum kits) below `folder`, /usr/share where the Debian packages are
    installed."""
    fonts = sorted(glob.glob(os.path.join(folder, "sounds/sf2/*.sf2")))
    kits = sorted(glob.glob(os.path.join(folder, "hydrogen/data/drumkits/*/drumkit.xml")))
    if not (fonts and kits and shutil.which("fluidsynth")):
        raise mi.InputError(
            "no sampled instruments: apt-get install fluidsynth fluid-soundfont-gm "
            "timgm6mb-soundfont hydrogen-drumkits, or name the folder they are in with --sounds"
        )
    return fonts, kits


def load_kit(path):
    """{"kick": [samples], "snare": ..., "hat": ...} of a Hydrogen drum kit; a part may have
    none."""
    kit = {"kick": [], "snare": [], "hat": []}
    words = {
        "kick": "kick|bass ?drum|thump|bass$",
        "snare": "snare|clap|slap|stick",
        "hat": "hat|hh|maraca|bell",
    }
    with open(path, encoding="utf-8", errors="replace") as file:
        instruments = file.read().split("<instrument>")[1:]
    for text in instruments:
        name = re.search("<name>(.*?)</name>", text)
        sample = re.search("<filename>(.*?)</filename>", text)
        part = next(
            (part for part, word in words.items() if name and re.search(word, name[1].lower())),
            None,
        )
        if part and sample and len(kit[part]) < 3:
            sound = mi.load_audio(os.path.join(os.path.dirname(path), sample[1])).numpy()
            kit[part].append(level(sound[: RATE // 2]))
    return kit


def vary(notes, rng):
    """The song as a band might play it: notes left out, added, sustained, broken into arpeggios,
    played loosely."""
    missing = [part for part in CHANNELS if rng.random() < 0.12]
    loose = rng.choice([0.0, 0.03, 0.08])  # sixteenths
    broken, sustained, octave = (
        rng.random() < 0.25,
        rng.random() < 0.3,
        12 * int(rng.integers(-1, 2)),
    )
    drop = rng.choice([0.0, 0.1, 0.25])
    varied, third = [], 0
    for note in notes:
        if note.part in missing or (note.part in ("hat", "melody", "bass") and rng.random() < drop):
            continue
        step, length, pitch = note.step, note.length, note.pitch
        third = (third + 1) % 3 if note.part == "chord" else third
        if note.part == "chord" and broken:
            step, length = step + third * length / 3, length / 3
        if note.part == "melody":
            pitch, length = pitch + octave, length * (2.5 if sustained else 1)
        step = max(0.0, step + loose * rng.standard_normal())
        varied.append(Note(step, note.part, pitch, length, note.loudness * rng.uniform(0.7, 1)))
    return varied


def midi_file(notes, times, tempo, rng):
    """A MIDI file's bytes, a thousand ticks a second; the instruments are drawn."""
    events = []
    for channel, part in enumerate(("bass", "chord", "melody")):
        events.append((0, bytes([0xC0 + channel, int(rng.choice(PROGRAMS[part]))])))
    events.append((0, bytes([0xC9, int(rng.choice(KITS))])))
    events += [
        (0, bytes([0xB0 + c, 7, int(rng.integers(60, 128))])) for c in (0, 1, 2, 9)
    ]  # volumes
    key = {part: int(rng.choice(keys)) for part, keys in DRUMS.items()}
    strength = {"chord": 5.0, "melody": 4.0, "hat": 3.0, "bass": 1.8, "snare": 1.7, "kick": 1.0}
    for note, start in zip(notes, times):
        channel, pitch = CHANNELS[note.part], key.get(note.part, note.pitch)
        velocity = int(np.clip(127 * strength[note.part] * note.loudness, 0, 127))
        end = start + max(0.05, note.length * 15 / tempo)
        if velocity:
            events.append((int(1000 * start), bytes([0x90 + channel, pitch, velocity])))
            events.append((int(1000 * end), bytes([0x80 + channel, pitch, 0])))
    track, now = b"\x00\xff\x51\x03\x07\xa1\x20", 0  # 120 BPM, for the ticks
    for tick, message in sorted(events):
        track, now = track + variable_length(tick - now) + message, tick
    track += b"\x00\xff\x2f\x00"
    header = b"MThd" + (6).to_bytes(4, "big") + b"\x00\x00\x00\x01" + (500).to_bytes(2, "big")
    return header + b"MTrk" + len(track).to_bytes(4, "big") + track


def variable_length(number):  # MIDI's, seven bits a byte, the last with its eighth bit clear
    groups = [number & 127]
    while number := number >> 7:
        groups.insert(0, 128 | number & 127)
    return bytes(groups)


def fluidsynth(midi, font, seconds):
    with tempfile.TemporaryDirectory() as folder:
        score, sound = os.path.join(folder, "song.mid"), os.path.join(folder, "song.wav")
        with open(score, "wb") as file:
            file.write(midi)
        line = ["fluidsynth", "-niq", "-g", "0.6", "-r", "16000", "-F", sound, font, score]
        subprocess.run(line, check=True, capture_output=True)
        samples = mi.load_audio(sound).numpy()[: int(seconds * RATE)]
    return np.pad(samples, (0, int(seconds * RATE) - len(samples)))


def play_sampled(genre, tempo, seed, seconds, fonts, kits):
    """A song as `compose`'s, played by fluidsynth; in half of them a drum kit of real drums.
    kits: of load_kit."""
    rng = np.random.default_rng(seed)
    notes = vary(write_score(genre, int(seconds * tempo / 15) + 1, rng), rng)
    times = starts(notes, tempo, rng)
    kit = kits[rng.integers(len(kits))] if rng.random() < 0.5 else {}
    kit = {part: sounds[rng.integers(len(sounds))] for part, sounds in kit.items() if sounds}
    written = [(note, time) for note, time in zip(notes, times) if note.part not in kit]
    font = fonts[rng.integers(len(fonts))]
    song = np.zeros(int(seconds * RATE))
    if written:
        song += level(fluidsynth(midi_file(*zip(*written), tempo, rng), font, seconds))
    for note, start in zip(notes, times):
        if note.part in kit:
            lay(song, int(start * RATE), note.loudness * kit[note.part])
    return level(song)


# --------------------------------------------------------------------------------------------------
# Accompaniments: the styles of MMA, the Musical MIDI Accompaniment Generator
# --------------------------------------------------------------------------------------------------

# Chords of four bars each
PROGRESSIONS = ("C Am F G7", "C F C G", "Am F C G", "Dm7 G7 CM7 Am7", "Am Dm E7 Am", "C Bb F C")
PROGRESSIONS += ("C C F G", "Em Am Dm G7", "Am G F E7", "C7 F7 C7 G7", "Am Am Dm Em", "F G Em Am")
NO_GROOVE = "(?i)intro|end|metronome|none"  # names of what does not go on, or is silent


def find_styles(folder):
    """[[groove]] below `folder`, a list for each of MMA's files of music in four quarters."""
    library, styles = os.path.join(folder, "mma/lib"), []
    for path in sorted(glob.glob(os.path.join(library, "*/*.mma"))):
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        quarters = set(re.findall(r"(?im)^\s*time\s+(\d+)", text))
        names = re.findall(r"(?im)^\s*defgroove\s+(\S+)", text)
        names = [name for name in names if not re.search(NO_GROOVE, name)]
        style = os.path.relpath(path, library).removesuffix(".mma")
        if names and quarters <= {"4"} and "68" not in style:  # 6/8, written as four quarters
            styles.append([f"{style}:{name}" for name in names])
    if not (styles and shutil.which("mma")):
        raise mi.InputError(
            "no accompaniments: apt-get install mma, or name the folder it is in with --sounds"
        )
    return styles


def accompany(groove, tempo, seed, seconds, fonts):
    """A band plays that groove to chords that are drawn: float32 (samples,). Its first beat is at
    0 s, the next ones are 60 / tempo s apart."""
    rng = np.random.default_rng(seed)
    bars = int(seconds * tempo / 240) + 2
    chords = str(rng.choice(PROGRESSIONS)).split()
    lines = [f"RndSeed {seed}", f"Tempo {tempo}", f"Transpose {rng.integers(-5, 7)}"]
    lines += [f"Groove {groove}", *(chords[bar % 4] for bar in range(bars))]
    with tempfile.TemporaryDirectory() as folder:
        score, midi = os.path.join(folder, "song.mma"), os.path.join(folder, "song.mid")
        with open(score, "w") as file:
            file.write("\n".join(lines) + "\n")
        subprocess.run(["mma", score, "-f", midi], check=True, capture_output=True)
        with open(midi, "rb") as file:
            return level(fluidsynth(file.read(), fonts[rng.integers(len(fonts))], seconds))


# --------------------------------------------------------------------------------------------------
# Roughening: songs as recordings have them
# --------------------------------------------------------------------------------------------------


def room(song, rng, rate=RATE):
    """With an echo of noise that dies away."""
    t = np.arange(int(rng.uniform(0.1, 0.6) * rate))
    echo = rng.standard_normal(len(t)) * np.exp(-6 * t / len(t))
    size = len(song) + len(echo)
    wet = np.fft.irfft(np.fft.rfft(song, size) * np.fft.rfft(echo, size), size)[: len(song)]
    return song + rng.uniform(0.05, 0.4) * wet / (np.abs(wet).max() + 1e-6) * np.abs(song).max()


def compressed(song, rng):
    """Loud parts made less loud."""
    window = int(rng.uniform(0.005, 0.1) * RATE)
    power = np.convolve(song**2, np.ones(window) / window, "same").clip(1e-8)
    return song * (power / power.max()) ** -rng.uniform(0.1, 0.35)


def voice(length, rng):
    """A line like speech or singing: a buzz through wandering formants, in syllables off the
    beat."""
    t = np.arange(length) / RATE
    knots = np.arange(0, length / RATE + 0.6, 0.15)
    pitch = np.interp(t, knots, rng.uniform(90, 300) * np.exp(rng.normal(0, 0.15, len(knots))))
    buzz = np.sign(np.sin(2 * np.pi * np.cumsum(pitch) / RATE)) + 0.3 * rng.standard_normal(length)
    edges = np.cumsum(rng.gamma(3, 0.06, int(length / RATE / 0.06) + 8))
    loud = np.interp(t, edges, rng.random(len(edges)) * (rng.random(len(edges)) < 0.75))
    spectrum, f = np.fft.rfft(buzz), np.fft.rfftfreq(length, 1 / RATE)
    formants = zip(rng.uniform((300, 900, 2200), (800, 2000, 3200)), (90, 140, 220))
    shape = sum(np.exp(-(((f - centre) / width) ** 2)) for centre, width in formants)
    return level(np.fft.irfft(spectrum * (0.03 + shape), length) * loud)


def as_mp3(song, kilobits):
    """Through an mp3 of so many kilobits a second."""
    with tempfile.TemporaryDirectory() as folder:
        wav, mp3 = os.path.join(folder, "song.wav"), os.path.join(folder, "song.mp3")
        save_wav(wav, song)
        mi.ffmpeg(wav, "-b:a", f"{kilobits}k", mp3)
        back = mi.load_audio(mp3).numpy()[: len(song)]
    return np.pad(back, (0, len(song) - len(back)))


def disturbed(song, rng):
    """With a voice over it, or its loud parts made less loud."""
    if rng.random() < 0.4:
        song = song + rng.uniform(0.1, 0.6) * np.abs(song).max() * voice(len(song), rng)
    return compressed(song, rng) if rng.random() < 0.4 else song


def recorded(song, rng):
    """A whole song as somebody might have recorded it."""
    if rng.random() < 0.4:
        song = room(song, rng)
    song = level(disturbed(song, rng))
    return as_mp3(song, int(rng.choice([16, 24, 32, 64]))) if rng.random() < 0.3 else song


def rough(samples, rng):
    """A crop, made anew whenever it is trained on: another equaliser, another hiss."""
    samples = np.asarray(samples, np.float64)
    if rng.random() < 0.6:
        size = -(-len(samples) // 4096) * 4096  # many times as fast as a length with large factors
        spectrum, f = np.fft.rfft(samples, size), np.linspace(0, 1, size // 2 + 1)
        tilt = rng.normal(0, 1.5) * f
        for n in range(1, 6):
            tilt += rng.normal(0, 0.4) * np.cos(np.pi * n * f)
        samples = np.fft.irfft(spectrum * np.exp(tilt))[: len(samples)]
    if rng.random() < 0.3:
        hiss = rng.standard_normal(len(samples)) * samples.std()
        samples = samples + hiss * 10 ** rng.uniform(-2, -0.5)
    return samples


def save_wav(path, samples, rate=RATE):
    with mi.written_whole(path) as temporary, open(temporary, "wb") as file, wave.open(file) as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(rate)
        wav.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
