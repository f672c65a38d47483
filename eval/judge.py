"""The paper's judge (Table 10): a model that sees and hears a video is asked for grades.

Top to bottom:   the questions | asking | reading the answers | the table | captions
"""

import functools
import os
import re

import numpy as np
import torch
from tqdm import tqdm

import musicinfuser as mi
from eval.beats import film

# ----------------------------------------------------------------------------------------------
# The questions, as the paper prints them (the authors' vlm_eval/ has "0-10" before some "where")
# ----------------------------------------------------------------------------------------------


def rate(of, low, middle, high):
    scale = f"0 means {low}, 5 means {middle}, and 10 means {high}"
    return f"Rate the {of} where: {scale}. Output only the number."


def graded(of, what=None):
    what = what or of
    return rate(of, f"poor {what}", f"moderate {what}", f"perfect {what}")


DANCE = {
    "style": graded("style alignment of the dance to music"),
    "beat": graded("beat alignment of the dance to music"),
    "body": rate(
        "body representation of the dancer",
        "unrealistic/distorted proportions of the dancer",
        "minor anatomical issues of the dancer",
        "anatomically perfect representation of the dancer",
    ),
    "movement": graded("movement realism of the dancer"),
    "choreography": rate(
        "complexity of the choreography",
        "extremely basic choreography",
        "intermediate choreography",
        "extremely complex/advanced choreography",
    ),
}
VIDEO = {
    "imaging": graded("imaging quality"),
    "aesthetic": graded("aesthetic quality"),
    "consistency": graded("overall consistency", "consistency"),
}
PROMPT = {
    "capture": "How well does the dance video capture the specific style mentioned in the prompt: "
    "'{prompt}'? Rate 0-10 where: 0 means completely missed the style, 5 means some elements of "
    "the style are present, and 10 means perfectly captures the style. Output only the number.",
    "creativity": "Based on the prompt '{prompt}', rate the creativity in interpreting the prompt "
    "0-10 where: 0 means generic/standard interpretation, 5 means moderate creativity, and 10 "
    "means highly creative and unique interpretation. Output only the number.",
    "satisfaction": "Rate the overall prompt satisfaction 0-10 where: 0 means the video fails to "
    "satisfy the prompt '{prompt}', 5 means it partially satisfies the prompt, and 10 means it "
    "fully satisfies all aspects of the prompt. Output only the number.",
}
CAPTION = (
    "Describe this dance video in one sentence: who dances, what they wear, the style of the "
    "dance, the place, and the view of the camera. Output only the description."
)


def questions(prompt=None):
    """{name: question}; without a prompt, prompt alignment is not asked for."""
    asked = DANCE | VIDEO
    if prompt:
        asked |= {name: text.replace("{prompt}", prompt) for name, text in PROMPT.items()}
    return asked


# ----------------------------------------------------------------------------------------------
# Asking
# ----------------------------------------------------------------------------------------------

JUDGE_FPS = 2  # of the pictures that it is shown, as in these models' own video reader
LONGEST = 1024  # pixels a side: its processor shrinks a frame to about 600,000 pixels itself
FAMILIES = {"qwen2_5_omni": "Qwen2_5Omni", "qwen3_omni_moe": "Qwen3OmniMoe"}


def load_judge(folder, device=None, dtype=None):
    """(model, processor) of a local folder as Qwen2.5-Omni and Qwen3-Omni come; of them only the
    part that answers. Raises InputError."""
    device, dtype = mi.choose_device(device, dtype)
    family = mi.from_pretrained("AutoConfig", folder).model_type.removesuffix("_thinker")
    if family not in FAMILIES:
        raise mi.InputError(f"{folder} is a {family}; a judge is one of {', '.join(FAMILIES)}")
    name = f"{FAMILIES[family]}ThinkerForConditionalGeneration"
    how = {"dtype": mi.DTYPES[dtype], "output_loading_info": True}
    model, info = mi.from_pretrained(name, folder, **how)
    if lacking := info["missing_keys"]:  # transformers would fill them at random
        raise mi.InputError(f"{folder} lacks {len(lacking)} tensors, as {min(lacking)}")
    print(f"judge    {folder}, {family}, {device}, {dtype}")
    return model.to(device).eval(), mi.from_pretrained("AutoProcessor", folder)


@functools.lru_cache(1)  # eleven questions on end are about one video
def seen_and_heard(video, rate):
    """frames (T, 3, H, W), sound (samples,)"""
    frames = film(video, JUDGE_FPS, LONGEST)
    return frames.transpose(0, 3, 1, 2), mi.load_audio(video, rate=rate).numpy()


@torch.inference_mode()
def ask(judge, video, question, tokens=16):
    """The answer to a question about a video file, picture and sound side by side in time, decoded
    greedily as the authors do."""
    model, processor = judge
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    frames, sound = seen_and_heard(video, processor.feature_extractor.sampling_rate)
    inputs = processor(
        text=[text],
        videos=[frames],
        audio=[sound],
        audio_from_video_indices=[0],
        load_audio_from_video=True,
        videos_kwargs={
            "fps": JUDGE_FPS,
            "do_sample_frames": False,
            "cap_pixels_per_frame": True,
        },
        return_tensors="pt",
    ).to(model.device, model.dtype)
    answer = model.generate(
        **inputs,
        use_audio_in_video=True,
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    answer = answer[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(answer, skip_special_tokens=True)[0].strip()


def ask_all(videos, folder, kept, save, device=None, dtype=None):
    """Ask of every video what `kept` has no answer to, and call save() after each answer.

    videos: {path: prompt or None}. kept: {"model", "videos": {path: {"sha256", "prompt",
    "answers": {name: text}}}}, changed in place. The judge is loaded when the first is asked.
    """
    todo = []
    for video, prompt in videos.items():
        answers = answers_of(kept, video, prompt)
        asked = questions(prompt).items()
        todo += [(video, answers, name, text) for name, text in asked if name not in answers]
    judge = load_judge(folder, device, dtype) if todo else None
    for video, answers, name, text in tqdm(todo, "judge", unit="question", disable=not todo):
        answers[name] = ask(judge, video, text)
        save()


def answers_of(kept, video, prompt):
    """{name: text} that is kept of a video; empty where another of that name was judged."""
    now = {"sha256": mi.file_digest(video), "prompt": prompt}
    entry = kept["videos"].get(video)
    whole = isinstance(entry, dict) and now.items() <= entry.items()
    answers = entry.get("answers") if whole else None
    if not isinstance(answers, dict) or not all(isinstance(a, str) for a in answers.values()):
        entry = kept["videos"][video] = now | {"answers": {}}
    return entry["answers"]


# ----------------------------------------------------------------------------------------------
# Reading the answers
# ----------------------------------------------------------------------------------------------


def rating(answer):
    """The first number of an answer, None where there is none or it is above 10.

    As the authors' script reads it: "8/10", "8, not 9" and "-8" are 8, "80%" is none.
    """
    match = re.search(r"\d+(?:\.\d+)?", answer)
    if not match or float(match[0]) > 10:
        return None
    return float(match[0])


def averages(answers):
    """({column: mean}, {question: answers without a number}) of a list of {question: answer}.

    The means of a group are of its questions' means; None where a question has no number at all.
    """
    means, lost = {}, {}
    for name in (*DANCE, *VIDEO, *PROMPT):
        ratings = [rating(row[name]) for row in answers if name in row]
        valid = [r for r in ratings if r is not None]
        means[name] = float(np.mean(valid)) if valid else None
        if len(valid) < len(ratings):
            lost[name] = len(ratings) - len(valid)
    groups = {
        "dance avg": DANCE,
        "video avg": VIDEO,
        "overall": DANCE | VIDEO,
        "prompt avg": PROMPT,
    }
    for group, names in groups.items():
        row = [means[name] for name in names]
        means[group] = None if None in row else float(np.mean(row))
    return means, lost


# ----------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------

# fmt: off
PAPER = {  # Table 1, "Ours", by Qwen3-Omni
    "style": 8.95, "beat": 9.54, "body": 10.00, "movement": 7.36, "choreography": 5.25,
    "dance avg": 8.22, "imaging": 7.08, "aesthetic": 7.01, "consistency": 9.96, "video avg": 8.02,
    "overall": 8.14,
}
# fmt: on


def two_places(number):
    return "-" if number is None else f"{number:.2f}"


def table(means, name):
    """Table 1's columns in markdown, the paper's own row below, prompt alignment apart."""
    rows = [
        ("model", *PAPER),
        ("---",) * (1 + len(PAPER)),
        (name, *(two_places(means[column]) for column in PAPER)),
        ("the paper's own, as published", *map(two_places, PAPER.values())),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    prompt = ", ".join(
        f"{column} {two_places(means[column])}" for column in (*PROMPT, "prompt avg")
    )
    return "\n".join([*lines, f"prompt alignment: {prompt}"])


# ----------------------------------------------------------------------------------------------
# Captions
# ----------------------------------------------------------------------------------------------


def caption(videos, folder, device=None, dtype=None):
    """Describe every video that has no .txt beside it, in one, for train.py --wild; those that
    cannot be seen and heard are named."""
    todo = [video for video in videos if not os.path.exists(caption_file(video))]
    judge = load_judge(folder, device, dtype) if todo else None
    for video in tqdm(todo, "captions", unit="video", disable=not todo):
        try:
            words = " ".join(ask(judge, video, CAPTION, tokens=96).split())
        except mi.InputError as error:
            tqdm.write(f"skipped  {video}: {error}")
            continue
        if not words:
            print(f"no answer for {video}")
            continue
        with mi.written_whole(caption_file(video)) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(words + "\n")
    if not todo:
        print("every video has its .txt")


def caption_file(video):
    return os.path.splitext(video)[0] + ".txt"
