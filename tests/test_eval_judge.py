"""The judge: the paper's questions, what reaches the model, how its answers are read."""

import hashlib
import os

import numpy as np
import pytest
import torch

import musicinfuser as mi
from eval import judge as jd
from eval.beats import film
from tiny import music

# ----------------------------------------------------------------------------------------------
# Questions and answers
# ----------------------------------------------------------------------------------------------


def test_questions_are_the_papers():
    texts = [*jd.DANCE.values(), *jd.VIDEO.values(), *jd.PROMPT.values()]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()  # of Table 10, quotes straight
    assert digest == "070de189310de151260b84d6e2d18b019406535cd71fd10ade089d6c93e55358"


def test_prompt_alignment_is_asked_only_of_videos_with_a_prompt():
    assert list(jd.questions()) == [*jd.DANCE, *jd.VIDEO]
    asked = jd.questions("a {dog}")
    assert list(asked) == [*jd.DANCE, *jd.VIDEO, *jd.PROMPT]
    assert all("'a {dog}'" in asked[name] for name in jd.PROMPT)


ANSWERS = {
    "8": 8,
    "7.5": 7.5,
    " 10\n": 10,
    "0": 0,
    "8/10": 8,
    "8 out of 10": 8,
    "Rating: 9": 9,
    "**6**": 6,
    "I would say 7, not 9.": 7,  # the first, as the authors read it
    "7-8": 7,
    "-3": 3,
    "8,5": 8,
    "": None,
    "ten": None,
    "11": None,
    "80/100": None,
    "100, or 9": None,
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_ratings_are_read_as_the_authors_read_them(answer):
    assert jd.rating(answer) == ANSWERS[answer]


def test_averages_are_of_five_three_and_eight():
    names = [*jd.DANCE, *jd.VIDEO]
    first = {name: str(i) for i, name in enumerate(names)} | dict.fromkeys(jd.PROMPT, "9")
    second = dict.fromkeys(names, "10") | {"beat": "ten", "imaging": "very good"}
    means, lost = jd.averages([first, second])
    assert means["beat"] == 1 and means["imaging"] == 5 and means["style"] == 5
    assert lost == {"beat": 1, "imaging": 1}
    dance, video = [5, 1, 6, 6.5, 7], [5, 8, 8.5]
    assert means["dance avg"] == pytest.approx(sum(dance) / 5)
    assert means["video avg"] == pytest.approx(sum(video) / 3)
    assert means["overall"] == pytest.approx(sum(dance + video) / 8) and means["prompt avg"] == 9


def test_a_question_without_any_number_has_no_mean():
    means, lost = jd.averages([dict.fromkeys([*jd.DANCE, *jd.VIDEO], "?")])
    assert means["overall"] is None and means["prompt avg"] is None and sum(lost.values()) == 8
    assert jd.table(means, "mine").count("| - ") == len(jd.PAPER)


def test_published_averages_are_such_means():
    row = [jd.PAPER[name] for name in (*jd.DANCE, *jd.VIDEO)]
    assert jd.PAPER["dance avg"] == pytest.approx(np.mean(row[:5]), abs=0.006)
    assert jd.PAPER["video avg"] == pytest.approx(np.mean(row[5:]), abs=0.006)
    assert jd.PAPER["overall"] == pytest.approx(np.mean(row), abs=0.006)


# ----------------------------------------------------------------------------------------------
# Asking
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_text(name)
    return [str(tmp_path / f"{name}.mp4") for name in "ab"]


@pytest.fixture
def asked(monkeypatch):
    """A judge that answers "8/10", and the list of what it was asked; stopped at the fifth."""
    asked = []

    def ask(judge, video, question, tokens=16):
        asked.append((video, question))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return "8/10"

    monkeypatch.setattr(jd, "load_judge", lambda *_: "a judge")
    monkeypatch.setattr(jd, "ask", ask)
    return asked


def test_judging_goes_on_where_it_was_stopped(videos, asked):
    kept, saved = {"model": "some", "videos": {}}, []
    prompts = {videos[0]: "a dog", videos[1]: None}
    with pytest.raises(KeyboardInterrupt):
        jd.ask_all(prompts, "some", kept, lambda: saved.append(1))
    assert len(kept["videos"][videos[0]]["answers"]) == len(saved) == 4
    jd.ask_all(prompts, "some", kept, lambda: saved.append(1))
    assert len(asked) == 20 and len(set(asked)) == 19  # the one that was stopped is asked again
    jd.ask_all(prompts, "some", kept, lambda: saved.append(1))
    assert len(asked) == 20


def test_another_video_of_that_name_is_judged_anew(videos, asked):
    kept, asked[:] = {"model": "some", "videos": {}}, [None] * 5
    jd.ask_all({videos[0]: "a dog"}, "some", kept, lambda: None)
    with open(videos[0], "a") as file:
        file.write("changed")
    jd.ask_all({videos[0]: "a dog"}, "some", kept, lambda: None)
    jd.ask_all({videos[0]: "a cat"}, "some", kept, lambda: None)
    assert len(asked) == 5 + 3 * 11


def test_captions_are_written_once(videos, asked, monkeypatch, capsys):
    with open(videos[0].replace("mp4", "txt"), "w") as file:
        file.write("mine\n")
    jd.caption(videos, "some")
    assert open(videos[0].replace("mp4", "txt")).read() == "mine\n"
    assert open(videos[1].replace("mp4", "txt")).read() == "8/10\n"
    jd.caption(videos, "some")
    assert "every video" in capsys.readouterr().out and asked == [(videos[1], jd.CAPTION)]


def test_a_video_that_cannot_be_heard_does_not_stop_the_captions(videos, monkeypatch, capsys):
    def ask(judge, video, question, tokens=16):
        if video == videos[0]:
            raise mi.InputError("it has no sound")
        return "a dog dances"

    monkeypatch.setattr(jd, "load_judge", lambda *_: "a judge")
    monkeypatch.setattr(jd, "ask", ask)
    jd.caption(videos, "some")
    assert open(videos[1].replace("mp4", "txt")).read() == "a dog dances\n"
    assert not os.path.exists(videos[0].replace("mp4", "txt"))
    assert f"skipped  {videos[0]}: it has no sound" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------
# The real classes, at random, of the smallest sizes
# ----------------------------------------------------------------------------------------------

MARKS = {
    "image": "<|IMAGE|>",
    "audio": "<|AUDIO|>",
    "video": "<|VIDEO|>",
    "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>",
    "audio_bos": "<|audio_bos|>",
    "audio_eos": "<|audio_eos|>",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(tr):
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = tr.Qwen2TokenizerFast(
        vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={f"{name}_token": mark for name, mark in MARKS.items()},
    )
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    return tokenizer


def thinker_config(tokenizer, three, patch):
    """The smallest sizes that Qwen2.5-Omni's and Qwen3-Omni's parts take."""
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text = small | {"vocab_size": len(tokenizer), "rope_parameters": rope}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "patch_size": patch}
    audio = {"num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2}
    audio |= {"encoder_ffn_dim": 32, "d_model": 32, "output_dim": 32}
    if three:
        text |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
        text |= {"head_dim": 16}
        vision |= {"deepstack_visual_indexes": [0]}
        audio |= {"downsample_hidden_size": 8}
    else:
        vision |= {"fullatt_block_indexes": [1]}
    suffix = "id" if three else "index"
    return {
        "text_config": text,
        "vision_config": vision,
        "audio_config": audio,
        "audio_start_token_id": ids["audio_bos"],
        "audio_end_token_id": ids["audio_eos"],
        "vision_start_token_id": ids["vision_bos"],
        "vision_end_token_id": ids["vision_eos"],
        **{f"{name}_token_{suffix}": ids[name] for name in ("image", "audio", "video")},
    }


@pytest.fixture(scope="module", params=["Qwen2_5Omni", "Qwen3OmniMoe"])
def omni(request, tmp_path_factory):
    """A folder as the released ones are, at random, with a tokenizer of bytes."""
    pytest.importorskip("torchvision")
    tr = pytest.importorskip("transformers", minversion="5.23")
    folder, family = tmp_path_factory.mktemp("omni"), request.param
    three = family == "Qwen3OmniMoe"
    patch, tokenizer = 16 if three else 14, byte_tokenizer(tr)
    parts = tr.Qwen2VLImageProcessor(patch_size=patch), tr.Qwen2VLVideoProcessor(patch_size=patch)
    hear = tr.WhisperFeatureExtractor(feature_size=16)
    getattr(tr, f"{family}Processor")(*parts, hear, tokenizer, TEMPLATE).save_pretrained(folder)
    thinker = thinker_config(tokenizer, three, patch)
    config = getattr(tr, f"{family}Config")(thinker_config=thinker, enable_audio_output=False)
    model = getattr(tr, f"{family}ForConditionalGeneration")(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Two videos of 60 frames whose brightness rises, one from the dark, one from the middle; and
    the first with the other's sound."""
    folder, paths = tmp_path_factory.mktemp("grey"), []
    for hz in (300, 900):
        tone = 0.5 * np.sin(2 * np.pi * hz * np.arange(3 * 16000) / 16000)
        music.save_wav(folder / f"{hz}.wav", tone)
    for name, low, hz in (("a", -1.0, 300), ("b", 0.0, 900), ("c", -1.0, 900)):
        video = torch.linspace(low, low + 1, 60)[None, :, None, None].expand(3, 60, 64, 64)
        paths.append(str(folder / f"{name}.mp4"))
        mi.save_video(paths[-1], video, 30, folder / f"{hz}.wav")
    return paths


@pytest.fixture
def overheard(omni):
    """(judge, asked): asked(video, question) -> what reached the parts of the model."""
    model, processor = judge = jd.load_judge(omni, "cpu")
    got = {}

    def keep(name, key):
        def hook(_, args, kwargs):
            got.setdefault(name, args[0] if args else kwargs[key])

        return hook

    def keep_logits(_, args, output):
        got.setdefault("logits", output.logits[0, -1].clone())

    parts = {"pixels": (model.model.visual, "hidden_states"), "ids": (model, "input_ids")}
    parts["sound"] = model.model.audio_tower, "input_features"
    for name, (part, key) in parts.items():
        part.register_forward_pre_hook(keep(name, key), with_kwargs=True)
    model.register_forward_hook(keep_logits)

    def asked(video, question):
        got.clear()
        jd.ask(judge, video, question)
        return dict(got)

    return processor, asked


def test_picture_sound_and_question_reach_the_judge(overheard, grey):
    processor, asked = overheard
    question = jd.DANCE["beat"]
    first = asked(grey[0], question)
    text = processor.tokenizer.decode(first["ids"][0])
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n")
    check_pixels(processor, first["pixels"], film(grey[0], 2))
    check_sound(processor, first["sound"], grey[0])
    assert text.count("<|AUDIO|>") >= 2 * 13 - 1  # 13 or 25 a second
    between = text[text.index("<|audio_bos|>") : text.index("<|audio_eos|>")]
    assert "<|AUDIO|>" in between and "<|VIDEO|>" in between  # side by side in time


def check_pixels(processor, pixels, frames):
    assert len(frames) == 4  # 2 s at 2 a second
    mean = torch.tensor(processor.video_processor.image_mean)
    std = torch.tensor(processor.video_processor.image_std)
    pixels = pixels.view(2, -1, 3, 2, pixels.shape[-1] // 6)  # two times two frames
    levels = (pixels.mean((1, 4)) * std[:, None] + mean[:, None]).permute(0, 2, 1).flatten(0, 1)
    wanted = torch.from_numpy(frames.astype(np.float32) / 255).mean((1, 2))
    torch.testing.assert_close(levels, wanted, atol=0.01, rtol=0)


def check_sound(processor, sound, video):
    hear = processor.feature_extractor
    waveform = mi.load_audio(video).numpy()
    options = {"sampling_rate": 16000, "return_tensors": "pt", "padding": True, "truncation": False}
    wanted = hear(waveform, **options).input_features[0, :, :-2]  # the last window differs
    torch.testing.assert_close(sound.reshape(16, -1)[:, : wanted.shape[1]], wanted)


def test_judge_heeds_picture_sound_and_question(overheard, grey):
    _, asked = overheard
    question = jd.DANCE["beat"]
    first = asked(grey[0], question)["logits"]
    changed = (grey[1], question), (grey[2], question), (grey[0], jd.DANCE["style"])
    for video, words in changed:
        assert (asked(video, words)["logits"] - first).abs().max() > 1e-3
    assert torch.equal(asked(grey[0], question)["logits"], first)


def test_a_judge_that_lacks_tensors_is_refused(omni, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in os.listdir(omni):
        if name.endswith((".json", ".jinja")):
            os.link(os.path.join(omni, name), tmp_path / name)
    tensors = load_file(os.path.join(omni, "model.safetensors"))
    del tensors[next(name for name in sorted(tensors) if "audio_tower" in name)]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(mi.InputError):
        jd.load_judge(str(tmp_path), "cpu")


def test_another_kind_of_model_is_no_judge(tmp_path):
    mi.save_json(tmp_path / "config.json", {"model_type": "t5"})
    with pytest.raises(mi.InputError, match="is a t5; a judge is one of qwen2_5_omni"):
        jd.load_judge(str(tmp_path), "cpu")
    with pytest.raises(mi.InputError, match="no such folder"):
        jd.load_judge(str(tmp_path / "none"), "cpu")
