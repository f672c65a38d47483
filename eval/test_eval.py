"""What measures, measured: scores on toy clips whose beats are known, what is sent to the judge."""

import hashlib
import json
import math
import os
import subprocess
import sys
import wave

import numpy as np
import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # pytest adds only eval/

import musicinfuser as mi
import sample
import train
from eval import evaluate as ev
from test_musicinfuser import HERE, PROMPT, weights  # noqa: F401
from tiny import make

GROUND = {"r": 0.6, "bas_aist": 0.75, "bas_bailando": 0.6}


def clip(path, song, tempo, seed=0, start=0.0, speed=1.0, late=0.0, frames=73, recipe=True, **fixed):
    """A person who dances on the beats of a song, `late` by so many beats, as sample.py would write the file."""
    look = {"subject": "person", "count": 1, "place": "studio", "camera": "01", "genre": "HO"} | fixed
    beat = (start + speed * torch.arange(frames) / 30) * tempo / 60 - late
    video = torch.from_numpy(make.render(make.draw_scene(np.random.default_rng(seed), **look), beat))
    mi.save_video(path, video.permute(3, 0, 1, 2) / 127.5 - 1, 30, song, start, speed)
    if recipe:
        made = {"song": str(song), "prompt": PROMPT, "seed": seed, "start": start, "speed": speed}
        mi.save_json(os.path.splitext(path)[0] + ".json", made)
    return str(path)


def evaluate(*arguments):
    line = [sys.executable, "-m", "eval.evaluate", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=HERE)


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process: run(*arguments) -> (error line or "", standard output)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        error = ""
        try:
            mi.main(ev.main)
        except SystemExit as stop:
            error = stop.code
        return error, capsys.readouterr().out

    return run


TEMPOS = {"BR": 127.0, "LO": 107.0, "HO": 118.0, "JS": 100.0}


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("songs")
    for i, (genre, tempo) in enumerate(TEMPOS.items()):
        make.save_wav(folder / f"{genre}.wav", make.compose(genre, tempo, 900_100 + i, 16.0))
    return folder


@pytest.fixture(scope="module")
def scored(songs, tmp_path_factory):
    """Ground truth to four songs, one from 3 s on and one played faster; one more, half a beat late: the report."""
    pytest.importorskip("librosa")
    out = tmp_path_factory.mktemp("videos")
    at = {"BR": {}, "LO": {"start": 3.0}, "HO": {"speed": 1.2}, "JS": {"start": 1.0, "speed": 0.9}}
    for i, (genre, options) in enumerate(at.items()):
        clip(out / f"{genre}.mp4", songs / f"{genre}.wav", TEMPOS[genre], i, **options)
    clip(out / "late.mp4", songs / "BR.wav", TEMPOS["BR"], 0, late=0.5)
    paths = [out / f"{name}.mp4" for name in (*at, "late")]
    result = evaluate(*paths, "--json", out / "scores.json")
    assert result.returncode == 0, result.stderr
    return json.loads((out / "scores.json").read_text())["beats"], result.stdout, paths


def test_ground_truth_scores_high_and_another_song_at_chance(scored):
    report, stdout, paths = scored
    rows = [report["videos"][str(path)] for path in paths[:4]]
    for key, low in GROUND.items():
        assert min(row["own"][key] for row in rows) > low, key
    chance = [np.mean([row["shuffled"][key] for row in rows]) for key in GROUND]
    assert abs(chance[0]) < 0.3 and all(0.1 < bas < 0.5 for bas in chance[1:])
    assert all(row["own"]["tempo_close"] == 1 and abs(row["own"]["tempo"] - 1) < 0.04 for row in rows)
    for words in ("BAS, AIST++", "BAS, Bailando", "other videos' songs", "sigma 0.05 s"):
        assert words in stdout


def test_half_a_beat_late_is_caught(scored):
    late, truth = (scored[0]["videos"][str(path)]["own"] for path in (scored[2][4], scored[2][0]))
    assert late["r"] < -0.6 and late["bas_aist"] < 0.2 and late["bas_bailando"] < 0.2
    assert late["tempo"] == pytest.approx(truth["tempo"], abs=0.03)


def test_means_have_the_standard_error_over_videos(scored):
    report = scored[0]
    for kind in ("own", "shuffled"):
        values = [row[kind]["r"] for row in report["videos"].values()]
        mean = sum(values) / 5
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / 4 / 5)
        assert report["mean"][kind]["r"] == pytest.approx([mean, error])


def test_scores_against_another_song_and_own_sound(songs, tmp_path, run):
    pytest.importorskip("librosa")
    path = clip(tmp_path / "long.mp4", songs / "BR.wav", TEMPOS["BR"], frames=240, recipe=False)
    for options, good in (((), True), (("--song", songs / "BR.wav"), True), (("--song", songs / "LO.wav"), False)):
        error, stdout = run(path, "--json", tmp_path / "out.json", *options)
        assert not error and "no other video's song" in stdout
        report = json.loads((tmp_path / "out.json").read_text())["beats"]
        assert report["mean"]["shuffled"] is None and report["mean"]["own"]["r"][1] is None
        r = report["mean"]["own"]["r"][0]
        assert r > 0.6 if good else abs(r) < 0.3, options


def test_tracked_beats_are_the_songs_beats(songs):
    pytest.importorskip("librosa")
    for genre, tempo in TEMPOS.items():
        late = (ev.track_beats(str(songs / f"{genre}.wav")) * tempo / 60 + 0.5) % 1 - 0.5
        assert abs(np.median(late)) * 60 / tempo < 0.015  # seconds


def test_alignment_is_the_formula_in_both_directions():
    rng = np.random.default_rng(0)
    of, to = rng.uniform(0, 3, 7), rng.uniform(0, 3, 4)
    slow = [max(math.exp(-((a - b) ** 2) / (2 * 0.05**2)) for b in to) for a in of]
    assert ev.alignment(of, to) == pytest.approx(sum(slow) / 7)
    assert ev.alignment(of, []) == ev.alignment([], to) == 0
    # one movement on one of four beats: all that moves is on the beat, but three beats pass unused
    moving = np.zeros(60, np.float32), np.array([0.5]), 120.0
    with np.errstate(all="ignore"):
        scores = ev.beat_scores(moving, np.array([0.5, 1.0, 1.5, 2.0]))
    assert scores["bas_aist"] == 1 and scores["bas_bailando"] == pytest.approx(0.25)


def test_beat_position_is_linear_and_goes_on_at_both_ends():
    beats = np.array([1.0, 1.5, 2.5])
    assert ev.beat_position(beats, np.array([0.75, 1.0, 1.25, 1.5, 2.0, 3.0])) == pytest.approx(
        [-0.5, 0, 0.5, 1, 1.5, 2.5]
    )


@pytest.mark.parametrize("ratio, close", [(1.0, 1), (2.03, 1), (0.49, 1), (1.06, 0), (1.5, 0), (0.0, 0)])
def test_octaves_of_the_tempo_are_folded_for_the_share_only(ratio, close):
    energy = np.random.default_rng(0).uniform(size=60).astype(np.float32)
    scores = ev.beat_scores((energy, np.array([0.5]), 120 * ratio), np.arange(8) * 0.5)
    assert scores["tempo"] == pytest.approx(ratio) and scores["tempo_close"] == close


def test_motion_rests_on_the_beats(songs):
    scene = make.draw_scene(np.random.default_rng(1), subject="person", camera="01", genre="HO")
    film = make.render(scene, torch.arange(90) / 30 * 2 + 0.3)  # 120 BPM: beats at 0.35, 0.85, ...
    rests = ev.motion_beats(ev.motion_energy(film))
    assert len(rests) >= 5 and np.abs((rests - 0.35 + 0.25) % 0.5 - 0.25).max() < 0.05
    assert len(ev.motion_beats(np.zeros(72, np.float32))) == 0


ANSWERS = {
    "8": 8, "7.5": 7.5, " 10\n": 10, "0": 0, "8/10": 8, "10 / 10": 10, "8.5/10.": 8.5, "Rating: 9": 9, "**6**": 6,
    "I would say 7.": 7, "8 out of 10": 8, "": None, "ten": None, "11": None, "-3": None, "7-8": None, "7 or 8": None,
    "80/100": None, "8/5": None, "8,5": None, "8%": None, "3D": None, "8/10/10": None, "1.2.3": None, "٨": None,
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_ratings_are_parsed_strictly(answer):
    assert ev.rating(answer) == ANSWERS[answer]


def test_the_questions_are_the_papers():
    questions = [*ev.DANCE.values(), *ev.VIDEO.values(), *ev.PROMPT.values()]
    digest = hashlib.sha256("\n".join(questions).encode()).hexdigest()  # of the paper's Table 10, quotes made straight
    assert digest == "070de189310de151260b84d6e2d18b019406535cd71fd10ade089d6c93e55358"


def test_averages_are_of_five_three_and_eight():
    names = [*ev.DANCE, *ev.VIDEO]
    first = {name: str(i) for i, name in enumerate(names)} | dict.fromkeys(ev.PROMPT, "9")
    second = {name: "10" for name in names} | {"beat": "ten", "imaging": "very good: 8 or 9"}
    means, lost = ev.averages([first, second])
    assert means["beat"] == 1 and means["imaging"] == 5 and means["style"] == 5 and lost == {"beat": 1, "imaging": 1}
    dance, video = [5, 1, 6, 6.5, 7], [5, 8, 8.5]
    assert means["dance avg"] == pytest.approx(sum(dance) / 5) and means["video avg"] == pytest.approx(sum(video) / 3)
    assert means["overall"] == pytest.approx(sum(dance + video) / 8) and means["prompt avg"] == 9
    means, lost = ev.averages([dict.fromkeys(names, "?")])
    assert means["overall"] is None and means["prompt avg"] is None and sum(lost.values()) == 8
    paper = [ev.PAPER[name] for name in names]  # the published averages are such means
    assert ev.PAPER["dance avg"] == pytest.approx(np.mean(paper[:5]), abs=0.006)
    assert ev.PAPER["video avg"] == pytest.approx(np.mean(paper[5:]), abs=0.006)
    assert ev.PAPER["overall"] == pytest.approx(np.mean(paper), abs=0.006)


MARKS = {
    "image": "<|IMAGE|>", "audio": "<|AUDIO|>", "video": "<|VIDEO|>", "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>", "audio_bos": "<|audio_bos|>", "audio_eos": "<|audio_eos|>",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'video' %}"
    "<|vision_bos|><|VIDEO|><|vision_eos|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=["Qwen2_5Omni", "Qwen3OmniMoe"])
def omni(request, tmp_path_factory):
    """A folder as the released ones are, of the smallest sizes, at random, with a tokenizer of bytes."""
    pytest.importorskip("torchvision")
    import transformers as tr
    from tokenizers.pre_tokenizers import ByteLevel

    folder, three = tmp_path_factory.mktemp("omni"), request.param == "Qwen3OmniMoe"
    tokenizer = tr.Qwen2TokenizerFast(
        vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[], eos_token="<|im_end|>",
        pad_token="<|endoftext|>", extra_special_tokens={f"{k}_token": mark for k, mark in MARKS.items()},
    )  # fmt: skip
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    ids = {k: tokenizer.convert_tokens_to_ids(mark) for k, mark in MARKS.items()}
    patch = 16 if three else 14
    parts = tr.Qwen2VLImageProcessor(patch_size=patch), tr.Qwen2VLVideoProcessor(patch_size=patch)
    hear = tr.WhisperFeatureExtractor(feature_size=16)
    getattr(tr, f"{request.param}Processor")(*parts, hear, tokenizer, TEMPLATE).save_pretrained(folder)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": patch,
    }
    audio = {
        "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32,
        "output_dim": 32,
    }  # fmt: skip
    if three:
        text |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
        vision |= {"deepstack_visual_indexes": [0]}
        audio |= {"downsample_hidden_size": 8}
    else:
        vision |= {"fullatt_block_indexes": [1]}
    name = "id" if three else "index"
    thinker = {
        "text_config": text, "vision_config": vision, "audio_config": audio, "audio_start_token_id": ids["audio_bos"],
        "audio_end_token_id": ids["audio_eos"], "vision_start_token_id": ids["vision_bos"],
        "vision_end_token_id": ids["vision_eos"], **{f"{k}_token_{name}": ids[k] for k in ("image", "audio", "video")},
    }  # fmt: skip
    config = getattr(tr, f"{request.param}Config")(thinker_config=thinker, enable_audio_output=False)
    model = getattr(tr, f"{request.param}ForConditionalGeneration")(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def grey(songs, tmp_path_factory):
    """Two videos of 60 frames whose brightness rises, one from the dark, one from the middle; and the first with the
    other's sound."""
    out, paths = tmp_path_factory.mktemp("grey"), []
    for name, low, song in (("a", -1.0, "BR"), ("b", 0.0, "LO"), ("c", -1.0, "LO")):
        video = torch.linspace(low, low + 1, 60)[None, :, None, None].expand(3, 60, 64, 64)
        paths.append(str(out / f"{name}.mp4"))
        mi.save_video(paths[-1], video, 30, songs / f"{song}.wav")
    return paths


def test_picture_sound_and_question_reach_the_judge(omni, grey):
    model, processor = judge = ev.load_judge(omni, "cpu")
    assert type(model).__name__.endswith("ThinkerForConditionalGeneration")
    got = {}

    def keep(name, key):
        def hook(_, args, kwargs):
            got.setdefault(name, args[0] if args else kwargs[key])

        return hook

    def keep_logits(_, args, output):
        got.setdefault("logits", output.logits[0, -1].clone())

    model.model.visual.register_forward_pre_hook(keep("pixels", "hidden_states"), with_kwargs=True)
    model.model.audio_tower.register_forward_pre_hook(keep("sound", "input_features"), with_kwargs=True)
    model.register_forward_pre_hook(keep("ids", "input_ids"), with_kwargs=True)
    model.register_forward_hook(keep_logits)

    def asked(video, question):
        got.clear()
        ev.ask(judge, video, question)
        return dict(got)

    question = ev.DANCE["beat"]
    first = asked(grey[0], question)
    text = processor.tokenizer.decode(first["ids"][0])
    assert text.startswith("<|im_start|>user\n") and text.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n")

    frames = ev.film(grey[0], 2).astype(np.float32) / 255  # 2 s at 2 a second
    assert len(frames) == 4 and text.count("<|VIDEO|>") % 2 == 0
    mean, std = (torch.tensor(getattr(processor.video_processor, f"image_{k}")) for k in ("mean", "std"))
    pixels = first["pixels"].view(2, -1, 3, 2, first["pixels"].shape[-1] // 6)  # two times two frames
    levels = (pixels.mean((1, 4)) * std[:, None] + mean[:, None]).permute(0, 2, 1).flatten(0, 1)
    torch.testing.assert_close(levels, torch.from_numpy(frames.mean((1, 2))), atol=0.01, rtol=0)

    sound = mi.load_audio(grey[0]).numpy()
    features = processor.feature_extractor(
        sound, sampling_rate=16000, return_tensors="pt", padding=True, truncation=False
    )
    wanted = features.input_features[0, :, :-2]  # the last window depends on what follows
    torch.testing.assert_close(first["sound"].reshape(16, -1)[:, : wanted.shape[1]], wanted)
    assert text.count("<|AUDIO|>") >= 2 * 13 - 1  # 13 or 25 a second
    between = text[text.index("<|audio_bos|>") : text.index("<|audio_eos|>")]
    assert "<|AUDIO|>" in between and "<|VIDEO|>" in between  # side by side in time

    for video, words in ((grey[1], question), (grey[2], question), (grey[0], ev.DANCE["style"])):
        assert (asked(video, words)["logits"] - first["logits"]).abs().max() > 1e-3  # each of the three is heeded
    assert torch.equal(asked(grey[0], question)["logits"], first["logits"])


def test_judging_is_resumed_counted_and_laid_out_as_table_1(songs, tmp_path, monkeypatch, run):
    pytest.importorskip("librosa")
    videos = [clip(tmp_path / f"{g}.mp4", songs / f"{g}.wav", TEMPOS[g]) for g in ("BR", "LO")]
    asked = []

    def ask(judge, video, question, tokens=16):
        asked.append((video, question))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return "no idea" if "imaging" in question and video == videos[0] else "8/10"

    monkeypatch.setattr(ev, "load_judge", lambda *_: "a judge")
    monkeypatch.setattr(ev, "ask", ask)
    assert run(*videos, "--judge", "some")[0] == "stopped"
    assert len(json.loads((tmp_path / "scores.json").read_text())["judge"]["videos"][videos[0]]["answers"]) == 4
    error, stdout = run(*videos, "--judge", "some")
    assert not error and len(asked) == 23 and len(set(asked)) == 22  # the one that was stopped is asked again
    assert any(f"'{PROMPT}'" in question for _, question in asked)
    assert "| 2 videos | 8.00 |" in stdout and "| the paper's own, as published | 8.95 | 9.54 |" in stdout
    assert "1 of 22 answers had no number from 0 to 10 {'imaging': 1}" in stdout
    error, stdout = run(*videos, "--judge", "some")
    assert not error and len(asked) == 23
    clip(videos[1], songs / "LO.wav", TEMPOS["LO"], seed=7)  # another video of that name
    assert not run(*videos, "--judge", "some")[0] and len(asked) == 34
    assert "name another --json" in run(*videos, "--judge", "another")[0]


def test_captions_are_written_once_and_read_by_training(omni, grey, tmp_path, run):
    for name in "ab":
        os.link(grey[0], tmp_path / f"{name}.mp4")
    (tmp_path / "a.txt").write_text("mine\n")
    error, _ = run("--caption", tmp_path, "--judge", omni, "--device", "cpu")
    assert not error and (tmp_path / "a.txt").read_text() == "mine\n"
    written = (tmp_path / "b.txt").read_text()
    assert written.strip() and train.find_videos(tmp_path, tmp_path)[1]["prompts"] == [written.strip()]
    assert "every video" in run("--caption", tmp_path, "--judge", omni)[1]


def test_a_judge_that_lacks_tensors_is_refused(omni, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in os.listdir(omni):
        if name.endswith(".json") or name.endswith(".jinja"):
            os.link(os.path.join(omni, name), tmp_path / name)
    tensors = load_file(os.path.join(omni, "model.safetensors"))
    del tensors[next(name for name in sorted(tensors) if "audio_tower" in name)]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(mi.InputError, match="lacks 1 tensors"):
        ev.load_judge(str(tmp_path), "cpu")


def test_protocol_makes_what_is_missing_and_scores_it(weights, songs, tmp_path, monkeypatch, run):  # noqa: F811
    pytest.importorskip("librosa")
    monkeypatch.setattr(ev, "PROMPTS", ev.PROMPTS[:1])
    for i, name in enumerate(train.TEST_SONGS):
        os.link(songs / f"{list(TEMPOS)[i % 4]}.wav", tmp_path / f"{name}.wav")
    (tmp_path / "more.wav").write_bytes(b"")
    options = ["--protocol", "--songs", tmp_path, "--out", tmp_path / "out", "--weights", weights, "--device", "cpu"]
    error, stdout = run(*options, "--json", tmp_path / "s.json")
    assert not error and "BAS, AIST++" in stdout
    made = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.mp4")}
    assert sorted(path.name for path in made) == sorted(f"{name}-0.mp4" for name in train.TEST_SONGS)
    assert len(json.loads((tmp_path / "s.json").read_text())["beats"]["videos"]) == 10
    seeds = {json.loads(path.with_suffix(".json").read_text())["seed"] for path in made}
    assert seeds == set(range(10))
    gone = tmp_path / "out" / "mKR2-0.mp4"
    gone.with_suffix(".json").unlink()  # as if it had been stopped there
    calls, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a, **k: [calls.append(a), generate(*a, **k)])
    assert not run(*options)[0] and len(calls) == 1 and gone.with_suffix(".json").exists()
    assert "made with other settings" in run(*options, "--adapter", "none")[0]


def test_protocol_songs_are_the_held_out_ones_or_any_ten(tmp_path):
    for name in train.TEST_SONGS[1:]:
        (tmp_path / f"{name}.mp3").write_bytes(b"")
    with pytest.raises(mi.InputError, match="lacks the held-out mLH4,"):
        ev.protocol_songs(str(tmp_path))
    (tmp_path / "mLH4.wav").write_bytes(b"")
    assert ev.protocol_songs(str(tmp_path))[0] == str(tmp_path / "mLH4.wav")
    ten = tmp_path / "ten"
    ten.mkdir()
    for i in range(10):
        (ten / f"{i}.wav").write_bytes(b"")
    assert len(ev.protocol_songs(str(ten))) == 10
    (ten / "11.wav").write_bytes(b"")
    with pytest.raises(mi.InputError, match="ten others"):
        ev.protocol_songs(str(ten))


def test_style_tells_the_genres_choreographies_apart():
    films, beats, genres = [], [], []
    for i, genre in enumerate(list(make.GENRES) * 2):
        scene = make.draw_scene(
            np.random.default_rng((5, i)), subject="person", count=1, place="studio", camera="01", genre=genre
        )
        beat = 0.4 + torch.arange(73) / 30 * (80 + 3 * i) / 60
        films.append(make.render(scene, beat)), beats.append(beat.numpy()), genres.append(genre)
    share, nearest = ev.style(films, beats, genres)
    assert share >= 0.9 and len(nearest) == 20
    assert ev.style(films, beats, genres[1:] + genres[:1])[0] <= 0.1  # of another song
    assert ev.style([film[:, :, ::-1] for film in films], beats, genres)[0] >= 0.9  # mirrored


BAD = {
    "nothing to do": [], "no such file: none.mp4": ["none.mp4"], "--caption needs --judge": ["--caption", "."],
    "--protocol needs --songs": ["--protocol"], "README.md cannot be read as audio": ["README.md"],
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(words, run, monkeypatch):
    monkeypatch.chdir(HERE)
    error, _ = run(*BAD[words])
    assert error.startswith("error: ") and words in error and "\n" not in error


def test_bad_input_on_the_real_command_line(tmp_path):
    clip(tmp_path / "a.mp4", os.path.join(HERE, "tiny", "song.wav"), 112, frames=7)
    mi.save_json(tmp_path / "a.json", {"song": "gone.wav"})
    result = evaluate(tmp_path / "a.mp4")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "gone.wav, which is not there" in result.stderr
    assert "no such folder" in evaluate("--caption", tmp_path, "--judge", tmp_path / "none", "--device", "cpu").stderr


def test_uneven_beats_have_a_tempo_and_a_video_without_any_is_named(tmp_path, capsys):
    assert ev.music_tempo(np.array([0, 0.4, 1.2])) == pytest.approx(100)
    path = str(tmp_path / "still.mp4")
    mi.save_video(path, torch.zeros(3, 30, 32, 32), song=os.path.join(HERE, "tiny", "song.wav"))
    silent = str(tmp_path / "silent.wav")
    with wave.open(silent, "wb") as wav:
        wav.setnchannels(1), wav.setsampwidth(2), wav.setframerate(16000)
        wav.writeframes(bytes(64000))
    with pytest.raises(mi.InputError, match="no video with a beat"):
        ev.beat_report([path], silent)
    assert f"skipped  {path}: no beat is heard in {silent}" in capsys.readouterr().out
