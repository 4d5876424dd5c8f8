"""Bad input, through the command line: exit code 2, a message that says what to do, nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import wave
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omniport.cli.main import run

Command = Callable[..., str]

CONTEXT = 4096


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; temporary files go to a folder beside it, where they would be seen."""
    for name in ("work", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def refused(tmp_path: Path, work: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command that must be refused: returns its message; files are as they were before.

    ``partial``: what is wrong is found while the reply streams, so some of it may have been printed.
    """

    def command(*arguments: object, message: str, partial: bool = False) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        folders = {path for path in tmp_path.rglob("*") if path.is_dir()}
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert stopped.value.code == 2, err
        assert "Traceback" not in out + err
        assert "bug in omniport" not in err
        assert partial or out == ""
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert re.search(message, line), line
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert after == before, "something was left behind"
        assert {path for path in tmp_path.rglob("*") if path.is_dir()} == folders
        return line

    return command


@pytest.fixture
def ask(tiny_bundle: Path, refused: Command) -> Command:
    """``omniport run`` with a medium and a spoken reply, refused."""

    def command(*arguments: object, message: str) -> str:
        text = ("--text", "What is this?", "--speak", "reply.wav", "--quiet", "--backend", "ort-cpu")
        line = refused("run", tiny_bundle, *arguments, *text, message=message)
        assert not Path("reply.wav").exists()
        return line

    return command


def test_the_same_command_with_good_input_succeeds(
    tiny_bundle: Path, work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """So that the refusals below are for the reason they name."""
    arguments = ("--text", "Hi", "--speak", "reply.wav", "--max-new-tokens", "4", "--max-speech", "0.5", "--quiet")
    with pytest.raises(SystemExit) as stopped:
        run(["run", str(tiny_bundle), *arguments, "--backend", "ort-cpu"])
    assert stopped.value.code == 0
    assert capfd.readouterr().out.strip()
    with wave.open("reply.wav") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    assert float(np.sqrt(np.mean(samples.astype(np.float64) ** 2))) > 100
    assert [path.name for path in work.iterdir()] == ["reply.wav"]
    assert not list((tmp_path / "temporary").iterdir())


# --- checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, work: Path) -> Path:
    shutil.copytree(tiny_checkpoint, work / "checkpoint")
    return work / "checkpoint"


def test_empty_folder_is_no_checkpoint(work: Path, refused: Command) -> None:
    (work / "nothing").mkdir()
    refused("export", "nothing", "out/bundle", message=r"not a checkpoint: it holds no config\.json\. Give the folder")


def test_file_is_no_checkpoint(work: Path, refused: Command) -> None:
    (work / "notes.txt").write_text("not a model")
    refused(
        "export", work / "notes.txt", "bundle", message=r"notes\.txt is a file, expected|not a checkpoint|is a file"
    )


def test_missing_folder_is_no_checkpoint(work: Path, refused: Command) -> None:
    refused("export", work / "no" / "such" / "folder", "bundle", message=r"no such folder|does not exist|no folder")


def test_config_that_is_not_json(checkpoint: Path, refused: Command) -> None:
    (checkpoint / "config.json").write_text("{ half")
    refused("export", checkpoint, "bundle", message=r"config\.json is not JSON .* Download the file again")


@pytest.mark.parametrize("model", ["llama", "qwen2_5_vl", None])
def test_unsupported_architecture(checkpoint: Path, refused: Command, model: str | None) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": model}))
    line = refused("export", checkpoint, "bundle", message=r"omniport supports 'qwen2_5_omni'")
    assert repr(model) in line


def test_truncated_shard(checkpoint: Path, refused: Command) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    refused("export", checkpoint, "bundle", message=rf"{shard.name} is truncated: .* Download the file again")
    shard.write_bytes(data[:5])
    refused("export", checkpoint, "bundle", message=rf"{shard.name} is not a valid safetensors file: it has 5 bytes")


def test_missing_shard(checkpoint: Path, refused: Command) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    shard.unlink()
    refused("export", checkpoint, "bundle", message=rf"{shard.name}\. Download the missing files")


def test_full_disk_during_export(checkpoint: Path, refused: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real full disks are in test_export_errors.py; this is what the command says."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    refused("export", checkpoint, "deep/bundle", message=r"has 5 MB free and the bundle needs 2\d MB\. Free some space")


# --- audio ---------------------------------------------------------------------------------------------------


def test_unreadable_audio(work: Path, ask: Command) -> None:
    (work / "noise.wav").write_bytes(np.random.default_rng(0).bytes(5000))
    ask("--audio", "noise.wav", message=r"'noise\.wav' .*(cannot be read|not.*audio|cannot be decoded)")
    (work / "text.mp3").write_text("this is not sound\n" * 50)
    ask("--audio", "text.mp3", message=r"'text\.mp3' .*(cannot be read|not.*audio|cannot be decoded)")


def test_missing_audio(ask: Command) -> None:
    ask("--audio", "nowhere.wav", message=r"'nowhere\.wav' does not exist; check the path")


def test_folder_as_audio(work: Path, ask: Command) -> None:
    (work / "folder").mkdir()
    ask("--audio", "folder", message=r"'folder' is not a regular file; pass the path of a audio file|pass the path")


def test_empty_audio(work: Path, ask: Command) -> None:
    (work / "empty.wav").write_bytes(b"")
    ask("--audio", "empty.wav", message=r"'empty\.wav' is empty \(0 bytes\); record or download it again")


def write_wav(path: Path, samples: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    import soundfile

    soundfile.write(path, samples, 16000, subtype="FLOAT")


def test_audio_of_length_zero(work: Path, ask: Command) -> None:
    write_wav(work / "silent.wav", np.zeros(0, np.float32))
    ask("--audio", "silent.wav", message=r"'silent\.wav' holds no samples; record or export it again")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_audio_that_is_not_finite(work: Path, ask: Command, bad: float) -> None:
    samples = np.sin(np.arange(16000, dtype=np.float32) / 20)
    samples[8000:8003] = bad
    write_wav(work / "broken.wav", samples)
    ask("--audio", "broken.wav", message=r"3 NaN or infinite samples \(the first at 0\.500 s\)")


def test_audio_that_is_too_long(work: Path, ask: Command) -> None:
    write_wav(work / "long.wav", np.sin(np.arange(16000 * 301, dtype=np.float32) / 20))
    ask("--audio", "long.wav", message=r"audio .* is too long: 301\.0 s or more.* cut it into shorter clips")


# --- images and video ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20000, 20), (20, 20000)])
def test_image_of_impossible_size(work: Path, ask: Command, size: tuple[int, int]) -> None:
    from PIL import Image

    Image.new("RGB", size, (200, 30, 60)).save(work / "image.png")
    line = ask("--image", "image.png", message=r"is too elongated: .* crop it")
    assert f"{size[0]}x{size[1]}" in line


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"x" * 400, b"words " * 99])
def test_unreadable_image(work: Path, ask: Command, content: bytes) -> None:
    (work / "image.png").write_bytes(content)
    ask("--image", "image.png", message=r"'image\.png' (is empty|is corrupt|.*(cannot|not)).*; ")


def write_media(path: Path, frames: int, sound: bool) -> None:
    """A file with a video stream of so many frames, or with sound alone."""
    import av

    with av.open(str(path), "w") as container:
        if sound:
            stream = container.add_stream("aac", rate=16000)
            stream.layout = "mono"
            samples = np.sin(np.arange(16000, dtype=np.float32) / 20)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux([*stream.encode(frame), *stream.encode(None)])
            return
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for i in range(frames):
            picture = np.full((64, 64, 3), 10 * i, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))


def test_video_without_a_picture(work: Path, ask: Command) -> None:
    write_media(work / "sound.mp4", 0, sound=True)
    ask("--video", "sound.mp4", message=r"'sound\.mp4' .*no (video|picture|frames)")


def test_video_without_frames(work: Path, ask: Command) -> None:
    write_media(work / "none.mkv", 0, sound=False)
    ask("--video", "none.mkv", message=r"'none\.mkv' .*(no|not)")


def test_unreadable_video(work: Path, ask: Command) -> None:
    (work / "clip.mp4").write_bytes(np.random.default_rng(1).bytes(3000))
    ask("--video", "clip.mp4", message=r"'clip\.mp4' .*(cannot|not)")
    write_media(work / "good.mp4", 10, sound=False)
    data = (work / "good.mp4").read_bytes()
    (work / "clip.mp4").write_bytes(data[: len(data) // 3])
    ask("--video", "clip.mp4", message=r"'clip\.mp4' .*(cannot|not|no)")


# --- voice, prompt, output -----------------------------------------------------------------------------------


def test_unknown_voice(ask: Command) -> None:
    ask("--voice", "Nobody", message=r"there is no voice 'Nobody'; known voices: Chelsie, Ethan")


def test_prompt_longer_than_the_cache(tiny_checkpoint: Path, tiny_bundle: Path, work: Path, refused: Command) -> None:
    from omniport.export.exporter import export_checkpoint

    shutil.copytree(tiny_bundle, work / "bundle")
    export_checkpoint(tiny_checkpoint, work / "bundle", max_context=128)
    arguments = ("--text", "many words " * 100, "--speak", "reply.wav", "--backend", "ort-cpu", "--quiet")
    line = refused("run", "bundle", *arguments, message=r"\d+ tokens")
    assert "128" in line
    assert re.search(r"--max-context|shorter|shorten", line)


def test_output_that_cannot_be_written(tiny_bundle: Path, refused: Command) -> None:
    arguments = ("--text", "Hi", "--speak", "no/such/folder/reply.wav", "--quiet", "--backend", "ort-cpu")
    refused(
        "run", tiny_bundle, *arguments, message=r"cannot write no/such/folder/reply\.wav: .* folder that can be written"
    )


# --- bundles -------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tiny_bundle: Path, work: Path) -> Path:
    shutil.copytree(tiny_bundle, work / "bundle")
    return work / "bundle"


@pytest.fixture
def broken(bundle: Path, refused: Command) -> Command:
    def command(message: str, partial: bool = False) -> str:
        arguments = ("--text", "Hi", "--speak", "reply.wav", "--quiet", "--backend", "ort-cpu")
        return refused("run", bundle, *arguments, message=message, partial=partial)

    return command


def test_no_bundle(work: Path, refused: Command) -> None:
    for name in ("run", "inspect", "voices"):
        arguments = ("--text", "Hi") if name == "run" else ()
        refused(
            name, work / "nothing", *arguments, message=r"cannot read .*bundle\.json.*'omniport export' was expected"
        )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[: len(text) // 2], r"is not a bundle manifest: .* export the bundle again"),
        (
            lambda text: text.replace('"schema_version": 3', '"schema_version": 99'),
            r"schema version 99.*upgrade omniport",
        ),
        (lambda text: text.replace('"precision"', '"precison"', 1), r"does not follow the bundle format: .*precison"),
        (lambda text: text.replace("graphs/thinker.onnx.data", "../thinker.onnx.data"), r"holds '\.\.'"),
    ],
    ids=["half", "newer", "unknown field", "leaves the bundle"],
)
def test_corrupt_manifest(bundle: Path, broken: Command, edit: Callable[[str], str], message: str) -> None:
    path = bundle / "bundle.json"
    text = path.read_text()
    path.write_text(edit(text))
    assert path.read_text() != text
    broken(message=message)


@pytest.mark.parametrize(
    "name", ["graphs/thinker.onnx", "graphs/dit.onnx.data", "tokenizer.json", "embeddings/talker.npy"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_missing_or_truncated_file(bundle: Path, broken: Command, name: str, damage: str) -> None:
    path = bundle / name
    if damage == "missing":
        path.unlink()
        broken(message=rf"{name}, listed in .*bundle\.json, cannot be opened: .* export the bundle again")
    else:
        path.write_bytes(path.read_bytes()[:-100])
        broken(message=rf"{name} in .* bytes; bundle\.json lists .*truncated .* export the bundle again")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("graphs/thinker.onnx", r"thinker\.onnx"),
        ("graphs/bigvgan.onnx", r"bigvgan\.onnx"),
        ("tokenizer.json", r"tokenizer\.json"),
        ("embeddings/thinker.npy", r"embedding table .* [Ee]xport the bundle again"),
        ("voices/0-chelsie.npz", r"voice 'Chelsie' .*export the bundle again"),
    ],
)
def test_file_of_the_right_size_and_the_wrong_content(
    bundle: Path, broken: Command, refused: Command, name: str, message: str
) -> None:
    path = bundle / name
    path.write_bytes(np.random.default_rng(2).bytes(path.stat().st_size))
    broken(message=message, partial=name == "graphs/bigvgan.onnx")  # loaded when the first sound is due
    refused("inspect", bundle, "--verify", "--quiet", message=rf"{name} in .* has sha256 .* changed or damaged")
