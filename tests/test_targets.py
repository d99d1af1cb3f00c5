"""Target strings, and the machines they stand for."""

from __future__ import annotations

import importlib.resources
import re

import pytest

from tvm_vitq import cpu, targets
from tvm_vitq.errors import VitqError

AARCH64 = "llvm -mtriple=aarch64-linux-gnu"
X86 = "llvm -mtriple=x86_64-linux-gnu"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("llvm -mtriple=aarch64", "aarch64-neon"),
        ("llvm -mtriple=arm64-linux-gnu", "aarch64-neon"),
        (f"{AARCH64} -mcpu=cortex-a53", "aarch64-neon"),
        (f"{AARCH64} -mcpu=cortex-a72", "aarch64-neon"),
        (f"{AARCH64} -mcpu=cortex-a76", "aarch64-dotprod"),
        (f"{AARCH64} -mcpu=neoverse-n1", "aarch64-dotprod"),
        (f"{AARCH64} -mcpu=apple-m1", "aarch64-dotprod"),
        (f"{AARCH64} -mcpu=cortex-a710", "aarch64-i8mm"),
        (f"{AARCH64} -mcpu=neoverse-v1", "aarch64-i8mm"),
        (f"{AARCH64} -mcpu=neoverse-n2", "aarch64-i8mm"),
        (f"{AARCH64} -mcpu=cortex-a76 -mattr=+v8.2a,+dotprod", "aarch64-dotprod"),
        (f"{AARCH64} -mcpu=cortex-a76 -mattr=-dotprod", "aarch64-neon"),
        (f"{AARCH64} -mattr=+v8.2a,+dotprod", "aarch64-dotprod"),
        (f"{AARCH64} -mcpu cortex-a76 -device=arm_cpu", "aarch64-dotprod"),
        ("raspberry-pi/4b-aarch64", "aarch64-neon"),
        (X86, "x86-64"),
        (f"{X86} -mcpu=nehalem", "x86-64"),
        (f"{X86} -mcpu=haswell", "x86-avx2"),
        (f"{X86} -mcpu=skylake-avx512 -num-cores=2", "x86-avx2"),
        (f"{X86} -mcpu=alderlake", "x86-avxvnni"),
        (f"{X86} -mcpu=cascadelake", "x86-avx512vnni"),
        (f"{X86} -mcpu=znver4", "x86-avx512vnni"),
        (f"{X86} -mattr=+avx2", "x86-avx2"),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}, "aarch64-dotprod"),
        ({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mattr": ["+avx2"]}, "x86-avx2"),
        ('{"kind": "llvm", "mtriple": "aarch64-linux-gnu"}', "aarch64-neon"),
    ],
)
def test_profile_of_target(text, key):
    assert targets.parse(text).key == key


@pytest.mark.parametrize("isa", targets.ISAS, ids=lambda isa: isa.key)
def test_every_key_is_an_alias_of_its_own_instruction_set(isa):
    profile = targets.parse(isa.key)
    assert (profile.isa, profile.key, profile.arch) == (isa.name, isa.key, isa.arch)
    # What the profile prints, its JSON and its TVM target lead back to it.
    assert targets.parse(str(profile)) == profile
    assert targets.TargetProfile.from_json(profile.to_json()) == profile
    assert targets.parse(profile.target) == profile
    assert targets.parse(profile) is profile
    assert hash(targets.parse(isa.key)) == hash(profile)
    assert profile.target is profile.target


def test_llvm_alone_is_this_machine_with_all_its_instructions():
    import tvm

    profile = targets.parse("llvm")
    here = cpu.host()
    assert profile.arch == here.arch
    assert profile.missing_here() == ()
    assert set(profile.features) == here.flags & set(cpu.KERNEL_NAME[here.arch].values())
    for same in ("native", "host", {"kind": "llvm"}, tvm.target.Target("llvm")):
        assert targets.parse(same) == profile
    assert targets.parse("llvm -num-cores=3").threads == 3


def test_hidden_features_of_a_virtual_machine_are_not_used(monkeypatch):
    here = cpu.host()
    if "avx2" not in here.flags:
        pytest.skip("the test hides AVX features, this machine has none")
    few = cpu.HostCpu(here.arch, frozenset(flag for flag in here.flags if not flag.startswith("avx")))
    monkeypatch.setattr(cpu, "host", lambda: few)
    profile = targets.parse("llvm")
    assert profile.isa == "x86_64"
    assert "-avx2" in profile.mattr
    assert not any(flag.startswith("avx") for flag in profile.features)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("", "malformed"),
        ('llvm "', "malformed"),
        ("llvm mcpu=cortex-a76", r"malformed[\s\S]*got: mcpu=cortex-a76"),
        ("llvm -mcpu", "no value"),
        ("llvm -mcpu=a -mcpu=b", "twice"),
        ("lvm -mcpu=haswell", "did you mean llvm"),
        ("cuda", "not available yet"),
        ({"kind": "vta", "config": 5}, "no VTA configuration"),
        ("vta foo", "-driver"),
        ("vta -config=missing.json", "cannot read the VTA configuration"),
        ("vta -config=pynq-1x17_i8w8a32_15_15_18_17", "cannot read the VTA configuration"),
        ("vta -residual=host", r"residual sums[\s\S]*vta or cpu"),
        ("cuda -arch=sm_90", "not available yet"),
        ("llvm -driver=a.so", "unknown target option"),
        ("llvm -mcup=haswell", "did you mean -mcpu"),
        ("llvm -fast-math=1", "fast-math"),
        ("llvm -num-cores=0", "positive"),
        ("llvm -num-cores=two", "positive"),
        (f"{AARCH64} -mcpu=cortex-a77x", "cortex-a77"),
        (f"{X86} -mcpu=cortex-a76", "add -mtriple=aarch64-linux-gnu"),
        (f"{X86} -mcpu=pentium", "smallest kernels"),
        (f"{X86} -mattr=+avx3", "avx2"),
        (f"{X86} -mattr=avx2", r"\+feature or -feature"),
        ({"kind": "llvm", "mattr": 3}, r"\+feature or -feature"),
        ("llvm -mtriple=riscv64-linux-gnu", "riscv64.*\n.*aarch64-linux-gnu"),
        ("llvm -mtriple=armv7-linux-gnueabihf", "no kernels for this architecture"),
        ("llvm -mtriple=aarch64-apple-darwin", "for Linux"),
        ("raspberry-pi/4b-aarch46", "raspberry-pi/4b-aarch64"),
        ('{"kind": "llvm"', "not valid JSON"),
        ({"mcpu": "haswell"}, "unknown target kind"),
        (7, "wrong type"),
    ],
)
def test_errors_name_the_fault(target, words):
    with pytest.raises(VitqError) as caught:
        targets.parse(target)
    assert re.search(words, str(caught.value)), caught.value


def test_machine_code_of_every_key_is_limited_to_its_features():
    """Nothing that LLVM may use by itself is missing from the features that a machine is asked for."""
    for isa in targets.ISAS:
        features = targets.parse(isa.key).features
        needed = [cpu.KERNEL_NAME[isa.arch][name] for name in isa.needs if name in cpu.KERNEL_NAME[isa.arch]]
        assert set(needed) <= set(features)


def test_cpp_knows_the_same_aarch64_flags():
    header = (importlib.resources.files("tvm_vitq.deploy") / "cpu_features.h").read_text()
    named = set(re.findall(r'\{"(\w+)", [12], \d+\}', header))
    assert named == set(cpu.KERNEL_NAME["aarch64"].values())
