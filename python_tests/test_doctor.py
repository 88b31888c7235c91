"""`vcr1 doctor` says what is there, names what is not, and changes nothing."""

import os
import subprocess
import sys
from importlib import metadata

import torch

import vcr1_fast.ops  # noqa: F401  (defines the ops)
from vcr1_fast import doctor
from vcr1_fast.integrations import patching
from vcr1_fast.ops import backend


def test_report_names_versions_every_op_and_the_native_build(capsys):
    status = doctor.main()
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out
    for op in backend.registered():
        assert f"  {op.name} " in out
    assert ("problem:" in out) == (status == 1)
    if backend.native is not None:
        assert backend.native.cpu_isa() in out


def test_a_missing_native_module_and_package_are_problems_with_their_remedy(monkeypatch, capsys):
    known = metadata.version

    def version(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(backend, "native", None)
    monkeypatch.setattr(doctor.metadata, "version", version)
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "problem: peft is missing: pip install 'vcr1_fast[train]'" in out
    assert "problem: the native module vcr1_fast._C is not built" in out


def test_integrations_are_listed_with_releases_and_targets(monkeypatch):
    installed = {"verl": "0.9.1", "openrlhf": "0.9.0"}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(patching.metadata, "version", version)
    rows = doctor.integrations()
    found = dict(reversed(rows))
    assert found["verl.patch_verl"].startswith("verl 0.9.1 (checked on 0.8.0, ")
    head = "would set FusedLinearForPPO of verl.utils.experimental.torch_functional"
    assert found["  fused_head"] == head
    assert found["openrlhf.patch_openrlhf"].startswith("refuses: openrlhf 0.9.0 is not a checked")
    assert found["easyr1.patch_easyr1"].startswith("refuses: verl 0.9.1 is not a checked")
    assert "ms-swift is not installed" in found["ms_swift.patch_ms_swift"]
    assert sum("POLICY_LOSS_REGISTRY" in value for _, value in rows) == 1


def test_devices_are_listed_with_memory(monkeypatch):
    class Properties:
        name, total_memory, major, minor = "Made-up GPU", 80 * 2**30, 9, 0

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert doctor.cuda()[1] == ("device 0", "Made-up GPU, 80 GiB, compute capability 9.0")


def test_nothing_heavy_is_imported_and_no_file_written(tmp_path):
    code = (
        "import sys; from vcr1_fast import doctor; doctor.main();"
        "heavy = {'transformers', 'decord', 'av', 'matplotlib', 'trl', 'liger_kernel', 'verl'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert out.stdout.splitlines()[-1] == "[]", out.stderr
    assert list(tmp_path.iterdir()) == []
