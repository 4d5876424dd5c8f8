"""What a machine should install, by what its driver and system say; no GPU is asked."""

from __future__ import annotations

import pytest
import tomllib
from omniport.export.devices.catalog import TARGETS
from omniport.export.devices.install import Machine, advise
from support.paths import REPOSITORY

from scripts import install_backends
from scripts.install_backends import Step, decide, describe

INDEX = ("--extra-index-url", "https://pypi.nvidia.com")


@pytest.mark.parametrize(
    ("machine", "onnxruntime", "builder", "extra", "options"),
    [
        (Machine("linux", "x86_64", None), "ort", "", "", ()),
        (Machine("linux", "x86_64", "8.9"), "ort-gpu", "tensorrt-rtx", "rtx", ()),
        (Machine("linux", "x86_64", "12.0"), "ort-gpu", "tensorrt-rtx", "rtx", ()),
        (Machine("win32", "AMD64", "8.6"), "ort-gpu", "tensorrt-rtx", "rtx", ()),
        (Machine("linux", "x86_64", "9.0"), "ort-gpu", "tensorrt", "trt", INDEX),
        (Machine("linux", "x86_64", "8.0"), "ort-gpu", "tensorrt", "trt", INDEX),
        (Machine("linux", "aarch64", "9.0"), "ort", "tensorrt", "trt", INDEX),
        (Machine("linux", "aarch64", "12.1"), "ort", "tensorrt-rtx", "rtx", ()),
        (Machine("linux", "aarch64", "8.7", jetson=True), "ort", "tensorrt", "", ()),
        (Machine("linux", "aarch64", "11.0", jetson=True), "ort", "tensorrt", "", ()),
    ],
    ids=["none", "4090", "5090", "Windows", "H100", "A100", "GH200", "Spark", "Orin", "Thor"],
)
def test_what_to_install(
    machine: Machine, onnxruntime: str, builder: str, extra: str, options: tuple[str, ...]
) -> None:
    advice = advise(machine)
    assert (advice.onnxruntime, advice.builder, advice.extra, advice.options) == (onnxruntime, builder, extra, options)
    assert ("apt-get install nvidia-jetpack" in advice.how) is machine.jetson
    assert describe(machine, advice)


def test_the_builder_is_the_catalogue_s() -> None:
    for target in TARGETS.values():
        machine = Machine("linux", "x86_64", target.capability, jetson=bool(target.jetpacks))
        assert advise(machine).builder == target.builder


def test_gpu_check_replaces_the_cpu_s_package() -> None:
    gpu = advise(Machine("linux", "x86_64", "9.0"))
    first, second, third = decide(gpu, ["onnxruntime"], [], gpu_check=True)
    assert first.pip == ("uninstall", "-y", "onnxruntime", "onnxruntime-gpu")
    assert second.pip[-1].endswith("[ort-gpu]")
    assert third == Step(("install", "-e", f"{REPOSITORY}[trt]", *INDEX), needed=False)
    assert decide(gpu, ["onnxruntime-gpu"], ["tensorrt"], gpu_check=True) == []


def test_a_plain_install_leaves_what_is_there() -> None:
    gpu, cpu = advise(Machine("linux", "x86_64", "9.0")), advise(Machine("linux", "x86_64", None))
    assert decide(gpu, ["onnxruntime"], [], gpu_check=False) == []
    assert decide(cpu, ["onnxruntime-gpu"], [], gpu_check=False) == []
    (only,) = decide(cpu, [], [], gpu_check=False)
    assert only.pip[-1].endswith("[ort]")
    assert [step.pip[0] for step in decide(cpu, ["onnxruntime", "onnxruntime-gpu"], [], gpu_check=False)] == [
        "uninstall",
        "install",
    ]


def test_the_script_says_what_it_decides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(install_backends, "this_machine", lambda: Machine("linux", "x86_64", "9.0"))
    monkeypatch.setattr(install_backends, "installed", lambda: {"onnxruntime": "1.32.0"})
    assert install_backends.main(["--gpu-check", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a GPU of compute capability 9.0 on x86_64: onnxruntime-gpu; tensorrt: pip install")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in out


def test_make_gpu_check_installs_first() -> None:
    rule = (REPOSITORY / "Makefile").read_text().split("\ngpu-check:")[1].split("\n\n")[0]
    assert rule.splitlines()[1].endswith("scripts.install_backends --gpu-check")


def test_no_extra_brings_an_onnxruntime_but_the_two_that_are_it() -> None:
    """They overwrite each other's files, so neither may come along with something else."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def brings(extra: str) -> set[str]:
        found = set()
        for requirement in extras[extra]:
            if requirement.startswith("omniport["):
                names = requirement[len("omniport[") : requirement.index("]")].split(",")
                found |= {name for inner in names for name in brings(inner)}
            elif requirement.startswith("onnxruntime"):
                found.add(extra)
        return found

    assert {extra for extra in extras if brings(extra)} == {"ort", "ort-gpu"}
    assert all("[cuda,cudnn]" in requirement for requirement in extras["ort-gpu"])
