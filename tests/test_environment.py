import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import get_args

import pytest
import torch

import vitopt
from vitopt.environment import devices, launch, libraries, machine, support
from vitopt.errors import UnsupportedError
from vitopt.formats import Format
from vitopt.recipe import ENGINES, Attention, SdpaKernel

VERSIONS = libraries.versions()
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    """A machine with CUDA devices of a compute capability, as far as questions about it go."""

    def pretend(capability: tuple[int, int] = (9, 0), count: int = 1) -> torch.device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        return CUDA

    return pretend


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def packages(monkeypatch):
    """Pretends that packages are installed or are not."""

    def pretend(**there: bool) -> None:
        find = importlib.util.find_spec

        def fake(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
            if name in there:
                return importlib.machinery.ModuleSpec(name, None, origin=f"{name}.py") if there[name] else None
            return find(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", fake)

    return pretend


def test_auto_is_the_cpu_without_cuda(no_cuda):
    assert devices.resolve_device() == CPU
    assert devices.resolve_device("cpu") == CPU


def test_a_gpu_that_torch_cannot_use_is_not_passed_over_in_silence(no_cuda, monkeypatch, caplog):
    monkeypatch.setattr(devices, "driver_version", lambda: "470.57.02")
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "the NVIDIA driver on your system is too old")
    assert devices.resolve_device() == CPU
    told = "there is an NVIDIA driver, but this runs on the CPU: the NVIDIA driver on your system is too old"
    assert caplog.messages == [told]
    caplog.clear()
    assert devices.resolve_device("cpu") == CPU  # asked for, so nothing is wrong
    assert caplog.messages == []


def test_auto_is_this_process_own_cuda_device(cuda, monkeypatch):
    cuda(count=4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert devices.resolve_device("auto") == torch.device("cuda", 0)
    assert devices.resolve_device("cuda:3") == torch.device("cuda", 3)
    assert devices.resolve_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert devices.resolve_device("auto") == torch.device("cuda", 2)
    assert devices.resolve_device("cuda") == torch.device("cuda", 2)
    assert devices.resolve_device("cuda:1") == torch.device("cuda", 1)


def test_the_device_asked_for_becomes_the_current_one(cuda, monkeypatch):
    cuda(count=2)
    made_current = []
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    devices.resolve_device("cuda:1")
    devices.resolve_device("cpu")
    assert made_current == [torch.device("cuda", 1)]


def test_a_cpu_build_of_torch_is_named(no_cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UnsupportedError) as caught:
        devices.resolve_device("cuda")
    assert str(caught.value) == f"device cuda: torch {torch.__version__} is built without CUDA; use --device cpu"


def test_a_missing_driver_is_named(no_cuda, monkeypatch):
    def count() -> int:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old.\nUpdate it.", stacklevel=1)
        return 0

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", count)
    with pytest.raises(UnsupportedError) as caught:
        devices.resolve_device("cuda:0")
    assert str(caught.value).startswith("device cuda:0: The NVIDIA driver on your system is too old")
    assert str(caught.value).endswith("; use --device cpu")
    assert "Update it" not in str(caught.value)


def test_a_machine_without_a_cuda_device_is_told_how_to_look(no_cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UnsupportedError, match=r"torch sees no CUDA device \(check `nvidia-smi`\); use --device cpu"):
        devices.resolve_device("cuda")


def test_a_cuda_device_that_is_not_there_is_named(cuda):
    cuda(count=2)
    with pytest.raises(UnsupportedError, match=r"device cuda:2 is not there: 2 CUDA device\(s\)"):
        devices.resolve_device("cuda:2")


def test_early_launches_need_a_card_a_compiler_and_an_option_for_them(cuda, monkeypatch):
    monkeypatch.setattr(support, "installed", lambda package: True)
    assert support.why_not_dependent_launch(cuda((9, 0))) is None
    assert "8.9" in support.why_not_dependent_launch(cuda((8, 9)))
    assert "cpu" in support.why_not_dependent_launch(CPU)
    monkeypatch.setattr(torch._inductor, "list_options", lambda: ["max_autotune"])
    assert devices.DEPENDENT_LAUNCH in support.why_not_dependent_launch(cuda((9, 0)))


def test_fused_kernels_need_a_card_and_triton(cuda, monkeypatch):
    monkeypatch.setattr(support, "installed", lambda package: package == "triton")
    assert support.why_not_fused_kernels(cuda((8, 0))) is None
    assert "7.5" in support.why_not_fused_kernels(cuda((7, 5)))
    assert "cpu" in support.why_not_fused_kernels(CPU)
    monkeypatch.setattr(support, "installed", lambda package: False)
    assert "triton" in support.why_not_fused_kernels(cuda((8, 0)))


def test_compute_capability(cuda):
    assert devices.compute_capability(cuda((8, 6))) == (8, 6)
    assert devices.compute_capability(CPU) is None


@pytest.mark.parametrize(
    ("format", "capability", "reason"),
    [
        ("fp32", (7, 0), None),
        ("fp16", (7, 0), None),
        ("bf16", (7, 5), "compute capability 7.5 is below 8.0"),
        ("bf16", (8, 0), None),
        ("nf4", (7, 0), None),
        ("int8", (7, 5), None),
        ("w8a8", (7, 5), "compute capability 7.5 is below 8.0"),
        ("w8a8", (8, 0), None),
        ("fp8", (8, 6), "compute capability 8.6 is below 8.9"),
        ("fp8", (8, 9), None),
        ("fp8", (9, 0), None),
        # Versions are compared as numbers, not as text.
        ("fp8", (10, 0), None),
    ],
)
def test_formats_on_cuda(cuda, packages, format, capability, reason):
    packages(torchao=True, bitsandbytes=True)
    assert support.why_not_format(format, cuda(capability)) == reason


@pytest.mark.parametrize(
    ("format", "package"), [("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), ("w8a8", "torchao"), ("fp8", "torchao")]
)
def test_formats_need_their_package(cuda, packages, format, package):
    packages(**{package: False})
    assert support.why_not_format(format, cuda()) == f"{package} is not installed (pip install {package})"


def test_formats_on_the_cpu(packages):
    packages(torchao=True, bitsandbytes=True)
    reasons = {format: support.why_not_format(format, CPU) for format in get_args(Format)}
    assert reasons.pop("fp8") == "fp8 arithmetic needs a CUDA device of compute capability 8.9"
    assert reasons.pop("int4") == "torchao's packed int4 weights need a CUDA device of compute capability 8.0"
    assert set(reasons.values()) == {None}


def test_fp8_on_the_cpu_is_refused_with_the_nearest_that_can(packages):
    packages(torchao=True)
    with pytest.raises(UnsupportedError) as caught:
        support.require_format("fp8", CPU)
    assert str(caught.value) == (
        "format fp8 cannot run on cpu: fp8 arithmetic needs a CUDA device of compute capability 8.9; "
        "the nearest that can is w8a8"
    )
    support.require_format("w8a8", CPU)


def test_bf16_on_an_old_gpu_is_refused_with_the_nearest_that_can(cuda):
    device = cuda((7, 5))
    with pytest.raises(UnsupportedError) as caught:
        support.require_format("bf16", device)
    assert str(caught.value) == (
        "format bf16 cannot run on cuda:0: compute capability 7.5 is below 8.0; the nearest that can is fp16"
    )
    support.require_format("fp16", device)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_plain_attention_runs_everywhere(cuda, attention):
    assert support.why_not_attention(attention, CPU, torch.float32) is None
    assert support.why_not_attention(attention, cuda((6, 0)), torch.float32) is None


@pytest.mark.parametrize(
    ("capability", "there", "dtype", "reason"),
    [
        ((8, 0), True, torch.bfloat16, None),
        ((9, 0), True, torch.float16, None),
        ((7, 5), True, torch.float16, "compute capability 7.5 is below 8.0"),
        ((8, 0), False, torch.float16, "flash_attn is not installed (pip install flash-attn)"),
        ((8, 0), True, torch.float32, "FlashAttention-2 computes in 16 bit only, the model is fp32"),
    ],
)
def test_flash_attention_on_cuda(cuda, packages, capability, there, dtype, reason):
    packages(flash_attn=there)
    assert support.why_not_attention("flash_attention_2", cuda(capability), dtype) == reason


def test_flash_attention_needs_cuda(packages):
    packages(flash_attn=True)
    assert support.why_not_attention("flash_attention_2", CPU, torch.bfloat16) == (
        "FlashAttention-2 needs a CUDA device"
    )


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_plain_kernels_run_everywhere(cuda, kernel):
    assert support.why_not_kernel(kernel, CPU, torch.float32) is None
    assert support.why_not_kernel(kernel, cuda((6, 0)), torch.float32) is None


def test_kernels_on_the_cpu():
    reasons = {name: support.why_not_kernel(name, CPU, torch.float32) for name in get_args(SdpaKernel)}
    assert {name for name, reason in reasons.items() if reason is None} == {"auto", "flash", "math"}
    assert reasons["cudnn"] == "the cudnn kernel needs a CUDA device"
    assert reasons["efficient"] == "the efficient kernel needs a CUDA device"


@pytest.mark.parametrize(
    ("kernel", "capability", "dtype", "reason"),
    [
        ("flash", (8, 0), torch.bfloat16, None),
        ("flash", (9, 0), torch.float16, None),
        ("flash", (7, 5), torch.float16, "compute capability 7.5 is below 8.0"),
        ("flash", (9, 0), torch.float32, "the flash kernel computes in 16 bit only, the model is fp32"),
        ("cudnn", (9, 0), torch.bfloat16, None),
        ("cudnn", (7, 0), torch.bfloat16, "compute capability 7.0 is below 8.0"),
        ("cudnn", (9, 0), torch.float32, "the cudnn kernel computes in 16 bit only, the model is fp32"),
        ("efficient", (6, 0), torch.float32, None),
        ("efficient", (9, 0), torch.bfloat16, None),
    ],
)
def test_kernels_on_cuda(cuda, monkeypatch, kernel, capability, dtype, reason):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert support.why_not_kernel(kernel, cuda(capability), dtype) == reason


def test_the_cudnn_kernel_needs_cudnn(cuda, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert support.why_not_kernel("cudnn", cuda(), torch.bfloat16) == "torch finds no cuDNN"
    assert support.why_not_kernel("flash", cuda(), torch.bfloat16) is None


def test_the_profiler_is_quiet(capfd):
    libraries.quiet_libraries()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        torch.ones(3)
    assert capfd.readouterr() == ("", "")


def test_bf16_arithmetic_of_gpus(cuda):
    assert devices.computes_in_bf16(cuda((8, 0))) is True
    assert devices.computes_in_bf16(cuda((7, 5))) is False


@pytest.mark.parametrize(
    ("flags", "able"),
    [("fpu avx512f", False), ("fpu avx512_bf16", True), ("fpu amx_bf16 amx_tile", True), ("fpu avx512_bf16x", False)],
)
def test_bf16_arithmetic_of_processors(tmp_path, monkeypatch, flags, able):
    (tmp_path / "cpuinfo").write_text(f"model name\t: unknown\nflags\t\t: {flags}\n")
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path / "cpuinfo")
    assert devices.computes_in_bf16(CPU) is able


def test_processor_name(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("model name\t: unknown\nmodel name\t: Fast CPU: 3 GHz\n")
    assert devices.processor_name() == "Fast CPU: 3 GHz"
    (tmp_path / "cpuinfo").unlink()
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    monkeypatch.setattr(devices.platform, "machine", lambda: "riscv64")
    assert devices.processor_name() == "riscv64"


def test_versions_tell_absent_libraries_from_present_ones(monkeypatch):
    monkeypatch.setattr(libraries, "LIBRARIES", ("torch", "no-such-library"))
    assert libraries.versions() == {"torch": torch.__version__, "no-such-library": None}


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(vitopt, "__version__", "99"),
        lambda patch: patch.setattr(machine, "code_digest", lambda: "other code"),
        lambda patch: patch.setattr(devices, "processor_name", lambda: "another processor"),
        *(
            lambda patch, name=name: patch.setattr(machine, "versions", lambda: VERSIONS | {name: "99"})
            for name in ("torch", "transformers", "numpy", "pillow", "torchvision")
        ),
    ],
)
def test_provenance_changes_with_everything_that_changes_results(change, monkeypatch):
    before = machine.provenance(CPU)
    assert machine.provenance(CPU) == before
    change(monkeypatch)
    assert machine.provenance(CPU) != before


def test_provenance_knows_the_device_of_what_is_measured(cuda, monkeypatch):
    gpu = types.SimpleNamespace(name="H200", major=9, minor=0, total_memory=1, multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert machine.provenance(cuda())["gpu"]["name"] == "H200"
    assert machine.provenance(cuda()) != machine.provenance(CPU)
    assert set(machine.provenance(CPU)) - set(machine.provenance()) == {"device", "processor", "gpu"}


def test_the_code_digest_follows_the_code_that_makes_results(tmp_path, monkeypatch):
    package = tmp_path / "vitopt"
    for name in ("environment/machine.py", "cli/common.py", "measure/accuracy.py", "report/page.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    monkeypatch.setattr(machine, "__file__", str(package / "environment" / "machine.py"))
    digest = machine.code_digest.__wrapped__
    before = digest()
    (package / "cli/common.py").write_text("# changed")
    (package / "report/page.py").write_text("# changed")
    assert digest() == before
    (package / "measure/accuracy.py").write_text("# changed")
    changed = digest()
    assert changed != before
    (package / "measure/accuracy.py").rename(package / "measure/other.py")
    assert digest() not in (before, changed)


def test_description_of_the_cpu():
    facts = machine.describe(CPU)
    assert facts["vitopt"] == vitopt.__version__
    assert (facts["device"], facts["gpu"]) == ("cpu", None)
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["libraries"]["transformers"]


def test_diagnosis_has_a_line_for_everything_that_can_be_asked_for(no_cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    facts = machine.diagnose(CPU)
    assert set(facts) == {"machine", "libraries", "can_run"}
    assert set(facts["libraries"]) == set(libraries.LIBRARIES)
    wanted = {f"format {name}" for name in get_args(Format)} | {f"attention {name}" for name in get_args(Attention)}
    wanted |= {f"sdpa kernel {name}" for name in get_args(SdpaKernel) if name != "auto"}
    wanted |= {"torch.compile", *(f"engine {name}" for name in ENGINES)}
    assert set(facts["can_run"]) == wanted
    assert facts["can_run"]["sdpa kernel flash"] is None
    assert facts["can_run"]["sdpa kernel cudnn"] == "the cudnn kernel needs a CUDA device"
    assert facts["can_run"]["format fp32"] is None
    assert facts["can_run"]["attention flash_attention_2"] == "FlashAttention-2 needs a CUDA device"
    assert facts["machine"]["cuda"] == f"torch {torch.__version__} is built without CUDA"
    assert {"python", "processor", "device", "bf16 arithmetic"} <= set(facts["machine"])


def test_diagnosis_of_a_gpu(cuda, monkeypatch):
    properties = types.SimpleNamespace(name="Fast GPU", major=9, minor=0, total_memory=2**37, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    told = machine.diagnose(cuda())["machine"]
    assert told["device"] == "cuda:0"
    assert told["gpu name"] == "Fast GPU"
    assert told["gpu compute_capability"] == "9.0"
    assert told["gpu memory_bytes"] == 2**37
    assert "bf16 arithmetic" not in told


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26\nGCC version:", "570.124.06"),
        ("NVRM version: something else", None),
        (None, None),
    ],
)
def test_driver_version(tmp_path, monkeypatch, text, version):
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path / "version")
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert devices.driver_version() == version


def test_bitsandbytes_leaves_the_imported_modules_as_they_were(monkeypatch):
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert libraries.import_bitsandbytes().__name__ == "bitsandbytes"
    assert "kernels" not in sys.modules
    own = types.ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "kernels", own)
    libraries.import_bitsandbytes()
    assert sys.modules["kernels"] is own


def test_bitsandbytes_never_imports_kernels(tmp_path):
    # `kernels` would download: here it leaves a trace instead.
    trace = tmp_path / "trace"
    (tmp_path / "kernels.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    code = "from vitopt.environment import libraries; print(libraries.import_bitsandbytes().__name__)"
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["bitsandbytes"]
    assert not trace.exists()


def test_one_process_is_the_main_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch.process_share() == (0, 1)
    assert launch.is_main_process()
    assert launch.gather_objects({"a": 1}) == [{"a": 1}]
    launch.wait_for_all()


def test_several_processes_share_the_work(monkeypatch):
    state = types.SimpleNamespace(process_index=1, num_processes=2)
    monkeypatch.setattr(launch, "_distributed_state", lambda: state)
    assert launch.process_share() == (1, 2)
    assert not launch.is_main_process()
