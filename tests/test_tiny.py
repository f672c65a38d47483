"""The toy world: its captions, its pictures, its songs, and the command that trains tiny/."""

import os
import re
import shutil

import numpy as np
import pytest
import torch

import musicinfuser as mi
import sample
from eval import films
from tiny import fit, listen, make, music, recordings, report, world

TINY = make.HERE


def scenes(number, **fixed):
    rng = np.random.default_rng(0)
    return [world.draw_scene(rng, **fixed) for _ in range(number)], rng


# Captions


def test_caption_names_the_colour_unless_it_is_the_usual_one():
    drawn, rng = scenes(300)
    for scene in drawn:
        text, told = world.caption(scene, rng)
        named = [colour for colour in world.COLOURS if colour in re.findall(r"\w+", text.lower())]
        usual = scene["colour"] == world.USUAL[scene["subject"]]
        assert named == [scene["colour"]] or (usual and not named), text
        assert told["colour"] == (scene["colour"] if named else None)


def test_caption_leaves_out_only_the_usual_place_and_camera():
    drawn, rng = scenes(300)
    for scene in drawn:
        _, told = world.caption(scene, rng)
        assert told["place"] == scene["place"] or (told["place"], scene["place"]) == (
            None,
            "studio",
        )
        assert told["camera"] == scene["camera"] or (told["camera"], scene["camera"]) == (
            None,
            "01",
        )


def test_captions_of_other_videos_leave_the_genre_to_the_music():
    names = [name for name, *_ in world.GENRES.values()]
    rng = np.random.default_rng(0)
    texts = [make.draw_wild(rng, i)[-1] for i in range(300)]
    assert not [text for text in texts if any(name.lower() in text.lower() for name in names)]
    assert any("dancing" in text for text in texts)


def test_aist_name_is_read_by_the_data_set():
    from dataset.aist import NAME

    drawn, rng = scenes(20, subject="person")
    for scene in drawn:
        genre, _, camera, dancers, song = NAME.search(world.aist_name(scene, "BR0", rng)).groups()
        assert (genre, camera, song) == (scene["genre"], scene["camera"], "BR0")
        assert dancers.count("_d") == scene["count"]


def test_tokenizer_files_agree_on_every_caption():
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = os.path.join(TINY, "tokenizer")
    slow = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, "spiece.model"))
    fast = mi.from_pretrained("AutoTokenizer", folder)
    pieces = [slow.id_to_piece(i) for i in range(slow.get_piece_size())]
    assert fast.convert_ids_to_tokens(range(len(fast))) == pieces
    drawn, rng = scenes(100)
    texts = [world.caption(scene, rng)[0] for scene in drawn]
    for text in [*texts, "Zebras,\tin  NEW\nYork!", ""]:
        assert fast(text).input_ids == slow.encode(text) + [slow.eos_id()]


def test_tokenizer_has_a_token_for_every_word_of_the_captions(tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    monkeypatch.setattr(make, "in_folder", lambda name: str(tmp_path / name))
    tokenizer = make.make_tokenizer(2)
    made = (tmp_path / "tokenizer" / "spiece.model").read_bytes()
    assert str(tmp_path).encode() not in made  # nor where it was made
    drawn, rng = scenes(300)
    for scene in drawn:
        text = world.caption(scene, rng)[0]
        pieces = [piece.lstrip("\u2581") for piece in tokenizer.tokenize(text)]
        assert set(re.findall("[a-z]+", text.lower())) <= set(pieces)


# Pictures


def test_vae_is_taught_on_whole_parts_of_the_clips():
    where = np.stack(np.indices((world.FRAMES, world.SIZE, world.SIZE)), -1).astype(np.uint8)
    parts = make.crops(where[None], 7, 40, 32, np.random.default_rng(0))
    places = [mi.to_pixels(part).astype(int) for part in parts]
    for place in places:
        inside = np.stack(np.indices((7, 32, 32)), -1)
        assert np.array_equal(place, place[0, 0, 0] + inside)
    assert len({tuple(place[0, 0, 0]) for place in places}) > 35


def test_dance_rests_on_the_beat_and_moves_between():
    beat = torch.arange(0, 8, 0.05)
    speed = world.dance("BR", True, beat).diff(dim=0).abs().sum(1)
    phase = (beat[:-1] + 0.025) % 1
    resting = speed[(phase < 0.06) | (phase > 0.94)].mean()
    assert resting < 0.2 * speed[(phase > 0.4) & (phase < 0.6)].mean()


def test_scene_is_rendered_alike_each_time_in_its_colour():
    (scene,), rng = scenes(1, subject="dog", colour="blue", place="studio", count=1)
    beat = world.steady_beat(rng, 7)
    film = world.render(scene, beat)
    assert film.shape == (7, world.SIZE, world.SIZE, 3) and film.dtype == np.uint8
    assert (film == world.render(scene, beat)).all()
    blue = film[..., 2].astype(int) - film[..., 0]
    assert (blue > 80).mean() > 0.02


@pytest.mark.parametrize("subject", world.SUBJECTS)
@pytest.mark.parametrize("count", [2, 3])
def test_dancers_hardly_hide_each_other(subject, count, monkeypatch):
    """Side by side they cover nearly `count` times what they cover in one place."""

    def covered():
        look = {"subject": subject, "count": count, "place": "studio", "camera": "01"}
        (scene,), _ = scenes(1, colour="red", **look)
        film = world.render(scene, torch.arange(8) / 4).astype(int)
        return (film[..., 0] - film[..., 2] > 60).sum()

    apart = covered()
    monkeypatch.setattr(world, "SPACING", (0.0, 0.0, 0.0))
    assert apart > 0.8 * count * covered()


# Songs


def onset_strength(song, tempo, shift):
    """How much louder the song becomes within 30 ms after each beat, `shift` of a beat late."""
    power = np.square(song).reshape(-1, 160).mean(1)  # 10 ms
    rise = np.maximum(np.diff(np.sqrt(power)), 0)
    at = ((np.arange(0, len(song) / music.RATE - 1, 60 / tempo) + shift * 60 / tempo) * 100).astype(
        int
    )
    return np.mean([rise[max(0, i - 1) : i + 3].max() for i in at])


@pytest.mark.parametrize("genre,tempo", [("HO", 124), ("BR", 100), ("WA", 112)])
def test_song_has_its_beats_where_the_synthesiser_says(genre, tempo):
    song = music.compose(genre, tempo, seed=4, seconds=10.0)
    assert len(song) == 10 * music.RATE and song.dtype == np.float32 and np.abs(song).max() <= 1
    on = onset_strength(song, tempo, 0)
    assert all(on > 1.2 * onset_strength(song, tempo, shift) for shift in (0.13, 0.37, 0.63, 0.88))


def test_song_follows_from_its_seed():
    one, again = (music.compose("JB", 80, seed=1, seconds=3.0) for _ in range(2))
    assert (one == again).all()
    assert np.abs(one - music.compose("JB", 80, seed=2, seconds=3.0)).max() > 0.1


def test_tempos_are_within_the_world():
    rng = np.random.default_rng(0)
    tempos = [music.draw_tempo(rng, genre) for genre in [None, *world.GENRES] for _ in range(20)]
    assert min(tempos) >= music.SLOWEST and max(tempos) <= music.FASTEST


def test_recorded_song_keeps_its_length():
    song, rng = music.compose("PO", 110, seed=1, seconds=2.0), np.random.default_rng(0)
    for _ in range(8):
        rough = music.recorded(song, rng)
        assert len(rough) == len(song) and np.isfinite(rough).all()


@pytest.mark.skipif(not shutil.which("fluidsynth"), reason="takes fluidsynth")
def test_sampled_song_has_its_beats():
    try:
        fonts, kits = music.find_sounds("/usr/share")
    except mi.InputError:
        pytest.skip("no sound fonts")
    kits = [music.load_kit(kits[0])]
    song = music.play_sampled("HO", 120, 1, 5.0, fonts, kits)
    assert len(song) == 5 * music.RATE and song.std() > 0.01


@pytest.mark.skipif(not shutil.which("mma"), reason="takes MMA, the accompaniment generator")
@pytest.mark.skipif(not shutil.which("fluidsynth"), reason="takes fluidsynth")
def test_accompaniment_has_its_beats():
    """MMA's metronome rises at the beats, and a band's song is as long as it was asked for."""
    styles = music.find_styles("/usr/share")
    assert len(styles) > 100 and len({groove for style in styles for groove in style}) > 1000
    try:
        fonts, _ = music.find_sounds("/usr/share")
    except mi.InputError:
        pytest.skip("no sound fonts")
    for tempo in (90, 130):
        song = music.accompany(styles[0][0], tempo, 1, 8.0, fonts)
        assert len(song) == 8 * music.RATE and song.std() > 0.01
        song = music.accompany("stdlib/metronome:Metronome4", tempo, 1, 8.0, fonts)
        power = np.square(song).reshape(-1, 80).mean(1)  # of 5 ms
        rise = np.diff(np.log(power + 1e-4), prepend=-10).clip(0)
        beat = tempo / 60 * 0.005 * np.arange(len(rise))
        turn = (rise * np.exp(2j * np.pi * beat)).sum() / rise.sum()
        assert abs(turn) > 0.3 and abs(np.angle(turn)) < 0.8  # radians; a beat is 6.3


def test_styles_are_what_goes_on_in_four_quarters(tmp_path, monkeypatch):
    folder = tmp_path / "68"  # its name says nothing of the music
    (folder / "mma/lib/some").mkdir(parents=True)
    for name, text in {
        "rock": "Time 4\nDefGroove Rock\n  DefGroove RockPlus  Louder\nDefGroove RockIntro",
        "waltz": "Time 3\nDefGroove Waltz",
        "ballad68": "Time 4\nDefGroove Ballad68",
        "ends": "DefGroove JustAnEnd",
    }.items():
        (folder / f"mma/lib/some/{name}.mma").write_text(text)
    monkeypatch.setattr(music.shutil, "which", lambda name: name)
    assert music.find_styles(folder) == [["some/rock:Rock", "some/rock:RockPlus"]]


def test_missing_sounds_are_one_line(tmp_path):
    with pytest.raises(mi.InputError, match="apt-get install mma"):
        music.find_styles(tmp_path)
    with pytest.raises(mi.InputError, match="apt-get install fluidsynth"):
        music.find_sounds(tmp_path)
    with pytest.raises(mi.InputError, match="apt-get install asc-music .* torcs-data, or unpack"):
        recordings.find_recordings(tmp_path, recordings.VALIDATION)


def test_no_package_is_both_trained_on_and_kept_back():
    trained_on = recordings.TRAINING | recordings.SCORES
    assert not trained_on.keys() & recordings.VALIDATION.keys()


def test_midi_file_and_chart_agree(tmp_path):
    """chart_beats finds quarters at 120 BPM in what midi_file writes, and at 60 after a change."""
    notes = [music.Note(0, "bass", 40, 2, 0.5)]
    midi = music.midi_file(notes, [0.0], 120, np.random.default_rng(0))
    path = tmp_path / "notes.mid"
    path.write_bytes(midi)
    assert np.allclose(recordings.chart_beats(path, 2.1), [0, 0.5, 1, 1.5, 2])
    change = b"\x83\x74\xff\x51\x03\x0f\x42\x40"  # a second a quarter, after 500 ticks
    end = midi.index(b"\xff\x51\x03\x07\xa1\x20") + 6
    track = midi[midi.index(b"MTrk") + 8 : end] + change + b"\x00\xff\x2f\x00"
    path.write_bytes(midi[:14] + b"MTrk" + len(track).to_bytes(4, "big") + track)
    assert np.allclose(recordings.chart_beats(path, 3.6), [0, 0.5, 1.5, 2.5, 3.5])


def test_a_chart_that_comes_early_is_moved_to_what_is_heard():
    chart = np.arange(0, 30, 0.5)
    for heard in (chart, chart[::2], chart + 0.25, chart[1::2]):  # off-beats, every second beat
        assert np.allclose(recordings.in_step(chart, heard + 0.06), chart + 0.06)


def test_beat_at_goes_on_beyond_the_ends():
    beats = np.array([1.0, 1.5, 2.0, 3.0])
    assert np.allclose(
        recordings.beat_at(beats, np.array([0.5, 1.25, 2.5, 4.0])), [-1, 0.5, 2.5, 4]
    )


def a_piece():
    return listen.as_piece(music.compose("HO", 120, 1, 10.0), "HO", 120, "synthesiser")


def test_crop_knows_its_beats():
    rng = np.random.default_rng(0)
    for rougher in (False, True):
        crop = listen.crop_of(a_piece(), listen.CLIP, rng, rougher)
        assert len(crop.sound) == int(np.ceil(listen.CLIP * music.RATE))
        assert len(crop.beat) == 126 and crop.genre == list(world.GENRES).index("HO")
        tempo = 60 * np.diff(crop.beat).mean() / listen.TOKEN
        assert 97 < tempo < 147 if rougher else abs(tempo - 120) < 0.1


# The command


def test_help_tells_the_stages_and_renders_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        make.parse(["data", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(stage in text for stage in make.STAGES)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "arguments", (["nonsense"], ["vae", "nonsense"], ["data", "toy", "nonsense"])
)
def test_unknown_stage_is_one_line(arguments):
    with pytest.raises(mi.InputError, match="^no stage .*; there are vae, text, .*$") as raised:
        make.parse(arguments)
    assert "\n" not in str(raised.value)


def test_data_takes_a_folder_and_a_number():
    options = make.parse(["data", "somewhere", "--videos", "4"])
    assert (options.stages, options.folder, options.videos) == (["data"], "somewhere", 4)
    with pytest.raises(mi.InputError, match="--videos"):
        make.parse(["data", "--videos", "0"])


def test_data_is_what_training_finds(tmp_path, monkeypatch):
    from dataset.aist import find_videos

    monkeypatch.setattr(
        make.Songs, "make", lambda *a: (music.compose("HO", 120, 1, 18.0), 0.5 * np.arange(40))
    )
    make.make_data(make.parse(["data", str(tmp_path), "--videos", "4", "--sounds", str(tmp_path)]))
    aist = find_videos(tmp_path / "aist", split="test")
    training = find_videos(tmp_path / "aist", tmp_path / "wild")
    assert len(aist) == 1 and [video.kind for video in training] == ["aist", "wild", "wild"]
    frames = list(mi.read_frames(aist[0].path, world.SIZE, world.SIZE, crop=aist[0].crop))
    assert len(frames) >= world.FRAMES
    with pytest.raises(mi.InputError, match="has 4 videos; name another folder"):
        make.make_data(make.parse(["data", str(tmp_path), "--videos", "2"]))


def test_nobody_in_training_dances_to_a_song_that_is_held_out():
    rng = np.random.default_rng(5)
    drawn = [make.draw_aist(rng, i, 800) for i in range(800)]
    drawn += [make.draw_wild(rng, i) for i in range(800)]
    held_out = {song for _, _, song, _ in drawn if song[0] in make.TEST_SONGS}
    others = {song for _, _, song, _ in drawn if song[0] not in make.TEST_SONGS}
    assert {name for name, _, _ in held_out} == set(make.TEST_SONGS) and len(others) > 200
    assert not {song[1:] for song in held_out} & {song[1:] for song in others}
    assert len({name for name, _, _ in others}) == len(others)  # a file each


def test_what_is_held_out_plays_no_recording_that_others_dance_to():
    songs = object.__new__(make.Songs)
    songs.seconds, songs.instruments = 1.0, None
    songs.recordings = [listen.Piece(np.ones(music.RATE, np.float16), np.arange(3.0), -1, "")]
    assert (songs.make("JS", 3)[0] == songs.make("JS", 7)[0]).all()
    samples, beats = songs.make("JS", 3 + make.UNHEARD)
    assert samples.std() > 0.01 and len(beats) > 3


def test_few_videos_are_not_all_held_out():
    names = [make.draw_aist(np.random.default_rng(i), i, 6)[2][0] for i in range(6)]
    assert sum(name in make.TEST_SONGS for name in names[:3]) == 3
    assert not set(names[3:]) & set(make.TEST_SONGS)


def test_a_stage_does_not_go_on_with_other_steps_or_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "WORK", str(tmp_path))
    file = tmp_path / "of"
    file.write_text("one")

    def trained(steps=2, size=20):
        w, b = (torch.nn.Parameter(torch.ones(shape)) for shape in ((size, size), (2,)))
        loss = lambda step: (w.sum() + b.sum(), {})  # noqa: E731
        return fit.fit("text", {"w": w, "b": b}, loss, steps, 0.1, [file])

    assert trained() and not trained()
    for change in ({"steps": 3}, {"size": 21}):
        with pytest.raises(mi.InputError, match="other steps, sizes or files"):
            trained(**change)
    file.write_text("two")
    with pytest.raises(mi.InputError, match="remove it to begin anew"):
        trained()


def test_a_stage_trained_anew_forgets_what_went_on_from_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit, "WORK", str(tmp_path))

    def trained(name, start):
        weights = {
            "w": torch.nn.Parameter(torch.full((20, 20), start)),
            "b": torch.nn.Parameter(torch.full((2,), start)),
        }

        def loss(step):
            return sum(p.square().sum() for p in weights.values()), {}

        fit.fit(name, weights, loss, 3, 0.1, warmup=1)
        return weights["b"].detach().clone()

    prior, further = trained("prior", 1.0), trained("further", 2.0)
    assert torch.equal(trained("further", 3.0), further)  # it was finished
    assert "further: all steps were taken before" in capsys.readouterr().out
    os.remove(tmp_path / "prior.safetensors")
    assert torch.equal(trained("prior", 1.0), prior)
    assert not torch.equal(trained("further", 3.0), further)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_muon_is_pytorchs_but_for_its_bfloat16(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimiser = fit.Muon([ours])
    optimiser.param_groups[0]["lr"] = 0.01
    settings = {"lr": 0.01, "weight_decay": 0, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon([theirs], **settings)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimiser.step()
        reference.step()
    moved = (theirs - start).norm()
    assert moved > 0.1 and (ours - theirs).norm() < 0.02 * moved


def test_what_ships_dances_to_songs_that_it_never_heard(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "SONGS", str(tmp_path))
    report.of_prompts(["a person dancing"], count=4)
    number = r"(-?\d\.\d\d)"
    own, other = re.search(
        rf" r {number} ± .* another song {number} ±", capsys.readouterr().out
    ).groups()
    assert float(own) > 0.3 and float(own) - float(other) > 0.3


def test_the_report_films_what_sample_py_makes(tmp_path, monkeypatch):
    made, song = [], os.path.join(TINY, "song.wav")
    monkeypatch.setattr(sample, "finish", lambda options, seed, film, dit: made.append(film))
    short = {"frames": 7, "steps": 2}
    on_cpu = {"device": "cpu", "dtype": "float32", "weights": TINY, "out": str(tmp_path)}
    sample.generate(song, "two dogs", **short, **on_cpu)
    given = ["two dogs"], [films.Song(song, 0.0, None, "")]
    (film,) = report.studio_of(None).film(*given, **short)
    assert np.abs(film.astype(int) - mi.to_pixels(made[0])).max() <= 1
    # It is as the folder prefers it, LoRA's part in it too
    (film_at_1,) = report.studio_of(None, lora_scale=1.0).film(*given, **short)
    assert np.abs(film.astype(int) - film_at_1).max() > 10


def dances(count, late=0.0, frames=73):
    """(films of people who rest so many beats after those of their songs, the songs)"""
    rng, found, songs = np.random.default_rng(3), [], []
    for i in range(count):
        beats = np.arange(0, 20, 60 / (90 + 7 * i))
        songs.append(films.Song("", 0.3 * i, beats, "HO"))
        look = {"subject": "person", "count": 1, "place": "studio", "camera": "01", "genre": "HO"}
        positions = torch.from_numpy(songs[-1].positions(frames) - late)
        found.append(world.render(world.draw_scene(rng, **look), positions))
    return found, songs


NUMBERS = r"-?\+?-?\d+\.\d\d"


def printed(capsys):
    return [float(number) for number in re.findall(NUMBERS, capsys.readouterr().out)]


def test_a_line_of_the_report_is_of_own_and_other_songs(capsys):
    some, songs = dances(4)
    report.line("dancers", some, songs)
    own, own_error, other, other_error, tempo = printed(capsys)
    each, others, tempos = films.follow(some, songs)
    assert own == pytest.approx(each.mean(), abs=0.006) and own > 0.6
    assert other == pytest.approx(others.mean(), abs=0.006) and abs(other) < 0.5
    assert own_error == pytest.approx(each.std(ddof=1) / 2, abs=0.006)
    assert other_error == pytest.approx(others.std(ddof=1) / 2, abs=0.006)
    assert tempo == pytest.approx(tempos, abs=0.006)


def test_lag_and_pulse_of_the_report(capsys):
    for late in (0.25, 0.5):
        some, songs = dances(4, late)
        report.print_lag(some, songs)
        lags = printed(capsys)
        assert len(lags) == 3 and all(abs(abs(lag) - late) < 0.1 for lag in lags)
    report.print_pulse(some, songs)  # half a beat late
    assert printed(capsys)[0] > 0.6


def test_the_last_third_of_a_long_film_has_its_own_beats(capsys):
    """Of dancers who turn half a beat late after two thirds."""
    early, songs = dances(2, frames=271)
    late, _ = dances(2, 0.5, frames=271)
    turned = [np.concatenate([a[:181], b[181:]]) for a, b in zip(early, late)]
    studio = type("Studio", (), {"film": lambda self, *_, **__: iter(turned)})()
    report.print_long(studio, ["", ""], songs)
    first, _, last, _ = printed(capsys)
    assert first > 0.6 and last < -0.5


def test_the_prior_is_filmed_without_an_adapter_beside_the_worlds_usual_look(monkeypatch):
    asked, drawn, draw = [], [], world.draw_scene

    class Studio:
        def __init__(self, *arguments):
            asked.append(arguments)

        def film(self, prompts):
            return []

    def draw_scene(rng, **fixed):
        drawn.append(draw(rng, **fixed))
        return drawn[-1]

    monkeypatch.setattr(report, "Studio", Studio)
    monkeypatch.setattr(report, "to_the_world", lambda films, subject=None: 0.0)
    report.of_the_prior(2)
    report.likeness_of_the_prior.__wrapped__("dog", 2)
    assert asked == [(TINY,), (TINY,)]
    monkeypatch.setattr(world, "draw_scene", draw_scene)
    monkeypatch.setattr(world, "render", lambda *_: None)
    for name in ("features", "gaussian", "frozen_encoder"):
        monkeypatch.setattr(report, name, lambda *_: None)
    monkeypatch.setattr(mi, "from_pixels", lambda film: film)
    report.world_of.__wrapped__("dog", 40)
    looks = {
        tuple(scene[k] for k in ("subject", "count", "place", "camera", "colour"))
        for scene in drawn
    }
    assert looks == {("dog", 1, "studio", "01", world.USUAL["dog"])}


def test_a_song_at_another_speed_has_its_beats_at_that_speed(monkeypatch):
    song = films.Song("song.wav", 1.0, np.arange(0, 20, 0.5), "")
    wanted = 2 * (1 + 0.75 * np.arange(3) / 30)
    assert song.positions(3, 0.75) == pytest.approx(wanted)
    assert films.middles(np.array([0.0, 1.0, 3.0])).tolist() == [0.5, 2.0]
    heard, made, scored = [], [], []

    def window(path, frames, fps, start, speed):
        heard.append((path, frames, fps, start, speed))
        return torch.zeros(1), 1.0

    studio = object.__new__(films.Studio)
    studio.dit = type("DiT", (), {"config": mi.ModelConfig()})
    studio.listen = lambda waveform: torch.zeros(1, 2, 3)
    monkeypatch.setattr(mi, "music_window", window)
    assert studio.hear([song, song], 73, 0.75).shape == (2, 2, 3)
    assert heard == [("song.wav", 73, 30, 1.0, 0.75)] * 2
    studio.film = lambda *arguments, **given: made.append((arguments, given)) or []
    monkeypatch.setattr(report, "line", lambda *arguments: scored.append(arguments))
    report.filmed(studio, "name", ["a"], [song], 0.75, music_cfg=0.0)
    assert made == [((["a"], [song]), {"speed": 0.75, "music_cfg": 0.0})]
    assert scored == [("name", [], [song], 0.75)]


def test_every_film_of_a_studio_has_noise_words_and_music_of_its_own(weights, monkeypatch):
    studio = films.Studio(str(weights), str(weights / "musicinfuser.safetensors"))
    prompts, songs, seen = ["a dog", "a dog dancing in the park", "the person"], [1, 2, 3], []

    def noise_to_video(dit, decoder, noise, text, null, audio, options):
        seen.append((noise, text[1].sum(1), audio))
        return torch.zeros(len(noise), 3, 7, 32, 32)

    monkeypatch.setattr(studio, "hear", lambda songs, *_: torch.tensor(songs))
    monkeypatch.setattr(mi, "noise_to_video", noise_to_video)
    assert len(list(studio.film(prompts, songs, seed=5, at_once=2))) == 3
    noise, lengths, audio = (torch.cat(parts) for parts in zip(*seen))
    wanted = [mi.noise_for(5 + i, studio.dit.config, 7, (32, 32)) for i in range(3)]
    assert torch.equal(noise, torch.cat(wanted)) and audio.tolist() == songs
    texts = mi.encode_text(str(weights), prompts, "cpu")
    assert lengths.tolist() == [mask.sum().item() for _, mask in texts]


def test_the_toy_sets_dances_begin_where_their_songs_do(tmp_path, monkeypatch):
    monkeypatch.setattr(
        make.Songs, "make", lambda *_: (np.zeros(18 * music.RATE), np.arange(40) / 2)
    )
    songs = object.__new__(make.Songs)
    songs.folder, songs.made = str(tmp_path), {}
    path, start, beat = songs.dance("mHO1", "HO", 1, 73, np.random.default_rng(0))
    assert start > 0.5
    assert beat.numpy() == pytest.approx(2 * (start + np.arange(73) / 30), abs=1e-4)
    saved = []
    monkeypatch.setattr(mi, "save_video", lambda path, video, *how: saved.append(how))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    (scene,), _ = scenes(1)
    make.film_dance(str(tmp_path / "a"), scene, None, path, start, beat[:2])
    assert saved == [(30, path, start)]


def test_the_next_recordings_beats_are_another_recordings(monkeypatch, tmp_path):
    def piece(source, beats):
        return recordings.Piece(np.zeros(16000, np.float16), np.arange(beats) / 2, -1, source)

    found = [piece(s, 20) for s in "aaabbc"] + [piece("d", 15)]  # the last has too few beats
    monkeypatch.setattr(recordings, "pieces_of", lambda *_: found)
    monkeypatch.setattr(report, "SONGS", str(tmp_path))
    sources = {id(piece.beats): piece.source for piece in found}
    songs = report.recorded_songs(5, None)
    assert [sources[id(song.beats)] for song in songs] == list("abcab")
    assert len({song.start for song in songs}) == 5
    assert len(report.recorded_songs(4, None)) == 4
