"""eval.evaluate: what it reads beside a video, its reports, protocol and counterfactuals."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROMPT, PYTHONPATH, ROOT

import musicinfuser as mi
import sample
from dataset.aist import TEST_SONGS
from eval import beats as bt
from eval import beside, copies, protocol
from eval import counterfactual as cf
from eval import evaluate as ev
from eval import judge as jd
from tiny import music, world

SONG = os.path.join(ROOT, "tiny", "song.wav")  # 112 BPM, the first beat at 0 s
FRAMES = 73


def beat_at(t, tempo=112):
    return torch.as_tensor(t) * tempo / 60


def dance(path, song=SONG, start=0.0, speed=1.0, late=0.0, frames=None, seed=0, **recipe):
    """A person who dances on the beats of the shipped song, `late` by so many, as sample.py
    would write it."""
    look = {"subject": "person", "count": 1, "place": "studio", "camera": "01", "genre": "HO"}
    scene = world.draw_scene(np.random.default_rng(seed), **look)
    t = torch.arange(frames or FRAMES) / 30
    film = world.render(scene, beat_at(start + speed * t) - late)
    video = torch.from_numpy(film).permute(3, 0, 1, 2) / 127.5 - 1
    mi.save_video(path, video, 30, song, start, speed)
    made = {"song": str(song), "prompt": PROMPT, "seed": seed, "start": start, "speed": speed}
    mi.save_json(os.path.splitext(path)[0] + ".json", made | {"adapter": "tiny"} | recipe)
    return str(path)


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


@pytest.fixture(scope="module")
def slower(tmp_path_factory):
    """Another song: the shipped one at 0.85 of its speed."""
    path = tmp_path_factory.mktemp("songs") / "slower.wav"
    music.save_wav(path, mi.load_audio(SONG, rate=22050).numpy(), round(0.85 * 22050))
    return str(path)


# ----------------------------------------------------------------------------------------------
# Beats
# ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dances(slower, tmp_path_factory):
    """Four videos on the beat, and one half a beat late."""
    pytest.importorskip("librosa")
    folder = tmp_path_factory.mktemp("videos")
    how = {"plain": {}, "later": {"start": 3.0}, "faster": {"speed": 1.2}, "late": {"late": 0.5}}
    videos = [dance(folder / f"{name}.mp4", **options) for name, options in how.items()]
    look = {"subject": "person", "count": 1, "place": "studio", "camera": "01", "genre": "LO"}
    scene = world.draw_scene(np.random.default_rng(5), **look)
    film = world.render(scene, beat_at(torch.arange(73) / 30, 112 * 0.85))
    other = str(folder / "other.mp4")
    mi.save_video(other, torch.from_numpy(film).permute(3, 0, 1, 2) / 127.5 - 1, 30, slower)
    mi.save_json(folder / "other.json", {"song": slower, "prompt": PROMPT, "seed": 5})
    return [*videos, other]


@pytest.fixture(scope="module")
def report(dances):
    return ev.beat_report(dances)


def own(report, name):
    rows = {os.path.basename(video): row for video, row in report["videos"].items()}
    return rows[f"{name}.mp4"]["own"]


@pytest.mark.parametrize("name", ["plain", "later", "faster", "other"])
def test_ground_truth_scores_high(report, name):
    scores = own(report, name)
    assert scores["r"] > 0.6 and scores["bas_bailando"] > 0.6 and scores["mbcr"] >= 0.75
    assert scores["tempo_close"] == 1 and abs(scores["tempo"] - 1) < 0.05


def test_another_song_scores_at_chance(report):
    rows = [row["control"] for video, row in report["videos"].items() if "late.mp4" not in video]
    assert abs(np.mean([row["r"] for row in rows])) < 0.35
    assert report["control"] == "other songs"


def test_half_a_beat_late_is_caught(report):
    late, truth = own(report, "late"), own(report, "plain")
    assert late["r"] < -0.6 and late["bas_bailando"] < 0.2 and late["mbcr"] < 0.3
    assert late["tempo"] == pytest.approx(truth["tempo"], abs=0.03)


def test_one_song_is_compared_with_its_other_places(tmp_path, run):
    pytest.importorskip("librosa")
    path = dance(tmp_path / "a.mp4")
    error, printed = run(path, "--json", tmp_path / "out.json")
    assert not error and "the song elsewhere" in printed and "one song only" in printed
    kept = json.loads((tmp_path / "out.json").read_text())["beats"]
    assert kept["mean"]["own song"]["r"][0] > 0.6 and kept["mean"]["own song"]["r"][1] is None
    assert abs(kept["mean"]["the song elsewhere"]["r"][0]) < 0.35


def test_another_song_may_be_named_and_own_sound_is_the_default(slower, tmp_path, run):
    pytest.importorskip("librosa")
    path = dance(tmp_path / "a.mp4", frames=150)
    os.remove(tmp_path / "a.json")
    for options, good in (((), True), (("--song", SONG), True), (("--song", slower), False)):
        error, _ = run(path, "--json", tmp_path / "out.json", *options)
        assert not error
        r = json.loads((tmp_path / "out.json").read_text())["beats"]["mean"]["own song"]["r"][0]
        assert r > 0.6 if good else abs(r) < 0.4, options


def test_videos_made_without_music_stand_in_a_column_of_their_own(tmp_path):
    pytest.importorskip("librosa")
    videos = [dance(tmp_path / "a.mp4"), dance(tmp_path / "b.mp4", late=0.5, adapter="none")]
    means = ev.beat_report(videos)["mean"]
    assert list(means) == ["own song", "the song elsewhere", "made without music"]
    assert means["own song"]["r"][0] > 0.6 and means["made without music"]["r"][0] < -0.6


def test_short_and_beatless_videos_are_named_and_left_out(tmp_path, run):
    pytest.importorskip("librosa")
    short = dance(tmp_path / "short.mp4", frames=7)
    silence = tmp_path / "silence.wav"
    music.save_wav(silence, np.zeros(9 * 16000))
    silent = dance(tmp_path / "silent.mp4", song=silence)
    good = dance(tmp_path / "good.mp4")
    error, printed = run(short, silent, good)
    assert not error and "1 videos, 1 songs" in printed
    assert "skipped" in printed and "too short to score: 7 frames" in printed
    assert "no beat is heard" in printed
    assert "no video with a beat to score" in run(short, silent)[0]


def test_without_librosa_it_says_so_at_once(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    error, _ = run(dance(tmp_path / "a.mp4"))
    assert "without it no beat is heard: pip install -r eval/requirements.txt" in error


# ----------------------------------------------------------------------------------------------
# What is beside a video
# ----------------------------------------------------------------------------------------------

RECIPES = {
    "is not JSON": "{",
    "holds no object": "[1]",
    "song is no text": '{"song": null}',
    "prompt is no text": '{"prompt": ["a"]}',
    "start is nan": '{"start": NaN}',
    "start is -1": '{"start": -1}',
    "start is 'soon'": '{"start": "soon"}',
    "start is True": '{"start": true}',
    "speed is 0": '{"speed": 0}',
    "speed is inf": '{"speed": Infinity}',
    "speed is None": '{"speed": null}',
    "gone.wav, which is not there": '{"song": "gone.wav"}',
    "http://127.0.0.1/a.wav, which is not there": '{"song": "http://127.0.0.1/a.wav"}',
}


@pytest.mark.parametrize("words", RECIPES)
def test_a_recipe_that_is_none_is_one_line(words, tmp_path):
    (tmp_path / "a.json").write_text(RECIPES[words])
    with pytest.raises(mi.InputError) as error:
        beside.music_of(str(tmp_path / "a.mp4"))
    assert words in str(error.value) and "\n" not in str(error.value)


BAD = {
    "nothing to do": [],
    "no such file: none.mp4": ["none.mp4"],
    "no such file: none.wav": ["README.md", "--song", "none.wav"],
    "no such folder: none": ["README.md", "--judge", "none"],
    "--caption needs --judge": ["--caption", "."],
    "--protocol needs --songs": ["--protocol"],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments_are_one_line(words, run, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bt, "import_librosa", lambda: None)
    error, _ = run(*BAD[words])
    assert error.startswith("error: ") and words in error and "\n" not in error


def test_bad_input_on_the_real_command_line(tmp_path):
    (tmp_path / "http:127.0.0.1:1.mp4").write_text("no video")
    line = [sys.executable, "-m", "eval.evaluate", "http:127.0.0.1:1.mp4"]
    options = {"capture_output": True, "text": True, "cwd": tmp_path}
    result = subprocess.run(line, env=os.environ | {"PYTHONPATH": PYTHONPATH}, **options)
    assert result.returncode == 1 and result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr and "refused" not in result.stderr


# ----------------------------------------------------------------------------------------------
# The judge's report
# ----------------------------------------------------------------------------------------------


def test_answers_are_kept_counted_and_laid_out_as_table_1(tmp_path, monkeypatch, capsys):
    videos = [dance(tmp_path / f"{name}.mp4", frames=7) for name in "ab"]
    monkeypatch.setattr(jd, "load_judge", lambda *_: "a judge")

    def unsure(_, video, text):
        return "no idea" if "imaging" in text and "a.mp4" in video else "8/10"

    monkeypatch.setattr(jd, "ask", unsure)
    out = str(tmp_path / "scores.json")
    ev.judge_report(videos, "some", out)
    printed = capsys.readouterr().out
    assert "| 2 videos | 8.00 |" in printed
    assert "| the paper's own, as published | 8.95 | 9.54 |" in printed
    assert "1 of 22 answers had no number from 0 to 10 {'imaging': 1}" in printed
    monkeypatch.setattr(jd, "ask", None)  # nothing is asked again
    ev.judge_report(videos, "some", out)
    with pytest.raises(mi.InputError, match="another judge's answers; name another --json"):
        ev.judge_report(videos, "another", out)


# ----------------------------------------------------------------------------------------------
# The protocol
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def generate(monkeypatch):
    """sample.generate in a moment: a dance on the beat of the song, whatever the prompt; and the
    list of its calls."""
    import sample

    calls = []

    def generate(song, prompt, *, seeds, out, **options):
        calls.append(out)
        made = {name: value for name, value in options.items() if name not in ("device", "dtype")}
        dance(out, song=song, seed=seeds[0], prompt=prompt, **made)

    monkeypatch.setattr(sample, "generate", generate)
    return calls


def test_protocol_makes_what_is_missing(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "PROMPTS", protocol.PROMPTS[:2])
    for name in TEST_SONGS:
        os.link(SONG, tmp_path / f"{name}.wav")
    (tmp_path / "more.wav").write_bytes(b"")
    monkeypatch.setattr(sys.modules[__name__], "FRAMES", 7)
    options = (str(tmp_path), str(tmp_path / "out"), "tiny")
    videos = protocol.protocol(*options)
    assert len(videos) == len(generate) == 20
    assert os.path.basename(videos[3]) == "mKR2-1.mp4"
    assert [beside.recipe_of(video)["seed"] for video in videos] == list(range(20))
    os.remove(tmp_path / "out" / "mKR2-1.json")  # as if it had been stopped there
    assert protocol.protocol(*options) == videos and len(generate) == 21
    with pytest.raises(mi.InputError, match="made with another adapter; name another --out"):
        protocol.protocol(*options, adapter="none")


def test_protocol_songs_are_the_held_out_ones_or_any_ten(tmp_path):
    for name in TEST_SONGS[1:]:
        (tmp_path / f"{name}.mp3").write_bytes(b"")
    with pytest.raises(mi.InputError, match="lacks the held-out mLH4,"):
        protocol.protocol_songs(str(tmp_path))
    (tmp_path / "mLH4.wav").write_bytes(b"")
    assert protocol.protocol_songs(str(tmp_path))[0] == str(tmp_path / "mLH4.wav")
    ten = tmp_path / "ten"
    ten.mkdir()
    for i in range(10):
        (ten / f"{i}.wav").write_bytes(b"")
    assert len(protocol.protocol_songs(str(ten))) == 10
    (ten / "11.wav").write_bytes(b"")
    with pytest.raises(mi.InputError, match="ten others"):
        protocol.protocol_songs(str(ten))


def test_the_papers_prompts_are_as_it_prints_them():
    first = (
        "a male dancer dancing in an art gallery with some paintings, captured from a front view"
    )
    assert protocol.PROMPTS[0] == first and len(set(protocol.PROMPTS)) == 10


# ----------------------------------------------------------------------------------------------
# Counterfactuals
# ----------------------------------------------------------------------------------------------


def test_counterfactuals_of_a_dancer_who_follows(generate, slower, tmp_path, capsys):
    """He rests on the beats of what is played, so the lag to the song as it was tells."""
    pytest.importorskip("librosa")
    folder = str(tmp_path / "out")
    video = dance(tmp_path / "a.mp4", weights="tiny", steps=3)
    other = dance(tmp_path / "b.mp4", song=slower, adapter="none")
    rows = cf.counterfactual(video, [beside.music_of(other)], folder)
    assert list(rows) == list(cf.CHANGES) and len(generate) == 4
    assert rows["as it was"]["picture"] == 0 and rows["as it was"]["r"] > 0.6
    shifted, faster = rows[cf.CHANGES[2]], rows[cf.CHANGES[3]]
    assert shifted["r"] > 0.6 and shifted["r_before"] < -0.6
    assert abs(shifted["lag"]) > 0.4 and abs(rows["as it was"]["lag"]) < 0.1
    assert faster["tempo"] == pytest.approx(1, abs=0.05) and 0.01 < faster["picture"] < 0.2
    assert "r" not in rows["silence"]
    (silent,) = (path for path in generate if path.endswith("silence.mp4"))
    made = beside.recipe_of(silent)
    assert made["seed"] == 0 and made["prompt"] == PROMPT and made["steps"] == 3
    again = cf.counterfactual_report([video], folder)
    assert len(generate) == 4 and "another song" in cf.counterfactual_table([rows])
    assert "adapter tiny, 1 videos" in capsys.readouterr().out and list(again) == ["videos"]


def test_each_counterfactual_score_has_its_column():
    row = {"r": 0.4, "r_before": -0.3, "lag": 0.1, "tempo": 1.2, "picture": 0.05}
    wanted = ["0.40 ± ?", "-0.30 ± ?", "+0.10 (1.00)", "1.20 ± ?", "0.050 ± ?"]
    assert cf.counterfactual_cells([row]) == wanted


def test_a_song_that_is_elsewhere_may_be_named(generate, slower, tmp_path):
    pytest.importorskip("librosa")
    video = dance(tmp_path / "a.mp4", song=slower)
    gone = beside.recipe_of(video) | {"song": str(tmp_path / "gone.wav")}
    mi.save_json(tmp_path / "a.json", gone)
    report = cf.counterfactual_report([video], str(tmp_path / "out"), slower)
    assert len(report["videos"]) == 1 and len(generate) == 3
    with pytest.raises(mi.InputError, match="name it by --song"):
        cf.counterfactual_report([video], str(tmp_path / "out"))


def test_each_song_is_swapped_with_the_next_videos(monkeypatch, tmp_path):
    pytest.importorskip("librosa")
    swapped = []

    def counterfactual(video, others, folder, song):
        new = cf.changed_music(beside.Music(video), others, folder)
        swapped.append(new["another song"].song)

    monkeypatch.setattr(cf, "music_of", lambda video, song: beside.Music(video))
    monkeypatch.setattr(cf, "recipe_of", lambda video: {})
    monkeypatch.setattr(cf, "counterfactual", counterfactual)
    monkeypatch.setattr(cf, "counterfactual_table", lambda group: "")
    monkeypatch.setattr(bt, "track_beats", lambda song, start: np.arange(9.0))
    cf.counterfactual_report(["a", "b", "c"], str(tmp_path))
    assert swapped == ["b", "c", "a"]


def test_a_video_that_cannot_be_scored_does_not_stop_the_others(generate, tmp_path, capsys):
    pytest.importorskip("librosa")
    videos = [dance(tmp_path / "a.mp4"), dance(tmp_path / "silent.mp4")]
    recipe = beside.recipe_of(videos[1]) | {"song": cf.silent_song(str(tmp_path))}
    mi.save_json(tmp_path / "silent.json", recipe)
    report = cf.counterfactual_report(videos, str(tmp_path / "out"))
    assert list(report["videos"]) == videos[:1]
    assert f"skipped  {videos[1]}: no beat is heard in" in capsys.readouterr().out
    with pytest.raises(mi.InputError, match="no video with a beat to change"):
        cf.counterfactual_report(videos[1:], str(tmp_path / "out"))


def test_videos_of_another_adapter_at_the_same_path_are_not_taken(generate, weights, tmp_path):
    pytest.importorskip("librosa")
    adapter = tmp_path / "adapter.safetensors"
    shutil.copy(weights / "musicinfuser.safetensors", adapter)
    model = SimpleNamespace(weights=str(weights), adapter=str(adapter))
    made = {"weights": model.weights, "adapter": model.adapter, "model": sample.model_of(model)}
    video = dance(tmp_path / "a.mp4", **made)
    wanted = {"weights": model.weights, "adapter": model.adapter}
    protocol.make_video(video, wanted)
    cf.counterfactual(video, [], str(tmp_path / "out"))
    adapter.write_bytes((weights / "decoder.safetensors").read_bytes())
    for use in (
        lambda: protocol.make_video(video, wanted),
        lambda: cf.counterfactual(video, [], str(tmp_path / "out")),
    ):
        with pytest.raises(mi.InputError, match="has changed since .*a.mp4 was made"):
            use()


def test_a_video_without_a_recipe_has_no_counterfactual(tmp_path):
    pytest.importorskip("librosa")
    video = dance(tmp_path / "a.mp4")
    os.remove(tmp_path / "a.json")
    with pytest.raises(mi.InputError, match="no .json of sample.py beside it"):
        cf.counterfactual(video, [], str(tmp_path / "out"))


def test_lags_are_averaged_around_the_circle():
    assert cf.circular([0.45, -0.45]).endswith("0.50 (0.95)")
    assert cf.circular([0.1, 0.1]) == "+0.10 (1.00)"


# ----------------------------------------------------------------------------------------------
# Copies
# ----------------------------------------------------------------------------------------------


def test_a_copy_of_a_training_clip_is_found(weights, dance_videos, tmp_path, capsys):
    data, wild = str(dance_videos / "aist"), str(dance_videos / "wild")
    options, dit = mi.begin(copies.Options, "sampling", {"weights": str(weights)})
    preprocessor = copies.Preprocessor(f"{data}/.musicinfuser", str(weights), options.size, 7, 30)
    clip = preprocessor.clips(copies.find_videos(data, wild))[-1]
    frames = list(mi.read_frames(clip.video.path, *options.size, 30))
    copy, noise = str(tmp_path / "copy.mp4"), str(tmp_path / "noise.mp4")
    mi.save_video(copy, mi.from_pixels(frames[clip.start : clip.start + 7]))
    mi.save_video(noise, torch.rand(3, 7, 32, 32) * 2 - 1)
    report = copies.copy_report([copy, noise], data, wild, str(weights), device="cpu")
    rows = report["videos"]
    assert rows[copy]["nearest"] == clip.name
    assert rows[copy]["distance"] < rows[noise]["distance"]
    assert len(report["held_out"]) == 2 and min(report["held_out"]) > rows[copy]["distance"]
    assert "| held out |" in capsys.readouterr().out
    with pytest.raises(mi.InputError, match="no clips to compare with; .*--min-size as train.py"):
        copies.copy_report([copy], data, wild, str(weights), (64, 64), device="cpu")
