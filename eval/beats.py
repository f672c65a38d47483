"""Does the dance keep to the beat? Measured from pixels and sound alone.

Top to bottom:   the picture's motion | the music's beats | published scores | all of a video

Times are seconds of the video from its first frame, tempos are in beats a minute. A score means
little alone: each stands beside the same score against another song, and beside that of a video
made without music.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import musicinfuser as mi
from dataset.clips import video_size

FPS = 30  # at which every video is read
MIN_FRAMES = 31  # a second: less holds a beat or two, and every score of it is noise


class NoScore(mi.InputError):
    """A video too short, or a sound without a beat: nothing to score, and no reason to stop."""


# ----------------------------------------------------------------------------------------------
# The picture: how much moves, when it rests, how fast
# ----------------------------------------------------------------------------------------------


def read_film(path, fps=FPS, longest=None):
    """Yield a video's frames, uint8 (H, W, 3), at `fps`; at most `longest` pixels a side."""
    try:
        height, width = video_size(path)
    except mi.InputError as error:
        raise mi.InputError(f"{path} cannot be read as video ({error})") from error
    if longest and max(height, width) > longest:
        scale = longest / max(height, width)
        height, width = max(round(scale * height), 1), max(round(scale * width), 1)
    yield from mi.read_frames(path, height, width, fps)


def film(path, fps=FPS, longest=None):
    """A whole video, uint8 (T, H, W, 3). Raises InputError."""
    frames = list(read_film(path, fps, longest))
    if not frames:
        raise mi.InputError(f"{path} has no picture")
    return np.stack(frames)


def frame_changes(frames):
    """(T - 1,): mean absolute difference of neighbouring frames after 4x4 averaging.

    frames: uint8 (H, W, 3) each, one after another, so that a long video needs no memory. Value i
    lies half-way between frames i and i + 1.
    """
    changes, last = [], None
    for frame in frames:
        x = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).float() / 255
        if min(x.shape[1:]) < 4:
            raise mi.InputError("the picture has fewer than 4 pixels a side")
        x = F.avg_pool2d(x, 4)
        if last is not None:
            changes.append((x - last).abs().mean().item())
        last = x
    return np.array(changes, np.float32)


def smooth(values, sigma):
    """With a Gaussian of `sigma` values, as scipy.ndimage.gaussian_filter1d does it."""
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-np.square(np.arange(-reach, reach + 1)) / (2 * sigma**2))
    padded = np.pad(values, reach, mode="symmetric")
    return np.convolve(padded, kernel / kernel.sum(), mode="valid").astype(np.float32)


def motion_energy(frames):
    """uint8 (T, H, W, 3) -> (T - 1,): frame_changes, smoothed with a Gaussian of one frame."""
    return smooth(frame_changes(frames), 1)


def beat_correlation(energy, beats):
    """r: Pearson's correlation of the motion energy with sin^2(pi beats).

    beats: the position in the music, in beats, at each value. 1 for a dancer who rests on every
    beat and moves in between, 0 by chance or for a still picture.
    """
    if not np.ptp(energy):
        return 0.0
    return float(np.corrcoef(energy, np.sin(np.pi * np.asarray(beats)) ** 2)[0, 1])


def beat_lag(energy, beats):
    """By how many beats, from -0.5 to 0.5, the rests come after the beats."""
    turning = np.exp(-2j * np.pi * np.asarray(beats))
    return float(-np.angle(-((energy - energy.mean()) * turning).sum()) / (2 * np.pi))


def motion_tempo(energy, fps=FPS, low=65, high=215):
    """Tempo of the sinusoid that fits the motion energy best; 0 for a still picture."""
    if not np.ptp(energy):
        return 0.0
    t = np.arange(len(energy)) / fps
    tempos = np.arange(low, high + 0.5, 0.5)
    residuals = [residual(energy - energy.mean(), 2 * np.pi * bpm / 60 * t) for bpm in tempos]
    return float(tempos[np.argmin(residuals)])


def residual(values, angle):
    """Of a least-squares fit by cosine, sine and a constant."""
    basis = np.stack([np.cos(angle), np.sin(angle), np.ones_like(angle)], 1)
    fit, *_ = np.linalg.lstsq(basis, values, rcond=None)
    return np.square(values - basis @ fit).sum()


class Motion(NamedTuple):
    """What the scores need of a video."""

    changes: np.ndarray  # (T - 1,), unsmoothed
    energy: np.ndarray  # (T - 1,), smoothed
    tempo: float  # 0 for a still picture


def motion_of(path):
    """The Motion of a video's first SONG_SECONDS. Raises NoScore for less than one, InputError."""
    try:
        changes = frame_changes(itertools.islice(read_film(path), SONG_SECONDS * FPS))
    except mi.InputError as error:
        raise mi.InputError(str(error) if path in str(error) else f"{path}: {error}") from error
    if len(changes) + 1 < MIN_FRAMES:
        raise NoScore(f"{path} is too short to score: {len(changes) + 1} frames at {FPS} fps")
    energy = smooth(changes, 1)
    return Motion(changes, energy, motion_tempo(energy))


# ----------------------------------------------------------------------------------------------
# The music
# ----------------------------------------------------------------------------------------------

LATE = 0.02  # seconds by which librosa hears too late: 0.015 on clicks, 0.026 on the toy's songs
SONG_SECONDS = 600  # of a song that are listened to, so that hours of music need no memory


def import_librosa():
    try:
        import librosa  # here, because only beats need it
    except ImportError as error:
        advice = "without it no beat is heard: pip install -r eval/requirements.txt"
        raise mi.InputError(f"{error}; {advice}") from error
    return librosa


@functools.cache
def track_beats(path, around=0.0):
    """Times of the beats in a file's sound, in its own seconds. Raises NoScore or InputError.

    A file of more than SONG_SECONDS is heard so long, around that place.
    """
    librosa = import_librosa()
    rate, hop = 22050, 256  # 12 ms, half of librosa's default
    begin = max(0.0, around - SONG_SECONDS / 2)
    sound = mi.load_audio(path, begin, SONG_SECONDS, rate=rate).numpy()
    if not np.isfinite(sound).all():
        raise mi.InputError(f"{path} has samples that are no numbers; encode it again")
    onsets = librosa.onset.onset_strength(y=sound, sr=rate, hop_length=hop)
    _, frames = librosa.beat.beat_track(onset_envelope=onsets, sr=rate, hop_length=hop, trim=False)
    if len(frames) < 2:
        raise NoScore(f"no beat is heard in {path}")
    return begin + librosa.frames_to_time(frames, sr=rate, hop_length=hop) - LATE


def beat_position(beats, t):
    """Where times t lie in the music, in beats: linear between two, and on as beside both ends."""
    i = np.clip(np.searchsorted(beats, t) - 1, 0, len(beats) - 2)
    return i + (t - beats[i]) / (beats[i + 1] - beats[i])


def music_tempo(beats):
    """Of tracked beats, without the gaps that a missed or an extra beat leaves."""
    gaps = np.diff(beats)
    even = gaps[np.abs(gaps / np.median(gaps) - 1) < 0.2]
    if not len(even):
        return 60 / np.median(gaps)
    return 60 / even.mean()


def elsewhere(beats, seconds, count=16):
    """The beats of the same song as a video of that length would hear them at other places.

    The control where there is no other song: the tempo stays, and the places' phases are spread
    over a beat, so that a dancer who follows is on the beat at one of them alone.
    """
    places = np.arange(beats[0], beats[-1] - 2 * seconds, seconds) + seconds
    far = places[np.abs(places) >= seconds]  # not where the video itself is, at 0
    far = far[:: max(1, math.ceil(len(far) / count))]
    if not len(far):
        return []
    on_the_beat = beats[np.abs(beats[:, None] - far).argmin(0)]
    phases = np.arange(len(far)) / len(far) * np.median(np.diff(beats))
    return [beats - place for place in on_the_beat + phases]


# ----------------------------------------------------------------------------------------------
# Published scores. All three count frames at 60 fps, AIST++'s rate. Theirs see the joints of a
# body in motion capture, ours see how much of the picture changes.
# ----------------------------------------------------------------------------------------------

RATE = 60  # frames a second
SIGMA = 3  # frames, 50 ms
NEAR = 6  # frames, 100 ms


def velocity_at_60_fps(changes, fps=FPS):
    """(frames at 60 fps,): the changes, interpolated; the first is 0, as in AIST++'s script."""
    middles = (np.arange(len(changes)) + 0.5) / fps
    t = np.arange(round((len(changes) + 1) * RATE / fps)) / RATE
    velocity = np.interp(t, middles, changes)
    velocity[0] = 0
    return velocity


def local_minima(values, reach):
    """Where a value is below all within `reach` either side: scipy.signal.argrelextrema with
    np.less and its mode "clip", in which those at the ends are compared with themselves."""
    at = np.arange(len(values))
    lowest = np.ones(len(values), bool)
    for step in range(1, reach + 1):
        lowest &= values < values[np.maximum(at - step, 0)]
        lowest &= values < values[np.minimum(at + step, len(values) - 1)]
    return np.flatnonzero(lowest)


def aist_motion_beats(velocity):
    """AIST++: minima of the unsmoothed velocity over 10 frames either side, in frames.

    As in motion_peak_onehot of tools/calculate_beat_scores.py (github.com/google-research/mint).
    """
    return local_minima(velocity, 10)


def bailando_motion_beats(velocity):
    """Bailando: minima of the velocity smoothed with 5 frames, in frames.

    As in calc_db of utils/beat_align_score.py (github.com/lisiyao21/Bailando).
    """
    return local_minima(smooth(velocity[1:], 5), 1) + 1


def music_frames(beats, count):
    """Times in seconds -> frames at 60 fps, only those within a clip of `count` frames.

    Both scripts cut the music's beats so: the beat just after the end helps nobody.
    """
    frames = np.round(np.asarray(beats, float) * RATE).astype(int)
    return frames[(frames >= 0) & (frames < count)]


def alignment(of, to):
    """Mean of exp(-d^2 / 2 SIGMA^2) over the frames `of`, d to the nearest of the frames `to`.

    AIST++'s is of motion beats to music beats (how much of the motion is on the beat), Bailando's
    of music beats to motion beats (how many beats are danced). 0 where either is empty.
    """
    if not len(of) or not len(to):
        return 0.0
    distance = np.abs(np.asarray(of)[:, None] - np.asarray(to)).min(1)
    return float(np.exp(-np.square(distance) / (2 * SIGMA**2)).mean())


def beat_coverage(music, motion):
    """MBCR: the share of the music's beats with a motion beat within 100 ms, both in frames.

    TMD-Bench too asks how many beats are covered (arXiv 2605.01809); its formula was not at hand.
    """
    if not len(music) or not len(motion):
        return 0.0
    distance = np.abs(np.asarray(music)[:, None] - np.asarray(motion)).min(1)
    return float((distance <= NEAR).mean())


# ----------------------------------------------------------------------------------------------
# All scores of a video
# ----------------------------------------------------------------------------------------------

SCORES = {
    "r": "r, motion with the beat's phase",
    "bas_aist": "beat alignment, AIST++ (motion to music)",
    "bas_bailando": "beat alignment, Bailando (music to motion)",
    "mbcr": "MBCR, beats danced within 100 ms (share)",
    "tempo": "tempo of motion / of music",
    "tempo_close": "... within 4%, octaves folded (share)",
}


def beat_scores(motion, beats):
    """{name of SCORES: number} of a Motion against music beats at `beats`, in the video's seconds.

    beats: those before the start and after the end too, which r and the tempo use. A still picture
    follows nothing: all are 0.
    """
    t = (np.arange(len(motion.energy)) + 0.5) / FPS
    velocity = velocity_at_60_fps(motion.changes)
    music = music_frames(beats, len(velocity))
    rests = bailando_motion_beats(velocity)
    ratio = motion.tempo / music_tempo(beats)
    return {
        "r": beat_correlation(motion.energy, beat_position(beats, t)),
        "bas_aist": alignment(aist_motion_beats(velocity), music),
        "bas_bailando": alignment(music, rests),
        "mbcr": beat_coverage(music, rests),
        "tempo": float(ratio),
        "tempo_close": float(same_tempo(ratio)),
    }


def same_tempo(ratio):
    """Within 4%, twice or half as fast being the same."""
    if ratio <= 0:
        return False
    octaves = math.log2(ratio)
    return abs(octaves - round(octaves)) < math.log2(1.04)


def averages(rows):
    """{score: [mean, standard error]} over videos; one video has no error, None."""
    means = {}
    for name in rows[0]:
        column = np.array([row[name] for row in rows], float)
        error = float(column.std(ddof=1) / len(rows) ** 0.5) if len(rows) > 1 else None
        means[name] = [float(column.mean()), error]
    return means
