"""Videos to clips: their latents, their music and the features of their texts, each computed once.

Latents and music are kept apart, each under what made it, so that another audio encoder does not
run the VAE again. Where clips begin follows from the video's content alone.
"""

import math
import os
import random
from dataclasses import dataclass
from functools import cached_property

import torch
from tqdm import tqdm

import musicinfuser as mi
from dataset.aist import PLAIN, WILD_PLAIN, Video
from dataset.cache import Cache, CannotGoOn, needed_by_all

CROPS_PER_MINUTE = 5
EDGE = 0.05  # of a video, left out at both ends


@dataclass(frozen=True)
class Clip:
    video: Video
    start: int  # frame
    latents: str  # names of entries in the cache
    music: str

    @property
    def name(self):
        return f"{self.video.path} at frame {self.start}"


class Preprocessor:
    """Makes clips of `frames` frames at `fps`, of size (height, width), and keeps them in `folder`.

    min_size: (height, width) below which a video is not used; by default it is enlarged nowhere.
    """

    def __init__(
        self, folder, weights, size, frames, fps, device="cpu", dtype=torch.float32, min_size=None
    ):
        self.cache, self.weights = Cache(folder), weights
        self.size, self.frames, self.fps = tuple(size), frames, fps
        self.device, self.dtype = device, dtype
        self.min_size = min_size

    # What made an entry stands in its name

    @cached_property
    def latents_made_by(self):
        with needed_by_all():
            encoder = self.cache.digest_of(os.path.join(self.weights, "encoder.safetensors"))
        made_by = [encoder, version_of(mi.Encoder), str(self.dtype)]
        return [*made_by, self.size, self.frames, self.fps]

    @cached_property
    def music_made_by(self):
        with needed_by_all():
            encoder = self.cache.digest_of_model(os.path.join(self.weights, "audio_encoder"))
        seconds = mi.audio_seconds(self.frames, self.fps)
        return [encoder, version_of(mi.AudioEncoder), self.frames, self.fps, seconds]

    @cached_property
    def text_made_by(self):
        folders = (os.path.join(self.weights, name) for name in ("tokenizer", "text_encoder"))
        models = [self.cache.digest_of_model(folder) for folder in folders]
        return [*models, version_of(mi.encode_text)]

    # Loaded when something is missing

    @cached_property
    def encoder(self):
        with needed_by_all():
            path = os.path.join(self.weights, "encoder.safetensors")
            return mi.load_encoder(path, self.device, self.dtype)

    @cached_property
    def audio_encoder(self):
        with needed_by_all():
            return mi.AudioEncoder(self.weights, self.device)

    def clips(self, videos):
        """[Clip] of all videos; those that cannot be used are named and counted."""
        clips, skipped = [], []
        for video in tqdm(videos, "reading the videos", unit="video", mininterval=1):
            try:
                clips += self.clips_of(video)
            except CannotGoOn:
                raise
            except mi.InputError as error:
                skipped.append(str(error))  # not what it holds on to: frames
        for error in skipped:
            print(f"skipped  {error}")
        if skipped:
            print(f"skipped  {len(skipped)} of {len(videos)} videos")
        return clips

    def clips_of(self, video):
        """[Clip] of one video. Raises InputError: unreadable, too short, too small, silent."""
        if not os.path.isfile(video.path):  # a pipe of that name would be waited for
            raise mi.InputError(f"{video.path} is no file")
        content = self.cache.digest_of(video.path)
        starts, size = self.look_at(video, content)
        self.check_size(video, size)
        clips = [self.clip(video, content, start) for start in starts]
        lacking = self.make_music(clips)  # first, because it costs less
        lacking += self.make_latents([clip for clip in clips if clip not in lacking])
        if lacking:  # its pictures end before it says, or its sound before them
            clips = [clip for clip in clips if clip not in lacking]
            self.note(content, [clip.start for clip in clips], size)
        if not clips:
            raise mi.InputError(f"{video.path} ends, or its sound, before its first clip does")
        return clips

    def clip(self, video, content, start):
        latents = mi.digest([content, video.crop, *self.latents_made_by])
        music = mi.digest([content, *self.music_made_by])
        names = f"latents-{latents}-{start}.safetensors", f"music-{music}-{start}.safetensors"
        return Clip(video, start, *names)

    def look_at(self, video, content):
        """Where its clips begin, and (height, width); kept, because to ask ffmpeg takes long."""
        entry = self.listing(content)
        if not self.cache.holds(entry):
            count = mi.count_frames(video.path, self.fps)
            starts = clip_starts(count, self.frames, self.fps, content)
            if not starts:
                few = f"{count} frames, fewer than a clip's {self.frames}"
                raise mi.InputError(f"{video.path} has {few}")
            self.note(content, starts, video_size(video.path))
        listing = self.cache.read(entry)
        return listing["starts"].tolist(), listing["size"].tolist()

    def listing(self, content):
        how = self.frames, self.fps, CROPS_PER_MINUTE, EDGE
        return f"video-{mi.digest([content, *how])}.safetensors"

    def note(self, content, starts, size):
        numbers = {"starts": starts, "size": size}
        tensors = {k: torch.tensor(v, dtype=torch.int64) for k, v in numbers.items()}
        self.cache.write(self.listing(content), tensors)

    def check_size(self, video, size):
        """The authors too leave out what they would have to enlarge."""
        _, _, width, height = video.crop or (0, 0, 1, 1)  # of the picture, what is shown
        needed = self.min_size or (round(self.size[0] / height), round(self.size[1] / width))
        if any(have < least for have, least in zip(size, needed)):
            small = f"{size[0]}x{size[1]}, smaller than {needed[0]}x{needed[1]}"
            raise mi.InputError(f"{video.path} is {small} (see --min-size)")

    def make_latents(self, clips):
        """Encode the pictures of the clips that lack them; returns the clips that have none."""
        missing = {clip.start: clip for clip in clips if not self.cache.holds(clip.latents)}
        if not missing:
            return []
        video = clips[0].video
        frames = mi.read_frames(video.path, *self.size, self.fps, video.crop)
        for start, pixels in cut(frames, missing, self.frames):
            with torch.no_grad():
                mean, logvar = self.encoder(pixels.to(self.device))
            clip = missing.pop(start)
            self.keep(clip, clip.latents, {"mean": mean[0], "logvar": logvar[0]})
        return list(missing.values())

    def make_music(self, clips):
        """Encode the music of the clips that lack it; returns the clips where there is none."""
        silent = []
        for clip in clips:
            if not self.cache.holds(clip.music):
                seconds = clip.start / self.fps
                try:
                    waveform, _ = mi.music_window(clip.video.path, self.frames, self.fps, seconds)
                except mi.SoundEnds:
                    silent.append(clip)
                    continue
                self.keep(clip, clip.music, {"audio": self.audio_encoder(waveform)[0]})
        return silent

    def keep(self, clip, entry, tensors):
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise mi.InputError(f"{clip.name}: the encoder's {name} is not finite")
        self.cache.write(entry, tensors)

    def texts_of(self, clips):
        """{prompt: the name of its entry} for all that clips can be described by."""
        prompts = {prompt for clip in clips for prompt in clip.video.prompts}
        return self.texts(sorted(prompts | {PLAIN, WILD_PLAIN}))

    def texts(self, prompts):
        """{prompt: the name of its entry}: y_feat (L, D_text) and y_mask (L,) of each."""
        made_by = self.text_made_by
        entries = {p: f"text-{mi.digest([p, *made_by])}.safetensors" for p in prompts}
        missing = [prompt for prompt, entry in entries.items() if not self.cache.holds(entry)]
        if not missing:
            return entries
        features = mi.encoded_texts(
            self.weights, missing, mi.text_device(self.weights, self.device)
        )
        progress = tqdm(missing, desc="reading the texts")
        for prompt, (y_feat, y_mask) in zip(progress, features):  # each kept before the next
            self.cache.write(entries[prompt], {"y_feat": y_feat[0], "y_mask": y_mask[0]})
        return entries


def version_of(encoder):
    """Of its code; an encoder that is changed declares another, and nothing old is used."""
    return getattr(encoder, "version", 1)


def clip_starts(count, length, fps, content):
    """Where the clips of a video begin, in frames: five a minute, at random, away from its ends.

    count, length: frames of the video and of a clip. content: the video's digest, which decides.
    """
    if count < length:
        return []
    margin = round(EDGE * count)
    room = count - 2 * margin - length
    if room < 0:  # short, but whole: the authors leave it out
        return [(count - length) // 2]
    rng = random.Random(content)
    number = math.ceil(CROPS_PER_MINUTE * count / fps / 60)
    return sorted({rng.randint(margin, margin + room) for _ in range(number)})


def cut(frames, starts, length):
    """Yield (start, video (1, 3, length, H, W) in [-1, 1]) for every start, in one pass."""
    parts = {start: [] for start in starts}
    for i, frame in enumerate(frames):
        for start in [start for start in parts if start <= i]:
            parts[start].append(torch.from_numpy(frame))
            if len(parts[start]) == length:
                yield start, mi.from_pixels(torch.stack(parts.pop(start)))[None]
        if not parts:
            return


def video_size(path):
    """(height, width) of a video as it is shown, be it on its side in the file. InputError."""
    first = ("-map", "0:v:0", "-frames:v", 1, "-f", "image2pipe", "-c:v", "pgm", "-")
    picture = mi.ffmpeg(path, *first)  # P5, width, height, 255, pixels
    if not picture:
        raise mi.InputError(f"{path} shows no picture")
    width, height = picture.split(maxsplit=3)[1:3]
    return int(height), int(width)
