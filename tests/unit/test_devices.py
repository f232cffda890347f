"""Device profiles: every shipped file loads and earns its numbers; a bad file is refused at its line; the host is detected."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.errors import RecipeError, UnknownName
from edgekd.profile.device import HOST, device_ids, load_device, read_device, same_machine
from edgekd.profile.host import Machine, detect, identity, profile_of
from edgekd.profile.schema import DeviceProfile, numbers
from edgekd.shipped import shipped_dir

SHIPPED = [i for i in device_ids() if i != HOST]
RPI5 = (shipped_dir("hardware") / "rpi5.yaml").read_text(encoding="utf-8")


def _refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "rpi5.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        read_device(path)
    assert error.value.exit_code == 2
    return str(error.value)


def _machine(**changes: object) -> Machine:
    facts = {"cpu": "a cpu", "vendor": "GenuineIntel", "family": 6, "isa": ("x86-64", "avx2", "fma"), "cores": 4, "clock_ghz": 3.0}
    return Machine(**{**facts, "memory_gib": 8.0, "l2_kib": 512.0, "llc_kib": 8192.0, "gpu": None, **changes})  # type: ignore[arg-type]


def test_every_file_of_the_folder_is_listed_after_the_host() -> None:
    files = list(shipped_dir("hardware").glob("*"))
    assert device_ids() == [HOST, *sorted(f.stem for f in files)]
    assert len(files) >= 5


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_has_its_file_name_as_id_and_a_source_for_every_number(name: str) -> None:
    profile = load_device(name)
    stated = {p.field: p for p in profile.provenance}
    assert profile.id == name
    assert dict(numbers(profile)) == {field: p.value for field, p in stated.items()}
    assert {f for f, _ in numbers(profile)} >= {"compute.fp32_tflops", "memory.bandwidth_gbs"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_peak_or_bandwidth_from_memory_makes_confidence_low(name: str) -> None:
    profile = load_device(name)
    unchecked = [p for p in profile.provenance if p.kind == "memory" and p.field.startswith(("compute.", "memory.bandwidth"))]
    assert not unchecked or profile.confidence == "low"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_alias_leads_to_its_device_and_no_two_devices_share_one(name: str) -> None:
    profile = load_device(name)
    assert all(load_device(alias).id == name for alias in profile.aliases)
    assert not set(profile.aliases) & set(device_ids())


@pytest.mark.parametrize(
    ("name", "flavour"),
    [("x86-vnni", "u8s8"), ("rpi5", "s8s8"), ("jetson-orin-nano", "s8s8"), ("rtx4090", "s8s8"), ("nvidia-h200", "s8s8")],
)
def test_quantization_flavour_follows_from_the_device(name: str, flavour: str) -> None:
    assert load_device(name).flavour == flavour


def test_x86_without_vnni_gets_seven_bit_weights_and_tensorrt_never_unsigned_activations() -> None:
    old, new = profile_of(_machine()), profile_of(_machine(isa=("x86-64", "avx2", "avx_vnni")))
    assert (old.flavour, new.flavour) == ("u8s8_reduced", "u8s8")
    assert new.flavour_for("tensorrt") == "s8s8"


def test_unknown_device_is_refused_with_the_nearest_id() -> None:
    with pytest.raises(UnknownName, match="did you mean 'rpi5'") as error:
        load_device("rpi")
    assert error.value.hint == "list them: edgekd devices list"


def test_only_the_host_is_this_machine() -> None:
    assert same_machine(load_device(HOST))
    assert not any(same_machine(load_device(name)) for name in SHIPPED)


@pytest.mark.parametrize(
    ("seen", "device"), [("NVIDIA H200", "nvidia-h200"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA H2", None), ("NVIDIA GPU", None)]
)
def test_a_card_that_the_driver_names_is_this_machine(monkeypatch: pytest.MonkeyPatch, seen: str, device: str | None) -> None:
    monkeypatch.setattr("edgekd.profile.device.detect", lambda: _machine(gpu=seen))
    assert [name for name in SHIPPED if same_machine(load_device(name))] == ([device] if device else [])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("fp32_tflops: 0.154", "fp32_tflops: 0.2", r"rpi5\.yaml:\d+:\d+: compute\.fp32_tflops: is 0\.2, its provenance says 0\.154"),
        ("usable_gib: null", "usable_gib: 7.5", r"rpi5\.yaml:\d+:\d+: memory\.usable_gib: 7\.5 has no provenance entry"),
        ("confidence: low", "confidence: high", r"rpi5\.yaml:\d+:\d+: confidence: must be low while"),
        (
            "bandwidth_gbs: 17.1",
            "bandwith_gbs: 17.1",
            r"rpi5\.yaml:\d+:\d+: memory\.bandwith_gbs: unknown field; did you mean 'bandwidth_gbs'\?",
        ),
        ("kind: cpu", "kind: toaster", r"rpi5\.yaml:6:1: kind: "),
        ("id: rpi5", "id: rpi6", r"rpi5\.yaml:2:\d+: id 'rpi6' differs from the file's name"),
        ("control: cpufreq", "control: rm -rf /", r"rpi5\.yaml:\d+:\d+: power\.control: "),
        ("[CPUExecutionProvider]", "[EvilProvider]", r"rpi5\.yaml:\d+:\d+: runtimes\.0\.ep\.0: "),
        ("fp32_tflops: 0.154", "fp32_tflops: -1", r"rpi5\.yaml:\d+:\d+: compute\.fp32_tflops: "),
        ("fp32_tflops: 0.154", "fp32_tflops: .inf", r"rpi5\.yaml:\d+:\d+"),
        ("variant: 8gb, active cooler", "variant: !!python/name:os.system", r"rpi5\.yaml:3:\d+"),
        ("transport: ssh", "transport: ssh, host: me@there", r"rpi5\.yaml:\d+:\d+: access\.host: unknown field"),
    ],
)
def test_bad_file_is_refused_at_the_line_of_what_is_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in RPI5
    assert re.search(said, _refused(tmp_path, RPI5.replace(old, new, 1)))


@pytest.mark.parametrize("text", ["", "[]", "just words", "a: 1", "\x00", "{" * 500, "&a [*a]"])
def test_a_file_that_is_no_profile_at_all_is_refused_with_a_place(tmp_path: Path, text: str) -> None:
    assert "rpi5.yaml:1:" in _refused(tmp_path, text)


def test_provenance_of_something_that_holds_no_number_is_refused(tmp_path: Path) -> None:
    extra = "  - {field: compute.fp8_tflops, value: 1, source: a wish, kind: vendor, checked: 2026-11-22}\nconfidence"
    assert "names 'compute.fp8_tflops', which holds no number" in _refused(tmp_path, RPI5.replace("confidence", extra, 1))


def test_host_profile_says_where_its_numbers_come_from_and_claims_no_unmeasured_one() -> None:
    profile = load_device(HOST)
    assert isinstance(profile, DeviceProfile)
    assert {p.kind for p in profile.provenance if p.field.startswith("compute.")} <= {"derived"}
    assert {p.kind for p in profile.provenance if p.field == "memory.bandwidth_gbs"} == {"derived"}


@pytest.mark.parametrize(
    ("changes", "flops_per_cycle", "int8_gain"),
    [
        ({}, 32, 1.5),
        ({"isa": ("x86-64",)}, 8, 1.5),
        ({"isa": ("x86-64", "avx2", "avx512f", "avx512_vnni")}, 64, 4),
        ({"isa": ("x86-64", "avx2", "avx512f", "avx512_vnni"), "vendor": "AuthenticAMD", "family": 25}, 32, 4),
        ({"isa": ("x86-64", "avx2", "avx512f", "avx512_vnni"), "vendor": "AuthenticAMD", "family": 26}, 64, 4),
        ({"isa": ("armv8", "neon", "fp16", "dotprod")}, 16, 4),
        ({"isa": ("armv8", "neon")}, 16, 2),
    ],
)
def test_peaks_are_cores_times_clock_times_vector_width(changes: dict[str, object], flops_per_cycle: int, int8_gain: float) -> None:
    compute = profile_of(_machine(**changes)).compute
    assert compute.fp32_tflops == pytest.approx(flops_per_cycle * 3.0 * 4 / 1e3)
    assert compute.int8_tops == pytest.approx(int8_gain * flops_per_cycle * 3.0 * 4 / 1e3)


def test_unknown_clock_leaves_the_peaks_null() -> None:
    assert profile_of(_machine(clock_ghz=None)).compute.fp32_tflops is None


def test_detection_reads_kernel_files_and_survives_their_absence(tmp_path: Path) -> None:
    block = "processor\t: {i}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel name\t: A CPU\n"
    block += "cpu MHz\t\t: 2500.0\nphysical id\t: 0\ncore id\t\t: {c}\nflags\t\t: fma avx2 avx_vnni\n"
    (tmp_path / "cpuinfo").write_text("\n".join(block.format(i=i, c=i // 2) for i in range(4)))
    (tmp_path / "meminfo").write_text("MemTotal:       8388608 kB\nMemFree: 1 kB\n")
    found = detect(tmp_path, tmp_path)
    assert (found.cpu, found.clock_ghz, found.memory_gib, found.gpu) == ("A CPU", 2.5, 8.0, None)
    assert found.cores <= 2  # two hyper-threads each
    assert {"avx2", "avx_vnni"} <= set(found.isa)
    nothing = detect(tmp_path / "none", tmp_path / "none")
    assert nothing.cores >= 1
    assert nothing.clock_ghz is None


def test_nvidia_driver_names_the_gpu(tmp_path: Path) -> None:
    info = tmp_path / "driver/nvidia/gpus/0000:01:00.0"
    info.mkdir(parents=True)
    (tmp_path / "driver/nvidia/version").write_text("NVRM version: 1.2.3\n")
    (info / "information").write_text("Model: \t\t NVIDIA Something\nIRQ: 1\n")
    assert detect(tmp_path, tmp_path).gpu == "NVIDIA Something"


def test_identity_is_stable_and_holds_no_host_name() -> None:
    assert identity() == identity()
    assert set(identity()) == {"cpu", "isa", "cores", "arch", "gpu"}
    assert platform.node() not in map(str, identity().values())


def test_listing_and_loading_devices_imports_no_heavy_library() -> None:
    code = (
        "import sys; from edgekd.profile.device import *; [load_device(i) for i in device_ids()];"
        "sys.exit(','.join(m for m in ('torch', 'timm', 'numpy', 'onnx', 'onnxruntime') if m in sys.modules) or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
