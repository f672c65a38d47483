"""AIST (https://aistdancedb.ongaaccel.jp) by its file names, and other dance videos beside it:

gBR_sBM_c01_d04_mBR0_ch01.mp4     genre, situation, camera, dancers, music, choreography
"""

import os
import re
from dataclasses import dataclass

import musicinfuser as mi

NAME = re.compile(r"g([A-Z]{2})_s([A-Z]{2})_c(\d\d)((?:_d\d+)+)_m([A-Z]{2}\d+)_ch\d+")

# fmt: off
GENRES = {
    "BR": "Break", "PO": "Pop", "LO": "Lock", "MH": "Middle Hip-hop", "LH": "LA style Hip-hop",
    "HO": "House", "WA": "Waack", "KR": "Krump", "JS": "Street Jazz", "JB": "Ballet Jazz",
}
SITUATIONS = {
    "BM": "basic dance", "FM": "advanced dance", "MM": "moving camera", "GR": "group dance",
    "SH": "showcase", "CY": "cypher", "BT": "battle",
}
CAMERAS = {
    "01": "front view", "02": "front-left diagonal view", "03": "left side view",
    "04": "back-left diagonal view", "05": "back view", "06": "back-right diagonal view",
    "07": "right side view", "08": "front-right diagonal view",
    "09": "close-up front view from a low angle", "10": "moving front view",
}
FEMALE = {1, 2, 3, 7, 8, 9, 12, 13, 15, 16, 18, 19, 25, 26, 27}
DANCERS = range(1, 36)

# The split of the paper: two cameras to train on, one song of each genre held out
TRAINING_CAMERAS = ("01", "10")
TEST_SONGS = (
    "mLH4", "mKR2", "mBR0", "mLO2", "mJB5", "mWA0", "mJS3", "mMH3", "mHO5", "mPO1",
)
# fmt: on

# The dancers, of the whole stage, as the official trim_and_crop_videos.py cuts them from 1920x1080
CROP = (324 / 1920, 270 / 1080, 1272 / 1920, 720 / 1080)  # x, y, width, height

# What the official embed_captions.py says of any clip, and of one without a caption
PLAIN = "a professional dancer dancing in a studio with a white backdrop"
WILD_PLAIN = "a dance video"
WILD_UNTITLED = "a YouTube dance video"

# In the form of the official ones, which name the same things in other words
TEMPLATES = (
    "{who} dancing {genre} in {situation} setting in a studio with a white backdrop, {camera}",
    (
        "{who} performing {genre} in a studio with a white backdrop, captured from a {camera}, "
        "in {situation} setting"
    ),
    "in a studio with a white backdrop, {who} dancing {genre}, {camera}, {situation} setting",
    "a {camera} of {who} dancing {genre} in {situation} setting, in a studio with a white backdrop",
)

CAPTION_LENGTH = 10_000  # characters, more than any prompt's 256 tokens
VIDEO_ENDINGS = (".mp4", ".mov", ".webm", ".mkv", ".avi")


@dataclass(frozen=True)
class Video:
    path: str
    kind: str  # aist or wild
    song: str  # such as mBR0; of a wild video its own path
    prompts: tuple  # one is drawn each time that a clip of it is used

    @property
    def crop(self):
        """What musicinfuser.read_frames takes."""
        return CROP if self.kind == "aist" else None

    @property
    def plain(self):
        """The prompt that fits every video of its kind."""
        return PLAIN if self.kind == "aist" else WILD_PLAIN


def dancer(number):
    if number not in DANCERS:
        return "a professional unknown dancer"
    sex = "female" if number in FEMALE else "male"
    return f"a professional {sex} dancer"


def prompts(name):
    """The four prompts of an AIST file name."""
    genre, situation, camera, dancers, _ = NAME.search(name).groups()
    who = [dancer(int(number)) for number in re.findall(r"\d+", dancers)]
    if len(who) > 1:
        who = [", ".join(who[:-1]), who[-1]]
    situation = SITUATIONS.get(situation, situation)
    article = "an" if situation[0] in "aeiou" else "a"
    words = {
        "who": " and ".join(who),
        "genre": GENRES.get(genre, genre),
        "situation": f"{article} {situation}",
        "camera": CAMERAS.get(camera, "front view"),
    }
    return tuple(template.format(**words) for template in TEMPLATES)


def find_videos(data, wild=None, split="train"):
    """[Video]: AIST's below `data` in that split and, to train on, all others below `wild`, but for
    those of AIST's held-out songs.

    Raises musicinfuser.InputError for a folder that is not there.
    """
    videos, own = [], set()
    for path in list_videos(data):
        match = NAME.search(os.path.basename(path))
        if match:
            own.add(os.path.realpath(path))
        if match and in_split(match, split):
            videos.append(Video(path, "aist", "m" + match[5], prompts(match[0])))
    if wild and split == "train":
        for path in list_videos(wild):
            if os.path.realpath(path) not in own and not is_held_out(path):
                videos.append(Video(path, "wild", path, (caption(path),)))
    return videos


def is_held_out(path):
    match = NAME.search(os.path.basename(path))
    return bool(match) and "m" + match[5] in TEST_SONGS


def in_split(match, split):
    held_out = "m" + match[5] in TEST_SONGS
    return match[3] in TRAINING_CAMERAS and held_out == (split == "test")


def list_videos(folder):
    """The paths of all videos below a folder, in the order of their names."""
    if not os.path.isdir(folder):
        raise mi.InputError(f"no such folder: {folder}")
    paths = []
    for root, _, names in os.walk(folder):
        paths += [os.path.join(root, n) for n in names if n.lower().endswith(VIDEO_ENDINGS)]
    return sorted(paths)


def caption(video):
    """The .txt beside a video; where there is none, or nothing in it, what the authors say."""
    path = os.path.splitext(video)[0] + ".txt"
    text = ""
    if os.path.isfile(path):  # not a folder of that name, nor a link to nowhere
        try:
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                text = file.read(CAPTION_LENGTH).strip()
        except OSError as error:
            raise mi.InputError(f"{path} cannot be read ({error.strerror})") from error
    return text or WILD_UNTITLED
