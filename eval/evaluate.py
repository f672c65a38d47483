"""Every score of a dancing video:   python -m eval.evaluate videos/*.mp4

Top to bottom:   motion | music and beat alignment | the paper's judge | its protocol | style, on the toy world
Times are seconds of the video, from its first frame; tempos are in beats a minute.
"""

import argparse
import functools
import glob
import hashlib
import json
import math
import os
import re

import imageio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import musicinfuser as mi
import train


class NoBeat(mi.InputError):
    """A sound in which no beat is heard."""


# ------------------------------------------------------------------------------------------------------------------
# The picture: how much moves, when it rests, how fast
# ------------------------------------------------------------------------------------------------------------------

FPS = 30  # at which every video is read


def film(path, fps=FPS):
    """A video's frames, uint8 (T, H, W, 3), at `fps`. Raises InputError."""
    mi.count_frames(path)  # says so if it is no video
    with imageio.get_reader(path, format="FFMPEG") as reader:
        width, height = reader.get_meta_data()["size"]
    frames = [*mi.read_frames(path, height, width, fps)]
    if len(frames) < 2:
        raise mi.InputError(f"{path} is too short")
    return np.stack(frames)


def motion_energy(frames):
    """uint8 (T, H, W, 3) -> (T - 1,): mean absolute difference of neighbouring frames after 4x4 averaging, smoothed
    with a Gaussian of one frame; value i lies half-way between frames i and i + 1."""
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    x = F.avg_pool2d(x, 4)
    return smooth((x[1:] - x[:-1]).abs().mean((1, 2, 3)).numpy(), 1)


def smooth(values, sigma):  # (T,), with a Gaussian of sigma frames, cut off at three
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2))
    padded = F.pad(torch.from_numpy(values)[None, None], (reach, reach), mode="replicate")
    return F.conv1d(padded, (kernel / kernel.sum())[None, None])[0, 0].numpy()


def beat_correlation(energy, beats):
    """r: Pearson's correlation of the motion energy with sin^2(pi beats), `beats` being the position in the music, in
    beats, at each value; 1 for a dancer who rests on every beat and moves in between."""
    return float(np.corrcoef(energy, np.sin(np.pi * np.asarray(beats)) ** 2)[0, 1])


def motion_tempo(energy, fps=30, low=65, high=215):
    """BPM of the sinusoid that fits the motion energy best."""
    t = np.arange(len(energy)) / fps
    tempos = np.arange(low, high + 0.5, 0.5)
    energy = energy - energy.mean()

    def residual(bpm):
        w = 2 * np.pi * bpm / 60 * t
        basis = np.stack([np.cos(w), np.sin(w), np.ones_like(t)], 1)
        fit, *_ = np.linalg.lstsq(basis, energy, rcond=None)
        return np.square(energy - basis @ fit).sum()

    return float(tempos[np.argmin([residual(bpm) for bpm in tempos])])


def motion_beats(energy, fps=FPS):
    """Times of the motion's local minima, as in Bailando, which smooths its velocity with 5 frames at 60 fps; the
    energy comes smoothed with one frame."""
    e = smooth(energy, math.sqrt((5 / 60 * fps) ** 2 - 1))
    return (np.flatnonzero((e[1:-1] < e[:-2]) & (e[1:-1] < e[2:])) + 1.5) / fps


# ------------------------------------------------------------------------------------------------------------------
# The sound, and how well the picture keeps to it
# ------------------------------------------------------------------------------------------------------------------

SIGMA = 3 / 60  # seconds: AIST++ and Bailando take 3 frames at 60 fps


LATE = 0.02  # seconds by which librosa hears beats too late here: 0.015 on clicks, 0.026 on the toy world's songs


@functools.cache
def track_beats(path):
    """Times of the beats in a file's sound, in its own seconds, by librosa. Raises InputError where none is heard."""
    try:
        import librosa  # here, because only this needs it
    except ImportError as error:
        raise mi.InputError(f"{error}; pip install -r eval/requirements.txt") from error
    rate, hop = 22050, 256  # 12 ms, half of librosa's default
    onsets = librosa.onset.onset_strength(y=mi.load_audio(path, rate=rate).numpy(), sr=rate, hop_length=hop)
    _, frames = librosa.beat.beat_track(onset_envelope=onsets, sr=rate, hop_length=hop, trim=False)
    if len(frames) < 2:
        raise NoBeat(f"no beat is heard in {path}")
    return librosa.frames_to_time(frames, sr=rate, hop_length=hop) - LATE


def beat_position(beats, t):
    """Where times t lie in the music, in beats: linear between the beats, outside at the period of the last two."""
    i = np.clip(np.searchsorted(beats, t) - 1, 0, len(beats) - 2)
    return i + (t - beats[i]) / (beats[i + 1] - beats[i])


def music_tempo(beats):
    """Of tracked beats, without the gaps that a missed or an extra beat leaves."""
    gaps = np.diff(beats)
    even = gaps[np.abs(gaps / np.median(gaps) - 1) < 0.2]
    return 60 / (even.mean() if len(even) else np.median(gaps))


def alignment(of, to):
    """Mean of exp(-d^2 / 2 sigma^2) over the times `of`, d being the distance to the nearest of the times `to`."""
    if not len(of) or not len(to):
        return 0.0
    distance = np.abs(np.asarray(of)[:, None] - to).min(1)
    return float(np.exp(-np.square(distance) / (2 * SIGMA**2)).mean())


SCORES = {
    "r": "r, motion with the beat's phase", "bas_aist": "BAS, AIST++ (motion beats to the nearest music beat)",
    "bas_bailando": "BAS, Bailando (music beats to the nearest motion beat)", "tempo": "tempo of motion / of music",
    "tempo_close": "... within 4%, octaves folded (share)",
}  # fmt: skip


def motion(path):
    """(energy, times of its minima, tempo) of a video; a still one has no minima and tempo 0."""
    energy = motion_energy(film(path))
    return energy, motion_beats(energy), motion_tempo(energy) if np.ptp(energy) else 0.0


def beat_scores(moving, beats):
    """SCORES of a motion() against music beats at `beats`, in the video's seconds, before its start and after its end
    too. A still picture follows nothing: all are 0."""
    energy, rests, tempo = moving
    t = (np.arange(len(energy)) + 0.5) / FPS
    ratio = tempo / music_tempo(beats)
    inside = beats[(beats >= 0) & (beats <= t[-1] + 0.5 / FPS)]
    octaves = math.log2(ratio) if ratio else 0.5
    return {
        "r": beat_correlation(energy, beat_position(beats, t)) if tempo else 0.0,
        "bas_aist": alignment(rests, beats),
        "bas_bailando": alignment(inside, rests),
        "tempo": ratio,
        "tempo_close": float(abs(octaves - round(octaves)) < math.log2(1.04)),
    }


def read_json(path):  # {} where there is none
    try:
        return json.load(open(path)) if os.path.exists(path) else {}
    except ValueError as error:
        raise mi.InputError(f"{path} is not JSON") from error


def recipe(video):  # what sample.py wrote beside it
    return read_json(os.path.splitext(video)[0] + ".json")


def song_of(video, song=None):
    """(file, start, speed) of the music: `song`, or the whole song that the video was made to, or its own sound."""
    made = recipe(video)
    song = song or made.get("song", video)
    if not os.path.isfile(song):
        raise mi.InputError(f"{video} was made to {song}, which is not there; name it by --song")
    return song, made.get("start", 0.0), made.get("speed", 1.0)


def mean_error(rows):  # {score: [mean, standard error]} over videos; one video has no error
    columns, n = {k: np.array([row[k] for row in rows]) for k in SCORES}, len(rows)
    return {k: [float(x.mean()), float(x.std(ddof=1) / n**0.5) if n > 1 else None] for k, x in columns.items()}


def beat_report(videos, song=None):
    """Print and return every video's SCORES with its own song and, averaged, with the songs of all other videos."""
    songs = {video: song_of(video, song) for video in videos}
    print(f"beats    of {len({s[0] for s in songs.values()})} songs by librosa, sigma {SIGMA:g} s")
    beats = {}
    for video, (s, start, speed) in [*songs.items()]:
        try:
            if songs[video] not in beats:
                beats[songs[video]] = (track_beats(s) - start) / speed
        except NoBeat as error:
            print(f"skipped  {video}: {error}")
            del songs[video]
    if not songs:
        raise mi.InputError("there is no video with a beat to score")
    videos = [*songs]
    own, other = {}, {}
    for video in tqdm(videos, "beat alignment", unit="video"):
        moving = motion(video)
        own[video] = beat_scores(moving, beats[songs[video]])
        shuffled = [beat_scores(moving, beats[s]) for s in dict.fromkeys(songs.values()) if s[0] != songs[video][0]]
        if shuffled:
            other[video] = {k: float(np.mean([row[k] for row in shuffled])) for k in SCORES}
    for video, row in own.items():
        print(os.path.basename(video), *(f"{k} {v:.2f}" for k, v in row.items()), sep="  ")
    means = {"own": mean_error([*own.values()]), "shuffled": mean_error([*other.values()]) if other else None}
    show = lambda pair: f"{pair[0]:6.2f}" + ("" if pair[1] is None else f" ± {pair[1]:.2f}")  # noqa: E731
    print(f"\n{'':56}{'own song':16}other videos' songs")
    for k, name in SCORES.items():
        print(f"{name:56}{show(means['own'][k]):16}{show(means['shuffled'][k]) if other else 'none'}")
    if not other:
        print("no other video's song to compare with: name several videos with different songs")
    return {"mean": means, "videos": {v: {"song": songs[v], "own": own[v], "shuffled": other.get(v)} for v in videos}}


# ------------------------------------------------------------------------------------------------------------------
# The paper's judge (Table 10): a model that sees and hears the video is asked, one question at a time
# ------------------------------------------------------------------------------------------------------------------

JUDGE_FPS = 2  # of the pictures that it is shown, as in these models' own video reader


def rate(of, low, middle, high):
    return f"Rate the {of} where: 0 means {low}, 5 means {middle}, and 10 means {high}. Output only the number."


def graded(of, what=None):
    return rate(of, *(f"{level} {what or of}" for level in ("poor", "moderate", "perfect")))


DANCE = {
    "style": graded("style alignment of the dance to music"),
    "beat": graded("beat alignment of the dance to music"),
    "body": rate("body representation of the dancer", "unrealistic/distorted proportions of the dancer",
                 "minor anatomical issues of the dancer", "anatomically perfect representation of the dancer"),
    "movement": graded("movement realism of the dancer"),
    "choreography": rate("complexity of the choreography", "extremely basic choreography",
                         "intermediate choreography", "extremely complex/advanced choreography"),
}  # fmt: skip
VIDEO = {
    "imaging": graded("imaging quality"),
    "aesthetic": graded("aesthetic quality"),
    "consistency": graded("overall consistency", "consistency"),
}
PROMPT = {
    "capture": "How well does the dance video capture the specific style mentioned in the prompt: '{prompt}'? Rate 0-10 "
               "where: 0 means completely missed the style, 5 means some elements of the style are present, and 10 means "
               "perfectly captures the style. Output only the number.",
    "creativity": "Based on the prompt '{prompt}', rate the creativity in interpreting the prompt 0-10 where: 0 means "
                  "generic/standard interpretation, 5 means moderate creativity, and 10 means highly creative and unique "
                  "interpretation. Output only the number.",
    "satisfaction": "Rate the overall prompt satisfaction 0-10 where: 0 means the video fails to satisfy the prompt "
                    "'{prompt}', 5 means it partially satisfies the prompt, and 10 means it fully satisfies all aspects of "
                    "the prompt. Output only the number.",
}  # fmt: skip
PAPER = {  # Table 1, "Ours", by Qwen3-Omni
    "style": 8.95, "beat": 9.54, "body": 10.00, "movement": 7.36, "choreography": 5.25, "dance avg": 8.22,
    "imaging": 7.08, "aesthetic": 7.01, "consistency": 9.96, "video avg": 8.02, "overall": 8.14,
}  # fmt: skip
CAPTION = ("Describe this dance video in one sentence: who dances, what they wear, the style of the dance, the place, and "
           "the view of the camera. Output only the description.")  # fmt: skip


def load_judge(folder, device=None, dtype=None):
    """(model, processor) of a local folder as Qwen2.5-Omni and Qwen3-Omni come; of them only the part that answers."""
    device, dtype = mi.choose_device(device, dtype)
    kind = mi.from_pretrained("AutoConfig", folder).model_type.removesuffix("_thinker")
    names = {"qwen2_5_omni": "Qwen2_5Omni", "qwen3_omni_moe": "Qwen3OmniMoe"}
    if kind not in names:
        raise mi.InputError(f"{folder} is a {kind}; a judge is one of {', '.join(names)}")
    cls = f"{names[kind]}ThinkerForConditionalGeneration"
    model, info = mi.from_pretrained(cls, folder, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:  # transformers would fill them at random
        raise mi.InputError(f"{folder} lacks {len(info['missing_keys'])} tensors, as {min(info['missing_keys'])}")
    print(f"judge    {folder}, {kind}, {device}, {str(dtype).removeprefix('torch.')}")
    return model.to(device).eval(), mi.from_pretrained("AutoProcessor", folder)


@torch.inference_mode()
def ask(judge, video, question, tokens=16):
    """The answer to a question about a video file, picture and sound side by side in time, greedily decoded."""
    model, processor = judge
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    frames, sound = seen(video, processor.feature_extractor.sampling_rate)
    inputs = processor(
        text=[text], videos=[frames], audio=[sound], audio_from_video_indices=[0], load_audio_from_video=True,
        videos_kwargs={"fps": JUDGE_FPS, "do_sample_frames": False, "cap_pixels_per_frame": True}, return_tensors="pt",
    ).to(model.device, model.dtype)  # fmt: skip
    stop = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    answer = model.generate(**inputs, **stop, use_audio_in_video=True, do_sample=False, max_new_tokens=tokens)
    return processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


@functools.lru_cache(1)  # eleven questions on end are about one video
def seen(video, rate):  # frames (T, 3, H, W), sound (samples,)
    return film(video, JUDGE_FPS).transpose(0, 3, 1, 2), mi.load_audio(video, rate=rate).numpy()


def rating(answer):
    """The number from 0 to 10 that is the only one in an answer, "8/10" being 8; None for any other answer."""
    answer = re.sub(r"(?<=[0-9])\s*(/|out of)\s*10(?![0-9]|\.[0-9])", "", answer, count=1)
    numbers = [word.rstrip(".,") for word in re.findall(r"[\w.,%+-]*[0-9][\w.,%+-]*", answer)]
    if len(numbers) != 1 or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", numbers[0]) or float(numbers[0]) > 10:
        return None
    return float(numbers[0])


def averages(answers):
    """{column: mean} of a list of {question: answer}, None where nothing counts, and how many answers had no number."""
    ratings = {name: [rating(a[name]) for a in answers if name in a] for name in (*DANCE, *VIDEO, *PROMPT)}
    valid = {name: [r for r in row if r is not None] for name, row in ratings.items()}
    means = {name: float(np.mean(row)) if row else None for name, row in valid.items()}

    def mean(names):
        return None if any(means[n] is None for n in names) else float(np.mean([means[n] for n in names]))

    means |= {"dance avg": mean(DANCE), "video avg": mean(VIDEO), "overall": mean([*DANCE, *VIDEO])}
    means["prompt avg"] = mean(PROMPT)
    return means, {name: len(row) - len(valid[name]) for name, row in ratings.items() if len(row) > len(valid[name])}


def judge(videos, folder, out, device=None, dtype=None):
    """Ask everything that `out` has no answer to yet, keep each answer there, and print them as Table 1 does."""
    kept = read_json(out)
    answers = kept.setdefault("judge", {"model": folder, "videos": {}})
    if answers["model"] != folder:
        raise mi.InputError(f"{out} has the answers of {answers['model']}; name another --json")
    questions, model = {}, None
    for video in videos:
        prompt = recipe(video).get("prompt")  # without one, prompt alignment is not asked for
        asked = DANCE | VIDEO | ({k: q.replace("{prompt}", prompt) for k, q in PROMPT.items()} if prompt else {})
        with open(video, "rb") as file:
            now = {"sha256": hashlib.sha256(file.read()).hexdigest(), "prompt": prompt}
        old = answers["videos"].setdefault(video, now | {"answers": {}})
        if not now.items() <= old.items():  # another video of that name
            answers["videos"][video] = old = now | {"answers": {}}
        questions |= {(video, k): q for k, q in asked.items() if k not in old["answers"]}
    for (video, name), question in tqdm(questions.items(), "judge", unit="question"):
        model = model or load_judge(folder, device, dtype)
        answers["videos"][video]["answers"][name] = ask(model, video, question)
        mi.save_json(out, kept)
    given = [answers["videos"][video]["answers"] for video in videos]
    answers["mean"], answers["without_number"] = averages(given)
    mi.save_json(out, kept)
    table(answers["mean"], f"{len(videos)} videos")
    count = sum(answers["without_number"].values())
    print(f"{count} of {sum(map(len, given))} answers had no number from 0 to 10", answers["without_number"] or "")


def table(means, name):
    show = lambda x: "-" if x is None else f"{x:.2f}"  # noqa: E731
    print(f"\n| model | {' | '.join(PAPER)} |\n|---{'|---' * len(PAPER)}|")
    print(f"| {name} | {' | '.join(show(means[k]) for k in PAPER)} |")
    print(f"| the paper's own, as published | {' | '.join(show(x) for x in PAPER.values())} |")
    print("prompt alignment:", ", ".join(f"{k} {show(means[k])}" for k in (*PROMPT, "prompt avg")))


def caption(folder, model, device=None, dtype=None):
    """Describe every video below `folder` that has no .txt beside it, in one, for train.py --wild."""
    text = lambda video: os.path.splitext(video)[0] + ".txt"  # noqa: E731
    videos = [video for video in train.walk(folder) if not os.path.exists(text(video))]
    if not videos:
        return print(f"every video in {folder} has its .txt")
    model = load_judge(model, device, dtype)
    for video in tqdm(videos, "captions", unit="video"):
        words = " ".join(ask(model, video, CAPTION, tokens=96).split())
        if not words:
            print(f"no answer for {video}")
            continue
        with mi.written_whole(text(video)) as temporary, open(temporary, "w") as file:
            file.write(words + "\n")


# ------------------------------------------------------------------------------------------------------------------
# The paper's protocol: 10 prompts times the 10 songs that were held out
# ------------------------------------------------------------------------------------------------------------------

PROMPTS = (  # the first two are shown in the paper, whose list is not public; the others are ours
    "a male dancer in an art gallery with some paintings, front view",
    "a male dancer in a suit in the middle of New York City, front view",
    "a female dancer in a red dress on a wooden stage, front view",
    "a female dancer in jeans and a white shirt in a dance studio with mirrors, moving front view",
    "a male dancer in a tracksuit on a basketball court, front view from a low angle",
    "a female dancer in a yellow raincoat in a street at night, front-left diagonal view",
    "two dancers in black clothes on the roof of a building at sunset, front view",
    "an old man in a grey coat dancing in a railway station, front view",
    "a dancer in a silver costume in a club with coloured lights, front-right diagonal view",
    "a girl in a summer dress dancing on a beach, front view",
)


def protocol_songs(folder):
    """The files mLH4.*, mKR2.*, ... of `folder`, the held-out songs; or all its files where these are ten others."""
    if not os.path.isdir(folder or ""):
        raise mi.InputError(f"--protocol needs --songs, a folder with the held-out songs; there is no folder {folder}")
    files = sorted(f for f in glob.glob(os.path.join(glob.escape(folder), "*")) if os.path.isfile(f))
    named = {os.path.splitext(os.path.basename(f))[0]: f for f in files}
    missing = [name for name in train.TEST_SONGS if name not in named]
    if missing and (len(files) != 10 or len(missing) < 10):
        raise mi.InputError(f"{folder} lacks the held-out {', '.join(missing)}, and is not a folder of ten others")
    return files if missing else [named[name] for name in train.TEST_SONGS]


def protocol(songs, out, weights=None, adapter=None, seed=0, device=None, dtype=None):
    """The 100 videos, made by sample.generate where they are not there yet; returns their paths."""
    import sample  # here, because scoring does not need it

    videos = []
    for i, song in enumerate(protocol_songs(songs)):
        for j, prompt in enumerate(PROMPTS):
            video = os.path.join(out, f"{os.path.splitext(os.path.basename(song))[0]}-{j}.mp4")
            videos.append(video)
            made, number = recipe(video), seed + len(PROMPTS) * i + j  # each video has its own noise
            weights = weights or mi.default_weights()
            wanted = {"song": song, "prompt": prompt, "seed": number, "weights": weights,
                      "adapter": adapter or os.path.join(weights, "musicinfuser.safetensors")}  # fmt: skip
            if made and not wanted.items() <= made.items():
                raise mi.InputError(f"{video} was made with other settings; name another --out")
            if not made:
                if os.path.exists(video):  # stopped between the two files
                    os.remove(video)
                print(f"video {len(videos)} of {10 * len(PROMPTS)}")
                sample.generate(song, prompt, weights=weights, adapter=adapter, seeds=[number], out=video, device=device,
                                dtype=dtype)  # fmt: skip
    return videos


# ------------------------------------------------------------------------------------------------------------------
# Style, on the toy world: does the music alone choose the dance?
# ------------------------------------------------------------------------------------------------------------------


def held_poses(film, beats):
    """Features (K - 1, 512) of the K whole beats of a film in front of an even backdrop: the silhouettes of each two
    that follow each other, 16x16, centred, whatever the colours. beats (T,): the position of every frame, in beats."""
    x = torch.from_numpy(np.ascontiguousarray(film)).float() / 255  # (T, H, W, 3)
    backdrop = x.permute(1, 0, 2, 3).flatten(1, 2).median(1).values[:, None]  # of each row, (H, 1, 3)
    figure = (((x - backdrop).abs().sum(-1) - 0.15) * 4).clamp(0, 1)  # (T, H, W)
    weight = figure.mean((0, 1)).square()
    middle = (weight * torch.arange(len(weight))).sum() / weight.sum().clamp(min=1e-6)
    figure = figure.roll(round(len(weight) / 2 - middle.item()), 2)
    figure = F.adaptive_avg_pool2d(figure, 16).flatten(1)  # (T, 256)
    whole = np.arange(np.ceil(beats[0]), np.floor(beats[-1]) + 1)
    held = figure[np.interp(whole, beats, np.arange(len(film))).round().astype(int)]  # (K, 256)
    return torch.cat([held[:-1], held[1:]], 1)


@functools.cache
def choreographies(renderings=4):
    """({genre: unit features of its poses}, what all have in common), of the toy world's own renderings."""
    from tiny import make  # here, because it imports this file

    bank = {}
    for i, genre in enumerate(make.GENRES):
        pairs = []
        for k in range(renderings):
            look = {
                "subject": "person",
                "count": 1,
                "place": "studio",
                "camera": "01",
                "genre": genre,
                "advanced": k % 2 > 0,
            }
            at = torch.arange(0, 8.6, 0.2)  # all eight poses, and over again
            film = make.render(make.draw_scene(np.random.default_rng((99, i, k)), **look), at)
            pairs += [held_poses(film, at.numpy()), held_poses(film[:, :, ::-1], at.numpy())]
        bank[genre] = torch.cat(pairs)
    common = torch.cat(list(bank.values())).mean(0)
    return {genre: F.normalize(pairs - common, dim=1) for genre, pairs in bank.items()}, common


def style(films, beats, genres):
    """Does the music alone choose the dance? The share of films, made with the plain prompt to songs of these genres
    (codes such as "BR"), whose poses are nearest to their genre's, and the genre nearest to each. Chance is 0.1.

    films: uint8 (T, H, W, 3) each; beats (T,) each, the position of every frame in its song, in beats. Every two
    poses that follow each other go to the most alike of a genre's, in the toy world's own renderings and their mirror
    images (by correlation, what all have in common being taken away); the genre with the best mean is the nearest."""
    bank, common = choreographies()
    nearest = []
    for film, at in zip(films, beats):
        found = F.normalize(held_poses(film, np.asarray(at)) - common, dim=1)
        likeness = {genre: (found @ pairs.T).max(1).values.mean().item() for genre, pairs in bank.items()}
        nearest.append(max(likeness, key=likeness.get))
    return float(np.mean([a == b for a, b in zip(nearest, genres)])), nearest


def main():
    parser = argparse.ArgumentParser(description="Does it dance to the music? Scores of videos.")
    add = parser.add_argument
    add("videos", nargs="*", help="as sample.py writes them; a video without its .json is scored with its own sound")
    add("--song", help="score against this song instead of the one that each video was made to")
    add("--json", metavar="OUT", help="write the scores there; with --judge, default scores.json beside the videos")
    add("--judge", metavar="MODEL", help="folder of a Qwen3-Omni or Qwen2.5-Omni: ask it the paper's eleven questions")
    add("--protocol", action="store_true", help="make and score the paper's 10 prompts x 10 held-out songs")
    add("--songs", metavar="DIR", help="... of these songs: mLH4.*, ... or any ten files")
    add("--out", default="outputs/protocol", help="... in this folder; what is there is not made again")
    add("--weights", help="... with these weights (default as in sample.py)")
    add("--adapter", help="... and this adapter, or none")
    add("--seed", type=int, default=0, help="... of the first video")
    add("--caption", metavar="DIR", help="let the judge describe each video in DIR in a .txt, for train.py --wild")
    add("--device", help="cuda, cpu, ...; default: cuda if there is one")
    add("--dtype", choices=list(mi.DTYPES), help="default: bfloat16 on a GPU, else float32")
    o = parser.parse_args()
    if o.caption and not o.judge:
        raise mi.InputError("--caption needs --judge, the model that describes")
    if not (o.videos or o.protocol or o.caption):
        raise mi.InputError("nothing to do: name videos, --protocol or --caption")
    for video in o.videos:
        if not os.path.isfile(video):
            raise mi.InputError(f"no such file: {video}")
    if o.caption:
        caption(o.caption, o.judge, o.device, o.dtype)
    videos = list(dict.fromkeys(o.videos))
    if o.protocol:
        videos += protocol(o.songs, o.out, o.weights, o.adapter, o.seed, o.device, o.dtype)
    if not videos:
        return
    out = o.json or (os.path.join(os.path.dirname(videos[0]), "scores.json") if o.judge else None)
    scores = (read_json(out) if out else {}) | {"beats": beat_report(videos, o.song)}
    if out:
        mi.save_json(out, scores)
    if o.judge:
        judge(videos, o.judge, out, o.device, o.dtype)


if __name__ == "__main__":
    mi.main(main)
